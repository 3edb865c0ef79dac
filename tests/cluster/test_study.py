"""A study of 12 cells on a real SLURM: killed twice, once with its launcher and once with its jobs, and completed."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.conftest import Slurm
from tests.launch.studies import Page, ledger, write_study
from tests.runs import metrics, start

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess]

STEPS = 6


def test_a_study_killed_half_way_ends_with_the_complete_report(slurm: Slurm, tmp_path: Path) -> None:
    path = write_study(
        tmp_path,
        grid={"data.window_shots": [4, 8, 16], "memory.checkpointing": ["none", "full"]},
        budget={"steps": STEPS},
        evaluate={"shards": [str(tmp_path / "held-out")], "seeds": 1},
        concurrency=3,
        config={"cluster": {"time": 5, "memory": "1500M"}},
    )
    out = tmp_path / "out"

    def launch() -> subprocess.Popen[str]:
        return start(str(path), "--out", str(out), "--poll", "1", module="launch.study")

    def done() -> list[str]:
        return sorted(mark.parent.name for mark in out.glob("cells/*/DONE"))

    launcher = launch()
    _until("two cells to be done", lambda: len(done()) >= 2, launcher)
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    first = _jobs(out)
    assert len(first) == 12 and len({job.partition("_")[0] for job in first.values()}) == 1, "one array of 12"

    launcher = launch()
    _until("the launcher to watch again", lambda: _watches(launcher, out), launcher)
    assert _jobs(out) == first, "jobs that go on are not submitted again"
    _until("four cells to be done", lambda: len(done()) >= 4, launcher)
    array = next(iter(first.values())).partition("_")[0]
    subprocess.run(["scancel", array], check=True)
    told, errors = launcher.communicate(timeout=300)
    before = done()
    assert 4 <= len(before) < 12, told + errors
    assert launcher.returncode == 1 and "cancelled" in told

    launcher = launch()
    told, errors = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, told[-3000:] + errors[-3000:]
    assert "12 cells: 12 done; 12 evaluated" in told
    second = _jobs(out)
    assert {name for name in second if second[name] != first[name]} == set(second) - set(before)
    for name in second:
        run = out / "cells" / name
        assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
        jobs = [event["job"] for event in ledger(run) if event["event"] == "launch"]
        assert len(set(jobs)) == 1 or name not in before, "a finished cell has had one job"
    with (out / "report" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    assert all(line["status"] == "done" and float(line["cross-modal MRR"]) > 0 for line in lines)
    page = Page((out / "report" / "report.html").read_text(encoding="utf-8"))
    assert page.external == [] and page.dangling == []
    assert {f"#cell-{line['cell']}" for line in lines} <= set(page.links)


def _jobs(out: Path) -> dict[str, str]:
    """Cell -> the job that it has had last."""
    states = json.loads((out / "states.json").read_text(encoding="utf-8"))
    return {name: state["job"] for name, state in states["cells"].items()}


def _watches(launcher: subprocess.Popen[str], out: Path) -> bool:
    """Whether it has the study's lock, and has written states since: it took up what it found."""
    lock, states = out / "lock", out / "states.json"
    mine = lock.read_text(encoding="utf-8").startswith(f"process {launcher.pid} ")
    return mine and states.stat().st_mtime_ns > lock.stat().st_mtime_ns


def _until(what: str, test: Callable[[], bool], launcher: subprocess.Popen[str], timeout: float = 400) -> None:
    end = time.monotonic() + timeout
    while not test():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < end, f"waited {timeout:.0f} s for {what}"
        time.sleep(0.2)
