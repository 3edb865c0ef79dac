"""Every kind of damage to a shard: verify names it; reading refuses it or gives what was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from lmp.cli import main
from lmp.data.index import FilmIndex
from lmp.data.shards import FilmRecord, ShardWriter
from lmp.data.verify import verify
from lmp.errors import UserError
from tests.data.damages import edit_manifest, flip, header_of, overwrite, place, without_member

Make = Callable[..., Any]
Damage = Callable[[Path], object]

SHARD = "films-000000.tar"
COLUMNS = ["check", "shots", "video", "video_valid", "audio", "audio_valid"]
KEYS = ["a", "b", "c", "d"]


class Case(NamedTuple):
    """A damage to the first shard (films a, b, c), the films in which it lies, and what messages name beside."""

    name: str
    damage: Damage
    films: str
    what: str = ""


def tar(folder: Path) -> Path:
    return folder / SHARD


def garbage(size: int) -> bytes:
    return np.random.default_rng(0).bytes(size)


def cut(where: Callable[[Path], int]) -> Damage:
    return lambda folder: os.truncate(tar(folder), where(folder))


def at_header(name: str, data: bytes) -> Damage:
    return lambda folder: overwrite(tar(folder), header_of(tar(folder), name), data)


def at_member(name: str, offset: int) -> Damage:
    """One bit of a member."""
    return lambda folder: flip(tar(folder), header_of(tar(folder), name) + 512 + offset, bits=1)


def bit_of(column: str) -> Damage:
    """The last bit of the first row of film b; of valid bits the only one that is used."""
    return lambda folder: flip(tar(folder), place(folder, 0, 1, column), bits=1)


CASES = [
    Case("cut inside a member", cut(lambda f: place(f, 0, 1, "video") + 5), "bc"),
    Case("cut at a member boundary", cut(lambda f: header_of(tar(f), "b.safetensors")), "bc"),
    Case("cut at a sample boundary", cut(lambda f: header_of(tar(f), "b.json")), "bc"),
    Case("cut before its end mark", cut(lambda f: tar(f).stat().st_size - 1024), ""),
    Case("header overwritten (json)", at_header("b.json", garbage(512)), "b", "tar header"),
    Case("header overwritten (safetensors)", at_header("b.safetensors", garbage(512)), "b", "tar header"),
    Case("header zeroed (json)", at_header("b.json", bytes(512)), "b", "tar header"),
    Case("header zeroed (safetensors)", at_header("b.safetensors", bytes(512)), "b", "tar header"),
    *(Case(f"bit of {column}", bit_of(column), "b", column) for column in COLUMNS),
    Case("bit of the safetensors header's length", at_member("b.safetensors", 0), "b", "safetensors header"),
    Case("bit of the safetensors header's text", at_member("b.safetensors", 8), "b", "safetensors header"),
    Case("bit of KEY.json", at_member("b.json", 3), "b", "info"),
    Case("missing member (json)", lambda f: without_member(tar(f), "b.json"), "bc"),
    Case("missing member (safetensors)", lambda f: without_member(tar(f), "b.safetensors"), "bc"),
    Case("zero-length file", lambda f: os.truncate(tar(f), 0), "abc"),
    Case("only zeros", lambda f: tar(f).write_bytes(bytes(tar(f).stat().st_size)), "abc"),
    Case("missing file", lambda f: tar(f).unlink(), ""),
]


@pytest.fixture
def records(film: Make) -> list[FilmRecord]:
    return [film(key, shots, seed=shots) for key, shots in zip(KEYS, [4, 9, 6, 5], strict=True)]


@pytest.fixture
def shards(tmp_path: Path, records: list[FilmRecord], write: Make) -> Path:
    return write(tmp_path / "s", records, films_per_shard=3)


def same(index: FilmIndex, number: int, film: FilmRecord) -> bool:
    """Whether reading the film, its record included, gives what was written."""
    rows = index.read(number, 0, len(film.shots_S2))
    pairs = [(rows.shots_N2, torch.from_numpy(film.shots_S2))]
    for name in film.features:
        pairs += [(rows.features[name], film.features[name]), (rows.valid[name], film.valid[name])]
    arrays = all(torch.equal(read.view(torch.uint8), written.view(torch.uint8)) for read, written in pairs)
    return arrays and index.info(number)["title"] == film.info["title"]


def refusals(folder: Path, films: list[FilmRecord], **options: bool) -> dict[str, UserError]:
    """Reads every film: those refused, by key; every other is what was written."""
    refused: dict[str, UserError] = {}
    index = FilmIndex.load(folder, **options)
    for number, film in enumerate(films):
        try:
            assert same(index, number, film), f"film {film.key} was read and is not what was written"
        except UserError as error:
            refused[film.key] = error
    return refused


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verify_names_it(shards: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.damage(shards)
    index = FilmIndex.load(shards, check_sizes=False)
    faults = list(verify(index))
    assert faults and all(SHARD in str(fault) for fault in faults)
    assert {index.keys[f.film] for f in faults if f.film is not None} == set(case.films)
    named = [str(f) for f in faults if f.film is not None]
    assert all(case.what in text and f"{SHARD}, film " in text for text in named)
    assert main(["data", "verify", str(shards)]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(faults)
    (line,) = err.splitlines()
    assert line.startswith("error: ") and SHARD in line


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reading_refuses_it_or_gives_what_was_written(shards: Path, records: list[FilmRecord], case: Case) -> None:
    case.damage(shards)
    try:
        refused = refusals(shards, records)
    except UserError as error:
        assert SHARD in error.problem  # at loading: the size is another
        return
    assert set(refused) <= set(case.films)
    if case.what in (*COLUMNS, "info"):
        modality = case.what.removesuffix("_valid")
        assert f"{SHARD}, film b, {modality if modality != 'check' else ''}" in refused["b"].problem


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_after_loading_is_no_more_silent(shards: Path, records: list[FilmRecord], case: Case) -> None:
    """As a shard that is damaged while a training reads it."""
    case.damage(shards)
    for key, error in refusals(shards, records, check_sizes=False).items():
        assert f"{SHARD}, film {key}, " in error.problem


@pytest.mark.parametrize("column", COLUMNS)
def test_a_bit_of_a_column_is_found_by_the_films_own_checksums(shards: Path, column: str) -> None:
    edit_manifest(shards, sha256=None)
    bit_of(column)(shards)
    index = FilmIndex.load(shards)
    index._crc32_FC[:] = -1
    (first, *_) = verify(index)
    assert first.film == 1 and first.column is not None


def test_any_byte(shards: Path, records: list[FilmRecord]) -> None:
    whole = tar(shards).read_bytes()
    for offset in np.random.default_rng(3).integers(0, len(whole), 60).tolist():
        flip(tar(shards), offset, bits=1 << offset % 8)
        assert list(verify(FilmIndex.load(shards))), f"byte {offset}"
        refused = refusals(shards, records)
        assert len(refused) <= 1 and all(f"{SHARD}, film {key}, " in e.problem for key, e in refused.items())
        tar(shards).write_bytes(whole)


def test_nan_by_another_writer(tmp_path: Path, film: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmp.data.record.not_finite", lambda t: torch.zeros(len(t), dtype=torch.bool))
    bad = film("a", 4)
    bad.features["audio"][1, 0, 0] = float("nan")
    with ShardWriter(tmp_path / "s", encoders={}) as writer:
        writer.write(bad)
    monkeypatch.undo()
    (fault,) = verify(FilmIndex.load(tmp_path / "s"))
    assert str(fault).endswith("film a, audio: holds NaN or infinity, first in shot 1")
    assert refusals(tmp_path / "s", [bad]) == {}
