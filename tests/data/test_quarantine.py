from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmp.cli import main
from lmp.data.index import FilmIndex
from lmp.data.manifest import read_manifest
from lmp.data.quarantine import quarantine, quarantine_damaged, release
from lmp.data.verify import verify
from lmp.errors import UserError
from tests.data.damages import content, flip, header_of, overwrite, place

Make = Callable[..., Any]


@pytest.fixture
def shards(tmp_path: Path, film: Make, write: Make) -> Path:
    """Films a, b, c in the first shard, d, e in the second."""
    records = [film(key, 3 + n, seed=n) for n, key in enumerate("abcde")]
    return write(tmp_path / "s", records, films_per_shard=3)


@pytest.fixture
def good(shards: Path, tmp_path: Path) -> Path:
    """A copy that stays as it was written."""
    return Path(shutil.copytree(shards, tmp_path / "good"))


def shard(folder: Path, number: int = 0) -> Path:
    return folder / f"films-{number:06d}.tar"


def clean(folder: Path) -> FilmIndex:
    """The index, after seeing that loading and verifying find no fault."""
    index = FilmIndex.load(folder)
    assert list(verify(index)) == []
    return index


def test_a_film_is_taken_out_by_its_key(shards: Path, good: Path, film: Make) -> None:
    before = read_manifest(shards)["digest"]
    change = quarantine(shards, {"b": "wrong subtitles"})
    assert change.taken == ["b"] and change.renewed == []
    index = clean(shards)
    assert index.keys == ["a", "c", "d", "e"]
    assert index.digest == change.digest != before == change.before
    assert index.manifests[0]["quarantined"] == {"b": "wrong subtitles"}
    assert torch.equal(index.read(1, 0, 5).features["video"], film("c", 5, seed=2).features["video"])
    assert change.backup == f"manifest.json.bak-{before[:8]}"
    files = content(shards)
    assert files.pop(change.backup) == (good / "manifest.json").read_bytes()
    del files["manifest.json"]
    assert files.items() <= content(good).items()


def test_exactly_the_damaged_films_are_taken_out(shards: Path) -> None:
    flip(shard(shards), place(shards, 0, 1, "video"))
    os.truncate(shard(shards, 1), place(shards, 1, 1, "audio"))
    with pytest.raises(UserError, match=r"films-000001\.tar has"):
        FilmIndex.load(shards)
    change, faults = quarantine_damaged(shards)
    assert change.taken == ["b", "e"] and {f.film for f in faults} == {None, 1, 4}
    assert change.renewed == ["films-000000.tar", "films-000001.tar"]
    index = clean(shards)
    assert index.keys == ["a", "c", "d"]
    reasons = index.manifests[0]["quarantined"]
    assert reasons["b"] == "films-000000.tar, film b, video: crc32 differs"
    assert reasons["e"].startswith("films-000001.tar, film e, ") and "ends before byte" in reasons["e"]


@pytest.mark.parametrize("name", ["b.json", "b.safetensors"])
def test_a_film_with_a_damaged_tar_header_is_taken_out(shards: Path, name: str) -> None:
    overwrite(shard(shards), header_of(shard(shards), name), bytes(512))
    change, _ = quarantine_damaged(shards, reason="bad disk")
    assert change.taken == ["b"]
    assert clean(shards).manifests[0]["quarantined"] == {"b": "bad disk"}


def test_damage_outside_of_films_takes_none_out(shards: Path) -> None:
    before = read_manifest(shards)["digest"]
    flip(shard(shards), shard(shards).stat().st_size - 1)
    change, faults = quarantine_damaged(shards)
    assert len(faults) == 1 and change.taken == [] and change.renewed == ["films-000000.tar"]
    assert len(clean(shards)) == 5
    assert change.digest != before


def test_a_shard_that_may_not_be_read_is_not_damaged(shards: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open
    denied = shard(shards)

    def denying(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == denied:
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", denying)
    monkeypatch.setattr(os, "access", lambda path, _: path != denied)
    with pytest.raises(UserError, match=r"films-000000\.tar may not be read by this user"):
        quarantine_damaged(shards)
    monkeypatch.undo()
    assert content(shards) == content(good)


def test_whole_shards_are_left_alone(shards: Path, good: Path) -> None:
    change, faults = quarantine_damaged(shards)
    assert faults == [] and change.backup is None and change.digest == change.before
    assert content(shards) == content(good)


def test_another_damaged_film_of_the_shard_is_named_and_nothing_changed(shards: Path) -> None:
    flip(shard(shards), place(shards, 0, 1, "video"))
    flip(shard(shards), place(shards, 0, 2, "audio_valid"), bits=1)
    before = content(shards)
    with pytest.raises(UserError, match=r"film c, audio_valid: crc32 differs -> .*--damaged") as refused:
        quarantine(shards, {"b": ""})
    assert "film b" not in refused.value.problem
    assert content(shards) == before
    quarantine(shards, {"b": "", "c": ""})
    assert clean(shards).keys == ["a", "d", "e"]


def test_a_missing_shard_goes_with_all_its_films_and_comes_back(shards: Path, good: Path) -> None:
    before = FilmIndex.load(shards).digest
    shard(shards).unlink()
    change, _ = quarantine_damaged(shards)
    assert change.taken == ["a", "b", "c"] and change.renewed == []
    index = clean(shards)
    assert index.keys == ["d", "e"]
    assert index.manifests[0]["quarantined"]["a"] == "films-000000.tar is missing"
    with pytest.raises(UserError, match=r"films-000000\.tar is missing"):
        release(shards, ["a", "b", "c"])
    shutil.copy(shard(good), shard(shards))
    assert release(shards, ["a", "c"]).released == ["a", "c"]
    assert clean(shards).keys == ["a", "c", "d", "e"]
    assert release(shards, ["b"]).digest == before == clean(shards).digest


def test_release_takes_in_only_what_verifies(shards: Path, good: Path) -> None:
    flip(shard(shards), place(shards, 0, 1, "video"))
    quarantine_damaged(shards)
    before = content(shards)
    with pytest.raises(UserError, match="film b, video: crc32 differs"):
        release(shards, ["b"])
    assert content(shards) == before
    shard(shards).write_bytes(shard(good).read_bytes())
    (fault,) = verify(FilmIndex.load(shards))
    assert "has another sha256" in str(fault)  # the restored shard is another than the manifest says by now
    change = release(shards, ["b"])
    assert change.released == ["b"] and change.renewed == ["films-000000.tar"]
    assert clean(shards).digest == read_manifest(good)["digest"]


def test_keys_are_checked(shards: Path, good: Path) -> None:
    with pytest.raises(UserError, match="holds no film film-a -> "):
        quarantine(shards, {"film-a": ""})
    with pytest.raises(UserError, match=r"film a of .* is not quarantined"):
        release(shards, ["a"])
    with pytest.raises(UserError, match=r"no film of .* would be left"):
        quarantine(shards, dict.fromkeys("abcde", ""))
    assert content(shards) == content(good)
    quarantine(shards, {"a": ""})
    with pytest.raises(UserError, match=r"film a of .* is quarantined already"):
        quarantine(shards, {"a": ""})
    with pytest.raises(UserError, match="is not a local folder"):
        quarantine("s3://bucket/shards", {"a": ""})


def test_a_failing_disk_leaves_the_old_manifest(shards: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if target.name == "manifest.json":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        quarantine(shards, {"a": ""})
    assert (shards / "manifest.json").read_bytes() == (good / "manifest.json").read_bytes()
    assert not list(shards.glob(".*"))


def test_another_folder_may_hold_the_film_whole(shards: Path, tmp_path: Path, film: Make, write: Make) -> None:
    quarantine(shards, {"a": "cut short"})
    anew = film("a", 8, seed=9)
    index = FilmIndex.load([shards, write(tmp_path / "anew", [anew])])
    assert index.keys == ["b", "c", "d", "e", "a"]
    assert torch.equal(index.read(4, 0, 8).features["video"], anew.features["video"])


def test_command(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(shard(shards), place(shards, 0, 1, "video"))
    assert main(["data", "quarantine", str(shards), "--damaged"]) == 0
    out, err = capsys.readouterr()
    digest = read_manifest(shards)["digest"]
    assert err == "" and "1 films quarantined: b" in out and f"digest {digest}; it was" in out
    assert "goes on with --new-data" in out
    assert main(["data", "verify", str(shards)]) == 0
    assert main(["data", "quarantine", str(shards), "--film", "d", "--film", "e", "--reason", "cartoons"]) == 0
    assert json.loads((shards / "manifest.json").read_text())["quarantined"]["e"] == "cartoons"
    assert main(["data", "quarantine", str(shards), "--damaged"]) == 0
    assert "no damage, nothing to do" in capsys.readouterr().out
    assert main(["data", "quarantine", str(shards), "--release", "d", "--release", "e"]) == 0
    capsys.readouterr()
    for wrong in (["--release", "b"], ["--film", "nowhere"], ["--release", "b", "--reason", "x"]):
        assert main(["data", "quarantine", str(shards), *wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
    assert main(["data", "quarantine", str(shards / "nowhere"), "--damaged"]) == 2
    assert "holds no manifest.json" in capsys.readouterr().err
