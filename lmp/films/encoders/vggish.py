"""VGGish: Hershey et al., "CNN Architectures for Large-Scale Audio Classification", ICASSP 2017.

Network and log-mel front end of AudioSet's release, with the parameter names of its published PyTorch
weights (harritaylor/torchvggish).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmp.errors import UserError
from lmp.films.encoders.base import SAMPLE_RATE, Kind
from lmp.films.encoders.device import exact
from lmp.films.encoders.weights import digest, fill, load_weights

WIDTH = 128
WINDOW, HOP, FFT = 400, 160, 512
BANDS, LOWEST_HZ, HIGHEST_HZ = 64, 125.0, 7500.0
LOG_OFFSET = 0.01
FRAMES = 96  # spectra of a patch: 0.96 s
PATCH = WINDOW + (FRAMES - 1) * HOP  # samples that a patch looks at
PCA_RANGE = 2.0
_PCA = "pproc."  # where torchvggish keeps the PCA in its state_dict


class VGGish(nn.Module):
    """Patches of log-mel spectra [B, 96, 64] -> embeddings [B, 128], not negative."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        wide_in = 1
        for stage in ((64,), (128,), (256, 256), (512, 512)):
            for wide in stage:
                self.features.extend([nn.Conv2d(wide_in, wide, 3, padding=1), nn.ReLU(inplace=True)])
                wide_in = wide
            self.features.append(nn.MaxPool2d(2))
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 6 * 4, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
            nn.Linear(4096, WIDTH), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, patches_BTF: Tensor) -> Tensor:
        """Embeddings [B, 128]."""
        maps_BCtf = self.features(patches_BTF[:, None])
        # The linear layers were trained by TensorFlow, which keeps channels last.
        return self.embeddings(maps_BCtf.permute(0, 2, 3, 1).flatten(1))


def mel_filters() -> NDArray[np.float64]:
    """Triangles [257, 64], even and straight on the mel scale 1127 ln(1 + f / 700); nothing at 0 Hz."""
    mel_F = 1127 * np.log1p(np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1) / 700)
    lowest, highest = 1127 * np.log1p(np.array([LOWEST_HZ, HIGHEST_HZ]) / 700)
    edges = np.linspace(lowest, highest, BANDS + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (mel_F[:, None] - left) / (centre - left)
    falling = (right - mel_F[:, None]) / (right - centre)
    filters_FB = np.clip(np.minimum(rising, falling), 0, None)
    filters_FB[0] = 0
    return filters_FB


def log_mel(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sound at 16 kHz -> patches [n, 96, 64], one after the other, of the log of the mel magnitudes + 0.01.

    Frames of 25 ms every 10 ms under a periodic Hann window; what does not fill a patch is left out, as in
    the release. Sound too short for one patch (0.975 s with the last window) is filled up with silence.
    """
    padded = np.pad(wave, (0, max(0, PATCH - len(wave))))
    frames_NW = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    patches = len(frames_NW) // FRAMES
    log_mel_pTB = np.empty((patches, FRAMES, BANDS), np.float32)
    for patch in range(patches):  # one at a time: an hour's spectra would take gigabytes
        frames_TW = frames_NW[patch * FRAMES : (patch + 1) * FRAMES] * _TAPER
        log_mel_pTB[patch] = np.log(np.abs(np.fft.rfft(frames_TW, FFT)) @ _FILTERS + LOG_OFFSET)
    return log_mel_pTB


_TAPER = 0.5 - 0.5 * np.cos(2 * np.pi / WINDOW * np.arange(WINDOW))
_FILTERS = mel_filters()


class VGGishEncoder:
    """VGGish averaged over the patches of a shot; a sound encoder 128 wide.

    With K > 1 a shot is cut into K equal parts, and each gives a token. A part shorter than a patch is filled
    up with silence.

    Args:
        path: weights (.pt, .pth, .safetensors) with `features.*` and `embeddings.*`.
        tokens: K.
        pca: file with `pca_eigen_vectors` and `pca_means` (.pth, .npz, .safetensors); None takes what the
            weights hold, if anything. With it every patch gets AudioSet's whitening, clipping to [-2, 2] and
            rounding to 8 bits, given in [-2, 2] rather than as 0 to 255.
        batch_size: patches per forward pass.

    Raises:
        UserError: no such file, or weights of another network.
    """

    kind: Kind = "sound"
    name = "vggish"
    width = WIDTH
    frames = 0
    height = 0
    rate = 0.0

    def __init__(
        self,
        path: Path,
        *,
        tokens: int = 1,
        pca: Path | None = None,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        weights = load_weights(path)
        self._model = VGGish()
        fill(self._model, {n: w for n, w in weights.items() if not n.startswith(_PCA)}, source=path)
        self._device = torch.device(device)
        self._model.to(self._device).eval().requires_grad_(False)
        self._pca = _load_pca(pca) if pca is not None else _held_pca(weights, path)
        self._batch_size = batch_size
        self.tokens = tokens
        whitening = () if self._pca is None else tuple(str(part.tolist()) for part in self._pca)
        self.version = digest(self._model, *whitening)

    @exact()
    @torch.no_grad()
    def encode(self, shots: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Features [n, K, 128] float32 and valid [n] bool, on the CPU; see `Encoder.encode`."""
        valid_n = torch.tensor([shot is not None and len(shot) > 0 for shot in shots], dtype=torch.bool)
        sums_nKD = torch.zeros(len(shots), self.tokens, self.width, dtype=torch.float64)
        counts_nK = torch.zeros(len(shots), self.tokens, dtype=torch.float64)
        for places, patches_BTF in self._batches(shots):
            embedded_BD = self._postprocess(self._model(patches_BTF.to(self._device)).float().cpu())
            index = torch.tensor(places).T
            sums_nKD.index_put_((index[0], index[1]), embedded_BD.double(), accumulate=True)
            counts_nK.index_put_((index[0], index[1]), torch.ones(len(places), dtype=torch.float64), accumulate=True)
        return (sums_nKD / counts_nK.clamp(min=1)[..., None]).float(), valid_n

    def describe(self) -> dict[str, Any]:
        """Name, version, tokens, width and sampling, as JSON."""
        return {
            "name": self.name,
            "version": self.version,
            "kind": self.kind,
            "tokens": self.tokens,
            "width": self.width,
            "pooling": "mean",
            "pca": self._pca is not None,
            "sampling": {"rate": SAMPLE_RATE, "window": WINDOW, "hop": HOP, "bands": BANDS, "patch": FRAMES},
        }

    def _batches(self, shots: Sequence[Any]) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        """Up to `batch_size` patches, and of each its shot and token."""
        places: list[tuple[int, int]] = []
        waiting: list[NDArray[np.float32]] = []
        for i, shot in enumerate(shots):
            if shot is None or len(shot) == 0:
                continue
            wave = np.nan_to_num(np.asarray(shot, dtype=np.float32))
            for k, part in enumerate(np.array_split(wave, self.tokens)):
                for patch_TF in log_mel(part):
                    places.append((i, k))
                    waiting.append(patch_TF)
                    if len(waiting) == self._batch_size:
                        yield places, torch.from_numpy(np.stack(waiting))
                        places, waiting = [], []
        if waiting:
            yield places, torch.from_numpy(np.stack(waiting))

    def _postprocess(self, embedded_BD: Tensor) -> Tensor:
        if self._pca is None:
            return embedded_BD
        matrix_DD, means_D = self._pca
        white_BD = ((embedded_BD - means_D) @ matrix_DD.T).clamp(-PCA_RANGE, PCA_RANGE)
        steps = 255 / (2 * PCA_RANGE)
        return ((white_BD + PCA_RANGE) * steps).round() / steps - PCA_RANGE


def _held_pca(weights: dict[str, Tensor], path: Path) -> tuple[Tensor, Tensor] | None:
    if _PCA + "pca_eigen_vectors" not in weights:
        return None
    held = {name.removeprefix(_PCA): tensor for name, tensor in weights.items() if name.startswith(_PCA)}
    return _checked_pca(held, path)


def _load_pca(path: Path) -> tuple[Tensor, Tensor]:
    if path.suffix != ".npz":
        return _checked_pca(load_weights(path), path)
    try:
        with np.load(path.expanduser(), allow_pickle=False) as arrays:
            return _checked_pca({name: torch.from_numpy(arrays[name]) for name in arrays.files}, path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the PCA {path}: {error}", remedy="give AudioSet's vggish_pca_params") from error


def _checked_pca(held: dict[str, Tensor], path: Path) -> tuple[Tensor, Tensor]:
    matrix, means = held.get("pca_eigen_vectors"), held.get("pca_means")
    if matrix is None or means is None or matrix.shape != (WIDTH, WIDTH) or means.numel() != WIDTH:
        raise UserError(
            f"{path} is no PCA of VGGish: it holds {', '.join(sorted(held)) or 'nothing'}",
            remedy=f"give pca_eigen_vectors [{WIDTH}, {WIDTH}] and pca_means [{WIDTH}]",
        )
    return matrix.float(), means.float().reshape(-1)
