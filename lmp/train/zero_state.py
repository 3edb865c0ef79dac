"""The training state of a DeepSpeed engine as this rank holds it, whatever the ZeRO stage.

The state of a parameter is its fp32 weight and both Adam moments. A rank holds pieces of it: stretches of the flattened
parameter, as live views of the engine's own memory, so nothing is communicated to save and nothing gathered to
restore. The private names of deepspeed 0.19.8 that this needs are used in this file only; test_zero_state.py guards
them at every upgrade.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lmp.train.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("weight", *MOMENTS)


@dataclass(frozen=True)
class Piece:
    """A stretch of one part of a flattened parameter.

    Attributes:
        name: of the parameter.
        part: one of PARTS.
        offset: index of the first value in the flattened parameter.
        values: [n], a live view; fp32 but for frozen weights of a bf16 run.
        copies: ranks that hold this same piece.
    """

    name: str
    part: str
    offset: int
    values: Tensor
    copies: int

    @property
    def stop(self) -> int:
        return self.offset + self.values.numel()


def shapes(engine: Engine) -> dict[str, list[int]]:
    """The shape of every parameter, by name."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def trained(engine: Engine) -> set[str]:
    """The parameters that have moments; the others are frozen."""
    return {name for name, p in engine.module.named_parameters() if p.requires_grad}


def held(engine: Engine) -> list[Piece]:
    """All that this rank holds. Not collective."""
    _allocate_moments(engine)
    if engine.stage in (1, 2):
        _relink(engine)
    return [piece for name, p in engine.module.named_parameters() for piece in _pieces(engine, name, p)]


def owned(engine: Engine) -> list[Piece]:
    """What this rank saves: its pieces, and an equal cut of those that every rank holds. Not collective."""
    pieces = []
    for piece in held(engine):
        if piece.copies > 1:
            start, stop = _cut(piece.values.numel(), engine.mesh.rank, engine.mesh.world_size)
            piece = replace(piece, offset=piece.offset + start, values=piece.values[start:stop], copies=1)
        if piece.values.numel():
            pieces.append(piece)
    return pieces


def publish(engine: Engine) -> None:
    """Make the weights that the model computes with follow the pieces, after these were set. Collective."""
    optimizer = engine.optimizer
    if engine.stage in (1, 2):
        optimizer.update_lp_params()
    elif engine.stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters stay gathered between steps; these copies are old now.
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)


def optimizer_step(engine: Engine) -> int:
    """Adam's count of the updates that it has made."""
    _allocate_moments(engine)
    return int(next(iter(_moments(engine)))[1]["step"])


def set_optimizer_step(engine: Engine, step: int) -> None:
    """Set Adam's count, which corrects the bias of its moments."""
    _allocate_moments(engine)
    for values, state in _moments(engine):
        state["step"] = torch.tensor(float(step), device=values.device)


def _pieces(engine: Engine, name: str, parameter: nn.Parameter) -> Iterator[Piece]:
    mesh = engine.mesh
    if not parameter.requires_grad and engine.stage < 3:
        yield Piece(name, "weight", 0, _flat(parameter, name), mesh.world_size)
    elif engine.stage == 0:
        state = engine.optimizer.state[parameter]
        for part in PARTS:
            values = parameter if part == "weight" else state[part]
            yield Piece(name, part, 0, _flat(values, name), mesh.world_size)
    elif engine.stage < 3:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            for part in PARTS:
                values = mapping.get_hp_fragment(None if part == "weight" else part)
                yield Piece(name, part, mapping.lp_fragment_address.start, values.detach(), 1)
    else:
        # Each rank has an equal cut of every parameter, the last ones padded.
        start, stop = _cut(parameter.ds_numel, mesh.rank, mesh.world_size)  # type: ignore[attr-defined]
        for part in PARTS if parameter.requires_grad else PARTS[:1]:
            values = _partition(engine, parameter, part)
            if stop > start:
                yield Piece(name, part, start, values[: stop - start], 1)


def _partition(engine: Engine, parameter: nn.Parameter, part: str) -> Tensor:
    if not parameter.requires_grad:
        return parameter.ds_tensor.detach()  # type: ignore[attr-defined]
    key = None if part == "weight" else part
    values, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, False, key)
    return values.detach()


def _cut(count: int, rank: int, ranks: int) -> tuple[int, int]:
    size = math.ceil(count / ranks)
    return min(rank * size, count), min((rank + 1) * size, count)


def _flat(values: Tensor, name: str) -> Tensor:
    if not values.is_contiguous():
        raise RuntimeError(f"{name} is not contiguous in memory, so it has no flat view")
    return values.detach().view(-1)


def _moments(engine: Engine) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """The tensors that Adam updates, and its state of each."""
    if engine.stage == 0:
        state = engine.optimizer.state
        owners: list[Tensor] = [p for p in engine.module.parameters() if p.requires_grad]
    else:
        state = engine.optimizer.optimizer.state
        flat = (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        )
        owners = next(getattr(engine.optimizer, name) for name in flat if hasattr(engine.optimizer, name))
    for owner in owners:
        yield owner, state[owner]


def _allocate_moments(engine: Engine) -> None:
    """Create Adam's state where no step has created it."""
    for values, state in _moments(engine):
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0, device=values.device)
            for part in MOMENTS:
                state[part] = torch.zeros_like(values, requires_grad=False)


def _relink(engine: Engine) -> None:
    """Connect parameters to their moments anew: with several groups DeepSpeed links the first one only."""
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
