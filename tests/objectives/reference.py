"""The three objectives written down from the full matrix of all pairs of tokens of a step, and packs to try them on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lmp.config import Config, validate
from lmp.data.loader import PackBatch, StepBatch
from lmp.data.stream import Cursor
from lmp.model import LmpConfig, LmpForPretraining
from lmp.objectives import build_objectives
from lmp.objectives.base import Objective, ObjectiveBatch
from lmp.parallel.mesh import Mesh
from lmp.train.watchdog import Watch

SHAPES = {
    "video": {"tokens": 2, "width": 12},
    "audio": {"tokens": 1, "width": 6},
    "text": {"tokens": 3, "width": 5},
}
IDLE = -1
PACKS = (
    ((3, 0, 6), (8, 2, 5), (3, 4, 3), (IDLE, 0, 2)),
    ((3, 5, 8), (IDLE, 0, 8)),
    ((9, 0, 16),),
    ((8, 0, 4), (9, 10, 6), (3, 1, 4), (IDLE, 0, 2)),
)
"""Windows (film, first shot, shots) of packs of 16 shots. Films come back within a pack and in other packs, with shots
that are the same or near."""


def make_model(loss: str = "info_nce") -> LmpForPretraining:
    torch.manual_seed(0)
    config = LmpConfig(
        modalities=SHAPES,
        width=16,
        heads=2,
        contextual_layers=1,
        cross_layers=1,
        contrastive_width=8,
        max_positions=20,
        initializer_range=0.3,
        contrastive_loss=loss,
        initial_bias=-2.0,
    )
    return LmpForPretraining(config)


def make_config(**objectives: Any) -> Config:
    """The configuration of a run; only its objectives and its seed matter here."""
    section = {"masked_shot": {"ratio": 0.4}, "tile": 13, **objectives}
    return validate({"seed": 1, "data": {"train": ["unread"], "pack_shots": 16}, "objectives": section}, source="test")


def make_pack(number: int, windows: Sequence[tuple[int, int, int]] | None = None, *, empty: bool = False) -> PackBatch:
    """A whole pack; a tenth of the shots lack a modality (`empty`: all lack all)."""
    windows = PACKS[number] if windows is None else windows
    draw = torch.Generator().manual_seed(number)
    lengths = torch.tensor([length for *_, length in windows])
    segment_P = torch.arange(len(windows)).repeat_interleave(lengths)
    position_P = torch.cat([torch.arange(int(length)) for length in lengths])
    film_P = torch.tensor([film for film, *_ in windows])[segment_P]
    first_P = torch.tensor([first for _, first, _ in windows])[segment_P]
    features, valid = {}, {}
    for name, spec in SHAPES.items():
        kept_P = torch.rand(len(film_P), generator=draw) < 0.9
        valid[name] = kept_P & (film_P != IDLE) & (not empty)
        x_PKD = torch.randn(len(film_P), spec["tokens"], spec["width"], generator=draw)
        features[name] = (x_PKD * valid[name][:, None, None]).half()
    return PackBatch(
        slot=number,
        epoch=0,
        number=number,
        lengths=tuple(lengths.tolist()),
        features=features,
        valid=valid,
        film_P=film_P,
        shot_P=torch.where(film_P == IDLE, 0, first_P + position_P),
        position_P=position_P,
        segment_P=segment_P,
        time_P=position_P.float(),
    )


def step_of(packs: Sequence[PackBatch]) -> StepBatch:
    return StepBatch(Cursor(), list(packs))


def objectives_of(config: Config) -> list[Objective]:
    return build_objectives(config.objectives)


class PlainEngine:
    """What `accumulate` needs of an engine, without DeepSpeed: gradients of all packs add up in the model."""

    def __init__(self, model: LmpForPretraining, mesh: Mesh | None = None) -> None:
        self.model = model
        self.mesh = mesh or Mesh(rank=0, world_size=1, sequence=1, device=torch.device("cpu"), sequence_group=None)
        self.watch = Watch()
        self.with_graph: list[bool] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.with_graph.append(torch.is_grad_enabled())
        return self.model(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


class Found(NamedTuple):
    """Of one objective: the sum over its rows, their number, and the sums of top-1 and of chance."""

    total: Tensor
    count: float
    top1: float
    chance: float


class Dense:
    """All objectives over all packs of a step.

    Args:
        outputs: of the model, one per pack.
        views: the packs with their masks.
        config: loss, scope and exclude_near.
    """

    def __init__(self, outputs: Sequence[Any], views: Sequence[ObjectiveBatch], config: Config) -> None:
        self.settings = config.objectives
        self.output = outputs[0]
        self.films = torch.cat([view.film_P for view in views])
        self.shots = torch.cat([view.shot_P for view in views])
        self.packs = torch.cat([torch.full_like(view.film_P, n) for n, view in enumerate(views)])
        self.segments = torch.cat([view.segment_P for view in views])

        def joined(of: Callable[[str], Sequence[Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat(list(of(name))) for name in SHAPES}

        self.valid = joined(lambda name: [view.valid[name] for view in views])
        self.masked = joined(lambda name: [view.masked[name] for view in views])
        self.seen = {name: self.valid[name] & ~self.masked[name] for name in SHAPES}
        self.predicted = joined(lambda name: [output.predicted[name] for output in outputs])
        self.target = joined(lambda name: [output.target[name] for output in outputs])
        self.aligned = joined(lambda name: [output.aligned[name] for output in outputs])
        self.reconstructed = torch.cat([output.reconstructed for output in outputs])

    def masked_shot(self) -> Found:
        parts = [
            self._pairs("masked", self.predicted[name], self.target[name], self.masked[name], self.valid[name])
            for name in SHAPES
        ]
        return _sum(parts)

    def alignment(self) -> Found:
        shot = {name: F.normalize(x.mean(1, keepdim=True), dim=-1) for name, x in self.aligned.items()}
        parts = []
        for one, other in combinations(SHAPES, 2):
            both = self.seen[one] & self.seen[other]
            for a, b in ((one, other), (other, one)):
                found = self._pairs("alignment", shot[a], shot[b], both, both)
                parts.append(Found(*(x / 2 for x in found)))
        return _sum(parts)

    def reconstruction(self) -> Found:
        rows = self.seen["video"] & (self.seen["audio"] | self.seen["text"])
        target = self.aligned["video"].detach()
        return self._pairs("reconstruction", self.reconstructed, target, rows, self.seen["video"])

    def all(self) -> dict[str, Found]:
        names = ("masked_shot", "alignment", "reconstruction")
        return {name: getattr(self, name)() for name in names if getattr(self.settings, name).weight > 0}

    def loss(self) -> Tensor:
        """The weighted sum of the objectives' means over their rows."""
        means = [getattr(self.settings, name).weight * f.total / max(f.count, 1) for name, f in self.all().items()]
        return torch.stack(means).sum()

    def _pairs(self, name: str, query: Tensor, candidate: Tensor, rows: Tensor, chosen: Tensor) -> Found:
        tokens = query.shape[1]
        allowed = self._allowed(chosen, tokens)[rows.repeat_interleave(tokens)]
        positive = torch.eye(len(rows) * tokens, dtype=torch.bool)[rows.repeat_interleave(tokens)]
        logits = self.output.scale[name] * query[rows].flatten(0, 1) @ candidate.flatten(0, 1).T
        counts = allowed.sum(1).tolist()
        if self.settings.loss == "sigmoid":
            sign = torch.where(positive, 1.0, -1.0)
            losses = -F.logsigmoid(sign * (logits + self.output.bias[name]))
            total = losses[allowed].sum()
            # The least that a constant can cost: the mean of each row's labels is 1 / G.
            chance = sum(-math.log(1 / g) - (g - 1) * math.log(1 - 1 / g) for g in counts if g > 1)
        else:
            log_share = logits.masked_fill(~allowed, -math.inf).log_softmax(1)
            total = -log_share[positive].sum()
            chance = sum(math.log(g) for g in counts)
        hits = (logits[positive][:, None] > logits.masked_fill(~allowed | positive, -math.inf)).all(1)
        return Found(total, float(len(counts)), float(hits.sum()), chance)

    def _allowed(self, chosen: Tensor, tokens: int) -> Tensor:
        """[T, T] bool: which candidate tokens (columns) each token may choose from."""
        same_pack = self.packs[:, None] == self.packs
        same_segment = same_pack & (self.segments[:, None] == self.segments)
        inside = {"film": same_segment, "pack": same_pack, "step": torch.ones_like(same_pack)}[self.settings.scope]
        alike = (self.films[:, None] == self.films) & (self.films >= 0)
        alike &= (self.shots[:, None] - self.shots).abs() <= self.settings.exclude_near
        if self.settings.exclude_near == 0:
            alike = torch.zeros_like(alike)
        allowed = inside & chosen & ~alike
        allowed = allowed.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        return allowed | torch.eye(len(allowed), dtype=torch.bool)


def cut_view(view: ObjectiveBatch, part: slice) -> ObjectiveBatch:
    """Shots `part` of a pack."""
    fields = {
        key: {name: x[part] for name, x in value.items()} if isinstance(value, dict) else value[part]
        for key, value in vars(view).items()
    }
    return ObjectiveBatch(**fields)


def run_packs(model: Any, packs: Sequence[PackBatch], views: Sequence[ObjectiveBatch]) -> list[Any]:
    """The model's outputs of whole packs."""
    return [
        model(
            pack.features,
            pack.valid,
            lengths=pack.lengths,
            positions=pack.position_P,
            times=pack.time_P,
            masked=v.masked,
        )
        for pack, v in zip(packs, views, strict=True)
    ]


def _sum(parts: Sequence[Found]) -> Found:
    return Found(*(sum(column) for column in zip(*parts, strict=True)))
