"""The layers of the LMP model: embeddings, blocks, the two transformers, and what the losses learn beside them.

Shape letters as in `modeling_lmp`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import (
    Attend,
    CrossAttention,
    Rotary,
    Segments,
    SelfAttention,
)
from .configuration_lmp import LmpConfig

Layout = Callable[[int], tuple[Segments, Rotary]]
"""Tokens per shot -> segments and rotations of a row of such tokens."""


class LearnedPositions(nn.Embedding):
    """A table over the place in the segment, which begins as the sinusoidal one. Places past its end share its last."""

    def forward(self, position_P: Tensor) -> Tensor:
        return super().forward(position_P.clamp(max=self.num_embeddings - 1))


class ModalityEmbedding(nn.Module):
    """Base features of one modality -> tokens; what is missing becomes NONE, what is hidden becomes MASK."""

    def __init__(self, config: LmpConfig, modality: str) -> None:
        super().__init__()
        shape = config.modalities[modality]
        self.projection = nn.Linear(shape["width"], config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.none = nn.Parameter(torch.empty(config.width))
        self.mask = nn.Parameter(torch.empty(config.width))
        self.modality = nn.Parameter(torch.empty(config.width))
        self.tokens = nn.Embedding(shape["tokens"], config.width) if shape["tokens"] > 1 else None

    def forward(self, feature_PKI: Tensor, valid_P: Tensor, masked_P: Tensor, position_PD: Tensor | None) -> Tensor:
        """[P, K, I] -> [P, K, D]; features that are not seen reach neither the output nor a gradient."""
        valid_P11, seen_P11 = valid_P[:, None, None], (valid_P & ~masked_P)[:, None, None]
        feature_PKI = hide(feature_PKI, seen_P11).to(self.projection.weight.dtype)
        token_PKD = self.norm(self.projection(feature_PKI))
        token_PKD = torch.where(seen_P11, token_PKD, torch.where(valid_P11, self.mask, self.none))
        token_PKD = token_PKD + self.modality
        return add_places(token_PKD, self.tokens, position_PD)


def hide(feature: Tensor, seen: Tensor) -> Tensor:
    """Zeros where not `seen`, which also keeps what is not finite there out of every gradient."""
    return torch.where(seen, feature, feature.new_zeros(()))


def add_places(token_PKD: Tensor, tokens: nn.Embedding | None, position_PD: Tensor | None) -> Tensor:
    """Add the embedding of a token's number within its shot, and of the shot's place within its segment."""
    if tokens is not None:
        token_PKD = token_PKD + tokens(torch.arange(tokens.num_embeddings, device=token_PKD.device))
    if position_PD is not None:
        token_PKD = token_PKD + position_PD[:, None]
    return token_PKD


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ContextualBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, config: LmpConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = SelfAttention(config.width, config.heads)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, int(config.mlp_ratio * config.width), config.width)

    def forward(self, x_TD: Tensor, segments: Segments, rotary: Rotary, attend: Attend) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), segments, rotary, attend)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class CrossBlock(nn.Module):
    """Pre-norm self-attention over the queries, cross-attention to the sources, MLP."""

    def __init__(self, config: LmpConfig) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.self_attention = SelfAttention(config.width, config.heads)
        self.cross_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.cross_attention = CrossAttention(config.width, config.heads)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, int(config.mlp_ratio * config.width), config.width)

    def forward(
        self,
        x_TD: Tensor,
        source_TD: Tensor,
        segments: tuple[Segments, Segments],
        rotary: tuple[Rotary, Rotary],
        attend: Attend,
    ) -> Tensor:
        x_TD = x_TD + self.self_attention(self.self_norm(x_TD), segments[0], rotary[0], attend)
        x_TD = x_TD + self.cross_attention(self.cross_norm(x_TD), source_TD, segments, rotary, attend)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class ContextualTransformer(nn.Module):
    """Encoder over the tokens of one modality."""

    def __init__(self, config: LmpConfig, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ContextualBlock(config) for _ in range(layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x_PKD: Tensor, segments: Segments, rotary: Rotary, attend: Attend) -> Tensor:
        x_TD = x_PKD.flatten(0, 1)
        for layer in self.layers:
            x_TD = layer(x_TD, segments, rotary, attend)
        return self.norm(x_TD).view_as(x_PKD)


class CrossTransformer(nn.Module):
    """Learned queries, one per token of the target modality, that read the sources' contextual tokens."""

    def __init__(self, config: LmpConfig) -> None:
        super().__init__()
        tokens = config.modalities[config.target]["tokens"]
        self.target_tokens = tokens
        self.query = nn.Parameter(torch.empty(config.width))
        self.tokens = nn.Embedding(tokens, config.width) if tokens > 1 else None
        self.layers = nn.ModuleList(CrossBlock(config) for _ in range(config.cross_layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(
        self,
        source_PND: Tensor,
        position_PD: Tensor | None,
        segments: tuple[Segments, Segments],
        rotary: tuple[Rotary, Rotary],
        attend: Attend,
    ) -> Tensor:
        """[P, N, D], the N source tokens of each shot side by side -> [P, K of the target, D]."""
        query_PKD = self.query.expand(source_PND.shape[0], self.target_tokens, -1)
        query_PKD = add_places(query_PKD, self.tokens, position_PD)
        x_TD, source_TD = query_PKD.flatten(0, 1), source_PND.flatten(0, 1)
        for layer in self.layers:
            x_TD = layer(x_TD, source_TD, segments, rotary, attend)
        return self.norm(x_TD).view_as(query_PKD)


class Temperature(nn.Module):
    """A learned temperature, floor + exp(log_excess): above its floor, and never without a gradient."""

    def __init__(self, config: LmpConfig) -> None:
        super().__init__()
        self.floor = config.minimum_temperature
        self.log_excess = nn.Parameter(torch.empty(1))

    def forward(self) -> Tensor:
        """[1] fp32: one over the temperature."""
        return 1.0 / (self.floor + self.log_excess.float().exp())


class Bias(nn.Module):
    """What the sigmoid loss adds to every logit, learned; it begins low, since nearly all pairs are negative."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(1))

    def forward(self) -> Tensor:
        """[1] fp32."""
        return self.value.float()


class TargetProjection(nn.Linear):
    """Base features, layer-normed without weights, into the contrastive space: [..., I] -> [..., E].

    The bias does not begin at zero, so that a featureless shot (silence) has a direction to be compared by.
    """

    def forward(self, feature: Tensor) -> Tensor:
        feature = F.layer_norm(feature.float(), feature.shape[-1:])
        return super().forward(feature.to(self.weight.dtype))
