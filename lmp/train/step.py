"""One optimizer step: masks, forward, objectives, backward, update, and the sums for its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmp.config import Config
from lmp.data.loader import PackBatch, StepBatch
from lmp.objectives.base import Gather, Objective, ObjectiveBatch
from lmp.objectives.masking import draw_masks
from lmp.parallel.collectives import gather_rows
from lmp.parallel.contract import global_counts, reduce_metrics, share_of_loss
from lmp.parallel.mesh import Mesh
from lmp.train.engine import Engine


@dataclass
class Sums:
    """Sums and counts of this rank's micro-batches, by name."""

    parts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, name: str, total: Tensor, count: Tensor) -> None:
        total, count = total.detach().double(), count.detach().double()
        if name in self.parts:
            before_total, before_count = self.parts[name]
            total, count = before_total + total, before_count + count
        self.parts[name] = (total, count)


@dataclass(frozen=True)
class Losses:
    """What a step's forward and backward left: the loss, and exact means over all ranks by name."""

    loss: float
    means: dict[str, float]

    def by_objective(self) -> dict[str, float]:
        """The loss of each objective."""
        return {name: value for name, value in self.means.items() if name.startswith("loss/")}


def gather_over(mesh: Mesh) -> Gather:
    """How objectives see the whole pack from a rank's run of it."""
    group = mesh.sequence_group
    if group is None:
        return lambda local: local
    return lambda local: gather_rows(local, group)


def accumulate(
    engine: Engine, objectives: Sequence[Objective], batch: StepBatch, config: Config, *, rivals: bool
) -> Losses:
    """Forward and backward of all this rank's packs; the gradients wait in the engine. Collective.

    Args:
        engine: holds the model.
        objectives: in the same order on every rank.
        batch: this rank's share of the step.
        config: of the run.
        rivals: whether to measure the cheap rivals too.
    """
    mesh = engine.mesh
    gather = gather_over(mesh)
    packs = [pack.to(mesh.device) for pack in batch.packs]
    views = [objective_batch(pack, config) for pack in packs]
    # The normaliser needs masks and valid bits only, so it is known before the first backward.
    counts = global_counts(
        [torch.stack([objective.count(view, gather) for objective in objectives]) for view in views],
        mesh.device,
    )
    weights = [objective.weight for objective in objectives]
    sums = Sums()
    for pack, view in zip(packs, views, strict=True):
        output = engine(
            pack.features,
            pack.valid,
            lengths=pack.lengths,
            positions=pack.position_P,
            times=pack.time_P,
            masked=view.masked,
        )
        terms = [objective(output, view, gather, rivals=rivals) for objective in objectives]
        engine.backward(share_of_loss([term.total for term in terms], weights, counts, mesh.world_size))
        for objective, term in zip(objectives, terms, strict=True):
            sums.add(f"loss/{objective.name}", term.total, term.count)
            for name, (total, count) in term.metrics.items():
                sums.add(f"{objective.name}/{name}", total, count)
    means = reduce_metrics(sums.parts, list(sums.parts), mesh.device)
    losses = [means.get(f"loss/{objective.name}", 0.0) for objective in objectives]
    loss = (
        math.fsum(weight * value for weight, value in zip(weights, losses, strict=True))
        if all(math.isfinite(value) for value in losses)
        else math.nan
    )
    return Losses(loss=loss, means=means)


def objective_batch(pack: PackBatch, config: Config) -> ObjectiveBatch:
    """The pack as the objectives see it, with its masks drawn."""
    settings = config.objectives
    masked = draw_masks(
        pack.valid,
        pack.film_P,
        pack.shot_P,
        seed=config.seed,
        epoch=pack.epoch,
        pack=pack.number,
        ratio=settings.mask_ratio,
        span=settings.masked_shot.span,
    )
    return ObjectiveBatch(
        features=pack.features,
        valid=pack.valid,
        masked=masked,
        segment_P=pack.segment_P,
        film_P=pack.film_P,
        shot_P=pack.shot_P,
        position_P=pack.position_P,
    )
