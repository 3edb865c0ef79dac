"""Exact InfoNCE whose memory is linear in rows and candidates.

Logits exist one tile at a time, forward and again backward. Between the two only the log-sum-exp of each row
is kept. Value and gradients are those of the full matrix, which is never built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is float64: losses never work in less."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def info_nce(
    query_RE: Tensor, candidate_GE: Tensor, positive_R: Tensor, scale: Tensor, *, tile: int = 4096
) -> tuple[Tensor, Tensor]:
    """-log softmax(scale * query @ candidate.T) at each row's positive, without the matrix.

    A mask over candidates is a shorter list of candidates: select them before the call.

    Args:
        query_RE: one query a row; any float dtype, worked on in float32 at least. R may be 0.
        candidate_GE: what each row chooses from, its positive included. G may be 0 where R is.
        positive_R: int64, the place of each row's positive in candidate_GE.
        scale: one element, 1 / temperature.
        tile: rows and candidates in memory at once; changes rounding only.

    Returns:
        loss_R, differentiable in query, candidate and scale; and hit_R, bool, True where the positive scores
        strictly above every other candidate (so that a collapsed model, all ties, hits nothing).
    """
    query_RE, candidate_GE, scale = at_least_fp32(query_RE), at_least_fp32(candidate_GE), at_least_fp32(scale)
    loss_R, hit_R = _InfoNCE.apply(query_RE, candidate_GE, positive_R, scale, tile)
    return loss_R, hit_R


@torch.no_grad()
def top1_hits(
    query_RE: Tensor,
    candidate_GE: Tensor,
    positive_R: Tensor,
    *,
    skip_R: Tensor | None = None,
    skip_width: int = 1,
    tile: int = 4096,
) -> Tensor:
    """Whether each row's positive scores strictly highest by dot product; linear memory.

    Args:
        query_RE: one query a row, float32 or float64.
        candidate_GE: candidates, same dtype.
        positive_R: int64, the place of each row's positive.
        skip_R: int64, the first of `skip_width` candidates that the row must not choose; -skip_width: none.
        skip_width: how many candidates are left out from skip_R on.
        tile: rows and candidates in memory at once.

    Returns:
        hit_R, bool.
    """
    hits = [torch.zeros(0, dtype=torch.bool, device=query_RE.device)]
    with _full_precision(query_RE):
        for rows in _tiles(query_RE.shape[0], tile):
            ranking = _Ranking(positive_R[rows], query_RE)
            for part in _tiles(candidate_GE.shape[0], tile):
                logits = query_RE[rows] @ candidate_GE[part].T
                if skip_R is not None:
                    number_G = torch.arange(part.start, part.stop, device=query_RE.device)
                    from_skip = number_G - skip_R[rows, None]
                    logits.masked_fill_((from_skip >= 0) & (from_skip < skip_width), -torch.inf)
                ranking.update(logits, part)
            hits.append(ranking.hits())
    return torch.cat(hits)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_RE: Tensor, candidate_GE: Tensor, positive_R: Tensor, scale: Tensor, tile: int
    ) -> tuple[Tensor, Tensor]:
        lse_R = query_RE.new_full(query_RE.shape[:1], -torch.inf)
        loss_R = torch.empty_like(lse_R)
        hit_R = torch.empty_like(lse_R, dtype=torch.bool)
        with _full_precision(query_RE):
            for rows in _tiles(query_RE.shape[0], tile):
                ranking = _Ranking(positive_R[rows], query_RE)
                for part in _tiles(candidate_GE.shape[0], tile):
                    logits = (query_RE[rows] @ candidate_GE[part].T).mul_(scale)
                    lse_R[rows] = torch.logaddexp(lse_R[rows], logits.logsumexp(1))
                    ranking.update(logits, part)
                loss_R[rows] = lse_R[rows] - ranking.positive_R
                hit_R[rows] = ranking.hits()
        ctx.tile = tile
        ctx.save_for_backward(query_RE, candidate_GE, positive_R, scale, lse_R)
        ctx.mark_non_differentiable(hit_R)
        return loss_R, hit_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor, _hit: Tensor) -> tuple[Tensor | None, ...]:
        query_RE, candidate_GE, positive_R, scale, lse_R = ctx.saved_tensors
        query_grad_RE = torch.zeros_like(query_RE)
        candidate_grad_GE = torch.zeros_like(candidate_GE) if ctx.needs_input_grad[1] else None
        with _full_precision(query_RE):
            for rows in _tiles(query_RE.shape[0], ctx.tile):
                for part in _tiles(candidate_GE.shape[0], ctx.tile):
                    logits = (query_RE[rows] @ candidate_GE[part].T).mul_(scale)
                    # Gradient of the loss by the scaled logit: softmax minus one-hot.
                    share = logits.sub_(lse_R[rows, None]).exp_()
                    column_R1, inside_R1 = _locate(positive_R[rows], part)
                    share.scatter_add_(1, column_R1, -inside_R1.to(share.dtype))
                    share.mul_(grad_R[rows, None])
                    query_grad_RE[rows].addmm_(share, candidate_GE[part])
                    if candidate_grad_GE is not None:
                        candidate_grad_GE[part].addmm_(share.T, query_RE[rows])
        # Each logit is scale * (query . candidate), so the gradient by scale falls out of the one by query.
        scale_grad = (query_RE * query_grad_RE).sum().reshape(scale.shape)
        query_grad_RE.mul_(scale)
        if candidate_grad_GE is not None:
            candidate_grad_GE.mul_(scale)
        return query_grad_RE, candidate_grad_GE, None, scale_grad, None


class _Ranking:
    """For one tile of rows: the positive's logit and the best other one, over the tiles of candidates."""

    def __init__(self, index_R: Tensor, like: Tensor) -> None:
        self.index_R = index_R
        self.positive_R = like.new_full(index_R.shape, -torch.inf)
        self.other_R = like.new_full(index_R.shape, -torch.inf)

    def update(self, logits: Tensor, part: slice) -> None:
        """Takes in one tile; `logits` is overwritten."""
        column_R1, inside_R1 = _locate(self.index_R, part)
        found_R1 = logits.gather(1, column_R1)
        self.positive_R = torch.where(inside_R1, found_R1, self.positive_R[:, None])[:, 0]
        logits.scatter_(1, column_R1, found_R1.masked_fill(inside_R1, -torch.inf))
        self.other_R = torch.maximum(self.other_R, logits.amax(1))

    def hits(self) -> Tensor:
        """[R] bool."""
        return self.positive_R > self.other_R


def _locate(index_R: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Each row's column in the tile of candidates `part`, and whether it lies there; both [R, 1], no sync."""
    inside_R = (index_R >= part.start) & (index_R < part.stop)
    column_R = (index_R - part.start).clamp(0, part.stop - part.start - 1)
    return column_R[:, None], inside_R[:, None]


def _tiles(length: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, length)) for start in range(0, length, tile))


def _full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)
