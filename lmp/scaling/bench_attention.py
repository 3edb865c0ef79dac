"""The second part of `lmp bench step`: every way to compute attention here, its speed and its error.

Shape letters: T tokens, H heads, C head dimension, R sampled rows, L tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmp.model.attention import Attend, Segments, attention
from lmp.model.backends import BACKENDS, reasons
from lmp.scaling.bench_clock import Clock, MatmulCeiling, StepSettings, forget_unused, rounds, spread

SAMPLED_ROWS = 64
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest deviation from fp64, over the largest value, that rounding explains: 4 units of bf16, 80 of fp32."""
_TORCH_KERNELS = {
    "torch cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass
class _Row:
    """The readings of one backend at one length."""

    name: str
    attend: Attend
    kernel: str = ""
    error: dict[str, float] = field(default_factory=dict)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)


def attention_backends(settings: StepSettings) -> dict[str, Any]:
    """Speed and error of attention over equal segments, backend by backend, at every length.

    The model rate counts 12 L C H operations a token (4 forward and 8 backward) over the time of both; what a fused
    backward does again is not in it.

    Returns:
        rows: backend, length, segments, seconds, rates in operations a second, the share of the matmul rate of the
            same round, errors and the bound of rounding.
        absent: backend -> why it cannot be used, or how it failed.
    """
    device = torch.device(settings.device)
    why = reasons(device=device, dtype=settings.dtype, head_dim=settings.shape.head_dim)
    absent = {name: reason for name, reason in why.items() if reason is not None}
    usable = {name: BACKENDS[name].attend for name in why if name not in absent}
    if device.type == "cuda":
        usable |= {name: partial(_forced, kernel) for name, kernel in _TORCH_KERNELS.items()}
    else:
        usable["torch math"] = partial(_forced, SDPBackend.MATH)
    ceiling = MatmulCeiling(settings)
    ceiling()
    found = []
    for length in settings.lengths:
        rows = _measure(settings, length, usable, ceiling, absent)
        found += [_report(settings, length, row) for row in rows]
    return {"rows": found, "absent": absent}


def _forced(kernel: SDPBackend, *tensors: Tensor, **segments: Any) -> Tensor:
    with sdpa_kernel(kernel):
        return attention(*tensors, **segments)


def _measure(
    settings: StepSettings, length: int, usable: dict[str, Attend], ceiling: MatmulCeiling, absent: dict[str, str]
) -> list[_Row]:
    problem = _Problem(settings, length)
    rows = {}
    for name, attend in usable.items():
        row = _Row(name, attend)
        try:
            row.error = problem.error(attend)
            row.kernel = _kernel(partial(problem.forward, attend), settings.device)
            problem.turn(attend)
        except (RuntimeError, ValueError) as error:  # a kernel that refuses, or memory that does not suffice
            absent[f"{name} at {length}"] = str(error).splitlines()[0]
            continue
        rows[name] = row
    for order in rounds(settings, list(rows)):
        rate = ceiling()
        for name in order:
            forward, backward = problem.turn(rows[name].attend)
            rows[name].forward.append(forward)
            rows[name].backward.append(backward)
            rows[name].share.append(3 * problem.operations / (forward + backward) / rate)
    if settings.device == "cuda":
        forget_unused()
    return list(rows.values())


class _Problem:
    """Queries, keys and values of equal segments, and what is right for rows sampled from the last segment."""

    def __init__(self, settings: StepSettings, length: int) -> None:
        shape, batch = settings.shape, settings.batch(length)
        self.length, self.clock = length, Clock(settings.device)
        self.operations = 4.0 * batch * length * length * shape.width
        self.segments = Segments.from_lengths((length,) * batch, device=settings.device)
        draw = torch.Generator().manual_seed(length)
        size = (batch * length, shape.heads, shape.head_dim)
        tensors = [torch.randn(size, generator=draw).to(settings.device, settings.dtype) for _ in range(4)]
        self.q_THC, self.k_THC, self.v_THC = (x.requires_grad_() for x in tensors[:3])
        self.grad_THC = tensors[3]
        rows_R = torch.randperm(length, generator=draw)[:SAMPLED_ROWS] + (batch - 1) * length
        self.rows_R = rows_R.to(settings.device)

    def forward(self, attend: Attend) -> Tensor:
        return attend(self.q_THC, self.k_THC, self.v_THC, q_segments=self.segments, k_segments=self.segments)

    def turn(self, attend: Attend) -> tuple[float, float]:
        """Seconds of forward and of backward."""
        out: list[Tensor] = []
        forward = self.clock(lambda: out.append(self.forward(attend)))
        inputs = (self.q_THC, self.k_THC, self.v_THC)
        return forward, self.clock(lambda: torch.autograd.grad(out.pop(), inputs, self.grad_THC))

    def error(self, attend: Attend) -> dict[str, float]:
        """Largest deviations from fp64 over the largest value: of the sampled rows, and of the gradients that reach
        all inputs from those rows alone (so that fp64 costs R * L and not L * L)."""
        out_THC = self.forward(attend)
        grad_THC = torch.zeros_like(out_THC)
        grad_THC[self.rows_R] = self.grad_THC[self.rows_R]
        grads = torch.autograd.grad(out_THC, (self.q_THC, self.k_THC, self.v_THC), grad_THC)
        last = slice(self.q_THC.shape[0] - self.length, None)
        q_RHC = self.q_THC.detach()[self.rows_R].double().requires_grad_()
        k_LHC, v_LHC = (x.detach()[last].double().requires_grad_() for x in (self.k_THC, self.v_THC))
        weight_HRL = torch.einsum("rhc,lhc->hrl", q_RHC, k_LHC).mul(q_RHC.shape[-1] ** -0.5).softmax(-1)
        right_RHC = torch.einsum("hrl,lhc->rhc", weight_HRL, v_LHC)
        right = torch.autograd.grad(right_RHC, (q_RHC, k_LHC, v_LHC), self.grad_THC[self.rows_R].double())
        found = {"out": _deviation(out_THC.detach()[self.rows_R], right_RHC.detach())}
        places_L = torch.arange(self.q_THC.shape[0], device=self.rows_R.device)[last]
        for name, ours_THC, theirs, where in zip("qkv", grads, right, (self.rows_R, places_L, places_L), strict=True):
            exact_THC = torch.zeros_like(ours_THC, dtype=torch.float64)  # no gradient reaches another segment
            exact_THC[where] = theirs
            found[f"grad_{name}"] = _deviation(ours_THC, exact_THC)
        return found


def _deviation(ours: Tensor, right: Tensor) -> float:
    return float((ours.double() - right).abs().max() / right.abs().max())


def _kernel(work: Callable[[], Any], device: str) -> str:
    """The name of what `work` spends most time in: a kernel on CUDA, an operator on the CPU."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=kinds) as record:
        work()
    events = record.key_averages()
    if device == "cuda":
        return str(max(events, key=lambda event: event.self_device_time_total).key)
    return str(max(events, key=lambda event: event.self_cpu_time_total).key)


def _report(settings: StepSettings, length: int, row: _Row) -> dict[str, Any]:
    batch = settings.batch(length)
    operations = 4.0 * batch * length * length * settings.shape.width
    both = [f + b for f, b in zip(row.forward, row.backward, strict=True)]
    bound = ROUNDING[settings.dtype]
    return {
        "backend": row.name,
        "length": length,
        "segments": batch,
        "kernel": row.kernel,
        "forward_seconds": spread(row.forward),
        "backward_seconds": spread(row.backward),
        "forward_rate": spread([operations / s for s in row.forward]),
        "backward_rate": spread([2.5 * operations / s for s in row.backward]),
        "model_rate": spread([3 * operations / s for s in both]),
        "of_matmul": spread(row.share),
        "error": row.error,
        "rounding": bound,
        "right": max(row.error.values()) <= bound,
    }
