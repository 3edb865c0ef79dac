"""Which windows make which packs of an epoch: a pure function of the films' lengths, the settings and the epoch.

Nothing here knows of ranks, workers or features. Random numbers are raw Philox words keyed by (seed, epoch), whose
stream NumPy guarantees, so a plan is the same for every version and machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from lmp.data.pack import pack_lengths
from lmp.errors import UserError

PLAN_VERSION = 2
"""Changes whenever the same films, settings and epoch would give other packs."""

IDLE_SHOTS = 128
"""The longest idle segment. Attention grows with the square of a segment, so one long one would rule a step."""

_EXTRA = 1 << 63  # epochs stay below, so these keys give streams of their own


class Window(NamedTuple):
    """Shots [start, stop) of film number `film`."""

    film: int
    start: int
    stop: int


class Pack(NamedTuple):
    """A row of P shots: windows end to end, then idle segments where they do not fill it.

    Attributes:
        epoch, number: the epoch whose plan made it, and its number there; the two name the pack.
        windows: at least one.
        idle: lengths of the idle segments.
    """

    epoch: int
    number: int
    windows: tuple[Window, ...]
    idle: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of all segments, idle ones last; their sum is P."""
        return (*(w.stop - w.start for w in self.windows), *self.idle)

    @property
    def shots(self) -> int:
        """Shots of films, idle ones left out."""
        return sum(w.stop - w.start for w in self.windows)

    @property
    def cost(self) -> int:
        """Attention cost: the sum of n^2 over segments; an idle segment attends to itself like any other."""
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
        block_shards: shards are visited in shuffled blocks of this many, and a pack holds films of one block, so
            that a stretch of steps reads few shards; None shuffles over everything.
        passes: for each data set how often an epoch shows each film: 1 once, 2.5 twice and every second film a
            third time, 0.1 every tenth film, others in the next epoch. Empty stands for once each.
    """

    seed: int
    pack_shots: int
    packs_per_step: int
    window_shots: int | None = None
    block_shards: int | None = None
    passes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}", remedy="give a seed from 0 to 2^64 - 1")
        for name in ("pack_shots", "packs_per_step", "block_shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}", remedy="give at least 1")
        if self.window_shots is not None and not 1 <= self.window_shots <= self.pack_shots:
            raise UserError(
                f"window_shots is {self.window_shots}, pack_shots {self.pack_shots}",
                remedy="give window_shots from 1 to pack_shots",
            )
        if self.passes and not (all(0 < p < math.inf for p in self.passes) and max(self.passes) >= 1):
            raise UserError(
                f"passes are {list(self.passes)}",
                remedy="give numbers above 0, at least one of them 1 or more",
            )

    @property
    def longest_window(self) -> int:
        return self.window_shots or self.pack_shots


@dataclass(frozen=True, eq=False)
class Films:
    """What a plan needs to know of films.

    Attributes:
        shots_F: int [F], shots of each, 1 or more.
        shard_F: int [F], the number of its shard; None: all in one.
        source_F: int [F], the number of its data set; None: all of one.
    """

    shots_F: np.ndarray
    shard_F: np.ndarray | None = None
    source_F: np.ndarray | None = None


class EpochPlan:
    """The packs of one epoch.

    Attributes:
        epoch: its number.
        packs: how many there are, at least one.
    """

    def __init__(self, settings: PlanSettings, epoch: int, windows_W3: np.ndarray, bounds: np.ndarray) -> None:
        """`windows_W3` [W, (film, start, stop)] pack after pack; pack n is rows bounds[n]:bounds[n + 1]."""
        self.epoch = epoch
        self.packs = len(bounds) - 1
        self._settings = settings
        self._windows_W3 = windows_W3
        self._bounds = bounds

    def pack(self, number: int) -> Pack:
        """Pack `number`, 0 <= number < packs.

        Raises:
            IndexError: the epoch has no such pack.
        """
        if not 0 <= number < self.packs:
            raise IndexError(f"epoch {self.epoch} has {self.packs} packs, not pack {number}")
        rows = self._windows_W3[self._bounds[number] : self._bounds[number + 1]].tolist()
        windows = tuple(Window(*row) for row in rows)
        idle = self._settings.pack_shots - sum(w.stop - w.start for w in windows)
        # No longer than a window may be: learned positions number just so many places.
        longest = min(IDLE_SHOTS, self._settings.longest_window)
        whole, rest = divmod(idle, longest)
        return Pack(self.epoch, number, windows, (longest,) * whole + ((rest,) if rest else ()))


def passes_for_shares(shares: Sequence[float], shots: Sequence[int]) -> tuple[float, ...]:
    """The passes that give each data set its share of the stream's shots; the least shown is shown once an epoch.

    Args:
        shares: above 0, in any unit.
        shots: of each data set.
    """
    rates = [float(share) / int(count) for share, count in zip(shares, shots, strict=True)]
    return tuple(rate / min(rates) for rate in rates)


def plan(films: Films, settings: PlanSettings, epoch: int) -> EpochPlan:
    """Choose the films of the epoch, cut them into windows, pack these, shuffle the packs.

    Args:
        films: of all data sets.
        settings: `passes` names as many data sets as `films` has.
        epoch: 0 or more; another epoch cuts, packs and shuffles anew.

    Raises:
        UserError: there is no film, or one without shots, or passes for another number of data sets.
    """
    shots_F = films.shots_F.astype(np.int64)
    if len(shots_F) == 0 or shots_F.min() < 1:
        raise UserError("the plan needs films of at least one shot each", remedy="give shards that hold films")
    random = np.random.Philox(key=np.array([settings.seed, epoch], dtype=np.uint64))
    film_I, round_I = _showings(films, settings, epoch)
    times_F = np.bincount(film_I, minlength=len(shots_F))
    windows: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for block in _blocks(films, film_I, round_I, settings.block_shards, random):
        of_W, start_W, stop_W = _cut(shots_F[film_I[block]], settings.longest_window, random)
        item_W = block[of_W]
        # Showings of a film are spread evenly, and packing takes a stretch at a time, so that the same shots seldom
        # meet in one pack, where they would be each other's negatives.
        place_W = (round_I[item_W] + _uniform(len(item_W), random)) / times_F[film_I[item_W]]
        windows_W3 = np.stack([film_I[item_W], start_W, stop_W], axis=1)[np.argsort(place_W, kind="stable")]
        items, bounds = pack_lengths(windows_W3[:, 2] - windows_W3[:, 1], settings.pack_shots)
        count_N = np.diff(bounds)
        order = np.argsort(random.random_raw(len(count_N)), kind="stable")
        windows.append(_reorder_rows(windows_W3[items], count_N, order))
        counts.append(count_N[order])
    bounds = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return EpochPlan(settings, epoch, np.concatenate(windows), bounds)


def _showings(films: Films, settings: PlanSettings, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The films of the epoch [I], one that is shown k times with rounds 0..k-1 [I]."""
    source_F = np.zeros(len(films.shots_F), dtype=np.int64) if films.source_F is None else films.source_F
    sources = int(source_F.max()) + 1
    passes = settings.passes or (1.0,) * sources
    if len(passes) != sources:
        raise UserError(
            f"passes are given for {len(passes)} data sets, there are {sources}",
            remedy="give one number for each data set",
        )
    shown: list[np.ndarray] = []
    rounds: list[np.ndarray] = []
    for source, times in enumerate(passes):
        members = np.flatnonzero(source_F == source)
        whole = math.floor(times)
        extra = _some(films, members, Fraction(times) - whole, settings, (source, epoch))
        shown += [np.tile(members, whole), extra]
        rounds += [np.repeat(np.arange(whole), len(members)), np.full(len(extra), whole)]
    return np.concatenate(shown), np.concatenate(rounds)


def _blocks(
    films: Films, film_I: np.ndarray, round_I: np.ndarray, block_shards: int | None, random: np.random.Philox
) -> list[np.ndarray]:
    """Block after block, the showings (numbers into film_I) that belong together."""
    if block_shards is None or films.shard_F is None:
        return [np.arange(len(film_I))]
    shard_I = films.shard_F[film_I]
    # A visit is a shard in a round. Each data set's visits, shuffled within a round, are spread evenly over the epoch,
    # so that every block has its share of every data set.
    visits, first_V, visit_I = np.unique(
        round_I * (int(shard_I.max()) + 1) + shard_I, return_index=True, return_inverse=True
    )
    source_V = np.zeros_like(visits) if films.source_F is None else films.source_F[film_I[first_V]]
    shuffled = np.lexsort((random.random_raw(len(visits)), round_I[first_V], source_V))
    place_V = np.empty(len(visits))
    for source in np.unique(source_V):
        members = shuffled[source_V[shuffled] == source]
        place_V[members] = (np.arange(len(members)) + _uniform(1, random)) / len(members)
    rank_V = np.empty(len(visits), dtype=np.int64)
    rank_V[np.argsort(place_V, kind="stable")] = np.arange(len(visits))
    block_I = rank_V[visit_I] // block_shards
    order = np.argsort(block_I, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(block_I[order])) + 1)


def _some(
    films: Films, members: np.ndarray, share: Fraction, settings: PlanSettings, key: tuple[int, int]
) -> np.ndarray:
    """A share of a data set's films, by shots; from epoch to epoch it goes round, so that all are shown as often.

    The films lie end to end on a circle in an order that the seed fixes; each epoch takes the next arc.
    """
    source, epoch = key
    random = np.random.Philox(key=np.array([settings.seed, _EXTRA + source], dtype=np.uint64))
    draw = random.random_raw(len(members))
    if settings.block_shards is not None and films.shard_F is not None:
        # Whole shards lie side by side, so that an arc needs few of them.
        shard = films.shard_F[members]
        members = members[np.lexsort((draw, random.random_raw(int(shard.max()) + 1)[shard]))]
    else:
        members = members[np.argsort(draw, kind="stable")]
    shots = films.shots_F[members].astype(np.int64)
    total = int(shots.sum())
    begin, end = math.floor(share * total * epoch), math.floor(share * total * (epoch + 1))
    start = np.cumsum(shots) - shots
    return members[(start - begin) % total < end - begin]


def _cut(shots_G: np.ndarray, longest: int, random: np.random.Philox) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place in shots_G, start and stop of each window: short films whole, long ones in runs after a random first."""
    phase_G = (random.random_raw(len(shots_G)) % np.uint64(longest)).astype(np.int64) + 1
    first_G = np.where(shots_G > longest, phase_G, shots_G)
    count_G = 1 + -(-(shots_G - first_G) // longest)
    of_W = np.repeat(np.arange(len(shots_G)), count_G)
    number_W = np.arange(len(of_W)) - np.repeat(np.cumsum(count_G) - count_G, count_G)
    stop_W = np.minimum(first_G[of_W] + number_W * longest, shots_G[of_W])
    start_W = np.where(number_W == 0, 0, first_G[of_W] + (number_W - 1) * longest)
    return of_W, start_W, stop_W


def _uniform(n: int, random: np.random.Philox) -> np.ndarray:
    """[n] float64 in [0, 1)."""
    return (random.random_raw(n) >> np.uint64(11)).astype(np.float64) / 2**53


def _reorder_rows(items: np.ndarray, count_N: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Items that lie row after row, row n having count_N[n] of them, with the rows in another order."""
    first_N = np.cumsum(count_N) - count_N
    counts = count_N[order]
    taken = np.arange(len(items)) + np.repeat(first_N[order] - (np.cumsum(counts) - counts), counts)
    return items[taken]
