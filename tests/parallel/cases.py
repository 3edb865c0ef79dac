"""Inputs that the ranks of test_collectives.py and its single-process reference share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANKS = 2
COUNTS = [[[3.0, 0.0, 5.0], [2.0, 0.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 4.0]]]
"""Rows by rank, micro-batch and objective; the second objective has none anywhere."""
WEIGHTS = [1.0, 2.0, 0.5]


@dataclass(frozen=True)
class Whole:
    """Tensors of the whole pack: 12 shots, 4 heads, 3 channels, two keys for each query."""

    rows: Tensor
    weights: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out_grad: Tensor
    lengths: tuple[int, ...] = (5, 1, 4, 2)

    @classmethod
    def make(cls) -> Whole:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        q, out_grad = draw(12, 4, 3), draw(12, 4, 3)
        k, v = draw(24, 4, 3), draw(24, 4, 3)
        return cls(rows=draw(6, 5), weights=draw(RANKS, 6, 5), q=q, k=k, v=v, out_grad=out_grad)


def own(whole: Tensor, rank: int) -> Tensor:
    """A rank's equal run of the first dim."""
    return whole.chunk(RANKS)[rank].clone()


def totals_of(parameter: Tensor, rank: int, micro: int) -> list[Tensor]:
    """Sums of losses whose gradients differ by rank, micro-batch and objective."""
    return [parameter[o] * count * (1 + o + 10 * micro + 100 * rank) for o, count in enumerate(COUNTS[rank][micro])]


def metrics_of(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    found = {
        "both": (torch.tensor(3.0 + rank), torch.tensor(1 + 3 * rank)),
        "none": (torch.tensor(0.0), torch.tensor(0)),
    }
    if rank == 1:
        found["one"] = (torch.tensor(6.0), torch.tensor(4))
    return found
