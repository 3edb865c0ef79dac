"""The rivals on sequences of known answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmp.objectives.base import Contrast, PackView
from lmp.objectives.rivals import nearest_known, rival_hits


def view(segment: list[int], valid: list[int], masked: list[int]) -> PackView:
    """One rank that holds the whole pack; the modality is called "video"."""
    return PackView(
        place_P=torch.arange(len(segment)),
        segment_P=torch.tensor(segment),
        film_P=torch.tensor(segment),
        shot_P=torch.arange(len(segment)),
        valid={"video": torch.tensor(valid).bool()},
        masked={"video": torch.tensor(masked).bool()},
    )


def hits(features_PKD: Tensor, pack: PackView, tile: int = 4096) -> dict[str, list[bool]]:
    found = rival_hits(features_PKD, "video", pack, rows_P=pack.masked["video"], contrast=Contrast(tile=tile))
    return {name: hit_R.tolist() for name, hit_R in found.items()}


# Directions that are apart; their negatives keep the pack's mean at zero.
A, B = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
NEAR_A, NEAR_B = [0.9, 0.3, 0.0], [0.3, 0.9, 0.0]


def with_opposites(rows: list[list[float]]) -> Tensor:
    """The rows, then their negatives: [2 N, 1, D] with mean zero."""
    half = torch.tensor(rows)
    return torch.cat([half, -half])[:, None]


@pytest.mark.parametrize("tile", [1, 3, 4096])
def test_copy_finds_what_resembles_its_neighbour(tile: int) -> None:
    # A, near A (masked), B | opposites, in another segment and not masked.
    features_PKD = with_opposites([A, NEAR_A, B])
    pack = view([0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 0, 0, 0, 0])
    assert hits(features_PKD, pack, tile)["copy"] == [True]


@pytest.mark.parametrize("tile", [1, 3, 4096])
def test_copy_misses_where_the_neighbour_resembles_another_shot(tile: int) -> None:
    # The masked shot is B and its earlier neighbour A; near A lies elsewhere in the pack.
    features_PKD = with_opposites([A, B, NEAR_A])
    pack = view([0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 0, 0, 0, 0])
    assert hits(features_PKD, pack, tile)["copy"] == [False]


def test_copy_does_not_look_into_another_segment() -> None:
    # The neighbour that would give the answer lies across the border; within its own segment: B, far off.
    features_PKD = with_opposites([A, NEAR_A, [0.0, 0.0, 1.0], B])
    one_segment = view([0] * 4 + [1] * 4, [1] * 8, [0, 1, 0, 0, 0, 0, 0, 0])
    cut = view([0] + [1] * 3 + [2] * 4, [1] * 8, [0, 1, 0, 0, 0, 0, 0, 0])
    assert hits(features_PKD, one_segment)["copy"] == [True]
    assert hits(features_PKD, cut)["copy"] == [False]


def test_mean_finds_what_lies_between_its_segment() -> None:
    between = [1.0, 1.0, 0.0]
    features_PKD = with_opposites([A, between, B])
    pack = view([0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 0, 0, 0, 0])
    assert hits(features_PKD, pack)["mean"] == [True]
    away = with_opposites([A, [0.0, 0.0, 1.0], B])
    assert hits(away, pack)["mean"] == [False]


def test_the_masked_shot_itself_is_no_part_of_the_mean() -> None:
    # Were it, its own large feature would make the mean point at it.
    features_PKD = with_opposites([A, [0.0, 0.0, 9.0], A])
    pack = view([0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 0, 0, 0, 0])
    assert hits(features_PKD, pack)["mean"] == [False]


def test_missing_shots_are_neither_known_nor_candidates() -> None:
    # The missing shot holds exactly the answer's direction and lies next to it.
    features_PKD = with_opposites([B, NEAR_A, A, A])
    with_it = view([0] * 4 + [1] * 4, [1] * 8, [0, 0, 0, 1, 0, 0, 0, 0])
    without = view([0] * 4 + [1] * 4, [1, 1, 0, 1, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0])
    assert hits(features_PKD, with_it)["copy"] == [True]
    # Now near A is copied: A is the best of the rest.
    assert hits(features_PKD, without)["copy"] == [True]
    features_PKD[2], features_PKD[6] = 100.0, -100.0
    assert hits(features_PKD, without)["copy"] == [True]


def test_a_wholly_masked_segment_misses() -> None:
    features_PKD = with_opposites([A, B])
    pack = view([0, 0, 1, 1], [1] * 4, [1, 1, 0, 0])
    assert hits(features_PKD, pack) == {"copy": [False, False], "mean": [False, False]}


def test_nothing_masked_and_nothing_valid_give_no_rows() -> None:
    features_PKD = with_opposites([A, B])
    for valid in ([1] * 4, [0] * 4):
        assert hits(features_PKD, view([0, 0, 1, 1], valid, [0] * 4)) == {"copy": [], "mean": []}


def test_a_large_common_part_does_not_hide_the_answer() -> None:
    # Around the common part the answer has the copied direction; as they stand, the third shot is closer.
    features_PKD = with_opposites([A, [3.0, 0.0, 0.0], [0.6, 0.8, 0.0]]) + torch.tensor([0.0, 0.0, 50.0])
    pack = view([0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 0, 0, 0, 0])
    assert hits(features_PKD, pack)["copy"] == [True]


def test_a_missing_neighbour_is_not_copied() -> None:
    # The shot before is missing, so the one behind, as near, is copied.
    features_PKD = with_opposites([B, [0.0, 0.0, 0.0], A, NEAR_A])
    pack = view([0] * 4 + [1] * 4, [1, 0, 1, 1] * 2, [0, 0, 1, 0, 0, 0, 0, 0])
    assert hits(features_PKD, pack)["copy"] == [True]


def test_tokens_are_answered_one_by_one_and_the_copied_shot_is_left_out_whole() -> None:
    # Token 0 goes A -> near A, token 1 B -> near B; the copied B would otherwise answer for token 1.
    shots = torch.tensor([[A, B], [NEAR_A, NEAR_B]])
    features_PKD = torch.cat([shots, -shots])
    pack = view([0, 0, 1, 1], [1] * 4, [0, 1, 0, 0])
    assert hits(features_PKD, pack)["copy"] == [True, True]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 10_000))
def test_nearest_known_is_what_a_search_finds(lengths: list[int], seed: int) -> None:
    segment = [number for number, length in enumerate(lengths) for _ in range(length)]
    known = (torch.rand(len(segment), generator=torch.Generator().manual_seed(seed)) < 0.4).tolist()
    want = []
    for place in range(len(segment)):
        options = [q for q in range(len(segment)) if known[q] and segment[q] == segment[place]]
        want.append(min(options, key=lambda q: (abs(q - place), q)) if options else -1)
    assert nearest_known(torch.tensor(known), torch.tensor(segment)).tolist() == want


def test_nearest_known_of_nothing() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    assert nearest_known(empty.bool(), empty).shape == (0,)
