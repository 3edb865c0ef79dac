"""What is done about a step, decided from two numbers and what is remembered."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lmp.config import HealthConfig
from lmp.train.policy import Action, Memory, Policy


def policy(**settings: Any) -> Policy:
    """One that has seen 16 usual steps."""
    spike = {"window": 16, **settings.pop("spike", {})}
    made = Policy(HealthConfig(spike=spike, **settings))
    for step in range(16):
        take(made, 2.0 + 0.01 * (step % 5), 1.0 + 0.1 * (step % 3))
    return made


def take(made: Policy, loss: float, norm: float) -> Action:
    verdict = made.judge(loss, norm)
    assert made.gate(loss)(norm) == (verdict.action is Action.GO)
    made.take(verdict, loss, norm)
    return verdict.action


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_not_finite_is_left_out_and_not_remembered(loss: float, norm: float) -> None:
    made = policy()
    before = made.memory
    assert take(made, loss, norm) is Action.SKIP
    assert (made.memory.skips, made.memory.in_a_row) == (1, 1)
    assert made.memory.losses == before.losses
    assert take(made, 2.0, 1.0) is Action.GO
    assert (made.memory.skips, made.memory.in_a_row) == (1, 0)


def test_a_spike_of_either_is_left_out_and_a_usual_step_is_not() -> None:
    made = policy()
    assert take(made, 2.2, 1.4) is Action.GO
    assert take(made, 9.0, 1.0) is Action.SKIP
    assert take(made, 2.0, 90.0) is Action.SKIP
    assert take(made, 0.1, 0.001) is Action.GO, "a low value is no spike"
    assert made.memory.spikes == 2


def test_nothing_is_judged_before_enough_is_known() -> None:
    made = Policy(HealthConfig(spike={"window": 16}))
    assert [take(made, 2.0, 1.0) for _ in range(7)] == [Action.GO] * 7
    assert take(made, 1e6, 1e6) is Action.GO
    assert take(made, 1e6, 1e6) is Action.SKIP


def test_a_steady_value_needs_more_than_its_tiny_spread_to_spike() -> None:
    made = Policy(HealthConfig(spike={"window": 8, "factor": 1.5}))
    assert [take(made, 2.0, 1.0) for _ in range(8)] == [Action.GO] * 8
    assert take(made, 2.9, 1.4) is Action.GO
    assert take(made, 3.1, 1.0) is Action.SKIP


def test_spikes_are_only_counted_where_that_is_asked() -> None:
    made = policy(spike={"action": "none"})
    assert take(made, 9.0, 1.0) is Action.GO
    assert (made.memory.spikes, made.memory.skips) == (1, 0)


def test_skips_end_in_rolling_back_and_that_in_a_stop() -> None:
    made = policy(max_skips_in_a_row=2, max_rollbacks=1)
    known = made.memory
    assert [take(made, math.nan, 1.0) for _ in range(3)] == [Action.SKIP, Action.SKIP, Action.ROLL_BACK]
    made.rolled_back(known)
    assert (made.memory.skips, made.memory.in_a_row, made.memory.rollbacks) == (2, 0, 1)
    assert [take(made, math.nan, 1.0) for _ in range(3)] == [Action.SKIP, Action.SKIP, Action.STOP]
    assert "2 updates in a row" in made.judge(math.nan, 1.0).reason
    assert "rolled back 1 times" in made.judge(math.nan, 1.0).reason


def test_the_whole_run_may_lose_only_so_many_updates() -> None:
    made = policy(max_skips=2)
    found = [take(made, loss, 1.0) for loss in (math.nan, 2.0, math.nan, 2.0, math.nan)]
    assert found == [Action.SKIP, Action.GO, Action.SKIP, Action.GO, Action.ROLL_BACK]


def test_what_is_remembered_survives_a_file() -> None:
    made = policy()
    take(made, 1 / 3, math.nan)
    again = Memory.from_json(json.loads(json.dumps(made.memory.to_json())))
    assert again == made.memory
