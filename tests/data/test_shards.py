from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset

from lmp.data.index import FilmIndex
from lmp.data.shards import FilmRecord, ShardWriter
from lmp.data.verify import verify
from lmp.errors import UserError

Make = Callable[..., Any]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def one(folder: Path, film: FilmRecord, **options: Any) -> ShardWriter:
    with ShardWriter(folder, encoders={}, **options) as writer:
        writer.write(film)
    return writer


def test_plain_webdataset_reads_the_shards(folder: Path, films: list[FilmRecord]) -> None:
    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f.key for f in films]
    for sample, film in zip(samples, films, strict=True):
        info = json.loads(sample["json"])
        assert info["title"] == film.info["title"] and info["shots"] == len(film.shots_S2)
        assert info["modalities"]["audio"] == {"tokens": 2, "width": 4, "dtype": "bfloat16"}
        assert info["encoders"]["video"]["name"] == "toy"
        tensors = safetensors.torch.load(sample["safetensors"])
        assert sorted(tensors) == ["audio", "audio_valid", "check", "shots", "video", "video_valid"]
        np.testing.assert_array_equal(tensors["shots"].numpy(), film.shots_S2)
        for name in film.features:
            assert torch.equal(tensors[name], film.features[name])
            assert torch.equal(tensors[f"{name}_valid"], film.valid[name])


def test_members_carry_no_time_and_no_owner(folder: Path) -> None:
    with tarfile.open(folder / "films-000000.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:2]] == ["film-00.json", "film-00.safetensors"]
    assert all(m.mtime == 0 and m.uid == 0 and m.gid == 0 and not m.pax_headers for m in members)


def test_the_same_films_give_the_same_bytes(folder: Path, tmp_path: Path, films: Any, write: Make) -> None:
    assert hashes(write(tmp_path / "again", films)) == hashes(folder)


def test_manifest_counts_what_was_written(folder: Path, films: list[FilmRecord]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [s["films"] for s in manifest["shards"]] == [4, 4, 4, 4, 4, 3]
    assert manifest["films"] == 23 and manifest["shots"] == sum(len(f.shots_S2) for f in films)
    for shard in manifest["shards"]:
        data = (folder / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert set(hashes(folder)) == {"manifest.json"} | {n for s in manifest["shards"] for n in (s["name"], s["index"])}


def test_rows_that_are_not_finite_are_cleared_and_counted(tmp_path: Path, film: Make) -> None:
    bad = film("a", 10)
    bad.features["video"][3, 0, 2] = float("nan")
    bad.features["audio"][4, 1, 0] = float("inf")
    bad.features["audio"][5] = float("nan")
    bad.valid["audio"][:] = True
    kept = bad.features["audio"].clone()
    with ShardWriter(tmp_path / "s", encoders={}) as writer:
        writer.write(bad)
        manifest = writer.close()
    assert manifest["cleared"] == {"video": 1, "audio": 2}
    rows = FilmIndex.load(tmp_path / "s").read(0, 0, 10)
    assert rows.features["video"][3].count_nonzero() == 0 and not rows.valid["video"][3]
    assert rows.valid["audio"].tolist() == [i not in (4, 5) for i in range(10)]
    assert torch.equal(rows.features["audio"][6:], kept[6:])
    assert torch.isnan(bad.features["video"][3, 0, 2]), "the caller's tensor is left as it was"


def test_float32_is_stored_as_float16_if_it_fits(tmp_path: Path, film: Make) -> None:
    good = film("a", 4)
    good.features["video"] = torch.randn(4, 1, 8) * 100
    one(tmp_path / "s", good)
    index = FilmIndex.load(tmp_path / "s")
    assert index.modalities["video"].dtype == "float16"
    assert torch.equal(index.read(0, 0, 4).features["video"], good.features["video"].half())
    good.features["video"][2, 0, 1] = 70_000
    with pytest.raises(UserError, match=r"film a, modality video: 70000 is too large for float16"):
        one(tmp_path / "t", good)
    assert not (tmp_path / "t").exists()


def test_shots_that_are_not_contiguous_in_memory_are_stored_right(tmp_path: Path, film: Make) -> None:
    strided = film("a", 6)
    strided.shots_S2 = np.asfortranarray(strided.shots_S2)
    strided.features["video"] = torch.arange(48).half().view(8, 1, 6).permute(2, 1, 0)
    one(tmp_path / "s", strided)
    rows = FilmIndex.load(tmp_path / "s").read(0, 0, 6)
    np.testing.assert_array_equal(rows.shots_N2.numpy(), strided.shots_S2)
    assert torch.equal(rows.features["video"], strided.features["video"])


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "ä", "a b", "x" * 81, "a\n"])
def test_keys_that_a_tar_or_webdataset_would_garble_are_refused(tmp_path: Path, film: Make, key: str) -> None:
    with pytest.raises(UserError, match="cannot name a sample"):
        one(tmp_path / "s", film(key, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.shots_S2[2].__setitem__(1, 0), r"shot 2 spans \[2000, 0\] ms"),
        (lambda f: f.shots_S2[2].__setitem__(0, 500), r"shot 2 spans \[500, 2900\] ms"),
        (lambda f: setattr(f, "shots_S2", f.shots_S2[:0]), r"shots are int32 \[0, 2\]"),
        (lambda f: setattr(f, "shots_S2", f.shots_S2.astype(np.int64)), "shots are int64"),
        (
            lambda f: f.features.update(video=f.features["video"][1:]),
            r"video: features have shape \[4, 1, 8\]",
        ),
        (lambda f: f.features.update(video=f.features["video"][:, 0]), r"features have shape \[5, 8\]"),
        (lambda f: f.features.update(video=f.features["video"].double()), "features are torch.float64"),
        (lambda f: f.valid.update(audio=f.valid["audio"].float()), "audio: valid is torch.float32"),
        (lambda f: f.valid.pop("audio"), r"valid \['video'\]"),
        (lambda f: f.info.update(x=object()), "info of film b is not JSON"),
        (lambda f: f.info.update(x=float("nan")), "info of film b is not JSON"),
        (lambda f: f.info.update(shots=7), r"info\['shots'\] is 7"),
        (
            lambda f: f.features.update(video=f.features["video"].bfloat16()),
            "video: bfloat16 .* before have float",
        ),
        (lambda f: (f.features.pop("audio"), f.valid.pop("audio")), "modality audio: nothing, but"),
        (lambda f: setattr(f, "key", "a"), "film a was written before"),
    ],
)
def test_a_film_that_does_not_fit_is_refused_and_leaves_the_writer_usable(
    tmp_path: Path, film: Make, write: Make, change: Callable[[FilmRecord], Any], message: str
) -> None:
    bad = film("b", 5)
    change(bad)
    with ShardWriter(tmp_path / "s", encoders={}) as writer:
        writer.write(film("a", 5))
        with pytest.raises(UserError, match=message):
            writer.write(bad)
        writer.write(film("c", 5))
    index = FilmIndex.load(tmp_path / "s")
    assert index.keys == ["a", "c"] and list(verify(index)) == []


@pytest.mark.parametrize("name", ["shots", "check", "video_valid", "a-b", "1a", ""])
def test_modality_names_that_would_clash_are_refused(tmp_path: Path, film: Make, name: str) -> None:
    bad = film("a", 2)
    bad.features[name], bad.valid[name] = bad.features["video"], bad.valid["video"]
    with pytest.raises(UserError, match="cannot name a modality"):
        one(tmp_path / "s", bad)


def test_encoders_of_unknown_modalities_are_refused(tmp_path: Path, film: Make) -> None:
    with (
        pytest.raises(UserError, match=r"encoders name \['vdeo'\]"),
        ShardWriter(tmp_path / "s", encoders={"vdeo": {}}) as writer,
    ):
        writer.write(film("a", 2))


def test_an_exception_leaves_nothing_behind(tmp_path: Path, film: Make) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path / "s", encoders={}, films_per_shard=1) as writer:
        writer.write(film("a", 2))
        writer.write(film("b", 2))
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_leaves_nothing_behind(tmp_path: Path, film: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), ShardWriter(tmp_path / "s", encoders={}) as writer:
        writer.write(film("a", 2))
        monkeypatch.setattr(os, "fsync", full)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_published_before_the_end(tmp_path: Path, film: Make) -> None:
    with ShardWriter(tmp_path / "s", encoders={}, films_per_shard=1) as writer:
        writer.write(film("a", 2))
        with pytest.raises(UserError, match=r"holds no manifest\.json"):
            FilmIndex.load(tmp_path / "s")
        assert not list((tmp_path / "s").glob("*.tar"))


def test_no_films_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no film was written"), ShardWriter(tmp_path / "s", encoders={}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_shards_is_refused_unless_overwritten(tmp_path: Path, film: Make) -> None:
    folder = tmp_path / "s"
    one(folder, film("a", 2), prefix="old")
    before = hashes(folder)
    with pytest.raises(UserError, match=r"already holds manifest\.json"):
        one(folder, film("b", 3))
    with pytest.raises(KeyError), ShardWriter(folder, encoders={}, overwrite=True) as writer:
        writer.write(film("b", 3))
        raise KeyError
    assert hashes(folder) == before, "a failed overwrite leaves the old shards"
    one(folder, film("b", 3), overwrite=True)
    assert FilmIndex.load(folder).keys == ["b"]
    assert {p.name for p in folder.iterdir()} == {"manifest.json", "films-000000.tar", "films-000000.idx.npz"}


def test_shards_of_others_are_not_written_over(tmp_path: Path, film: Make) -> None:
    (tmp_path / "films-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"already holds films-000000\.tar"):
        one(tmp_path, film("a", 2))
    assert (tmp_path / "films-000000.tar").read_bytes() == b"mine"


def test_two_writers_do_not_share_a_folder_and_leftovers_of_a_killed_one_go(tmp_path: Path, film: Make) -> None:
    folder = tmp_path / "s"
    (folder / ".lmp-writing").mkdir(parents=True)
    (folder / ".lmp-writing" / "films-000000.tar").write_bytes(b"cut")
    with ShardWriter(folder, encoders={}) as writer:
        writer.write(film("a", 2))
        with pytest.raises(UserError, match="another process is writing"):
            ShardWriter(folder, encoders={})
    assert list(verify(FilmIndex.load(folder))) == []
    assert not (folder / ".lmp-writing").exists()


def test_a_file_in_place_of_the_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        ShardWriter(tmp_path / "s", encoders={})


def test_the_index_of_films_needs_no_pickle(folder: Path) -> None:
    with np.load(folder / "films-000000.idx.npz", allow_pickle=False) as arrays:
        assert arrays["keys"].tolist() == [f"film-{i:02d}" for i in range(4)]
        modalities = json.loads(str(arrays["modalities"]))
        place = arrays["columns"].tolist().index("video")
        offset = int(arrays["offset"][1, place])
        shots = int(arrays["shots"][1])
    assert modalities["video"] == {"tokens": 1, "width": 8, "dtype": "float16"}
    data = (folder / "films-000000.tar").read_bytes()[offset : offset + shots * 16]
    expected = FilmIndex.load(folder).read(1, 0, shots).features["video"]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float16).view(shots, 1, 8), expected)
