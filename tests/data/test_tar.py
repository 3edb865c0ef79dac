"""The strict walker, and `lmp data index` on the tars of others and on every kind of damage."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset

from lmp.cli import main
from lmp.data.index import FilmIndex
from lmp.data.indexer import index_folder
from lmp.data.manifest import load_indexes, read_manifest
from lmp.data.quarantine import quarantine
from lmp.data.shards import FilmRecord, ShardWriter
from lmp.data.tar import Tar
from lmp.data.verify import verify
from lmp.errors import UserError

Make = Callable[..., Any]
Members = list[tuple[str, bytes]]


def tar_bytes(members: Members, format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def tensors_of(film: FilmRecord) -> dict[str, torch.Tensor]:
    """The tensors of a film without checksums, as others write them."""
    valid = {f"{name}_valid": tensor for name, tensor in film.valid.items()}
    return {"shots": torch.from_numpy(film.shots_S2), **film.features, **valid}


def members_of(film: FilmRecord, **changed: torch.Tensor | None) -> Members:
    """Its two members; tensors may be changed, or left out by None."""
    tensors = {k: v for k, v in (tensors_of(film) | changed).items() if v is not None}
    return [
        (f"{film.key}.json", json.dumps({"title": film.key}).encode()),
        (f"{film.key}.safetensors", safetensors.torch.save(tensors)),
    ]


@pytest.fixture
def few(film: Make) -> list[FilmRecord]:
    return [film(f"film-{n}", 3 + n, seed=n) for n in range(4)]


@pytest.fixture
def members(few: list[FilmRecord]) -> Members:
    return [member for film in few for member in members_of(film)]


def put(folder: Path, data: bytes, name: str = "part.tar") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return folder


def start_of(data: bytes, name: str) -> int:
    """The byte at which the header of a member starts."""
    return next(m.offset for m in tarfile.open(fileobj=io.BytesIO(data)).getmembers() if m.name == name)


def refused(folder: Path, *messages: str, **options: Any) -> None:
    """index_folder names the shard and what is wrong, and leaves the folder as it was."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError) as raised:
        index_folder(folder, **options)
    for message in messages:
        assert message in str(raised.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def assert_same_films(folder: Path, films: list[FilmRecord]) -> None:
    index = FilmIndex.load(folder)
    assert index.keys == [f.key for f in films]
    for number, film in enumerate(films):
        rows = index.read(number, 1, len(film.shots_S2))
        np.testing.assert_array_equal(rows.shots_N2.numpy(), film.shots_S2[1:])
        for name in film.features:
            assert torch.equal(rows.features[name], film.features[name][1:])
            assert torch.equal(rows.valid[name], film.valid[name][1:])


# Whole tars, whoever wrote them.


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walks_what_tarfile_writes_also_long_names(tmp_path: Path, format: int) -> None:
    long = "folder/" * 12 + "x" * (60 if format == tarfile.USTAR_FORMAT else 300) + ".bin"
    written = [("./a.json", b"{}"), (long, b"y" * 1000), ("empty.bin", b""), ("b.bin", b"z" * 512)]
    if format == tarfile.PAX_FORMAT:
        written.append(("ü.bin", b"u"))
    put(tmp_path, tar_bytes(written, format))
    with Tar(tmp_path / "part.tar") as tar:
        assert [(m.name, bytes(tar.read(m.offset, m.size))) for m in tar.members()] == written


def test_plain_webdataset_tars_are_indexed(tmp_path: Path, few: list[FilmRecord]) -> None:
    with webdataset.TarWriter(str(tmp_path / "part.tar")) as writer:  # its default time puts PAX headers everywhere
        for film in few:
            blob = safetensors.torch.save(tensors_of(film))
            writer.write({"__key__": film.key, "json": {"encoders": {"video": {"name": "r3d"}}}, "safetensors": blob})
    assert b"PaxHeader" in (tmp_path / "part.tar").read_bytes()
    manifest = index_folder(tmp_path)
    assert manifest["films"] == 4 and manifest["shots"] == 18
    assert manifest["encoders"] == {"video": {"name": "r3d"}}
    assert_same_films(tmp_path, few)
    index = FilmIndex.load(tmp_path)
    assert not index.checked(0) and list(verify(index)) == []


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar(1)")
def test_tars_of_tar_are_indexed(tmp_path: Path, members: Members, few: list[FilmRecord]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, data in members:
        (source / name).write_bytes(data)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "out/part.tar", "-C", source, "."], check=True)
    index_folder(tmp_path / "out", read_all=True)
    assert_same_films(tmp_path / "out", few)


def test_only_headers_are_read_unless_asked(tmp_path: Path, film: Make, bytes_read: list[int]) -> None:
    big = film("big", 20_000)
    put(tmp_path, tar_bytes(members_of(big)))
    entry = index_folder(tmp_path)["shards"][0]
    assert sum(bytes_read) < 50_000 < entry["bytes"] // 10
    assert entry["sha256"] is None
    with np.load(tmp_path / entry["index"]) as arrays:
        assert "crc32" not in arrays.files
    bytes_read.clear()
    assert index_folder(tmp_path, read_all=True, overwrite=True)["shards"][0]["sha256"] is not None
    assert sum(bytes_read) >= entry["bytes"]


def by_column(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The index with its columns in order of their names: tars do not keep the order of modalities."""
    order = np.argsort(arrays["columns"])
    found: dict[str, Any] = {name: a.tolist() for name, a in arrays.items() if name in ("keys", "shots", "info")}
    found |= {name: arrays[name][..., order].tolist() for name in ("columns", "offset", "crc32")}
    return found | {"modalities": json.loads(str(arrays["modalities"]))}


def test_hashing_finds_what_the_writer_wrote_down(tmp_path: Path, folder: Path) -> None:
    for tar in folder.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    found, wanted = index_folder(tmp_path, read_all=True), read_manifest(folder)
    same = ("modalities", "encoders", "films", "shots", "cleared")
    assert {k: found[k] for k in same} == {k: wanted[k] for k in same}  # type: ignore[literal-required]
    without = [{k: v for k, v in s.items() if k != "index_sha256"} for m in (found, wanted) for s in m["shards"]]
    assert without[: len(without) // 2] == without[len(without) // 2 :]
    pairs = zip(load_indexes(str(tmp_path), found["shards"]), load_indexes(str(folder), wanted["shards"]), strict=True)
    for one, other in pairs:
        assert by_column(one) == by_column(other)


def test_rebuilding_a_written_folder_changes_no_byte(tmp_path: Path, folder: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "films-000001.idx.npz").write_bytes(b"damaged")
    index_folder(copy, read_all=True, overwrite=True)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_clearing_is_counted_from_the_records(tmp_path: Path, film: Make) -> None:
    bad = film("a", 5)
    bad.features["video"][2] = float("nan")
    with ShardWriter(tmp_path, encoders={}) as writer:
        writer.write(bad)
    assert index_folder(tmp_path, overwrite=True)["cleared"] == {"video": 1, "audio": 0}


def test_encoders_that_differ_between_films_are_left_out(tmp_path: Path, few: list[FilmRecord]) -> None:
    members: Members = []
    for film in few:
        json_member = (f"{film.key}.json", json.dumps({"encoders": {"video": {"name": film.key}}}).encode())
        members += [json_member, members_of(film)[1]]
    assert index_folder(put(tmp_path, tar_bytes(members)))["encoders"] == {}


def test_a_manifest_is_replaced_only_when_asked_and_quarantine_stays(tmp_path: Path, folder: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    quarantine(copy, {"film-03": "hiss"})
    refused(copy, "already holds manifest.json", "--overwrite")
    assert index_folder(copy, overwrite=True)["quarantined"] == {"film-03": "hiss"}
    assert "film-03" not in FilmIndex.load(copy).keys


def test_films_with_and_without_checksums_mix(tmp_path: Path, film: Make, write: Make) -> None:
    write(tmp_path, [film("a", 4)])
    put(tmp_path, tar_bytes(members_of(film("b", 5))), "others.tar")
    index_folder(tmp_path, read_all=True, overwrite=True)
    index = FilmIndex.load(tmp_path)
    assert [index.checked(0), index.checked(1)] == [True, False] and list(verify(index)) == []


def test_members_that_are_no_part_of_films_are_passed_over(tmp_path: Path, few: list[FilmRecord]) -> None:
    members = [("__info__", b"{}"), *members_of(few[0]), (f"{few[0].key}.de.srt", b"1")]
    assert index_folder(put(tmp_path, tar_bytes(members)))["films"] == 1


# Damage. `data` is a whole tar of four films; film-2.json follows film-1.safetensors.


def cut_inside(data: bytes) -> bytes:
    return data[: start_of(data, "film-2.safetensors") + 700]


def cut_at_member(data: bytes) -> bytes:
    return data[: start_of(data, "film-2.safetensors")]


def cut_at_sample(data: bytes) -> bytes:
    return data[: start_of(data, "film-2.json")]


def cut_in_header(data: bytes) -> bytes:
    return data[: start_of(data, "film-2.json") + 100]


def overwritten_header(data: bytes) -> bytes:
    at = start_of(data, "film-2.json")
    return data[:at] + b"\xa5" * 512 + data[at + 512 :]


def one_bit_in_header(data: bytes) -> bytes:
    at = start_of(data, "film-2.json")
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def zeroed_header(data: bytes) -> bytes:
    at = start_of(data, "film-2.json")
    return data[:at] + bytes(512) + data[at + 512 :]


def zeroed_tail(data: bytes) -> bytes:
    at = start_of(data, "film-2.json")
    return data[:at] + bytes(1 << 16)


def half_an_end(data: bytes) -> bytes:
    return data.rstrip(b"\0")[: -len(data) % 512 or None].ljust(-(-len(data.rstrip(b"\0")) // 512) * 512 + 512, b"\0")


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (cut_inside, ["is cut inside of member film-2.safetensors"]),
        (cut_at_member, ["is cut off after member film-2.json", "without the end-of-archive blocks"]),
        (cut_at_sample, ["is cut off after member film-1.safetensors", "without the end-of-archive blocks"]),
        (cut_in_header, ["is cut off after member film-1.safetensors"]),
        (overwritten_header, ["header at byte", "after member film-1.safetensors is damaged"]),
        (one_bit_in_header, ["after member film-1.safetensors is damaged: bad checksum"]),
        (zeroed_header, ["data after the end-of-archive block", "after member film-1.safetensors"]),
        (zeroed_tail, ["bytes of zeros after member film-1.safetensors: its tail was lost"]),
        (half_an_end, ["after member film-3.safetensors: its end-of-archive blocks are cut"]),
        (lambda data: data + data, ["data after the end-of-archive block", "after member film-3.safetensors"]),
        (lambda data: data + b"\0" * 100, ["end-of-archive blocks are cut"]),
        (lambda _: b"", ["is an empty file"]),
        (lambda _: bytes(10240), ["holds no member"]),
        (lambda _: b"\x1f\x8b" + bytes(600), ["is compressed", "gunzip"]),
        (lambda _: b"this is no tar" * 100, ["header at byte 0 is damaged"]),
    ],
    ids=lambda v: getattr(v, "__name__", None) if callable(v) else "",
)
def test_damaged_tars_are_refused(
    tmp_path: Path, members: Members, damage: Callable[[bytes], bytes], messages: list[str]
) -> None:
    folder = put(tmp_path / "s", damage(tar_bytes(members)))
    refused(folder, str(folder / "part.tar"), *messages)
    refused(folder, str(folder / "part.tar"), *messages, read_all=True)


def test_damaged_pax_headers_are_refused(tmp_path: Path) -> None:
    data = tar_bytes([("ü" * 60 + ".bin", b"x")], tarfile.PAX_FORMAT)
    at = data.index(b"path=") - 1
    for damaged in (data[: at - 3] + b"999" + data[at:], data.replace(b"path=", b"path!"), data[:600]):
        put(tmp_path, damaged)
        with Tar(tmp_path / "part.tar") as tar, pytest.raises(UserError, match=r"PAX header is damaged|is cut"):
            list(tar.members())


def test_links_and_sparse_files_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("a.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "/elsewhere"
        tar.addfile(link)
    refused(put(tmp_path, buffer.getvalue()), "part.tar, member a.safetensors: is a link")


def without(members: Members, name: str) -> Members:
    return [m for m in members if m[0] != name]


def renamed(members: Members, old: str, new: str) -> Members:
    return [(name.replace(old, new), data) for name, data in members]


def with_header(members: Members, name: str, change: Callable[[bytes], bytes]) -> Members:
    return [(n, change(d) if n == name else d) for n, d in members]


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda m: without(m, "film-1.json"), ["film film-1: member film-1.json is missing"]),
        (lambda m: without(m, "film-1.safetensors"), ["film film-1: member film-1.safetensors is missing"]),
        (
            lambda m: [m[0], m[2], m[1], m[3]],
            ["member film-0.safetensors: lies apart from the other members of film-0"],
        ),
        (lambda m: renamed(m, "film-1", "film.1"), ["member film.1.json: has a dot in its key"]),
        (lambda m: renamed(m, "film-1", "a/film-1"), ["film a/film-1: its key is not of letters"]),
        (lambda m: [*m, *m[:2]], ["member film-0.json: occurs twice"]),
        (lambda m: [m[0], m[0], m[1]], ["member film-0.json: occurs twice"]),
        (lambda m: [*m, ("README", b"hi")], ["member README: is not named KEY.TYPE"]),
        (lambda m: with_header(m, "film-1.json", lambda _: b"{"), ["member film-1.json: is not JSON"]),
        (lambda m: with_header(m, "film-1.json", lambda _: b"[]"), ["member film-1.json: holds no JSON object"]),
        (
            lambda m: with_header(m, "film-1.safetensors", lambda d: b"\xff" * 8 + d[8:]),
            ["member film-1.safetensors: its safetensors header is damaged"],
        ),
        (
            lambda m: with_header(m, "film-1.safetensors", lambda d: d[:20] + b"\0\0" + d[22:]),
            ["member film-1.safetensors: its safetensors header is damaged"],
        ),
        (
            lambda m: with_header(m, "film-1.safetensors", lambda d: d.replace(b'"shape":[4,1,8]', b'"shape":[5,1,8]')),
            ["member film-1.safetensors: tensor video F16 [5, 1, 8] does not lie at the bytes"],
        ),
        (
            lambda m: with_header(m, "film-1.safetensors", lambda d: d[:-8]),
            ["member film-1.safetensors: its tensors end"],
        ),
        (lambda m: with_header(m, "film-1.safetensors", lambda _: b""), ["film-1.safetensors: has 0 bytes"]),
    ],
)
def test_samples_that_are_no_film_are_refused(
    tmp_path: Path, members: Members, change: Callable[[Members], Members], messages: list[str]
) -> None:
    folder = put(tmp_path / "s", tar_bytes(change(members)))
    refused(folder, str(folder / "part.tar"), *messages)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shots": None}, "has no tensor `shots`"),
        ({"shots": torch.zeros(4, 2)}, "`shots` is F32 [4, 2]"),
        ({"shots": torch.zeros(5, 2, dtype=torch.int32)}, "audio is BF16 [4, 2, 4], but there are 5 shots"),
        ({"video_valid": torch.ones(3, dtype=torch.bool)}, "video_valid is BOOL [3], but there are 4 shots"),
        ({"video_valid": torch.ones(4)}, "video_valid is F32 [4]"),
        ({"video_valid": None}, "tensor video belongs to no modality"),
        ({"video": None}, "has video_valid but no tensor video"),
        ({"video": torch.zeros(4, 1, 8)}, "video is F32 [4, 1, 8]"),
        ({"video": torch.zeros(4, 8).half()}, "video is F16 [4, 8]"),
        ({"video": torch.zeros(4, 1, 9).half()}, "modality video: float16 [S, 1, 9], but the films before have"),
        ({"video": None, "video_valid": None}, "modality video: nothing, but the films before have"),
        ({"check": torch.zeros(4, 2, dtype=torch.int64)}, "`check` is I64 [4, 2], not I64 [4, 3]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, few: list[FilmRecord], changed: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = put(tmp_path / "s", tar_bytes([*members_of(few[0]), *members_of(few[1], **changed)]))
    refused(folder, "part.tar, member film-1.safetensors", message)


def test_a_film_without_shots_is_refused(tmp_path: Path, few: list[FilmRecord]) -> None:
    none = {name: tensor[:0] for name, tensor in tensors_of(few[0]).items()}
    folder = put(tmp_path / "s", tar_bytes(members_of(few[0], **none)))
    refused(folder, "member film-0.safetensors: the film has 0 shots")


def test_a_film_in_two_tars_is_refused(tmp_path: Path, members: Members) -> None:
    folder = put(tmp_path / "s", tar_bytes(members))
    put(folder, tar_bytes(members[2:4]), "second.tar")
    refused(folder, "second.tar, member film-1.safetensors: is in part.tar too")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t["video"][2, 0, 1:2].fill_(float("nan")), "video holds NaN or infinity in 1 shots, the first is 2"),
        (lambda t: t["shots"][1].fill_(0), "film film-1: shot 1 spans [0, 0] ms"),
        (lambda t: t["audio_valid"].view(torch.uint8).fill_(7), "audio_valid holds bytes that are neither 0 nor 1"),
    ],
)
def test_hashing_looks_at_the_values(
    tmp_path: Path, few: list[FilmRecord], spoil: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    tensors = {name: tensor.clone() for name, tensor in tensors_of(few[1]).items()}
    spoil(tensors)
    folder = put(tmp_path / "s", tar_bytes([*members_of(few[0]), *members_of(few[1], **tensors)]))
    refused(folder, "part.tar, member film-1.safetensors", message, read_all=True)


def test_hashing_holds_rows_against_their_checksums(tmp_path: Path, film: Make, write: Make) -> None:
    write(tmp_path, [film("a", 6)])
    index = FilmIndex.load(tmp_path)
    offset = next(start for name, start, *_ in index.stored(0) if name == "video")
    with (tmp_path / "films-000000.tar").open("r+b") as file:
        file.seek(offset + 3 * 16)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    refused(tmp_path, "member a.safetensors: the bytes of shot 3 are not those written", read_all=True, overwrite=True)


# The command.


def test_the_command(tmp_path: Path, members: Members, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(tmp_path / "s", tar_bytes(members))
    assert main(["data", "index", str(folder), "--hash"]) == 0
    assert "4 films, 18 shots in 1 shards" in capsys.readouterr().out
    assert main(["data", "index", str(folder)]) == 2
    assert main(["data", "index", "s3://bucket/shards"]) == 2
    assert main(["data", "index", str(tmp_path)]) == 2
    assert main(["data", "index", str(tmp_path / "none")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") and " -> " in line for line in lines] == [True] * 4
    assert "is a URL" in lines[1] and "copy the folder here" in lines[1]
    assert main(["data", "index", str(folder), "--overwrite"]) == 0
