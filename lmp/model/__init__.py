"""The model: single-device code that trains as it stands and ships as it stands.

The files of this folder import nothing of lmp but each other; copies of them are the remote code of an exported model.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .attention import Segments, attention
from .configuration_lmp import LmpConfig, LmpContextualConfig, LmpCrossConfig
from .modeling_lmp import (
    LmpForPretraining,
    LmpModel,
    LmpModelOutput,
    LmpPreTrainedModel,
    LmpPretrainingOutput,
)
from .modeling_lmp_parts import LmpContextualModel, LmpCrossModel

__all__ = [
    "LmpConfig",
    "LmpContextualConfig",
    "LmpContextualModel",
    "LmpCrossConfig",
    "LmpCrossModel",
    "LmpForPretraining",
    "LmpModel",
    "LmpModelOutput",
    "LmpPreTrainedModel",
    "LmpPretrainingOutput",
    "Segments",
    "attention",
    "register_auto",
]


def register_auto() -> None:
    """Make the Auto classes of transformers know the model and its parts; idempotent."""
    pairs = ((LmpConfig, LmpModel), (LmpContextualConfig, LmpContextualModel), (LmpCrossConfig, LmpCrossModel))
    for config, model in pairs:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    AutoModelForPreTraining.register(LmpConfig, LmpForPretraining, exist_ok=True)


register_auto()
