"""What the parity grid is made of: topologies, models, steps of packs, and the configuration of each case.

The ranks of grid_worker.py and the reference of test_grid.py build the same inputs from these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmp.config import Config, validate
from lmp.data.index import Modality
from lmp.model import LmpConfig, LmpForPretraining
from lmp.objectives.masking import draw_masks
from lmp.train import trainer

TOPOLOGIES = {"1x1": (1, 1), "2x1": (2, 1), "1x2": (1, 2), "2x2": (2, 2), "1x4": (1, 4)}
"""Data degree x sequence degree."""
STAGES = (0, 1, 2, 3)
POSITIONS = ("learned", "sinusoidal", "rope", "time_rope")
TOKENS = {
    "learned": {"video": 1, "audio": 2, "text": 1},
    "sinusoidal": {"video": 2, "audio": 1, "text": 1},
    "rope": {"video": 1, "audio": 1, "text": 3},
    "time_rope": {"video": 3, "audio": 1, "text": 2},
}
"""Tokens per shot; each kind of positions comes with another shape of the model."""
WIDTHS = {"video": 6, "audio": 5, "text": 7}
WEIGHTS = {"masked_shot": 0.7, "alignment": 1.3, "reconstruction": 0.5}
SHOTS = 24
SEED = 5
LR = 0.1
"""Large, so that an update is well above the rounding of the weights."""
CLIP = 0.05
"""Below every gradient norm of the grid, so that every step is clipped."""

LAYOUTS = (((9, 6, 1, 3), (5,)), ((7, 3), (14,)), ((24,), ()), ((5, 5, 5, 5), (2, 2)))
"""Windows and idle segments of the packs. The second leaves whole slices idle: one of two, and two of four."""


class Case(NamedTuple):
    """One step of the grid: which objectives, how many packs per data rank, what is missing, and how rows compare."""

    objectives: str
    accumulation: int
    data: str = "mixed"
    loss: str = "info_nce"
    scope: str = "pack"
    exclude_near: int = 0

    @property
    def name(self) -> str:
        return (
            f"{self.objectives}-accumulate{self.accumulation}-{self.data}-{self.loss}-{self.scope}-{self.exclude_near}"
        )


OBJECTIVES = (*WEIGHTS, "all")
CASES = (
    *(Case(name, accumulation) for name in OBJECTIVES for accumulation in (1, 2)),
    Case("all", 1, "no-text"),
    Case("all", 2, "no-video"),
    Case("all", 1, scope="step"),
    Case("all", 2, scope="step", exclude_near=2),
    Case("all", 2, scope="film", exclude_near=1),
)
SIGMOID_CASES = (
    Case("all", 2, loss="sigmoid", scope="step"),
    Case("all", 1, loss="sigmoid", exclude_near=2),
)
"""The same model with a bias beside each temperature."""
SIGMOID_STAGES = (1, 3)
HALF = ("2x1", "1x2")
"""Topologies that run in bf16 too, in the stages that can."""
HALF_STAGES = (1, 2, 3)
HALF_CASES = (Case("all", 1), Case("all", 2))
HALF_POSITIONS = "rope"
CONTROL = Case("all", 2)
"""The step that is also taken wrongly on purpose, and whose update is compared."""


@dataclass(frozen=True)
class WholePack:
    """A pack as one process sees it; the fields are those of PackBatch, over all its shots."""

    number: int
    lengths: tuple[int, ...]
    features: dict[str, Tensor]
    valid: dict[str, Tensor]
    film_P: Tensor
    shot_P: Tensor
    position_P: Tensor
    segment_P: Tensor
    time_P: Tensor


def positions_of(topology: str, stage: int) -> str:
    """Every topology and every stage meets every kind of positions."""
    return POSITIONS[(list(TOPOLOGIES).index(topology) + stage) % len(POSITIONS)]


def config_of(case: Case, *, positions: str, stage: int, topology: str, precision: str = "fp32") -> Config:
    """The configuration of one case; nothing is read from its data set."""
    dp, sp = TOPOLOGIES[topology]
    weights = {name: w if case.objectives in (name, "all") else 0.0 for name, w in WEIGHTS.items()}
    objectives: dict[str, Any] = {name: {"weight": weight} for name, weight in weights.items()}
    objectives["masked_shot"]["ratio"] = 0.3
    objectives |= {"loss": case.loss, "scope": case.scope, "exclude_near": case.exclude_near}
    # Tiles that cut rows and candidates unevenly.
    objectives["tile"] = 7
    # DeepSpeed keeps small parameters whole on every rank; below its default all of this model would be.
    partitioned = {"zero_optimization": {"stage3_param_persistence_threshold": 300}} if stage == 3 else {}
    raw = {
        "seed": SEED,
        "data": {"train": ["unread"], "pack_shots": SHOTS, "packs_per_step": case.accumulation * dp},
        "model": {
            "width": 16,
            "heads": 4,
            "mlp_ratio": 2,
            "contextual_layers": 1,
            "cross_layers": 1,
            "contrastive_width": 8,
            "positions": positions,
            "max_positions": SHOTS,
        },
        "objectives": objectives,
        "optimizer": {"lr": LR, "clip": CLIP},
        "train": {"precision": precision},
        "parallel": {"zero": stage, "sequence": sp, "deepspeed": partitioned},
    }
    return validate(raw, source="the parity grid")


def model_config(config: Config) -> LmpConfig:
    """The model of a case."""
    tokens = TOKENS[config.model.positions]
    modalities = {name: Modality(name, tokens[name], width, "float16") for name, width in WIDTHS.items()}
    return trainer.model_config(config, SimpleNamespace(modalities=modalities))


def model_of(shape: LmpConfig) -> LmpForPretraining:
    """A model whose parameters are all far from zero and from each other, biases and norms too."""
    model = LmpForPretraining(shape)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.startswith("temperatures."):
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.3 * noise + (1.0 if "norm.weight" in name else 0.0))
    return model


def packs_of(case: Case, *, positions: str, count: int) -> list[WholePack]:
    """The packs of a case's step, in the order of their slots."""
    packs = [_pack(number, TOKENS[positions]) for number in range(count)]
    absent = case.data.removeprefix("no-")
    for pack in packs:
        if absent in pack.valid:
            pack.valid[absent].zero_()
    return packs


def masks_of(pack: WholePack, config: Config) -> dict[str, Tensor]:
    """The masks of a whole pack."""
    settings = config.objectives
    name = {"seed": config.seed, "epoch": 0, "pack": pack.number}
    return draw_masks(pack.valid, pack.film_P, pack.shot_P, ratio=settings.mask_ratio, **name)


def dealt(packs: Sequence[WholePack], dp_rank: int, dp_size: int) -> list[WholePack]:
    """A data rank's packs: there and back again, as the costs of packs would have it."""
    rounds = [list(range(first, first + dp_size)) for first in range(0, len(packs), dp_size)]
    return [packs[(slots if number % 2 == 0 else slots[::-1])[dp_rank]] for number, slots in enumerate(rounds)]


def _pack(number: int, tokens: dict[str, int]) -> WholePack:
    windows, idle = LAYOUTS[number]
    lengths = (*windows, *idle)
    generator = torch.Generator().manual_seed(100 + number)
    segment_P = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position_P = torch.cat([torch.arange(length) for length in lengths])
    first_P = torch.cat([torch.full((length,), 3 * s) for s, length in enumerate(lengths)])
    real_P = segment_P < len(windows)
    return WholePack(
        number=number,
        lengths=lengths,
        features={
            name: (torch.randn(SHOTS, tokens[name], width, generator=generator) * real_P[:, None, None]).half()
            for name, width in WIDTHS.items()
        },
        valid=_valid(number, real_P, generator),
        # Packs, and windows of one pack, share films.
        film_P=torch.where(real_P, segment_P % 3, -1),
        shot_P=torch.where(real_P, first_P + position_P, 0),
        position_P=position_P,
        segment_P=segment_P,
        time_P=torch.where(real_P, 1.5 * (first_P + position_P), 0.0).float(),
    )


def _valid(number: int, real_P: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Some are missing here and there, and in each pack one modality over a long run."""
    valid = {name: real_P & (torch.rand(SHOTS, generator=generator) > 0.2) for name in WIDTHS}
    quarter = SHOTS // 4
    if number == 0:
        valid["text"][2 * quarter :] = False
    elif number == 1:
        valid["audio"][:] = False
    elif number == 2:
        for name in WIDTHS:
            valid[name][quarter : 2 * quarter] = False
    else:
        valid["video"][:quarter] = False
    return valid
