"""The `cluster` section of the configuration: what a run asks of SLURM. Imports no torch.

Read by `python -m launch.slurm`, by `launch.study` and by the job itself (restarts, crash loop); training on one
machine takes no notice of it.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

SIGNAL_MARGIN_SECONDS = 60
"""sbatch(1), --signal: the signal may come up to 60 seconds earlier than asked for."""

OWNED_KEYS = {
    "nodes": "cluster.nodes",
    "ntasks-per-node": "cluster.tasks_per_node",
    "gpus-per-node": "cluster.gpus_per_node",
    "cpus-per-task": "cluster.cpus_per_task",
    "mem": "cluster.memory",
    "time": "cluster.time",
    "signal": "cluster.signal_seconds",
    "array": "cluster.array_parallelism",
    "job-name": "name",
    **{key: f"cluster.{key}" for key in ("partition", "account", "qos", "constraint", "comment", "exclude")},
    **{key: f"cluster.{key}" for key in ("nodelist", "reservation", "gres")},
    **dict.fromkeys(("requeue", "no-requeue", "open-mode", "output", "error", "dependency"), "nothing: lmp sets it"),
}
"""sbatch options that have a key of their own or that stop and requeue stand on, and what to use instead."""


def seconds_of(time: int | str) -> int:
    """A SLURM time limit in seconds: minutes, or M:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS.

    Raises:
        ValueError: it is none of these, or 0.
    """
    text = str(time)
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::([0-5]?\d))?(?::([0-5]?\d))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a number of minutes, HH:MM:SS or D-HH:MM:SS")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        units = (3600, 60, 1)
    else:
        units = (3600, 60, 1) if len(numbers) == 3 else (60, 1, 0)
    seconds = int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    if seconds < 1:
        raise ValueError("a limit of 0 would never start")
    return seconds


def _time(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("is not a time")
    if isinstance(value, int | str):
        seconds_of(value)
    return value


def _text(value: object) -> object:
    return str(value) if isinstance(value, int) else value


class ClusterConfig(BaseModel):
    """Nodes, tasks and limits of a job, and how it is put back in the queue."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    nodes: int = Field(1, ge=1, description="nodes of the job")
    gpus_per_node: int | None = Field(None, ge=1, description="GPUs asked of each node; null: none, a run on CPUs")
    tasks_per_node: int | None = Field(None, ge=1, description="processes on each node; null: one per GPU, or one")
    cpus_per_task: int | None = Field(None, ge=1, description="CPU cores of each process; null: the site's default")
    memory: Annotated[str | None, BeforeValidator(_text)] = Field(
        None, pattern=r"^\d+[KMGT]?B?$", description="of each node, such as 500G; 0: all it has; null: the default"
    )
    time: Annotated[int | str, BeforeValidator(_time)] = Field(
        "24:00:00", description="limit of one start: minutes, HH:MM:SS or D-HH:MM:SS; the run goes on in the next"
    )
    partition: str | None = Field(None, min_length=1, description="null: the site's default")
    account: str | None = Field(None, min_length=1, description="who pays; null: the user's default")
    qos: str | None = Field(None, min_length=1, description="quality of service")
    constraint: str | None = Field(None, min_length=1, description="features that nodes must have, such as h100&ib")
    reservation: str | None = Field(None, min_length=1, description="reservation to run in")
    nodelist: str | None = Field(None, min_length=1, description="nodes that must be part of the job")
    exclude: str | None = Field(None, min_length=1, description="nodes that must not be, such as node[3,17]")
    comment: str | None = Field(None, min_length=1, description="shown by squeue and sacct")
    gres: str | None = Field(
        None, min_length=1, description="for sites that count GPUs this way, gpu:h100:8; in place of --gpus-per-node"
    )
    sbatch: dict[str, str | int | bool] = Field(
        default_factory=dict, description="further sbatch options, {mail-user: me@here, exclusive: true}"
    )
    srun: list[str] = Field(
        default_factory=list, description="further arguments of srun, [--container-image=..., --cpu-bind=none]"
    )
    setup: list[str] = Field(
        default_factory=list, description="shell lines at the start of the job, [module load cuda/12.8]"
    )
    environment: str | None = Field(
        None, min_length=1, description="shell file of the cluster's NCCL and network settings, sourced by the job"
    )
    python: str | None = Field(
        None, min_length=1, description="path of Python on the nodes, or in their container; null: this Python"
    )
    preflight: bool = Field(
        True, description="look at every node before each start, and leave out the bad ones (slurm/preflight.sh)"
    )
    signal_seconds: int = Field(
        120, ge=10, description="SIGUSR2 comes so long before the time limit: more than a step and a checkpoint take"
    )
    max_restarts: int = Field(100, ge=0, description="a job is put back in the queue at most so often")
    max_fruitless_starts: int = Field(
        3, ge=1, description="starts of a job in a row from the same checkpoint after which it is a crash loop"
    )
    array_parallelism: int = Field(16, ge=1, description="elements of an array that run at the same time")

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        """The time limit in whole minutes, as SLURM counts it."""
        return -(-seconds_of(self.time) // 60)


def cluster_faults(cluster: ClusterConfig) -> list[str]:
    """What in the section contradicts something else in it, or cannot work."""
    faults = []
    least = cluster.signal_seconds + SIGNAL_MARGIN_SECONDS
    if cluster.minutes * 60 < least:
        faults.append(
            f"cluster.time={cluster.time} with cluster.signal_seconds={cluster.signal_seconds}: SLURM may send the "
            f"signal {SIGNAL_MARGIN_SECONDS} s early, that is at the start (give {-(-least // 60)} minutes or more)"
        )
    if cluster.gpus_per_node and cluster.tasks > cluster.gpus_per_node:
        faults.append(
            f"cluster.tasks_per_node={cluster.tasks_per_node} with cluster.gpus_per_node={cluster.gpus_per_node}: "
            "processes cannot share a GPU"
        )
    for key in cluster.sbatch:
        owner = OWNED_KEYS.get(key.lstrip("-").replace("_", "-"))
        if owner is not None:
            faults.append(f"cluster.sbatch.{key}: use {owner}")
    return faults
