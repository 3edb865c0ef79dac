"""What a plan is made for: modalities and window lengths from the shards or the command line, and calibration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lmp.config import Config, load_config
from lmp.data.manifest import FEATURE_DTYPES
from lmp.errors import UserError
from lmp.scaling.devices import GIB, Device
from lmp.scaling.planner import Calibration, Setting, config_choice, estimate
from lmp.train.data import load_index, model_shape

_WARMUP = 3  # first steps of a run, which pay for compilers, caches and connections


@dataclass(frozen=True)
class Inputs:
    """What the data set decides.

    Attributes:
        modalities: name -> tokens and width.
        feature_bytes: of one stored number.
        shots_F: shots of each film; None: not known, windows are as long as they may be.
    """

    modalities: dict[str, dict[str, int]]
    feature_bytes: int
    shots_F: np.ndarray | None

    def squares(self, config: Config) -> Callable[[int], float]:
        """For a pack of P shots, the expected sum of the squares of its segments' lengths."""

        def of(pack_shots: int) -> float:
            longest = min(config.data.window_shots or pack_shots, pack_shots)
            if self.shots_F is None:
                return float(pack_shots * longest)
            whole, rest = np.divmod(self.shots_F.astype(np.float64), longest)
            return float(pack_shots * (whole * longest**2 + rest**2).sum() / self.shots_F.sum())

        return of


def inputs_of(config: Config, spec: str | None) -> Inputs:
    """From the option --modalities, or where it is not given from the shards of data.train.

    Raises:
        UserError: neither can be had.
    """
    if spec is not None:
        return Inputs(parse_modalities(spec), feature_bytes=2, shots_F=None)
    try:
        index = load_index(config)
    except UserError as error:
        raise UserError(
            error.problem, remedy="give the shards, or say what they hold: --modalities video=1x512,audio=1x896"
        ) from error
    widest = max(FEATURE_DTYPES[m.dtype].itemsize for m in index.modalities.values())
    modalities = {name: {"tokens": m.tokens, "width": m.width} for name, m in index.modalities.items()}
    return Inputs(modalities, feature_bytes=widest, shots_F=index.shots)


def parse_modalities(spec: str) -> dict[str, dict[str, int]]:
    """NAME=TOKENSxWIDTH,...

    Raises:
        UserError: it is not of that form.
    """
    found: dict[str, dict[str, int]] = {}
    for part in spec.split(","):
        name, equals, shape = part.strip().partition("=")
        tokens, times, width = shape.partition("x")
        if not (name and equals and times and tokens.isdigit() and width.isdigit() and int(tokens) and int(width)):
            raise UserError(
                f"--modalities {spec}: {part!r} is not NAME=TOKENSxWIDTH", remedy="write for example video=1x512"
            )
        found[name] = {"tokens": int(tokens), "width": int(width)}
    return found


def setting_of(
    config: Config,
    inputs: Inputs,
    device: Device,
    *,
    nodes: int,
    per_node: int,
    calibration: Calibration | None = None,
) -> Setting:
    """The search for a configuration.

    Raises:
        UserError: the configuration does not fit the modalities.
    """
    names = list(inputs.modalities)
    wanted = [config.model.target, *(config.model.sources or [])]
    if unknown := [name for name in wanted if name not in names]:
        raise UserError(
            f"the configuration names modalities {unknown}, the data has {names}",
            remedy="mend model.target, model.sources or --modalities",
        )
    try:
        model = model_shape(config, inputs.modalities)
    except ValueError as error:
        raise UserError(str(error), remedy="mend the model section, or --modalities") from error
    return Setting(
        config=config,
        model=model,
        device=device,
        nodes=nodes,
        per_node=per_node,
        squares=inputs.squares(config),
        feature_bytes=inputs.feature_bytes,
        calibration=calibration or Calibration(),
    )


def calibrate(path: Path, device: Device, *, per_node: int, modalities: str | None = None) -> Calibration:
    """Hold what a run or a dry run measured against what is predicted for it.

    Args:
        path: a run folder, or the JSON that `lmp train --dry-run --json` writes.
        device: that it ran on.
        per_node: processes that shared a node.
        modalities: as --modalities; for a run whose shards are not here.

    Raises:
        UserError: there is nothing measured at `path`.
    """
    if path.is_dir():
        config, facts = _measured_run(path)
        inputs = inputs_of(config, modalities)
    else:
        config, facts = _measured_report(path)
        inputs = Inputs(facts["modalities"], facts["feature_bytes"], shots_F=None)
    world = int(facts["world_size"])
    nodes = max(1, -(-world // per_node))
    setting = setting_of(config, inputs, device, nodes=nodes, per_node=world // nodes)
    predicted = estimate(setting, config_choice(config), longest=False, lengths=facts.get("lengths"))
    return Calibration(
        time=facts["seconds"] / predicted.seconds,
        extra=facts["memory_gib"] * GIB - predicted.memory.peak,
        source=f"{path}: {facts['seconds']:.3g} s a step, {facts['memory_gib']:.2f} GiB",
    )


def _measured_run(folder: Path) -> tuple[Config, Mapping[str, Any]]:
    from lmp.train.run_folder import RunFolder

    run = RunFolder(folder)
    if not (run.config.is_file() and run.metrics.is_file()):
        raise UserError(f"--calibrate {folder}: holds no run", remedy="give the folder of a run of some ten steps")
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    starts = [json.loads(line) for line in run.ledger.read_text(encoding="utf-8").splitlines()]
    worlds = [line["world_size"] for line in starts if "world_size" in line]
    steady = lines[_WARMUP:]
    if len(steady) < _WARMUP or not worlds:
        raise UserError(
            f"--calibrate {folder}: has made {len(lines)} steps", remedy=f"let it make {2 * _WARMUP} or more"
        )
    facts = {
        "seconds": median(line["seconds"] - line["seconds_waiting_for_data"] for line in steady),
        "memory_gib": max(line["memory_gib"] for line in lines),
        "world_size": worlds[-1],
    }
    return load_config(run.config), facts


def _measured_report(path: Path) -> tuple[Config, Mapping[str, Any]]:
    from lmp.config import validate

    needed = ("config", "modalities", "feature_bytes", "world_size", "seconds", "memory_gib")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--calibrate {path}: is no JSON file", remedy="give a run folder or a report") from error
    missing = [key for key in needed if not isinstance(report, dict) or key not in report]
    if missing:
        raise UserError(
            f"--calibrate {path}: lacks {', '.join(missing)}",
            remedy="give a run folder, or what `lmp train --dry-run --json FILE` writes",
        )
    return validate(report["config"], source=str(path)), report
