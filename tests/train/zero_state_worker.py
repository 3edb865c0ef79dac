"""Moves training state between engines by way of checkpoints; test_zero_state.py says which, and judges it."""

from __future__ import annotations

import json
import operator
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmp.config import Config, validate
from lmp.data.index import FilmIndex
from lmp.data.loader import PackLoader
from lmp.data.plan import PlanSettings
from lmp.model import LmpForPretraining
from lmp.objectives import build_objectives
from lmp.parallel.mesh import Mesh, mesh
from lmp.parallel.ulysses import UlyssesAttention
from lmp.train.checkpoint import folder_of, restore
from lmp.train.engine import Engine
from lmp.train.run_folder import RunFolder
from lmp.train.step import accumulate
from lmp.train.trainer import model_config
from tests.runs import config_of
from tests.train.cases import ON_TWO, ONE, PRIVATE, TWO, Action, Kind, goes_on
from tests.train.states import save, whole_state
from tests.workers import save_findings

STEPS = 2


@dataclass
class Bench:
    """Builds engines and steps them through the same data."""

    shards: Path
    mesh: Mesh

    def __post_init__(self) -> None:
        self.index = FilmIndex.load([self.shards])
        here, plan = self.mesh, PlanSettings(seed=3, pack_shots=32, packs_per_step=2)
        place = {"dp_rank": here.dp_rank, "dp_size": here.dp_size, "sp_rank": here.sp_rank, "sp_size": here.sequence}
        with PackLoader(self.index, plan, **place) as loader:
            self.batches = [next(loader) for _ in range(STEPS + 1)]

    def config(self, kind: Kind) -> Config:
        extra = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}} if kind.offload else {}
        parallel = {"zero": kind.stage, "sequence": self.mesh.sequence, "deepspeed": extra}
        return validate(config_of(self.shards, parallel=parallel, train={"precision": kind.precision}), source="test")

    def engine(self, kind: Kind, *, seed: int) -> Engine:
        torch.manual_seed(seed)
        config = self.config(kind)
        model = LmpForPretraining(model_config(config, self.index))
        if self.mesh.sequence_group is not None:
            model.set_attention(UlyssesAttention(self.mesh.sequence_group))
        if kind.frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("contextual.audio" not in name)
        return Engine(model, config, self.mesh)

    def step(self, engine: Engine, kind: Kind, number: int) -> None:
        config = self.config(kind)
        shape = model_config(config, self.index)
        objectives = build_objectives(config.objectives, target=shape.target, sources=shape.sources)
        accumulate(engine, objectives, self.batches[number], config, rivals=False)
        engine.step(1e-3)

    def do(self, action: Action, folder: Path, *, save_it: bool) -> dict[str, Any]:
        """Carry out an action; what it finds."""
        kind = action.kind
        engine = self.engine(kind, seed=1 if action.start else 0)
        if action.start:
            restore(folder_of(RunFolder(folder / action.start), STEPS), engine)
        else:
            for number in range(STEPS):
                self.step(engine, kind, number)
        state = whole_state(engine)
        if save_it:
            save(engine, folder / action.name, step=STEPS)
        missing = missing_names(engine, kind)
        found = {"state": state, "missing": missing}
        if goes_on(action):
            self.step(engine, kind, STEPS)
            found["after"] = whole_state(engine)
        engine.close()
        return found


def missing_names(engine: Engine, kind: Kind) -> list[str]:
    parameters = list(engine.module.parameters())
    mappings = [getattr(p, "_hp_mapping", None) for p in parameters]
    where = {
        "optimizer": engine.optimizer,
        "parameter": parameters[0],
        "mapping": next((mapping for mapping in mappings if mapping is not None), None),
    }
    return [f"{owner}.{name}" for owner, name in PRIVATE.get(kind, []) if not _has(where[owner], name)]


def _has(owner: Any, name: str) -> bool:
    try:
        operator.attrgetter(name)(owner)
    except AttributeError:
        return False
    return True


def main(folder: Path) -> None:
    told = json.loads((folder / "actions.json").read_text())
    actions = [Action(Kind(*kind), start, ranks) for kind, start, ranks in told]
    sequence = 2 if "sp2" in folder.name else 1
    with mesh(sequence, timeout_minutes=5) as here:
        bench = Bench(folder.parent / "shards", here)
        checkpoints = folder.parent / "checkpoints"
        starts = {action.start for action in (*ON_TWO, *ONE, *TWO)}
        found = {action.name: bench.do(action, checkpoints, save_it=action.name in starts) for action in actions}
    # All ranks see the same whole state.
    save_findings(folder, found if here.main else {})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
