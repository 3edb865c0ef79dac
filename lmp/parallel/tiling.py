"""The MLP of a block in tiles over its tokens, so that the hidden [T, 4 D] never exists whole.

Kept for backward is the MLP's input; each tile is run again there ("sequence tiling" of Bekman et al., "Arctic
Long Sequence Training", 2025, section 3.1). DeepSpeed's `TiledMLP` is exact too, but sums the weights' gradients
over the tiles in the weights' own type, which loses digits in bf16 when there are many tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmp.model.layers import Mlp

Weights = tuple[Tensor, Tensor, Tensor, Tensor]


class TiledMlp:
    """Replaces the forward of an `Mlp`: the same values and gradients up to rounding, `tile` tokens at a time."""

    def __init__(self, mlp: Mlp, tile: int) -> None:
        self.mlp, self.tile = mlp, tile

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def __call__(self, x_TD: Tensor) -> Tensor:
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        inputs = (x_TD, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        # Saved by a node of its own before the work is done: where a checkpoint runs its block again it stops as
        # soon as everything saved is there again, and so never runs the tiles just to throw their output away.
        keeper = _Keep.apply(*inputs).grad_fn
        return _Tiled.apply(*inputs, keeper, self.tile)


def tile_mlp(mlp: Mlp, tile: int) -> None:
    """Replace the forward of `mlp` from outside. Under ZeRO-3 its weights are gathered once for all tiles."""
    from deepspeed.utils import set_z3_leaf_module

    # The linear maps inside are never called as modules, so ZeRO-3 has to gather their weights around the MLP.
    set_z3_leaf_module(mlp, True)
    mlp.forward = TiledMlp(mlp, tile)  # type: ignore[method-assign,assignment]


def _mlp(x_TD: Tensor, weights: Weights) -> Tensor:
    """`Mlp.forward` on weights that are given, because ZeRO-3 may have put the module's own away again."""
    weight1, bias1, weight2, bias2 = weights
    return F.linear(F.gelu(F.linear(x_TD, weight1, bias1)), weight2, bias2)


class _Keep(torch.autograd.Function):
    """Saves its inputs and does nothing; `_Tiled` reads them from this node."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("this node's output is not used")


class _Tiled(torch.autograd.Function):
    """`_mlp` over tiles of rows; the weights' gradients are summed over the tiles in fp32."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, *rest: Any) -> Tensor:
        *weights, ctx.keeper, ctx.tile = rest
        out_TD = x_TD.new_empty(x_TD.shape[0], weights[2].shape[0])
        for x_tile, out_tile in zip(x_TD.split(ctx.tile), out_TD.split(ctx.tile), strict=True):
            out_tile.copy_(_mlp(x_tile, tuple(weights)))
        return out_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_TD, *weights = (tensor.detach() for tensor in ctx.keeper.saved_tensors)
        ctx.keeper = None  # what it holds is free as soon as this returns
        x_grad_TD = torch.empty_like(x_TD)
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        leaves = tuple(weight.requires_grad_() for weight in weights)
        tiles = zip(x_TD.split(ctx.tile), x_grad_TD.split(ctx.tile), gradients[0].split(ctx.tile), strict=True)
        for x_tile, x_grad_tile, out_grad_tile in tiles:
            x_leaf = x_tile.detach().requires_grad_()
            with torch.enable_grad():
                out_tile = _mlp(x_leaf, leaves)
            x_grad, *parts = torch.autograd.grad(out_tile, (x_leaf, *leaves), out_grad_tile)
            x_grad_tile.copy_(x_grad)
            for total, part in zip(sums, parts, strict=True):
                total += part
        return x_grad_TD, *(total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True)), None, None
