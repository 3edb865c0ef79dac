"""Steps that are not finite or far off: left out, or undone with their data; and the run is as exact as any other."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lmp.train.replay import replay
from tests.runs import config_of, make_shards, metrics, run, write_config

pytestmark = pytest.mark.multiprocess

STEPS = 12
SPIKE = {"window": 8, "action": "roll_back"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("unsound") / "shards", films=16)


def start(folder: Path, shards: Path, faults: dict[str, Any], *, name: str, **health: Any) -> Any:
    """Start the run of a name, or go on with it."""
    sections = {"train": {"steps": STEPS, "log_every": 5}, "checkpoint": {"every_steps": 2, "keep": 3}}
    made = config_of(shards, parallel={"zero": 2}, **sections, health=health)
    config = write_config(folder / f"{name}.yaml", made)
    return run(str(config), str(folder / name), json.dumps(faults), module="tests.faults.unsound_worker")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def told(folder: Path) -> list[tuple[Any, ...]]:
    """What must be the same: NaN as text, for it is unlike itself."""
    keys = ("step", "epoch", "data", "loss", "lr", "grad_norm", "skipped", "rollbacks", "spikes")
    return [tuple(str(line[key]) for key in keys) for line in metrics(folder)]


def test_a_run_goes_on_past_unsound_steps_and_exactly(shards: Path, tmp_path: Path) -> None:
    faults = {"nan": [3], "high": [9]}
    ended = start(tmp_path, shards, faults, name="whole", spike=SPIKE)
    assert ended.returncode == 0, ended.stderr[-3000:]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * (STEPS - 2)
    assert [line["rollbacks"] for line in lines] == [0] * 8 + [1] * (STEPS - 8)
    assert not math.isfinite(lines[2]["loss"])
    assert all(math.isfinite(line["loss"]) for line in lines[3:])
    back = events(whole, "rollback")
    assert [(event["step"], event["left"]) for event in back] == [(8, 9)]
    for step in (8, 9, STEPS):  # the data of step 9 are now those after the spike's
        assert replay(whole, step).fingerprint == lines[step - 1]["data"]
    for stop in (5, 11, None):
        ended = start(tmp_path, shards, {**faults, "stop": stop}, name="cut", spike=SPIKE)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert (cut / "DONE").exists() == (stop is None)
    assert told(cut) == told(whole)


def test_too_many_in_a_row_are_undone_and_then_a_person_is_asked(shards: Path, tmp_path: Path) -> None:
    faults = {"nan": list(range(5, 100))}
    ended = start(tmp_path, shards, faults, name="run", max_skips_in_a_row=1, max_rollbacks=1)
    assert ended.returncode == 2
    assert re.search(r"error: step 6: the (loss|gradient) is not finite.*rolled back 1 times.*film-0-", ended.stderr)
    back = events(tmp_path / "run", "rollback")
    assert [(event["step"], event["left"]) for event in back] == [(4, 6)]
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run")[:4])
