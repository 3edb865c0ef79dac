"""Inter-modal alignment: a shot's modalities find each other among the shots in scope."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from lmp.objectives.base import Contrast, Gather, ObjectiveBatch, ObjectiveOutput, PackView, Tally, Term, bias_of
from lmp.objectives.contrastive import at_least_fp32


@dataclass(frozen=True)
class Alignment:
    """A symmetric contrastive loss for each pair of modalities, half from each side.

    Per pair: rows and, in scope, candidates are the shots that are valid and unmasked in both. A shot with several
    tokens counts as their mean, at unit length.
    """

    weight: float = 1.0
    contrast: Contrast = field(default_factory=Contrast)
    name: str = "alignment"

    def count(self, batch: ObjectiveBatch, gather: Gather) -> Tensor:
        """Shots of this slice that are seen in both, over all pairs."""
        seen = {name: batch.valid[name] & ~batch.masked[name] for name in batch.features}
        counts = [(seen[one] & seen[other]).double().sum() for one, other in combinations(seen, 2)]
        return torch.stack([batch.film_P.new_zeros((), dtype=torch.float64), *counts]).sum()

    def __call__(self, output: ObjectiveOutput, batch: ObjectiveBatch, gather: Gather, *, rivals: bool = False) -> Term:
        """The loss of this slice; see Objective."""
        pack = PackView.of(batch, gather)
        scale, bias = output.scale["alignment"], bias_of(output, "alignment")
        tally = Tally(scale, bias, *output.aligned.values())
        own = {name: _shot_embedding(output.aligned[name]) for name in batch.features}
        whole = {name: gather(x_P1E) for name, x_P1E in own.items()}
        seen = {name: pack.valid[name] & ~pack.masked[name] for name in own}
        for one, other in combinations(own, 2):
            both_P = seen[one] & seen[other]
            for query, candidate in ((one, other), (other, one)):
                scores = self.contrast(
                    own[query],
                    whole[candidate],
                    rows_P=both_P[pack.place_P],
                    chosen_P=both_P,
                    pack=pack,
                    scale=scale,
                    bias=bias,
                )
                tally.add(f"{one}-{other}", scores, weight=0.5)
        return tally.term()


def _shot_embedding(aligned_PKE: Tensor) -> Tensor:
    """[P, K, E] -> [P, 1, E] at unit length."""
    return F.normalize(at_least_fp32(aligned_PKE).mean(1, keepdim=True), dim=-1)
