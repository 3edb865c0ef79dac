"""Which cells get a job: never two, whenever a launcher was killed, whatever SLURM answers. It is a stand-in here."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import slurm_state
from launch.study import slurm as study_slurm
from launch.study.config import load_study
from launch.study.folder import CellState, StudyFolder
from launch.study.job import run_cell
from launch.study.slurm import SlurmRunner
from lmp.errors import UserError
from tests.launch.studies import write_study


class Scheduler:
    """Knows jobs by id, names of those in its queue, and what was submitted."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.named: dict[str, list[str]] = {}
        self.submitted: list[tuple[list[str], str | None]] = []
        self.answers = True
        self.asked: dict[str, Any] = {}

    def slurm(self, *command: str) -> subprocess.CompletedProcess[str]:
        if not self.answers:
            return subprocess.CompletedProcess(
                command, 1, "", "slurm_load_jobs error: Unable to contact slurm controller"
            )
        jobs = self.named.get(command[-1], []) if command[0] == "squeue" else []
        return subprocess.CompletedProcess(command, 0, "\n".join(jobs), "")

    def job_state(self, job: str) -> str:
        return self.states.get(job, "UNKNOWN") if self.answers else "UNKNOWN"

    def executor(self, folder: Path, cluster: Any, **asked: Any) -> None:
        self.asked = asked

    def submit_array(self, executor: Any, function: Any, calls: Sequence[Sequence[Any]]) -> list[Any]:
        array = 100 + len(self.submitted)
        self.submitted.append(([call[1] for call in calls], self.asked["dependency"]))
        jobs = [f"{array}_{n}" for n in range(len(calls))]
        self.states |= dict.fromkeys(jobs, "PENDING")
        return [SimpleNamespace(job_id=job) for job in jobs]


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    made = Scheduler()
    for module, names in (
        (slurm_state, ("slurm", "job_state")),
        (study_slurm, ("slurm", "executor", "submit_array")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(made, name))
    code = SimpleNamespace(take=lambda: True, folder=Path("code"))
    monkeypatch.setattr(study_slurm.Snapshot, "of", lambda *_: code)
    return made


def runner(folder: Path, **keys: Any) -> SlurmRunner:
    study = load_study(write_study(folder, **keys))
    of = StudyFolder(folder / "out")
    return SlurmRunner(of, study, of.open(study), poll=0)


def test_one_array_for_each_place_each_after_the_one_before(tmp_path: Path, scheduler: Scheduler) -> None:
    runner(tmp_path, grid={"processes": [2, 1]}, concurrency=3).start()
    assert scheduler.submitted == [
        (["processes-1_seed-0", "processes-1_seed-1"], None),
        (["processes-2_seed-0", "processes-2_seed-1"], "afterany:100"),
    ]
    assert scheduler.asked["array_parallelism"] == 3


def test_jobs_that_go_on_are_kept_and_those_that_ended_are_not(tmp_path: Path, scheduler: Scheduler) -> None:
    first = runner(tmp_path)
    first.start()
    names = scheduler.submitted[0][0]
    scheduler.states |= {"100_0": "RUNNING", "100_1": "NODE_FAIL", "100_2": "CANCELLED", "100_3": "RUNNING"}
    (first.folder.run_of(names[3]) / "DONE").write_text('{"step": 8}')
    again = runner(tmp_path)
    again.start()
    assert scheduler.submitted[1:] == [([names[2]], "afterany:100")], "NODE_FAIL is about to be restarted by SLURM"
    assert [again.states.cells[name].job for name in names[:3]] == ["100_0", "100_1", "101_0"]
    assert again.states.cells[names[3]].state == "done"


def test_jobs_that_a_kill_kept_from_being_written_down_are_found(tmp_path: Path, scheduler: Scheduler) -> None:
    first = runner(tmp_path)
    first.start()
    names = scheduler.submitted[0][0]
    token = first.states.cells[names[0]].token
    for state in first.states.cells.values():
        state.job = None
    first.folder.save(first.states)
    scheduler.named[f"tiny-{token}"] = ["100_0", "100_2"]  # the others have ended since
    again = runner(tmp_path)
    again.start()
    assert scheduler.submitted[1:] == [([names[1], names[3]], "afterany:100")]
    assert [again.states.cells[name].job for name in names] == ["100_0", "101_0", "100_2", "101_1"]
    assert again.states.cells[names[0]].token == token != again.states.cells[names[1]].token


def test_nothing_is_submitted_while_slurm_does_not_answer(tmp_path: Path, scheduler: Scheduler) -> None:
    first = runner(tmp_path)
    first.start()
    scheduler.answers = False
    with pytest.raises(UserError, match="SLURM does not answer"):
        runner(tmp_path).start()
    first._look(scheduler.submitted[0][0][0])
    assert first.states.cells[scheduler.submitted[0][0][0]].state == "submitted"
    assert len(scheduler.submitted) == 1


def test_failures_are_tried_again_within_bounds_and_mistakes_are_not(
    tmp_path: Path, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {"100_0": 2, "100_1": 75, "101_0": 75, "102_0": 75}
    monkeypatch.setattr(study_slurm, "exit_code", codes.get)
    watched = runner(tmp_path, grid={}, retries=2)
    watched.start()
    monkeypatch.setattr(
        study_slurm.time, "sleep", lambda _: scheduler.states.update(dict.fromkeys(scheduler.states, "FAILED"))
    )
    watched.watch()
    mistaken, failing = scheduler.submitted[0][0]
    assert [names for names, _ in scheduler.submitted] == [[mistaken, failing], [failing], [failing]]
    assert {state.state for state in watched.states.cells.values()} == {"failed"}
    assert "exit code 2" in (watched.states.cells[mistaken].reason or "")


def test_a_job_of_an_older_submission_leaves_the_cell_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = StudyFolder(tmp_path)
    states = folder.states()
    states.cells["cell"] = CellState(token="new")
    folder.save(states)
    run = tmp_path / "cells" / "cell"
    assert run_cell(str(folder.states_file), "cell", "old", str(run), "nowhere.yaml") is None
    assert "was submitted again" in capsys.readouterr().out
    assert not run.exists()
