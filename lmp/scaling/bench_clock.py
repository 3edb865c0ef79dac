"""What the parts of `lmp bench step` share: their settings, a clock, the matmul ceiling, and counted memory.

On the CPU one thread works and its own CPU time is taken, which neighbours on the machine hardly change; on CUDA events
of the stream are. Ratios are formed within a round, in which all subjects and the ceiling have their turn.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lmp.scaling.bench_subjects import Shape
from lmp.scaling.live_memory import LiveMemory

LOG_EVERY = 5
"""Steps of the trainer between those with all metrics."""


@dataclass(frozen=True)
class StepSettings:
    """What `lmp bench step` measures, and how often.

    Attributes:
        device: "cpu" or "cuda".
        shape: of the encoders.
        lengths: tokens of a sequence, one row of the tables each.
        tokens: tokens of one step; a longer sequence is a step by itself.
        rounds: turns of each subject.
        seconds: a length gets no further round after this, if it has had three.
        budget_mib: memory for the longest sequence; on CUDA none stands for all there is.
        loss_tokens: tokens of the contrastive loss.
        loss_width, loss_tile: width of what it compares, and side of its tiles.
        trainer_shots, trainer_packs: shots of a pack and packs of a step of the trainer.
        trainer_steps: steps that are measured.
        encoders: which take part, some of OWN and PEERS (see bench_subjects).
        compiled: whether compiled encoders take part too.
    """

    device: str
    shape: Shape
    lengths: tuple[int, ...]
    tokens: int
    rounds: int
    seconds: float
    budget_mib: float | None
    loss_tokens: tuple[int, ...]
    loss_width: int
    loss_tile: int
    trainer_shots: int
    trainer_packs: int
    trainer_steps: int
    encoders: tuple[str, ...]
    compiled: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def batch(self, length: int) -> int:
        """Sequences of one step."""
        return max(1, self.tokens // length)


class Clock:
    """Seconds that work takes."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, work: Callable[[], Any]) -> float:
        if self.device == "cpu":
            began = time.thread_time()
            work()
            return time.thread_time() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class MatmulCeiling:
    """The rate of a large square product, in operations a second."""

    def __init__(self, settings: StepSettings) -> None:
        self.side = 8192 if settings.device == "cuda" else 1024
        self.clock = Clock(settings.device)
        self.a, self.b = (torch.randn(self.side, self.side, device=settings.device, dtype=settings.dtype) for _ in "ab")

    def __call__(self) -> float:
        return 2.0 * self.side**3 / self.clock(lambda: self.a @ self.b)


def rounds(settings: StepSettings, names: Sequence[str]) -> Iterator[list[str]]:
    """The order of each round, drawn anew so that no subject always follows the same other one."""
    began = time.monotonic()
    order = random.Random(0)
    for number in range(settings.rounds):
        if number >= 3 and time.monotonic() - began > settings.seconds:
            return
        yield order.sample(names, len(names))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def peak_bytes(device: str, work: Callable[[], Any], *, known: Sequence[Tensor] = ()) -> int:
    """The most bytes of tensors alive at once during `work`, over what was alive before it.

    Args:
        known: tensors made before, which `work` may change in place.

    On CUDA what the allocator gave out, on the CPU every storage that was made (see live_memory).
    """
    if device == "cuda":
        forget_unused()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    with LiveMemory() as memory:
        for tensor in known:
            memory.count(tensor)
        memory.reset_peak()
        before = memory.now
        work()
        return memory.peak - before


def forget_unused() -> None:
    """Give cached blocks back to the device, so that one subject's do not stand in the next one's way."""
    gc.collect()
    torch.cuda.empty_cache()
