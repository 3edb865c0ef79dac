"""Which windows make which packs of which step: a pure function of film lengths, settings and epoch.

Nothing here knows of ranks (but `deal`), workers or features. Random numbers are raw Philox words keyed by
(seed, epoch), whose stream NumPy guarantees, so a plan is the same for every version and machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmp.data.pack import deal_costs, pack_lengths
from lmp.errors import UserError

PLAN_VERSION = 1
"""Changes whenever the same films, settings and epoch would give other packs."""


class Window(NamedTuple):
    """Shots [start, stop) of film number `film`."""

    film: int
    start: int
    stop: int


class Pack(NamedTuple):
    """A row of P shots: windows end to end, then one idle segment of `idle` shots where it is not full."""

    windows: tuple[Window, ...]
    idle: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of all segments, the idle one last; their sum is P."""
        lengths = tuple(w.stop - w.start for w in self.windows)
        return (*lengths, self.idle) if self.idle else lengths

    @property
    def cost(self) -> int:
        """Attention cost: the sum of n^2 over segments; the idle segment attends to itself like any other."""
        return sum(n * n for n in self.lengths)


@dataclass(frozen=True)
class PlanSettings:
    """What a plan depends on besides the films.

    Attributes:
        seed: 0 or more.
        pack_shots: P, shots in a pack.
        packs_per_step: packs in an optimizer step, over all ranks.
        window_shots: films longer than this are cut into windows of at most this many shots, the first of a
            random length; None stands for pack_shots.
    """

    seed: int
    pack_shots: int
    packs_per_step: int
    window_shots: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}", remedy="give a seed from 0 to 2^64 - 1")
        for name in ("pack_shots", "packs_per_step"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", remedy="give at least 1")
        if self.window_shots is not None and not 1 <= self.window_shots <= self.pack_shots:
            raise UserError(
                f"window_shots is {self.window_shots}, pack_shots {self.pack_shots}",
                remedy="give window_shots from 1 to pack_shots",
            )

    @property
    def longest_window(self) -> int:
        return self.window_shots or self.pack_shots


class EpochPlan:
    """The packs of one epoch, step by step. Every shot of every film is in exactly one window.

    Attributes:
        epoch: its number.
        steps: steps in the epoch.
        filled: packs that hold windows; the last step is filled up with idle packs.
    """

    def __init__(self, settings: PlanSettings, epoch: int, windows_W3: np.ndarray, bounds: np.ndarray) -> None:
        """`windows_W3` [W, (film, start, stop)] pack after pack; pack n is rows bounds[n]:bounds[n + 1]."""
        self.epoch = epoch
        self.filled = len(bounds) - 1
        self.steps = -(-self.filled // settings.packs_per_step)
        self._settings = settings
        self._windows_W3 = windows_W3
        self._bounds = bounds

    def packs(self, step: int) -> tuple[Pack, ...]:
        """The packs of a step, always exactly packs_per_step.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"epoch {self.epoch} has {self.steps} steps, not step {step}")
        first = step * self._settings.packs_per_step
        return tuple(self._pack(n) for n in range(first, first + self._settings.packs_per_step))

    def _pack(self, number: int) -> Pack:
        if number >= self.filled:
            return Pack((), self._settings.pack_shots)
        rows = self._windows_W3[self._bounds[number] : self._bounds[number + 1]].tolist()
        windows = tuple(Window(*row) for row in rows)
        return Pack(windows, self._settings.pack_shots - sum(w.stop - w.start for w in windows))


def plan(shots: np.ndarray, settings: PlanSettings, epoch: int) -> EpochPlan:
    """Cut the films into windows, pack them, shuffle the packs.

    Args:
        shots: int [F], shots of each film, each 1 or more.
        epoch: 0 or more; another epoch cuts, packs and shuffles anew.

    Raises:
        UserError: there is no film, or one without shots.
    """
    if len(shots) == 0 or shots.min() < 1:
        raise UserError("the plan needs films of at least one shot each", remedy="give shards that hold films")
    random = np.random.Philox(key=np.array([settings.seed, epoch], dtype=np.uint64))
    windows_W3 = _cut(shots.astype(np.int64), settings.longest_window, random)
    windows_W3 = windows_W3[_permutation(len(windows_W3), random)]
    items, bounds = pack_lengths(windows_W3[:, 2] - windows_W3[:, 1], settings.pack_shots)
    windows_W3 = windows_W3[items]
    order = _permutation(len(bounds) - 1, random)
    return EpochPlan(settings, epoch, *_reorder_rows(windows_W3, bounds, order))


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


def _cut(shots_F: np.ndarray, longest: int, random: np.random.Philox) -> np.ndarray:
    """[W, (film, start, stop)]: short films whole, long ones in runs of `longest` after a random first."""
    phase_F = (random.random_raw(len(shots_F)) % np.uint64(longest)).astype(np.int64) + 1
    first_F = np.where(shots_F > longest, phase_F, shots_F)
    count_F = 1 + -(-(shots_F - first_F) // longest)
    film_W = np.repeat(np.arange(len(shots_F)), count_F)
    number_W = np.arange(len(film_W)) - np.repeat(np.cumsum(count_F) - count_F, count_F)
    stop_W = np.minimum(first_F[film_W] + number_W * longest, shots_F[film_W])
    start_W = np.where(number_W == 0, 0, first_F[film_W] + (number_W - 1) * longest)
    return np.stack([film_W, start_W, stop_W], axis=1)


def _permutation(n: int, random: np.random.Philox) -> np.ndarray:
    return np.argsort(random.random_raw(n), kind="stable")


def _reorder_rows(items: np.ndarray, bounds: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows items[bounds[n]:bounds[n + 1]] in another order, with their new bounds."""
    counts = np.diff(bounds)[order]
    new_bounds = np.concatenate([[0], np.cumsum(counts)])
    taken = np.arange(len(items)) + np.repeat(bounds[:-1][order] - new_bounds[:-1], counts)
    return items[taken], new_bounds
