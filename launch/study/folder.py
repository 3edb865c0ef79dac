"""The folder of a study: what it is, its cells, and what is known of each one. One launcher writes it at a time.

study.yaml      the study, with its base in it
cells.json      every cell with its steps, predicted cost, and why it is left out if it is
configs/        NAME.yaml, the configuration of each cell
cells/          NAME, its run folder
code/           the copy of lmp that its SLURM jobs run
states.json     what the launcher last knew of each cell, and its jobs
report/         made from the cells at any time
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from launch.study.cells import Cell, as_json, load_cells, make_cells
from launch.study.config import Study, check_same_study
from lmp.config import validate
from lmp.errors import UserError
from lmp.parallel.deepspeed_config import merge
from lmp.train.run_folder import write_atomic


@dataclass
class CellState:
    """What the launcher knows of a cell that runs or has run.

    Attributes:
        state: waiting, submitted, running, done, stopped, cancelled or failed.
        reason: of the last three.
        failures: since the study was started last.
        job: SLURM's id of the element that it is, 12_3.
        token: of its newest submission; a job of an older one leaves the cell alone.
    """

    state: str = "waiting"
    reason: str | None = None
    failures: int = 0
    job: str | None = None
    token: str | None = None


@dataclass
class States:
    """All of states.json.

    Attributes:
        cells: by name.
        submissions: token -> names of the cells, in the order of the array.
        evaluation: ids of the jobs that measure the finished cells.
        evaluations: how often they were submitted since the study was started last.
    """

    cells: dict[str, CellState] = field(default_factory=dict)
    submissions: dict[str, list[str]] = field(default_factory=dict)
    evaluation: list[str] = field(default_factory=list)
    evaluations: int = 0


class StudyFolder:
    """Paths and small files of a study; writes are atomic."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.study_file = self.path / "study.yaml"
        self.cells_file = self.path / "cells.json"
        self.states_file = self.path / "states.json"

    def open(self, study: Study) -> list[Cell]:
        """Make the folder, or go on with what it holds: cells are planned once.

        Raises:
            UserError: it holds another study, or no cell can run.
        """
        if self.study_file.is_file() and self.cells_file.is_file():
            before = yaml.safe_load(self.study_file.read_text(encoding="utf-8"))
            check_same_study(before, study, folder=self.path)
            cells = [_with_cluster(cell, study) for cell in load_cells(self.path)]
        else:
            cells = make_cells(study)
        (self.path / "configs").mkdir(parents=True, exist_ok=True)
        for cell in cells:
            if cell.left_out is None:
                config = yaml.safe_dump(cell.config, sort_keys=False, allow_unicode=True)
                write_atomic(self.config_of(cell.name), config)
        write_atomic(self.study_file, study.dump())
        write_atomic(self.cells_file, as_json(cells))
        return cells

    def cells(self) -> list[Cell]:
        """As they were planned.

        Raises:
            UserError: the folder holds no study.
        """
        return load_cells(self.path)

    def run_of(self, name: str) -> Path:
        """The run folder of a cell."""
        return self.path / "cells" / name

    def config_of(self, name: str) -> Path:
        """The configuration of a cell."""
        return self.path / "configs" / f"{name}.yaml"

    def is_done(self, name: str) -> bool:
        """Whether a cell's run is finished."""
        return (self.run_of(name) / "DONE").is_file()

    def states(self) -> States:
        """What is known; empty at first. What a launcher on this machine ran when it was killed is stopped."""
        if not self.states_file.is_file():
            return States()
        facts = json.loads(self.states_file.read_text(encoding="utf-8"))
        states = States(**{**facts, "cells": {name: CellState(**one) for name, one in facts["cells"].items()}})
        if not self.is_run():
            for state in states.cells.values():
                if state.state == "running" and state.job is None:
                    state.state, state.reason = "stopped", "the launcher ended"
        return states

    def save(self, states: States) -> None:
        """Write states.json."""
        write_atomic(self.states_file, json.dumps(asdict(states), indent=1) + "\n")

    def is_run(self) -> bool:
        """Whether a launcher works on the study."""
        try:
            with (self.path / "lock").open("r", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no such file, or a file system without locks
            return False
        return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one launcher works on a study; the lock goes with its process, however that ends.

        Raises:
            UserError: another one does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise UserError(
                    f"{self.path}: is being run by {file.read().strip() or 'another process'}",
                    remedy="wait for it, or end it; `python -m launch.study status` shows how far the study is",
                ) from error
            except OSError:
                pass  # a file system without locks
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield


def runnable(cells: Sequence[Cell]) -> list[Cell]:
    """Those that are not left out."""
    return [cell for cell in cells if cell.left_out is None]


def last_words(run: Path) -> str:
    """Why a run ended, as the logs of its ranks tell: a user's mistake, else the last line."""
    lines: list[str] = []
    for log in sorted((run / "logs").glob("rank-*.log")):
        lines += [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-50:]]
    told = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line]
    return told[-1].removeprefix("error: ")[:400] if told else "its logs say nothing"


def _with_cluster(cell: Cell, study: Study) -> Cell:
    """The cluster section may change while a study goes on."""
    if cell.config is None:
        return cell
    now: dict[str, Any] = {k: v for k, v in cell.config.items() if k != "cluster"}
    config = validate(merge(now, {"cluster": study.config.get("cluster", {})}), source="config.cluster")
    return replace(cell, config=config.model_dump(mode="json"))
