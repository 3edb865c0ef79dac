"""From a run's configuration to its data and the model's shape, and the agreement of all ranks on the data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from lmp.config import Config
from lmp.data.cache import ShardCache
from lmp.data.index import FilmIndex
from lmp.data.leave_out import LeaveOut
from lmp.data.plan import PLAN_VERSION, PlanSettings, passes_for_shares
from lmp.data.stream import Cursor, Stream
from lmp.errors import UserError
from lmp.model import LmpConfig
from lmp.parallel.mesh import Mesh


def load_index(config: Config) -> FilmIndex:
    """The films of data.train but those of data.leave_out.

    Raises:
        UserError: shards or lists are missing or damaged.
    """
    cache = config.data.cache
    kept = ShardCache(Path(cache.folder), int(cache.gib * 2**30)) if cache.folder else None
    leave_out = LeaveOut.read(config.data.leave_out)
    return FilmIndex.load([entry.shards for entry in config.data.train], cache=kept, leave_out=leave_out)


def plan_settings(config: Config, index: FilmIndex) -> PlanSettings:
    """What of a configuration decides the plan; weights become passes of the index's folders."""
    data = config.data
    if data.train[0].weight is not None:
        shots = [int(index.shots[index.folder_of == n].sum()) for n in range(len(data.train))]
        passes = passes_for_shares([entry.weight or 0.0 for entry in data.train], shots)
    else:
        passes = tuple(1.0 if entry.passes is None else entry.passes for entry in data.train)
    return PlanSettings(
        seed=config.seed,
        pack_shots=data.pack_shots,
        packs_per_step=data.packs_per_step,
        window_shots=data.window_shots,
        block_shards=data.block_shards,
        passes=passes,
    )


def model_shape(config: Config, modalities: dict[str, dict[str, int]]) -> LmpConfig:
    """The model of a run for modalities NAME -> tokens and width.

    Raises:
        ValueError: they do not fit the model section.
    """
    return LmpConfig(modalities=modalities, contrastive_loss=config.objectives.loss, **config.model.model_dump())


def data_facts(index: FilmIndex, settings: PlanSettings) -> dict[str, Any]:
    """The data of a run, for a checkpoint's manifest."""
    encoders: dict[str, Any] = {}
    for manifest in index.manifests:
        encoders.update(manifest["encoders"])
    return {
        "digest": index.digest,
        "plan_version": PLAN_VERSION,
        "plan": _plan_facts(settings),
        "films": len(index),
        "shots": int(index.shots.sum()),
        "left_out": index.left_out,
        "encoders": encoders,
        "modalities": _modality_facts(index),
    }


def stream_change(facts: dict[str, Any], index: FilmIndex, settings: PlanSettings) -> str | None:
    """How the steps of these films and settings differ from those that a checkpoint was made from; None: not at all.

    Args:
        facts: data_facts as the checkpoint has them.

    Raises:
        UserError: the films have other modalities, so that the model does not fit.
    """
    if facts["modalities"] != _modality_facts(index):
        raise UserError(
            f"the run was trained on modalities {facts['modalities']}, the shards have {_modality_facts(index)}",
            remedy="give shards of the same encoders",
        )
    if facts["digest"] != index.digest:
        left, leaves = _left_films(facts.get("left_out")), _left_films(index.left_out)
        if left != leaves:
            return f"left out {left}, data.leave_out now leaves out {leaves}"
        return f"was trained on other data (digest {facts['digest'][:12]}, now {index.digest[:12]})"
    if facts["plan_version"] != PLAN_VERSION:
        return f"follows version {facts['plan_version']} of the plan, this lmp makes version {PLAN_VERSION}"
    before, now = facts["plan"], _plan_facts(settings)
    changed = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    return f"follows another plan: {'; '.join(changed)}" if changed else None


def check_same_stream(index: FilmIndex, stream: Stream, cursor: Cursor, mesh: Mesh) -> None:
    """Hold data and plan of all ranks against each other. Collective.

    Raises:
        UserError: on every rank, when two of them see different data or plan the same step otherwise.
    """
    if mesh.world_size == 1:
        return
    found: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(found, (index.digest, stream.fingerprint(cursor)))
    differing = np.flatnonzero([facts != found[0] for facts in found]).tolist()
    if differing:
        raise UserError(
            f"rank {differing[0]} reads other data than rank 0 (digest {found[differing[0]][0][:12]}, "
            f"step {found[differing[0]][1]}; rank 0: {found[0][0][:12]}, {found[0][1]})",
            remedy="give every node the same shards and the same version of lmp and NumPy",
        )


def _left_films(left_out: dict[str, Any] | None) -> str:
    if left_out is None:
        return "no films"
    return f"{left_out['films']} films by {left_out['ids']} ids (digest {left_out['digest'][:12]})"


def _plan_facts(settings: PlanSettings) -> dict[str, Any]:
    return {**asdict(settings), "passes": list(settings.passes)}


def _modality_facts(index: FilmIndex) -> dict[str, Any]:
    return {name: {"tokens": m.tokens, "width": m.width, "dtype": m.dtype} for name, m in index.modalities.items()}
