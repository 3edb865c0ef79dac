"""The third part of `lmp bench step`: a whole training step of a contextual transformer beside others of its shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lmp.scaling.bench_clock import Clock, MatmulCeiling, StepSettings, forget_unused, peak_bytes, rounds, spread
from lmp.scaling.bench_subjects import OWN, Subject, compiled, make_subjects, recomputed_flops, step_flops
from lmp.scaling.flops import peak_tflops


@dataclass
class _Turns:
    """The readings of one subject at one length, by round."""

    seconds: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    peak: int = 0


class _Trained:
    """A subject with its AdamW; a step is forward, mean squared error, backward and update."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.optimizer = torch.optim.AdamW(subject.module.parameters(), lr=1e-4, fused=True)

    def step(self, x_BLD: Tensor, target_BLD: Tensor) -> None:
        F.mse_loss(self.subject.run(x_BLD), target_BLD).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[Tensor]:
        """Parameters and moments."""
        moments = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return [*self.subject.module.parameters(), *moments]


def training_steps(settings: StepSettings) -> dict[str, Any]:
    """One step of every encoder at every length, turn by turn.

    Returns:
        rows: by length and subject: parameters in products N, sequences, seconds, tokens and operations a second, the
            share of the matmul rate of the same round, MFU and HFU where the device's peak is known, bytes at the
            peak beyond parameters and moments, and the speed of each of ours over it, round by round.
        absent: subject at length -> why it did not run.
    """
    device = torch.device(settings.device)
    make = partial(
        make_subjects,
        settings.encoders,
        settings.shape,
        longest=max(settings.lengths),
        device=device,
        dtype=settings.dtype,
    )
    subjects = make()
    if settings.compiled:
        subjects += [compiled(subject) for subject in make()]
    trained = {subject.name: _Trained(subject) for subject in subjects}
    ceiling = MatmulCeiling(settings)
    ceiling()
    peak = peak_tflops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    found: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for length in settings.lengths:
        turns = _measure(settings, length, trained, ceiling, absent)
        found += [_report(settings, trained[name].subject, length, turns, peak) for name in turns]
    return {"rows": found, "absent": absent, "peak_tflops": peak}


def _measure(
    settings: StepSettings,
    length: int,
    trained: dict[str, _Trained],
    ceiling: MatmulCeiling,
    absent: dict[str, str],
) -> dict[str, _Turns]:
    draw = torch.Generator().manual_seed(length)
    size = (settings.batch(length), length, settings.shape.width)
    x_BLD, target_BLD = (torch.randn(size, generator=draw).to(settings.device, settings.dtype) for _ in range(2))
    turns: dict[str, _Turns] = {}
    for name, one in trained.items():
        step = partial(one.step, x_BLD, target_BLD)
        try:
            step()  # warms up, and makes the moments
            turns[name] = _Turns(peak=peak_bytes(settings.device, step, known=one.tensors()))
        except torch.OutOfMemoryError as error:
            absent[f"{name} at {length}"] = str(error).splitlines()[0]
        if name not in turns:  # out of the handler, whose traceback holds the graph
            one.optimizer.zero_grad()
            forget_unused()
    clock = Clock(settings.device)
    for order in rounds(settings, list(turns)):
        for name in order:
            rate = ceiling()
            seconds = clock(partial(trained[name].step, x_BLD, target_BLD))
            flops = step_flops(trained[name].subject, settings.shape, batch=size[0], length=length)
            turns[name].seconds.append(seconds)
            turns[name].share.append(flops / seconds / rate)
    return turns


def _report(
    settings: StepSettings, subject: Subject, length: int, turns: dict[str, _Turns], peak: float | None
) -> dict[str, Any]:
    own, batch = turns[subject.name], settings.batch(length)
    flops = step_flops(subject, settings.shape, batch=batch, length=length)
    hardware = flops + recomputed_flops(settings.shape, batch=batch, length=length)
    return {
        "subject": subject.name,
        "length": length,
        "sequences": batch,
        "matmul_parameters": subject.matmul_parameters,
        "model_flops": flops,
        "hardware_flops": hardware,
        "seconds": spread(own.seconds),
        "tokens_per_second": spread([batch * length / s for s in own.seconds]),
        "model_rate": spread([flops / s for s in own.seconds]),
        "of_matmul": spread(own.share),
        "mfu": peak and spread([flops / s / peak / 1e12 for s in own.seconds]),
        "hfu": peak and spread([hardware / s / peak / 1e12 for s in own.seconds]),
        "peak_bytes": own.peak,
        "speed_to": {name: spread(_speeds(turns[name].seconds, own.seconds)) for name in OWN if name in turns},
    }


def _speeds(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """How many times as fast we are, round by round."""
    return [t / o for o, t in zip(ours, theirs, strict=True)]
