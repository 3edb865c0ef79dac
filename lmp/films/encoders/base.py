"""What an encoder is: it turns the picture, the sound or the words of shots into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

Kind = Literal["picture", "sound", "words"]
SAMPLE_RATE = 16_000
"""Of all sound, in Hz."""


class Encoder(Protocol):
    """Turns shots into `tokens` vectors of `width` numbers each.

    A shot is, by `kind`:
        picture: uint8 RGB array [N, h, w, 3] of up to `frames` frames, `height` pixels high; see `rate`.
        sound: float32 mono array at 16 kHz.
        words: a string.
    """

    @property
    def kind(self) -> Kind: ...

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def frames(self) -> int:
        """Frames wanted per shot; 0 unless a picture encoder."""
        ...

    @property
    def height(self) -> int:
        """Height of the frames wanted, in pixels; 0 unless a picture encoder."""
        ...

    @property
    def rate(self) -> float:
        """Frames a second of the clips wanted, one for each token; 0: the frames are spread over the shot."""
        ...

    def encode(self, shots: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Features [n, K, D] float32 and valid [n] bool. An empty shot or None is not valid, its row zero."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, version, tokens, width and sampling, as JSON for the manifest of the shards."""
        ...


def spread(shot_Nhw3: np.ndarray, frames: int) -> np.ndarray:
    """So many frames of a shot, evenly spread; one that has fewer repeats some of them."""
    return shot_Nhw3[np.linspace(0, len(shot_Nhw3) - 1, frames).round().astype(int)]
