"""An update that is left out leaves weights, moments and Adam's count as they were, in every kind of engine."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.runs import make_shards
from tests.train.cases import Kind
from tests.train.gate_cases import KINDS
from tests.workers import run_ranks

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gate")
    make_shards(folder / "shards")
    (folder / "ranks").mkdir()
    return run_ranks("tests.train.health_gate_worker", folder / "ranks", timeout=300)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_update_that_is_left_out_changes_nothing(ranks: list[dict[str, Any]], kind: Kind) -> None:
    for found in (rank[kind.name] for rank in ranks):
        assert found["first_refused"]
        assert found["made"]
        assert found["refused"]
        assert found["goes_on"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_gradient_of_one_rank_that_is_not_finite_changes_nothing(ranks: list[dict[str, Any]], kind: Kind) -> None:
    for found in (rank[kind.name] for rank in ranks):
        assert not math.isfinite(found["nan_norm"])
        assert found["nan_refused"]
        assert found["finite"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_gate_knows_the_norm_before_the_update(ranks: list[dict[str, Any]], kind: Kind) -> None:
    one, two = (rank[kind.name] for rank in ranks)
    assert one["asked"] == two["asked"], "every rank is asked about the same number"
    assert len(one["asked"]) == 2, "once a step"
    assert one["asked"][0] == pytest.approx(one["norm"])
