"""R(2+1)D of 18 and 34 layers: Tran et al., "A Closer Look at Spatiotemporal Convolutions", CVPR 2018.

The parameters bear torchvision's names, so the published weights load as they are: torchvision's
`r2plus1d_18` (Kinetics-400) and the 34-layer networks of IG-65M and Kinetics in the same naming.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmp.films.encoders.base import Kind, spread
from lmp.films.encoders.device import exact
from lmp.films.encoders.weights import digest, fill, load_weights

WIDTH = 512
RESIZED, CROP = (128, 171), 112
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_CLIP = {18: 16, 34: 32}


def _factored(wide_in: int, wide_out: int, between: int, stride: int) -> nn.Sequential:
    """A 3 x 3 x 3 convolution as one over space and one over time."""
    return nn.Sequential(
        nn.Conv3d(wide_in, between, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False),
        nn.BatchNorm3d(between),
        nn.ReLU(inplace=True),
        nn.Conv3d(between, wide_out, (3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False),
    )


def _between(wide_in: int, wide_out: int) -> int:
    """The width between the factors that keeps the parameters of the full convolution (section 3.5)."""
    return 27 * wide_in * wide_out // (9 * wide_in + 3 * wide_out)


class _Block(nn.Module):
    def __init__(self, wide_in: int, wide_out: int, *, stride: int, between: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            _factored(wide_in, wide_out, between[0], stride), nn.BatchNorm3d(wide_out), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(_factored(wide_out, wide_out, between[1], 1), nn.BatchNorm3d(wide_out))
        self.downsample: nn.Sequential | None = None
        if stride != 1 or wide_in != wide_out:
            self.downsample = nn.Sequential(
                nn.Conv3d(wide_in, wide_out, 1, stride=stride, bias=False), nn.BatchNorm3d(wide_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        past = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv2(self.conv1(x)) + past)


class R2Plus1D(nn.Module):
    """The network without its classifier: clips [B, 3, T, H, W] -> features [B, 512].

    Args:
        depth: 18 (torchvision's) or 34 (that of IG-65M, which follows Caffe2: the second convolution of a
            stage's first block is factored by its own width, and batch norm has an epsilon of 0.001).
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 45, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
            nn.BatchNorm3d(45),
            nn.ReLU(inplace=True),
            nn.Conv3d(45, 64, (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(64),
            nn.ReLU(inplace=True),
        )
        wide_in = 64
        for stage, blocks in enumerate(_STAGES[depth]):
            wide = 64 << stage
            layer = nn.Sequential()
            for block in range(blocks):
                first = _between(wide_in, wide)
                second = first if depth == 18 else _between(wide, wide)
                stride = 2 if stage and not block else 1
                layer.append(_Block(wide_in, wide, stride=stride, between=(first, second)))
                wide_in = wide
            self.add_module(f"layer{stage + 1}", layer)
        if depth == 34:
            for norm in self.modules():
                if isinstance(norm, nn.BatchNorm3d):
                    norm.eps = 1e-3

    def forward(self, clips_B3THW: Tensor) -> Tensor:
        """Features [B, 512], averaged over time and space."""
        x = clips_B3THW
        for part in self.children():
            x = part(x)
        return x.mean((2, 3, 4))


def preprocess(frames_Nhw3: np.ndarray) -> Tensor:
    """Frames [N, h, w, 3] uint8 -> [3, N, 112, 112], as the published weights want them.

    Resized to 128 x 171 (whatever the shape: bilinear, not smoothed before, rounded to 8 bits), the middle
    112 x 112 cut out, normalised by Kinetics' mean and spread.
    """
    pixels_N3hw = torch.from_numpy(np.ascontiguousarray(frames_Nhw3)).permute(0, 3, 1, 2).float()
    resized_N3hw = F.interpolate(pixels_N3hw, RESIZED, mode="bilinear", align_corners=False).round().clamp(0, 255)
    top, left = (round((size - CROP) / 2) for size in RESIZED)
    cut_3Nhw = resized_N3hw[..., top : top + CROP, left : left + CROP].transpose(0, 1) / 255
    mean, std = (torch.tensor(value).view(3, 1, 1, 1) for value in (MEAN, STD))
    return (cut_3Nhw - mean) / std


class R2Plus1DEncoder:
    """R(2+1)D over K clips of a shot; a picture encoder 512 wide.

    A shot is cut into K equal parts of its time; the frames of a part's clip are spread evenly over it.

    Args:
        path: weights (.pt, .pth, .safetensors). The depth is told from them; a classifier is not used.
        tokens: K.
        frames: of a clip; None takes 16 for 18 layers and 32 for 34, what they were trained on.
        rate: frames a second of a clip, taken near the middle of its part; 15 is what the weights were trained on.
            0 spreads the clip over its part, so that it shows all of it.
        batch_size: clips per forward pass.

    Raises:
        UserError: no such file, or weights of another network.
    """

    kind: Kind = "picture"
    width = WIDTH
    height = RESIZED[0]

    def __init__(
        self,
        path: Path,
        *,
        tokens: int = 1,
        frames: int | None = None,
        rate: int = 0,
        batch_size: int = 4,
        device: str | torch.device = "cpu",
    ) -> None:
        weights = load_weights(path)
        trunk = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
        depth = 34 if any(re.match(r"layer3\.5\.", name) for name in trunk) else 18
        self._model = R2Plus1D(depth)
        fill(self._model, trunk, source=path)
        self._device = torch.device(device)
        self._model.to(self._device).eval().requires_grad_(False)
        self._clip = frames or _CLIP[depth]
        self._batch_size = batch_size
        self.tokens = tokens
        self.frames = tokens * self._clip
        self.rate = float(rate)
        self.name = f"r2plus1d-{depth}"
        self.version = digest(self._model)

    @exact()
    @torch.no_grad()
    def encode(self, shots: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Features [n, K, 512] float32 and valid [n] bool, on the CPU; see `Encoder.encode`."""
        valid_n = torch.tensor([shot is not None and len(shot) > 0 for shot in shots], dtype=torch.bool)
        features_nKD = torch.zeros(len(shots), self.tokens, self.width)
        clips = [(i, k) for i in range(len(shots)) if valid_n[i] for k in range(self.tokens)]
        for start in range(0, len(clips), self._batch_size):
            batch = clips[start : start + self._batch_size]
            clips_B3THW = torch.stack([self._part(shots[i], k) for i, k in batch]).to(self._device)
            rows, places = zip(*batch, strict=True)
            features_nKD[list(rows), list(places)] = self._model(clips_B3THW).float().cpu()
        return features_nKD, valid_n

    def describe(self) -> dict[str, Any]:
        """Name, version, tokens, width and sampling, as JSON."""
        return {
            "name": self.name,
            "version": self.version,
            "kind": self.kind,
            "tokens": self.tokens,
            "width": self.width,
            "pooling": "mean",
            "sampling": {"frames": self._clip, "height": self.height, "resized": list(RESIZED), "crop": CROP}
            | ({"rate": self.rate} if self.rate else {}),
        }

    def _part(self, shot_Nhw3: np.ndarray, part: int) -> Tensor:
        return preprocess(spread(shot_Nhw3, self.frames)[part * self._clip : (part + 1) * self._clip])
