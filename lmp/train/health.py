"""Requests to stop, and the health word by which all ranks decide the same at the same step."""

from __future__ import annotations

import os
import platform
import signal
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

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
    save: bool
    writing: bool
    slowest_rank: int
    slowest_seconds: float


def health_word(mesh: Mesh, *, stop: Stop, save: bool, writing: bool, verdict: int, seconds: float) -> Health:
    """Agree on a step with one small all-reduce. Collective.

    Args:
        mesh: where this process stands.
        stop: what this rank was asked.
        save: this rank's clock says that a checkpoint is due.
        writing: this rank still writes its file of a checkpoint.
        verdict: what this rank does about the step, see policy.Action.
        seconds: this rank's own time for the step, without waiting for others.

    Raises:
        RuntimeError: the ranks do not do the same about the step.
    """
    # The largest of (time, rank) as one integer names the slowest rank.
    clock = int(seconds * 1e6) * mesh.world_size + mesh.rank
    word = [int(stop), int(save), int(writing), int(verdict), -int(verdict), clock]
    agreed = torch.tensor(word, dtype=torch.int64, device=mesh.device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    any_stop, any_save, any_writing, highest, lowest, slowest = agreed.tolist()
    if highest != -lowest:
        raise RuntimeError(
            f"the ranks do not agree on what to do about a step ({-lowest} to {highest}), although they judge by "
            "values that were reduced over all of them: a fault of the communication, or of lmp"
        )
    return Health(
        stop=Stop(any_stop),
        save=bool(any_save),
        writing=bool(any_writing),
        slowest_rank=slowest % mesh.world_size,
        slowest_seconds=slowest // mesh.world_size / 1e6,
    )


class Pace:
    """Compares the ranks' own times of a step now and then, and names those that are slow for long. Made by all ranks.

    Own time is that of reading and of the forward passes. ZeRO 3 and sequence parallelism make ranks wait for each
    other in these, so that a slow rank then looks as slow as those that wait for it.

    Args:
        mesh: where this process stands.
        percent: a rank is slow when its time is so much above the median's.
        say: takes a line, the name of an event and its facts.
    """

    TIMES = 3
    """A rank is named when it is slow in so many comparisons one after another."""

    def __init__(self, mesh: Mesh, *, percent: float, say: Callable[..., None]) -> None:
        self.mesh, self.percent, self.say = mesh, percent, say
        self.facts: dict[str, float] = {}
        self._slow = [0] * mesh.world_size
        self._named: list[int] = []
        self._hosts: list[Any] = [None] * mesh.world_size
        dist.all_gather_object(self._hosts, platform.node())

    def compare(self, step: int, seconds: float) -> list[int]:
        """Gather this step's own times. Collective. Returns the ranks that have been slow for long."""
        gathered = torch.zeros(self.mesh.world_size, dtype=torch.float64, device=self.mesh.device)
        gathered[self.mesh.rank] = seconds
        dist.all_reduce(gathered)
        times = gathered.tolist()
        usual = max(statistics.median_low(times), 1e-9)
        over = [100 * (time / usual - 1) for time in times]
        self._slow = [count + 1 if more > self.percent else 0 for count, more in zip(self._slow, over, strict=True)]
        slow = [rank for rank, count in enumerate(self._slow) if count >= self.TIMES]
        self.facts = {"slowest_percent": max(over), "stragglers": len(slow)}
        if slow and slow != self._named:
            told = ", ".join(f"rank {rank} on {self._hosts[rank]} {over[rank]:.0f} %" for rank in slow[:8])
            self.say(f"step {step}: slower than the median for long: {told}", "stragglers", step=step, ranks=slow)
        self._named = slow
        return slow
