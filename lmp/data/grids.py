"""Features at a fixed rate become one row per shot."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch

from lmp.errors import UserError

SLACK_SECONDS, SLACK_SHARE = 10.0, 0.05
"""How far a film's features may end from its shots, in seconds and as a share of the film, the larger counts."""


@dataclass(frozen=True)
class Grid:
    """Where the rows of a film lie in time: row r covers [r * step, (r + 1) * step) seconds.

    Attributes:
        seconds: the step; or None.
        frames: the step in frames of the film, whose rate must then be known; or None.
    """

    seconds: float | None = None
    frames: float | None = None

    @classmethod
    def parse(cls, word: str) -> Grid:
        """`0.96` seconds, or `16f` frames.

        Raises:
            UserError: it is neither, or not above 0.
        """
        match = re.fullmatch(r"([0-9.]+)(f?)", word)
        try:
            number = float(match[1]) if match else 0.0
        except ValueError:
            number = 0.0
        if match is None or not number > 0:
            raise UserError(
                f"{word}: is no stride", remedy="give seconds between rows, as 0.96, or frames, as 16f, above 0"
            )
        return cls(frames=number) if match[2] else cls(seconds=number)

    def step_ms(self, fps: float | None, where: str) -> float:
        """Milliseconds from row to row in a film of `fps` frames per second.

        Raises:
            UserError: the step counts frames and the rate is not known.
        """
        if self.seconds is not None:
            return 1000 * self.seconds
        assert self.frames is not None
        if fps is None:
            raise UserError(f"{where}: the stride counts frames", remedy="give --fps, or the stride in seconds")
        return 1000 * self.frames / fps


def to_shots(
    rows_TKD: torch.Tensor, shots_S2: np.ndarray, step_ms: float, *, where: str, strict: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """From a row per step to a row per shot: the mean of the rows that meet the shot, weighted by how long they do.

    Args:
        rows_TKD: floats.
        shots_S2: milliseconds.
        step_ms: from row to row.
        where: names the features in messages.
        strict: refuse features that end elsewhere than the shots, which a wrong stride makes them do.

    Returns:
        [S, K, D] float32, zeros where no row meets the shot; bool [S], whether one does.

    Raises:
        UserError: the features end elsewhere.
    """
    steps, end_ms = len(rows_TKD), float(shots_S2[:, 1].max())
    apart = abs(steps * step_ms - end_ms)
    if strict and apart > max(1000 * SLACK_SECONDS, SLACK_SHARE * end_ms, 2 * step_ms):
        raise UserError(
            f"{where}: {steps} rows of {step_ms / 1000:g} s are {steps * step_ms / 1000:.1f} s, but the shots end at "
            f"{end_ms / 1000:.1f} s",
            remedy="correct the stride or the shot list, or take the film as it is with --allow-missing",
        )
    first_S = np.minimum(shots_S2[:, 0] // step_ms, steps).astype(np.int64)
    last_S = np.minimum(np.ceil(shots_S2[:, 1] / step_ms), steps).astype(np.int64)
    out_SKD = torch.zeros(len(shots_S2), *rows_TKD.shape[1:])
    met_S = torch.from_numpy(last_S > first_S)
    for shot in torch.nonzero(met_S).flatten().tolist():
        edges = np.arange(first_S[shot], last_S[shot] + 1) * step_ms
        share_R = np.minimum(edges[1:], shots_S2[shot, 1]) - np.maximum(edges[:-1], shots_S2[shot, 0])
        weight_R = torch.from_numpy(share_R / share_R.sum()).float()
        rows_RKD = rows_TKD[first_S[shot] : last_S[shot]].float()
        out_SKD[shot] = torch.einsum("r,rkd->kd", weight_R, rows_RKD)
    return out_SKD, met_S
