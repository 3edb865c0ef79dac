"""Moves training state between engines of every ZeRO stage on two ranks; test_zero_state.py judges it."""

from __future__ import annotations

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
from lmp.train.engine import Engine
from lmp.train.step import accumulate
from lmp.train.trainer import model_config
from lmp.train.zero_state import export_state, import_state
from tests.runs import config_of
from tests.train.cases import MOVES, PRIVATE, Kind
from tests.workers import save_findings

Exported = dict[str, tuple[torch.Tensor, ...]]


@dataclass
class Bench:
    """Builds engines and steps them through the same data."""

    shards: Path
    mesh: Mesh

    def __post_init__(self) -> None:
        self.index = FilmIndex.load([self.shards])
        plan = PlanSettings(seed=3, pack_shots=32, packs_per_step=4)
        with PackLoader(self.index, plan, dp_rank=self.mesh.dp_rank, dp_size=self.mesh.dp_size) as loader:
            self.batches = [next(loader) for _ in range(3)]

    def config(self, kind: Kind) -> Config:
        raw = config_of(self.shards, parallel={"zero": kind.stage}, train={"precision": kind.precision})
        return validate(raw, source="test")

    def engine(self, kind: Kind, *, seed: int) -> Engine:
        torch.manual_seed(seed)
        config = self.config(kind)
        return Engine(LmpForPretraining(model_config(config, self.index)), config, self.mesh)

    def step(self, engine: Engine, kind: Kind, number: int) -> None:
        config = self.config(kind)
        shape = model_config(config, self.index)
        objectives = build_objectives(config.objectives, target=shape.target, sources=shape.sources)
        accumulate(engine, objectives, self.batches[number], config, rivals=False)
        engine.step(1e-3)


def exported(engine: Engine) -> Exported:
    return {name: tuple(part.detach().float().clone() for part in state) for name, state in export_state(engine)}


def missing_names(engine: Engine, kind: Kind) -> list[str]:
    import deepspeed.utils

    where = {
        "deepspeed.utils": deepspeed.utils,
        "optimizer": engine.optimizer,
        "parameter": next(engine.module.parameters()),
    }
    return [f"{owner}.{name}" for owner, name in PRIVATE[kind] if not hasattr(where[owner], name)]


def main(folder: Path) -> None:
    findings: dict[str, Any] = {"missing": {}, "moves": {}}
    with mesh(1, timeout_minutes=2) as here:
        bench = Bench(folder / "shards", here)
        for source, targets in MOVES.items():
            engine = bench.engine(source, seed=0)
            findings["missing"][source.name] = missing_names(engine, source)
            for number in range(2):
                bench.step(engine, source, number)
            before = exported(engine)
            bench.step(engine, source, 2)
            after = exported(engine)
            engine.close()
            for target in targets:
                fresh = bench.engine(target, seed=1)
                import_state(fresh, before.__getitem__, step=2)
                moved = exported(fresh)
                bench.step(fresh, target, 2)
                stepped = exported(fresh)
                fresh.close()
                findings["moves"][source.name, target.name] = {
                    "before": before,
                    "moved": moved,
                    "after": after,
                    "stepped": stepped,
                }
    save_findings(folder, findings)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
