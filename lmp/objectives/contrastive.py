"""Exact contrastive losses whose memory is linear in rows and candidates.

Logits exist one tile at a time, forward and again backward. Between the two only one number of each row is kept.
Value and gradients are those of the full matrix, which is never built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is float64: losses never work in less."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@dataclass(frozen=True)
class Restriction:
    """Which of the candidates a row may choose from; its positive it always may.

    Attributes:
        span_R2: int64, only candidates first <= g < last, the positive's place among them. Rows in order of their
            spans cost least. None: all.
        skip_R2: int64, candidates first <= g < last are left out. None: none.
        key_G, near_R2: int64, candidates with low <= key <= high are left out. None: none.
    """

    span_R2: Tensor | None = None
    skip_R2: Tensor | None = None
    key_G: Tensor | None = None
    near_R2: Tensor | None = None

    def blocks(self, rows: int, candidates: int, tile: int) -> list[tuple[slice, list[slice]]]:
        """Tiles of rows, and for each the tiles of the candidates that any of its rows may choose from."""
        row_tiles = list(_tiles(0, rows, tile))
        if self.span_R2 is None or not rows:
            return [(part, list(_tiles(0, candidates, tile))) for part in row_tiles]
        ends = [torch.stack([self.span_R2[part, 0].amin(), self.span_R2[part, 1].amax()]) for part in row_tiles]
        # All ends at once, so that the host waits for the device one time only.
        return [
            (part, list(_tiles(first, last, tile)))
            for part, (first, last) in zip(row_tiles, torch.stack(ends).tolist(), strict=True)
        ]

    def left_out(self, rows: slice, part: slice) -> Tensor | None:
        """Bool for one tile, True at the candidates that are not to be chosen; None: there are none."""
        out: Tensor | None = None
        for ends_R2, inside in ((self.span_R2, False), (self.skip_R2, True)):
            if ends_R2 is not None:
                number_G = torch.arange(part.start, part.stop, device=ends_R2.device)
                within = (number_G >= ends_R2[rows, :1]) & (number_G < ends_R2[rows, 1:])
                out = _either(out, within if inside else within.logical_not_())
        if self.near_R2 is not None:
            assert self.key_G is not None
            key_G = self.key_G[part]
            out = _either(out, (key_G >= self.near_R2[rows, :1]) & (key_G <= self.near_R2[rows, 1:]))
        return out


EVERYTHING = Restriction()


def info_nce(
    query_RE: Tensor,
    candidate_GE: Tensor,
    positive_R: Tensor,
    scale: Tensor,
    *,
    only: Restriction = EVERYTHING,
    tile: int = 4096,
) -> tuple[Tensor, Tensor]:
    """-log softmax(scale * query @ candidate.T) at each row's positive, without the matrix.

    A mask that all rows share is a shorter list of candidates: select them before the call.

    Args:
        query_RE: one query a row; any float dtype, worked on in float32 at least. R may be 0.
        candidate_GE: what the rows choose from, their positives included. G may be 0 where R is.
        positive_R: int64, the place of each row's positive in candidate_GE.
        scale: one element, 1 / temperature.
        only: which of the candidates a row may choose from.
        tile: rows and candidates in memory at once; changes rounding only.

    Returns:
        loss_R, differentiable in query, candidate and scale; and hit_R, bool, True where the positive scores
        strictly above every other candidate (so that a collapsed model, all ties, hits nothing).
    """
    query_RE, candidate_GE, scale = at_least_fp32(query_RE), at_least_fp32(candidate_GE), at_least_fp32(scale)
    return _Pairwise.apply(query_RE, candidate_GE, scale, None, positive_R, only, tile)


def sigmoid(
    query_RE: Tensor,
    candidate_GE: Tensor,
    positive_R: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    only: Restriction = EVERYTHING,
    tile: int = 4096,
) -> tuple[Tensor, Tensor]:
    """The pairwise sigmoid loss of Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), eq. 1.

    A row's loss is the sum over its candidates g of -log sigmoid(z_g (scale * query . candidate_g + bias)), z_g = 1
    at its positive and -1 elsewhere. The mean over rows is left to the caller.

    Args:
        bias: one element.
        query_RE, candidate_GE, positive_R, scale, only, tile: as for `info_nce`.

    Returns:
        loss_R, differentiable in query, candidate, scale and bias; and hit_R as for `info_nce`.
    """
    query_RE, candidate_GE, scale = at_least_fp32(query_RE), at_least_fp32(candidate_GE), at_least_fp32(scale)
    return _Pairwise.apply(query_RE, candidate_GE, scale, at_least_fp32(bias), positive_R, only, tile)


@torch.no_grad()
def top1_hits(
    query_RE: Tensor,
    candidate_GE: Tensor,
    positive_R: Tensor,
    *,
    only: Restriction = EVERYTHING,
    tile: int = 4096,
) -> Tensor:
    """Whether each row's positive scores strictly highest by dot product; linear memory.

    Args:
        query_RE: one query a row, float32 or float64.
        candidate_GE: candidates, same dtype.
        positive_R: int64, the place of each row's positive.
        only: which of the candidates a row may choose from.
        tile: rows and candidates in memory at once.

    Returns:
        hit_R, bool.
    """
    hits = [torch.zeros(0, dtype=torch.bool, device=query_RE.device)]
    with _full_precision(query_RE):
        for rows, parts in only.blocks(query_RE.shape[0], candidate_GE.shape[0], tile):
            ranking = _Ranking(query_RE[rows])
            for part in parts:
                logits = query_RE[rows] @ candidate_GE[part].T
                positive = _Positive.of(positive_R[rows], part, logits)
                _restrict(logits, only.left_out(rows, part), positive)
                ranking.update(logits, positive)
            hits.append(ranking.hits())
    return torch.cat(hits)


class _Pairwise(torch.autograd.Function):
    """InfoNCE, or with a bias the sigmoid loss. Of each row the log-sum-exp is kept (nothing for sigmoid)."""

    @staticmethod
    def forward(
        ctx: Any,
        query_RE: Tensor,
        candidate_GE: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        positive_R: Tensor,
        only: Restriction,
        tile: int,
    ) -> tuple[Tensor, Tensor]:
        rows_in_all = query_RE.shape[0]
        lse_R = query_RE.new_full((rows_in_all,), -torch.inf) if bias is None else None
        loss_R = query_RE.new_zeros(rows_in_all)
        hit_R = torch.empty_like(loss_R, dtype=torch.bool)
        blocks = only.blocks(rows_in_all, candidate_GE.shape[0], tile)
        with _full_precision(query_RE):
            for rows, parts in blocks:
                ranking = _Ranking(query_RE[rows])
                for part in parts:
                    logits = _logits(query_RE[rows], candidate_GE[part], scale, bias)
                    positive = _Positive.of(positive_R[rows], part, logits)
                    _restrict(logits, only.left_out(rows, part), positive)
                    if lse_R is not None:
                        lse_R[rows] = torch.logaddexp(lse_R[rows], logits.logsumexp(1))
                    else:
                        positive.put(logits, -positive.logit_R1)
                        loss_R[rows] -= F.logsigmoid(logits.neg_()).sum(1)
                        logits.neg_()
                    ranking.update(logits, positive)
                    del logits  # before the next tile is made
                if lse_R is not None:
                    loss_R[rows] = lse_R[rows] - ranking.positive_R
                hit_R[rows] = ranking.hits()
        ctx.blocks, ctx.only = blocks, only
        ctx.save_for_backward(query_RE, candidate_GE, scale, bias, positive_R, lse_R)
        ctx.mark_non_differentiable(hit_R)
        return loss_R, hit_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor, _hit: Tensor) -> tuple[Tensor | None, ...]:
        query_RE, candidate_GE, scale, bias, positive_R, lse_R = ctx.saved_tensors
        query_grad_RE = torch.zeros_like(query_RE)
        candidate_grad_GE = torch.zeros_like(candidate_GE) if ctx.needs_input_grad[1] else None
        scale_grad, bias_grad = torch.zeros_like(scale), None if bias is None else torch.zeros_like(bias)
        with _full_precision(query_RE):
            for rows, parts in ctx.blocks:
                for part in parts:
                    logits = _logits(query_RE[rows], candidate_GE[part], scale, bias)
                    positive = _Positive.of(positive_R[rows], part, logits)
                    _restrict(logits, ctx.only.left_out(rows, part), positive)
                    # Gradient of the loss by the logit: softmax or sigmoid, minus one at the positive.
                    share = logits.sigmoid_() if lse_R is None else logits.sub_(lse_R[rows, None]).exp_()
                    share.scatter_add_(1, positive.column_R1, -positive.inside_R1.to(share.dtype))
                    share.mul_(grad_R[rows, None])
                    query_grad_RE[rows].addmm_(share, candidate_GE[part])
                    if candidate_grad_GE is not None:
                        candidate_grad_GE[part].addmm_(share.T, query_RE[rows])
                    if bias_grad is not None:
                        bias_grad += share.sum()
                    del logits, share
                # Each logit is scale * (query . candidate), so the gradient by scale falls out of the one by query.
                scale_grad += (query_RE[rows] * query_grad_RE[rows]).sum()
        query_grad_RE.mul_(scale)
        if candidate_grad_GE is not None:
            candidate_grad_GE.mul_(scale)
        return query_grad_RE, candidate_grad_GE, scale_grad, bias_grad, None, None, None


@dataclass(frozen=True)
class _Positive:
    """Where each row's positive stands in one tile; [R, 1] each.

    Attributes:
        column_R1: its column, any one where it lies elsewhere.
        inside_R1: whether it lies in this tile.
        logit_R1: what stands in the column.
    """

    column_R1: Tensor
    inside_R1: Tensor
    logit_R1: Tensor

    @classmethod
    def of(cls, positive_R: Tensor, part: slice, logits: Tensor) -> _Positive:
        inside_R = (positive_R >= part.start) & (positive_R < part.stop)
        column_R1 = (positive_R - part.start).clamp(0, part.stop - part.start - 1)[:, None]
        return cls(column_R1, inside_R[:, None], logits.gather(1, column_R1))

    def put(self, logits: Tensor, value_R1: Tensor) -> None:
        """Writes `value_R1` to the positives of the tile, in place."""
        logits.scatter_(1, self.column_R1, torch.where(self.inside_R1, value_R1, logits.gather(1, self.column_R1)))


class _Ranking:
    """For one tile of rows: the positive's logit and the best other one, over the tiles of candidates."""

    def __init__(self, query_RE: Tensor) -> None:
        self.positive_R = query_RE.new_full(query_RE.shape[:1], -torch.inf)
        self.other_R = self.positive_R.clone()

    def update(self, logits: Tensor, positive: _Positive) -> None:
        """Takes in one tile; `logits` is overwritten."""
        self.positive_R = torch.where(positive.inside_R1, positive.logit_R1, self.positive_R[:, None])[:, 0]
        positive.put(logits, torch.full_like(positive.logit_R1, -torch.inf))
        self.other_R = torch.maximum(self.other_R, logits.amax(1))

    def hits(self) -> Tensor:
        """[R] bool."""
        return self.positive_R > self.other_R


def _logits(query_RE: Tensor, candidate_GE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    logits = (query_RE @ candidate_GE.T).mul_(scale)
    return logits if bias is None else logits.add_(bias)


def _restrict(logits: Tensor, left_out: Tensor | None, positive: _Positive) -> None:
    """-inf at what is left out, in place, save the positives."""
    if left_out is not None:
        logits.masked_fill_(left_out, -torch.inf)
        positive.put(logits, positive.logit_R1)


def _either(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one.logical_or_(other)


def _tiles(first: int, last: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, last)) for start in range(first, last, tile))


def _full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)
