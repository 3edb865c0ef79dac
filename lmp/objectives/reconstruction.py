"""Cross-modal reconstruction: the target modality's contextual embedding, told from the other modalities."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmp.objectives.base import Contrast, Gather, ObjectiveBatch, ObjectiveOutput, PackView, Tally, Term, bias_of
from lmp.objectives.contrastive import at_least_fp32


@dataclass(frozen=True)
class Reconstruction:
    """The cross-modal tokens against the target modality's alignment embeddings.

    The latter get no gradient. Rows are the target's valid unmasked tokens where at least one source is valid
    and unmasked; candidates are all the target's valid unmasked tokens in scope.

    Args:
        sources: names of the modalities that the cross-modal transformer reads; None: all but the target.
    """

    target: str = "video"
    sources: tuple[str, ...] | None = None
    weight: float = 1.0
    contrast: Contrast = field(default_factory=Contrast)
    name: str = "reconstruction"

    def count(self, batch: ObjectiveBatch, gather: Gather) -> Tensor:
        """Rows of this slice."""
        return self._rows(batch).double().sum() * batch.features[self.target].shape[1]

    def __call__(self, output: ObjectiveOutput, batch: ObjectiveBatch, gather: Gather, *, rivals: bool = False) -> Term:
        """The loss of this slice; see Objective."""
        pack = PackView.of(batch, gather)
        scale, bias = output.scale["reconstruction"], bias_of(output, "reconstruction")
        tally = Tally(scale, bias, output.reconstructed)
        scores = self.contrast(
            at_least_fp32(output.reconstructed),
            gather(at_least_fp32(output.aligned[self.target].detach())),
            rows_P=self._rows(batch),
            chosen_P=pack.valid[self.target] & ~pack.masked[self.target],
            pack=pack,
            scale=scale,
            bias=bias,
        )
        tally.add(self.target, scores)
        return tally.term()

    def _rows(self, batch: ObjectiveBatch) -> Tensor:
        """[P_local] bool."""
        sources = self.sources
        if sources is None:
            sources = tuple(name for name in batch.features if name != self.target)
        seen = {name: batch.valid[name] & ~batch.masked[name] for name in (self.target, *sources)}
        some_source_P = torch.zeros_like(seen[self.target])
        for name in sources:
            some_source_P = some_source_P | seen[name]
        return seen[self.target] & some_source_P
