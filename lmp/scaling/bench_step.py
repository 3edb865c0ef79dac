"""`lmp bench step`: how fast a training step is on this machine, part by part, against the machine and against others.

Every part runs in a process of its own, which begins with nothing in its allocator.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from lmp.errors import UserError
from lmp.scaling.bench_clock import LOG_EVERY, StepSettings
from lmp.scaling.bench_data import ProcessError, in_process, machine_facts
from lmp.scaling.bench_readers import run_in_child
from lmp.scaling.bench_subjects import OWN, PEERS, Shape

_PRELOAD = (
    "lmp.scaling.bench_attention",
    "lmp.scaling.bench_ceilings",
    "lmp.scaling.bench_encoders",
    "lmp.scaling.bench_length",
    "lmp.scaling.bench_readers",
    "transformers.models.bert.modeling_bert",
    "transformers.models.modernbert.modeling_modernbert",
)
PARTS = ("ceilings", "attention", "step", "trainer", "length", "loss")

_CPU = StepSettings(
    device="cpu",
    shape=Shape(width=256, heads=2, layers=4),
    lengths=(256, 1024, 2048),
    tokens=2048,
    rounds=9,
    seconds=120.0,
    budget_mib=128.0,
    loss_tokens=(4096, 8192, 16384, 32768, 65536),
    loss_width=32,
    loss_tile=1024,
    trainer_shots=256,
    trainer_packs=8,
    trainer_steps=9,
    encoders=(*OWN, *PEERS),
    compiled=False,
)
_CPU_QUICK = replace(
    _CPU,
    shape=Shape(width=128, heads=2, layers=2),
    lengths=(128, 512),
    tokens=512,
    rounds=5,
    seconds=8.0,
    budget_mib=8.0,
    loss_tokens=(1024, 2048, 4096),
    loss_tile=256,
    trainer_shots=128,
    trainer_packs=2,
    trainer_steps=7,
)
_CUDA = replace(
    _CPU,
    device="cuda",
    shape=Shape(width=768, heads=6, layers=12),
    lengths=(1024, 8192, 32768, 131072),
    tokens=65536,
    rounds=10,
    seconds=30.0,
    budget_mib=None,
    loss_width=256,
    loss_tile=4096,
    trainer_shots=4096,
    trainer_packs=4,
    trainer_steps=20,
)
_CUDA_QUICK = replace(
    _CUDA, shape=Shape(width=768, heads=6, layers=2), lengths=(1024, 8192), rounds=3, seconds=10.0, trainer_packs=1
)


@dataclass
class StepReport:
    """What `lmp bench step` found.

    Attributes:
        command: as typed.
        machine: see bench_data.machine_facts; with the GPU, its driver's CUDA and cuDNN where there is one.
        settings: what was measured.
        parts: part -> what its function returns.
        failed: part -> the last line of its error.
    """

    command: str
    machine: dict[str, Any]
    settings: StepSettings
    parts: dict[str, Any]
    failed: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def settings_of(device: str, *, quick: bool, **changes: Any) -> StepSettings:
    """The settings for a device, with what is given and not None in the place of the defaults.

    Args:
        device: "auto", "cpu" or "cuda".
        quick: the small setting.
        changes: fields of StepSettings, and width, heads and layers.

    Raises:
        UserError: values out of range, or no such device.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: torch finds no CUDA device", remedy="give cpu; `lmp doctor` tells more")
    on_cuda = cuda and device != "cpu"
    base = (_CUDA_QUICK if quick else _CUDA) if on_cuda else (_CPU_QUICK if quick else _CPU)
    given = {name: value for name, value in changes.items() if value is not None}
    shape = asdict(base.shape) | {name: given.pop(name) for name in ("width", "heads", "layers") if name in given}
    settings = replace(base, shape=Shape(**shape), **given)
    if unknown := [name for name in settings.encoders if name not in (*OWN, *PEERS)]:
        raise UserError(f"there is no encoder {unknown[0]!r}", remedy=f"give some of {'; '.join((*OWN, *PEERS))}")
    if not settings.lengths or min(settings.lengths) < 1 or settings.tokens < 1:
        raise UserError("--lengths and --tokens", remedy="give numbers of at least 1")
    if settings.rounds < 2:
        raise UserError(f"--rounds {settings.rounds}", remedy="give at least 2, for a spread")
    if settings.trainer_steps < LOG_EVERY or settings.trainer_shots < 1:
        raise UserError(
            "--trainer-steps and --trainer-shots", remedy=f"give at least {LOG_EVERY} steps of packs of at least 1 shot"
        )
    if settings.budget_mib is not None and settings.budget_mib <= 0:
        raise UserError(f"--budget {settings.budget_mib}", remedy="give MiB above 0")
    return settings


def bench_step(settings: StepSettings, parts: Sequence[str], step: Callable[[str, int], None]) -> StepReport:
    """Run parts, one after another.

    Args:
        settings: see settings_of.
        parts: some of PARTS.
        step: told before each piece of work what comes, and how many pieces there are in all.

    Raises:
        UserError: an unknown part.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(f"there is no part {part!r}", remedy=f"give some of {','.join(PARTS)}")
    machine = {**machine_facts(), **_gpu_facts(settings)}
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    pieces = [(part, piece) for part in PARTS if part in parts for piece in _pieces(part, settings)]
    for part, piece in pieces:
        step(f"{part} {piece}".strip(), len(pieces))
        try:
            answer = in_process(_measure, part, piece, settings, preload=_PRELOAD)
        except ProcessError as error:
            failed[f"{part} {piece}".strip()] = error.last_line
            continue
        if piece:
            found.setdefault(part, {"rows": []})["rows"].append(answer)
        else:
            found[part] = answer
    return StepReport(shlex.join(["lmp", *sys.argv[1:]]), machine, settings, found, failed)


def _pieces(part: str, settings: StepSettings) -> list[str]:
    """What of a part gets a process of its own: where an allocator may run full, each memory mode; else the part."""
    from lmp.scaling.bench_length import modes

    return list(modes(settings.device)) if part == "length" and settings.device == "cuda" else [""]


def _measure(part: str, piece: str, settings: StepSettings, answer: Connection) -> None:
    run_in_child(lambda: _part(part, piece, settings), answer)


def _part(part: str, piece: str, settings: StepSettings) -> Any:
    from lmp.scaling import bench_attention, bench_ceilings, bench_encoders, bench_length, bench_trainer

    if settings.device == "cuda":  # read when the allocator starts
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.manual_seed(0)
    functions: dict[str, Callable[[], Any]] = {
        "ceilings": lambda: bench_ceilings.ceilings(settings),
        "attention": lambda: bench_attention.attention_backends(settings),
        "step": lambda: bench_encoders.training_steps(settings),
        "trainer": lambda: bench_trainer.trainer_overhead(settings),
        "length": lambda: (
            bench_length.longest_sequence(settings, piece) if piece else bench_length.longest_sequences(settings)
        ),
        "loss": lambda: bench_length.loss_memory(settings),
    }
    return functions[part]()


def _gpu_facts(settings: StepSettings) -> dict[str, Any]:
    if settings.device != "cuda":
        return {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
