"""One of two ranks that take steps in several scopes; test_step_scope.py judges what they find."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lmp.config import Config, merge, validate
from lmp.data.loader import PackBatch
from lmp.objectives import build_objectives
from lmp.parallel.mesh import Mesh, mesh
from lmp.parallel.ulysses import UlyssesAttention
from lmp.train.engine import Engine
from lmp.train.step import accumulate
from tests.objectives.reference import PlainEngine, make_config, make_model, make_pack, step_of
from tests.workers import save_findings

TOPOLOGIES = {"dp2": (2, 1), "sp2": (1, 2)}
CASES = {
    f"{loss}-{scope}-near{near}": {"loss": loss, "scope": scope, "exclude_near": near, "tile": 32}
    for loss, scope, near in (
        ("info_nce", "step", 2),
        ("sigmoid", "step", 2),
        ("info_nce", "film", 1),
        ("sigmoid", "pack", 2),
    )
}
STAGES = {"dp2": 3, "sp2": 1}
"""The ZeRO stage of each."""
DEEP = "sigmoid-step-near2"
"""The case that DeepSpeed's engine takes too."""
PACKS = 4


def own_packs(here: Mesh) -> list[PackBatch]:
    """This rank's shots of its packs, as the loader gives them."""
    each = PACKS // here.dp_size
    packs = [make_pack(number) for number in range(here.dp_rank * each, (here.dp_rank + 1) * each)]
    return [cut(pack, here) for pack in packs]


def cut(pack: PackBatch, here: Mesh) -> PackBatch:
    fields = {key: value for key, value in vars(pack).items() if key not in ("slot", "epoch", "number", "lengths")}
    run = {
        key: {name: x.chunk(here.sequence)[here.sp_rank] for name, x in value.items()}
        if isinstance(value, dict)
        else value.chunk(here.sequence)[here.sp_rank]
        for key, value in fields.items()
    }
    return replace(pack, **run)


def plain(here: Mesh, config: Config) -> dict[str, Any]:
    """Loss, metrics and the gradients averaged over all ranks, as DeepSpeed would."""
    model = make_model(config.objectives.loss)
    if here.sequence_group is not None:
        model.set_attention(UlyssesAttention(here.sequence_group))
    engine = PlainEngine(model, here)
    batch = step_of(own_packs(here))
    losses = accumulate(engine, build_objectives(config.objectives), batch, config, rivals=True)  # type: ignore[arg-type]
    gradients = engine.gradients()
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= here.world_size
    return {"loss": losses.loss, "means": losses.means, "gradients": gradients}


def deep(here: Mesh, config: Config) -> dict[str, Any]:
    """Loss and norm of the gradient of two steps, between which nothing changes (a rate of 0)."""
    model = make_model(config.objectives.loss)
    if here.sequence_group is not None:
        model.set_attention(UlyssesAttention(here.sequence_group))
    engine = Engine(model, config, here)
    objectives = build_objectives(config.objectives)
    found: dict[str, Any] = {"loss": [], "norm": []}
    for _ in range(2):
        found["loss"].append(accumulate(engine, objectives, step_of(own_packs(here)), config, rivals=False).loss)
        found["norm"].append(engine.step(0.0))
    engine.close()
    return found


def with_stage(config: Config, stage: int) -> Config:
    return validate(merge(config.model_dump(mode="json"), {"parallel": {"zero": stage}}), source="test")


def main(folder: Path) -> None:
    findings: dict[str, Any] = {}
    with mesh(1, timeout_minutes=2) as world:
        for topology, (_, sequence) in TOPOLOGIES.items():
            group = dist.group.WORLD if sequence > 1 else None
            here = replace(world, sequence=sequence, sequence_group=group)
            for name, objectives in CASES.items():
                findings[f"{topology}-{name}"] = plain(here, make_config(**objectives))
            findings[f"{topology}-zero"] = deep(here, with_stage(make_config(**CASES[DEEP]), STAGES[topology]))
    save_findings(folder, findings)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
