"""Training state leaves an engine of one ZeRO stage and enters one of another unchanged, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.runs import make_shards
from tests.train.cases import MOVES
from tests.workers import run_ranks

pytestmark = pytest.mark.multiprocess
PAIRS = [(source, target) for source, targets in MOVES.items() for target in targets]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("zero-state")
    make_shards(folder / "shards")
    return run_ranks("tests.train.zero_state_worker", folder)


@pytest.mark.parametrize("kind", MOVES, ids=lambda kind: kind.name)
def test_the_private_names_of_deepspeed_are_there(ranks, kind) -> None:
    missing = ranks[0]["missing"][kind.name]
    assert not missing, f"this deepspeed lacks {missing}: adapt lmp/train/zero_state.py ({kind.name})"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}-to-{pair[1].name}")
def test_state_moves_unchanged_and_training_goes_on(ranks, pair) -> None:
    source, target = pair
    for found in ranks:
        move = found["moves"][source.name, target.name]
        assert move["before"].keys() == move["moved"].keys()
        for name, state in move["before"].items():
            for part, old, new in zip(("weight", "exp_avg", "exp_avg_sq"), state, move["moved"][name], strict=True):
                assert torch.equal(old, new), f"{part} of {name}"
        assert any(state[1].any() for state in move["before"].values()), "the moments were never set"
        if source.precision == target.precision:
            # The learning rate is 1e-3; Adam magnifies the rounding of small bf16 gradients.
            near = 1e-5 if source.precision == "fp32" else 1e-4
            for name, state in move["after"].items():
                # The third step tells whether Adam's step count came along too.
                torch.testing.assert_close(move["stepped"][name][0], state[0], rtol=1e-4, atol=near)


def test_ranks_agree(ranks) -> None:
    first, second = (found["moves"] for found in ranks)
    for pair, move in first.items():
        for name, state in move["moved"].items():
            assert all(map(torch.equal, state, second[pair]["moved"][name])), (pair, name)
