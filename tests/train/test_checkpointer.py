"""Which checkpoints are kept; saving that fails, saving beside the training, restoring that goes wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmp.config import CheckpointConfig
from lmp.train.checkpoint import folder_of, read_manifest, write_manifest
from lmp.train.checkpoint_writer import Snapshot, Stretch, Written
from lmp.train.checkpointer import outdated, remove_leftovers
from lmp.train.run_folder import RunFolder
from lmp.train.zero_state import Piece
from tests.runs import make_shards
from tests.workers import run_ranks


def removed(steps: list[int], damaged: tuple[int, ...] = (), **settings: Any) -> list[int]:
    folder = RunFolder(Path("run"))
    paths = {folder_of(folder, step): step for step in sorted(steps, reverse=True)}
    gone = outdated(list(paths), CheckpointConfig(**settings), lambda path: paths[path] not in damaged)
    return sorted(paths[path] for path in gone)


def test_the_newest_are_kept_and_those_at_multiples_for_good() -> None:
    assert removed([5, 10, 15, 20, 25], keep=2) == [5, 10, 15]
    assert removed([5, 10, 15, 20, 25], keep=2, keep_every_steps=10) == [5, 15]
    assert removed([5], keep=1) == []


def test_a_damaged_one_never_stands_for_one_that_is_kept() -> None:
    assert removed([5, 10, 15], damaged=(15,), keep=2) == []
    assert removed([5, 10, 15], damaged=(15,), keep=1) == [5]
    assert removed([5, 10, 15], damaged=(10,), keep=2) == [10]
    assert removed([10, 20, 30], damaged=(10, 20), keep=1, keep_every_steps=10) == [10, 20]
    assert removed([5, 10], damaged=(5, 10), keep=1) == []


def test_what_was_cut_off_is_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("step-00000002", "step-00000004.tmp", "step-00000002.old.tmp"):
        (folder.checkpoints / name).mkdir(parents=True)
    remove_leftovers(folder)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000002"]


def snapshot_of(*pieces: Piece) -> Snapshot:
    snapshot = Snapshot(torch.device("cpu"))
    snapshot.take(pieces)
    return snapshot


def test_a_file_is_plain_safetensors_of_the_moment_of_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small blocks, so that pieces lie across them.
    monkeypatch.setattr("lmp.train.checkpoint_writer._BLOCK", 1 << 10)
    values, half = torch.randn(5000), torch.randn(3).bfloat16()
    pieces = [Piece("a.b", "weight", 0, values, 1), Piece("c", "exp_avg", 7, half, 1)]
    snapshot = snapshot_of(*pieces)
    kept = values.clone()
    values.zero_()
    before = os.umask(0o027)
    try:
        written = snapshot.write(tmp_path / "one.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "one.safetensors").stat().st_mode & 0o777 == 0o640
    stored = load_file(tmp_path / "one.safetensors")
    assert stored.keys() == {"a.b/weight@0", "c/exp_avg@7"}
    assert torch.equal(stored["a.b/weight@0"], kept)
    assert torch.equal(stored["c/exp_avg@7"], half.float())
    assert written.bytes == (tmp_path / "one.safetensors").stat().st_size
    other = snapshot_of(Piece("a.b", "weight", 0, kept[:3000], 1), Piece("a.b", "weight", 3000, kept[3000:], 1))
    assert sum(other.hashes()) % 2**64 == written.hashes[0]
    # The same memory takes the next snapshot.
    values.fill_(2)
    snapshot.take(pieces)
    snapshot.write(tmp_path / "two.safetensors")
    assert torch.equal(load_file(tmp_path / "two.safetensors")["a.b/weight@0"], values)


@pytest.mark.parametrize(
    "ranges", [[(0, 4)], [(0, 4), (5, 6)], [(0, 4), (3, 6)], [(0, 6), (0, 6)], [], [(1, 6)], [(0, 7)]], ids=str
)
def test_fragments_that_are_not_the_whole_are_refused(tmp_path: Path, ranges: list[tuple[int, int]]) -> None:
    state = {"shapes": {"w": [2, 3]}, "trained": set()}

    def share(ranges: list[tuple[int, int]]) -> Written:
        stretches = [Stretch("w", "weight", *span) for span in ranges]
        return Written(file="f", bytes=0, sha256="", stretches=stretches, hashes=[0] * len(ranges))

    with pytest.raises(RuntimeError, match="fragments of weight of w do not make each of its 6 values once"):
        write_manifest(tmp_path, [share(ranges)], state, {})
    write_manifest(tmp_path, [share([(4, 6), (0, 4)])], state, {"extra": "ü"})
    assert read_manifest(tmp_path)["extra"] == "ü"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpointer")
    make_shards(folder / "shards")
    return run_ranks("tests.train.checkpointer_worker", folder, timeout=400)


@pytest.mark.multiprocess
def test_a_failed_write_is_noted_and_only_at_the_end_an_error(ranks) -> None:
    for rank in ranks:
        facts = rank["failures"]
        assert "rank 1: [Errno 28] No space left" in facts["first"]
        assert facts["left"] == [], "the unfinished folder is still there"
        assert facts["second"] is None, "it was not tried again at the end"
        assert "checkpoint of step 3 was not saved: rank 1" in facts["third"]
        assert "No space left" in facts["fourth"], "the older checkpoint was not enough"
        assert facts["kept"] == ["step-00000002"]
    events = [(event["event"], event["step"]) for event in ranks[0]["ledger"]]
    failed = "save failed"
    assert events[:5] == [(failed, 1), (failed, 2), ("saved", 2), (failed, 3), (failed, 3)]
    assert all(event["seconds_saving"] >= 0 and event["bytes"] > 0 for event in ranks[0]["ledger"][2:3])


@pytest.mark.multiprocess
def test_training_goes_on_while_a_rank_writes(ranks) -> None:
    assert [rank["beside"]["writing"] for rank in ranks][1], "the write was not in the background"
    for rank in ranks:
        facts = rank["beside"]
        assert "step-00000005" not in facts["seen"], "a checkpoint was seen before it was whole"
        assert facts["newest"] == "step-00000002"
        assert facts["after next"] == "step-00000005", "the next save did not wait for the one in flight"
        assert facts["stalled"] > 0
        assert any(not torch.equal(state[0], facts["changed"][name][0]) for name, state in facts["before"].items())
        for name, state in facts["before"].items():
            assert all(map(torch.equal, state, facts["restored"][name])), name


@pytest.mark.multiprocess
def test_random_states_come_back_on_each_rank(ranks) -> None:
    for rank in ranks:
        assert rank["random"]["drawn"] == rank["random"]["expected"]
    assert ranks[0]["random"]["drawn"] != ranks[1]["random"]["drawn"]


@pytest.mark.multiprocess
def test_a_wrong_bit_on_one_rank_is_an_error_on_all(ranks) -> None:
    for rank in ranks:
        assert "not what was saved: exp_avg of lmp.cross.query;" in rank["wrong"]["said"]


@pytest.mark.multiprocess
def test_each_rank_reads_its_own_part_only(ranks) -> None:
    assert sum(rank["wrong"]["values"] for rank in ranks) == ranks[0]["wrong"]["all"]
