"""One optimizer step: masks, forward, objectives, backward, update, and the sums for its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lmp.config import Config
from lmp.data.loader import PackBatch, StepBatch
from lmp.objectives.base import Gather, Objective, ObjectiveBatch, Term
from lmp.objectives.masking import draw_masks
from lmp.parallel.collectives import gather_rows
from lmp.parallel.contract import global_counts, reduce_metrics, share_of_loss
from lmp.parallel.mesh import Mesh
from lmp.train import grad_cache
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

    def add_terms(self, objectives: Sequence[Objective], terms: Sequence[Term]) -> None:
        """One term per objective: its loss and its metrics."""
        for objective, term in zip(objectives, terms, strict=True):
            self.add(f"loss/{objective.name}", term.total, term.count)
            for name, (total, count) in term.metrics.items():
                self.add(f"{objective.name}/{name}", total, count)


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
    engine.watch.enter("counting")
    packs = [pack.to(mesh.device) for pack in batch.packs]
    views = [objective_batch(pack, config) for pack in packs]
    work = whole_step if config.objectives.scope == "step" else pack_by_pack
    sums = work(engine, objectives, packs, views, rivals=rivals)
    weights = [objective.weight for objective in objectives]
    engine.watch.enter("summing", micro_batch=0)
    means = reduce_metrics(sums.parts, list(sums.parts), mesh.device)
    losses = [means.get(f"loss/{objective.name}", 0.0) for objective in objectives]
    loss = (
        math.fsum(weight * value for weight, value in zip(weights, losses, strict=True))
        if all(math.isfinite(value) for value in losses)
        else math.nan
    )
    return Losses(loss=loss, means=means)


def pack_by_pack(
    engine: Engine,
    objectives: Sequence[Objective],
    packs: Sequence[PackBatch],
    views: Sequence[ObjectiveBatch],
    *,
    rivals: bool,
) -> Sums:
    """Forward and backward where the candidates are those of a pack or of a film; `views` hold the packs' masks."""
    mesh = engine.mesh
    gather = gather_over(mesh)
    # The normaliser needs masks and valid bits only, so it is known before the first backward.
    counts = global_counts(
        [torch.stack([objective.count(view, gather) for objective in objectives]) for view in views],
        mesh.device,
    )
    weights = [objective.weight for objective in objectives]
    sums = Sums()
    for pack, view in zip(packs, views, strict=True):
        output = forward(engine, pack, view)
        terms = [objective(output, view, gather, rivals=rivals) for objective in objectives]
        engine.backward(share_of_loss([term.total for term in terms], weights, counts, mesh.world_size))
        sums.add_terms(objectives, terms)
    return sums


def whole_step(
    engine: Engine,
    objectives: Sequence[Objective],
    packs: Sequence[PackBatch],
    views: Sequence[ObjectiveBatch],
    *,
    rivals: bool,
) -> Sums:
    """Forward and backward where the candidates are those of the whole step, over all ranks; see grad_cache.py."""
    mesh = engine.mesh
    last = len(packs) - 1
    parts = []
    for place, (pack, view) in enumerate(zip(packs, views, strict=True)):
        # The last pack keeps its graph: it is the first to go back, so it need not run again.
        with torch.set_grad_enabled(place == last):
            parts.append(grad_cache.embeddings(forward(engine, pack, view)))
    kept, embeddings = parts[last], grad_cache.leaves(parts)
    del parts
    view = grad_cache.step_batch(views, mesh, pack_shots=sum(packs[0].lengths))
    gather = grad_cache.gather_step(mesh, len(packs))
    counts = global_counts([torch.stack([objective.count(view, gather) for objective in objectives])], mesh.device)
    output = grad_cache.step_output(embeddings)
    terms = [objective(output, view, gather, rivals=rivals) for objective in objectives]
    weights = [objective.weight for objective in objectives]
    loss = share_of_loss([term.total for term in terms], weights, counts, mesh.world_size)
    by = grad_cache.gradients(loss, embeddings)
    sums = Sums()
    sums.add_terms(objectives, terms)
    del output, terms, loss, embeddings
    engine.backward(grad_cache.surrogate(kept, by, place=last, packs=len(packs)))
    del kept
    for place in range(last):
        again = grad_cache.embeddings(forward(engine, packs[place], views[place]))
        engine.backward(grad_cache.surrogate(again, by, place=place, packs=len(packs)))
    return sums


def forward(model: Callable[..., Any], pack: PackBatch, view: ObjectiveBatch) -> Any:
    """The output of a model, or of an engine that holds one, for a pack with the masks of `view`."""
    return model(
        pack.features,
        pack.valid,
        lengths=pack.lengths,
        positions=pack.position_P,
        times=pack.time_P,
        masked=view.masked,
    )


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
