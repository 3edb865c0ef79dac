from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch

from lmp.cli import main
from lmp.data.index import FilmIndex
from lmp.data.indexer import index_folder
from lmp.data.quarantine import quarantine
from lmp.data.rewrite import bytes_of_films, parts_by_field, parts_by_list, parts_by_share, reshard, split
from lmp.data.shards import ShardWriter
from lmp.data.verify import verify
from lmp.errors import UserError
from tests.data.conftest import ENCODERS
from tests.data.damages import content, flip, place

Make = Callable[..., Any]


def members(folder: Path) -> dict[str, bytes]:
    """Every member of every tar; equal ones mean equal films."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                opened = tar.extractfile(member)
                assert opened is not None
                found[member.name] = opened.read()
    return found


def keys_of(folder: Path) -> list[str]:
    return FilmIndex.load(folder).keys


@pytest.fixture
def many(tmp_path: Path, film: Make, write: Make) -> Path:
    """60 films of 20 titles; three for training, and so on."""
    records = []
    for number in range(60):
        record = film(f"clip-{number}", 1 + number % 3, seed=number)
        record.info |= {"imdbid": f"tt{number % 20}", "split": ["train", "train", "test"][number % 3]}
        records.append(record)
    return write(tmp_path / "many", records, films_per_shard=25)


def test_reshard_changes_no_film(folder: Path, tmp_path: Path) -> None:
    done: list[int] = []
    index = FilmIndex.load(folder)
    manifest = reshard(index, tmp_path / "new", films_per_shard=10, progress=done.append)
    assert members(tmp_path / "new") == members(folder)
    assert [entry["films"] for entry in manifest["shards"]] == [10, 10, 3]
    assert manifest["encoders"] == ENCODERS and manifest["modalities"] == index.manifests[0]["modalities"]
    assert keys_of(tmp_path / "new") == index.keys
    assert sum(done) == bytes_of_films(index)
    assert list(verify(FilmIndex.load(tmp_path / "new"))) == []


def test_the_same_cut_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    index = FilmIndex.load(folder)
    for name in ("one", "two"):
        reshard(index, tmp_path / name, films_per_shard=5, shuffle=7)
        split(index, tmp_path / f"{name}-parts", parts_by_share(index, {"a": 0.5, "b": 0.5}))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert content(tmp_path / "one-parts") == content(tmp_path / "two-parts")


def test_cutting_back_gives_the_first_bytes(folder: Path, tmp_path: Path) -> None:
    reshard(FilmIndex.load(folder), tmp_path / "new", films_per_shard=10)
    reshard(FilmIndex.load(tmp_path / "new"), tmp_path / "back", films_per_shard=4)
    assert content(tmp_path / "back") == content(folder)


def test_shuffled_order_follows_from_keys_and_seed(folder: Path, tmp_path: Path, film: Make, write: Make) -> None:
    index = FilmIndex.load(folder)
    for seed in (1, 2):
        reshard(index, tmp_path / str(seed), shuffle=seed)
    first, second = keys_of(tmp_path / "1"), keys_of(tmp_path / "2")
    assert sorted(first) == sorted(second) == sorted(index.keys) and len({tuple(first), tuple(second)}) == 2
    assert first != index.keys
    other = write(tmp_path / "other", [film("extra", 3)])
    reshard(FilmIndex.load([other, folder]), tmp_path / "merged", shuffle=1)
    assert [key for key in keys_of(tmp_path / "merged") if key != "extra"] == first


def test_counts_of_cleared_shots_are_kept(tmp_path: Path, film: Make, write: Make) -> None:
    bad = film("bad", 5)
    bad.features["video"][[1, 3]] = float("inf")
    first = write(tmp_path / "first", [bad, film("good", 3)])
    manifest = reshard(FilmIndex.load(first), tmp_path / "new")
    assert manifest["cleared"] == {"video": 2, "audio": 0}
    assert members(tmp_path / "new") == members(first)


def test_encoders_that_differ_are_named(folder: Path, tmp_path: Path, film: Make) -> None:
    with ShardWriter(tmp_path / "other", encoders={"video": {"name": "toy", "version": "2"}}) as writer:
        writer.write(film("x", 3))
    index = FilmIndex.load([folder, tmp_path / "other"])
    with pytest.raises(UserError, match=r"video is by .*'version': '1'.* in .* but by .*'version': '2'"):
        reshard(index, tmp_path / "new")
    with pytest.raises(UserError, match="video is by"):
        split(index, tmp_path / "new", {"all": list(range(24))})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("column", ["video", "check", "shots", "audio_valid"])
def test_a_damaged_film_is_refused_and_nothing_left(folder: Path, tmp_path: Path, column: str) -> None:
    reshard(FilmIndex.load(folder), tmp_path / "copy", films_per_shard=4)
    flip(tmp_path / "copy" / "films-000003.tar", place(tmp_path / "copy", 3, 1, column), bits=1)
    index = FilmIndex.load(tmp_path / "copy")
    parts = parts_by_share(index, {"train": 0.5, "val": 0.5})
    for rewrite in (lambda: reshard(index, tmp_path / "new"), lambda: split(index, tmp_path / "new", parts)):
        with pytest.raises(UserError, match=rf"films-000003\.tar, film film-13, {column}: crc32 differs"):
            rewrite()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_shares_keep_their_films_when_others_come(many: Path, folder: Path) -> None:
    shares = {"train": 0.6, "val": 0.2, "test": 0.2}
    index, more = FilmIndex.load(many), FilmIndex.load([folder, many])
    before, after = parts_by_share(index, shares), parts_by_share(more, shares)
    for name in shares:
        films = {index.keys[n] for n in before[name]}
        assert films == {more.keys[n] for n in after[name]} & set(index.keys)
    assert sorted(n for films in before.values() for n in films) == list(range(60))
    assert 24 <= len(before["train"]) <= 48
    assert parts_by_share(index, shares, seed=1) != before


def test_a_group_stays_together(many: Path) -> None:
    index = FilmIndex.load(many)
    parts = parts_by_share(index, {"train": 0.5, "val": 0.5}, group="imdbid")
    titles = {name: {index.info(n)["imdbid"] for n in films} for name, films in parts.items()}
    assert titles["train"].isdisjoint(titles["val"]) and len(titles["train"] | titles["val"]) == 20
    with pytest.raises(UserError, match="the record of film clip-0 has no 'director'"):
        parts_by_share(index, {"train": 0.5, "val": 0.5}, group="director")


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}, {"a": float("nan")}])
def test_shares_sum_to_one(many: Path, shares: dict[str, float]) -> None:
    with pytest.raises(UserError, match="do not sum to 1"):
        parts_by_share(FilmIndex.load(many), shares)


def test_split_writes_each_part_whole(many: Path, tmp_path: Path) -> None:
    index = FilmIndex.load(many)
    parts = parts_by_field(index, "split")
    assert {name: len(films) for name, films in parts.items()} == {"test": 20, "train": 40}
    manifests = split(index, tmp_path / "parts", parts, films_per_shard=16)
    assert members(tmp_path / "parts" / "train") | members(tmp_path / "parts" / "test") == members(many)
    assert keys_of(tmp_path / "parts" / "test") == [index.keys[n] for n in parts["test"]]
    assert manifests["train"]["films"] == 40 and len(manifests["train"]["shards"]) == 3
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["test", "train"]


def test_lists(many: Path, tmp_path: Path) -> None:
    index = FilmIndex.load(many)
    train, val = tmp_path / "train.txt", tmp_path / "val.txt"
    train.write_text("# for training\n" + "\n".join(index.keys[:50]) + "\n\n")
    val.write_text("\n".join(f"{key}  # held out" for key in index.keys[50:]))
    assert parts_by_list(index, {"train": train, "val": val}) == {
        "train": list(range(50)),
        "val": list(range(50, 60)),
    }
    for text, message in [
        ("clip-59", r"film clip-50 and 8 more is in no list"),
        (val.read_text() + "\nclip-3", "film clip-3 is listed for train and for val"),
        (val.read_text() + "\nclip-60", r"val\.txt lists clip-60, but no film has that key"),
    ]:
        val.write_text(text)
        with pytest.raises(UserError, match=message):
            parts_by_list(index, {"train": train, "val": val})
    with pytest.raises(UserError, match=r"list .*nowhere\.txt cannot be read"):
        parts_by_list(index, {"train": tmp_path / "nowhere.txt"})


def test_what_cannot_be_written(many: Path, tmp_path: Path) -> None:
    index = FilmIndex.load(many)
    every = list(range(60))
    with pytest.raises(UserError, match="part val would be empty"):
        split(index, tmp_path / "new", {"train": every, "val": []})
    with pytest.raises(UserError, match="'a/b' cannot name a part"):
        split(index, tmp_path / "new", {"a/b": every})
    with pytest.raises(UserError, match="not an empty folder"):
        split(index, many, {"train": every})
    with pytest.raises(UserError, match="already holds"):
        reshard(index, many)
    for rewrite in (lambda: reshard(index, "s3://b/new"), lambda: split(index, "s3://b/new", {"train": every})):
        with pytest.raises(UserError, match="is not a local folder"):
            rewrite()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many"]


def test_parts_appear_together_or_not_at_all(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = FilmIndex.load(many)
    close = ShardWriter.close
    closed: list[ShardWriter] = []

    def failing(self: ShardWriter) -> Any:
        if closed:
            raise OSError(28, "No space left on device")
        closed.append(self)
        return close(self)

    monkeypatch.setattr(ShardWriter, "close", failing)
    with pytest.raises(OSError, match="No space left"):
        split(index, tmp_path / "parts", parts_by_field(index, "split"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many"]
    monkeypatch.undo()
    killed = tmp_path / ".parts.lmp-writing" / "train"
    killed.mkdir(parents=True)
    (killed / "films-000000.tar").write_bytes(b"left by a killed process")
    split(index, tmp_path / "parts", parts_by_field(index, "split"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many", "parts"]
    assert list(verify(FilmIndex.load([tmp_path / "parts" / "train", tmp_path / "parts" / "test"]))) == []


def test_from_a_url(folder: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/rewrite/shards", recursive=True)
    try:
        reshard(FilmIndex.load("memory://rewrite/shards"), tmp_path / "new")
    finally:
        files.rm("/rewrite", recursive=True)
    assert members(tmp_path / "new") == members(folder)


def test_command(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quarantine(many, {"clip-0": ""})
    out = tmp_path / "parts"
    shares = ["--parts", "train=0.5", "val=0.3", "test=0.2"]
    assert main(["data", "split", str(many), "--out", str(out), *shares, "--group", "imdbid", "--seed", "3"]) == 0
    text, err = capsys.readouterr()
    assert err == "" and f"{out}/val: " in text and "1 quarantined films left out" in text
    assert (
        main(["data", "reshard", *(str(out / n) for n in ("train", "val", "test")), "--out", str(tmp_path / "r")]) == 0
    )
    assert sorted(keys_of(tmp_path / "r")) == sorted(set(keys_of(many)))
    assert main(["data", "split", str(many), "--out", str(tmp_path / "f"), "--field", "split"]) == 0
    assert keys_of(tmp_path / "f" / "test") == [f"clip-{n}" for n in range(2, 60, 3)]
    listed = tmp_path / "all.txt"
    listed.write_text("\n".join(keys_of(many)))
    assert main(["data", "split", str(many), "--out", str(tmp_path / "l"), "--list", f"all={listed}"]) == 0
    capsys.readouterr()
    for wrong in (
        ["--parts", "train"],
        ["--parts", "train=x"],
        ["--parts", "train=0.5", "train=0.5"],
        ["--parts", "train=0.99999", "val=0.00001"],
        ["--field", "nowhere"],
        ["--field", "split", "--group", "imdbid"],
        ["--list", "all=nowhere.txt"],
    ):
        assert main(["data", "split", str(many), "--out", str(tmp_path / "new"), *wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert not (tmp_path / "new").exists()
    assert main(["data", "reshard", str(many), "--out", str(tmp_path / "new"), "--films-per-shard", "0"]) == 2
    assert not (tmp_path / "new").exists()


def test_tars_that_others_wrote_can_be_cut_anew(tmp_path: Path, film: Make, write: Make) -> None:
    """They have no checksums and fields of their own in the record."""
    whole = members(write(tmp_path / "whole", [film("a", 4, seed=1)]))
    tensors = safetensors.torch.load(whole["a.safetensors"])
    del tensors["check"]
    (tmp_path / "others").mkdir()
    with tarfile.open(tmp_path / "others" / "x.tar", "w") as tar:
        record = {"title": "A", "shots": [1, 2], "cleared": "yes"}
        for name, data in (
            ("a.json", json.dumps(record).encode()),
            ("a.safetensors", safetensors.torch.save(tensors)),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_folder(tmp_path / "others")
    index = FilmIndex.load(tmp_path / "others")
    assert list(verify(index)) == []
    reshard(index, tmp_path / "new")
    anew = FilmIndex.load(tmp_path / "new")
    assert anew.info(0)["title"] == "A" and anew.checked(0) and not index.checked(0)
    assert torch.equal(anew.read(0, 0, 4).features["audio"], film("a", 4, seed=1).features["audio"])
