"""What every objective takes and gives, and the bookkeeping that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lmp.objectives.contrastive import at_least_fp32, info_nce

Gather = Callable[[Tensor], Tensor]
"""[P_local, ...] -> [P, ...] over the sequence group, in rank order, with its true adjoint.

The identity when sp = 1. Every rank calls it equally often and in the same order, whatever its data.
Tensors without gradient (bool and int64 too) are only joined.
"""


@dataclass
class ObjectiveBatch:
    """One rank's slice of one pack, on the model's device.

    Attributes:
        features: NAME -> [P_local, K, D] base features, stored dtype.
        valid: NAME -> [P_local] bool.
        masked: NAME -> [P_local] bool, a subset of valid.
        segment_P: int64, number of the shot's segment in the pack; does not decrease along the pack.
        film_P, shot_P: int64, film number (-1 idle) and shot number in the film.
        position_P: int64, place in the segment, from 0.
    """

    features: dict[str, Tensor]
    valid: dict[str, Tensor]
    masked: dict[str, Tensor]
    segment_P: Tensor
    film_P: Tensor
    shot_P: Tensor
    position_P: Tensor


class ObjectiveOutput(Protocol):
    """What the objectives read of LmpPretrainingOutput; every embedding has unit length."""

    @property
    def predicted(self) -> Mapping[str, Tensor]:
        """NAME -> [P_local, K, E] from the masked-shot head."""

    @property
    def target(self) -> Mapping[str, Tensor]:
        """NAME -> [P_local, K, E], projected base features."""

    @property
    def aligned(self) -> Mapping[str, Tensor]:
        """NAME -> [P_local, K, E] from the alignment head."""

    @property
    def reconstructed(self) -> Tensor:
        """[P_local, K of the target modality, E] from the cross-modal head."""

    @property
    def scale(self) -> Mapping[str, Tensor]:
        """ "masked", "alignment", "reconstruction" -> one element, 1 / temperature."""


@dataclass
class Term:
    """One objective on one rank's slice of one pack: its share of the step's sum and of the step's rows.

    Attributes:
        total: scalar, the sum of the row losses; part of the graph of every input even when there is no row.
        count: float64 scalar without gradient, the number of rows.
        metrics: name -> (sum, count), float64 scalars without gradient; the same names on every rank.
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


class Objective(Protocol):
    """One loss with a name and a weight."""

    @property
    def name(self) -> str:
        """Also the name of its section in the configuration."""

    @property
    def weight(self) -> float:
        """Factor in the sum of the losses; above 0."""

    def count(self, batch: ObjectiveBatch, gather: Gather) -> Tensor:
        """Rows of the loss in this slice, float64 scalar: equals Term.count, but needs no model output."""

    def __call__(self, output: ObjectiveOutput, batch: ObjectiveBatch, gather: Gather, *, rivals: bool = False) -> Term:
        """The loss of this slice. `rivals` adds the metrics of cheap rivals, where the objective has some."""


@dataclass
class PackView:
    """What one rank knows of the whole pack.

    Attributes:
        place_P: [P_local] int64, where the rank's own shots lie in the pack.
        segment_P: [P] int64, of the whole pack.
        valid, masked: NAME -> [P] bool, of the whole pack.
    """

    place_P: Tensor
    segment_P: Tensor
    valid: dict[str, Tensor]
    masked: dict[str, Tensor]

    @classmethod
    def of(cls, batch: ObjectiveBatch, gather: Gather) -> PackView:
        """Gathers segments and flags in one exchange."""
        names = list(batch.features)
        flags = [batch.valid[name] for name in names] + [batch.masked[name] for name in names]
        columns = gather(torch.stack([batch.segment_P, *(flag.long() for flag in flags)], dim=1)).unbind(1)
        segment_P = columns[0].contiguous()
        seen = [column.bool() for column in columns[1:]]
        return cls(
            # Segments lie end to end: a shot's place is its segment's first place plus its position there.
            place_P=torch.searchsorted(segment_P, batch.segment_P.contiguous()) + batch.position_P,
            segment_P=segment_P,
            valid=dict(zip(names, seen[: len(names)], strict=True)),
            masked=dict(zip(names, seen[len(names) :], strict=True)),
        )


@dataclass
class Scores:
    """Row by row: loss_R (differentiable), hit_R (bool), and the number of candidates each row had."""

    loss_R: Tensor
    hit_R: Tensor
    candidates: int


def numbering(chosen_P: Tensor) -> Tensor:
    """[P] int64: the place of each chosen shot in the list of the chosen ones (elsewhere meaningless)."""
    return chosen_P.long().cumsum(0) - 1


def token_index(shot_R: Tensor, tokens: int) -> Tensor:
    """[R] shot numbers -> [R * K] numbers of their tokens, in a list that holds K tokens a shot."""
    return (shot_R[:, None] * tokens + torch.arange(tokens, device=shot_R.device)).flatten()


def contrast(
    query_PKE: Tensor,
    candidate_PKE: Tensor,
    *,
    rows_P: Tensor,
    chosen_P: Tensor,
    place_P: Tensor,
    scale: Tensor,
    tile: int,
) -> Scores:
    """InfoNCE between a rank's own tokens and the tokens of the whole pack; the positive is the same token.

    Args:
        query_PKE: [P_local, K, E], own slice.
        candidate_PKE: [P, K, E], whole pack.
        rows_P: [P_local] bool, the shots whose tokens are rows; all of them are among the candidates.
        chosen_P: [P] bool, the shots whose tokens are candidates.
        place_P: [P_local] int64, place of the own shots in the pack.
        scale: 1 / temperature.
        tile: see info_nce.
    """
    own_R = rows_P.nonzero()[:, 0]
    query_RE = query_PKE.index_select(0, own_R).flatten(0, 1)
    candidate_GE = candidate_PKE.index_select(0, chosen_P.nonzero()[:, 0]).flatten(0, 1)
    positive_R = token_index(numbering(chosen_P)[place_P[own_R]], query_PKE.shape[1])
    loss_R, hit_R = info_nce(query_RE, candidate_GE, positive_R, scale, tile=tile)
    return Scores(loss_R, hit_R, candidates=candidate_GE.shape[0])


class Tally:
    """Adds up one objective's parts (its modalities, or pairs of them) into a Term."""

    def __init__(self, *anchors: Tensor) -> None:
        """`anchors` stay part of the graph even if no part is ever added."""
        nothing = [at_least_fp32(anchor).flatten()[:0].sum() for anchor in anchors]
        self._total = torch.stack(nothing).sum()
        self._count = _fp64(0, self._total)
        self._metrics: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, part: str, scores: Scores, *, weight: float = 1.0) -> None:
        """Adds the rows of `part`, each counted `weight` times, to the loss and to the metrics."""
        rows = weight * scores.loss_R.numel()
        self._total = self._total + weight * scores.loss_R.sum()
        self._count = self._count + rows
        chance = math.log(max(scores.candidates, 1))
        self._metric(f"{part}/loss", weight * scores.loss_R.detach().double().sum(), rows)
        self.metric(part, "chance", rows * chance, rows)
        self.metric(part, "top1", weight * scores.hit_R.double().sum(), rows)

    def metric(self, part: str, name: str, total: Any, count: float) -> None:
        """Adds to the metric `name` of the objective and to that of its part."""
        self._metric(name, total, count)
        self._metric(f"{part}/{name}", total, count)

    def _metric(self, name: str, total: Any, count: float) -> None:
        zero = _fp64(0, self._total)
        old_total, old_count = self._metrics.get(name, (zero, zero))
        self._metrics[name] = (old_total + total, old_count + count)

    def term(self) -> Term:
        """What was added up."""
        return Term(self._total, self._count, self._metrics)


def _fp64(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=like.device)
