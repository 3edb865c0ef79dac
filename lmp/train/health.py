"""Requests to stop, and the health word by which all ranks decide the same at the same step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from lmp.parallel.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """A flag that a signal or a stop file sets; nothing else happens in a handler."""

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self.reason: str | None = None

    def __call__(self) -> bool:
        if self.reason is None and self.stop_file.exists():
            self.reason = f"the file {self.stop_file.name}"
        return self.reason is not None

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.reason = signal.Signals(number).name


@contextmanager
def stop_requests(stop_file: Path) -> Iterator[StopRequest]:
    """Listen for SIGTERM, SIGUSR2, SIGINT and the stop file while the context is open."""
    request = StopRequest(stop_file)
    before = {number: signal.signal(number, request._handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Health:
    """What all ranks know about a step."""

    stop: bool
    bad: bool
    save: bool
    writing: bool
    slowest_rank: int
    slowest_seconds: float


def health_word(mesh: Mesh, *, stop: bool, bad: bool, save: bool, writing: bool, seconds: float) -> Health:
    """Agree on a step with one small all-reduce. Collective.

    Args:
        mesh: where this process stands.
        stop: this rank was asked to stop.
        bad: this rank saw a non-finite loss or gradient.
        save: this rank's clock says that a checkpoint is due.
        writing: this rank still writes its file of a checkpoint.
        seconds: this rank's own time for the step, without waiting for others.
    """
    # The largest of (time, rank) as one integer names the slowest rank.
    clock = int(seconds * 1e6) * mesh.world_size + mesh.rank
    word = torch.tensor([int(stop), int(bad), int(save), int(writing), clock], dtype=torch.int64, device=mesh.device)
    dist.all_reduce(word, op=dist.ReduceOp.MAX)
    any_stop, any_bad, any_save, any_writing, slowest = word.tolist()
    return Health(
        stop=bool(any_stop),
        bad=bool(any_bad),
        save=bool(any_save),
        writing=bool(any_writing),
        slowest_rank=slowest % mesh.world_size,
        slowest_seconds=slowest // mesh.world_size / 1e6,
    )
