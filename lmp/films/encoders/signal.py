"""Encoders made of classical signal features: nothing to download, nothing learned, no randomness.

They tell colours, edges, motion, spectra and spelling apart, not things and meanings. They let the whole
path run on a laptop and are the baseline that a pretrained encoder has to beat.
"""

from __future__ import annotations

import math
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmp.films.encoders.base import SAMPLE_RATE, Kind

Array = NDArray[np.float32]

ROWS, COLUMNS = 2, 3
HUES, SATURATIONS, VALUES, EDGES = 8, 4, 6, 6
BANDS = 64


class _SignalEncoder(ABC):
    kind: ClassVar[Kind]
    name: ClassVar[str]
    version: ClassVar[str] = "1"
    width: ClassVar[int]
    height: ClassVar[int] = 0
    rate: ClassVar[float] = 0.0
    _frames: ClassVar[int] = 0  # wanted per token

    def __init__(self, *, tokens: int = 1) -> None:
        self.tokens = tokens
        self.frames = tokens * self._frames

    def encode(self, shots: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Features [n, K, D] float32 and valid [n] bool; see `Encoder.encode`."""
        features_nKD = torch.zeros(len(shots), self.tokens, self.width)
        valid_n = torch.zeros(len(shots), dtype=torch.bool)
        for i, shot in enumerate(shots):
            for k, part in enumerate(self._parts(shot) if shot is not None and len(shot) else ()):
                if (vector := self._vector(part)) is not None:
                    features_nKD[i, k] = torch.from_numpy(vector)
                    valid_n[i] = True
        return features_nKD, valid_n

    def describe(self) -> dict[str, Any]:
        """Name, version, tokens, width and sampling, as JSON."""
        return {
            "name": self.name,
            "version": self.version,
            "kind": self.kind,
            "tokens": self.tokens,
            "width": self.width,
            "sampling": self._sampling(),
        }

    def _parts(self, shot: Any) -> list[Any]:
        """The K equal parts of a shot; neighbours share what is too short to be cut."""
        bounds = [(k * len(shot) // self.tokens, -(-(k + 1) * len(shot) // self.tokens)) for k in range(self.tokens)]
        return [shot[start:end] for start, end in bounds]

    @abstractmethod
    def _vector(self, shot: Any) -> Array | None:
        """[D] of one shot, or None where there is nothing to encode."""

    @abstractmethod
    def _sampling(self) -> dict[str, Any]:
        """How the encoder samples a shot, as JSON."""


class SignalPicture(_SignalEncoder):
    """Colour, edges and motion on a 2 x 3 grid, averaged over the frames of a shot; 176 wide.

    Per cell: histograms of hue (weighted by colourfulness), saturation, value and edge direction, mean edge
    strength, mean colour, motion (mean absolute difference of successive frames). For the whole picture:
    motion and its spread.
    """

    kind = "picture"
    name = "signal-picture"
    width = ROWS * COLUMNS * (HUES + SATURATIONS + VALUES + EDGES + 1 + 3 + 1) + 2
    _frames = 4
    height = 72  # in which cuts are found by default, so that frames are scaled once for both
    _size = (96, 64)  # every frame is brought to this width and height, so that the grid divides it

    def _vector(self, shot: np.ndarray) -> Array:
        small_Nhwc = np.stack([cv2.resize(f, self._size, interpolation=cv2.INTER_AREA) for f in shot])
        still = np.mean([_still(frame) for frame in small_Nhwc], axis=0)
        motion_cells, motion = np.zeros((ROWS, COLUMNS)), np.zeros(1)
        if len(small_Nhwc) > 1:
            change_Mhw = np.abs(np.diff(small_Nhwc.astype(np.float32), axis=0)).mean(axis=-1) / 20
            motion_cells, motion = _cells(change_Mhw.mean(axis=0)).mean(axis=-1), change_Mhw.mean(axis=(1, 2))
        parts = [still, motion_cells.ravel(), [motion.mean(), motion.std()]]
        return np.concatenate(parts).astype(np.float32)

    def _sampling(self) -> dict[str, Any]:
        return {"frames": self._frames, "height": self.height}


class SignalSound(_SignalEncoder):
    """Log-mel spectrum of a shot: mean, spread and mean absolute change of 64 bands, level kept; 192 wide."""

    kind = "sound"
    name = "signal-sound"
    width = 3 * BANDS
    _window, _hop, _fft, _block = 400, 160, 1024, 4096

    def _vector(self, shot: np.ndarray) -> Array:
        wave = np.nan_to_num(np.asarray(shot, dtype=np.float32))
        wave = np.pad(wave, (0, max(0, self._window - len(wave))))
        frames_NW = np.lib.stride_tricks.sliding_window_view(wave, self._window)[:: self._hop]
        taper_W = np.hanning(self._window).astype(np.float32)
        # In blocks: one spectrum of an hour in one shot would take gigabytes.
        blocks = []
        for start in range(0, len(frames_NW), self._block):
            spectrum_NF = torch.from_numpy(np.fft.rfft(frames_NW[start : start + self._block] * taper_W, self._fft))
            power_NF = torch.view_as_real(spectrum_NF).square().sum(dim=-1)
            # The product is left to torch, which keeps to the threads that it is told: those that NumPy's library
            # would start cost three times the work.
            blocks.append(torch.log(power_NF @ _MEL_BF.T + 1e-5))
        log_mel_NB = torch.cat(blocks).numpy()
        change_B = np.abs(np.diff(log_mel_NB, axis=0)).sum(axis=0) / max(1, len(log_mel_NB) - 1)
        # The offset and scales bring ordinary film sound to about zero mean and unit spread.
        parts = [(log_mel_NB.mean(axis=0) + 4) / 4, log_mel_NB.std(axis=0) / 2, change_B]
        return np.concatenate(parts).astype(np.float32)

    def _sampling(self) -> dict[str, Any]:
        return {"rate": SAMPLE_RATE, "window": self._window, "hop": self._hop, "bands": BANDS}


class SignalWords(_SignalEncoder):
    """Words and character 3- to 5-grams hashed with a sign into 256 places; sublinear counts, unit length."""

    kind = "words"
    name = "signal-words"
    width = 256

    def _parts(self, shot: str) -> list[Any]:
        return [" ".join(words) for words in super()._parts(shot.split())]

    def _vector(self, shot: str) -> Array | None:
        words = unicodedata.normalize("NFKC", shot).casefold().split()
        text = f" {' '.join(words)} "
        grams = Counter(text[i : i + n] for n in (3, 4, 5) for i in range(len(text) - n + 1))
        # The marker keeps a whole word apart from the same letters inside another one.
        grams.update(f"={word}" for word in words)
        vector = np.zeros(self.width)
        for gram, count in grams.items():
            code = zlib.crc32(gram.encode("utf-8", errors="replace"))
            vector[code % self.width] += (1 - 2 * ((code >> 20) & 1)) * (1 + math.log(count))
        norm = float(np.linalg.norm(vector))
        return (vector / norm).astype(np.float32) if words and norm else None

    def _sampling(self) -> dict[str, Any]:
        return {"grams": [3, 4, 5], "words": True}


def _still(frame_hwc: NDArray[np.uint8]) -> Array:
    """What one frame gives, cell by cell. The bins of a histogram sum to the root of their number."""
    hsv = cv2.cvtColor(frame_hwc, cv2.COLOR_RGB2HSV).astype(np.float32)
    grey = cv2.cvtColor(frame_hwc, cv2.COLOR_RGB2GRAY).astype(np.float32)
    across, down = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    strength = np.hypot(across, down)
    direction = np.arctan2(down, across) % np.pi
    hue, saturation, value = (np.asarray(hsv[..., i]) for i in range(3))
    strength_cells = _cells(strength)
    pixels = strength_cells.shape[-1]
    edges_per_cell = np.maximum(strength_cells.sum(axis=-1), pixels)[..., None]
    parts = [
        _histograms(hue / 180, HUES, weights=saturation * value / 255**2) / pixels,
        _histograms(saturation / 256, SATURATIONS) / pixels,
        _histograms(value / 256, VALUES) / pixels,
        _histograms(direction / np.pi, EDGES, weights=strength) / edges_per_cell,
        strength_cells.mean(axis=-1)[..., None] / 100,
        np.stack([_cells(frame_hwc[..., c]).mean(axis=-1) for c in range(3)], axis=-1) / 128 - 1,
    ]
    return np.concatenate(parts, axis=-1).ravel().astype(np.float32)


def _cells(plane_hw: np.ndarray) -> np.ndarray:
    """[h, w] -> [ROWS, COLUMNS, pixels of the cell]."""
    height, width = plane_hw.shape
    cut = plane_hw.reshape(ROWS, height // ROWS, COLUMNS, width // COLUMNS)
    return cut.transpose(0, 2, 1, 3).reshape(ROWS, COLUMNS, -1)


def _histograms(plane_hw: np.ndarray, bins: int, *, weights: np.ndarray | None = None) -> np.ndarray:
    """[h, w] of values in [0, 1] -> [ROWS, COLUMNS, bins]: weighted counts times the root of the bins."""
    bin_of = np.clip((_cells(plane_hw) * bins).astype(np.int64), 0, bins - 1)
    offset = np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS, 1) * bins
    flat_weights = None if weights is None else _cells(weights).ravel()
    counts = np.bincount((bin_of + offset).ravel(), flat_weights, minlength=ROWS * COLUMNS * bins)
    return counts.reshape(ROWS, COLUMNS, bins) * math.sqrt(bins)


def _mel_filters(fft: int, bands: int, *, lowest: float = 60.0) -> Array:
    """Triangular filters [bands, fft // 2 + 1], evenly spaced on the mel scale up to half the sample rate."""
    hertz_F = np.linspace(0, SAMPLE_RATE / 2, fft // 2 + 1)
    low, high = 2595 * np.log10(1 + np.array([lowest, SAMPLE_RATE / 2]) / 700)
    edges = 700 * (10 ** (np.linspace(low, high, bands + 2) / 2595) - 1)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (hertz_F - left) / (centre - left), (right - hertz_F) / (right - centre)
    return np.clip(np.minimum(rising, falling), 0, None).astype(np.float32)


_MEL_BF = torch.from_numpy(_mel_filters(SignalSound._fft, BANDS))
