"""Runs the parity grid: every topology, stage and case, one after another; test_grid.py judges what the ranks save."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing import start_processes

import lmp.train.step
from lmp.config import Config
from lmp.data.loader import PackBatch, StepBatch
from lmp.data.stream import Cursor
from lmp.objectives import build_objectives
from lmp.parallel.collectives import gather_plain
from lmp.parallel.mesh import Mesh, mesh
from lmp.parallel.ulysses import UlyssesAttention
from lmp.train.engine import Engine
from lmp.train.step import accumulate
from tests.parity.cases import (
    CASES,
    CONTROL,
    HALF,
    HALF_CASES,
    HALF_POSITIONS,
    HALF_STAGES,
    LR,
    SHOTS,
    SIGMOID_CASES,
    SIGMOID_STAGES,
    STAGES,
    TOPOLOGIES,
    Case,
    WholePack,
    config_of,
    dealt,
    model_config,
    model_of,
    packs_of,
    positions_of,
)
from tests.parity.gradients import captured, forget, weights
from tests.runs import free_port

Found = dict[str, Any]


@dataclass
class Bench:
    """An engine and the cases that it takes steps with, all of one topology and stage."""

    mesh: Mesh
    configs: dict[Case, Config]

    def __post_init__(self) -> None:
        config = next(iter(self.configs.values()))
        model = model_of(model_config(config))
        if self.mesh.sequence_group is not None:
            model.set_attention(UlyssesAttention(self.mesh.sequence_group))
        self.engine = Engine(model, config, self.mesh)

    def step(self, case: Case, *, lr: float = 0.0) -> Found:
        """One optimizer step: its loss, its gradients before clipping, their norm. A rate of 0 leaves the weights."""
        config = self.configs[case]
        shape = model_config(config)
        packs = packs_of(case, positions=config.model.positions, count=config.data.packs_per_step)
        own = dealt(packs, self.mesh.dp_rank, self.mesh.dp_size)
        batch = StepBatch(Cursor(), [self._slice(pack) for pack in own])
        objectives = build_objectives(config.objectives, target=shape.target, sources=shape.sources)
        forget(self.engine)
        losses = accumulate(self.engine, objectives, batch, config, rivals=False)
        with captured(self.engine) as gradients:
            norm = self.engine.step(lr)
        if not self.mesh.main:
            gradients.clear()  # they are the same on every rank, and that the weights stay so is looked at
        return {"loss": losses.loss, "losses": losses.by_objective(), "gradients": gradients, "norm": norm}

    def _slice(self, pack: WholePack) -> PackBatch:
        """This rank's shots of a pack, as the loader gives them."""
        rows = SHOTS // self.mesh.sequence
        own = slice(self.mesh.sp_rank * rows, (self.mesh.sp_rank + 1) * rows)
        return PackBatch(
            slot=pack.number,
            epoch=0,
            number=pack.number,
            lengths=pack.lengths,
            features={name: x[own] for name, x in pack.features.items()},
            valid={name: x[own] for name, x in pack.valid.items()},
            film_P=pack.film_P[own],
            shot_P=pack.shot_P[own],
            position_P=pack.position_P[own],
            segment_P=pack.segment_P[own],
            time_P=pack.time_P[own],
        )


def exact(here: Mesh, topology: str, stage: int) -> Found:
    """All cases in fp32, and last of all one step that moves the weights."""
    positions = positions_of(topology, stage)
    options = {"positions": positions, "stage": stage, "topology": topology}
    bench = Bench(here, {case: config_of(case, **options) for case in CASES})
    cases = {case.name: bench.step(case) for case in CASES}
    wrong = controls(bench) if stage == 1 else {}
    last = bench.step(CONTROL, lr=LR)
    after = weights(bench.engine)
    bench.engine.close()
    steps = [*cases.values(), *wrong.values(), last]
    if stage in SIGMOID_STAGES:
        biased = Bench(here, {case: config_of(case, **options) for case in SIGMOID_CASES})
        cases |= {case.name: biased.step(case) for case in SIGMOID_CASES}
        biased.engine.close()
    return {"cases": cases, "controls": wrong, "history": [step["gradients"] for step in steps], "after": after}


def half(here: Mesh, topology: str, stage: int) -> Found:
    """Some cases in bf16."""
    options = {"positions": HALF_POSITIONS, "stage": stage, "topology": topology, "precision": "bf16"}
    bench = Bench(here, {case: config_of(case, **options) for case in HALF_CASES})
    found = {case.name: bench.step(case) for case in HALF_CASES}
    bench.engine.close()
    return found


def controls(bench: Bench) -> Found:
    """Steps that are wrong on purpose, in ways that only several ranks show."""
    true, found = bench.mesh, {}
    if true.world_size > 1:
        bench.engine.mesh = replace(true, world_size=1)
        found["factor"] = bench.step(CONTROL)
        bench.engine.mesh = true
    if true.sequence > 1:
        with mock.patch.object(lmp.train.step, "gather_rows", gather_plain):
            found["gather"] = bench.step(CONTROL)
    return found


def run_rank(rank: int, topology: str, folder: Path, port: int) -> None:
    """One rank of one topology."""
    dp, sp = TOPOLOGIES[topology]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(dp * sp)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with mesh(sp, timeout_minutes=5) as here:
        findings = {stage: exact(here, topology, stage) for stage in STAGES}
        halves = {stage: half(here, topology, stage) for stage in HALF_STAGES} if topology in HALF else {}
    torch.save({"fp32": findings, "bf16": halves}, folder / f"{topology}-rank-{rank}.pt")


def main(folder: Path) -> None:
    """Every topology, one after another; its ranks are forked, so that they import nothing again."""
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (half of torch's compiler, at every first engine)

    # DeepSpeed collects garbage whenever stage 3 starts; what is imported by now is none.
    gc.freeze()
    for topology, (dp, sp) in TOPOLOGIES.items():
        start_processes(run_rank, (topology, folder, free_port()), nprocs=dp * sp, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
