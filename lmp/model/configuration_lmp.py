"""The configuration of an LMP model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

CONTRASTIVE_LOSSES = ("info_nce", "sigmoid")
POSITIONS = ("learned", "sinusoidal", "rope", "time_rope")
PAPER_MODALITIES = {
    "video": {"tokens": 1, "width": 512},
    "audio": {"tokens": 1, "width": 896},
    "text": {"tokens": 1, "width": 768},
}


class LmpConfig(PretrainedConfig):
    """Shape of an `LmpModel`.

    Args:
        modalities: name -> {"tokens": tokens per shot K, "width": width of a base feature}, in the model's
            order. Default: the paper's video, audio and text features.
        target: the modality whose shots the cross-modal transformer reconstructs.
        sources: the modalities that it reads. Default: all but the target.
        width: width D of every token inside the model.
        heads: attention heads H; head dimension C = width / heads.
        mlp_ratio: width of the MLPs, in units of `width`.
        contextual_layers: layers of each contextual transformer: one number, or one per modality.
        cross_layers: layers of the cross-modal transformer.
        contrastive_width: width E of the space in which the objectives compare.
        positions: "learned" or "sinusoidal" (added to the tokens), "rope" (rotation by the place within the
            segment) or "time_rope" (rotation by the start of the shot in seconds).
        max_positions: rows of the learned position table; only used by "learned".
        rope_base: base of the rotation frequencies.
        norm_eps: epsilon of the layer norms.
        initializer_range: standard deviation of the initial weights.
        initial_temperature, minimum_temperature: where the learned temperatures begin, and what they never
            fall below.
        contrastive_loss: "info_nce" or "sigmoid"; with the latter each temperature has a learned bias beside it.
        initial_bias: where those biases begin.
        modality_order: names of `modalities` in order; config.json sorts its keys, so the order is kept here.

    Raises:
        ValueError: values that contradict each other; the text says what to change.
    """

    model_type = "lmp"
    attribute_map = {"hidden_size": "width", "num_attention_heads": "heads"}  # noqa: RUF012  (must stay unannotated)

    def __init__(
        self,
        modalities: Mapping[str, Mapping[str, int]] | None = None,
        target: str = "video",
        sources: Sequence[str] | None = None,
        width: int = 512,
        heads: int = 4,
        mlp_ratio: float = 4,
        contextual_layers: int | Mapping[str, int] = 4,
        cross_layers: int = 4,
        contrastive_width: int = 256,
        positions: str = "learned",
        max_positions: int = 512,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        initial_temperature: float = 0.07,
        minimum_temperature: float = 0.01,
        contrastive_loss: str = "info_nce",
        initial_bias: float = -10.0,
        modality_order: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        modalities = PAPER_MODALITIES if modalities is None else modalities
        self.modalities = _ordered(modalities, modality_order)
        self.modality_order = list(self.modalities)
        self.target = target
        self.sources = [name for name in self.modalities if name != target] if sources is None else list(sources)
        self.width = width
        self.heads = heads
        self.mlp_ratio = mlp_ratio
        self.contextual_layers = (
            dict(contextual_layers) if isinstance(contextual_layers, Mapping) else contextual_layers
        )
        self.cross_layers = cross_layers
        self.contrastive_width = contrastive_width
        self.positions = positions
        self.max_positions = max_positions
        self.rope_base = rope_base
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.initial_temperature = initial_temperature
        self.minimum_temperature = minimum_temperature
        self.contrastive_loss = contrastive_loss
        self.initial_bias = initial_bias
        faults = [*_modality_faults(self), *_shape_faults(self), *_position_faults(self)]
        if faults:
            raise ValueError("LmpConfig: " + "; ".join(faults))
        super().__init__(**kwargs)

    def layers_of(self, modality: str) -> int:
        """Layers of the contextual transformer of `modality`."""
        layers = self.contextual_layers
        return layers[modality] if isinstance(layers, dict) else layers


class LmpContextualConfig(LmpConfig):
    """Shape of an `LmpContextualModel`: that of the whole model, and whose contextual transformer this is.

    Raises:
        ValueError: as LmpConfig; or there is no such modality.
    """

    model_type = "lmp_contextual"

    def __init__(self, modality: str = "video", **kwargs: Any) -> None:
        self.modality = modality
        super().__init__(**kwargs)
        if modality not in self.modalities:
            raise ValueError(
                f"LmpContextualConfig: modality {modality!r} is unknown: choose one of {list(self.modalities)}"
            )


class LmpCrossConfig(LmpConfig):
    """Shape of an `LmpCrossModel`: that of the whole model."""

    model_type = "lmp_cross"


def _ordered(modalities: Mapping[str, Mapping[str, int]], order: Sequence[str] | None) -> dict[str, dict[str, int]]:
    names = list(modalities) if order is None else list(order)
    if sorted(names) != sorted(modalities):
        raise ValueError(f"LmpConfig: modality_order {names} must name each of modalities {sorted(modalities)} once")
    return {name: dict(modalities[name]) for name in names}


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _modality_faults(config: LmpConfig) -> list[str]:
    faults = []
    known = list(config.modalities)
    for name, shape in config.modalities.items():
        # Names become parts of parameter names, so they must not hide a method of the container.
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or hasattr(nn.ModuleDict, name):
            faults.append(f"modality name {name!r}: use letters, digits and _, and no name of a torch method")
        if set(shape) != {"tokens", "width"} or not all(_is_count(value) for value in shape.values()):
            faults.append(f"modalities[{name!r}] is {shape}: give it tokens >= 1 and width >= 1")
    if config.target not in config.modalities:
        faults.append(f"target {config.target!r} is not a modality: choose one of {known}")
    if unknown := [name for name in config.sources if name not in config.modalities]:
        faults.append(f"sources {unknown} are not modalities: choose from {known}")
    if len(set(config.sources)) != len(config.sources):
        faults.append(f"sources {config.sources} hold a name twice")
    if not config.sources:
        faults.append(
            f"no sources to reconstruct target {config.target!r} from: add a second modality, or name the sources"
        )
    if isinstance(config.contextual_layers, dict) and set(config.contextual_layers) != set(known):
        faults.append(f"contextual_layers name {sorted(config.contextual_layers)}: name each of {sorted(known)}")
    return faults


def _shape_faults(config: LmpConfig) -> list[str]:
    names = ("width", "heads", "cross_layers", "contrastive_width", "max_positions")
    faults = [
        f"{name} is {getattr(config, name)!r}: give a whole number >= 1"
        for name in names
        if not _is_count(getattr(config, name))
    ]
    layers = config.contextual_layers
    if not all(_is_count(n, least=0) for n in (layers.values() if isinstance(layers, dict) else [layers])):
        faults.append(f"contextual_layers is {layers!r}: give whole numbers >= 0")
    if not faults and config.width % config.heads:
        faults.append(f"width {config.width} is not a multiple of heads {config.heads}")
    if config.mlp_ratio * config.width < 1:
        faults.append(f"mlp_ratio is {config.mlp_ratio}: it must give MLPs a width >= 1")
    if not 0 < config.minimum_temperature < config.initial_temperature:
        faults.append(
            f"initial_temperature {config.initial_temperature} must be above "
            f"minimum_temperature {config.minimum_temperature}, and that above 0"
        )
    if config.contrastive_loss not in CONTRASTIVE_LOSSES:
        faults.append(f"contrastive_loss {config.contrastive_loss!r} is unknown: choose one of {CONTRASTIVE_LOSSES}")
    return faults


def _position_faults(config: LmpConfig) -> list[str]:
    if config.positions not in POSITIONS:
        return [f"positions {config.positions!r} are unknown: choose one of {list(POSITIONS)}"]
    rotary = config.positions in ("rope", "time_rope")
    even = config.width // max(config.heads, 1) if rotary else config.width
    if even % 2:
        what = "head dimension (width / heads)" if rotary else "width"
        return [f"positions {config.positions!r} need an even {what}, got {even}"]
    return []
