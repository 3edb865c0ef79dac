"""The `objectives` section of the configuration. Imports no torch: reading a configuration is quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ObjectiveConfig(BaseModel):
    """One objective: its weight in the loss; 0 leaves it out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: Weight = 1.0


class MaskedShotConfig(ObjectiveConfig):
    """Masked shot modelling: the share of valid shots masked, in runs of `span` shots."""

    ratio: float = Field(default=0.15, gt=0, lt=1)
    span: int = Field(default=1, ge=1)


class ObjectivesConfig(BaseModel):
    """All objectives, and how they compare."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    masked_shot: MaskedShotConfig = MaskedShotConfig()
    alignment: ObjectiveConfig = ObjectiveConfig()
    reconstruction: ObjectiveConfig = ObjectiveConfig()
    loss: Literal["info_nce", "sigmoid"] = Field(
        default="info_nce", description="softmax over the candidates, or a yes or no for each (SigLIP)"
    )
    scope: Literal["pack", "film", "step"] = Field(
        default="pack", description="whose shots are candidates: the pack's, the row's own window's, the whole step's"
    )
    exclude_near: int = Field(
        default=0, ge=0, lt=2**31, description="shots of the same film this near are no negatives; 0: all are"
    )
    tile: int = Field(default=4096, ge=1, description="side of the square of logits that is in memory at once")

    @model_validator(mode="after")
    def _some_objective(self) -> ObjectivesConfig:
        if not any(part.weight > 0 for part in (self.masked_shot, self.alignment, self.reconstruction)):
            raise ValueError("every objective has weight 0; give at least one a weight above 0")
        return self

    @property
    def mask_ratio(self) -> float:
        """The share of shots to mask: 0 without masked shot modelling, whose rows alone need the mask."""
        return self.masked_shot.ratio if self.masked_shot.weight > 0 else 0.0
