"""The steps of a run: the packs of epoch after epoch, dealt out step by step. Knows of no rank but in `deal`.

An epoch's last packs that do not make a whole step open the next epoch, so every step is full and none is lost.
A place in the stream is a Cursor; what follows from it costs the same wherever it is.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lmp.data.index import FilmIndex
from lmp.data.pack import deal_costs
from lmp.data.plan import EpochPlan, Films, Pack, PlanSettings, plan
from lmp.errors import UserError

_KEPT_PLANS = 3  # the epoch before, whose packs may be carried; the one at work; the one that is prepared
_KEPT_STEPS = 64
_KEPT_PACKS = 10_000  # more plans than those are kept while they are this small: a step may span many small epochs


@dataclass(frozen=True)
class Cursor:
    """A place in the stream: the step that comes next.

    Attributes:
        epoch: whose steps are counted.
        step: within the epoch.
        carried: packs of earlier epochs that the epoch's first step begins with.
    """

    epoch: int = 0
    step: int = 0
    carried: int = 0


class Stream:
    """The packs of each step of a run, for films, settings and nothing else. Safe from many threads."""

    def __init__(self, films: Films, settings: PlanSettings) -> None:
        self.films, self.settings = films, settings
        self._plans: OrderedDict[int, Future[EpochPlan]] = OrderedDict()
        self._lock = threading.Lock()
        # Asked for when a step is read, when it is trained on, and when its shards are fetched.
        self._packs = lru_cache(_KEPT_STEPS)(self._make_packs)
        self._kept = max(_KEPT_PLANS, _KEPT_PACKS * settings.pack_shots // max(int(films.shots_F.sum()), 1))

    @classmethod
    def of(cls, index: FilmIndex, settings: PlanSettings) -> Stream:
        """The stream of all films of an index; its folders are the data sets."""
        return cls(Films(index.shots, index.shard_of, index.folder_of), settings)

    def epoch(self, number: int) -> EpochPlan:
        """The plan of an epoch; the plans used last are kept."""
        with self._lock:
            mine = number not in self._plans
            if mine:
                self._plans[number] = Future()
                while len(self._plans) > self._kept:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(number)
            future = self._plans[number]
        if mine:
            try:
                future.set_result(plan(self.films, self.settings, number))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def first(self, epoch: int = 0) -> Cursor:
        """The first step of all, or of an epoch when nothing is carried into it."""
        return self._settle(Cursor(epoch))

    def next(self, cursor: Cursor) -> Cursor:
        """The step after the one at `cursor`; after the last of an epoch, the first of the next."""
        return self._settle(Cursor(cursor.epoch, cursor.step + 1, cursor.carried))

    def steps(self, cursor: Cursor) -> int:
        """Whole steps in the epoch of `cursor`."""
        return (cursor.carried + self.epoch(cursor.epoch).packs) // self.settings.packs_per_step

    def packs(self, cursor: Cursor) -> tuple[Pack, ...]:
        """The packs of the step at `cursor`, always exactly packs_per_step, each of at least one window.

        Raises:
            UserError: the stream has no such step.
        """
        return self._packs(cursor)

    def _make_packs(self, cursor: Cursor) -> tuple[Pack, ...]:
        self.check(cursor)
        first = cursor.step * self.settings.packs_per_step - cursor.carried
        epoch_plan = self.epoch(cursor.epoch)
        numbers = range(max(first, 0), first + self.settings.packs_per_step)
        return (*self._carried(cursor, -min(first, 0)), *(epoch_plan.pack(n) for n in numbers))

    def check(self, cursor: Cursor) -> None:
        """Raise UserError unless the stream has a step there."""
        valid = cursor.epoch >= 0 and 0 <= cursor.carried < self.settings.packs_per_step
        if not valid or not 0 <= cursor.step < self.steps(cursor):
            has = f"epoch {cursor.epoch} has {self.steps(cursor)} steps, " if valid else ""
            raise UserError(
                f"{has}no step {cursor.step} with {cursor.carried} packs carried",
                remedy="resume with the data and plan settings that the cursor comes from",
            )

    def shots(self, cursor: Cursor) -> int:
        """Shots of the whole step at `cursor`, idle ones left out."""
        return sum(pack.shots for pack in self.packs(cursor))

    def locate(self, step: int, start: Cursor | None = None) -> Cursor:
        """The place `step` steps after `start` (of the first step of all). Costs one plan per epoch between."""
        cursor, left = start or self.first(), step
        while left >= (rest := self.steps(cursor) - cursor.step):
            left -= rest
            cursor = self._settle(Cursor(cursor.epoch, cursor.step + rest, cursor.carried))
        return Cursor(cursor.epoch, cursor.step + left, cursor.carried)

    def fingerprint(self, cursor: Cursor) -> str:
        """Names what the step at `cursor` shows: eight hexadecimal digits over its packs and windows."""
        rows = [(p.epoch, p.number, *w) for p in self.packs(cursor) for w in p.windows]
        return f"{zlib.crc32(np.array(rows, dtype='<i8').tobytes()):08x}"

    def _settle(self, cursor: Cursor) -> Cursor:
        """The same place, told so that its step lies within its epoch."""
        while cursor.step >= (steps := self.steps(cursor)):
            left = cursor.carried + self.epoch(cursor.epoch).packs - steps * self.settings.packs_per_step
            cursor = Cursor(cursor.epoch + 1, cursor.step - steps, left)
        return cursor

    def _carried(self, cursor: Cursor, count: int) -> list[Pack]:
        """The last `count` packs of all before the epoch of `cursor`; small epochs may each give a few."""
        found: list[Pack] = []
        epoch = cursor.epoch - 1
        while count > len(found):
            if epoch < 0:
                raise UserError(
                    f"epoch {cursor.epoch} cannot begin with {cursor.carried} carried packs",
                    remedy="resume with the data and plan settings that the cursor comes from",
                )
            earlier = self.epoch(epoch)
            wanted = range(max(0, earlier.packs - (count - len(found))), earlier.packs)
            found = [*(earlier.pack(n) for n in wanted), *found]
            epoch -= 1
        return found


def deal(packs: Sequence[Pack], ranks: int) -> list[list[int]]:
    """The slots (places in `packs`) of each data-parallel rank, in its order: equally many, attention even.

    Raises:
        UserError: the packs do not divide among the ranks.
    """
    if ranks < 1 or len(packs) % ranks:
        raise UserError(
            f"{len(packs)} packs per step do not divide among {ranks} data-parallel ranks",
            remedy="give packs_per_step as a multiple of the data-parallel ranks",
        )
    return deal_costs([pack.cost for pack in packs], ranks)
