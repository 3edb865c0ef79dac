"""The processes of a run: which device each has, and the groups that share a pack.

Ranks are laid out data x sequence: ranks dp * sp + 0 .. dp * sp + sp - 1 share one pack. The groups are our own
and hidden from DeepSpeed, which sees one flat data-parallel world (its own sequence-parallel plumbing scales
gradients differently per ZeRO stage).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lmp.errors import UserError

_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL")
"""In the words of the communication libraries, which raise a plain RuntimeError for most."""
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Mesh:
    """Where this process stands."""

    rank: int
    world_size: int
    sequence: int
    device: torch.device
    sequence_group: dist.ProcessGroup | None

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sequence

    @property
    def dp_size(self) -> int:
        return self.world_size // self.sequence

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sequence

    @property
    def main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def world_size() -> int:
    """Number of processes of this run, before anything is started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def mesh(sequence: int, *, timeout_minutes: float) -> Iterator[Mesh]:
    """Start communication, form the groups, and leave cleanly.

    Args:
        sequence: processes that share one pack; divides the number of processes.
        timeout_minutes: after which a silent peer is taken for dead.

    Raises:
        UserError: the environment names some of the five rendezvous variables but not all.
    """
    _check_environment()
    device = _device()
    _start(device, timedelta(minutes=timeout_minutes))
    rank, size = dist.get_rank(), dist.get_world_size()
    own = None
    if sequence > 1:
        for first in range(0, size, sequence):
            group = dist.new_group(list(range(first, first + sequence)))
            if first <= rank < first + sequence:
                own = group
    try:
        yield Mesh(rank=rank, world_size=size, sequence=sequence, device=device, sequence_group=own)
    except BaseException as error:
        if not lost_peer(error):  # else leaving cleanly would wait for the lost one
            _end()
        raise
    _end()


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone or silent, so that starting again may help."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(mark in str(error) for mark in _LOST)
    )


def _end() -> None:
    if dist.is_initialized():
        import deepspeed

        # torch's own would leave DeepSpeed with groups that are gone, for the next run of this process to stumble over.
        deepspeed.comm.destroy_process_group()


def _check_environment() -> None:
    missing = [name for name in ENVIRONMENT if not os.environ.get(name)]
    if len(missing) == len(ENVIRONMENT):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    elif missing:
        raise UserError(
            f"the environment lacks {', '.join(missing)}",
            remedy="start several processes with `python -m launch.local`, or set all of " + ", ".join(ENVIRONMENT),
        )


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _start(device: torch.device, timeout: timedelta) -> None:
    """Start the process group through DeepSpeed, without the compiled CPU communication op (no compiler needed)."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="gloo" if device.type == "cpu" else "nccl",
        timeout=timeout,
        verbose=False,
        auto_mpi_discovery=False,
    )
