"""Training state moves by checkpoint between ZeRO stages, precisions and numbers of ranks and stays what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import make_shards
from tests.train.cases import FOUR, ON_TWO, ONE, PAIRS, PRIVATE, TWO, Action, Kind
from tests.workers import run_ranks

pytestmark = pytest.mark.multiprocess

RESHAPED = [*ONE, *TWO]


class Moves:
    """Runs actions on ranks and keeps what they find, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_shards(folder / "shards")

    def run(self, name: str, actions: list[Action], *, processes: int) -> dict[str, Any]:
        folder = self.folder / name
        folder.mkdir()
        (folder / "actions.json").write_text(json.dumps(actions))
        return run_ranks("tests.train.zero_state_worker", folder, processes=processes, timeout=400)[0]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    moves = Moves(tmp_path_factory.mktemp("zero-state"))
    found = moves.run("four-sp2", FOUR, processes=4)
    found |= moves.run("one", ONE, processes=1)
    return found | moves.run("two", [*TWO, *ON_TWO], processes=2)


@pytest.mark.parametrize("kind", PRIVATE, ids=lambda kind: kind.name)
def test_the_private_names_of_deepspeed_are_there(moved, kind: Kind) -> None:
    missing = moved[Action(kind).name]["missing"]
    assert not missing, f"this deepspeed lacks {missing}: adapt lmp/train/zero_state.py ({kind.name})"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}-to-{pair[1].name}")
def test_state_moves_unchanged_and_training_goes_on(moved, pair: tuple[Kind, Kind]) -> None:
    source, target = pair
    before, after = moved[Action(source).name], moved[Action(target, Action(source).name).name]
    same_state(before, after, rounded=target.frozen and (source.precision, target.precision) == ("fp32", "bf16"))
    if source.precision == target.precision and "after" in after:
        same_step(before, after, source.precision)


@pytest.mark.parametrize("action", RESHAPED, ids=lambda action: action.name)
def test_state_moves_from_four_ranks_to_one_to_two(moved, action: Action) -> None:
    before, after = moved[action.start], moved[action.name]
    same_state(before, after)
    if action.start and action.kind.precision in action.start.rsplit("-to-", 1)[-1]:
        same_step(before, after, action.kind.precision)


def same_state(before: dict[str, Any], moved: dict[str, Any], *, rounded: bool = False) -> None:
    assert before["state"].keys() == moved["state"].keys()
    for name, state in before["state"].items():
        for part, old, new in zip(("weight", "exp_avg", "exp_avg_sq"), state, moved["state"][name], strict=True):
            frozen = part == "weight" and old.shape == new.shape and rounded and "contextual.audio" in name
            expected = old.bfloat16().float() if frozen else old
            torch.testing.assert_close(new, expected, rtol=0, atol=0, equal_nan=True, msg=f"{part} of {name}")
    assert any(state[1].nan_to_num().any() for state in before["state"].values()), "the moments were never set"


def same_step(before: dict[str, Any], moved: dict[str, Any], precision: str) -> None:
    """The third step tells whether Adam's step count and the weights that the model computes with came along."""
    # The learning rate is 1e-3; Adam magnifies the rounding of small bf16 gradients.
    near = 1e-5 if precision == "fp32" else 1e-4
    for name, state in before["after"].items():
        torch.testing.assert_close(moved["after"][name][0], state[0], rtol=1e-4, atol=near)
