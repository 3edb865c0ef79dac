"""The model: single-device code that trains as it stands and ships as it stands.

`attention.py`, `backends.py`, `configuration_lmp.py` and `modeling_lmp.py` import nothing of lmp but each other;
copies of them are the remote code of an exported model.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .attention import Segments, attention
from .configuration_lmp import LmpConfig
from .modeling_lmp import (
    LmpForPretraining,
    LmpModel,
    LmpModelOutput,
    LmpPreTrainedModel,
    LmpPretrainingOutput,
)

__all__ = [
    "LmpConfig",
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
    """Make `AutoConfig`, `AutoModel` and `AutoModelForPreTraining` know model type "lmp"; idempotent."""
    AutoConfig.register(LmpConfig.model_type, LmpConfig, exist_ok=True)
    AutoModel.register(LmpConfig, LmpModel, exist_ok=True)
    AutoModelForPreTraining.register(LmpConfig, LmpForPretraining, exist_ok=True)


register_auto()
