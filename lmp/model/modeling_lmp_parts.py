"""Parts of the LMP model by themselves: the contextual transformer of one modality, and the cross-modal transformer.

Their tensors have the names that they have in `LmpModel`, so a part's weights are a subset of the whole model's.
Shape letters as in `modeling_lmp`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

# As remote code, transformers 4.51 fetches only the files that this one names, not those that they name.
from .attention import attention as _attention  # noqa: F401
from .backends import resolve as _resolve  # noqa: F401
from .configuration_lmp import LmpContextualConfig, LmpCrossConfig
from .layers import ContextualTransformer, CrossTransformer, ModalityEmbedding
from .modeling_lmp import LmpTrunk, complete_inputs, read_sources


class LmpContextualModel(LmpTrunk):
    """The embedding and contextual transformer of `config.modality`."""

    config_class = LmpContextualConfig  # type: ignore[assignment]

    def __init__(self, config: LmpContextualConfig) -> None:
        super().__init__(config)
        name = config.modality
        self.embeddings = nn.ModuleDict({name: ModalityEmbedding(config, name)})
        self.contextual = nn.ModuleDict({name: ContextualTransformer(config, config.layers_of(name))})
        self.post_init()

    def forward(
        self,
        features: Tensor,
        valid: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
        positions: Tensor | None = None,
        times: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> BaseModelOutput:
        """Run one packed row [P, K, I], or a dense batch [B, S, K, I].

        Args:
            features: of the one modality; the further arguments as in `LmpModel.forward`, for it alone.

        Returns:
            `last_hidden_state`, [P, K, D] or [B, S, K, D]: what `LmpModel` gives as `contextual[modality]`.

        Raises:
            ValueError: shapes or lengths that do not fit the configuration or each other.
        """
        name = self.config.modality
        spec = self.config.modalities[name]
        valid_masked = [None if flag is None else {name: flag} for flag in (valid, masked)]
        (feature,), (valid,), (masked,) = (
            part.values() for part in complete_inputs({name: spec}, {name: features}, *valid_masked)
        )
        shape = feature.shape[:-2]
        position_PD, layout = self._layout(shape, feature.device, lengths=lengths, positions=positions, times=times)
        token_PKD = self.embeddings[name](feature.flatten(0, -3), valid.flatten(), masked.flatten(), position_PD)
        token_PKD = self.contextual[name](token_PKD, *layout(spec["tokens"]), self.attention)
        return BaseModelOutput(last_hidden_state=token_PKD.unflatten(0, shape))


class LmpCrossModel(LmpTrunk):
    """The cross-modal transformer: reads the contextual tokens of `config.sources`, tells those of the target."""

    config_class = LmpCrossConfig

    def __init__(self, config: LmpCrossConfig) -> None:
        super().__init__(config)
        self.cross = CrossTransformer(config)
        self.post_init()

    def forward(
        self,
        contextual: dict[str, Tensor],
        *,
        lengths: Sequence[int] | None = None,
        positions: Tensor | None = None,
        times: Tensor | None = None,
    ) -> BaseModelOutput:
        """Run one packed row, or a dense batch.

        Args:
            contextual: NAME -> [P, K, D] or [B, S, K, D] of each source, as `LmpContextualModel` gives them; the
                further arguments as in `LmpModel.forward`.

        Returns:
            `last_hidden_state`, [P, K of the target, D] or [B, S, K of the target, D].

        Raises:
            ValueError: names, shapes or lengths that do not fit the configuration or each other.
        """
        sources = self.config.sources
        if sorted(contextual) != sorted(sources):
            raise ValueError(f"contextual tokens of {sorted(contextual)} are given: give those of {sorted(sources)}")
        first = contextual[sources[0]]
        shape = first.shape[:-2]
        for name in sources:
            want = (*shape, self.config.modalities[name]["tokens"], self.config.width)
            if tuple(contextual[name].shape) != want or len(shape) not in (1, 2):
                raise ValueError(f"contextual[{name!r}] has shape {tuple(contextual[name].shape)}, expected {want}")
        position_PD, layout = self._layout(shape, first.device, lengths=lengths, positions=positions, times=times)
        tokens = [contextual[name].flatten(0, -3) for name in sources]
        cross = read_sources(self.cross, tokens, position_PD, layout, self.attention)
        return BaseModelOutput(last_hidden_state=cross.unflatten(0, shape))
