"""The losses. One file per objective; contrastive.py is the exact tiled core that they share.

Importing this package, or its settings, does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmp.objectives.settings import ObjectivesConfig

if TYPE_CHECKING:
    from lmp.objectives.base import Objective

__all__ = ["ObjectivesConfig", "build_objectives"]


def build_objectives(
    section: ObjectivesConfig, *, target: str = "video", sources: Sequence[str] | None = None
) -> list[Objective]:
    """The objectives of a configuration, those of weight 0 left out, in a fixed order.

    Args:
        section: the `objectives` section.
        target: the modality that the model's cross-modal transformer reconstructs.
        sources: the modalities that it reads; None: all but the target.
    """
    from lmp.objectives.alignment import Alignment
    from lmp.objectives.base import Contrast
    from lmp.objectives.masked_shot import MaskedShot
    from lmp.objectives.reconstruction import Reconstruction

    contrast = Contrast(loss=section.loss, scope=section.scope, exclude_near=section.exclude_near, tile=section.tile)
    objectives: list[Objective] = [
        MaskedShot(weight=section.masked_shot.weight, contrast=contrast),
        Alignment(weight=section.alignment.weight, contrast=contrast),
        Reconstruction(
            target=target,
            sources=None if sources is None else tuple(sources),
            weight=section.reconstruction.weight,
            contrast=contrast,
        ),
    ]
    return [objective for objective in objectives if objective.weight > 0]
