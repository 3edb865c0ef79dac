"""A small model with several tokens per shot, and input for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmp.model import LmpConfig, LmpForPretraining

SHAPES = {
    "video": {"tokens": 2, "width": 12},
    "text": {"tokens": 1, "width": 7},
    "audio": {"tokens": 3, "width": 5},
}


def small_config(**changes: Any) -> LmpConfig:
    settings: dict[str, Any] = {
        "modalities": SHAPES,
        "width": 16,
        "heads": 2,
        "contextual_layers": {"video": 2, "text": 1, "audio": 1},
        "cross_layers": 2,
        "contrastive_width": 8,
        "max_positions": 40,
        # Large enough that attention is far from uniform, so that a leak would show.
        "initializer_range": 0.3,
    }
    return LmpConfig(**(settings | changes))


def small_input(config: LmpConfig, shots: int, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a packed forward: random features, some missing, some masked, times in seconds."""
    draw = torch.Generator().manual_seed(seed)
    features, valid, masked = {}, {}, {}
    for name, spec in config.modalities.items():
        features[name] = torch.randn(shots, spec["tokens"], spec["width"], generator=draw)
        valid[name] = torch.rand(shots, generator=draw) < 0.7
        valid[name][0], valid[name][-1] = False, True
        masked[name] = valid[name] & (torch.rand(shots, generator=draw) < 0.4)
    times = 4 * torch.rand(shots, generator=draw).cumsum(0)
    return {"features": features, "valid": valid, "masked": masked, "times": times}


@pytest.fixture
def make_config() -> Callable[..., LmpConfig]:
    return small_config


@pytest.fixture
def make_input() -> Callable[..., dict[str, Any]]:
    return small_input


@pytest.fixture
def make_model() -> Callable[..., LmpForPretraining]:
    def make(**changes: Any) -> LmpForPretraining:
        torch.manual_seed(0)
        return LmpForPretraining(small_config(**changes))

    return make
