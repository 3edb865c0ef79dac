"""Retrieval metrics from scores: ranks under an explicit tie rule, their summary, and what chance gives.

A rank counts from 0 and is the number of strictly better candidates. Ties are settled by name: `optimistic`
adds nothing, `mean` adds half of the other candidates with the same score. Under `mean` a rank of 0.5 is no
hit at 1, while a hit at K > 1 is any rank below K: the rule of the Condensed Movies metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Ties = Literal["mean", "optimistic"]
RECALL_AT = (1, 5, 10, 50)
TILE_ELEMENTS = 2**22


@dataclass(frozen=True)
class RetrievalMetrics:
    """Summary of one retrieval. Recalls and MRR are shares in 0..1; median and mean rank count from 1.

    Attributes:
        recall: K -> share of queries whose true item is among the first K.
        median_rank: median rank.
        mean_rank: mean rank.
        mrr: mean of 1 / rank.
        queries: number of queries.
        gallery: number of candidates.
    """

    recall: dict[int, float]
    median_rank: float
    mean_rank: float
    mrr: float
    queries: int
    gallery: int

    @property
    def geometric_mean(self) -> float:
        """Geometric mean of the recalls at 1, 5 and 10."""
        return float((self.recall[1] * self.recall[5] * self.recall[10]) ** (1 / 3))

    def as_dict(self) -> dict[str, float]:
        """Flat names: R@1, R@5, R@10, R@50, median_rank, mean_rank, mrr."""
        flat = {f"R@{k}": value for k, value in self.recall.items()}
        return flat | {"median_rank": self.median_rank, "mean_rank": self.mean_rank, "mrr": self.mrr}


def rank_scores(
    scores_QG: Tensor,
    true_Q: Tensor | None = None,
    *,
    ties: Ties,
    tolerance: float = 0.0,
    excluded_Q: Tensor | None = None,
) -> Tensor:
    """Ranks from 0 of the true candidates.

    Args:
        scores_QG: higher is better.
        true_Q: column of the true candidate of each row; the diagonal by default.
        ties: how equal scores are settled.
        tolerance: scores that differ by no more than this are equal.
        excluded_Q: one column per row that is no candidate, -1 for none.

    Returns:
        float64 [Q].

    Raises:
        ValueError: a score is not finite (NaN is never better, which would look like a perfect rank).
    """
    rows_Q = torch.arange(scores_QG.shape[0], device=scores_QG.device)
    if true_Q is None:
        true_Q = rows_Q
    if not torch.isfinite(scores_QG).all():
        raise ValueError("retrieval scores must be finite")
    own_Q1 = scores_QG[rows_Q, true_Q][:, None]
    better_QG = scores_QG > own_Q1 + tolerance
    equal_QG = (scores_QG - own_Q1).abs() <= tolerance
    if excluded_Q is not None:
        with_one_Q = excluded_Q >= 0
        better_QG[rows_Q[with_one_Q], excluded_Q[with_one_Q]] = False
        equal_QG[rows_Q[with_one_Q], excluded_Q[with_one_Q]] = False
    rank_Q = better_QG.sum(1).double()
    if ties == "mean":
        rank_Q += (equal_QG.sum(1).double() - 1) / 2
    return rank_Q


def cosine_ranks(
    queries_QE: Tensor,
    gallery_GE: Tensor,
    true_Q: Tensor | None = None,
    *,
    ties: Ties = "mean",
    excluded_Q: Tensor | None = None,
    tolerance: float = 1e-6,
    tile_elements: int = TILE_ELEMENTS,
) -> Tensor:
    """Ranks from 0 by cosine, in tiles of queries: memory is linear in the gallery, never Q x G.

    A zero vector has cosine 0 with everything, so that a rival without a guess ties with all.

    Args:
        queries_QE: queries, of any length.
        gallery_GE: candidates, of any length.
        true_Q: row of the gallery that is right for each query; query i is right with row i by default.
        ties: how equal scores are settled.
        excluded_Q: one row of the gallery per query that is no candidate, -1 for none.
        tolerance: cosines that differ by no more than this are equal; float32 products round by place.
        tile_elements: scores held at once.

    Returns:
        float64 [Q] on the CPU.
    """
    gallery_GE = torch.nn.functional.normalize(gallery_GE.float(), dim=1)
    if true_Q is None:
        true_Q = torch.arange(queries_QE.shape[0], device=queries_QE.device)
    step = max(1, tile_elements // max(1, gallery_GE.shape[0]))
    ranks = []
    for start in range(0, queries_QE.shape[0], step):
        tile = slice(start, start + step)
        scores_QG = torch.nn.functional.normalize(queries_QE[tile].float(), dim=1) @ gallery_GE.T
        excluded = None if excluded_Q is None else excluded_Q[tile]
        ranks.append(rank_scores(scores_QG, true_Q[tile], ties=ties, tolerance=tolerance, excluded_Q=excluded).cpu())
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.float64)


def summarise(rank_Q: Tensor, gallery: int, *, recall_at: Sequence[int] = RECALL_AT) -> RetrievalMetrics:
    """Metrics of ranks that count from 0.

    Raises:
        ValueError: there is no query.
    """
    if not len(rank_Q):
        raise ValueError("no query to summarise")
    rank_Q = rank_Q.double()
    recall = {k: float(((rank_Q == 0) if k == 1 else (rank_Q < k)).double().mean()) for k in recall_at}
    return RetrievalMetrics(
        recall=recall,
        median_rank=float(rank_Q.quantile(0.5)) + 1,
        mean_rank=float(rank_Q.mean()) + 1,
        mrr=float((1 / (rank_Q + 1)).mean()),
        queries=len(rank_Q),
        gallery=gallery,
    )


def chance(candidates_Q: Tensor, gallery: int, *, recall_at: Sequence[int] = RECALL_AT) -> RetrievalMetrics:
    """What a blind draw gives in expectation, where query i draws an order of `candidates_Q[i]` candidates.

    With all candidates equal to the gallery this is chance. With fewer it is a rival that knows a part of the
    answer, such as the place in the film, and draws among what fits.
    """
    count_Q = candidates_Q.double()
    harmonic = torch.cat([torch.zeros(1), (1 / torch.arange(1, int(count_Q.max()) + 1).double()).cumsum(0)])
    middle_Q = (count_Q + 1) / 2
    return RetrievalMetrics(
        recall={k: float((k / count_Q).clamp(max=1).mean()) for k in recall_at},
        median_rank=float(middle_Q.quantile(0.5)),
        mean_rank=float(middle_Q.mean()),
        mrr=float((harmonic[candidates_Q.long()] / count_Q).mean()),
        queries=len(count_Q),
        gallery=gallery,
    )
