"""Where a process of a SLURM job step stands, and where the processes of the step meet."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from lmp.errors import UserError

FIRST_PORT, PORTS = 20_000, 12_000
"""Below 32768, from where the kernel hands out ports by itself."""


@dataclass(frozen=True)
class Place:
    """Rank and rendezvous of this process, from the variables that srun sets."""

    job: str
    restart: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """Read the step's variables: with nodes left out of the step they differ from the job's.

        Raises:
            UserError: this process was not started by srun.
        """
        missing = [name for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID") if name not in environment]
        if missing:
            raise UserError(
                f"the environment lacks {', '.join(missing)}: this is no task of a SLURM job",
                remedy="submit with `python -m launch.slurm`, or start by srun as slurm/train.sbatch does",
            )
        nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment["SLURM_TASKS_PER_NODE"]
        number, restart = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", "0"))
        return cls(
            job=job_id(environment) or str(number),
            restart=restart,
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            local_world_size=int(re.match(r"\d+", tasks)[0]),  # type: ignore[index]
            master_address=address_of(first_host(nodes)),
            master_port=port_of(number, restart),
        )

    def export(self) -> None:
        """Set the variables by which torch.distributed finds its peers."""
        os.environ.update(
            MASTER_ADDR=self.master_address,
            MASTER_PORT=str(self.master_port),
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
        )


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """The id by which SLURM's commands mean this job alone; of an array's element ARRAY_TASK. None: in no job."""
    array, element = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else environment.get("SLURM_JOB_ID")


def port_of(job: int, restart: int) -> int:
    """A port that no two of 12000 neighbouring jobs share, another one for each of 37 restarts of a job."""
    return FIRST_PORT + (job * 37 + restart % 37) % PORTS


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list such as gpu-[03-07,11],cpu-1, in which each bracket counts up."""
    name, place = "", 0
    while place < len(nodes) and nodes[place] != ",":
        if nodes[place] == "[":
            end = nodes.index("]", place)
            name += re.split("[-,]", nodes[place + 1 : end])[0]
            place = end
        else:
            name += nodes[place]
        place += 1
    return name


def address_of(node: str) -> str:
    """A node's name, or its NodeAddr where the name does not resolve (clouds, several virtual nodes on one machine)."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    try:
        shown = subprocess.run(["scontrol", "show", "node", "-o", node], text=True, capture_output=True).stdout
    except OSError:  # a container without SLURM's commands
        return node
    found = re.search(r"NodeAddr=(\S+)", shown)
    return found[1] if found else node
