"""From a study to its cells: each one's configuration, steps, predicted cost, and why it is left out if it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.study.config import PLACES, Point, Study, at, nested, points
from lmp.config import Config, build, check_run, contradictions
from lmp.data.stream import Stream
from lmp.errors import UserError
from lmp.model import LmpConfig
from lmp.parallel.deepspeed_config import merge
from lmp.scaling.devices import GIB, Device, find_device, known_device
from lmp.scaling.flops import forward_of, train_flops
from lmp.scaling.plan_inputs import Inputs, inputs_of, setting_of
from lmp.scaling.planner import config_choice, estimate
from lmp.train.data import load_index, plan_settings

SAMPLED_STEPS = 200
"""Steps of the first epoch from which the shots and operations of a cell's step are taken."""


@dataclass(frozen=True)
class Prediction:
    """What the planner says of a cell: of one process, and of one step.

    Attributes:
        memory_gib, limit_gib: needed and there.
        seconds: of a step.
        mfu, hfu: shares of the device's peak.
        device: that it was asked for.
    """

    memory_gib: float
    limit_gib: float
    seconds: float
    mfu: float
    hfu: float
    device: str


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: of its folder.
        values: of the grid's axes.
        seed: of the run.
        nodes, processes: on which it runs; processes are per node.
        steps: that it makes.
        shots, flops: that these steps see and take, by the plan.
        window: the longest window, pack: the length of a pack, in shots.
        config: resolved, as a mapping.
        prediction: None where it could not be made.
        left_out: why it does not run; None: it runs.
    """

    name: str
    values: dict[str, Any]
    seed: int
    nodes: int
    processes: int
    steps: int | None = None
    shots: float | None = None
    flops: float | None = None
    window: int | None = None
    pack: int | None = None
    config: dict[str, Any] | None = None
    prediction: Prediction | None = None
    left_out: str | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Cell:
        """The inverse of asdict."""
        prediction = facts.get("prediction")
        return cls(**{**facts, "prediction": Prediction(**prediction) if prediction else None})


def make_cells(study: Study) -> list[Cell]:
    """All cells of a study, in the order of the grid; those that cannot run say why.

    Raises:
        UserError: no shards and no modalities are there to plan with, or every cell is left out.
    """
    maker = _Maker(study)
    cells = [maker.cell(point) for point in points(study)]
    if all(cell.left_out for cell in cells):
        reasons = list(dict.fromkeys(cell.left_out or "" for cell in cells))
        raise UserError(f"no cell can run: {'; '.join(reasons[:5])}", remedy="mend the study file")
    return cells


def as_json(cells: Sequence[Cell]) -> str:
    """What cells.json holds."""
    return json.dumps([asdict(cell) for cell in cells], indent=1) + "\n"


@dataclass
class _StepCost:
    """Shots and operations of an average step."""

    shots: float
    flops: float


class _Maker:
    """Makes cells, reading data and planning epochs once for all that share them."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._inputs: dict[str, Inputs] = {}
        self._lengths: dict[str, list[list[tuple[int, ...]]]] = {}
        self._shots: dict[str, float] = {}

    def cell(self, point: Point) -> Cell:
        settings = dict(point.settings)
        place = {key: int(settings.pop(key, getattr(self.study, key))) for key in PLACES}
        raw = merge(self.study.config, nested(settings))
        raw = merge(raw, {"name": point.name, "seed": point.seed})
        facts: dict[str, Any] = {"name": point.name, "values": point.values, "seed": point.seed, **place}
        if rule := self._excluded(point, raw, place):
            return Cell(**facts, left_out=f"excluded by {rule}")
        config, faults = build(Config, raw)
        if config is None or faults:
            return Cell(**facts, left_out="; ".join(faults))
        try:
            return self._planned(config, facts)
        except UserError as error:
            return Cell(**facts, left_out=error.problem)

    def _excluded(self, point: Point, raw: Mapping[str, Any], place: Mapping[str, int]) -> str | None:
        def has(key: str, wanted: Any) -> bool:
            known = {"seed": point.seed, **place, **point.values}
            value = known[key] if key in known else at(raw, key)
            return value in wanted if isinstance(wanted, list) else value == wanted

        for rule in self.study.exclude:
            if all(has(key, wanted) for key, wanted in rule.items()):
                return str(rule)
        return None

    def _planned(self, config: Config, facts: dict[str, Any]) -> Cell:
        """With steps and prediction.

        Raises:
            UserError: it contradicts itself, its processes or its data.
        """
        data = config.data
        inputs = self._inputs_of(config)
        nodes, processes = facts["nodes"], facts["processes"]
        window = min(data.window_shots or data.pack_shots, data.pack_shots)
        facts |= {"window": window, "pack": data.pack_shots}
        if faults := contradictions(config):
            return Cell(**facts, left_out="; ".join(faults))
        try:
            check_run(config, world_size=nodes * processes, modalities=inputs.modalities, source=facts["name"])
        except UserError as error:
            return Cell(**facts, left_out=error.problem.split(": ", 2)[-1])
        setting = setting_of(config, inputs, self._device(processes), nodes=nodes, per_node=processes)
        step = self._step_cost(config, setting.model, inputs)
        steps = self._steps(step)
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
        found = estimate(setting, config_choice(config), longest=False)
        return Cell(
            **facts,
            steps=steps,
            shots=steps * step.shots,
            flops=steps * step.flops,
            config=config.model_dump(mode="json"),
            prediction=Prediction(
                memory_gib=found.memory.peak / GIB,
                limit_gib=setting.device.limit / GIB,
                seconds=found.seconds,
                mfu=found.mfu,
                hfu=found.hfu,
                device=setting.device.name,
            ),
            left_out=found.problem,
        )

    def _steps(self, step: _StepCost) -> int:
        budget = self.study.budget
        each = {"steps": 1.0, "shots": step.shots, "flops": step.flops}[budget.kind]
        steps = round(budget.amount / each)
        if steps < 1:
            raise UserError(
                f"one step takes {each:.3g} {budget.kind}, the budget is {budget.amount:.3g}",
                remedy="give a larger budget",
            )
        return steps

    def _device(self, processes: int) -> Device:
        return find_device(self.study.gpu, per_node=processes) if self.study.gpu else this_device(processes)

    def _inputs_of(self, config: Config) -> Inputs:
        key = json.dumps([entry.model_dump() for entry in config.data.train])
        if key not in self._inputs:
            self._inputs[key] = inputs_of(config, self.study.modalities)
        return self._inputs[key]

    def _step_cost(self, config: Config, model: LmpConfig, inputs: Inputs) -> _StepCost:
        """Of the steps that the data's plan makes; of full packs of full windows where the data is not here."""
        data = config.data
        if inputs.shots_F is None:
            shots = float(data.pack_shots)
            one = forward_of(model, shots=shots, squares=inputs.squares(config)(data.pack_shots))
            return _StepCost(data.packs_per_step * shots, 3 * data.packs_per_step * one.total)
        # Seeds shuffle the films; all seeds make as many steps.
        config = config.model_copy(update={"seed": self.study.seeds[0]})
        key = json.dumps([config.seed, data.model_dump(mode="json")])
        if key not in self._lengths:
            index = load_index(config)
            stream = Stream.of(index, plan_settings(config, index))
            cursor, lengths, shots = stream.first(), [], 0
            for _ in range(min(SAMPLED_STEPS, stream.steps(cursor))):
                lengths.append([pack.lengths for pack in stream.packs(cursor)])
                shots += stream.shots(cursor)
                cursor = stream.next(cursor)
            self._lengths[key], self._shots[key] = lengths, shots / len(lengths)
        steps = self._lengths[key]
        return _StepCost(self._shots[key], sum(train_flops(model, packs) for packs in steps) / len(steps))


def this_device(processes: int) -> Device:
    """The planner's device for this machine, `processes` of which share it."""
    import torch

    if not torch.cuda.is_available():
        return find_device("cpu", per_node=processes)
    properties = torch.cuda.get_device_properties(0)
    return known_device(properties.name) or find_device(
        f"{properties.name.replace(':', ' ')}:{properties.total_memory / GIB}:300:50", per_node=processes
    )


def load_cells(folder: Path) -> list[Cell]:
    """The cells of a study's folder.

    Raises:
        UserError: it holds none.
    """
    file = folder / "cells.json"
    if not file.is_file():
        raise UserError(f"{folder}: holds no study (no cells.json)", remedy="start one: python -m launch.study FILE")
    return [Cell.from_json(facts) for facts in json.loads(file.read_text(encoding="utf-8"))]
