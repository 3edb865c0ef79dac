"""Runs the cells of a study on this machine, one after another."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch.follow import results_of
from launch.local import launch
from launch.slurm_state import may_go_on
from launch.study.cells import Cell
from launch.study.config import Evaluation, Study
from launch.study.folder import CellState, States, StudyFolder, last_words, runnable
from lmp.errors import EXIT_DONE, EXIT_USER, UserError
from lmp.train.run_folder import RunFolder


def run_local(folder: StudyFolder, study: Study, cells: Sequence[Cell]) -> bool:
    """Train and measure what is not done yet. A cell that a kill left half-done goes on from its checkpoint.

    Returns:
        whether to go on: False when a cell was asked to stop (Ctrl-C, SIGTERM, its STOP file).
    """
    states = folder.states()
    _leave_to_slurm(states)
    states.cells = {name: CellState(**{**vars(one), "failures": 0}) for name, one in states.cells.items()}
    todo = runnable(cells)
    for number, cell in enumerate(todo, start=1):
        state = states.cells.setdefault(cell.name, CellState())
        if cell.nodes > 1:
            state.state, state.reason = "waiting", f"has {cell.nodes} nodes, and this is one machine"
            continue
        if not _train(folder, study, cell, f"[{number}/{len(todo)}]", states):
            return False
        folder.save(states)
        if study.evaluate and folder.is_done(cell.name) and not _measure(folder, study.evaluate, cell):
            return False
    return True


def _leave_to_slurm(states: States) -> None:
    """No cell may have two jobs.

    Raises:
        UserError: some cells have a SLURM job that is not over.
    """

    jobs = [state.job for state in states.cells.values() if state.job is not None]
    if jobs and (active := [job for job in jobs if may_go_on(job)]):
        raise UserError(
            f"{len(active)} cells have SLURM jobs ({', '.join(active[:5])})",
            remedy="go on without --local, or cancel them: python -m launch.study cancel STUDY",
        )
    for state in states.cells.values():
        state.job = None


def _train(folder: StudyFolder, study: Study, cell: Cell, place: str, states: States) -> bool:
    """Bring a cell to its end, or give it up; False: it was asked to stop."""
    run, state = folder.run_of(cell.name), states.cells[cell.name]
    command = [sys.executable, "-m", "lmp.cli", "train", str(folder.config_of(cell.name)), "--run", str(run)]
    while not folder.is_done(cell.name):
        print(f"{place} {cell.name}: {cell.steps} steps on {cell.world_size} processes", flush=True)
        state.state, state.reason = "running", None
        folder.save(states)
        code = launch(command, run, cell.processes)
        if code == EXIT_DONE and not folder.is_done(cell.name):
            state.state, state.reason = "stopped", "asked to stop"
            folder.save(states)
            return False
        if code != EXIT_DONE:
            state.failures += 1
            state.reason = f"exit code {code}: {last_words(run)}"
            if code == EXIT_USER or state.failures > study.retries:
                state.state = "failed"
                print(f"{place} {cell.name}: given up, {state.reason}", file=sys.stderr, flush=True)
                return True
    state.state, state.reason = "done", None
    return True


def _measure(folder: StudyFolder, evaluate: Evaluation, cell: Cell) -> bool:
    """Measure a finished cell in a process of its own; False: it was asked to stop."""
    run = folder.run_of(cell.name)
    step = RunFolder(run).finished_step()
    if step is None or results_of(run, step).is_file():
        return True
    command = [sys.executable, "-m", "launch.follow", str(run), *evaluate.shards, "--once", "--last"]
    command += ["--seeds", str(evaluate.seeds)]
    command += ["--train-shards", *evaluate.train_shards] if evaluate.train_shards else []
    command += ["--labels", evaluate.labels] if evaluate.labels else []
    for one in evaluate.tasks:
        command += ["--task", one.task, one.labels, *one.shards]
    code = launch(command, run / "evaluation", 1)
    if code not in (EXIT_DONE, 130):
        print(f"{cell.name}: not measured: {last_words(run / 'evaluation')}", file=sys.stderr, flush=True)
    return code != 130
