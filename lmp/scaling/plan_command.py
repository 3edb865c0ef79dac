"""`lmp plan`: which ZeRO stage, sequence degree and memory mode a configuration needs, and what a step then costs."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmp.errors import EXIT_DONE, EXIT_USER, UserError

ROWS = 12


def register(commands: Any) -> None:
    """Add the command to the subparsers of `lmp`."""
    plan = commands.add_parser("plan", help="predict memory and time for every way to spread a configuration")
    plan.add_argument("config", type=Path)
    plan.add_argument("overrides", nargs="*", metavar="a.b=c")
    plan.add_argument("--gpu", default="h200", metavar="DEVICE", help="h200, h100, a100, cpu or NAME:GiB:TFLOPS:GBps")
    plan.add_argument("--nodes", type=int, default=1)
    plan.add_argument("--gpus-per-node", type=int, help="default: 8; 1 for cpu")
    plan.add_argument("--modalities", metavar="NAME=KxWIDTH,...", help="default: what the shards of data.train hold")
    plan.add_argument("--packs", metavar="P,...", help="pack lengths to try (default: the configuration's)")
    plan.add_argument("--calibrate", type=Path, metavar="RUN|REPORT.json", help="a short run on the same device")
    plan.add_argument("--rows", type=int, default=ROWS, help=f"of the table ({ROWS})")
    plan.add_argument("--json", action="store_true", help="print one JSON object with every choice")
    plan.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from lmp.config import load_config
    from lmp.scaling.devices import find_device
    from lmp.scaling.plan_inputs import calibrate, inputs_of, setting_of
    from lmp.scaling.planner import plan, recommended

    config = load_config(arguments.config, arguments.overrides)
    per_node = arguments.gpus_per_node or (1 if arguments.gpu == "cpu" else 8)
    for option, value in (("--nodes", arguments.nodes), ("--gpus-per-node", per_node), ("--rows", arguments.rows)):
        if value < 1:
            raise UserError(f"{option} is {value}", remedy="give 1 or more")
    device = find_device(arguments.gpu, per_node=per_node)
    inputs = inputs_of(config, arguments.modalities)
    calibration = None
    if arguments.calibrate is not None:
        calibration = calibrate(arguments.calibrate, device, per_node=per_node, modalities=arguments.modalities)
    setting = setting_of(config, inputs, device, nodes=arguments.nodes, per_node=per_node, calibration=calibration)
    found = plan(setting, _packs(arguments.packs))
    best = recommended(setting, found)
    if arguments.json:
        print(json.dumps(report(setting, found, best), indent=1))
    else:
        show(setting, found, best, rows=arguments.rows)
    return EXIT_DONE if best is not None else EXIT_USER


def _packs(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise UserError(f"--packs {text}: is no list of lengths", remedy="write for example --packs 4096,8192")
    return [int(part) for part in parts]


def report(setting: Any, found: Sequence[Any], best: Any) -> dict[str, Any]:
    """Everything, for a program."""
    from dataclasses import asdict

    from lmp.scaling.memory import parameter_counts
    from lmp.scaling.planner import overrides

    def one(e: Any) -> dict[str, Any]:
        memory = e.memory
        return {
            **asdict(e.choice),
            "packs_per_step": e.packs_per_step,
            "fits": e.fits,
            "problem": e.problem,
            "longest_pack": e.longest,
            "memory": {
                "peak": memory.peak,
                "states": asdict(memory.states),
                "activations": memory.activations,
                "features": memory.features,
                "loss": memory.loss,
                "working": memory.working,
                "communication": memory.communication,
                "host": memory.host,
            },
            "seconds": e.seconds,
            "seconds_by_part": e.parts,
            "mfu": e.mfu,
            "hfu": e.hfu,
        }

    return {
        "parameters": parameter_counts(setting.model)[0],
        "world_size": setting.world_size,
        "nodes": setting.nodes,
        "limit_bytes": setting.device.limit,
        "assumptions": setting.device.assumptions(),
        "calibration": asdict(setting.calibration),
        "recommended": None if best is None else {**one(best), "overrides": overrides(setting, best)},
        "choices": [one(e) for e in found],
    }


def show(setting: Any, found: Sequence[Any], best: Any, *, rows: int) -> None:
    """Everything a person wants, as text and a table."""
    from rich.console import Console

    from lmp.scaling.devices import GIB
    from lmp.scaling.memory import parameter_counts

    console = Console()
    device, config = setting.device, setting.config
    print(
        f"{parameter_counts(setting.model)[0] / 1e6:.1f} M parameters, {config.train.precision}; "
        f"{config.data.packs_per_step} packs of {config.data.pack_shots} shots a step; {setting.nodes} x "
        f"{setting.per_node} {device.name}, {device.limit / GIB:.1f} of {device.gib:.1f} GiB usable each"
    )
    print(_assumed(setting))
    fitting = [e for e in found if e.fits]
    if fitting:
        print(f"{len(fitting)} of {len(found)} choices fit, fastest first:")
        if not console.is_terminal:
            console.width = 200  # a pipe has no width to keep to
        console.print(_table(fitting[:rows], plain=not console.is_terminal))
    for line in _unfit(found):
        print(line)
    _conclude(setting, found, best)


def _assumed(setting: Any) -> str:
    device, calibration = setting.device, setting.calibration
    rate = device.attention_rate if setting.model.width // setting.model.heads >= 128 else device.narrow_attention_rate
    peak = device.bf16_tflops if setting.config.train.precision == "bf16" else device.fp32_tflops
    text = (
        f"assumed: peak {peak:g} TFLOP/s, {device.dense_rate:.0%} of it in linear maps, {rate:.0%} in attention; "
        f"memory {device.memory_gbps:g}, link {device.link_gbps:g}, network {device.network_gbps:g}, host "
        f"{device.host_gbps:g} GB/s"
    )
    if calibration.source:
        text += (
            f"\ncalibrated by {calibration.source}: times x {calibration.time:.3g}, memory "
            f"{calibration.extra / 2**30:+.2f} GiB"
        )
    return text


def _table(chosen: Sequence[Any], *, plain: bool) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.MARKDOWN if plain else box.SIMPLE_HEAD)
    for heading in ("zero", "sequence", "checkpointing", "tile_mlp", "pack", "GiB", "states", "activations", "other"):
        table.add_column(heading, justify="left" if heading == "checkpointing" else "right", no_wrap=True)
    for heading in ("host", "s/step", "MFU", "HFU", "longest pack"):
        table.add_column(heading, justify="right", no_wrap=True)
    for e in chosen:
        memory, choice = e.memory, e.choice
        states = memory.states.backward
        table.add_row(
            str(choice.zero),
            str(choice.sequence),
            choice.checkpointing + (", offload" if choice.offload else ""),
            str(choice.tile_mlp or "-"),
            str(choice.pack_shots),
            _gib(memory.peak),
            _gib(states),
            _gib(memory.kept),
            _gib(memory.backward - states - memory.kept),
            _gib(memory.host),
            f"{e.seconds:.3g}",
            f"{e.mfu:.1%}",
            f"{e.hfu:.1%}",
            str(e.longest),
        )
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _unfit(found: Sequence[Any]) -> list[str]:
    """Why the others do not fit: of those with the same sequence degree and checkpointing, the nearest to fitting."""
    groups: dict[tuple[int, int, str, bool], list[Any]] = {}
    for e in found:
        key = (e.choice.pack_shots, e.choice.sequence, e.choice.checkpointing, e.choice.offload)
        groups.setdefault(key, []).append(e)
    lines: dict[str, None] = {}
    for (pack, sequence, checkpointing, offload), members in groups.items():
        if any(e.fits for e in members):
            continue
        nearest = min(members, key=lambda e: e.memory.peak)
        mode = "" if nearest.undealt else f", {checkpointing}{', offload' if offload else ''}"
        lines[f"not possible: pack {pack}, sequence {sequence}{mode}: {nearest.problem}"] = None
    return list(lines)


def _conclude(setting: Any, found: Sequence[Any], best: Any) -> None:
    from lmp.scaling.planner import overrides

    if best is None:
        print("nothing fits: give more devices, a smaller data.pack_shots, or parallel.sequence a higher degree")
        return
    changed = overrides(setting, best)
    print(f"recommended: {' '.join(shlex.quote(word) for word in changed) or '(the configuration as it is)'}")
    longest = max((e for e in found if not e.problem or e.longest), key=lambda e: e.longest)
    print(
        f"longest pack: {longest.longest} shots with ZeRO {longest.choice.zero}, sequence {longest.choice.sequence}, "
        f"{longest.choice.checkpointing}{', offload' if longest.choice.offload else ''}"
        f"{f', tile_mlp {longest.choice.tile_mlp}' if longest.choice.tile_mlp else ''}"
    )
