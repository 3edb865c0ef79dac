"""A run that hangs names the rank that went astray first, by phase, step and film, and can be started again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launch.local import launch
from lmp.errors import EXIT_AGAIN
from tests.faults.hang_worker import STEP
from tests.runs import config_of, environment, make_shards, write_config

pytestmark = pytest.mark.multiprocess


def hang(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, str]:
    """The line of the ledger and the report of a run that hangs."""
    shards = make_shards(folder / "shards")
    # With nothing kept whole, the forward pass begins with a collective of another kind than the one left out: gloo
    # waits then, where it would end the process if it met one of its kind and of another size.
    parallel = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    settings = {"parallel": parallel, "health": {"hang_seconds": 8}, "checkpoint": {"every_steps": 100}}
    config = write_config(folder / "config.yaml", config_of(shards, **settings))
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "tests.faults.hang_worker", fault, str(config), str(folder / "run")]
    code = launch(command, folder / "run", 2)
    assert code == EXIT_AGAIN
    events = [json.loads(line) for line in (folder / "run" / "ledger.jsonl").read_text().splitlines()]
    found = [event for event in events if event["event"] == "hang"]
    assert len(found) == 1
    report = Path(found[0]["report"])
    assert report.parent.name == f"step-{STEP:08d}"
    for rank in range(2):
        stacks = (report.parent / f"rank-{rank:04d}.txt").read_text()
        assert "most recent call first" in stacks
    return found[0], report.read_text()


def test_a_rank_that_sleeps_in_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    event, report = hang(tmp_path, "read", monkeypatch)
    assert event["ranks"] == [1]
    assert f"reading, step {STEP}, films film-0-" in event["what"]
    assert "rank 0" in report
    assert "start the same command again" in capfd.readouterr().err


def test_a_rank_that_leaves_out_a_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event, _ = hang(tmp_path, "collective", monkeypatch)
    assert event["ranks"] == [1]
    assert f"counting, step {STEP}, films film-0-" in event["what"]
    assert "entered 0 collectives there, the others 1" in event["what"]
