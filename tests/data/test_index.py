from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmp.data import storage
from lmp.data.index import FilmIndex
from lmp.data.manifest import manifest_digest
from lmp.data.shards import FilmRecord, ShardWriter
from lmp.data.verify import verify
from lmp.errors import UserError
from tests.data.damages import flip, place

Make = Callable[..., Any]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The corpus, to be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_the_index_lists_what_was_written(folder: Path, films: list[FilmRecord]) -> None:
    index = FilmIndex.load(folder)
    assert index.keys == [f.key for f in films] and len(index) == 23
    assert index.shots.tolist() == [len(f.shots_S2) for f in films]
    assert index.shard_of.tolist() == [i // 4 for i in range(23)]
    assert list(index.modalities) == ["video", "audio"]
    assert index.info(5)["title"] == films[5].info["title"]
    assert index.digest == index.manifests[0]["digest"]
    assert list(verify(index)) == []


def test_a_range_of_shots_is_what_was_written(folder: Path, films: list[FilmRecord]) -> None:
    index = FilmIndex.load(folder)
    rng = np.random.default_rng(1)
    for number, film in enumerate(films):
        start = int(rng.integers(0, len(film.shots_S2)))
        stop = int(rng.integers(start, len(film.shots_S2))) + 1
        rows = index.read(number, start, stop)
        np.testing.assert_array_equal(rows.shots_N2.numpy(), film.shots_S2[start:stop])
        for name in film.features:
            assert torch.equal(rows.features[name], film.features[name][start:stop])
            assert torch.equal(rows.valid[name], film.valid[name][start:stop])


def test_a_range_reads_its_own_bytes_only(folder: Path, bytes_read: list[int]) -> None:
    index = FilmIndex.load(folder)
    index.read(21, 10, 17)
    # Checksums, shots, video, its valid bit, audio, its valid bit.
    assert sum(bytes_read) == 7 * (24 + 8 + 16 + 1 + 16 + 1)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 61), (5, 5), (60, 61)])
def test_a_range_outside_the_film_is_refused(folder: Path, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="has 60 shots"):
        FilmIndex.load(folder).read(21, start, stop)


def test_short_reads_are_completed(folder: Path, monkeypatch: pytest.MonkeyPatch, films: Any) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:5]], offset))
    rows = FilmIndex.load(folder).read(21, 0, 60)
    assert torch.equal(rows.features["video"], films[21].features["video"])


def test_threads_share_few_descriptors(folder: Path, films: list[FilmRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_MAX_OPEN", 2)
    index = FilmIndex.load(folder)
    before = open_descriptors()
    numbers = np.random.default_rng(0).integers(0, len(films), 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda n: index.read(n, 0, len(films[n].shots_S2)), numbers))
    assert open_descriptors() <= before + 2
    for number, row in zip(numbers, rows, strict=True):
        assert torch.equal(row.features["audio"], films[number].features["audio"])


def test_several_folders_are_one_index(folder: Path, tmp_path: Path, film: Make, write: Make) -> None:
    other = write(tmp_path / "other", [film("x", 3, seed=7), film("y", 4, seed=8)])
    index = FilmIndex.load([folder, other])
    assert index.keys[-2:] == ["x", "y"] and index.shots[-2:].tolist() == [3, 4]
    assert index.shard_of[-1] == 6 and len(index.manifests) == 2
    assert torch.equal(index.read(24, 1, 4).features["video"], film("y", 4, seed=8).features["video"][1:4])
    assert index.info(23)["key"] == "x"
    digests = {i.digest for i in (index, FilmIndex.load([other, folder]), FilmIndex.load(folder))}
    assert len(digests) == 3
    with pytest.raises(UserError, match="film film-00 occurs twice"):
        FilmIndex.load([folder, folder])


def test_the_order_of_modalities_may_differ_between_folders(folder: Path, tmp_path: Path, film: Make) -> None:
    turned = film("x", 5, seed=3)
    turned.features = dict(reversed(turned.features.items()))
    with ShardWriter(tmp_path / "s", encoders={}) as writer:
        writer.write(turned)
    rows = FilmIndex.load([folder, tmp_path / "s"]).read(23, 0, 5)
    assert all(torch.equal(rows.features[n], turned.features[n]) for n in ("video", "audio"))
    assert torch.equal(rows.valid["audio"], turned.valid["audio"])


def test_folders_with_other_modalities_are_refused_with_the_difference(
    folder: Path, tmp_path: Path, film: Make
) -> None:
    other = film("x", 3)
    other.features["video"] = torch.zeros(3, 1, 9)
    other.features["text"], other.valid["text"] = torch.zeros(3, 1, 4), torch.ones(3, dtype=torch.bool)
    with ShardWriter(tmp_path / "other", encoders={}) as writer:
        writer.write(other)
    with pytest.raises(UserError, match=r"video is .*'width': 8.* but .*'width': 9.*; text is absent in"):
        FilmIndex.load([folder, tmp_path / "other"])


def test_no_folder_no_manifest_no_shard(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere holds no manifest\.json"):
        FilmIndex.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        FilmIndex.load(tmp_path)
    with pytest.raises(UserError, match="no folder of film shards"):
        FilmIndex.load([])
    (copy / "films-000002.tar").unlink()
    with pytest.raises(UserError, match=r"films-000002\.tar is missing -> restore"):
        FilmIndex.load(copy)


def test_a_shard_of_another_size_is_refused(copy: Path) -> None:
    shard = copy / "films-000001.tar"
    size = shard.stat().st_size
    os.truncate(shard, size - 512)
    with pytest.raises(UserError, match=rf"films-000001\.tar has {size - 512} bytes, its manifest says {size}"):
        FilmIndex.load(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not readable JSON"),
        (lambda text: "", "is not readable JSON"),
        (lambda text: "[1, 2]", "is not a manifest of film shards"),
        (lambda text: '{"shards": []}', "is not a manifest of film shards"),
        (lambda text: text.replace('"version": 2', '"version": 9'), "has version 9"),
        (lambda text: text.replace('"films": 4', '"films": 3', 1), "does not match its own digest"),
    ],
)
def test_a_damaged_or_foreign_manifest_is_refused(copy: Path, damage: Callable[[str], str], message: str) -> None:
    path = copy / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message):
        FilmIndex.load(copy)


def test_a_manifest_may_be_written_with_its_keys_in_another_order(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest, sort_keys=True))
    assert FilmIndex.load(copy).digest == manifest["digest"] == manifest_digest(manifest)


@pytest.mark.parametrize("damage", ["cut", "flip", "delete", "swap"])
def test_a_damaged_or_foreign_index_is_refused(copy: Path, damage: str) -> None:
    path = copy / "films-000001.idx.npz"
    if damage == "cut":
        os.truncate(path, 100)
    elif damage == "flip":
        flip(path, 700)
    elif damage == "delete":
        path.unlink()
    else:
        shutil.copy(copy / "films-000000.idx.npz", path)
    with pytest.raises(UserError, match=r"index .*films-000001\.idx\.npz"):
        FilmIndex.load(copy)


def test_reading_a_shard_cut_after_loading_names_shard_film_modality(copy: Path) -> None:
    index = FilmIndex.load(copy)
    os.truncate(copy / "films-000001.tar", place(copy, 1, 2, "video") + 3)
    index.read(4, 0, int(index.shots[4]))
    with pytest.raises(UserError, match=r"films-000001\.tar, film film-06, video: the file ends before byte"):
        index.read(6, 0, int(index.shots[6]))
    (copy / "films-000002.tar").unlink()
    with pytest.raises(UserError, match=r"films-000002\.tar, film film-08, "):
        index.read(8, 0, 1)


def test_a_folder_written_anew_is_read_anew(tmp_path: Path, film: Make, write: Make) -> None:
    folder = write(tmp_path / "s", [film("a", 5, seed=1)])
    before = FilmIndex.load(folder)
    assert torch.equal(before.read(0, 0, 5).features["video"], film("a", 5, seed=1).features["video"])
    with ShardWriter(folder, encoders=before.manifests[0]["encoders"], overwrite=True) as writer:
        writer.write(film("a", 5, seed=2))
    after = FilmIndex.load(folder)
    assert torch.equal(after.read(0, 0, 5).features["video"], film("a", 5, seed=2).features["video"])


def test_a_shard_of_other_films_of_the_same_lengths_does_not_pass(tmp_path: Path, film: Make, write: Make) -> None:
    folder = write(tmp_path / "s", [film("a", 5, seed=1)])
    other = write(tmp_path / "t", [film("b", 5, seed=2)])
    assert (folder / "films-000000.tar").stat().st_size == (other / "films-000000.tar").stat().st_size
    shutil.copy(other / "films-000000.tar", folder / "films-000000.tar")
    with pytest.raises(UserError, match=r"films-000000\.tar, film a, .*the bytes of shot 2 are not those written"):
        FilmIndex.load(folder).read(0, 2, 4)
