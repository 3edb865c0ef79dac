"""Counts the floating point operations of a training step from shapes alone.

A multiply-add is two operations; the backward pass costs twice the forward pass (Kaplan et al., 2020, section 2.1;
the attention term is exact for the segments given, not an average).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmp.model import LmpConfig

PEAK_TFLOPS_BF16 = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16 peaks from the vendor's data sheets, by a part of the device's name."""


def train_flops(config: LmpConfig, packs: Iterable[Sequence[int]]) -> float:
    """Operations of forward and backward over packs, each given by the lengths of its segments in shots."""
    return 3.0 * sum(_forward(config, lengths) for lengths in packs)


def _forward(config: LmpConfig, lengths: Sequence[int]) -> float:
    shots = sum(lengths)
    squares = sum(n * n for n in lengths)
    width, hidden, embed = config.width, int(config.mlp_ratio * config.width), config.contrastive_width
    tokens = {name: spec["tokens"] for name, spec in config.modalities.items()}
    total = 0.0
    for name, spec in config.modalities.items():
        t, pairs = shots * tokens[name], squares * tokens[name] ** 2
        linear = 4 * width * width + 2 * width * hidden
        total += config.layers_of(name) * (2 * t * linear + 4 * pairs * width)
        # Embedding, then the heads for prediction and alignment, and the projection of the target.
        total += 2 * t * (spec["width"] * width + 2 * (width * width + width * embed) + spec["width"] * embed)
    queries = tokens[config.target]
    memory = sum(tokens[name] for name in config.sources)
    self_part = 2 * shots * queries * 4 * width * width + 4 * squares * queries**2 * width
    cross_part = 2 * shots * (2 * queries + 2 * memory) * width * width + 4 * squares * queries * memory * width
    mlp_part = 2 * shots * queries * 2 * width * hidden
    total += config.cross_layers * (self_part + cross_part + mlp_part)
    return total + 2 * shots * queries * (width * width + width * embed)


def peak_tflops(device_name: str) -> float | None:
    """The dense bf16 peak of a known device, else None."""
    return next((peak for part, peak in PEAK_TFLOPS_BF16.items() if part in device_name), None)
