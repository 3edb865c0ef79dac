"""Two steps in every memory mode on ranks that share each pack; test_memory.py judges them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from lmp.config import Config, validate
from lmp.data.index import FilmIndex
from lmp.data.loader import PackLoader, StepBatch
from lmp.data.plan import PlanSettings
from lmp.model import LmpForPretraining
from lmp.objectives import build_objectives
from lmp.parallel.memory import apply_memory
from lmp.parallel.mesh import Mesh, mesh
from lmp.parallel.ulysses import UlyssesAttention
from lmp.train.checkpoint import restore
from lmp.train.engine import Engine
from lmp.train.step import accumulate
from lmp.train.trainer import model_config
from tests.parallel.memory_cases import NEAR, REFERENCE, SAME, Case, CountOperators
from tests.runs import config_of
from tests.train.states import save, whole_state
from tests.workers import save_findings


def batches(index: FilmIndex, here: Mesh) -> list[StepBatch]:
    plan = PlanSettings(seed=3, pack_shots=32, packs_per_step=2)
    ranks = {"dp_rank": here.dp_rank, "dp_size": here.dp_size, "sp_rank": here.sp_rank, "sp_size": here.sequence}
    with PackLoader(index, plan, **ranks) as loader:
        return [next(loader) for _ in range(2)]


def build(case: Case, config: Config, index: FilmIndex, here: Mesh, *, seed: int) -> Engine:
    torch.manual_seed(seed)
    model = LmpForPretraining(model_config(config, index))
    assert here.sequence_group is not None
    model.set_attention(UlyssesAttention(here.sequence_group))
    apply_memory(model, case.settings)
    return Engine(model, config, here)


def train(case: Case, index: FilmIndex, steps: list[StepBatch], here: Mesh, folder: Path) -> dict[str, Any]:
    """Losses, norms and state after the steps, and how often they ran which operators."""
    extra = {"zero_optimization": {kind: {"device": "cpu"} for kind in case.host}} if case.host else {}
    sections = {"parallel": {"zero": case.zero, "sequence": here.sequence, "deepspeed": extra}}
    config = validate(config_of(Path("unused"), **sections), source="test")
    shape = model_config(config, index)
    objectives = build_objectives(config.objectives, target=shape.target, sources=shape.sources)
    engine = build(case, config, index, here, seed=0)
    losses, norms = [], []
    with CountOperators() as operators:
        for batch in steps:
            losses.append(accumulate(engine, objectives, batch, config, rivals=False).loss)
            norms.append(engine.step(1e-3))
    found = {"losses": losses, "norms": norms, "state": whole_state(engine), "calls": dict(operators.calls)}
    if case.host:
        saved = save(engine, folder / case.name, step=len(steps))
    engine.close()
    if case.host:
        fresh = build(case, config, index, here, seed=1)
        restore(saved, fresh)
        found["moved"] = whole_state(fresh)
        fresh.close()
    return found


def main(folder: Path) -> None:
    index = FilmIndex.load([folder / "shards"])
    with mesh(2, timeout_minutes=2) as here:
        steps = batches(index, here)
        save_findings(
            folder, {case.name: train(case, index, steps, here, folder) for case in (REFERENCE, *SAME, *NEAR)}
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
