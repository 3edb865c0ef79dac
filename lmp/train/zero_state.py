"""Reads and writes the training state of a DeepSpeed engine per parameter, by name, whatever the ZeRO stage.

The state of a parameter is its fp32 weight and both Adam moments. The private names of deepspeed 0.19.8 that this
needs are used in this file only; tests/train/test_zero_state.py guards them at every upgrade.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmp.train.engine import Engine

PARTS = ("weight", "exp_avg", "exp_avg_sq")
State = tuple[Tensor, Tensor, Tensor]


def names(engine: Engine) -> list[str]:
    """The parameters, in the order in which every rank walks them."""
    return [name for name, _ in engine.module.named_parameters()]


def export_state(engine: Engine) -> Iterator[tuple[str, State]]:
    """Walk (name, (weight, exp_avg, exp_avg_sq)), whole fp32 tensors on every rank. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.stage in (1, 2):
        _relink(engine)
    for name, parameter in engine.module.named_parameters():
        if engine.stage == 0:
            state = engine.optimizer.state[parameter]
            yield name, (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
        else:
            moments = [safe_get_full_optimizer_state(parameter, part) for part in PARTS[1:]]
            yield name, (safe_get_full_fp32_param(parameter), *moments)


def import_state(engine: Engine, read: Callable[[str], State], *, step: int) -> None:
    """Set weights, moments and Adam's step count. Collective.

    Args:
        engine: freshly built.
        read: gives the whole tensors of a parameter.
        step: number of optimizer steps that made them.
    """
    if engine.stage == 0:
        _import_plain(engine, read, step)
        return
    _allocate_moments(engine, step)
    if engine.stage == 3:
        _import_partitioned(engine, read)
    else:
        _import_fragments(engine, read)


def _import_plain(engine: Engine, read: Callable[[str], State], step: int) -> None:
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            weight, *moments = read(name)
            parameter.copy_(weight)
            state = engine.optimizer.state[parameter]
            state["step"] = torch.tensor(float(step), device=parameter.device)
            for part, value in zip(PARTS[1:], moments, strict=True):
                state[part] = value.to(parameter.device, torch.float32).clone()


def _import_fragments(engine: Engine, read: Callable[[str], State]) -> None:
    """Stages 1 and 2: each rank's flat partition holds fragments of parameters."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _relink(engine)
    for name, parameter in engine.module.named_parameters():
        weight, *moments = (part.to(engine.mesh.device) for part in read(name))
        safe_set_full_fp32_param(parameter, weight)
        for part, value in zip(PARTS[1:], moments, strict=True):
            safe_set_full_optimizer_state(parameter, value, part)
    engine.optimizer.update_lp_params()


def _import_partitioned(engine: Engine, read: Callable[[str], State]) -> None:
    """Stage 3: each rank holds an equal cut of every parameter, the last one padded."""
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    rank, size = engine.mesh.rank, engine.mesh.world_size
    for name, parameter in engine.module.named_parameters():
        weight, *moments = (part.to(engine.mesh.device) for part in read(name))
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                parameter.data.copy_(weight)
        cut = math.ceil(parameter.ds_numel / size)  # type: ignore[attr-defined]

        def own(whole: Tensor, cut: int = cut) -> Tensor:
            return F.pad(whole.flatten(), (0, cut * size - whole.numel()))[rank * cut : (rank + 1) * cut]

        safe_set_local_fp32_param(parameter, own(weight))
        for part, value in zip(PARTS[1:], moments, strict=True):
            safe_set_local_optimizer_state(parameter, own(value), part)


def _allocate_moments(engine: Engine, step: int) -> None:
    """Create Adam's state for every flat partition, so that no dummy step is needed."""
    for flat in _flat_partitions(engine):
        engine.optimizer.optimizer.state[flat] = {
            "step": torch.tensor(float(step), device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }


def _flat_partitions(engine: Engine) -> list[nn.Parameter]:
    attributes = (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    )
    return next(getattr(engine.optimizer, name) for name in attributes if hasattr(engine.optimizer, name))


def _relink(engine: Engine) -> None:
    """Connect parameters to their moments anew: with several groups DeepSpeed links the first one only."""
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
