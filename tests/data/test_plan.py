from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmp.data.pack import deal_costs, pack_lengths
from lmp.data.plan import IDLE_SHOTS, EpochPlan, Films, Pack, PlanSettings, passes_for_shares, plan
from lmp.errors import UserError


@st.composite
def corpora(draw: st.DrawFn) -> tuple[Films, PlanSettings, int]:
    """Up to 60 films in up to 3 data sets and some shards, any settings."""
    pack_shots = draw(st.integers(1, 40))
    shots = np.array(draw(st.lists(st.integers(1, 150), min_size=1, max_size=60)))
    sources = draw(st.integers(1, min(3, len(shots))))
    source = np.sort(np.arange(len(shots)) % sources)
    shard = np.arange(len(shots)) // draw(st.integers(1, 5))
    passes = draw(st.lists(st.sampled_from([0.3, 0.5, 1.0, 1.7, 3.0]), min_size=sources, max_size=sources))
    options = PlanSettings(
        seed=draw(st.integers(0, 2**64 - 1)),
        pack_shots=pack_shots,
        packs_per_step=draw(st.sampled_from([1, 2, 3, 8, 64])),
        window_shots=draw(st.none() | st.integers(1, pack_shots)),
        block_shards=draw(st.none() | st.integers(1, 6)),
        passes=tuple(passes) if max(passes) >= 1 and draw(st.booleans()) else (),
    )
    return Films(shots, shard, source), options, draw(st.integers(0, 1000))


def all_packs(epoch_plan: EpochPlan) -> list[Pack]:
    return [epoch_plan.pack(n) for n in range(epoch_plan.packs)]


def times_shown(epoch_plan: EpochPlan, films: Films) -> np.ndarray:
    """How often each film is shown, after a check that each of its shots is shown as often."""
    seen = Counter((w.film, s) for p in all_packs(epoch_plan) for w in p.windows for s in range(w.start, w.stop))
    for film, shots in enumerate(films.shots_F.tolist()):
        assert len({seen[film, shot] for shot in range(shots)}) == 1
    return np.array([seen[film, 0] for film in range(len(films.shots_F))])


@settings(max_examples=150, deadline=None)
@given(corpora())
def test_every_shot_is_shown_as_often_as_asked_and_packs_are_full_rows(
    corpus: tuple[Films, PlanSettings, int],
) -> None:
    films, options, epoch = corpus
    epoch_plan = plan(films, options, epoch)
    packs = all_packs(epoch_plan)
    assert [(p.epoch, p.number) for p in packs] == [(epoch, n) for n in range(epoch_plan.packs)]
    assert all(p.windows and sum(p.lengths) == options.pack_shots and min(p.lengths) >= 1 for p in packs)
    longest = options.window_shots or options.pack_shots
    for film, start, stop in (w for p in packs for w in p.windows):
        assert stop - start <= longest
        if films.shots_F[film] <= longest:
            assert (start, stop) == (0, films.shots_F[film]), "a film that fits is whole"
    shown_F = times_shown(epoch_plan, films)
    assert films.source_F is not None
    for source, times in enumerate(options.passes or (1.0,) * (films.source_F.max() + 1)):
        shown = shown_F[films.source_F == source]
        assert set(shown.tolist()) <= {int(np.floor(times)), int(np.ceil(times))}


@settings(max_examples=50, deadline=None)
@given(corpora(), st.integers(0, 5))
def test_a_plan_is_a_pure_function(corpus: tuple[Films, PlanSettings, int], others: int) -> None:
    films, options, epoch = corpus
    first = all_packs(plan(films, options, epoch))
    np.random.default_rng(others).random(others)
    plan(films, options, epoch + 1)
    assert (
        all_packs(plan(Films(films.shots_F.astype(np.int32), films.shard_F, films.source_F), options, epoch)) == first
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=24), st.integers(1, 16))
def test_dealing_gives_every_item_once_and_equally_many_and_costliest_first(costs: list[int], ranks: int) -> None:
    costs = costs * ranks
    dealt = deal_costs(costs, ranks)
    assert sorted(item for items in dealt for item in items) == list(range(len(costs)))
    assert {len(items) for items in dealt} == {len(costs) // ranks}
    for items in dealt:
        assert [costs[i] for i in items] == sorted((costs[i] for i in items), reverse=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=300), st.integers(64, 200))
def test_rows_hold_every_item_once_and_no_more_than_they_can(lengths: list[int], capacity: int) -> None:
    items, bounds = pack_lengths(np.array(lengths), capacity)
    assert sorted(items.tolist()) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in items[a:b]) for a, b in itertools.pairwise(bounds)]
    assert all(0 < row <= capacity for row in filled)
    assert len(filled) <= 2 * -(-sum(lengths) // capacity), "any two rows that are half empty would be one"


def test_the_plan_of_version_2_stays() -> None:
    """A plan that comes out otherwise breaks every resume: raise PLAN_VERSION with it."""
    films = Films(np.array([5, 21, 3, 8, 2, 9]), np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 0, 1, 1]))
    options = PlanSettings(seed=7, pack_shots=8, packs_per_step=2, passes=(1.0, 1.5))

    def windows(options: PlanSettings, epoch: int) -> list[list[tuple[int, ...]]]:
        return [[tuple(w) for w in p.windows] for p in all_packs(plan(films, options, epoch))]

    assert windows(options, 3) == [
        [(5, 5, 9)],
        [(3, 0, 8)],
        [(1, 0, 8)],
        [(1, 8, 16)],
        [(5, 0, 5), (4, 0, 2)],
        [(1, 16, 21), (2, 0, 3)],
        [(0, 0, 5), (4, 0, 2)],
    ]
    blocks = PlanSettings(7, 8, 2, block_shards=1, passes=(1.0, 1.5))
    assert windows(blocks, 3) == [
        [(5, 0, 3)],
        [(5, 3, 9), (4, 0, 2)],
        [(1, 17, 21), (1, 0, 1)],
        [(1, 1, 9)],
        [(0, 0, 5)],
        [(1, 9, 17)],
        [(4, 0, 2)],
        [(2, 0, 3)],
        [(3, 0, 8)],
    ]


def test_epochs_and_seeds_differ() -> None:
    def windows(seed: int, epoch: int) -> list[Pack]:
        return all_packs(plan(Films(np.full(50, 100)), PlanSettings(seed, 64, 4, window_shots=30), epoch))

    drawn = [windows(0, 0), windows(0, 1), windows(1, 0)]
    cuts = {frozenset((w.film, w.start) for p in packs for w in p.windows) for packs in drawn}
    assert len(cuts) == 3


def test_cuts_fall_everywhere() -> None:
    """The first window's length is uniform over 1..window_shots, so no shot is always at an edge."""
    options = PlanSettings(seed=0, pack_shots=10, packs_per_step=1, window_shots=10)
    first = [
        w.stop
        for e in range(40)
        for p in all_packs(plan(Films(np.full(50, 25)), options, e))
        for w in p.windows
        if w.start == 0
    ]
    counts = np.bincount(first, minlength=11)[1:]
    assert counts.min() > 0.5 * counts.mean() and counts.max() < 1.5 * counts.mean()


def lognormal(films: int, *, sigma: float = 0.5) -> np.ndarray:
    draw = np.random.default_rng(0).lognormal(np.log(1200) - sigma**2 / 2, sigma, films)
    return np.clip(draw, 150, 9000).astype(int)


@pytest.mark.parametrize(
    ("shots", "pack_shots", "fill"),
    [
        (lognormal(20_000), 4096, 0.99),
        (lognormal(20_000, sigma=0.8), 8192, 0.99),
        (np.random.default_rng(0).integers(2, 30, 50_000), 1024, 0.99),
        (np.full(100_000, 50), 65_536, 0.98),
    ],
)
def test_packs_are_filled(shots: np.ndarray, pack_shots: int, fill: float) -> None:
    epoch_plan = plan(Films(shots), PlanSettings(seed=0, pack_shots=pack_shots, packs_per_step=64), 0)
    assert shots.sum() / (epoch_plan.packs * pack_shots) >= fill


@pytest.mark.parametrize(("sigma", "pack_shots"), [(0.5, 4096), (0.8, 8192)])
def test_attention_is_even_over_ranks(sigma: float, pack_shots: int) -> None:
    films = Films(lognormal(10_000, sigma=sigma))
    packs = all_packs(plan(films, PlanSettings(seed=0, pack_shots=pack_shots, packs_per_step=64), 0))
    for start in range(0, len(packs) - 64, 64):
        costs = [p.cost for p in packs[start : start + 64]]
        loads = [sum(costs[i] for i in items) for items in deal_costs(costs, 8)]
        assert max(loads) / np.mean(loads) - 1 <= 0.05


def test_the_memory_of_a_plan_grows_by_the_film() -> None:
    films = Films(lognormal(100_000))
    tracemalloc.start()
    plan(films, PlanSettings(seed=0, pack_shots=4096, packs_per_step=64), 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6, "a million films would take more than 500 MB"


def test_idle_shots_lie_in_short_segments() -> None:
    def only_pack(shots: int, **options: int) -> Pack:
        (pack,) = all_packs(plan(Films(np.array([shots])), PlanSettings(0, 1000, 1, **options), 0))
        return pack

    assert only_pack(300).lengths == (300, *[IDLE_SHOTS] * 5, 700 - 5 * IDLE_SHOTS)
    assert only_pack(1000).idle == ()
    assert only_pack(5, window_shots=100).idle == (100,) * 9 + (95,), "no longer than positions are numbered"
    assert only_pack(300).cost == 300**2 + 5 * IDLE_SHOTS**2 + (700 - 5 * IDLE_SHOTS) ** 2


def test_shares_hold_in_every_epoch_and_no_film_is_favoured() -> None:
    random = np.random.default_rng(0)
    shots = np.concatenate([random.integers(50, 200, 300), random.integers(10, 40, 40)])
    source = np.repeat([0, 1], [300, 40])
    for block_shards in (None, 3):
        passes = passes_for_shares([0.7, 0.3], [shots[source == s].sum() for s in (0, 1)])
        options = PlanSettings(3, 512, 8, passes=passes, block_shards=block_shards)
        assert passes[0] == 1.0 and passes[1] > 10
        films = Films(shots, np.arange(340) // 20, source)
        total = np.zeros(340, dtype=int)
        for epoch in range(8):
            shown = times_shown(plan(films, options, epoch), films)
            share = (shown * shots)[source == 1].sum() / (shown * shots).sum()
            assert abs(share - 0.3) < 0.001
            total += shown
        assert set(total[source == 0]) == {8}
        assert np.ptp(total[source == 1]) <= 1


def test_a_share_of_a_data_set_goes_round() -> None:
    films = Films(np.full(100, 7), None, np.repeat([0, 1], [10, 90]))
    options = PlanSettings(seed=5, pack_shots=64, packs_per_step=1, passes=(1.0, 0.1))
    shown = [times_shown(plan(films, options, epoch), films) for epoch in range(10)]
    assert [s[10:].sum() for s in shown] == [9] * 10
    assert (sum(shown)[10:] == 1).all(), "each once in ten epochs"


def test_showings_of_a_film_seldom_meet_in_a_pack() -> None:
    random = np.random.default_rng(0)
    films = Films(np.concatenate([random.integers(100, 2000, 400), random.integers(10, 200, 60)]))
    films = Films(films.shots_F, None, np.repeat([0, 1], [400, 60]))
    packs = all_packs(plan(films, PlanSettings(3, 4096, 8, passes=(1.0, 30.0)), 0))
    repeats = sum(len(p.windows) - len({w.film for w in p.windows}) for p in packs)
    assert repeats / sum(len(p.windows) for p in packs) < 0.1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 20))
def test_blocks_keep_a_stretch_of_packs_in_few_shards(block_shards: int, epoch: int) -> None:
    films = Films(np.random.default_rng(0).integers(5, 60, 400), np.arange(400) // 10)
    options = PlanSettings(1, 256, 4, block_shards=block_shards)
    packs = all_packs(plan(films, options, epoch))
    assert films.shard_F is not None
    shards = [{int(films.shard_F[w.film]) for w in p.windows} for p in packs]
    seen: list[frozenset[int]] = []
    union: set[int] = set()
    for of_pack in shards:
        if union and not of_pack & union and len(union | of_pack) > block_shards:
            seen.append(frozenset(union))
            union = set()
        union |= of_pack
    seen.append(frozenset(union))
    assert all(len(block) <= block_shards for block in seen)
    assert sorted(s for block in seen for s in block) == list(range(40)), "each shard is visited in one stretch"


def test_blocks_mix_data_sets_evenly() -> None:
    films = Films(np.full(640, 20), np.arange(640) // 10, np.repeat([0, 1], [480, 160]))
    packs = all_packs(plan(films, PlanSettings(1, 200, 4, block_shards=8), 0))
    assert films.source_F is not None
    for start in range(0, len(packs), 8):
        ours = [films.source_F[w.film] for p in packs[start : start + 8] for w in p.windows]
        assert 0.2 <= np.mean(ours) <= 0.3, "a quarter of every block is of the second"


def test_a_pack_outside_the_epoch_is_refused() -> None:
    epoch_plan = plan(Films(np.array([4, 4])), PlanSettings(seed=0, pack_shots=4, packs_per_step=2), 0)
    assert epoch_plan.packs == 2
    for number in (-1, 2):
        with pytest.raises(IndexError, match="epoch 0 has 2 packs"):
            epoch_plan.pack(number)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"pack_shots": 0}, "pack_shots is 0"),
        ({"packs_per_step": 0}, "packs_per_step is 0"),
        ({"window_shots": 9}, "window_shots is 9, pack_shots 8"),
        ({"window_shots": 0}, "window_shots is 0"),
        ({"block_shards": 0}, "block_shards is 0"),
        ({"passes": (0.0, 1.0)}, "passes are"),
        ({"passes": (0.5, 0.9)}, "passes are"),
        ({"passes": (float("inf"),)}, "passes are"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PlanSettings(**({"seed": 0, "pack_shots": 8, "packs_per_step": 2} | options))


def test_no_films_and_passes_of_other_data_sets_are_refused() -> None:
    for shots in (np.array([], dtype=int), np.array([3, 0])):
        with pytest.raises(UserError, match="at least one shot"):
            plan(Films(shots), PlanSettings(seed=0, pack_shots=8, packs_per_step=6), 0)
    with pytest.raises(UserError, match="passes are given for 2 data sets, there are 1"):
        plan(Films(np.array([3])), PlanSettings(0, 8, 6, passes=(1.0, 1.0)), 0)
