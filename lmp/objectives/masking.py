"""Which shots are masked: a pure function of (seed, epoch, pack, modality, film, shot).

No random stream is kept, so a shot's mask does not depend on the rank or the slice that holds it, nor on the step,
nor on the device. Epoch and pack tell two showings of one shot apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_BITS = 53


def draw_masks(
    valid: Mapping[str, Tensor],
    film_P: Tensor,
    shot_P: Tensor,
    *,
    seed: int,
    epoch: int,
    pack: int,
    ratio: float,
    span: int = 1,
) -> dict[str, Tensor]:
    """Masks about `ratio` of the valid shots of each modality, each modality on its own.

    Args:
        valid: NAME -> [P] bool.
        film_P: [P] int64 film number.
        shot_P: [P] int64 shot number in the film.
        seed: of the run.
        epoch, pack: name the pack that the shots stand in; the same three numbers give the same masks.
        ratio: probability for a shot to be masked, 0 to 1.
        span: masked shots come in runs of this many (fewer at a film's ends); where runs may begin is drawn
            per film.

    Returns:
        NAME -> [P] bool, True only where valid.

    Raises:
        ValueError: ratio is not in [0, 1] or span is below 1.
    """
    if not 0 <= ratio <= 1 or span < 1:
        raise ValueError(f"ratio {ratio} must lie in [0, 1] and span {span} must be at least 1")
    threshold = round(ratio * 2**_BITS)
    masks = {}
    for name, valid_P in valid.items():
        film_hash_P = _mix(film_P ^ _key(seed, epoch, pack, name))
        run_P = (shot_P + _uniform(film_hash_P) % span) // span
        # Once more on the film's hash: the run's draw must not follow from the phase.
        draw_P = _uniform(_mix(_mix(film_hash_P) + run_P))
        masks[name] = valid_P & (draw_P < threshold)
    return masks


def _key(seed: int, epoch: int, pack: int, name: str) -> int:
    """64 bits, as a signed integer."""
    text = f"{seed}/{epoch}/{pack}/{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's step and finaliser on int64, which wraps around: each input bit moves all output bits."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _uniform(x: Tensor) -> Tensor:
    """The upper 53 bits, 0 <= result < 2**53."""
    return _shift_right(x, 64 - _BITS)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own keeps the sign."""
    return torch.bitwise_right_shift(x, bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
