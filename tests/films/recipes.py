"""Weights and inputs that a test and the maker of its golden numbers build alike, from seeds."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn


def seeded_weights(module: nn.Module) -> dict[str, Tensor]:
    """A state_dict for a network, drawn by the names of its tensors; activations keep their scale."""
    return {name: _seeded(name, tensor) for name, tensor in module.state_dict().items()}


def _seeded(name: str, like: Tensor) -> Tensor:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.ones_like(like)
    if name.endswith("running_var"):
        drawn = rng.uniform(0.5, 1.5, like.shape)
    elif like.ndim > 1:
        drawn = rng.standard_normal(like.shape, np.float32) * np.float32((2 / like[0].numel()) ** 0.5)
    else:  # scales and shifts; those of a norm are near 1
        drawn = rng.normal(0, 0.1, like.shape) + (1.0 if name.endswith("weight") else 0.0)
    return torch.from_numpy(np.asarray(drawn, np.float32))


def film_frames(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]: noise on moving waves."""
    rng = np.random.default_rng(frames)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x + 3 * t) / 9) + np.cos((y - t) / 7) for t in range(frames)]
    noise = rng.normal(0, 20, (frames, height, width, 3))
    return (128 + 40 * np.stack(waves)[..., None] + noise).clip(0, 255).astype(np.uint8)


def chirp(seconds: float) -> np.ndarray:
    """float32 [samples] at 16 kHz: a rising tone in noise."""
    time = np.arange(round(seconds * 16000)) / 16000
    noise = np.random.default_rng(7).normal(0, 0.02, len(time))
    return (0.3 * np.sin(2 * np.pi * (200 + 600 * time) * time) + noise).astype(np.float32)
