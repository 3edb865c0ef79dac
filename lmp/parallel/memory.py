"""Activation checkpointing, offload, tiling and compilation, wrapped around the blocks of a model from outside.

Only the `forward` of blocks (and of their MLPs) is replaced: parameters, their names and the state dict stay. Apart
from tiling and compilation, which round differently, losses and gradients are bit for bit those without it.

Ulysses: the all-to-alls around attention are run again together with a block, under "selective" too, where only the
attention operator between them is not. Keeping what they bring would cost three more tensors per layer. Every rank runs
the same blocks again in the same order, so the collectives meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lmp.model.attention import Attend
from lmp.model.backends import attention_ops
from lmp.model.layers import ContextualBlock, CrossBlock
from lmp.model.modeling_lmp import LmpForPretraining
from lmp.parallel.compilation import CompiledForward, check_compiler
from lmp.parallel.memory_settings import MemorySettings
from lmp.parallel.offload import HostStore, Parked
from lmp.parallel.tiling import tile_mlp


def apply_memory(model: LmpForPretraining, settings: MemorySettings) -> None:
    """Wrap the blocks of `model`. Comes before the engine, so that DeepSpeed sees the finished blocks.

    Args:
        model: not wrapped yet.
        settings: what to apply.

    Raises:
        UserError: `settings.compile` on a machine that cannot compile.
    """
    if settings.compile:
        check_compiler(settings, cuda=torch.cuda.is_available())
    store = HostStore() if settings.offload else None
    for block in blocks(model):
        if settings.tile_mlp is not None:
            tile_mlp(block.mlp, settings.tile_mlp)
        forward: Callable[..., Tensor] = block.forward
        if settings.compile:
            forward = CompiledForward(forward, backend=settings.backend)
        if settings.checkpointing != "none":
            forward = CheckpointedForward(forward, keep_attention=settings.checkpointing == "selective", store=store)
        if forward is not block.forward:
            block.forward = forward  # type: ignore[method-assign]


def blocks(model: nn.Module) -> Iterator[ContextualBlock | CrossBlock]:
    """The layers of all transformers of `model`, in the order in which they run."""
    for module in model.modules():
        if isinstance(module, ContextualBlock | CrossBlock):
            yield module


class CheckpointedForward:
    """A block's forward that keeps its inputs and runs again in backward; signature and values of the block's.

    Args:
        forward: of the block.
        keep_attention: keep also what the attention operators return, and do not run them again.
        store: where the inputs wait, or None to keep them on the device.
    """

    def __init__(self, forward: Callable[..., Tensor], *, keep_attention: bool, store: HostStore | None) -> None:
        self.forward, self.keep_attention, self.store = forward, keep_attention, store

    def __call__(self, *arguments: Any) -> Tensor:
        *inputs, segments, rotary, attend = arguments
        if not torch.is_grad_enabled():
            return self.forward(*arguments)
        kept: Attend = KeptAttention(attend) if self.keep_attention else attend

        def run(*held: Tensor | Parked) -> Tensor:
            own = (part.take() if isinstance(part, Parked) else part for part in held)
            if isinstance(kept, KeptAttention):
                kept.begin()
            return self.forward(*own, segments, rotary, kept)

        held = inputs if self.store is None else [self.store.put(tensor) for tensor in inputs]
        del inputs, arguments
        # No block draws random numbers.
        return checkpoint(run, *held, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


class KeptAttention:
    """The attention calls of one run of a block, and of the run that repeats it without the attention operators."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend
        self._runs = 0
        self._number = 0
        self._replays: list[AbstractContextManager[Any]] = []

    def begin(self) -> None:
        """The block is about to run, for the first time or again."""
        self._runs += 1
        self._number = 0

    def __call__(self, *tensors: Tensor, **segments: Any) -> Tensor:
        if self._runs > 1:
            self._number += 1
            with self._replays[self._number - 1]:
                return self.attend(*tensors, **segments)
        # Contexts of its own for each call, and around nothing but attention: what ZeRO-3 does between the layers
        # differs from run to run and is none of their business.
        policy = _KeepAttention()
        first, again = create_selective_checkpoint_contexts(policy)
        self._replays.append(again)
        with first:
            out = self.attend(*tensors, **segments)
        if not policy.kept:
            _warn_once()
        return out


class _KeepAttention:
    """The policy: keep what attention operators return, run everything else again."""

    def __init__(self) -> None:
        self.kept = False
        self._operators = attention_ops()

    def __call__(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in self._operators:
            self.kept = True
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def _warn_once() -> None:
    warnings.warn(
        "memory.checkpointing=selective found no fused attention operator to keep (the math fallback?): "
        "attention is run twice, as with full",
        stacklevel=2,
    )
