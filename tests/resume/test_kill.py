"""A run that is killed in mid-step goes on, on any topology, as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import config_of, make_shards, metrics, run, start, write_config

pytestmark = pytest.mark.multiprocess

STEPS = 20
SLOW = {"pack_shots": 64, "packs_per_step": 8}
"""Work enough per step that a kill hits the middle of the run."""


class Runs:
    """Runs of one configuration in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = make_shards(folder / "shards", films=16)

    def config(self, name: str, zero: int) -> str:
        config = config_of(self.shards, data=SLOW, parallel={"zero": zero})
        return str(write_config(self.folder / f"{name}.yaml", config))

    def finish(self, name: str, *, processes: int, zero: int) -> list[dict]:
        """Start or go on to the last step; the metrics must hold each step exactly once."""
        folder = self.folder / name
        ended = run(self.config(name, zero), "-n", str(processes), "--run", str(folder))
        assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-3000:]
        lines = metrics(folder)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        return lines

    def killed(self, name: str, *, processes: int, zero: int) -> Path:
        """A run killed with all its processes after two checkpoints or more and before its end."""
        for attempt in range(3):
            folder = self.folder / f"{name}-{attempt}"
            launcher = start(self.config(name, zero), "-n", str(processes), "--run", str(folder))
            deadline = time.monotonic() + 120
            while launcher.poll() is None and _lines(folder) < 12 and time.monotonic() < deadline:
                time.sleep(0.002)
            family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
            for process in family:
                process.kill()
            _, err = launcher.communicate()
            _, alive = psutil.wait_procs(family, timeout=20)
            assert not alive
            assert _lines(folder) >= 12, f"killed before step 12: {err[-3000:]}"
            if _lines(folder) < STEPS and not (folder / "DONE").exists():
                return folder
        pytest.fail("the run was over before the kill, three times")

    def copy(self, killed: Path, name: str) -> Path:
        return shutil.copytree(killed, self.folder / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> list[float]:
    return [line["loss"] for line in runs.finish("undisturbed", processes=2, zero=1)]


@pytest.fixture(scope="module")
def killed(runs: Runs) -> Path:
    return runs.killed("killed", processes=2, zero=1)


def test_same_topology_goes_on_exactly(runs: Runs, killed: Path, undisturbed: list[float]) -> None:
    folder = runs.copy(killed, "same")
    lines = runs.finish("same", processes=2, zero=1)
    assert [line["loss"] for line in lines] == pytest.approx(undisturbed, rel=1e-6)
    assert _starts(folder)[-1] >= 10, "the run began again instead of going on"


def test_other_stage_and_fewer_processes(runs: Runs, killed: Path, undisturbed: list[float]) -> None:
    folder = runs.copy(killed, "fewer")
    lines = runs.finish("fewer", processes=1, zero=3)
    assert [line["loss"] for line in lines] == pytest.approx(undisturbed, rel=1e-5)
    assert _starts(folder)[-1] >= 10


def test_other_stage_and_more_processes(runs: Runs, undisturbed: list[float]) -> None:
    folder = runs.copy(runs.killed("killed-alone", processes=1, zero=3), "more")
    lines = runs.finish("more", processes=2, zero=2)
    assert [line["loss"] for line in lines] == pytest.approx(undisturbed, rel=1e-5)
    assert _starts(folder)[-1] >= 10


def test_a_damaged_checkpoint_is_passed_over(runs: Runs, killed: Path, undisturbed: list[float]) -> None:
    folder = runs.copy(killed, "damaged")
    older, newest = sorted(p for p in (folder / "checkpoints").glob("step-*") if p.suffix != ".tmp")[-2:]
    victim = next(newest.glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 64):
        content[place] ^= 0xFF
    victim.write_bytes(content)
    lines = runs.finish("damaged", processes=1, zero=0)
    assert _starts(folder)[-1] == int(older.name[5:])
    assert [line["loss"] for line in lines] == pytest.approx(undisturbed, rel=1e-5)


def _lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _starts(folder: Path) -> list[int]:
    """The steps from which the run was started, as its ledger tells."""
    events = [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event["step"] for event in events if event["event"] == "start"]


def test_a_run_that_lost_only_its_mark_is_finished_at_once(runs: Runs, undisturbed: list[float]) -> None:
    """A kill between the last checkpoint and DONE."""
    folder = runs.copy(runs.folder / "undisturbed", "unmarked")
    (folder / "DONE").unlink()
    lines = runs.finish("unmarked", processes=2, zero=1)
    assert [line["loss"] for line in lines] == undisturbed
    assert (folder / "DONE").is_file() and _starts(folder)[-1] == STEPS
