"""The training state of engines in tests: looked at whole, and saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmp.config import CheckpointConfig
from lmp.data.stream import Cursor
from lmp.train.checkpoint import Progress, write_manifest
from lmp.train.checkpoint_writer import Snapshot, file_name
from lmp.train.checkpointer import Checkpointer
from lmp.train.engine import Engine
from lmp.train.run_folder import RunFolder
from lmp.train.zero_state import PARTS, Piece, owned, shapes


def whole_state(engine: Engine) -> dict[str, tuple[Tensor, ...]]:
    """Weight and moments of every parameter, whole, on every rank; a value that no rank owns is NaN. Collective."""
    pieces = [(p.name, p.part, p.offset, p.values.float().clone()) for p in owned(engine)]
    told: list[Any] = [None] * engine.mesh.world_size
    dist.all_gather_object(told, pieces)
    state = {name: tuple(torch.full(shape, torch.nan) for _ in PARTS) for name, shape in shapes(engine).items()}
    for name, part, offset, values in (piece for some in told for piece in some):
        state[name][PARTS.index(part)].view(-1)[offset : offset + len(values)] = values
    return state


def save(engine: Engine, run: Path, *, step: int) -> Path:
    """Save as the checkpoint of a step. Collective."""
    progress = Progress(step=step, cursor=Cursor(epoch=0, step=step, carried=0), shots_seen=0, tokens_seen=0)
    with Checkpointer(RunFolder(run), engine, CheckpointConfig(keep=99), {}) as saver:
        saver.save_last(progress)
        assert saver.newest is not None
        return saver.newest


def write_weights(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """A checkpoint of weights without moments, in two files."""
    shares = []
    for rank in range(2):
        pieces = [Piece(name, "weight", 0, weights[name].reshape(-1), 1) for name in sorted(weights)[rank::2]]
        snapshot = Snapshot(torch.device("cpu"))
        snapshot.take(pieces)
        shares.append(snapshot.write(path / file_name(rank, 2)))
    state = {"shapes": {name: list(weight.shape) for name, weight in weights.items()}, "trained": set()}
    write_manifest(path, shares, state, facts)
