"""Counts tensor memory where no allocator does: bytes of live storages, and bytes that autograd keeps for backward.

On CUDA the caching allocator answers these questions; on the CPU nothing does (the resident size of a process also
holds its libraries and what the allocator did not give back). The counts are exact and do not depend on timing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every tensor storage that is made inside the context, until it dies.

    Attributes:
        now: bytes alive.
        peak: the most there were; `reset_peak` begins anew.

    What a kernel allocates for itself and frees before it returns is not seen.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.device = torch.device(device).type
        self.now = 0
        self.peak = 0
        self._held: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.count(value)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count a tensor that was made before."""
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        held = self._held.get(key)
        if held is not None and held[0]() is storage:
            if held[1] == size:
                return
            self.now -= held[1]
        self._held[key] = (weakref.ref(storage, lambda ref, key=key: self._forget(key, ref)), size)  # type: ignore[misc]
        self.now += size
        self.peak = max(self.peak, self.now)

    def reset_peak(self) -> None:
        """From here on, `peak` is the most from here on."""
        self.peak = self.now

    def _forget(self, key: int, ref: weakref.ref[torch.UntypedStorage]) -> None:
        held = self._held.get(key)
        if held is not None and held[0] is ref:
            self.now -= held[1]
            del self._held[key]


@dataclass
class SavedTensors:
    """What autograd kept: distinct storages, by address, with their bytes and the shape that was kept first."""

    storages: dict[int, tuple[int, str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(size for size, _, _ in self.storages.values())


@contextmanager
def saved_tensors(*, besides: Iterable[Tensor] = ()) -> Iterator[SavedTensors]:
    """Count the storages that operations inside the context save for their backward.

    Args:
        besides: tensors that would be there anyway, such as parameters; their storages are not counted.

    The count is right while the graph lives: an address is counted once.
    """
    known = {tensor.untyped_storage()._cdata for tensor in besides}
    found = SavedTensors()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found.storages.setdefault(storage._cdata, (storage.nbytes(), str(tensor.dtype), tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
