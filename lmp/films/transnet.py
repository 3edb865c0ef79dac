"""TransNet V2 (Souček and Lokoč, arXiv 2008.04838): a network that tells where shots end, with published weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lmp.errors import UserError
from lmp.films.cuts import Cut, Look
from lmp.films.encoders.weights import digest, fill, load_weights

WINDOW, CONTEXT = 100, 25
"""Frames that the network sees at once, and how many at either end only help to judge the others."""
_STEP = WINDOW - 2 * CONTEXT
_HEIGHT, _WIDTH = 27, 48
_FILTERS, _WIDE = 16, 128
_LOOKUP = 101  # each frame is compared with itself and 50 on either side
_THRESHOLD = 0.5


class TransNetV2(nn.Module):
    """The network of the release, with its parameters' names.

    Three blocks of dilated convolutions; beside them each frame's likeness to the frames around it, of its
    features and of its colour histogram.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [_FILTERS, 2 * _FILTERS, 4 * _FILTERS]
        self.SDDCNN = nn.ModuleList(
            _Block(inner, width) for inner, width in zip([3, *(4 * w for w in widths[:-1])], widths, strict=True)
        )
        self.frame_sim_layer = _FrameLikeness(4 * sum(widths))
        self.color_hist_layer = _ColourLikeness()
        squares = (_HEIGHT // 8) * (_WIDTH // 8)
        self.fc1 = nn.Linear(4 * widths[-1] * squares + 2 * _WIDE, 1024)
        self.cls_layer1 = nn.Linear(1024, 1)
        self.cls_layer2 = nn.Linear(1024, 1)

    def forward(self, frames_BThw3: Tensor) -> tuple[Tensor, Tensor]:
        """How likely a shot ends at each frame.

        Args:
            frames_BThw3: uint8 [B, T, 27, 48, 3], red first.

        Returns:
            float32 [B, T] logits that the frame is the middle one of a transition, and that it is any of it.
        """
        x = frames_BThw3.permute(0, 4, 1, 2, 3).float() / 255
        blocks = []
        for block in self.SDDCNN:
            x = block(x)
            blocks.append(x)
        flat_BTF = x.permute(0, 2, 3, 4, 1).flatten(2)
        joined = torch.cat([self.color_hist_layer(frames_BThw3), self.frame_sim_layer(blocks), flat_BTF], dim=2)
        hidden = functional.relu(self.fc1(joined))
        return self.cls_layer1(hidden)[..., 0], self.cls_layer2(hidden)[..., 0]


class _Block(nn.Module):
    """Two layers of dilated convolutions with a shortcut, then half the height and width."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList([_Dilated(inner, width), _Dilated(4 * width, width)])
        self.pool = nn.AvgPool3d((1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        first = functional.relu(self.DDCNN[0](x))
        return self.pool(functional.relu(self.DDCNN[1](first)) + first)


class _Dilated(nn.Module):
    """Four convolutions over 3 frames that lie 1, 2, 4 and 8 apart."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        for apart in (1, 2, 4, 8):
            self.add_module(f"Conv3D_{apart}", _Convolution(inner, width, apart))
        self.bn = nn.BatchNorm3d(4 * width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.cat([self.get_submodule(f"Conv3D_{apart}")(x) for apart in (1, 2, 4, 8)], dim=1))


class _Convolution(nn.Module):
    """Over space, then over time."""

    def __init__(self, inner: int, width: int, apart: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(inner, 2 * width, (1, 3, 3), padding=(0, 1, 1), bias=False),
            nn.Conv3d(2 * width, width, (3, 1, 1), dilation=(apart, 1, 1), padding=(apart, 0, 0), bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _FrameLikeness(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, _WIDE)
        self.fc = nn.Linear(_LOOKUP, _WIDE)

    def forward(self, blocks: Sequence[Tensor]) -> Tensor:
        means_BTF = torch.cat([block.mean((3, 4)) for block in blocks], dim=1).transpose(1, 2)
        return functional.relu(self.fc(_likeness(self.projection(means_BTF))))


class _ColourLikeness(nn.Module):
    """Of histograms with 8 levels for each of red, green and blue."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(_LOOKUP, _WIDE)

    def forward(self, frames_BThw3: Tensor) -> Tensor:
        levels = (frames_BThw3 >> 5).long().flatten(2, 3)
        bins_BTN = levels[..., 0] * 64 + levels[..., 1] * 8 + levels[..., 2]
        counts = torch.zeros(*bins_BTN.shape[:2], 512, device=levels.device)
        counts.scatter_add_(2, bins_BTN, torch.ones_like(bins_BTN, dtype=counts.dtype))
        return functional.relu(self.fc(_likeness(counts)))


def _likeness(vectors_BTF: Tensor) -> Tensor:
    """[B, T, 101]: cosine of each frame with those from 50 before to 50 after it, 0 beyond the ends."""
    unit = functional.normalize(vectors_BTF, dim=2)
    batch, frames = unit.shape[:2]
    padded = functional.pad(unit @ unit.transpose(1, 2), (_LOOKUP // 2, _LOOKUP // 2))
    places = torch.arange(frames, device=unit.device)[:, None] + torch.arange(_LOOKUP, device=unit.device)
    return padded.gather(2, places.expand(batch, -1, -1))


class TransNetDetector:
    """TransNet V2 with weights from a file, as a `lmp.films.cuts.Detector`."""

    look = Look(_HEIGHT, _WIDTH, scaling="BICUBIC")  # as the ffmpeg command scales, which the release calls

    def __init__(self, path: Path, *, threshold: float = _THRESHOLD, device: str = "cpu") -> None:
        """Load the network.

        Raises:
            UserError: no such file, not the network's weights, or a threshold that is no probability.
        """
        if not 0 < threshold < 1:
            raise UserError(f"detector transnetv2: threshold {threshold} is not between 0 and 1", remedy="give 0.5")
        network = TransNetV2()
        fill(network, load_weights(path), source=path)
        self.network = network.to(device).eval().requires_grad_(False)
        self._threshold, self._device, self._version = threshold, device, digest(network)

    def describe(self) -> dict[str, Any]:
        """Name, digest of the weights and threshold, as JSON."""
        return {"name": "transnetv2", "version": self._version, "threshold": self._threshold}

    def start(self) -> _Reading:
        """Begin a film."""
        return _Reading(self, self._threshold)

    def probabilities(self, window_Thw3: np.ndarray) -> np.ndarray:
        """float32 [T]: how likely each frame is the middle one of a transition, from uint8 [T, 27, 48, 3]."""
        with torch.inference_mode():
            logits_BT, _ = self.network(torch.from_numpy(window_Thw3)[None].to(self._device))
        return torch.sigmoid(logits_BT[0]).cpu().numpy()


class _Reading:
    """One film. The release's windows: 100 frames in steps of 50, the film's ends filled with its end frames.

    A new shot begins where the release's scenes begin: with the first frame after a run of frames above the
    threshold. The release leaves the frames of such a run out; here they belong to the shot before.
    """

    def __init__(self, detector: TransNetDetector, threshold: float) -> None:
        self._detector, self._threshold = detector, threshold
        self._waiting: list[np.ndarray] = []
        self._frames = 0
        self._run = 0.0  # the highest probability of the run that is open
        self.undecided = 0

    def feed(self, picture_HWC: np.ndarray) -> list[Cut]:
        if not self._frames:
            self._waiting = [picture_HWC] * CONTEXT
        self._waiting.append(picture_HWC)
        self._frames += 1
        return self._judge() if len(self._waiting) == WINDOW else []

    def finish(self) -> list[Cut]:
        cuts: list[Cut] = []
        while self.undecided < self._frames:
            self._waiting += [self._waiting[-1]] * (WINDOW - len(self._waiting))
            cuts += self._judge()
        # The padding may have been judged too.
        return [cut for cut in cuts if cut.frame < self._frames]

    def _judge(self) -> list[Cut]:
        told = self._detector.probabilities(np.stack(self._waiting))[CONTEXT:-CONTEXT]
        cuts = []
        for frame, probability in enumerate(told.tolist(), start=self.undecided):
            if probability > self._threshold:
                self._run = max(self._run, probability)
            elif self._run:
                cuts.append(Cut(frame, self._run))
                self._run = 0.0
        self.undecided += _STEP
        self._waiting = self._waiting[_STEP:]
        return cuts
