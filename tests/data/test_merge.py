"""Shards of several folders in one: the films of all, in order, and no byte of them written anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmp.data.index import FilmIndex
from lmp.data.merge import merge
from lmp.data.quarantine import quarantine
from lmp.data.record import FilmRecord
from lmp.data.shards import ShardWriter
from lmp.data.verify import verify
from lmp.errors import UserError


@pytest.fixture
def parts(films: list[FilmRecord], write: Callable[..., Path], tmp_path: Path) -> list[Path]:
    cuts = [(0, 8), (8, 9), (9, 23)]
    return [write(tmp_path / f"part-{first}", films[first:last]) for first, last in cuts]


def test_the_films_of_all_in_order(parts: list[Path], folder: Path, tmp_path: Path) -> None:
    manifest = merge(parts, tmp_path / "out")
    index, whole = FilmIndex.load(tmp_path / "out"), FilmIndex.load(folder)
    assert index.keys == whole.keys and index.modalities == whole.modalities
    assert index.manifests[0]["encoders"] == whole.manifests[0]["encoders"]
    assert list(verify(index)) == []
    assert [entry["name"] for entry in manifest["shards"]] == [f"films-{n:06d}.tar" for n in range(7)]
    for film, shots in enumerate(whole.shots.tolist()):
        assert index.info(film) == whole.info(film)
        found, wanted = index.read(film, 0, shots), whole.read(film, 0, shots)
        for column in whole.columns:
            assert torch.equal(found.column(column.name), wanted.column(column.name))
    assert (parts[2] / "films-000000.tar").samefile(tmp_path / "out" / "films-000003.tar")


def test_parts_of_whole_shards_give_the_bytes_of_one_writer(
    films: list[FilmRecord], write: Callable[..., Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are no hard links."""

    def refuse(*_: Any) -> None:
        raise OSError

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    merge([write(tmp_path / "a", films[:8]), write(tmp_path / "b", films[8:])], tmp_path / "out")
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_what_is_there_is_replaced_only_when_asked(parts: list[Path], tmp_path: Path) -> None:
    merge(parts[:2], tmp_path / "out")
    with pytest.raises(UserError, match="already holds"):
        merge(parts[2:], tmp_path / "out")
    assert len(FilmIndex.load(tmp_path / "out")) == 9
    merge(parts[2:], tmp_path / "out", overwrite=True)
    assert len(FilmIndex.load(tmp_path / "out")) == 14
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", *[".npz"] * 4, *[".tar"] * 4]


def test_folders_that_do_not_fit_are_refused(parts: list[Path], films: list[FilmRecord], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="occurs twice"):
        merge([parts[0], parts[0]], out)
    with ShardWriter(tmp_path / "other", encoders={"video": {"name": "other"}}) as writer:
        writer.write(films[20])
    with pytest.raises(UserError, match="'other'"):
        merge([parts[0], tmp_path / "other"], out)
    quarantine(parts[0], {"film-03": "odd"})
    with pytest.raises(UserError, match="quarantined films, such as film-03"):
        merge(parts, out)
    os.truncate(parts[1] / "films-000000.tar", 1000)
    with pytest.raises(UserError, match=r"films-000000\.tar"):
        merge(parts[1:], out)
    assert not out.exists()
