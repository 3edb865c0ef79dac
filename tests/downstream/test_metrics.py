"""Ranks and their summary: against published values, brute force and hand-made cases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lmp.downstream.metrics import chance, cosine_ranks, rank_scores, summarise


def test_goldens_of_condensed_movies(real_data: Path) -> None:
    golden = json.loads((real_data / "goldens" / "retrieval_metrics.json").read_text())
    a = np.random.default_rng(0).standard_normal((200, 200))
    b = a + 3 * np.eye(200)
    matrices = {"A": a, "B": b, "C": np.round(b)}
    assert matrices["C"].sum() == golden["checks"]["C"]["sum"]
    for row in golden["rows"]:
        scores = torch.from_numpy(matrices[row["matrix"]])
        found = summarise(rank_scores(scores if row["side"] == "t2v" else scores.T, ties=row["ties"]), 200)
        figures = {f"R{k}": 100 * value for k, value in found.recall.items()}
        figures |= {"MedR": found.median_rank, "MeanR": found.mean_rank, "gmean": 100 * found.geometric_mean}
        for name, value in figures.items():
            assert value == pytest.approx(row[name], abs=golden["tolerance"]), (
                row["source"],
                row["side"],
                name,
            )


def brute_force(scores: np.ndarray, true: list[int], ties: str, excluded: list[int]) -> list[float]:
    ranks = []
    for row, right, out in zip(scores, true, excluded, strict=True):
        others = [s for g, s in enumerate(row) if g not in (right, out)]
        better = sum(s > row[right] for s in others)
        ranks.append(better + (sum(s == row[right] for s in others) / 2 if ties == "mean" else 0))
    return ranks


@pytest.mark.parametrize("ties", ["mean", "optimistic"])
def test_tiled_ranks_are_brute_force_ranks(ties: str) -> None:
    random = np.random.default_rng(3)
    # Few distinct directions: many exact ties, and unit lengths that make cosines exact.
    axes = np.concatenate([np.eye(6), -np.eye(6)])
    queries, gallery = axes[random.integers(0, 12, 57)], axes[random.integers(0, 12, 41)]
    true = random.integers(0, 41, 57)
    excluded = np.where(random.random(57) < 0.5, (true + 1 + random.integers(0, 40, 57)) % 41, -1)
    want = brute_force(queries @ gallery.T, true.tolist(), ties, excluded.tolist())
    for tile_elements in (1, 41 * 10, 10**6):
        got = cosine_ranks(
            torch.from_numpy(3.0 * queries),
            torch.from_numpy(gallery),
            torch.from_numpy(true),
            ties=ties,  # type: ignore[arg-type]
            excluded_Q=torch.from_numpy(excluded),
            tile_elements=tile_elements,
        )
        assert got.tolist() == want


def test_a_query_without_a_guess_ties_with_all() -> None:
    rank_Q = cosine_ranks(torch.zeros(3, 4), torch.randn(11, 4), torch.tensor([0, 5, 10]))
    assert rank_Q.tolist() == [5.0, 5.0, 5.0]


def test_scores_that_are_not_finite_are_no_perfect_rank() -> None:
    with pytest.raises(ValueError, match="finite"):
        cosine_ranks(torch.full((2, 4), float("nan")), torch.randn(5, 4))


def test_half_a_rank_is_no_hit_at_one_but_a_hit_at_five() -> None:
    found = summarise(torch.tensor([0.5, 0.0, 4.5, 5.0]), 20)
    assert found.recall[1] == 0.25
    assert found.recall[5] == 0.75
    assert found.mrr == pytest.approx((1 / 1.5 + 1 + 1 / 5.5 + 1 / 6) / 4)
    assert (found.median_rank, found.mean_rank) == (3.5, 3.5)


def test_chance_is_the_mean_over_all_orders() -> None:
    for candidates in (2, 7, 60):
        every_place = summarise(torch.arange(candidates), candidates)
        expected = chance(torch.tensor([candidates]), candidates)
        assert expected.as_dict() == pytest.approx(every_place.as_dict())


def test_chance_with_fewer_candidates_is_better() -> None:
    knowing, blind = chance(torch.tensor([2, 4]), 100), chance(torch.tensor([100, 100]), 100)
    assert knowing.recall[1] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert knowing.mrr > blind.mrr
