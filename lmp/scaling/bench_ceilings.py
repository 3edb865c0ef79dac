"""The first part of `lmp bench step`: how fast this machine multiplies and copies, apart from any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmp.scaling.bench_clock import Clock, MatmulCeiling, StepSettings, spread
from lmp.scaling.bench_subjects import MLP_RATIO

_COPIED = {"cpu": 64 * 2**20, "cuda": 2**30}


def ceilings(settings: StepSettings) -> dict[str, Any]:
    """Rates of a large product, of the model's own products, and of copies.

    Returns:
        matmul: the rates (operations a second) of the square product, and its side.
        products: for each linear map of a block: rows, ins, outs, and the rates of forward, of the gradient by the
            input and of that by the weight, with their shares of the square product's in the same round.
        copies: what is copied -> bytes read and written a second; between host and device, bytes moved.
    """
    ceiling = MatmulCeiling(settings)
    ceiling()
    own = [_Product(settings, outs, ins) for outs, ins in _linear_maps(settings.shape.width)]
    for product in own:
        product.turn()
    square: list[float] = []
    for _ in range(settings.rounds):
        square.append(ceiling())
        for product in own:
            product.record(square[-1])
    return {
        "matmul": {"side": ceiling.side, "rate": spread(square)},
        "products": [product.row() for product in own],
        "copies": _copies(settings),
    }


def _linear_maps(width: int) -> list[tuple[int, int]]:
    return [(3 * width, width), (width, width), (MLP_RATIO * width, width), (width, MLP_RATIO * width)]


class _Product:
    """One linear map of a block, and the two products of its backward."""

    def __init__(self, settings: StepSettings, outs: int, ins: int) -> None:
        self.rows, self.outs, self.ins = max(settings.tokens, 512), outs, ins
        self.clock = Clock(settings.device)
        x, weight, grad = (
            torch.randn(size, device=settings.device, dtype=settings.dtype)
            for size in ((self.rows, ins), (outs, ins), (self.rows, outs))
        )
        self.works: dict[str, Callable[[], Tensor]] = {
            "forward": lambda: torch.nn.functional.linear(x, weight),
            "input": lambda: grad @ weight,
            "weight": lambda: grad.T @ x,
        }
        self.rates: dict[str, list[float]] = {name: [] for name in self.works}
        self.shares: dict[str, list[float]] = {name: [] for name in self.works}

    def turn(self) -> dict[str, float]:
        """Operations a second of each product."""
        operations = 2.0 * self.rows * self.outs * self.ins
        return {name: operations / self.clock(work) for name, work in self.works.items()}

    def record(self, ceiling: float) -> None:
        for name, rate in self.turn().items():
            self.rates[name].append(rate)
            self.shares[name].append(rate / ceiling)

    def row(self) -> dict[str, Any]:
        parts = {name: {"rate": spread(self.rates[name]), "share": spread(self.shares[name])} for name in self.works}
        return {"rows": self.rows, "ins": self.ins, "outs": self.outs, **parts}


def _copies(settings: StepSettings) -> dict[str, dict[str, float]]:
    clock, size = Clock(settings.device), _COPIED[settings.device]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    works: dict[str, tuple[int, Callable[[], Any]]] = {"on the device": (2, lambda: target.copy_(source))}
    if settings.device == "cuda":
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        works["host to device, pinned"] = 1, lambda: target.copy_(pinned, non_blocking=True)
        works["device to host, pinned"] = 1, lambda: pinned.copy_(source, non_blocking=True)
    found = {}
    for name, (times, work) in works.items():
        clock(work)
        found[name] = spread([times * size / clock(work) for _ in range(settings.rounds)])
    return found
