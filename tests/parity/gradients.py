"""Whole gradients of a DeepSpeed engine, averaged over all ranks and not yet clipped, whatever the ZeRO stage.

The names of deepspeed 0.19.8 that this needs are used in this file only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmp.train.engine import Engine

Gradients = dict[str, Tensor]


@contextmanager
def captured(engine: Engine) -> Iterator[Gradients]:
    """Fills the mapping that it gives with fp32 gradients by name, at the engine's step inside the block. Collective.

    At the call of the optimizer's step every stage has reduced its gradients and has not clipped them yet.
    """
    optimizer = engine.deepspeed.optimizer
    original = optimizer.step
    gradients: Gradients = {}

    def step(*args: Any, **kwargs: Any) -> Any:
        names, parameters = zip(*engine.module.named_parameters(), strict=True)
        whole = {0: _plain, 3: _from_partitions}.get(engine.stage, _from_fragments)(parameters)
        gradients.update(zip(names, (gradient.detach().float().clone() for gradient in whole), strict=True))
        return original(*args, **kwargs)

    optimizer.step = step
    try:
        yield gradients
    finally:
        optimizer.step = original
    if not gradients:
        raise AssertionError("this deepspeed steps without its optimizer's `step`: adapt tests/parity/gradients.py")


def _plain(parameters: tuple[nn.Parameter, ...]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def _from_fragments(parameters: tuple[nn.Parameter, ...]) -> list[Tensor]:
    """Stages 1 and 2. `safe_get_full_grad` would give this rank's own gradient where stage 1 still holds it."""
    import deepspeed.comm

    # Each call leaves this rank's fragment among zeros; one sum over all parameters is quicker than one for each.
    with mock.patch.object(deepspeed.comm, "all_reduce"):
        own = [p.get_full_hp_grad() for p in parameters]  # type: ignore[attr-defined]
    flat = torch.cat([gradient.flatten() for gradient in own])
    dist.all_reduce(flat)
    parts = flat.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def _from_partitions(parameters: tuple[nn.Parameter, ...]) -> list[Tensor]:
    """Stage 3: each rank holds an equal cut of every parameter, the last one padded."""
    from deepspeed.utils import safe_get_local_grad

    own = [safe_get_local_grad(p).flatten().float() for p in parameters]
    ranks = [torch.cat(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, torch.cat(own))
    cuts = zip(*(rank.split([cut.numel() for cut in own]) for rank in ranks), strict=True)
    shapes = [p.ds_shape for p in parameters]  # type: ignore[attr-defined]
    return [torch.cat(cut)[: shape.numel()].view(shape) for cut, shape in zip(cuts, shapes, strict=True)]


def forget(engine: Engine) -> None:
    """Clear what stage 3 keeps: a parameter without a gradient would have that of the step before.

    A run never meets this, for all parameters of its objectives have a gradient at every step.
    """
    if engine.stage == 3:
        engine.optimizer.grad_partitions_flat_buffer.zero_()


def weights(engine: Engine) -> dict[str, Tensor]:
    """Whole parameters by name, as the forward sees them. Collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=engine.stage == 3):
        return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}
