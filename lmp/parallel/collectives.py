"""Cross-rank operations with their true adjoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all ranks; the adjoint sums the gradients and takes the own slice."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, local.shape[0]
        return gather_plain(local, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = gradients[0].contiguous().clone()
        dist.all_reduce(whole, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.rows
        return whole[first : first + ctx.rows], None


class _ExchangeHeads(torch.autograd.Function):
    """Trade a slice of the sequence with all heads for the whole sequence with a slice of the heads, or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _exchange(x, group, to_heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(gradients[0], ctx.group, not ctx.to_heads), None, None


def gather_plain(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate equal slices [N, ...] of all ranks along the first dim, without a gradient. Any dtype."""
    wire = local.detach().contiguous()
    if wire.dtype == torch.bool:
        wire = wire.view(torch.uint8)
    parts = [torch.empty_like(wire) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, wire, group=group)
    return torch.cat(parts).view(local.dtype)


def gather_rows(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate equal slices [N, ...] of all ranks along the first dim, with the true adjoint for float tensors."""
    if local.is_floating_point() and local.requires_grad:
        return _GatherRows.apply(local, group)
    return gather_plain(local, group)


def sequence_to_heads(x_THC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T_local, H, C] -> [T, H / sp, C]: every rank gets the whole sequence for its share of the heads."""
    return _ExchangeHeads.apply(x_THC, group, True)


def heads_to_sequence(x_THC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, H / sp, C] -> [T_local, H, C]: the inverse of `sequence_to_heads`."""
    return _ExchangeHeads.apply(x_THC, group, False)


def _exchange(x_THC: Tensor, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
    size = dist.get_world_size(group)
    tokens, heads, channels = x_THC.shape
    if to_heads:
        sent = x_THC.view(tokens, size, heads // size, channels).transpose(0, 1).contiguous()
    else:
        sent = x_THC.contiguous().view(size, tokens // size, heads, channels)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    if to_heads:
        return received.view(size * tokens, heads // size, channels)
    return received.transpose(0, 1).reshape(tokens // size, size * heads, channels)
