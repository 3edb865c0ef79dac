from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmp.data.pack import pack_lengths
from lmp.data.plan import EpochPlan, Pack, PlanSettings, Window, deal, plan
from lmp.errors import UserError


@st.composite
def corpora(draw: st.DrawFn) -> tuple[np.ndarray, PlanSettings, int]:
    pack_shots = draw(st.integers(1, 40))
    return (
        np.array(draw(st.lists(st.integers(1, 150), min_size=1, max_size=60))),
        PlanSettings(
            seed=draw(st.integers(0, 2**64 - 1)),
            pack_shots=pack_shots,
            packs_per_step=draw(st.sampled_from([1, 2, 3, 8, 64])),
            window_shots=draw(st.none() | st.integers(1, pack_shots)),
        ),
        draw(st.integers(0, 1000)),
    )


def all_packs(epoch_plan: EpochPlan) -> list[Pack]:
    return [p for step in range(epoch_plan.steps) for p in epoch_plan.packs(step)]


@settings(max_examples=150, deadline=None)
@given(corpora())
def test_every_shot_is_in_exactly_one_window_and_packs_are_full_rows(
    corpus: tuple[np.ndarray, PlanSettings, int],
) -> None:
    shots, options, epoch = corpus
    epoch_plan = plan(shots, options, epoch)
    packs = all_packs(epoch_plan)
    assert len(packs) == epoch_plan.steps * options.packs_per_step
    assert all(sum(p.lengths) == options.pack_shots and min(p.lengths) >= 1 for p in packs)
    seen = Counter((w.film, shot) for p in packs for w in p.windows for shot in range(w.start, w.stop))
    assert seen == Counter((film, shot) for film, n in enumerate(shots.tolist()) for shot in range(n))
    longest = options.window_shots or options.pack_shots
    for film, start, stop in (w for p in packs for w in p.windows):
        assert stop - start <= longest
        if shots[film] <= longest:
            assert (start, stop) == (0, shots[film]), "a film that fits is whole"
    empty = [n for n, p in enumerate(packs) if not p.windows]
    assert empty == list(range(epoch_plan.filled, len(packs))) and len(empty) < options.packs_per_step


@settings(max_examples=50, deadline=None)
@given(corpora(), st.integers(0, 5))
def test_a_plan_is_a_pure_function(corpus: tuple[np.ndarray, PlanSettings, int], others: int) -> None:
    shots, options, epoch = corpus
    first = all_packs(plan(shots, options, epoch))
    np.random.default_rng(others).random(others)
    plan(shots, options, epoch + 1)
    assert all_packs(plan(shots.astype(np.int32), options, epoch)) == first


@settings(max_examples=100, deadline=None)
@given(corpora(), st.sampled_from([1, 2, 4, 8]))
def test_deal_gives_every_slot_once_and_equally_many(corpus: tuple[np.ndarray, PlanSettings, int], ranks: int) -> None:
    shots, options, epoch = corpus
    packs = plan(shots, options, epoch).packs(0) * ranks
    dealt = deal(packs, ranks)
    assert sorted(slot for slots in dealt for slot in slots) == list(range(len(packs)))
    assert {len(slots) for slots in dealt} == {len(packs) // ranks}


def test_the_plan_of_version_1_stays() -> None:
    """A plan that comes out otherwise breaks every resume: raise PLAN_VERSION with it."""
    epoch_plan = plan(np.array([5, 21, 3, 8]), PlanSettings(seed=7, pack_shots=8, packs_per_step=2), 3)
    assert [[tuple(w) for w in p.windows] for p in all_packs(epoch_plan)] == [
        [(1, 8, 16)],
        [(3, 0, 8)],
        [(0, 0, 5), (2, 0, 3)],
        [(1, 16, 21)],
        [(1, 0, 8)],
        [],
    ]


def test_epochs_and_seeds_differ() -> None:
    shots = np.full(50, 100)

    def windows(seed: int, epoch: int) -> list[Pack]:
        return all_packs(plan(shots, PlanSettings(seed, 64, 4, window_shots=30), epoch))

    drawn = [windows(0, 0), windows(0, 1), windows(1, 0)]
    cuts = {frozenset((w.film, w.start) for p in packs for w in p.windows) for packs in drawn}
    assert len(cuts) == 3


def test_cuts_fall_everywhere() -> None:
    """The first window's length is uniform over 1..window_shots, so no shot is always at an edge."""
    options = PlanSettings(seed=0, pack_shots=10, packs_per_step=1, window_shots=10)
    first = [
        w.stop
        for e in range(40)
        for p in all_packs(plan(np.full(50, 25), options, e))
        for w in p.windows
        if w.start == 0
    ]
    counts = np.bincount(first, minlength=11)[1:]
    assert counts.min() > 0.5 * counts.mean() and counts.max() < 1.5 * counts.mean()


def test_packs_are_filled() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(1200) - 0.125, 0.5, 20_000), 150, 9000)
    shots = lengths.astype(int)
    filled = plan(shots, PlanSettings(seed=0, pack_shots=4096, packs_per_step=64), 0).filled
    assert shots.sum() / (filled * 4096) >= 0.99


def test_short_windows_in_very_long_packs_are_filled_too() -> None:
    items, bounds = pack_lengths(np.full(100_000, 50), 65_536)
    assert 100_000 * 50 / ((len(bounds) - 1) * 65_536) > 0.98
    assert np.array_equal(np.sort(items), np.arange(100_000))


def test_attention_is_even_over_ranks() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(1200) - 0.125, 0.5, 10_000), 150, 4096)
    epoch_plan = plan(lengths.astype(int), PlanSettings(seed=0, pack_shots=4096, packs_per_step=64), 0)
    excess = []
    for step in range(epoch_plan.steps - 1):
        packs = epoch_plan.packs(step)
        loads = [sum(packs[slot].cost for slot in slots) for slots in deal(packs, 8)]
        excess.append(max(loads) / np.mean(loads) - 1)
    assert np.mean(excess) <= 0.05


def test_idle_shots_cost_attention_too() -> None:
    full, half, idle = Pack((Window(0, 0, 8),), 0), Pack((Window(0, 0, 4),), 4), Pack((), 8)
    assert [p.cost for p in (full, half, idle)] == [64, 32, 64]
    assert half.lengths == (4, 4) and idle.lengths == (8,) and full.lengths == (8,)
    assert [sorted(slots) for slots in deal([full, half, idle, half], 2)] == [[0, 1], [2, 3]]


def test_a_step_outside_the_epoch_is_refused() -> None:
    epoch_plan = plan(np.array([4, 4]), PlanSettings(seed=0, pack_shots=4, packs_per_step=2), 0)
    assert epoch_plan.steps == 1
    for step in (-1, 1):
        with pytest.raises(IndexError, match="epoch 0 has 1 steps"):
            epoch_plan.packs(step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"pack_shots": 0}, "pack_shots is 0"),
        ({"packs_per_step": 0}, "packs_per_step is 0"),
        ({"window_shots": 9}, "window_shots is 9, pack_shots 8"),
        ({"window_shots": 0}, "window_shots is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PlanSettings(**({"seed": 0, "pack_shots": 8, "packs_per_step": 2} | options))


def test_no_films_and_uneven_ranks_are_refused() -> None:
    options = PlanSettings(seed=0, pack_shots=8, packs_per_step=6)
    for shots in (np.array([], dtype=int), np.array([3, 0])):
        with pytest.raises(UserError, match="at least one shot"):
            plan(shots, options, 0)
    with pytest.raises(UserError, match="6 packs per step do not divide among 4"):
        deal(plan(np.array([3]), options, 0).packs(0), 4)
