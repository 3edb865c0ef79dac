"""A hash of a parameter's values that can be summed over its fragments, so it knows no topology.

    hash = sum over i of weight(i) * (bits(i) + 1)   mod 2^64

bits(i) is the i-th fp32 value as a 32-bit integer, and weight(i) a fixed odd number made from i. The sum over all
fragments is the hash of the whole, however it is cut. As the weights are odd, a single changed value always changes
the hash; swaps, shifts and missing zeros do so but for odds of about 2^-32. It is no protection against intent.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

MODULUS = 1 << 64
# torch works on as many elements on the calling thread alone, so hashing beside the training loop takes one core.
_BLOCK = 1 << 15


def fragment_hash(values: Tensor, offset: int) -> int:
    """The share of a fragment in its parameter's hash.

    Args:
        values: fp32 [n], contiguous, on any device.
        offset: index of its first value in the flattened parameter.

    Returns:
        a number below 2^64.
    """
    bits = values.detach().view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    done = 0
    while done < bits.numel():
        block, lane = divmod(offset + done, _BLOCK)
        count = min(_BLOCK - lane, bits.numel() - done)
        # Both sums and products wrap around at 2^64, which is what is wanted.
        weighted = bits[done : done + count].to(torch.int64).add_(1).mul_(_lane_weights(values.device)[lane:][:count])
        total += weighted.sum().mul_(_signed(_mix(block) | 1))
        done += count
    return int(total) % MODULUS


def as_signed(value: int) -> int:
    """A hash as the int64 that a tensor can hold."""
    return _signed(value % MODULUS)


@cache
def _lane_weights(device: torch.device) -> Tensor:
    lanes = np.arange(_BLOCK, dtype=np.uint64) + np.uint64(0x632BE59BD9B4E019)
    with np.errstate(over="ignore"):
        lanes = (lanes ^ (lanes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        lanes = (lanes ^ (lanes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((lanes ^ (lanes >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)


def _mix(value: int) -> int:
    """The step of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % MODULUS
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % MODULUS
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - MODULUS if value >= MODULUS // 2 else value
