"""Ulysses sequence parallelism: exchanges heads for sequence around the one attention function, and nothing else.

Jacobs et al., "DeepSpeed Ulysses" (2023). Every rank holds a run of the pack; inside attention it holds the
whole pack for heads / sp heads, so the segments of the whole pack apply unchanged.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lmp.model.attention import Attend, Segments, attention
from lmp.parallel.collectives import heads_to_sequence, sequence_to_heads


class UlyssesAttention:
    """The attention function of a model whose packs are cut over the ranks of `group`.

    Called with local q [T_local, H, C], k and v [T_k_local, H, C] and the segments of the whole pack; returns
    the local [T_local, H, C]. H must be a multiple of the group's size (checked in the configuration).

    Args:
        group: the ranks that share one pack.
        attend: what each rank computes on the whole pack for its heads.
    """

    def __init__(self, group: dist.ProcessGroup, attend: Attend = attention) -> None:
        self.group = group
        self.attend = attend

    def __call__(
        self, q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, *, q_segments: Segments, k_segments: Segments
    ) -> Tensor:
        q_all = sequence_to_heads(q_THC, self.group)
        # Keys and values have one shape, so they travel together.
        k_all, v_all = sequence_to_heads(torch.cat([k_THC, v_THC], dim=-1), self.group).chunk(2, dim=-1)
        out_all = self.attend(q_all, k_all, v_all, q_segments=q_segments, k_segments=k_segments)
        return heads_to_sequence(out_all, self.group)
