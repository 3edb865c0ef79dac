"""Counts the floating point operations of a training step from shapes alone.

A multiply-add is two operations; the backward pass costs twice the forward pass (Kaplan et al., 2020, section 2.1;
the attention term is exact for the segments given, not an average).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmp.parallel.memory_settings import Checkpointing
from lmp.scaling.devices import known_device

if TYPE_CHECKING:
    from lmp.model import LmpConfig


@dataclass(frozen=True)
class Forward:
    """Operations of one forward pass, by part.

    Attributes:
        projections: the linear maps of attention in all blocks.
        mlps: of all blocks.
        attention: scores and weighted sums, which grow with the square of the segments.
        ends: embeddings before the blocks, heads and target projections after them.
    """

    projections: float
    mlps: float
    attention: float
    ends: float

    @property
    def total(self) -> float:
        return self.projections + self.mlps + self.attention + self.ends


def train_flops(config: LmpConfig, packs: Iterable[Sequence[int]]) -> float:
    """Operations of forward and backward over packs, each given by the lengths of its segments in shots.

    What a checkpointed block does again is not counted: the MFU is this over time and peak.
    """
    return 3.0 * sum(forward_flops(config, lengths).total for lengths in packs)


def hardware_flops(
    config: LmpConfig,
    packs: Iterable[Sequence[int]],
    *,
    checkpointing: Checkpointing = "none",
    tile_mlp: int | None = None,
) -> float:
    """As `train_flops`, and what the memory mode does again besides: the HFU is this over time and peak."""
    passes = [forward_flops(config, lengths) for lengths in packs]
    again = sum(recomputed(one, checkpointing=checkpointing, tile_mlp=tile_mlp) for one in passes)
    return 3.0 * sum(one.total for one in passes) + again


def recomputed(one: Forward, *, checkpointing: Checkpointing, tile_mlp: int | None) -> float:
    """Operations of a forward pass that backward repeats under a memory mode.

    A checkpointed block is run again up to the last tensor that backward needs: all but the MLP's second linear map,
    and in tiles neither of the two, for tiles run again by themselves, once, in any mode.
    """
    blocks = 0.0
    if checkpointing != "none":
        blocks += one.projections + (one.mlps / 2 if tile_mlp is None else 0.0)
    if checkpointing == "full":
        blocks += one.attention
    return blocks + (one.mlps if tile_mlp is not None else 0.0)


def forward_flops(config: LmpConfig, lengths: Sequence[int]) -> Forward:
    """Operations of the forward pass over one pack, given by the lengths of its segments in shots."""
    return forward_of(config, shots=sum(lengths), squares=sum(n * n for n in lengths))


def forward_of(config: LmpConfig, *, shots: float, squares: float) -> Forward:
    """As `forward_flops`, from the sum of the segments' lengths and that of their squares."""
    width, hidden, embed = config.width, int(config.mlp_ratio * config.width), config.contrastive_width
    tokens = {name: spec["tokens"] for name, spec in config.modalities.items()}
    projections = mlps = attention = ends = 0.0
    for name, spec in config.modalities.items():
        t, layers = shots * tokens[name], config.layers_of(name)
        projections += layers * 2 * t * 4 * width * width
        mlps += layers * 2 * t * 2 * width * hidden
        attention += layers * 4 * squares * tokens[name] ** 2 * width
        # Embedding, then the heads for prediction and alignment, and the projection of the target.
        ends += 2 * t * (spec["width"] * width + 2 * (width * width + width * embed) + spec["width"] * embed)
    queries, memory = tokens[config.target], sum(tokens[name] for name in config.sources)
    linear = 4 * queries + 2 * queries + 2 * memory
    projections += config.cross_layers * 2 * shots * linear * width * width
    mlps += config.cross_layers * 2 * shots * queries * 2 * width * hidden
    attention += config.cross_layers * 4 * squares * queries * (queries + memory) * width
    ends += 2 * shots * queries * (width * width + width * embed)
    return Forward(projections=projections, mlps=mlps, attention=attention, ends=ends)


def contrastive_flops(pairs: Iterable[tuple[float, float]], width: int) -> float:
    """Operations of tiled contrastive losses over (rows, candidates), in vectors of `width`.

    Logits in forward and again in backward, and from them the gradients of rows and candidates.
    """
    return 8.0 * width * sum(rows * candidates for rows, candidates in pairs)


def peak_tflops(device_name: str) -> float | None:
    """The dense bf16 peak of a known device, else None."""
    device = known_device(device_name)
    return device.bf16_tflops if device else None
