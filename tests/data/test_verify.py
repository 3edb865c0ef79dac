from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from lmp.cli import main
from lmp.data.index import FilmIndex
from lmp.data.manifest import MANIFEST_NAME, manifest_digest
from lmp.data.shards import FilmRecord, ShardWriter
from lmp.data.verify import Fault, bytes_to_read, unhashed, verify
from tests.data.damages import edit_manifest, flip, header_of, overwrite, place

Make = Callable[..., Any]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The corpus, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def remote(folder: Path) -> Iterator[str]:
    """The corpus behind a URL."""
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/verify/shards", recursive=True)
    yield "memory://verify/shards"
    files.rm("/verify", recursive=True)


def faults_of(folder: Path | str, **options: bool) -> list[str]:
    return [str(fault) for fault in verify(FilmIndex.load(folder, **options))]


def test_whole_shards_have_no_fault(folder: Path, films: list[FilmRecord]) -> None:
    index = FilmIndex.load(folder)
    done: list[int] = []
    assert list(verify(index, progress=done.append)) == []
    assert sum(done) == bytes_to_read(index)
    assert sum(done) <= 2 * sum(p.stat().st_size for p in folder.glob("*.tar"))
    assert unhashed(index) == []


def test_every_byte_is_read_about_twice_and_a_film_at_a_time(folder: Path, bytes_read: list[int]) -> None:
    index = FilmIndex.load(folder)
    largest = max(sum(size for _, _, size, _ in index.stored(film)) for film in range(len(index)))
    assert list(verify(index)) == []
    assert sum(bytes_read) <= sum(p.stat().st_size for p in folder.glob("*.tar"))
    assert max(bytes_read) <= largest


@pytest.mark.parametrize("column", ["check", "shots", "video", "video_valid", "audio", "audio_valid"])
def test_a_flipped_bit_is_named(copy: Path, column: str) -> None:
    flip(copy / "films-000001.tar", place(copy, 1, 2, column))
    shard = copy / "films-000001.tar"
    assert faults_of(copy) == [
        f"{shard} has another sha256 than its manifest says",
        f"{shard}, film film-06, {column}: crc32 differs",
    ]


def test_a_damaged_tar_header_is_named_with_its_film(copy: Path) -> None:
    shard = copy / "films-000001.tar"
    flip(shard, header_of(shard, "film-05.json"))
    assert faults_of(copy) == [
        f"{shard} has another sha256 than its manifest says",
        f"{shard}, film film-05, film-05.json: its tar header is damaged or missing",
    ]


@pytest.mark.parametrize("name", ["film-05.json", "film-05.safetensors"])
@pytest.mark.parametrize("data", [bytes(512), bytes(range(256)) * 2, b"\x00"])
def test_a_damaged_tar_header_is_named_without_any_hash(copy: Path, name: str, data: bytes) -> None:
    edit_manifest(copy, sha256=None)
    shard = copy / "films-000001.tar"
    overwrite(shard, header_of(shard, name), data)
    (fault,) = verify(FilmIndex.load(copy))
    assert fault.film == 5 and name in str(fault) and "tar header" in str(fault)


def test_a_header_that_names_another_film_is_a_fault(copy: Path) -> None:
    """A whole header, checksum and all, but the wrong one."""
    edit_manifest(copy, sha256=None)
    shard = copy / "films-000001.tar"
    data = shard.read_bytes()
    other = header_of(shard, "film-06.safetensors")
    overwrite(shard, header_of(shard, "film-05.safetensors"), data[other : other + 512])
    assert any("film film-05" in fault and "film-06.safetensors" in fault for fault in faults_of(copy))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"dtype":"F16"', b'"dtype":"BF1"', "film-05, video: is BF1"),
        (b'"video_valid"', b'"video_value"', "film-05, video_valid: its entry in the safetensors header is damaged"),
        (b'{"check"', b'["check"', "film-05, film-05.safetensors: its safetensors header is damaged"),
    ],
)
def test_the_safetensors_header_is_held_against_the_index(copy: Path, old: bytes, new: bytes, message: str) -> None:
    edit_manifest(copy, sha256=None)
    shard = copy / "films-000001.tar"
    start = header_of(shard, "film-05.safetensors") + 512
    at = shard.read_bytes().index(old, start)
    overwrite(shard, at, new)
    (fault,) = faults_of(copy)
    assert f"film {message}" in fault


def test_shapes_and_places_in_the_safetensors_header_are_checked(copy: Path) -> None:
    edit_manifest(copy, sha256=None)
    shard = copy / "films-000001.tar"
    data = shard.read_bytes()
    start = header_of(shard, "film-05.safetensors") + 512
    size = int.from_bytes(data[start : start + 8], "little")
    header = json.loads(data[start + 8 : start + 8 + size])
    header["video"]["shape"][1] = 2
    header["audio"]["data_offsets"][0] += 1
    overwrite(shard, start + 8, json.dumps(header, separators=(",", ":")).encode().ljust(size)[:size])
    faults = faults_of(copy)
    assert len(faults) == 2
    assert any("film film-05, video: is F16 [" in fault for fault in faults)
    assert any("film film-05, audio: is at bytes" in fault for fault in faults)


def test_the_record_is_held_against_the_index(tmp_path: Path, film: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmp.data.shards.film_json", lambda *_: json.dumps({"key": "b", "shots": 4}).encode())
    with ShardWriter(tmp_path / "s", encoders={}) as writer:
        writer.write(film("a", 4))
    faults = faults_of(tmp_path / "s")
    assert [fault.partition("film a, info: ")[2].split(",")[0] for fault in faults] == [
        "key is 'b'",
        "modalities is None",
    ]


def test_the_record_that_is_no_json_is_a_fault(copy: Path) -> None:
    flip(copy / "films-000000.tar", 520)
    faults = faults_of(copy)
    assert len(faults) == 2 and faults[1].endswith("film film-00, info: crc32 differs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda film: film.features["audio"][1, 0].fill_(float("nan")),
            "film a, audio: holds NaN or infinity, first in",
        ),
        (lambda film: np.copyto(film.shots_S2[2], [5000, 4000]), "film a, shots: shot 2 spans [5000, 4000] ms"),
    ],
)
def test_what_another_writer_let_through_is_found(
    tmp_path: Path, film: Make, monkeypatch: pytest.MonkeyPatch, change: Callable[[FilmRecord], Any], message: str
) -> None:
    monkeypatch.setattr("lmp.data.record.not_finite", lambda t: torch.zeros(len(t), dtype=torch.bool))
    monkeypatch.setattr("lmp.data.record.check_shots", lambda _, shots_S2: torch.from_numpy(shots_S2.copy()))
    bad = film("a", 4)
    change(bad)
    with ShardWriter(tmp_path / "s", encoders={}) as writer:
        writer.write(bad)
    monkeypatch.undo()
    faults = faults_of(tmp_path / "s")
    assert len(faults) == 1 and message in faults[0]


@pytest.mark.parametrize("name", ["video", "audio"])  # float16, bfloat16
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "largest", "smallest"])
def test_what_is_finite_and_what_is_not(
    tmp_path: Path, film: Make, monkeypatch: pytest.MonkeyPatch, name: str, value: float | str
) -> None:
    monkeypatch.setattr("lmp.data.record.not_finite", lambda t: torch.zeros(len(t), dtype=torch.bool))
    record = film("a", 4)
    limits = torch.finfo(record.features[name].dtype)
    number = {"largest": limits.max, "smallest": limits.smallest_normal / 2}.get(value, value)
    record.features[name][2, -1, -1] = number
    with ShardWriter(tmp_path / "s", encoders={}) as writer:
        writer.write(record)
    monkeypatch.undo()
    found = [fault.rpartition("film a, ")[2] for fault in faults_of(tmp_path / "s")]
    assert found == ([] if isinstance(value, str) else [f"{name}: holds NaN or infinity, first in shot 2"])


def test_every_film_that_a_cut_shard_lost_is_named(copy: Path) -> None:
    shard = copy / "films-000001.tar"
    os.truncate(shard, place(copy, 1, 2, "video"))  # film-04 and film-05 are whole, film-06 is cut, film-07 gone
    (copy / "films-000003.tar").unlink()
    faults = faults_of(copy, check_sizes=False)
    assert "films-000001.tar has" in faults[0]
    assert faults[-1] == f"{copy / 'films-000003.tar'} is missing"
    assert all("film film-06" in f or "film film-07" in f for f in faults[1:-1])
    assert sum("film film-07" in f for f in faults) == 7


def test_two_shards_in_each_others_place_are_found(tmp_path: Path, film: Make, write: Make) -> None:
    folder = write(tmp_path / "s", [film("a", 5, seed=1), film("b", 5, seed=2)], films_per_shard=1)
    one, two = folder / "films-000000.tar", folder / "films-000001.tar"
    data = one.read_bytes()
    shutil.copy(two, one)
    two.write_bytes(data)
    index = FilmIndex.load(folder)
    assert {index.keys[f.film] for f in verify(index) if f.film is not None} == {"a", "b"}


def test_behind_a_url(remote: str, folder: Path) -> None:
    assert faults_of(remote) == []
    files = fsspec.filesystem("memory")
    data = bytearray(files.cat("/verify/shards/films-000001.tar"))
    data[place(folder, 1, 2, "video")] ^= 1
    files.pipe("/verify/shards/films-000001.tar", bytes(data))
    files.rm("/verify/shards/films-000003.tar")
    shards = "memory://verify/shards/films-00000"
    assert faults_of(remote, check_sizes=False) == [
        f"{shards}1.tar has another sha256 than its manifest says",
        f"{shards}1.tar, film film-06, video: crc32 differs",
        f"{shards}3.tar is missing",
    ]


def test_what_is_not_hashed_is_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(copy, sha256=None)
    assert main(["data", "verify", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "not hashed: 6 shards have no sha256 in the manifest" in out and "and 1 more" in out
    path = copy / "films-000002.idx.npz"
    with np.load(path, allow_pickle=False) as found:
        arrays = {name: found[name] for name in found if name != "crc32"}
    np.savez(path, **arrays)
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    manifest["shards"][2]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["digest"] = manifest_digest(manifest)
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert "not hashed: 4 films have no crc32 in the index" in unhashed(FilmIndex.load(copy))


def test_command_prints_the_list_and_one_error_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for film in range(3):
        flip(copy / "films-000001.tar", place(copy, 1, film, "video"))
        flip(copy / "films-000002.tar", place(copy, 2, film, "audio"))
    assert main(["data", "verify", str(copy)]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 8
    (line,) = err.splitlines()
    assert line.startswith("error: ") and "and 3 more -> " in line and "film-04, video" in line


def test_command_lists_json(copy: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", "--json", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out) == []
    shard = copy / "films-000001.tar"
    flip(shard, place(copy, 1, 2, "video"))
    assert main(["data", "verify", "--json", str(copy)]) == 2
    assert json.loads(capsys.readouterr().out) == [
        {"shard": str(shard), "film": None, "column": None, "problem": "has another sha256 than its manifest says"},
        {"shard": str(shard), "film": "film-06", "column": "video", "problem": "crc32 differs"},
    ]


def test_faults_are_one_line_each() -> None:
    assert str(Fault(0, 1, "video", "bad\nvery bad", "s.tar, film a, video")) == "s.tar, film a, video: bad very bad"
