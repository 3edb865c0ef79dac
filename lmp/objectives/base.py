"""What every objective takes and gives, and the bookkeeping that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lmp.objectives.contrastive import Restriction, at_least_fp32, info_nce, sigmoid

Gather = Callable[[Tensor], Tensor]
"""[P_local, ...] -> [P, ...]: the whole pack from a rank's run of it, with its true adjoint.

The identity when sp = 1. In the scope `step` the packs of the step, laid end to end, count as one pack: P are the
shots of all of them, P_local those of this rank's runs of its own. Every rank calls it equally often and in the same
order, whatever its data.
Tensors without gradient (bool and int64 too) are only joined.
"""


@dataclass
class ObjectiveBatch:
    """One rank's slice of one pack (or of all packs of the step, see Gather), on the model's device.

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

    @property
    def bias(self) -> Mapping[str, Tensor] | None:
        """The same names -> one element, added to the logits; None unless the loss is `sigmoid`."""


def bias_of(output: ObjectiveOutput, name: str) -> Tensor | None:
    """The bias of the sigmoid loss, where the model has one."""
    return None if output.bias is None else output.bias[name]


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
    """What one rank knows of the whole pack (or of all packs of the step, see Gather).

    Attributes:
        place_P: [P_local] int64, where the rank's own shots lie in the pack.
        segment_P: [P] int64, of the whole pack; does not decrease.
        film_P, shot_P: [P] int64, of the whole pack.
        valid, masked: NAME -> [P] bool, of the whole pack.
    """

    place_P: Tensor
    segment_P: Tensor
    film_P: Tensor
    shot_P: Tensor
    valid: dict[str, Tensor]
    masked: dict[str, Tensor]

    @classmethod
    def of(cls, batch: ObjectiveBatch, gather: Gather) -> PackView:
        """Gathers segments, films, shots and flags in one exchange."""
        names = list(batch.features)
        flags = [batch.valid[name] for name in names] + [batch.masked[name] for name in names]
        numbers = [batch.segment_P, batch.film_P, batch.shot_P]
        columns = gather(torch.stack([*numbers, *(flag.long() for flag in flags)], dim=1)).unbind(1)
        segment_P, film_P, shot_P = (column.contiguous() for column in columns[:3])
        seen = [column.bool() for column in columns[3:]]
        return cls(
            # Segments lie end to end: a shot's place is its segment's first place plus its position there.
            place_P=torch.searchsorted(segment_P, batch.segment_P.contiguous()) + batch.position_P,
            segment_P=segment_P,
            film_P=film_P,
            shot_P=shot_P,
            valid=dict(zip(names, seen[: len(names)], strict=True)),
            masked=dict(zip(names, seen[len(names) :], strict=True)),
        )


@dataclass
class Scores:
    """Row by row: loss_R (differentiable), hit_R (bool), and chance_R (float64).

    Chance is the loss of the best answer that is the same for all candidates.
    """

    loss_R: Tensor
    hit_R: Tensor
    chance_R: Tensor


def numbering(chosen_P: Tensor) -> Tensor:
    """[P] int64: the place of each chosen shot in the list of the chosen ones (elsewhere meaningless)."""
    return chosen_P.long().cumsum(0) - 1


def token_index(shot_R: Tensor, tokens: int) -> Tensor:
    """[R] shot numbers -> [R * K] numbers of their tokens, in a list that holds K tokens a shot."""
    return (shot_R[:, None] * tokens + torch.arange(tokens, device=shot_R.device)).flatten()


@dataclass(frozen=True)
class Contrast:
    """How rows are held against candidates; the settings that all objectives share.

    Attributes:
        loss: see contrastive.py.
        scope: `film` keeps a row's candidates to its own segment. `pack` and `step` take all there are: which they
            are is decided by what is gathered.
        exclude_near: a candidate of the row's film at most this many shots away is no candidate, unless it is the
            positive; other tokens of the row's own shot are 0 shots away. 0: all are.
        tile: see info_nce.
    """

    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    scope: Literal["pack", "film", "step"] = "pack"
    exclude_near: int = 0
    tile: int = 4096

    def __call__(
        self,
        query_PKE: Tensor,
        candidate_PKE: Tensor,
        *,
        rows_P: Tensor,
        chosen_P: Tensor,
        pack: PackView,
        scale: Tensor,
        bias: Tensor | None,
    ) -> Scores:
        """The loss between a rank's own tokens and the tokens of the whole pack; the positive is the same token.

        Args:
            query_PKE: [P_local, K, E], own slice.
            candidate_PKE: [P, K, E], whole pack.
            rows_P: [P_local] bool, the shots whose tokens are rows; all of them are among the candidates.
            chosen_P: [P] bool, the shots whose tokens are candidates.
            pack: the whole pack.
            scale: 1 / temperature.
            bias: of the sigmoid loss.
        """
        own_R, tokens = rows_P.nonzero()[:, 0], query_PKE.shape[1]
        query_RE = query_PKE.index_select(0, own_R).flatten(0, 1)
        candidate_GE = candidate_PKE.index_select(0, chosen_P.nonzero()[:, 0]).flatten(0, 1)
        place_R = pack.place_P[own_R]
        positive_R = token_index(numbering(chosen_P)[place_R], tokens)
        only = self.restriction(pack, place_R=place_R, chosen_P=chosen_P, tokens=tokens)
        count_R = _candidates(only, rows=query_RE.shape[0], among=candidate_GE)
        # Always the same answer: 1 / G in each case, which costs ln G; with sigmoid also for the G - 1 others.
        if self.loss == "sigmoid":
            assert bias is not None, "the model has no bias: its configuration names another loss"
            loss_R, hit_R = sigmoid(query_RE, candidate_GE, positive_R, scale, bias, only=only, tile=self.tile)
            chance_R = torch.xlogy(count_R, count_R) - torch.xlogy(count_R - 1, count_R - 1)
        else:
            loss_R, hit_R = info_nce(query_RE, candidate_GE, positive_R, scale, only=only, tile=self.tile)
            chance_R = count_R.log()
        return Scores(loss_R, hit_R, chance_R)

    def restriction(self, pack: PackView, *, place_R: Tensor, chosen_P: Tensor, tokens: int) -> Restriction:
        """Which candidates the tokens of the shots at `place_R` may choose from.

        Args:
            pack: the whole pack.
            place_R: int64, places of shots in the pack.
            chosen_P: [P] bool, the shots whose tokens are candidates.
            tokens: K.
        """
        span_R2, key_G, near_R2 = None, None, None
        if self.scope == "film":
            segment_N, segment_R = pack.segment_P[chosen_P], pack.segment_P[place_R]
            ends = [torch.searchsorted(segment_N, segment_R, right=right) for right in (False, True)]
            span_R2 = (tokens * torch.stack(ends, dim=1)).repeat_interleave(tokens, dim=0)
        if self.exclude_near:
            # With segments in place of films what is near lies within the row's span.
            group_P = pack.segment_P if self.scope == "film" else pack.film_P
            key_P = group_P * _FILM_STRIDE + pack.shot_P
            key_G = key_P[chosen_P].repeat_interleave(tokens)
            reach = torch.where(pack.film_P[place_R] >= 0, self.exclude_near, _NOTHING)
            near_R2 = torch.stack([key_P[place_R] - reach, key_P[place_R] + reach], dim=1)
            near_R2 = near_R2.repeat_interleave(tokens, dim=0)
        return Restriction(span_R2=span_R2, key_G=key_G, near_R2=near_R2)


_FILM_STRIDE = 2**32  # above the largest shot number plus the largest exclude_near, both below 2**31
_NOTHING = -1  # a reach that makes an empty range


def _candidates(only: Restriction, *, rows: int, among: Tensor) -> Tensor:
    """[R] float64: how many candidates each row has, for restrictions made by Contrast."""
    if only.span_R2 is not None:
        count_R = only.span_R2[:, 1] - only.span_R2[:, 0]
    else:
        count_R = torch.full((rows,), among.shape[0], device=among.device)
    if only.near_R2 is not None:
        assert only.key_G is not None
        key_G = only.key_G.sort().values
        low_R, high_R = only.near_R2.t().contiguous().unbind()
        near_R = torch.searchsorted(key_G, high_R, right=True) - torch.searchsorted(key_G, low_R)
        # The positive is among the near ones, and stays.
        count_R = count_R - (near_R - 1).clamp(min=0)
    return count_R.double()


class Tally:
    """Adds up one objective's parts (its modalities, or pairs of them) into a Term."""

    def __init__(self, *anchors: Tensor | None) -> None:
        """`anchors` (those there are) stay part of the graph even if no part is ever added."""
        nothing = [at_least_fp32(anchor).flatten()[:0].sum() for anchor in anchors if anchor is not None]
        self._total = torch.stack(nothing).sum()
        self._count = _fp64(0, self._total)
        self._metrics: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, part: str, scores: Scores, *, weight: float = 1.0) -> None:
        """Adds the rows of `part`, each counted `weight` times, to the loss and to the metrics."""
        rows = weight * scores.loss_R.numel()
        self._total = self._total + weight * scores.loss_R.sum()
        self._count = self._count + rows
        self._metric(f"{part}/loss", weight * scores.loss_R.detach().double().sum(), rows)
        self.metric(part, "chance", weight * scores.chance_R.sum(), rows)
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
