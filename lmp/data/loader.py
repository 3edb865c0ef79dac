"""Packs as a rank sees them: reads, ahead of the trainer, its own packs only and of each its own shots.

The whole state of the stream is one Cursor; what follows is the same for any number of ranks and threads.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

import numpy as np
import torch

from lmp.data.film_slice import Blocks, FilmSlice, Part
from lmp.data.index import FilmIndex
from lmp.data.plan import Pack, PlanSettings
from lmp.data.stream import Cursor, Stream, deal
from lmp.errors import UserError

_FETCHED = 4  # shards are brought to the node this many times as far ahead as packs are read


@dataclass
class PackBatch:
    """One pack of P shots, or of it the run of P_local shots that this rank holds under sequence parallelism.

    Attributes:
        slot: place in the step, 0..packs_per_step-1.
        epoch, number: name the pack: the epoch whose plan made it and its number there.
        lengths: lengths of all segments of the whole pack, idle ones last; their sum is P.
        features: NAME -> [P_local, K, D], dtype as stored, zeros where idle.
        valid: NAME -> [P_local] bool, False where idle.
        film_P: int64 [P_local], film number in the index, -1 where idle.
        shot_P: int64 [P_local], shot number in the film, 0 where idle.
        position_P: int64 [P_local], place within the shot's own segment.
        segment_P: int64 [P_local], number of the shot's segment in the pack.
        time_P: float32 [P_local], start of the shot in seconds, 0 where idle.
    """

    slot: int
    epoch: int
    number: int
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
        stream: of this index and these settings, where plans were made already.
        cursor: the first step to deliver; None: the first of all.
        dp_rank, dp_size: this rank's place among those that share the packs of a step.
        sp_rank, sp_size: its place among those that share the shots of a pack; P % sp_size == 0.
        read_ahead: steps kept ready while the caller works on one.
        threads: reading threads; 0 reads in the caller's thread when asked.
        pin: read into page-locked memory, from which copies to a GPU do not block.
        stall_seconds: a read that takes longer is reported, and again each time it has doubled its time; it goes on.
        report: takes such a report.

    Raises:
        UserError: packs or shots do not divide among the ranks, or the stream has no such step.
    """

    def __init__(
        self,
        index: FilmIndex,
        settings: PlanSettings,
        *,
        stream: Stream | None = None,
        cursor: Cursor | None = None,
        dp_rank: int = 0,
        dp_size: int = 1,
        sp_rank: int = 0,
        sp_size: int = 1,
        read_ahead: int = 2,
        threads: int = 2,
        pin: bool = False,
        stall_seconds: float = 60.0,
        report: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
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
        self.stream = stream or Stream.of(index, settings)
        self._index, self._pin, self._blocks = index, pin, Blocks()
        self._next = self.stream.first() if cursor is None else cursor
        self.stream.check(self._next)
        self._dp, self._sp = (dp_rank, dp_size), (sp_rank, sp_size)
        self._read_ahead = read_ahead
        self._stall_seconds, self._report = stall_seconds, report
        # The pool's threads are joined when the interpreter ends. Daemon threads, such as torchdata's, abort
        # the process if they are inside torch at that moment, and its exit code is lost.
        self._pool = ThreadPoolExecutor(threads, "lmp-read") if threads else None
        self._reading: deque[tuple[Cursor, list[_Task]]] = deque()
        self._awaited: list[_Task] = []
        self._prepared = self._next.epoch
        self._fetched, self._steps_fetched = self._next, 0
        self._closed = False

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._closed:
            raise StopIteration
        try:
            if self._pool is None:
                cursor, self._awaited = self._take()
                return StepBatch(cursor, [task() for task in self._awaited])
            while len(self._reading) <= self._read_ahead:
                cursor, tasks = self._take()
                for task in tasks:
                    task.future = self._pool.submit(task)
                self._reading.append((cursor, tasks))
                self._prepare(cursor.epoch + 1, self._pool)
            cursor, self._awaited = self._reading.popleft()
            return StepBatch(cursor, [self._wait(cursor, task) for task in self._awaited])
        except BaseException:
            self.close()
            raise

    def awaited(self) -> list[str]:
        """What is being read for the step that was asked for last, by film; safe from any thread."""
        return [what for task in self._awaited if not (task.future and task.future.done()) for what in task.reads()]

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

    def _take(self) -> tuple[Cursor, list[_Task]]:
        """What this rank has to read for the next step."""
        cursor = self._next
        sp_rank, sp_size = self._sp
        rows = self.stream.settings.pack_shots // sp_size
        options = {"start": sp_rank * rows, "stop": (sp_rank + 1) * rows, "pin": self._pin, "blocks": self._blocks}
        tasks = [_Task(self._index, pack, slot, **options) for slot, pack in self._own(cursor)]
        self._next = self.stream.next(cursor)
        if self._index.cached:
            self._fetch_ahead()
        return cursor, tasks

    def _own(self, cursor: Cursor) -> list[tuple[int, Pack]]:
        """This rank's packs of a step, in its order, with their slots."""
        packs = self.stream.packs(cursor)
        return [(slot, packs[slot]) for slot in deal(packs, self._dp[1])[self._dp[0]]]

    def _fetch_ahead(self) -> None:
        """Have the shards of coming steps brought to this node before anything is read from them."""
        self._steps_fetched -= 1
        while self._steps_fetched < _FETCHED * (1 + self._read_ahead):
            self._index.fetch(w.film for _, pack in self._own(self._fetched) for w in pack.windows)
            self._fetched = self.stream.next(self._fetched)
            self._steps_fetched += 1

    def _prepare(self, epoch: int, pool: ThreadPoolExecutor) -> None:
        """Have the next epoch planned before it is needed."""
        if epoch > self._prepared:
            self._prepared = epoch
            pool.submit(self.stream.epoch, epoch)

    def _wait(self, cursor: Cursor, task: _Task) -> PackBatch:
        assert task.future is not None
        patience, waited = self._stall_seconds, 0.0
        while True:
            try:
                return task.future.result(timeout=patience - waited)
            except TimeoutError:
                if task.future.done():
                    raise
            waited = patience
            patience *= 2
            where = task.where or "other packs, whose reads keep all reading threads busy"
            place = f"epoch {cursor.epoch}, step {cursor.step}"
            self._report(f"warning: {place} has been waiting {waited:.3g} s for {where}: is the storage reachable?")


class _Task:
    """One pack to be read, and, while it is, where."""

    def __init__(self, index: FilmIndex, pack: Pack, slot: int, **options: Any) -> None:
        """options: of read_pack."""
        self._index, self._pack, self._slot, self._options = index, pack, slot, options
        self.future: Future[PackBatch] | None = None
        self.parts: list[Part] = []

    def __call__(self) -> PackBatch:
        return read_pack(self._index, self._pack, self._slot, **self._options, at=self._at)

    @property
    def where(self) -> str:
        """What is being read, or was last; empty before that."""
        return "; ".join(self._index.place(p.film, f"shot {p.start} on") for p in self.parts)

    def reads(self) -> list[str]:
        """The films that are being read or, before that, will be."""
        films = [part.film for part in self.parts] or [window.film for window in self._pack.windows]
        return [self._index.keys[film] for film in films]

    def _at(self, parts: list[Part]) -> None:
        self.parts = parts


def read_pack(
    index: FilmIndex,
    pack: Pack,
    slot: int,
    *,
    start: int,
    stop: int,
    pin: bool = False,
    blocks: Blocks | None = None,
    at: Callable[[list[Part]], None] = lambda _: None,
) -> PackBatch:
    """Read shots [start, stop) of a pack, and from the shards no other rows.

    Args:
        slot: its place in the step.
        pin: read into page-locked memory.
        blocks: where other memory comes from.
        at: told what is going to be read, each time before it is.

    Raises:
        UserError: a shard is damaged; names shard, film and modality.
    """
    rows = stop - start
    out = FilmSlice.empty(index.modalities, rows, pin=pin, blocks=blocks)
    length_S = np.array(pack.lengths)
    first_S = np.cumsum(length_S) - length_S
    parts: list[Part] = []
    for window, first in zip(pack.windows, first_S.tolist(), strict=False):
        low, high = max(first, start), min(first + window.stop - window.start, stop)
        if low < high:
            parts.append(Part(window.film, window.start + low - first, out.rows(low - start, high - start)))
    shown = min(max(pack.shots - start, 0), rows)
    if shown < rows:
        out.rows(shown, rows).clear()
    idle = len(pack.idle)
    film_S = np.array([w.film for w in pack.windows] + [-1] * idle)
    shot_S = np.array([w.start for w in pack.windows] + [0] * idle)
    segment_P = np.repeat(np.arange(len(length_S)), length_S)[start:stop]
    position_P = np.arange(start, stop) - first_S[segment_P]
    shot_P = shot_S[segment_P] + position_P
    shot_P[shown:] = 0
    for some in index.together(parts):
        at(some)
        index.read_parts(some)
    rest = {
        "film_P": torch.from_numpy(film_S[segment_P]),
        "shot_P": torch.from_numpy(shot_P),
        "position_P": torch.from_numpy(position_P),
        "segment_P": torch.from_numpy(segment_P),
        "time_P": out.shots_N2[:, 0].float() / 1000,
    }
    return PackBatch(
        slot=slot,
        epoch=pack.epoch,
        number=pack.number,
        lengths=pack.lengths,
        features=out.features,
        valid=out.valid,
        **{name: t.pin_memory() if pin else t for name, t in rest.items()},
    )


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, dict):
        return {name: _to(v, device) for name, v in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
