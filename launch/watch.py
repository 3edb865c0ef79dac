"""What becomes of a run that was submitted: its state, its logs, its end. Reads the run folder and asks SLURM."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.record import JobRecord, read_record, state_of
from launch.restarts import ledger
from launch.slurm_state import is_over, slurm
from lmp.errors import UserError
from lmp.train.run_folder import RunFolder

RECENT_STEPS = 20
TAIL_BYTES = 1 << 18
EVENT_WIDTH = 160
STARTS_AND_ENDS = {"submit", "launch", "start", "stop", "failure", "requeue", "refused"}


@dataclass(frozen=True)
class Status:
    """A run as it is now; None: not known (yet).

    Args:
        run: the folder.
        job: id of the newest job.
        state: of that job, as SLURM tells it.
        why: why it waits.
        restarts: how often the job was put back in the queue.
        step, steps: the last step made, and the last to be made.
        loss, shots_per_second, seconds_per_step: of the newest steps.
        seconds_left: of training alone, without waiting in queues.
        checkpoint: the newest.
        checkpoint_age: in seconds.
        finished: whether the run is.
        events: the newest lines of the ledger.
    """

    run: str
    job: str | None
    state: str | None
    why: str | None
    restarts: int
    step: int
    steps: int | None
    loss: float | None
    shots_per_second: float | None
    seconds_per_step: float | None
    seconds_left: float | None
    checkpoint: str | None
    checkpoint_age: float | None
    finished: bool
    events: list[dict[str, Any]]

    def lines(self) -> list[str]:
        """For a reader."""
        job = "no SLURM job yet" if self.job is None else f"job {self.job} is {self.state}"
        if self.why:
            job += f" ({self.why})"
        if self.restarts:
            job += f", restarted {self.restarts} time{'s' if self.restarts > 1 else ''}"
        lines = [f"{self.run}: {'finished; ' if self.finished else ''}{job}"]
        progress = f"step {self.step}"
        if self.steps:
            progress += f" of {self.steps} ({100 * self.step / self.steps:.0f} %)"
        if self.loss is not None:
            progress += f", loss {self.loss:.4f}"
        if self.shots_per_second is not None and self.seconds_per_step is not None:
            progress += f", {self.shots_per_second:.0f} shots/s, {self.seconds_per_step:.3g} s a step"
        lines.append(progress)
        if self.seconds_left:
            lines.append(f"about {duration(self.seconds_left)} of training left, waiting in queues aside")
        if self.checkpoint is not None and self.checkpoint_age is not None:
            lines.append(f"newest checkpoint {self.checkpoint}, {duration(self.checkpoint_age)} old")
        return lines + [f"  {_event(event)}" for event in self.events]


def status(run: Path, *, events: int = 8) -> Status:
    """Read a run's status.

    Raises:
        UserError: there is no run in this folder.
    """
    folder, record = _folder(run), read_record(run)
    told = ledger(folder)
    state = None if record is None else state_of(record)
    why = None
    if record is not None and state == "PENDING":
        found = re.search(r"\bReason=(\S+)", slurm("scontrol", "show", "job", "-o", record.job).stdout)
        why = found[1] if found else None
    recent = _newest_metrics(folder)
    step = recent[-1]["step"] if recent else 0
    each = _median(recent, lambda line: line["seconds"])
    steps = _steps(folder, record)
    checkpoints = sorted(path for path in folder.checkpoints.glob("step-*") if path.name[5:].isdigit())
    done = folder.finished_step()
    finished = done is not None and (steps is None or done >= steps)
    return Status(
        run=str(run),
        job=record.job if record else None,
        state=state,
        why=why,
        restarts=max(
            (event.get("restart", 0) for event in told if record and event.get("job") == record.job), default=0
        ),
        step=step,
        steps=steps,
        loss=recent[-1].get("loss") if recent else None,
        shots_per_second=_median(recent, lambda line: line["shots_per_second"]),
        seconds_per_step=each,
        seconds_left=None if finished or each is None or steps is None else (steps - step) * each,
        checkpoint=checkpoints[-1].name if checkpoints else None,
        checkpoint_age=time.time() - checkpoints[-1].stat().st_mtime if checkpoints else None,
        finished=finished,
        events=[event for event in told if event.get("event") != "saved"][-events:],
    )


def status_json(run: Path) -> str:
    """The status as one JSON object."""
    return json.dumps(asdict(status(run)))


def tail(run: Path, *, rank: int, lines: int, follow: bool) -> None:
    """Become `tail` on the log of a rank.

    Raises:
        UserError: there is no such log.
    """
    folder = _folder(run)
    file = folder.logs / f"rank-{rank:04d}.log"
    if not file.is_file():
        there = sorted(folder.logs.glob("rank-*.log"))
        have = f"there are ranks 0 to {int(there[-1].stem[5:])}" if there else "no process has started yet"
        batch = sorted((run / "submitit").glob("*_0_log.out"), key=lambda path: path.stat().st_mtime)
        remedy = f"{have}; the batch script's log is {batch[-1]}" if batch else have
        raise UserError(f"{file}: no such log", remedy=remedy)
    os.execvp("tail", ["tail", "-n", str(lines), *(["-F"] if follow else []), str(file)])


def cancel(run: Path, *, now: bool) -> str:
    """End the job of a run for good. Returns what was done, in words.

    Gracefully: a job that trains is asked to save and stop at its next step, and does not go back to the queue; one
    that does not train yet has nothing to save and is cancelled at once.

    Args:
        run: the run folder.
        now: cancel at once in any case; what was done since the newest checkpoint is lost.

    Raises:
        UserError: the folder has no job.
    """
    folder, record = _folder(run), read_record(run)
    if record is None:
        raise UserError(f"{run}: no SLURM job is known", remedy="look with squeue --me")
    state = state_of(record)
    if is_over(state):
        return f"job {record.job} is over already ({state})"
    if not now and state == "RUNNING" and _trains(folder):
        folder.stop.touch()
        folder.note("cancel", job=record.job, how="asked to save and stop")
        return f"job {record.job} was asked to save and stop, which it does at its next step; --now does not wait"
    done = slurm("scancel", record.job)
    if done.returncode:
        raise UserError(f"scancel {record.job}: {done.stderr.strip()}", remedy="cancel it as the user who submitted it")
    folder.note("cancel", job=record.job, how=f"scancel while {state}")
    return f"job {record.job} was cancelled while {state}"


def duration(seconds: float) -> str:
    """In words, to two figures or so."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def _folder(run: Path) -> RunFolder:
    folder = RunFolder(run)
    if not any(path.exists() for path in (folder.config, folder.ledger, run / "job.json")):
        raise UserError(f"{run}: holds no run", remedy="give the run folder, such as runs/NAME")
    return folder


def _trains(folder: RunFolder) -> bool:
    """Whether the newest start has come as far as the training loop, which looks for the stop file."""
    last = next((e["event"] for e in reversed(ledger(folder)) if e.get("event") in STARTS_AND_ENDS), None)
    return last == "start"


def _newest_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """The newest steps, oldest first, from the end of the file."""
    if not folder.metrics.is_file():
        return []
    with folder.metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    found = []
    for line in lines[-RECENT_STEPS - 1 :]:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # the first is cut off, the last may be half-written
            continue
    return found[-RECENT_STEPS:]


def _median(lines: list[dict[str, Any]], value: Any) -> float | None:
    return statistics.median(value(line) for line in lines) if lines else None


def _steps(folder: RunFolder, record: JobRecord | None) -> int | None:
    """Of the newest start's configuration, or of the one that is about to start."""
    for file in (Path(record.config) if record else None, folder.config):
        if file is not None and file.is_file():
            config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            return int(config.get("train", {}).get("steps", 0)) or None
    return None


def _event(event: dict[str, Any]) -> str:
    rest = {k: v for k, v in event.items() if k not in ("time", "event", "cursor", "data", "command", "bytes")}
    line = f"{event.get('time', '')} {event.get('event', '')}: " + ", ".join(f"{k} {v}" for k, v in rest.items())
    return line if len(line) <= EVENT_WIDTH else line[: EVENT_WIDTH - 3] + "..."
