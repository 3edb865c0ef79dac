"""One rank that tries, in each kind of engine, whether an update can be left out: python -m ... FOLDER."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch

from lmp.config import Config
from lmp.data.loader import PackLoader
from lmp.parallel.mesh import mesh
from lmp.train.data import load_index
from lmp.train.engine import Engine
from lmp.train.run_folder import RunFolder
from lmp.train.step import accumulate
from lmp.train.trainer import Start
from lmp.train.zero_state import held, optimizer_step
from tests.runs import config_of
from tests.train.cases import Kind
from tests.train.gate_cases import KINDS
from tests.workers import save_findings

State = dict[tuple[str, str], torch.Tensor]


def config_for(folder: Path, kind: Kind) -> Config:
    parallel: dict[str, Any] = {"zero": kind.stage}
    if kind.offload:
        parallel["deepspeed"] = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    made = config_of(folder.parent / "shards", parallel=parallel, train={"precision": kind.precision})
    return Config.model_validate(made)


def look(engine: Engine) -> tuple[State, State, int]:
    """The fp32 state, the weights that the model computes with, and Adam's count."""
    pieces = {(piece.name, piece.part): piece.values.clone() for piece in held(engine)}
    with torch.no_grad():
        # Under ZeRO 3 a parameter itself is there only while it is used, its cut always.
        computed = {name: getattr(p, "ds_tensor", p) for name, p in engine.module.named_parameters()}
        weights = {(name, ""): values.data.clone() for name, values in computed.items()}
    return pieces, weights, optimizer_step(engine)


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def unchanged(before: tuple[State, State, int], after: tuple[State, State, int]) -> bool:
    return same(before[0], after[0]) and same(before[1], after[1]) and before[2] == after[2]


def main() -> None:
    folder = Path(sys.argv[1])
    findings: dict[str, Any] = {}
    with mesh(1, timeout_minutes=3) as here:
        for kind in KINDS:
            config = config_for(folder, kind)
            index = load_index(config)
            start = Start(config, RunFolder(folder / kind.name), index, here)
            engine = start.engine
            asked: list[float] = []

            def refuse(norm: float, asked: list[float] = asked) -> bool:
                asked.append(norm)
                return False

            with PackLoader(index, start.plan, dp_rank=here.dp_rank, dp_size=here.dp_size, threads=0) as loader:

                def gradients(
                    scale: float = 1.0, engine: Engine = engine, start: Start = start, loader: PackLoader = loader
                ) -> None:
                    if scale == 1.0:
                        accumulate(engine, start.objectives, next(loader), start.config, rivals=False)
                        return
                    backward = engine.deepspeed.backward
                    engine.deepspeed.backward = lambda loss: backward(loss * scale)
                    accumulate(engine, start.objectives, next(loader), start.config, rivals=False)
                    engine.deepspeed.backward = backward

                found: dict[str, Any] = {}
                first = look(engine)
                gradients()
                found["norm"] = engine.step(1e-2, refuse)
                found["first_refused"] = unchanged(first, look(engine)) and not engine.made
                gradients()
                engine.step(1e-2)
                second = look(engine)
                found["made"] = engine.made and second[2] == 1 and not same(first[0], second[0])
                gradients()
                engine.step(1e-2, refuse)
                found["refused"] = unchanged(second, look(engine)) and not engine.made
                gradients(math.nan if here.rank == 0 else 1.0)
                found["nan_norm"] = engine.step(1e-2)
                found["nan_refused"] = unchanged(second, look(engine)) and not engine.made
                gradients()
                engine.step(1e-2)
                third = look(engine)
                found["goes_on"] = engine.made and third[2] == 2 and not same(second[1], third[1])
                found["finite"] = all(bool(values.isfinite().all()) for values in third[0].values())
                found["asked"] = asked
            engine.close()
            findings[kind.name] = found
    save_findings(folder, findings)


if __name__ == "__main__":
    main()
