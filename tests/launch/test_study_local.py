"""A study on this machine whose launcher is killed goes on and is reported; checkpoints are measured as they come."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.follow import Request, follow, main, unmeasured
from lmp.data.index import FilmIndex
from tests.launch.studies import Page, ledger, write_study
from tests.runs import metrics, run, start

pytestmark = pytest.mark.multiprocess

CELLS = ["window-shots-8_seed-0", "window-shots-8_seed-1", "window-shots-16_seed-0"]
STEPS = 120


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of three cells, killed with -9 in the second one and started again."""
    folder = tmp_path_factory.mktemp("study")
    path = write_study(
        folder,
        exclude=[{"data.window_shots": 16, "seed": 1}],
        budget={"steps": STEPS},
        config={"checkpoint": {"every_steps": 10, "keep": 2}, "train": {"log_every": 120}},
        evaluate={
            "shards": [str(folder / "held-out")],
            "seeds": 1,
            "tasks": [{"task": "boundaries", "labels": str(folder / "scenes"), "shards": [str(folder / "held-out")]}],
        },
    )
    (folder / "scenes").mkdir()
    films = FilmIndex.load([folder / "held-out"])
    for key, shots in zip(films.keys, films.shots.tolist(), strict=True):
        lines = [f"{n:04d} {int(n % 5 == 4)}\n" for n in range(shots - 1)]
        (folder / "scenes" / f"{key}.txt").write_text("".join(lines))
    out = folder / "out"
    launcher = start(str(path), "--local", "--out", str(out), module="launch.study")
    second = out / "cells" / CELLS[1]
    _until(lambda: (second / "checkpoints" / "step-00000010" / "manifest.json").is_file(), launcher)
    family = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert family and not alive, "ranks go with their launcher"
    assert (out / "cells" / CELLS[0] / "DONE").is_file() and not (second / "DONE").exists()
    half = run("report", str(out), module="launch.study")
    assert "3 cells: 1 done, 1 waiting, 1 stopped; 1 evaluated" in half.stdout, half.stdout + half.stderr
    ended = run(str(path), "--local", "--out", str(out), module="launch.study", timeout=600)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    assert "left out: window-shots-16_seed-1: excluded by" in ended.stdout
    assert "3 cells: 3 done; 3 evaluated" in ended.stdout
    return out


def test_done_cells_are_left_alone_and_half_done_ones_go_on(study: Path) -> None:
    starts = {name: [e["step"] for e in ledger(study / "cells" / name) if e["event"] == "start"] for name in CELLS}
    assert starts[CELLS[0]] == [0] and starts[CELLS[2]] == [0]
    assert len(starts[CELLS[1]]) == 2 and starts[CELLS[1]][1] >= 10
    for name in CELLS:
        assert [line["step"] for line in metrics(study / "cells" / name)] == list(range(1, STEPS + 1))


def test_the_report_is_complete(study: Path) -> None:
    with (study / "report" / "results.csv").open() as file:
        lines = {line["cell"]: line for line in csv.DictReader(file)}
    assert lines.pop("window-shots-16_seed-1")["status"] == "left out"
    assert sorted(lines) == sorted(CELLS)
    for name, line in lines.items():
        made = metrics(study / "cells" / name)
        assert float(line["loss"]) == made[-1]["loss"] and int(line["step"]) == STEPS
        assert float(line["memory_gib"]) == max(step["memory_gib"] for step in made)
        times = [step["seconds"] for step in made]
        assert min(times) <= float(line["seconds"]) <= max(times)
        assert 0 < float(line["boundaries AP"]) < 1 and line["boundaries AP n"] == "6"
        assert (study / "cells" / name / "evaluation" / f"step-{STEPS:08d}" / "boundaries" / "report.md").is_file()
        assert 0 < float(line["cross-modal MRR"]) <= 1 and int(line["cross-modal MRR n"]) > 1
        assert line["mfu"] == "", "no peak is known of this device"
    page = Page((study / "report" / "report.html").read_text(encoding="utf-8"))
    assert page.external == [] and page.dangling == []


def test_checkpoints_are_measured_once_and_shown_at_their_step(study: Path) -> None:
    cell = study / "cells" / CELLS[0]
    request = Request((str(study.parent / "held-out"),), seeds=1)
    assert unmeasured(cell) == [STEPS - 10], "the study measured the last step"
    before = (cell / "evaluation" / f"step-{STEPS:08d}" / "results.json").stat().st_mtime_ns
    follow(cell, request, once=True, poll=0)
    follow(cell, request, once=False, poll=0)  # the run is done, so this ends as well
    assert unmeasured(cell) == []
    assert (cell / "evaluation" / f"step-{STEPS:08d}" / "results.json").stat().st_mtime_ns == before
    events = EventAccumulator(str(cell / "tensorboard" / "evaluation")).Reload()
    assert {event.step for event in events.Scalars("evaluation/cross_modal/mrr")} == {STEPS - 10, STEPS}
    assert {event.step for event in events.Scalars("evaluation/boundaries/AP")} == {STEPS}
    assert "loss" not in events.Tags()["scalars"], "the run's own events are elsewhere"
    assert not list((cell / "evaluation").glob("*.tmp"))


def test_what_follow_cannot_measure_on(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = str(study / "cells" / CELLS[0])
    for words, problem in (([], "nothing to measure on"), (["--task", "boundaries", "labels"], "give NAME LABELS")):
        assert main([cell, *words]) == 2
        assert problem in capsys.readouterr().err


def _until(test: Callable[[], bool], launcher: subprocess.Popen[str], timeout: float = 400) -> None:
    end = time.monotonic() + timeout
    while not test():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < end, os.getloadavg()
        time.sleep(0.02)
