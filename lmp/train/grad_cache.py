"""A contrastive loss over all packs of a step, in the memory of one pack.

GradCache (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021, section 3): run
all packs without a graph and keep their embeddings only; form the loss of the step from these and its gradients by
them; run each pack again, with a graph, and send its share of those gradients through it. Exact, since the model has
no randomness and a pack's masks are a function of its number, so that both runs are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmp.objectives.base import Gather, ObjectiveBatch
from lmp.parallel.collectives import gather_rows
from lmp.parallel.mesh import Mesh

Embeddings = dict[str, Tensor]
"""What the objectives read of a model's output, by names such as "aligned.video"."""
_NAMED = ("predicted", "target", "aligned")
_SHARED = ("scale", "bias")


@dataclass
class StepOutput:
    """An `ObjectiveOutput` of all this rank's packs of the step, laid end to end."""

    predicted: Mapping[str, Tensor]
    target: Mapping[str, Tensor]
    aligned: Mapping[str, Tensor]
    reconstructed: Tensor
    scale: Mapping[str, Tensor]
    bias: Mapping[str, Tensor] | None


def embeddings(output: Any) -> Embeddings:
    """Takes apart the model's output for one pack."""
    fields = {field: getattr(output, field) or {} for field in (*_NAMED, *_SHARED)}
    parts = {f"{field}.{name}": x for field, named in fields.items() for name, x in named.items()}
    return {**parts, "reconstructed": output.reconstructed}


def leaves(packs: Sequence[Embeddings]) -> Embeddings:
    """The embeddings of all packs end to end, as the beginning of a new graph; what packs share is there once."""
    joined = {
        name: packs[-1][name] if _shared(name) else torch.cat([pack[name].detach() for pack in packs])
        for name in packs[-1]
    }
    return {name: x.detach().requires_grad_() for name, x in joined.items()}


def step_output(parts: Embeddings) -> StepOutput:
    """Puts together again what `embeddings` took apart."""
    fields: dict[str, dict[str, Tensor]] = {field: {} for field in (*_NAMED, *_SHARED)}
    for key, x in parts.items():
        field, _, name = key.partition(".")
        if name:
            fields[field][name] = x
    bias = fields.pop("bias") or None
    return StepOutput(**fields, reconstructed=parts["reconstructed"], bias=bias)


def gradients(loss: Tensor, of: Embeddings) -> dict[str, Tensor]:
    """The gradients of `loss` by the embeddings; what it does not depend on is left out. Collective."""
    found = torch.autograd.grad(loss, list(of.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(of, found, strict=True) if gradient is not None}


def surrogate(pack: Embeddings, by: Mapping[str, Tensor], *, place: int, packs: int) -> Tensor:
    """A scalar whose gradient is this pack's share of the step's: the sum of embedding * gradient.

    Args:
        pack: the pack's embeddings, with their graph.
        by: the gradients by all packs' embeddings.
        place: number of the pack among this rank's.
        packs: how many these are; what they share gets an equal part from each.
    """
    parts = [
        (pack[name] * (gradient / packs if _shared(name) else gradient.chunk(packs)[place])).sum()
        for name, gradient in by.items()
    ]
    return torch.stack(parts).sum()


def gather_step(mesh: Mesh, packs: int) -> Gather:
    """How objectives see all packs of the step from a rank's runs of `packs` of them.

    The order is data rank, pack, sequence rank, so that every pack lies in one piece.
    """
    if mesh.world_size == 1:
        return lambda local: local

    def gather(local: Tensor) -> Tensor:
        group = dist.group.WORLD
        assert group is not None
        whole = gather_rows(local, group)
        return whole.view(mesh.dp_size, mesh.sequence, packs, -1, *local.shape[1:]).transpose(1, 2).flatten(0, 3)

    return gather


def step_batch(views: Sequence[ObjectiveBatch], mesh: Mesh, *, pack_shots: int) -> ObjectiveBatch:
    """This rank's runs of its packs as one, with segments numbered over the whole step (with gaps).

    Args:
        views: one per pack, equally many on every data-parallel rank.
        mesh: where this process stands.
        pack_shots: P, no fewer than the segments of a pack.
    """
    first = mesh.dp_rank * len(views)

    def end_to_end(field: str) -> dict[str, Tensor]:
        return {name: torch.cat([getattr(view, field)[name] for view in views]) for name in views[0].features}

    return ObjectiveBatch(
        features=end_to_end("features"),
        valid=end_to_end("valid"),
        masked=end_to_end("masked"),
        segment_P=torch.cat([view.segment_P + (first + n) * pack_shots for n, view in enumerate(views)]),
        film_P=torch.cat([view.film_P for view in views]),
        shot_P=torch.cat([view.shot_P for view in views]),
        position_P=torch.cat([view.position_P for view in views]),
    )


def _shared(name: str) -> bool:
    return name.partition(".")[0] in _SHARED
