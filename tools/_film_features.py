"""A checkpoint run over films: sliding windows, pooling, and a fixed stride in place of shots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmp.data.index import FilmIndex
from lmp.errors import UserError
from lmp.model import LmpContextualModel, LmpModel
from tools._source import CROSS_MODAL, Source

JOINED = "joined"
"""The tokens of all modalities and the cross-modal ones, side by side."""
POOLINGS = ("mean", "concat", "none")


@dataclass(frozen=True)
class Extraction:
    """What is taken of a model's tokens; all of it goes into the sidecar.

    Attributes:
        tokens: a modality, "cross_modal" or "joined".
        layer: the output of this block, from 0; None: of the whole transformer, after its norm.
        pooling: of a shot's K tokens: their mean, side by side, or none (a row is [K, D]).
        window: longest run of shots that the model sees at once.
        overlap: shots that a window shares with the next; each shot is taken from the window whose edges are farther.
        stride: seconds between rows; None: a row per shot.
        dtype: of the rows.
    """

    tokens: str
    layer: int | None
    pooling: str
    window: int
    overlap: int
    stride: float | None
    dtype: str


@dataclass(frozen=True)
class FilmRows:
    """A film's features as they are written.

    Attributes:
        key: of the film.
        rows: [T, D], or [T, K, D] without pooling; T shots, or steps of the stride.
        shots_S2: int32 milliseconds.
        valid_S: whether the shot has the modality (any modality, of cross-modal and joined tokens).
        info: the film's record.
        stride: seconds between rows; None on the shot grid.
        filled: steps of the stride that no shot covers, and that repeat the nearest shot.
    """

    key: str
    rows: np.ndarray
    shots_S2: np.ndarray
    valid_S: np.ndarray
    info: Mapping[str, Any]
    stride: float | None
    filled: int


class Extractor:
    """Gives the features of any film of an index.

    Raises:
        UserError: the model has no such tokens or layer, the films are not what it was trained on, or the device
            cannot be used.
    """

    def __init__(self, source: Source, index: FilmIndex, extraction: Extraction, *, device: str) -> None:
        self.index, self.extraction, self.device = index, extraction, _device(device)
        self.config = source.trained.config
        known = [*self.config.modalities, CROSS_MODAL, JOINED]
        tokens = extraction.tokens
        if tokens not in known:
            raise UserError(f"--tokens {tokens}: the model has none such", remedy=f"name one of {', '.join(known)}")
        _check_films(source, index)
        _check_windows(source, extraction)
        self._single = tokens in self.config.modalities
        self.model: LmpModel | LmpContextualModel = source.model.lmp
        if self._single:
            part = source.of_part(tokens)
            self.model = LmpContextualModel(part.config).eval()
            self.model.load_state_dict(part.weights, strict=True)
        self.model.to(self.device)
        self._block = self._hooked(extraction.layer)

    def film(self, number: int, *, dtype: str | None = None) -> FilmRows:
        """The features of film `number` of the index, in the extraction's dtype or another."""
        dtype = dtype or self.extraction.dtype
        index, extraction = self.index, self.extraction
        shots = int(index.shots[number])
        read = index.read(number, 0, shots)
        shots_S2 = read.shots_N2.numpy().copy()
        names = [extraction.tokens] if self._single else list(self.config.modalities)
        features = {name: read.features[name].to(self.device).float() for name in names}
        valid = {name: read.valid[name].to(self.device) for name in names}
        rows = self._rows(features, valid, torch.from_numpy(shots_S2)).numpy()
        if not np.isfinite(rows).all():
            raise UserError(f"film {index.keys[number]}: the features are not finite", remedy="name an earlier --step")
        filled = 0
        if extraction.stride is not None:
            rows, filled = resample(rows, shots_S2, extraction.stride)
        stored = rows.astype(dtype)
        if not np.isfinite(stored).all():
            raise UserError(
                f"film {index.keys[number]}: a feature is too large for {dtype}",
                remedy="write --dtype float32",
            )
        return FilmRows(
            key=index.keys[number],
            rows=stored,
            shots_S2=shots_S2,
            valid_S=torch.stack(list(valid.values())).any(0).cpu().numpy(),
            info=index.info(number),
            stride=extraction.stride,
            filled=filled,
        )

    @torch.no_grad()
    def _rows(self, features: dict[str, Tensor], valid: dict[str, Tensor], shots_S2: Tensor) -> Tensor:
        """[S, D] or [S, K, D] float32 on the CPU."""
        spans = windows(len(shots_S2), self.extraction.window, self.extraction.overlap)
        # All windows end to end in one row, as the segments of a pack.
        seen_P = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        first_P = torch.cat([torch.full((s.stop - s.start,), s.keep_start) for s in spans])
        last_P = torch.cat([torch.full((s.stop - s.start,), s.keep_stop) for s in spans])
        kept_P = (seen_P >= first_P) & (seen_P < last_P)
        layout = {
            "lengths": [span.stop - span.start for span in spans],
            "times": (shots_S2[seen_P, 0].float() / 1000).to(self.device),
        }
        rows = [part[kept_P.to(self.device)] for part in self._tokens(features, valid, seen_P, layout)]
        if self.extraction.pooling == "mean":
            rows = [part_SKD.mean(1) for part_SKD in rows]
        elif self.extraction.pooling == "concat":
            rows = [part_SKD.flatten(1) for part_SKD in rows]
        return torch.cat(rows, dim=-1).float().cpu()

    def _tokens(
        self, features: dict[str, Tensor], valid: dict[str, Tensor], seen_P: Tensor, layout: dict[str, Any]
    ) -> list[Tensor]:
        """[P, K, D] of each kind of token that is asked for."""
        seen_P = seen_P.to(self.device)
        feature = {name: rows[seen_P] for name, rows in features.items()}
        flags = {name: flag[seen_P] for name, flag in valid.items()}
        if self._single:
            name = self.extraction.tokens
            out = [self.model(feature[name], flags[name], **layout).last_hidden_state]
        else:
            found = self.model(feature, flags, **layout)
            joined = self.extraction.tokens == JOINED
            out = [*found.contextual.values(), found.cross] if joined else [found.cross]
        if self._block is not None:
            return [self._block.pop().view_as(out[0])]
        return out

    def _hooked(self, layer: int | None) -> list[Tensor] | None:
        """A list that receives the output of a block at every forward; None if none is asked for."""
        if layer is None:
            return None
        tokens = self.extraction.tokens
        if tokens == JOINED:
            raise UserError("--layer with --tokens joined: which transformer?", remedy="name a modality or cross_modal")
        transformer: Any = self.model.contextual[tokens] if self._single else self.model.cross
        if not 0 <= layer < len(transformer.layers):
            raise UserError(
                f"--layer {layer}: {tokens} has blocks 0 to {len(transformer.layers) - 1}", remedy="name one of them"
            )
        caught: list[Tensor] = []
        transformer.layers[layer].register_forward_hook(lambda module, arguments, output: caught.append(output))
        return caught


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        told = str(error).splitlines()[0]
        raise UserError(
            f"--device {name}: cannot be used: {told}", remedy="take cpu, or what `lmp doctor` lists"
        ) from error


@dataclass(frozen=True)
class Window:
    """Shots [start, stop) are seen, those of [keep_start, keep_stop) are taken from it."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


def windows(shots: int, window: int, overlap: int) -> list[Window]:
    """Windows that cover a film; the last one ends with it. Where two overlap they part in the middle."""
    starts = [0]
    while starts[-1] + window < shots:
        starts.append(min(starts[-1] + window - overlap, shots - window))
    ends = [min(start + window, shots) for start in starts]
    cuts = [0, *[(after + end + 1) // 2 for end, after in zip(ends[:-1], starts[1:], strict=True)], shots]
    return [Window(a, b, cuts[n], cuts[n + 1]) for n, (a, b) in enumerate(zip(starts, ends, strict=True))]


def resample(rows: np.ndarray, shots_S2: np.ndarray, stride: float) -> tuple[np.ndarray, int]:
    """From a row per shot to a row per `stride` seconds.

    Row t is the mean of the shots within [t * stride, (t + 1) * stride), weighted by how long each lies in it. A row
    without any shot repeats the shot that is nearest to its middle.

    Args:
        rows: [S, ...] of shots.
        shots_S2: milliseconds.
        stride: seconds.

    Returns:
        [T, ...] float32, T the strides that reach to the last shot's end, and how many rows had no shot.
    """
    step = stride * 1000
    count = max(1, int(np.ceil(shots_S2[:, 1].max() / step - 1e-9)))
    total = np.zeros((count, *rows.shape[1:]))
    weight_T = np.zeros(count)
    for row, (start, end) in zip(rows, shots_S2.astype(np.float64), strict=True):
        first = int(start // step)
        last = min(int(np.ceil(end / step - 1e-9)), count)
        edges = np.arange(first, last + 1) * step
        share = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
        total[first:last] += share.reshape(-1, *[1] * row.ndim) * row
        weight_T[first:last] += share
    empty_T = weight_T <= 0
    weight_T[empty_T] = 1
    total /= weight_T.reshape(-1, *[1] * (rows.ndim - 1))
    for step_number in np.flatnonzero(empty_T):
        middle = (step_number + 0.5) * step
        away_S = np.maximum(shots_S2[:, 0] - middle, middle - shots_S2[:, 1])
        total[step_number] = rows[int(away_S.argmin())]
    return total.astype(np.float32), int(empty_T.sum())


def _check_films(source: Source, index: FilmIndex) -> None:
    """The films must have what the model was trained on, made by the same encoders."""
    trained = source.trained.manifest["data"]
    found: dict[str, Any] = {}
    for manifest in index.manifests:
        found.update(manifest["encoders"])
    for name, shape in source.trained.config.modalities.items():
        held = index.modalities.get(name)
        if held is None or (held.tokens, held.width) != (shape["tokens"], shape["width"]):
            there = "nothing" if held is None else f"[{held.tokens}, {held.width}]"
            raise UserError(
                f"{name}: the model reads [{shape['tokens']}, {shape['width']}], the shards hold {there}",
                remedy="give shards made by the base encoders of the training shards",
            )
        if trained["encoders"].get(name) != found.get(name):
            raise UserError(
                f"{name}: was trained on features of {trained['encoders'].get(name)}, the shards' are of "
                f"{found.get(name)}",
                remedy="give shards made by the base encoders of the training shards",
            )


def _check_windows(source: Source, extraction: Extraction) -> None:
    config = source.trained.config
    if extraction.window < 1 or not 0 <= extraction.overlap < extraction.window:
        raise UserError(
            f"--window {extraction.window} --overlap {extraction.overlap}",
            remedy="give a window of 1 or more, and an overlap of 0 or more below it",
        )
    if config.positions == "learned" and extraction.window > config.max_positions:
        raise UserError(
            f"--window {extraction.window}: the model numbers {config.max_positions} shots",
            remedy=f"give at most --window {config.max_positions}",
        )
    if extraction.stride is not None and not extraction.stride > 0:
        raise UserError(f"--stride {extraction.stride}", remedy="give seconds, more than 0")
    if extraction.pooling == "none" and extraction.tokens == JOINED:
        raise UserError("--pooling none with --tokens joined: K differs", remedy="take mean or concat")
