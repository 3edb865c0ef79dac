"""`lmp doctor parity CONFIG`: does a configuration train alike on one process and on several?

A few steps are made by the trainer itself under each topology, one after another, with a checkpoint at each step; then
the losses and the weights of each step are compared with those of one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lmp.config import Config, load_config
from lmp.errors import EXIT_DONE, EXIT_USER, UserError

STEPS = 5
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest relative difference by the precision: rounding in another order, over a few steps of AdamW."""


@dataclass(frozen=True)
class Topology:
    """How the processes share the work."""

    processes: int
    sequence: int
    zero: int

    def __str__(self) -> str:
        return f"{self.processes // self.sequence} data x {self.sequence} sequence ranks, ZeRO {self.zero}"


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of a topology from one process, step by step.

    Attributes:
        loss: |a - b| / |a| of the loss.
        weights: |a - b| / |a|, norms over all parameters together. (Alone, a parameter whose gradient is nothing but
            rounding, as a key's bias, is moved by AdamW as far as any other, in a random direction.)
    """

    topology: str
    loss: list[float]
    weights: list[float]

    @property
    def largest(self) -> float:
        values = [*self.loss, *self.weights]
        return max(values) if all(map(math.isfinite, values)) else math.inf


def register(commands: Any) -> None:
    """Add the command to those of `lmp doctor`."""
    parser = commands.add_parser("parity", help="does a configuration train alike on one process and on several?")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--run", dest="folder", type=Path, help="run folder, for parity.json (default: runs/NAME)")
    parser.add_argument("--tolerance", type=float, help=f"largest relative difference (default: {TOLERANCE})")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from lmp.train.run_folder import write_atomic

    config = load_config(arguments.config, arguments.overrides)
    tolerance = TOLERANCE[config.train.precision] if arguments.tolerance is None else arguments.tolerance
    overrides, told = shrink(config)
    for line in told:
        print(f"shrunk: {line}")
    config = load_config(arguments.config, [*arguments.overrides, *overrides])
    alone, others = topologies(config)
    print(f"{STEPS} steps of {arguments.config}, each compared with {alone}")
    with tempfile.TemporaryDirectory(prefix="lmp-parity-") as scratch:
        words = [str(arguments.config), *arguments.overrides, *overrides]
        reference = _train(words, alone, Path(scratch) / "alone")
        found = [
            compare(str(topology), reference, _train(words, topology, Path(scratch) / str(number)))
            for number, topology in enumerate(others)
        ]
    for difference in found:
        print(difference.topology)
        for step, (loss, weights) in enumerate(zip(difference.loss, difference.weights, strict=True), 1):
            print(f"  step {step}: loss {loss:.2e}, weights {weights:.2e}")
    alike = all(difference.largest <= tolerance for difference in found)
    folder = arguments.folder or Path("runs") / config.name
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"reference": str(alone), "tolerance": tolerance, "alike": alike, "shrunk": told}
    report = {**facts, "differences": [asdict(difference) for difference in found]}
    write_atomic(folder / "parity.json", json.dumps(report, indent=1) + "\n")
    print(f"{'alike' if alike else 'NOT ALIKE'} within {tolerance:g}; report: {folder / 'parity.json'}")
    return EXIT_DONE if alike else 1


def shrink(config: Config) -> tuple[list[str], list[str]]:
    """Overrides that let a machine make a few steps, only as far as needed, and what they change, in words.

    Without a GPU a model of many million parameters and long packs is out of reach: depth, width and packs are cut;
    what decides how the parts work together (heads, objectives, memory modes, modalities) stays.
    """
    if torch.cuda.is_available():
        return [], []
    model, data = config.model, config.data
    heads = model.heads
    limits = {
        "model.width": (model.width, 16 * heads),
        "model.contextual_layers": (model.contextual_layers, 2),
        "model.cross_layers": (model.cross_layers, 2),
        "model.contrastive_width": (model.contrastive_width, 64),
        "data.pack_shots": (data.pack_shots, 128),
        "data.packs_per_step": (data.packs_per_step, 4),
    }
    smaller = {key: limit for key, (value, limit) in limits.items() if value > limit}
    if data.window_shots is not None and data.window_shots > 128:
        smaller["data.window_shots"] = 128
    now = {key: value for key, (value, _) in limits.items()}
    told = [f"{key} {now.get(key, data.window_shots)} -> {value}" for key, value in smaller.items()]
    return [f"{key}={value}" for key, value in smaller.items()], told


def topologies(config: Config) -> tuple[Topology, list[Topology]]:
    """One process, and against it several: as configured, with another ZeRO stage, and along the sequence.

    Raises:
        UserError: the machine has GPUs, but only one.
    """
    devices = torch.cuda.device_count()
    if devices == 1:
        raise UserError(
            "there is one GPU, and two processes are to be compared with one",
            remedy="give the job two GPUs, or set CUDA_VISIBLE_DEVICES= to compare on the CPU",
        )
    zero = config.parallel.zero
    bf16 = config.train.precision == "bf16"
    other = {0: 3, 1: 3, 2: 3, 3: 2}[zero]
    pairs = [Topology(2, 1, zero), Topology(2, 1, other)]
    if config.model.heads % 2 == 0 and config.data.pack_shots % 2 == 0:
        pairs.append(Topology(2, 2, zero))
    return Topology(1, 1, 1 if bf16 else 0), pairs


def _train(words: Sequence[str], topology: Topology, run: Path) -> Path:
    """Make the steps under a topology.

    Raises:
        UserError: the run failed.
    """
    more = {
        "train.steps": STEPS,
        "train.log_every": 1,
        "checkpoint.every_steps": 1,
        "checkpoint.every_minutes": "null",
        "checkpoint.keep": STEPS,
        "parallel.zero": topology.zero,
        "parallel.sequence": topology.sequence,
        "health.spike.action": "none",
    }
    command = [sys.executable, "-m", "launch.local", *words, *(f"{key}={value}" for key, value in more.items())]
    command += ["-n", str(topology.processes), "--run", str(run)]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no words"]
        told = why[0].removeprefix("error: ")
        if done.returncode == EXIT_USER and " -> " in told:
            problem, _, remedy = told.partition(" -> ")
            raise UserError(problem, remedy=remedy)
        raise UserError(
            f"{topology}: the run ended with {done.returncode}: {told}", remedy="run it by itself to see why"
        )
    return run


def compare(name: str, reference: Path, other: Path) -> Difference:
    """Hold two runs of the same steps against each other."""
    from lmp.train import checkpoint
    from lmp.train.run_folder import RunFolder

    losses, weights = [], []
    one, two = RunFolder(reference), RunFolder(other)
    for step, (a, b) in enumerate(zip(_losses(one.metrics), _losses(two.metrics), strict=True), 1):
        losses.append(abs(a - b) / max(abs(a), 1e-12))
        left, right = checkpoint.folder_of(one, step), checkpoint.folder_of(two, step)
        with (
            checkpoint.StateReader(left, checkpoint.read_manifest(left)) as mine,
            checkpoint.StateReader(right, checkpoint.read_manifest(right)) as theirs,
        ):
            apart = size = 0.0
            for parameter in mine.manifest["tensors"]:
                a_weight, b_weight = mine.whole(parameter, "weight"), theirs.whole(parameter, "weight")
                apart += float((a_weight - b_weight).double().square().sum())
                size += float(a_weight.double().square().sum())
            weights.append(math.sqrt(apart / size))
    return Difference(name, losses, weights)


def _losses(metrics: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in metrics.read_text(encoding="utf-8").splitlines()]
