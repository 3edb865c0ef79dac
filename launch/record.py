"""RUN/job.json: the newest SLURM job of a run folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launch.slurm_state import cluster_name, is_over, job_state
from lmp.errors import UserError
from lmp.train.run_folder import write_atomic


@dataclass(frozen=True)
class JobRecord:
    """A job of a run.

    Args:
        job: its id.
        cluster: the SLURM cluster that the id belongs to.
        submitted: when, in local time with its offset.
        directory: the working directory, which relative paths of data start from.
        command: what was typed.
        code: the snapshot that it runs from.
        config: the resolved configuration that it runs with.
        world_size: its processes.
        earlier: ids of the run's jobs before it.
    """

    job: str
    cluster: str | None
    submitted: str
    directory: str
    command: list[str]
    code: str
    config: str
    world_size: int
    earlier: list[str] = field(default_factory=list)

    def write(self, run: Path) -> None:
        write_atomic(run / "job.json", json.dumps(asdict(self), indent=2) + "\n")


def read_record(run: Path) -> JobRecord | None:
    """The newest job of a run folder; None where it never had one.

    Raises:
        UserError: the file is damaged.
    """
    file = run / "job.json"
    if not file.is_file():
        return None
    try:
        return JobRecord(**json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error})", remedy="delete it if no job of the run is left") from error


def state_of(record: JobRecord) -> str:
    """The state of a record's job; UNKNOWN on another cluster, where the id would mean another job."""
    if record.cluster is not None and record.cluster != cluster_name():
        return "UNKNOWN"
    return job_state(record.job)


def check_free(run: Path, *, job: str | None = None) -> None:
    """Refuse a folder that another job than `job` uses.

    Raises:
        UserError: names the job and how to cancel it.
    """
    record = read_record(run)
    if record is None or record.job == job:
        return
    state = state_of(record)
    if not is_over(state):
        raise UserError(
            f"{run}: is the run folder of job {record.job}, which is {state}",
            remedy=f"wait for it, cancel it with `python -m launch.slurm cancel {run}`, or name another --run",
        )
