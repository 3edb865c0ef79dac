"""Masked shot modelling: from its surroundings, tell which shot of the pack was masked here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmp.objectives.base import Gather, ObjectiveBatch, ObjectiveOutput, PackView, Tally, Term, contrast
from lmp.objectives.contrastive import at_least_fp32
from lmp.objectives.rivals import rival_hits


@dataclass(frozen=True)
class MaskedShot:
    """InfoNCE between the prediction at each masked token and the projected base features of the pack.

    Per modality: rows are the masked tokens; candidates are all valid tokens of the pack, masked or not, of
    all its segments. The rivals `copy_top1` and `mean_top1` answer the same question from base features
    alone.
    """

    weight: float = 1.0
    tile: int = 4096
    name: str = "masked_shot"

    def count(self, batch: ObjectiveBatch, gather: Gather) -> Tensor:
        """Masked tokens of all modalities in this slice."""
        counts = [batch.masked[name].double().sum() * x_PKD.shape[1] for name, x_PKD in batch.features.items()]
        return torch.stack(counts).sum()

    def __call__(self, output: ObjectiveOutput, batch: ObjectiveBatch, gather: Gather, *, rivals: bool = False) -> Term:
        """The loss of this slice; see Objective."""
        pack = PackView.of(batch, gather)
        tally = Tally(output.scale["masked"], *output.predicted.values(), *output.target.values())
        for name, features_PKD in batch.features.items():
            scores = contrast(
                at_least_fp32(output.predicted[name]),
                gather(at_least_fp32(output.target[name])),
                rows_P=batch.masked[name],
                chosen_P=pack.valid[name],
                place_P=pack.place_P,
                scale=output.scale["masked"],
                tile=self.tile,
            )
            tally.add(name, scores)
            if rivals:
                hits = rival_hits(gather(features_PKD), name, pack, rows_P=batch.masked[name], tile=self.tile)
                for rival, hit_R in hits.items():
                    tally.metric(name, f"{rival}_top1", hit_R.double().sum(), hit_R.numel())
        return tally.term()
