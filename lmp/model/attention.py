"""Attention over packed rows, the layers around it, and how tokens are told where they stand.

Bidirectional, block-diagonal by segment, and never with a mask tensor.
Shape letters: P shots, T tokens, D width, H heads, C head dimension, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[..., Tensor]
"""The function `attention`, or one with its signature."""
Rotary = tuple[Tensor, Tensor] | None
"""Cosines and sines [T, C / 2] in fp32, or None where positions are added instead."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the segments of a packed row begin and end.

    Attributes:
        lengths: tokens of each segment, on the host, so that no kernel waits for the device.
        cu_seqlens: [S + 1] int32 on the device: first token of each segment, and the total at the end.
        max_length: tokens of the longest segment.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_length: int

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], *, device: torch.device | str | None = None, tokens_per_shot: int = 1
    ) -> Segments:
        """Segments of `lengths` shots with `tokens_per_shot` tokens each.

        Raises:
            ValueError: there is no segment, or one is shorter than 1.
        """
        tokens = tuple(int(length) * tokens_per_shot for length in lengths)
        if not tokens or min(tokens) < 1:
            raise ValueError(f"segment lengths must be one or more numbers >= 1, got {tuple(lengths)}")
        ends = torch.tensor((0, *tokens), dtype=torch.int64).cumsum(0)
        return cls(tokens, ends.to(device=device, dtype=torch.int32), max(tokens))

    @property
    def total(self) -> int:
        """Tokens of all segments together."""
        return sum(self.lengths)


def attention(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, *, q_segments: Segments, k_segments: Segments) -> Tensor:
    """Softmax attention in which segment s of the queries sees exactly segment s of the keys (`sdpa`).

    Args:
        q_THC: [Tq, H, C], Tq = q_segments.total.
        k_THC, v_THC: [Tk, H, C], Tk = k_segments.total.

    Returns:
        [Tq, H, C]. Segments with the same two lengths share one dense call.

    Raises:
        ValueError: token counts differ from the segments', or the numbers of segments differ.
    """
    check_segments(q_THC, k_THC, q_segments, k_segments)
    if equal_segments(q_segments, k_segments):
        rows = (len(q_segments.lengths), -1)
        return _dense(*(x.unflatten(0, rows) for x in (q_THC, k_THC, v_THC))).flatten(0, 1)
    groups: dict[tuple[int, int], list[int]] = {}
    for number, pair in enumerate(zip(q_segments.lengths, k_segments.lengths, strict=True)):
        groups.setdefault(pair, []).append(number)
    lengths = (q_segments.lengths, k_segments.lengths, k_segments.lengths)
    parts = [x.split(list(n)) for x, n in zip((q_THC, k_THC, v_THC), lengths, strict=True)]
    out: dict[int, Tensor] = {}
    for members in groups.values():
        if len(members) == 1:  # views, where a stack would copy
            batch = [part[members[0]][None] for part in parts]
        else:
            batch = [torch.stack([part[i] for i in members]) for part in parts]
        out.update(zip(members, _dense(*batch).unbind(0), strict=True))
    return torch.cat([out[number] for number in range(len(out))])


def _dense(q_SLHC: Tensor, k_SLHC: Tensor, v_SLHC: Tensor) -> Tensor:
    """[S, Lq, H, C], [S, Lk, H, C] x 2 -> [S, Lq, H, C]."""
    q_SHLC, k_SHLC, v_SHLC = (within_int32(x).transpose(1, 2) for x in (q_SLHC, k_SLHC, v_SLHC))
    return F.scaled_dot_product_attention(q_SHLC, k_SHLC, v_SHLC).transpose(1, 2)


MAX_SPAN = 2**31
"""Elements that a kernel with 32-bit offsets cannot reach across."""


def within_int32(x: Tensor) -> Tensor:
    """`x`, made contiguous if its first and last element lie 2**31 or more apart, as in views of a long packed qkv."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.contiguous() if span >= MAX_SPAN else x


def equal_segments(q_segments: Segments, k_segments: Segments) -> bool:
    """Whether all segments have the same two lengths, so that they are one dense batch."""
    return all(min(segments.lengths) == segments.max_length for segments in (q_segments, k_segments))


def check_segments(q_THC: Tensor, k_THC: Tensor, q_segments: Segments, k_segments: Segments) -> None:
    """Hold tensors against their segments.

    Raises:
        ValueError: token counts differ from the segments', or the numbers of segments differ.
    """
    for name, tensor, segments in (("queries", q_THC, q_segments), ("keys", k_THC, k_segments)):
        if tensor.shape[0] != segments.total:
            raise ValueError(f"{name}: {tensor.shape[0]} tokens, but their segments hold {segments.total}")
    if len(q_segments.lengths) != len(k_segments.lengths):
        raise ValueError(f"queries have {len(q_segments.lengths)} segments, but keys have {len(k_segments.lengths)}")


def sinusoid(value_P: Tensor, width: int, *, base: float = 10000.0) -> Tensor:
    """[P] -> [P, width] fp32: sines, then cosines, of `value` at geometrically falling frequencies."""
    angle_PC = rotation_angles(value_P, width, base=base)
    return torch.cat((angle_PC.sin(), angle_PC.cos()), dim=-1)


def rotation_angles(value_P: Tensor, width: int, *, base: float) -> Tensor:
    """[P] -> [P, width / 2] fp32 angles in radians."""
    frequency_C = base ** (-torch.arange(0, width, 2, device=value_P.device, dtype=torch.float32) / width)
    return value_P.float()[:, None] * frequency_C


def rotate(x_THC: Tensor, rotary: Rotary) -> Tensor:
    """Turn the two halves of each head's channels by the token's angles; the product is formed in fp32."""
    if rotary is None:
        return x_THC
    cos_T1C, sin_T1C = (part[:, None] for part in rotary)
    first, second = x_THC.float().chunk(2, dim=-1)
    turned = (first * cos_T1C - second * sin_T1C, second * cos_T1C + first * sin_T1C)
    return torch.cat(turned, dim=-1).to(x_THC.dtype)


def places(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[P] int64: the place of each shot within its own segment."""
    length_S = torch.tensor(tuple(lengths), dtype=torch.int64)
    first_P = (length_S.cumsum(0) - length_S).repeat_interleave(length_S)
    return (torch.arange(first_P.numel()) - first_P).to(device)


def rotary_of(angle_PC: Tensor | None, tokens: int) -> Rotary:
    """Cosines and sines for `tokens` tokens per shot, all turned by their shot's angles."""
    if angle_PC is None:
        return None
    angle_TC = angle_PC.repeat_interleave(tokens, dim=0)
    return angle_TC.cos(), angle_TC.sin()


class SelfAttention(nn.Module):
    """Every token of a segment reads every token of it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_TD: Tensor, segments: Segments, rotary: Rotary, attend: Attend) -> Tensor:
        q_THC, k_THC, v_THC = self.qkv(x_TD).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q_THC, k_THC = rotate(q_THC, rotary), rotate(k_THC, rotary)
        out_THC = attend(q_THC, k_THC, v_THC, q_segments=segments, k_segments=segments)
        return self.out(out_THC.flatten(1))


class CrossAttention(nn.Module):
    """Every query of a segment reads every source token of it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x_TD: Tensor,
        source_TD: Tensor,
        segments: tuple[Segments, Segments],
        rotary: tuple[Rotary, Rotary],
        attend: Attend,
    ) -> Tensor:
        """`segments` and `rotary` hold the queries' first and the sources' second."""
        q_THC = rotate(self.q(x_TD).unflatten(-1, (self.heads, -1)), rotary[0])
        k_THC, v_THC = self.kv(source_TD).unflatten(-1, (2, self.heads, -1)).unbind(1)
        k_THC = rotate(k_THC, rotary[1])
        out_THC = attend(q_THC, k_THC, v_THC, q_segments=segments[0], k_segments=segments[1])
        return self.out(out_THC.flatten(1))
