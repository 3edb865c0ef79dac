"""Films that are never trained on: lists of ids, at import, at ingest and in a run's stream."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lmp.cli import main
from lmp.config import validate
from lmp.data.index import FilmIndex
from lmp.data.leave_out import LeaveOut
from lmp.data.record import FilmRecord
from lmp.data.shards import ShardWriter
from lmp.data.stream import Stream
from lmp.errors import UserError
from lmp.train.data import data_facts, load_index, plan_settings, stream_change
from tests.runs import config_of

SHOTS = 6


def write(folder: Path, infos: dict[str, dict[str, object]]) -> Path:
    edges = np.arange(SHOTS + 1, dtype=np.int32) * 1000
    with ShardWriter(folder, encoders={}, films_per_shard=2) as writer:
        for number, (key, info) in enumerate(infos.items()):
            rows = torch.full((SHOTS, 1, 4), float(number)).half()
            valid = torch.ones(SHOTS, dtype=torch.bool)
            shots_S2 = np.stack([edges[:-1], edges[1:]], 1)
            names = ("video", "text")
            writer.write(FilmRecord(key, info, shots_S2, dict.fromkeys(names, rows), dict.fromkeys(names, valid)))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write(
        tmp_path / "shards",
        {
            "a": {},
            "-b_1": {},
            "c": {"imdbid": "tt01"},
            "d": {"videoids": ["x1", "x2"]},
            "e": {"title": "tt01", "clips": [{"videoid": "y1", "start": 0, "stop": 3}]},
        },
    )


def listed(path: Path, *ids: str) -> Path:
    path.write_text("# ids\n\n" + "\n".join(ids) + "\n", encoding="utf-8")
    return path


def test_films_are_dropped_by_key_and_by_record(shards: Path, tmp_path: Path) -> None:
    leave_out = LeaveOut.read([listed(tmp_path / "one.txt", "-b_1", "x2"), listed(tmp_path / "two.txt", "tt01", "no")])
    index = FilmIndex.load(shards, leave_out=leave_out)
    assert index.keys == ["a", "e"]
    assert [float(index.read(n, 0, 1).features["video"][0, 0, 0]) for n in range(2)] == [0.0, 4.0]
    assert index.left_out is not None
    assert {k: index.left_out[k] for k in ("files", "ids", "films", "shots")} == {
        "files": ["one.txt", "two.txt"],
        "ids": 4,
        "films": 3,
        "shots": 3 * SHOTS,
    }


def test_the_digest_names_the_films_that_are_left(shards: Path, tmp_path: Path) -> None:
    whole = FilmIndex.load(shards).digest
    nothing = FilmIndex.load(shards, leave_out=LeaveOut.read([listed(tmp_path / "n", "zzz")]))
    assert nothing.digest == whole
    found = {
        FilmIndex.load(shards, leave_out=LeaveOut.read([listed(tmp_path / "l", *ids)])).digest
        for ids in (["a"], ["e"], ["a", "e"], ["e", "a"])
    }
    assert len(found) == 3
    assert whole not in found


def test_a_run_never_shows_them_and_its_manifest_says_so(shards: Path, tmp_path: Path) -> None:
    listed(tmp_path / "test-ids.txt", "tt01", "a")
    data = {"leave_out": [str(tmp_path / "test-ids.txt")], "pack_shots": 8, "packs_per_step": 2}
    config = validate(config_of(shards, data=data), source="test")
    index = load_index(config)
    settings = plan_settings(config, index)
    stream = Stream.of(index, settings)
    cursor, shown = stream.first(), set()
    while cursor.epoch < 3:
        shown |= {index.keys[window.film] for pack in stream.packs(cursor) for window in pack.windows}
        cursor = stream.next(cursor)
    assert shown == {"-b_1", "d", "e"}
    facts = data_facts(index, settings)
    assert facts["films"] == 3
    assert facts["left_out"]["films"] == 2
    assert stream_change(json.loads(json.dumps(facts)), load_index(config), settings) is None
    listed(tmp_path / "test-ids.txt", "a")
    change = stream_change(facts, load_index(config), settings)
    assert change is not None
    assert "left out 2 films by 2 ids" in change
    assert "now leaves out 1 films by 1 ids" in change


@pytest.mark.parametrize(
    ("text", "problem"),
    [("one two\n", "is not one id"), ("id,split\n", "is not one id"), ("\n# none\n", "holds no id")],
)
def test_a_bad_list_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "l").write_text(text)
    with pytest.raises(UserError, match=problem):
        LeaveOut.read([tmp_path / "l"])
    with pytest.raises(UserError, match="cannot be read"):
        LeaveOut.read([tmp_path / "nowhere"])


def test_leaving_out_everything_is_refused(shards: Path, tmp_path: Path) -> None:
    leave_out = LeaveOut.read([listed(tmp_path / "l", "a", "-b_1", "tt01", "x1", "y1")])
    with pytest.raises(UserError, match="every film"):
        FilmIndex.load(shards, leave_out=leave_out)


def test_import_refuses_listed_films(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("video", "shots"):
        (tmp_path / folder).mkdir()
    for key in ("a", "b"):
        np.save(tmp_path / "video" / f"{key}.npy", np.ones((2, 3), np.float32))
        np.save(tmp_path / "shots" / f"{key}.npy", np.array([[0, 5], [5, 9]]))
    words = ["--feature", f"video={tmp_path / 'video'}", "--shots", str(tmp_path / "shots")]
    words += ["--leave-out", str(listed(tmp_path / "l.txt", "a"))]
    assert main(["data", "import", str(tmp_path / "out"), *words]) == 0
    assert FilmIndex.load(tmp_path / "out").keys == ["b"]
    assert "1 films refused, being on l.txt" in capsys.readouterr().out
