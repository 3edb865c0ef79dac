"""One part of an ingest over a SLURM array: its files, and what its job calls.

Imports no torch, so that the job can set the number of threads before.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from launch.handover import tell
from launch.network import set_defaults
from lmp.errors import EXIT_DONE, EXIT_RESTARTS, EXIT_USER, UserError
from lmp.films.kept import FOLDER as KEPT
from lmp.train.run_folder import write_atomic

PATHS = ("shot_lists", "subtitles")
"""Settings that are paths."""


@dataclass(frozen=True)
class Part:
    """A part's files in the folder of an ingest.

    Args:
        folder: of the ingest, seen by all nodes.
        number: of the part, from 0.
    """

    folder: Path
    number: int

    @property
    def films(self) -> Path:
        """The list of its films, and the settings."""
        return self.folder / f"part-{self.number:04d}.json"

    @property
    def shards(self) -> Path:
        """The folder of its shards; none where no film could be used."""
        return self.folder / f"part-{self.number:04d}"

    @property
    def report(self) -> Path:
        """What came of it; written last."""
        return self.folder / f"part-{self.number:04d}.report.json"

    @property
    def starts(self) -> Path:
        """A line for each start of a job: the job, and how many films had been read before."""
        return self.folder / f"part-{self.number:04d}.starts"

    def read(self) -> int:
        """How many films are read and wait for the others of the part."""
        return sum(1 for _ in (self.shards / KEPT).glob("*.safetensors"))


def read_part(folder: str, number: int, retries: int, workers: int) -> None:
    """Read the films of a part and write its shards, unless that is done; films that were read are not read again.

    Args:
        folder: of the ingest.
        number: of the part.
        retries: starts in a row without one more film read, after the first of them, are given up.
        workers: see `lmp.films.ingest.ingest`.

    Raises:
        SystemExit: the settings cannot be used, or the part is given up; the batch script is told why.
    """
    part = Part(Path(folder), number)
    job, restart = _job()
    set_defaults(job=job, restart=restart)
    _listen()
    if part.report.exists():
        print(f"part {number} is done already", flush=True)
        return
    fruitless = _note_start(part, job)
    if fruitless > retries:
        reason = f"crash loop: the last {fruitless} starts of part {number} read no film to its end"
        _leave(EXIT_RESTARTS, f"error: {reason} -> see the log before this, and give the jobs more memory or time")
    from lmp.films.ingest import ingest
    from lmp.films.sources import Film

    told: dict[str, Any] = json.loads(part.films.read_text(encoding="utf-8"))
    paths = {name: Path(told["settings"][name]) for name in PATHS if told["settings"].get(name) is not None}
    try:
        report = ingest(
            [Film.from_json(film) for film in told["films"]],
            part.shards,
            **{**told["settings"], **paths},
            # With more than one, a film that ends the process which reads it is found, and costs no other.
            workers=max(2, workers) if fruitless else workers,
            overwrite=True,
            progress=False,
        )
    except UserError as error:
        _leave(EXIT_USER, f"error: {error}")
    write_atomic(part.report, json.dumps(report.__dict__))
    print(f"part {number}: {report.films} films, {report.shots} shots, {len(report.failures)} skipped", flush=True)


def _note_start(part: Part, job: str) -> int:
    """Write down that a start begins; returns how many before it, in a row and of this job, had read as much."""
    read = part.read()
    before = part.starts.read_text(encoding="utf-8").splitlines() if part.starts.exists() else []
    with part.starts.open("a", encoding="utf-8") as file:
        file.write(f"{job} {read}\n")
    fruitless = 0
    for line in reversed(before):
        if line != f"{job} {read}":
            break
        fruitless += 1
    return fruitless


def _job() -> tuple[str, int]:
    """The id of the array's element, and how often it was restarted."""
    job = f"{os.environ.get('SLURM_ARRAY_JOB_ID', 'none')}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    return job, int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _listen() -> None:
    """End at the signals, in place of submitit's handlers: what is read is kept, and nothing is half-written."""
    process = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() == process and number == signal.SIGUSR2:
            tell("requeue", "the time limit, or preemption, is near")
            os._exit(EXIT_DONE)
        os._exit(128 + number)

    if "SLURM_JOB_ID" in os.environ:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, stop)


def _leave(code: int, words: str) -> None:
    tell("exit", f"{code} {words}")
    print(words, flush=True)
    raise SystemExit(code)
