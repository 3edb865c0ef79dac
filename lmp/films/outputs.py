"""What encoders are given, in batches, and what they make of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lmp.films.encoders import Encoder
from lmp.films.media import Sampling

_BATCH, _BATCH_BYTES = 32, 64 << 20  # shots whose pictures or sound are held at once, and their size
SILENT = 1e-4  # loudest sample: -80 dB
BLACK = 16  # brightest sample of a frame's colours; video's own black is 16


class Output:
    """Collects the inputs of one encoder into batches, and its outputs.

    A batch holds shots of one film only: the last bits of a network's output depend on what else is in its batch
    (`lmp bench ingest --batches` tells by how much), and a film's bytes must not depend on the films before it, on a
    restart or on how a list of films is divided.

    Attributes:
        odd: shots that are `silent` or `black`, whose features are not finite (`nan`), or are the very same
            numbers as those of the shot before (`repeated`): a stuck picture, or a broken encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        clips = encoder.tokens if encoder.rate else 1
        self.sampling = Sampling(encoder.frames, encoder.height, encoder.rate, clips)
        self.odd: Counter[str] = Counter()
        self._waiting: list[Any] = []
        self._bytes = 0
        self._features: list[np.ndarray] = []
        self._valid: list[np.ndarray] = []
        self._last: np.ndarray | None = None

    def add(self, shot: Any) -> None:
        """Picture, sound or words of the next shot."""
        self._waiting.append(shot)
        self._bytes += getattr(shot, "nbytes", 0)
        if self.encoder.kind == "sound" and len(shot) and np.abs(shot).max() < SILENT:
            self.odd["silent"] += 1
        if self.encoder.kind == "picture" and shot.max() <= BLACK:
            self.odd["black"] += 1
        if len(self._waiting) == _BATCH or self._bytes >= _BATCH_BYTES:
            self._encode()

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [S, K, D] and bool [S]."""
        if self._waiting:
            self._encode()
        return np.concatenate(self._features), np.concatenate(self._valid)

    def _encode(self) -> None:
        with torch.inference_mode():
            features_nKD, valid_n = self.encoder.encode(self._waiting)
        made, valid = features_nKD.float().cpu().numpy(), valid_n.cpu().numpy()
        for vectors in made[valid]:
            if not np.isfinite(vectors).all():
                self.odd["nan"] += 1
            if self.encoder.kind != "words" and self._last is not None and np.array_equal(vectors, self._last):
                self.odd["repeated"] += 1
            self._last = vectors
        self._features.append(made)
        self._valid.append(valid)
        self._waiting, self._bytes = [], 0


Outputs = Mapping[str, Sequence[Output]]


def of_kind(outputs: Outputs, kind: str) -> list[Output]:
    """Those whose encoder takes pictures, sound or words."""
    return [output for parts in outputs.values() for output in parts if output.encoder.kind == kind]
