"""Packs as a rank sees them: reads, ahead of the trainer, its own packs only and of each its own shots.

The whole state of the stream is one Cursor; what follows is the same for any number of ranks and threads.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from types import TracebackType
from typing import Any

import torch

from lmp.data.index import FilmIndex, FilmSlice, Part
from lmp.data.plan import EpochPlan, Pack, PlanSettings, deal, plan
from lmp.errors import UserError


@dataclass(frozen=True)
class Cursor:
    """A place in the stream: the step, within the epoch, that comes next."""

    epoch: int
    step: int


_START = Cursor(0, 0)


@dataclass
class PackBatch:
    """One pack of P shots, or of it the run of P_local shots that this rank holds under sequence parallelism.

    Attributes:
        slot: place in the step, 0..packs_per_step-1.
        lengths: lengths of all segments of the whole pack, the idle one last; their sum is P.
        features: NAME -> [P_local, K, D], dtype as stored, zeros where idle.
        valid: NAME -> [P_local] bool, False where idle.
        film_P: int64 [P_local], film number in the index, -1 where idle.
        shot_P: int64 [P_local], shot number in the film, 0 where idle.
        position_P: int64 [P_local], place within the shot's own segment.
        segment_P: int64 [P_local], number of the shot's segment in the pack.
        time_P: float32 [P_local], start of the shot in seconds, 0 where idle.
    """

    slot: int
    lengths: tuple[int, ...]
    features: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]
    film_P: torch.Tensor
    shot_P: torch.Tensor
    position_P: torch.Tensor
    segment_P: torch.Tensor
    time_P: torch.Tensor

    def to(self, device: torch.device | str) -> PackBatch:
        """The same with every tensor on `device`; copies from pinned memory do not block."""
        return PackBatch(**{f.name: _to(getattr(self, f.name), device) for f in fields(self)})


@dataclass
class StepBatch:
    """This rank's packs of one step, in the order in which it works on them, and the step's place."""

    cursor: Cursor
    packs: list[PackBatch]


class PackLoader:
    """Iterates over this rank's share of every step from a cursor on, epoch after epoch, without end.

    Threads read ahead; the order does not depend on them. An error met while reading is raised, as it is, at
    the step that it belongs to. Close it (or use it as a context manager) to stop the threads early.

    Args:
        cursor: the first step to deliver.
        dp_rank, dp_size: this rank's place among those that share the packs of a step.
        sp_rank, sp_size: its place among those that share the shots of a pack; P % sp_size == 0.
        read_ahead: steps kept ready while the caller works on one.
        threads: reading threads; 0 reads in the caller's thread when asked.

    Raises:
        UserError: packs or shots do not divide among the ranks, or the epoch has no such step.
    """

    def __init__(
        self,
        index: FilmIndex,
        settings: PlanSettings,
        *,
        cursor: Cursor = _START,
        dp_rank: int = 0,
        dp_size: int = 1,
        sp_rank: int = 0,
        sp_size: int = 1,
        read_ahead: int = 2,
        threads: int = 2,
    ) -> None:
        if settings.pack_shots % sp_size:
            raise UserError(
                f"packs of {settings.pack_shots} shots do not divide among {sp_size} sequence ranks",
                remedy="give pack_shots as a multiple of the sequence-parallel size",
            )
        if settings.packs_per_step % dp_size:
            raise UserError(
                f"{settings.packs_per_step} packs per step do not divide among {dp_size} data-parallel ranks",
                remedy="give packs_per_step as a multiple of the data-parallel ranks",
            )
        if not (0 <= dp_rank < dp_size and 0 <= sp_rank < sp_size):
            raise ValueError(f"rank {dp_rank} of {dp_size}, sequence rank {sp_rank} of {sp_size}")
        # Reading ahead and training may be in two epochs at a time.
        self._plan = lru_cache(maxsize=2)(partial(plan, index.shots, settings))
        steps = self._plan(cursor.epoch).steps
        if not 0 <= cursor.step < steps:
            raise UserError(
                f"epoch {cursor.epoch} has {steps} steps, no step {cursor.step}",
                remedy="resume with the data and plan settings that the cursor comes from",
            )
        local = settings.pack_shots // sp_size
        self._read = partial(read_pack, index, start=sp_rank * local, stop=(sp_rank + 1) * local)
        self._steps = _steps(self._plan, cursor, dp_rank, dp_size)
        self._read_ahead = read_ahead
        # The pool's threads are joined when the interpreter ends. Daemon threads, such as torchdata's, abort
        # the process if they are inside torch at that moment, and its exit code is lost.
        self._pool = ThreadPoolExecutor(threads, "lmp-read") if threads else None
        self._reading: deque[tuple[Cursor, list[Future[PackBatch]]]] = deque()
        self._closed = False

    def next_cursor(self, cursor: Cursor) -> Cursor:
        """The cursor after the step at `cursor`; after the last step of an epoch, the start of the next."""
        if cursor.step + 1 < self._plan(cursor.epoch).steps:
            return Cursor(cursor.epoch, cursor.step + 1)
        return Cursor(cursor.epoch + 1, 0)

    def shots(self, cursor: Cursor) -> int:
        """Shots of the whole step at `cursor`, over all ranks, idle ones left out."""
        packs = self._plan(cursor.epoch).packs(cursor.step)
        return sum(window.stop - window.start for pack in packs for window in pack.windows)

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._closed:
            raise StopIteration
        try:
            if self._pool is None:
                step = next(self._steps)
                return StepBatch(step.cursor, list(map(self._read, step.packs, step.slots)))
            while len(self._reading) <= self._read_ahead:
                step = next(self._steps)
                futures = [self._pool.submit(self._read, *task) for task in zip(step.packs, step.slots, strict=True)]
                self._reading.append((step.cursor, futures))
            cursor, futures = self._reading.popleft()
            return StepBatch(cursor, [future.result() for future in futures])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the threads and drop what was read ahead; the iterator ends."""
        self._closed = True
        self._reading.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> PackLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_pack(index: FilmIndex, pack: Pack, slot: int, *, start: int, stop: int) -> PackBatch:
    """Read shots [start, stop) of a pack, and from the shards no other rows.

    Raises:
        UserError: a shard is damaged; names shard, film and modality.
    """
    rows = stop - start
    out = FilmSlice.empty(index.modalities, rows)
    film_P = torch.full((rows,), -1)
    shot_P = torch.zeros(rows, dtype=torch.int64)
    position_P = torch.empty(rows, dtype=torch.int64)
    segment_P = torch.empty(rows, dtype=torch.int64)
    parts: list[Part] = []
    segment_start = 0
    for segment, length in enumerate(pack.lengths):
        first, last = max(segment_start, start), min(segment_start + length, stop)
        if first < last:
            here = slice(first - start, last - start)
            position_P[here] = torch.arange(first - segment_start, last - segment_start)
            segment_P[here] = segment
            part = out.rows(here.start, here.stop)
            if segment < len(pack.windows):
                window = pack.windows[segment]
                first_shot = window.start + first - segment_start
                film_P[here] = window.film
                shot_P[here] = torch.arange(first_shot, first_shot + last - first)
                parts.append(Part(window.film, first_shot, part))
            else:
                part.clear()
        segment_start += length
    index.read_parts(parts)
    return PackBatch(
        slot=slot,
        lengths=pack.lengths,
        features=out.features,
        valid=out.valid,
        film_P=film_P,
        shot_P=shot_P,
        position_P=position_P,
        segment_P=segment_P,
        time_P=out.shots_N2[:, 0].float() / 1000,
    )


@dataclass
class _Step:
    """One rank's share of a step before it is read."""

    cursor: Cursor
    slots: list[int]
    packs: list[Pack]


def _steps(plan_of: Callable[[int], EpochPlan], cursor: Cursor, rank: int, ranks: int) -> Iterator[_Step]:
    """This rank's share of every step from `cursor` on, without end."""
    for epoch in itertools.count(cursor.epoch):
        epoch_plan = plan_of(epoch)
        for step in range(cursor.step if epoch == cursor.epoch else 0, epoch_plan.steps):
            packs = epoch_plan.packs(step)
            slots = deal(packs, ranks)[rank]
            yield _Step(Cursor(epoch, step), slots, [packs[slot] for slot in slots])


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, dict):
        return {name: _to(v, device) for name, v in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
