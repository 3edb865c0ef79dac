"""Masked shot modelling: from its surroundings, tell which shot was masked here."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmp.objectives.base import Contrast, Gather, ObjectiveBatch, ObjectiveOutput, PackView, Tally, Term, bias_of
from lmp.objectives.contrastive import at_least_fp32
from lmp.objectives.rivals import rival_hits


@dataclass(frozen=True)
class MaskedShot:
    """The prediction at each masked token against the projected base features of the pack.

    Per modality: rows are the masked tokens; candidates are all valid tokens in scope, masked or not. The rivals
    `copy_top1` and `mean_top1` answer the same question from base features alone.
    """

    weight: float = 1.0
    contrast: Contrast = field(default_factory=Contrast)
    name: str = "masked_shot"

    def count(self, batch: ObjectiveBatch, gather: Gather) -> Tensor:
        """Masked tokens of all modalities in this slice."""
        counts = [batch.masked[name].double().sum() * x_PKD.shape[1] for name, x_PKD in batch.features.items()]
        return torch.stack(counts).sum()

    def __call__(self, output: ObjectiveOutput, batch: ObjectiveBatch, gather: Gather, *, rivals: bool = False) -> Term:
        """The loss of this slice; see Objective."""
        pack = PackView.of(batch, gather)
        scale, bias = output.scale["masked"], bias_of(output, "masked")
        tally = Tally(scale, bias, *output.predicted.values(), *output.target.values())
        for name, features_PKD in batch.features.items():
            scores = self.contrast(
                at_least_fp32(output.predicted[name]),
                gather(at_least_fp32(output.target[name])),
                rows_P=batch.masked[name],
                chosen_P=pack.valid[name],
                pack=pack,
                scale=scale,
                bias=bias,
            )
            tally.add(name, scores)
            if rivals:
                whole_PKD = gather(features_PKD)
                hits = rival_hits(whole_PKD, name, pack, rows_P=batch.masked[name], contrast=self.contrast)
                for rival, hit_R in hits.items():
                    tally.metric(name, f"{rival}_top1", hit_R.double().sum(), hit_R.numel())
        return tally.term()
