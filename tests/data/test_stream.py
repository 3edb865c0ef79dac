from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmp.data.stream
from lmp.data.plan import EpochPlan, Films, Pack, PlanSettings, plan
from lmp.data.stream import Cursor, Stream, deal
from lmp.errors import UserError

SETTINGS = PlanSettings(seed=4, pack_shots=16, packs_per_step=4, window_shots=11)
SHOTS = np.random.default_rng(0).integers(1, 40, 50)


def walk(stream: Stream, cursor: Cursor | None = None) -> Iterator[Cursor]:
    cursor = cursor or stream.first()
    while True:
        yield cursor
        cursor = stream.next(cursor)


def names(packs: tuple[Pack, ...]) -> list[tuple[int, int]]:
    return [(p.epoch, p.number) for p in packs]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 50), st.integers(0, 9))
def test_steps_are_full_and_take_the_packs_of_all_epochs_in_their_order(films: int, per_step: int, seed: int) -> None:
    stream = Stream(Films(SHOTS[:films]), PlanSettings(seed, 16, per_step, window_shots=11))
    got: list[tuple[int, int]] = []
    for cursor in itertools.islice(walk(stream), 12):
        packs = stream.packs(cursor)
        assert len(packs) == per_step
        assert packs[-1].epoch == cursor.epoch, "a step is counted in the epoch that it ends in"
        got += names(packs)
    epochs = (plan(stream.films, stream.settings, e) for e in itertools.count())
    wanted = ((e.epoch, n) for e in epochs for n in range(e.packs))
    assert got == list(itertools.islice(wanted, len(got)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_topology_stopped_anywhere_goes_on_with_the_same_steps(data: st.DataObject) -> None:
    """Step -> set of (film, shot) does not depend on ranks, their number, or where the run was stopped."""
    before, after = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16))
    per_step = math.lcm(before, after) * data.draw(st.integers(1, 2))
    films = Films(
        np.array(data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=40))),
        np.array(data.draw(st.lists(st.integers(0, 4), min_size=40, max_size=40))),
    )
    films = Films(films.shots_F, films.shard_F[: len(films.shots_F)] if films.shard_F is not None else None)
    options = PlanSettings(
        seed=data.draw(st.integers(0, 99)),
        pack_shots=data.draw(st.sampled_from([8, 32])),
        packs_per_step=per_step,
        window_shots=data.draw(st.sampled_from([None, 5])),
        block_shards=data.draw(st.sampled_from([None, 1, 2])),
    )

    def run(cursor: Cursor | None, steps: int, ranks: int) -> tuple[list[Any], Cursor]:
        """What all ranks together show at each step; each rank has a stream of its own, as processes do."""
        streams = [Stream(films, options) for _ in range(min(ranks, 2))]
        shown = []
        place = cursor or streams[0].first()
        for _ in range(steps):
            of_step: list[tuple[int, int, int, int]] = []
            for rank in range(ranks):
                packs = streams[rank % 2 if ranks > 1 else 0].packs(place)
                mine = deal(packs, ranks)[rank]
                of_step += [(packs[slot].epoch, *w) for slot in mine for w in packs[slot].windows]
            shown.append(sorted(of_step))
            place = streams[0].next(place)
        return shown, place

    stop, total = data.draw(st.integers(0, 5)), 6
    first, place = run(None, stop, before)
    rest, _ = run(place, total - stop, after)
    undisturbed, _ = run(None, total, 1)
    assert first + rest == undisturbed


def test_no_shot_is_lost_or_doubled_over_epochs() -> None:
    stream = Stream(Films(SHOTS), SETTINGS)
    seen: Counter[tuple[int, int, int]] = Counter()
    last = 0
    for cursor in itertools.islice(walk(stream), 200):
        for pack in stream.packs(cursor):
            seen.update((pack.epoch, w.film, s) for w in pack.windows for s in range(w.start, w.stop))
            last = pack.epoch
    assert last > 3
    for epoch in range(last):
        shown = {key: n for key, n in seen.items() if key[0] == epoch}
        assert set(shown.values()) == {1} and len(shown) == SHOTS.sum()


def test_locating_a_step_is_walking_to_it() -> None:
    stream = Stream(Films(SHOTS), SETTINGS)
    places = list(itertools.islice(walk(stream), 90))
    assert places[-1].epoch >= 3
    for step in (0, 1, 17, 18, 40, 89):
        assert stream.locate(step) == places[step]
    assert stream.locate(30, start=places[20]) == places[50]


class Counted:
    """Counts the plans that are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.epochs: list[int] = []
        monkeypatch.setattr(lmp.data.stream, "plan", self)

    def __call__(self, films: Films, options: PlanSettings, epoch: int) -> EpochPlan:
        self.epochs.append(epoch)
        return plan(films, options, epoch)


def test_going_on_costs_the_same_at_step_10_and_at_step_a_million(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    work = []
    for epoch in (0, 9, 90_909):  # steps 10, about 100 and about a million of 11 steps an epoch
        counted.epochs.clear()
        stream = Stream(Films(SHOTS), SETTINGS)
        cursor = Cursor(epoch, 9, 2 if epoch else 0)
        for _ in range(3):
            stream.packs(cursor)
            cursor = stream.next(cursor)
        work.append(len(counted.epochs))
    assert work[0] == work[1] == work[2] <= 2


def test_a_step_with_carried_packs_needs_the_plan_before_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    packs = Stream(Films(SHOTS), SETTINGS).packs(Cursor(70, 0, 3))
    assert [p.epoch for p in packs] == [69, 69, 69, 70]
    assert sorted(counted.epochs) == [69, 70]


def test_threads_that_ask_for_a_plan_at_once_wait_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    stream = Stream(Films(SHOTS), SETTINGS)
    found: list[EpochPlan] = []
    threads = [threading.Thread(target=lambda: found.append(stream.epoch(5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.epochs == [5] and all(p is found[0] for p in found) and len(found) == 8


def test_fingerprints_tell_steps_apart() -> None:
    stream = Stream(Films(SHOTS), SETTINGS)
    prints = [stream.fingerprint(c) for c in itertools.islice(walk(stream), 40)]
    assert len(set(prints)) == 40
    assert prints == [Stream(Films(SHOTS), SETTINGS).fingerprint(c) for c in itertools.islice(walk(stream), 40)]


def test_shots_leave_idle_ones_out() -> None:
    stream = Stream(Films(np.array([5, 7])), PlanSettings(0, 16, 1))
    assert stream.shots(stream.first()) == 12


@pytest.mark.parametrize("cursor", [Cursor(0, 500), Cursor(1, -1), Cursor(-1, 0), Cursor(0, 0, 4), Cursor(0, 0, -1)])
def test_places_that_the_stream_does_not_have_are_refused(cursor: Cursor) -> None:
    with pytest.raises(UserError, match="no step"):
        Stream(Films(SHOTS), SETTINGS).packs(cursor)


def test_packs_carried_into_the_first_epoch_are_refused() -> None:
    with pytest.raises(UserError, match="epoch 0 cannot begin with 2 carried packs"):
        Stream(Films(SHOTS), SETTINGS).packs(Cursor(0, 0, 2))


def test_uneven_ranks_are_refused() -> None:
    packs = Stream(Films(SHOTS), SETTINGS).packs(Cursor())
    with pytest.raises(UserError, match="4 packs per step do not divide among 3"):
        deal(packs, 3)
