"""The LMP model: contextual transformers, a cross-modal transformer, and the heads of pretraining.

Shape letters: P shots in a pack, K tokens of a modality in one shot, T = P * K tokens, D width, E width of
the contrastive space, H heads, C head dimension, I width of a base feature.

Nothing here knows of parallelism. Under sequence parallelism P is a rank's own share of the pack, `lengths`
describe the whole pack, and the function given to `set_attention` does the exchange.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .attention import (
    Attend,
    Rotary,
    Segments,
    attention,
    places,
    rotary_of,
    rotation_angles,
    sinusoid,
)
from .backends import resolve
from .configuration_lmp import LmpConfig
from .layers import (
    Bias,
    ContextualTransformer,
    CrossTransformer,
    Layout,
    LearnedPositions,
    Mlp,
    ModalityEmbedding,
    TargetProjection,
    Temperature,
    hide,
)

OBJECTIVES = ("masked", "alignment", "reconstruction")
"""Each has its own temperature and, with the sigmoid loss, its own bias."""


@dataclass
class LmpModelOutput(ModelOutput):
    """What the model says about every shot; [B, S, K, D] instead of [P, K, D] for a dense batch.

    Attributes:
        contextual: NAME -> [P, K, D], the tokens of each modality in the context of their segment.
        cross: [P, K of the target, D], the target's tokens as the sources tell them.
    """

    contextual: dict[str, Tensor] | None = None
    cross: Tensor | None = None


@dataclass
class LmpPretrainingOutput(ModelOutput):
    """The model's tokens, and their places in the contrastive spaces (width E: fp32, unit length).

    Attributes:
        contextual, cross: as in `LmpModelOutput`.
        predicted: NAME -> [P, K, E], what the context says a shot's base feature is.
        target: NAME -> [P, K, E], the base feature itself; all alike where it is not valid.
        aligned: NAME -> [P, K, E], contextual tokens in the space that modalities share.
        reconstructed: [P, K of the target, E], cross-modal tokens in that space.
        scale: "masked" | "alignment" | "reconstruction" -> [1] fp32, one over the temperature.
        bias: the same names -> [1] fp32; None unless the configuration's loss is "sigmoid".
    """

    contextual: dict[str, Tensor] | None = None
    cross: Tensor | None = None
    predicted: dict[str, Tensor] | None = None
    target: dict[str, Tensor] | None = None
    aligned: dict[str, Tensor] | None = None
    reconstructed: Tensor | None = None
    scale: dict[str, Tensor] | None = None
    bias: dict[str, Tensor] | None = None


class LmpPreTrainedModel(PreTrainedModel):
    """What both models share: the configuration class and how weights begin."""

    config_class = LmpConfig
    base_model_prefix = "lmp"
    _supports_sdpa = True
    _no_split_modules = ["ContextualBlock", "CrossBlock"]  # noqa: RUF012  (read by transformers as a plain list)

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Temperature):
            excess = self.config.initial_temperature - self.config.minimum_temperature
            nn.init.constant_(module.log_excess, math.log(excess))
        elif isinstance(module, Bias):
            nn.init.constant_(module.value, self.config.initial_bias)
        elif isinstance(module, LearnedPositions):
            self._init_positions(module.weight)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias" and not isinstance(module, TargetProjection):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, mean=0.0, std=std)

    @torch.no_grad()
    def _init_positions(self, weight: Tensor) -> None:
        # Loaded weights carry a mark that only torch.nn.init minds. An empty weight is a ZeRO-3 shard.
        if weight.numel() and not getattr(weight, "_is_hf_initialized", False):
            place_P = torch.arange(weight.shape[0], device=weight.device)
            weight.copy_(sinusoid(place_P, weight.shape[1]))


class LmpTrunk(LmpPreTrainedModel):
    """What the whole trunk and its parts share: the attention function, and where shots stand.

    Attributes:
        attention: the function that does all attention; replace it with `set_attention`.
        positions: the learned table; None for other positions.
    """

    def __init__(self, config: LmpConfig) -> None:
        super().__init__(config)
        self.attention: Attend = attention
        self.positions = LearnedPositions(config.max_positions, config.width) if config.positions == "learned" else None

    def set_attention(self, attend: Attend | str) -> None:
        """Use `attend` for all attention: a function with the signature and shapes of `attention.attention`, or
        the name of a backend ("auto", "sdpa", ...; see `backends`), chosen for the model's device and dtype as
        they are now.

        Raises:
            ValueError: there is no such backend, or it cannot be used here; the message says why.
        """
        if isinstance(attend, str):
            head_dim = self.config.width // self.config.heads
            attend = resolve(attend, device=self.device, dtype=self.dtype, head_dim=head_dim)
        self.attention = attend

    def _layout(
        self,
        shape: torch.Size,
        device: torch.device,
        *,
        lengths: Sequence[int] | None,
        positions: Tensor | None,
        times: Tensor | None,
    ) -> tuple[Tensor | None, Layout]:
        """For features of `shape` [P] or [B, S]: what is added to every shot [P, D], and segments and rotations by the
        tokens of a shot."""
        if len(shape) == 2:
            if lengths is not None:
                raise ValueError("lengths describe packed rows [P, ...]; a dense batch [B, S, ...] has its own")
            lengths = (shape[1],) * shape[0]
        lengths = tuple(lengths) if lengths is not None else tuple(shape)
        position_P = self._positions(positions, lengths, shape, device)
        angle_PC = self._angles(position_P, times, shape)
        layouts: dict[int, tuple[Segments, Rotary]] = {}

        def layout(tokens: int) -> tuple[Segments, Rotary]:
            if tokens not in layouts:
                segments = Segments.from_lengths(lengths, device=device, tokens_per_shot=tokens)
                layouts[tokens] = segments, rotary_of(angle_PC, tokens)
            return layouts[tokens]

        return self._added_positions(position_P), layout

    def _positions(
        self, positions: Tensor | None, lengths: tuple[int, ...], shape: torch.Size, device: torch.device
    ) -> Tensor:
        if positions is not None:
            if positions.shape != shape:
                raise ValueError(f"positions have shape {tuple(positions.shape)}, features have {tuple(shape)}")
            return positions.flatten()
        if sum(lengths) != shape.numel():
            raise ValueError(
                f"lengths hold {sum(lengths)} shots, features hold {shape.numel()}: "
                "correct the lengths, or pass positions if this is a share of the pack"
            )
        if self.positions is not None and max(lengths) > self.config.max_positions:
            raise ValueError(
                f"a segment of {max(lengths)} shots exceeds max_positions {self.config.max_positions}: "
                "cut it, or use a model with other positions"
            )
        return places(lengths, device)

    def _added_positions(self, position_P: Tensor) -> Tensor | None:
        if self.positions is not None:
            return self.positions(position_P)
        if self.config.positions == "sinusoidal":
            return sinusoid(position_P, self.config.width).to(self.dtype)
        return None

    def _angles(self, position_P: Tensor, times: Tensor | None, shape: torch.Size) -> Tensor | None:
        head_width = self.config.width // self.config.heads
        if self.config.positions == "rope":
            return rotation_angles(position_P, head_width, base=self.config.rope_base)
        if self.config.positions == "time_rope":
            if times is None or times.shape != shape:
                found = None if times is None else tuple(times.shape)
                raise ValueError(f"positions 'time_rope' need times of shape {tuple(shape)}, got {found}")
            return rotation_angles(times.flatten(), head_width, base=self.config.rope_base)
        return None


class LmpModel(LmpTrunk):
    """Contextual transformers and the cross-modal transformer, without heads.

    There is no dropout, and all submodules run in the same order on every call, whatever is missing.
    """

    def __init__(self, config: LmpConfig) -> None:
        super().__init__(config)
        names = list(config.modalities)
        self.embeddings = nn.ModuleDict({name: ModalityEmbedding(config, name) for name in names})
        self.contextual = nn.ModuleDict({name: ContextualTransformer(config, config.layers_of(name)) for name in names})
        self.cross = CrossTransformer(config)
        self.post_init()

    def forward(
        self,
        features: dict[str, Tensor],
        valid: dict[str, Tensor] | None = None,
        *,
        lengths: Sequence[int] | None = None,
        positions: Tensor | None = None,
        times: Tensor | None = None,
        masked: dict[str, Tensor] | None = None,
    ) -> LmpModelOutput:
        """Run one packed row [P, ...], or a dense batch [B, S, ...] of B segments of S shots.

        Args:
            features: NAME -> [P, K, I] (or [B, S, K, I]), any floating dtype. A modality that is left out is
                missing in every shot.
            valid: NAME -> [P] bool, False where the shot lacks the modality. Default: all given are valid.
            lengths: shots of each segment of the whole pack; packed form only. Default: one segment.
            positions: [P] int64, place of each shot within its segment. Default: counted from `lengths`.
            times: [P] float, start of each shot in seconds; needed by positions "time_rope".
            masked: NAME -> [P] bool, shots whose features are hidden; missing ones stay so. Default: none.

        Raises:
            ValueError: names, shapes or lengths that do not fit the configuration or each other.
        """
        features, valid, masked = complete_inputs(self.config.modalities, features, valid, masked)
        shape = next(iter(features.values())).shape[:-2]
        device = next(iter(features.values())).device
        position_PD, layout = self._layout(shape, device, lengths=lengths, positions=positions, times=times)
        contextual = {}
        for name, spec in self.config.modalities.items():
            feature_PKI = features[name].flatten(0, -3)
            token_PKD = self.embeddings[name](feature_PKI, valid[name].flatten(), masked[name].flatten(), position_PD)
            contextual[name] = self.contextual[name](token_PKD, *layout(spec["tokens"]), self.attention)
        cross = read_sources(
            self.cross, [contextual[name] for name in self.config.sources], position_PD, layout, self.attention
        )
        return LmpModelOutput(
            contextual={name: token_PKD.unflatten(0, shape) for name, token_PKD in contextual.items()},
            cross=cross.unflatten(0, shape),
        )


def read_sources(
    cross: CrossTransformer, sources: Sequence[Tensor], position_PD: Tensor | None, layout: Layout, attend: Attend
) -> Tensor:
    """The cross-modal transformer over the sources' contextual tokens, each [P, K, D] -> [P, K of the target, D]."""
    source_PND = torch.cat(list(sources), dim=1)
    query, source = layout(cross.target_tokens), layout(source_PND.shape[1])
    return cross(source_PND, position_PD, (query[0], source[0]), (query[1], source[1]), attend)


class LmpForPretraining(LmpPreTrainedModel):
    """`LmpModel` under the key `lmp`, with the heads that the objectives compare."""

    def __init__(self, config: LmpConfig) -> None:
        super().__init__(config)
        width, space = config.width, config.contrastive_width
        names = list(config.modalities)
        self.lmp = LmpModel(config)
        self.prediction_heads = nn.ModuleDict({name: Mlp(width, width, space) for name in names})
        self.target_projections = nn.ModuleDict(
            {name: TargetProjection(config.modalities[name]["width"], space) for name in names}
        )
        self.alignment_heads = nn.ModuleDict({name: Mlp(width, width, space) for name in names})
        self.reconstruction_head = Mlp(width, width, space)
        self.temperatures = nn.ModuleDict({name: Temperature(config) for name in OBJECTIVES})
        sigmoid = config.contrastive_loss == "sigmoid"
        self.biases = nn.ModuleDict({name: Bias() for name in OBJECTIVES}) if sigmoid else None
        self.post_init()

    def set_attention(self, attend: Attend | str) -> None:
        """As `LmpModel.set_attention`."""
        self.lmp.set_attention(attend)

    def forward(
        self,
        features: dict[str, Tensor],
        valid: dict[str, Tensor] | None = None,
        *,
        lengths: Sequence[int] | None = None,
        positions: Tensor | None = None,
        times: Tensor | None = None,
        masked: dict[str, Tensor] | None = None,
    ) -> LmpPretrainingOutput:
        """Arguments and errors as `LmpModel.forward`."""
        features, valid, masked = complete_inputs(self.config.modalities, features, valid, masked)
        out = self.lmp(features, valid, lengths=lengths, positions=positions, times=times, masked=masked)
        return LmpPretrainingOutput(
            contextual=out.contextual,
            cross=out.cross,
            predicted={name: unit(self.prediction_heads[name](x)) for name, x in out.contextual.items()},
            target={name: self._target(name, features[name], valid[name]) for name in out.contextual},
            aligned={name: unit(self.alignment_heads[name](x)) for name, x in out.contextual.items()},
            reconstructed=unit(self.reconstruction_head(out.cross)),
            scale={name: temperature() for name, temperature in self.temperatures.items()},
            bias=None if self.biases is None else {name: bias() for name, bias in self.biases.items()},
        )

    def _target(self, name: str, feature_PKI: Tensor, valid_P: Tensor) -> Tensor:
        return unit(self.target_projections[name](hide(feature_PKI, valid_P[..., None, None]).detach()))


def unit(x: Tensor) -> Tensor:
    """`x` in fp32, its last axis scaled to length 1."""
    return F.normalize(x.float(), dim=-1)


Inputs = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def complete_inputs(
    modalities: Mapping[str, Mapping[str, int]],
    features: dict[str, Tensor],
    valid: dict[str, Tensor] | None,
    masked: dict[str, Tensor] | None,
) -> Inputs:
    """Check features, valid and masked, and fill in every modality, in the configuration's order."""
    if not features:
        raise ValueError(f"features are empty: give at least one of {list(modalities)}")
    for what, tensors in (("features", features), ("valid", valid or {}), ("masked", masked or {})):
        if unknown := [name for name in tensors if name not in modalities]:
            raise ValueError(f"{what} of unknown modalities {unknown}: the model has {list(modalities)}")
    like = next(iter(features.values()))
    shape = like.shape[:-2]
    if len(shape) not in (1, 2):
        raise ValueError(f"features have shape {tuple(like.shape)}: give [P, K, width] or [B, S, K, width]")
    all_valid = valid or {}
    all_masked = masked or {}
    full: Inputs = ({}, {}, {})
    for name, spec in modalities.items():
        want = (*shape, spec["tokens"], spec["width"])
        given = name in features
        feature = features[name] if given else like.new_zeros(want)
        absent = torch.zeros(shape, dtype=torch.bool, device=like.device)
        valid_P = all_valid.get(name, ~absent) if given else absent
        masked_P = all_masked.get(name, absent)
        if tuple(feature.shape) != want:
            raise ValueError(f"features[{name!r}] have shape {tuple(feature.shape)}, expected {want}")
        for what, flag_P in (("valid", valid_P), ("masked", masked_P)):
            if flag_P.shape != shape or flag_P.dtype != torch.bool:
                raise ValueError(
                    f"{what}[{name!r}] is {flag_P.dtype} of shape {tuple(flag_P.shape)}, "
                    f"expected torch.bool of shape {tuple(shape)}"
                )
        full[0][name], full[1][name], full[2][name] = feature, valid_P, masked_P
    return full
