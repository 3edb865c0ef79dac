"""Requests to stop, and the health word by which all ranks decide the same at the same step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from lmp.parallel.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
REQUEUE_FILE = "LMP_STOP_FILE"
"""The environment variable that may name a file which a batch script touches when the scheduler wants the nodes."""


class Stop(IntEnum):
    """Whether to stop. Of several wishes the largest counts, so a person's goes before a scheduler's."""

    NO = 0
    REQUEUE = 1
    STAY = 2


class StopRequest:
    """A wish that a signal or a file sets; nothing else happens in a handler.

    SIGTERM, SIGUSR2 and the file that LMP_STOP_FILE names: save, stop, go on later, for a scheduler wants the nodes.
    SIGINT and the stop file: save, stop, and stay so.

    Args:
        stop_file: of the run.
        looks: whether this process looks for the files; one of a run is enough.
    """

    def __init__(self, stop_file: Path, *, looks: bool = True) -> None:
        named = os.environ.get(REQUEUE_FILE)
        files = [(stop_file, Stop.STAY)] + ([(Path(named), Stop.REQUEUE)] if named else [])
        self._files = files if looks else []
        self._process = os.getpid()
        self.wish = Stop.NO
        self.reason: str | None = None

    def __call__(self) -> Stop:
        for file, wish in self._files:
            if wish > self.wish and file.exists():
                self.wish, self.reason = wish, f"the file {file.name}"
        return self.wish

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() == self._process:
            wish = Stop.STAY if number == signal.SIGINT else Stop.REQUEUE
            if wish > self.wish:
                self.wish, self.reason = wish, signal.Signals(number).name
        elif number != signal.SIGUSR2:  # a forked child has inherited the handler; it is to die as if it had none
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def stop_requests(stop_file: Path, *, looks: bool = True) -> Iterator[StopRequest]:
    """Listen for signals and files while the context is open; see StopRequest."""
    request = StopRequest(stop_file, looks=looks)
    before = {number: signal.signal(number, request._handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Health:
    """What all ranks know about a step."""

    stop: Stop
    bad: bool
    save: bool
    writing: bool
    slowest_rank: int
    slowest_seconds: float


def health_word(mesh: Mesh, *, stop: Stop, bad: bool, save: bool, writing: bool, seconds: float) -> Health:
    """Agree on a step with one small all-reduce. Collective.

    Args:
        mesh: where this process stands.
        stop: what this rank was asked.
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
        stop=Stop(any_stop),
        bad=bool(any_bad),
        save=bool(any_save),
        writing=bool(any_writing),
        slowest_rank=slowest % mesh.world_size,
        slowest_seconds=slowest // mesh.world_size / 1e6,
    )
