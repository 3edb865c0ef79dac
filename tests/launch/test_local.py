"""Processes of one run on this machine: they fail together, stop together, and go on."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lmp.cli import main
from tests.runs import config_of, make_shards, metrics, run, start, write_config

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """More steps than a test waits for."""
    shards = make_shards(tmp_path / "shards")
    settings = config_of(shards, train={"steps": 100_000}, checkpoint={"every_steps": 50_000})
    return write_config(tmp_path / "config.yaml", settings)


def started(config: Path, folder: Path) -> tuple[subprocess.Popen[str], dict[int, psutil.Process]]:
    """A run of two processes that has made some steps, and its ranks."""
    launcher = start(str(config), "-n", "2", "--run", str(folder))
    wait_for(lambda: launcher.poll() is not None or (folder / "metrics.jsonl").is_file())
    assert launcher.poll() is None, launcher.communicate()[1]
    wait_for(lambda: launcher.poll() is not None or (folder / "metrics.jsonl").read_text().count("\n") >= 3)
    ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(launcher.pid).children()}
    assert sorted(ranks) == [0, 1]
    return launcher, ranks


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def end(launcher: subprocess.Popen[str]) -> None:
    if launcher.poll() is None:
        launcher.kill()
        launcher.communicate()


def test_a_killed_rank_ends_all(config: Path, tmp_path: Path) -> None:
    launcher, ranks = started(config, tmp_path / "run")
    try:
        ranks[1].kill()
        _, err = launcher.communicate(timeout=60)
    finally:
        end(launcher)
    assert launcher.returncode == 75
    assert "rank 1 failed" in err
    assert "logs/rank-0001.log" in err
    wait_for(lambda: not any(rank.is_running() for rank in ranks.values()))
    assert not (tmp_path / "run/DONE").exists()


def test_sigterm_saves_and_the_next_start_finishes(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    launcher, ranks = started(config, folder)
    try:
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=60)
    finally:
        end(launcher)
    assert launcher.returncode == 0, err
    assert "SIGTERM" in out
    assert not any(rank.is_running() for rank in ranks.values())
    (saved,) = (folder / "checkpoints").iterdir()
    step = metrics(folder)[-1]["step"]
    assert saved.name == f"step-{step:08d}"
    assert not (folder / "DONE").exists()

    steps = f"train.steps={step + 3}"
    done = run(str(config), "-n", "2", "--run", str(folder), steps)
    assert done.returncode == 0, done.stderr
    assert (folder / "DONE").is_file()
    assert [line["step"] for line in metrics(folder)] == list(range(1, step + 4))

    before = (folder / "ledger.jsonl").read_bytes()
    assert main(["train", str(config), "--run", str(folder), steps]) == 0
    assert "finished already" in capsys.readouterr().out
    assert (folder / "ledger.jsonl").read_bytes() == before


def test_a_refused_start_leaves_no_run_folder(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", config_of(tmp_path / "photos"))
    (tmp_path / "photos").mkdir()
    done = run(str(config), "-n", "2", "--run", str(tmp_path / "run"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "photos" in line and " -> " in line
    assert not (tmp_path / "run").exists()
