"""The last parts of `lmp bench step`: the longest sequence of each memory mode, and the memory of the losses."""

from __future__ import annotations

from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from lmp.model.attention import Segments, places, rotary_of, rotation_angles
from lmp.model.backends import resolve
from lmp.objectives.contrastive import info_nce
from lmp.parallel.memory import apply_memory
from lmp.parallel.memory_settings import MemorySettings
from lmp.scaling.bench_clock import StepSettings, forget_unused, peak_bytes
from lmp.scaling.bench_subjects import own_encoder
from lmp.scaling.planner import bisect

SEGMENT = {"cpu": 64, "cuda": 8192}
"""Tokens of the segments that a long row is made of: memory is that of one segment, the time is not."""
MODES = {
    "none": MemorySettings(),
    "selective": MemorySettings(checkpointing="selective"),
    "full": MemorySettings(checkpointing="full"),
    "selective, offload": MemorySettings(checkpointing="selective", offload=True),
    "full, offload": MemorySettings(checkpointing="full", offload=True),
}
TILE = {"cpu": 64, "cuda": 8192}
_HOST_SHARE = 0.6


def modes(device: str) -> dict[str, MemorySettings]:
    """Memory modes by name, from the one that keeps everything to the one that keeps least."""
    tiled = MemorySettings(checkpointing="full", offload=True, tile_mlp=TILE[device])
    return {**MODES, "full, offload, MLP in tiles": tiled}


def longest_sequences(settings: StepSettings) -> dict[str, Any]:
    """Of every mode, see longest_sequence."""
    return {"rows": [longest_sequence(settings, mode) for mode in modes(settings.device)]}


def longest_sequence(settings: StepSettings, mode: str) -> dict[str, Any]:
    """The longest row that forward, backward and update of the contextual transformer with rotation can take.

    On CUDA it is bounded by memory that runs out (or the budget), on the CPU by a budget of counted bytes, where what
    waits in host memory counts as well: the host is the device.

    Returns:
        tokens: the most found to fit; over: the least found not to; tried: rows tried; bytes: at the peak, with
        `tokens`; bytes_per_token: between half of them and all; host_bytes: what waits in host memory;
        bound_by_host: whether that was the bound.
    """
    encoder = _Encoder(settings, modes(settings.device)[mode])
    unit = SEGMENT[settings.device]
    budget = None if settings.budget_mib is None else settings.budget_mib * 2**20
    peaks: dict[int, int | None] = {}

    def fits(units: int) -> bool:
        if units not in peaks:
            peaks[units] = encoder.peak(units * unit)
        peak = peaks[units]
        return peak is not None and (budget is None or peak <= budget)

    most, over = bisect(fits, to=16)
    half = most // 2
    slope = None
    if half and fits(half):
        slope = ((peaks[most] or 0) - (peaks[half] or 0)) / ((most - half) * unit)
    return {
        "mode": mode,
        "tokens": most * unit,
        "over": over * unit,
        "tried": len(peaks),
        "bytes": peaks.get(most),
        "bytes_per_token": slope,
        "host_bytes": encoder.host_bytes(most * unit),
        "bound_by_host": encoder.bound_by_host,
        "segment": unit,
        "budget_bytes": budget,
    }


class _Encoder:
    """The contextual transformer under one memory mode, with moments that exist already."""

    def __init__(self, settings: StepSettings, memory: MemorySettings) -> None:
        torch.manual_seed(0)
        self.settings, self.offload, self.bound_by_host = settings, memory.offload, False
        self.module = own_encoder(settings.shape, "rope").to(settings.device, settings.dtype)
        apply_memory(self.module, memory)  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)
        self.step(SEGMENT[settings.device])

    def step(self, tokens: int) -> None:
        settings = self.settings
        unit, head_dim = SEGMENT[settings.device], settings.shape.head_dim
        lengths = (unit,) * (tokens // unit)
        attend = resolve("auto", device=settings.device, dtype=settings.dtype, head_dim=head_dim)
        segments = Segments.from_lengths(lengths, device=settings.device)
        place_T = places(lengths, torch.device(settings.device))
        rotary = rotary_of(rotation_angles(place_T, head_dim, base=10000.0), 1)
        x_TD = torch.randn(tokens, settings.shape.width, device=settings.device, dtype=settings.dtype)
        out: Tensor = self.module(x_TD[:, None], segments, rotary, attend)
        F.mse_loss(out, torch.zeros_like(out)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def host_bytes(self, tokens: int) -> int:
        """What waits in host memory: the input of every block."""
        if not self.offload:
            return 0
        shape = self.settings.shape
        return tokens * shape.width * shape.layers * self.settings.dtype.itemsize

    def peak(self, tokens: int) -> int | None:
        """Bytes beyond parameters and moments, or None if they were more than there are."""
        if self.host_bytes(tokens) > _HOST_SHARE * psutil.virtual_memory().available:
            self.bound_by_host = True  # pinned memory must not run out: the system would kill the process
            return None
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        known = [*self.module.parameters(), *moments]
        try:
            return peak_bytes(self.settings.device, partial(self.step, tokens), known=known)
        except torch.OutOfMemoryError:
            pass
        self.optimizer.zero_grad()  # outside of the handler, whose traceback holds the graph
        forget_unused()
        return None


def loss_memory(settings: StepSettings) -> dict[str, Any]:
    """Memory of InfoNCE, forward and backward, with as many candidates as rows.

    Returns:
        rows: tokens, bytes at the peak beyond the inputs, those for each further token (against the row before), and
        what the full matrix of logits alone would take.
    """
    found: list[dict[str, Any]] = []
    for tokens in settings.loss_tokens:
        draw = torch.Generator().manual_seed(0)
        size = (tokens, settings.loss_width)
        query_RE, candidate_GE = (
            F.normalize(torch.randn(size, generator=draw), dim=-1).to(settings.device).requires_grad_() for _ in "qc"
        )
        scale = torch.full((1,), 14.0, device=settings.device, requires_grad=True)
        positive_R = torch.arange(tokens, device=settings.device)

        def work(query: Tensor = query_RE, candidate: Tensor = candidate_GE, positive: Tensor = positive_R) -> None:
            loss_R, _ = info_nce(query, candidate, positive, scale, tile=settings.loss_tile)  # noqa: B023
            loss_R.mean().backward()

        peak = peak_bytes(settings.device, work, known=(query_RE, candidate_GE, positive_R))
        before = found[-1] if found else None
        further = before and (peak - before["bytes"]) / (tokens - before["tokens"])
        found.append(
            {"tokens": tokens, "bytes": peak, "bytes_per_further_token": further, "matrix_bytes": 4 * tokens**2}
        )
    return {"rows": found, "width": settings.loss_width, "tile": settings.loss_tile}
