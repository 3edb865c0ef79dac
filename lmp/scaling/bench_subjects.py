"""Encoders of one shape for `lmp bench step`: a contextual transformer of lmp, and others that people train.

All are pre-norm or post-norm encoders of the same width, heads, layers and MLP, without dropout, bidirectional over
the whole sequence, on torch's scaled_dot_product_attention. None reads token ids: a sequence [B, L, D] goes in, one
comes out. Shape letters: B sequences, L tokens in each, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmp.errors import UserError

MLP_RATIO = 4
OWN = ("lmp", "lmp rope")
PEERS = ("torch.nn.TransformerEncoder", "ModernBERT, full attention", "BERT")


@dataclass(frozen=True)
class Shape:
    """What all encoders have in common.

    Attributes:
        width, heads, layers: of the encoder; its MLPs are four times as wide.
    """

    width: int
    heads: int
    layers: int

    def __post_init__(self) -> None:
        for name in ("width", "heads", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}", remedy="give at least 1")
        if self.width % (2 * self.heads):
            raise UserError(
                f"--width {self.width} with --heads {self.heads}: rotation needs an even number of channels a head",
                remedy="give a width that is a multiple of twice the heads",
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass
class Subject:
    """One encoder that can be trained.

    Attributes:
        name: of OWN, or a peer's.
        module: its parameters.
        run: [B, L, D] -> [B, L, D].
        blocks: its layers, which `torch.compile` may take one by one.
    """

    name: str
    module: nn.Module
    run: Callable[[Tensor], Tensor]
    blocks: nn.ModuleList

    @property
    def matmul_parameters(self) -> int:
        """N: elements of all weights that are multiplied with every token; no embeddings, biases or norms."""
        tables = {id(m.weight) for m in self.module.modules() if isinstance(m, nn.Embedding)}
        return sum(p.numel() for p in self.module.parameters() if p.ndim == 2 and id(p) not in tables)


def step_flops(subject: Subject, shape: Shape, *, batch: int, length: int) -> float:
    """Model operations of forward and backward, 6N + 12 L d s a token (Chowdhery et al., "PaLM", 2022, appendix B)."""
    per_token = 6 * subject.matmul_parameters + 12 * shape.layers * shape.width * length
    return float(batch * length * per_token)


def recomputed_flops(shape: Shape, *, batch: int, length: int) -> float:
    """Operations that a fused attention does again in backward, the scores: 2 L d s a token."""
    return float(batch * length * 2 * shape.layers * shape.width * length)


def make_subjects(
    names: Sequence[str], shape: Shape, *, longest: int, device: torch.device, dtype: torch.dtype
) -> list[Subject]:
    """Encoders, with weights from a fixed seed.

    Args:
        names: some of OWN and PEERS.
        longest: the longest sequence that any will get.
        device, dtype: of parameters and inputs.
    """
    makers: list[Callable[..., Subject]] = [_own, _own_rope, _torch_encoder, _modern_bert, _bert]
    by_name = dict(zip((*OWN, *PEERS), makers, strict=True))
    made = []
    for name in names:
        torch.manual_seed(0)
        subject = by_name[name](shape, longest)
        subject.module.to(device=device, dtype=dtype).train()
        made.append(subject)
    return made


def compiled(subject: Subject) -> Subject:
    """The same parameters with each block compiled, attention of lmp aside as in training; under another name."""
    from lmp.model.layers import ContextualBlock
    from lmp.parallel.memory import apply_memory
    from lmp.parallel.memory_settings import MemorySettings

    if isinstance(subject.blocks[0], ContextualBlock):
        apply_memory(subject.module, MemorySettings(compile=True))  # type: ignore[arg-type]
    else:
        for block in subject.blocks:
            block.compile()
    return Subject(f"{subject.name}, compiled", subject.module, subject.run, subject.blocks)


def own_encoder(shape: Shape, positions: str) -> nn.Module:
    """One contextual transformer, as it stands in LmpModel."""
    from lmp.model import LmpConfig
    from lmp.model.layers import ContextualTransformer

    config = LmpConfig(
        width=shape.width,
        heads=shape.heads,
        mlp_ratio=MLP_RATIO,
        contextual_layers=shape.layers,
        positions=positions,
    )
    return ContextualTransformer(config, shape.layers)


def _own(shape: Shape, longest: int) -> Subject:
    return _of_own(OWN[0], own_encoder(shape, "sinusoidal"), shape, rope=False)


def _own_rope(shape: Shape, longest: int) -> Subject:
    return _of_own(OWN[1], own_encoder(shape, "rope"), shape, rope=True)


def _of_own(name: str, module: nn.Module, shape: Shape, *, rope: bool) -> Subject:
    """The path of LmpModel.forward: rows of segments, their layout and rotation made anew in each step."""
    from lmp.model.attention import Segments, places, rotary_of, rotation_angles
    from lmp.model.backends import resolve

    def run(x_BLD: Tensor) -> Tensor:
        batch, length, _ = x_BLD.shape
        lengths = (length,) * batch
        attend = resolve("auto", device=x_BLD.device, dtype=x_BLD.dtype, head_dim=shape.head_dim)
        segments = Segments.from_lengths(lengths, device=x_BLD.device)
        angles = rotation_angles(places(lengths, x_BLD.device), shape.head_dim, base=10000.0) if rope else None
        out: Tensor = module(x_BLD.flatten(0, 1)[:, None], segments, rotary_of(angles, 1), attend)
        return out.view_as(x_BLD)

    return Subject(name, module, run, module.layers)  # type: ignore[arg-type]


def _torch_encoder(shape: Shape, longest: int) -> Subject:
    layer = nn.TransformerEncoderLayer(
        shape.width,
        shape.heads,
        dim_feedforward=MLP_RATIO * shape.width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    module = nn.TransformerEncoder(
        layer, shape.layers, norm=nn.LayerNorm(shape.width), enable_nested_tensor=False, mask_check=False
    )
    return Subject(PEERS[0], module, module, module.layers)


def _modern_bert(shape: Shape, longest: int) -> Subject:
    """Its gated MLP has three matrices: two thirds of the width give it the parameters of the others."""
    from transformers import ModernBertConfig, ModernBertModel

    config = ModernBertConfig(
        vocab_size=8,
        pad_token_id=0,
        hidden_size=shape.width,
        intermediate_size=round(MLP_RATIO * shape.width * 2 / 3 / 8) * 8,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=longest,
        layer_types=["full_attention"] * shape.layers,
        attn_implementation="sdpa",
    )
    module = ModernBertModel(config)
    return Subject(PEERS[1], module, _last_hidden_state(module), module.layers)


def _bert(shape: Shape, longest: int) -> Subject:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=8,
        hidden_size=shape.width,
        intermediate_size=MLP_RATIO * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=longest,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    module = BertModel(config, add_pooling_layer=False)
    return Subject(PEERS[2], module, _last_hidden_state(module), module.encoder.layer)


def _last_hidden_state(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x_BLD: module(inputs_embeds=x_BLD).last_hidden_state  # type: ignore[no-any-return]
