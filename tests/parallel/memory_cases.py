"""Memory modes that test_memory.py and its ranks run, and the means to measure them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmp.model.backends import attention_ops
from lmp.parallel.memory_settings import MemorySettings
from lmp.scaling.live_memory import LiveMemory

EXACT = {
    "full": MemorySettings(checkpointing="full"),
    "selective": MemorySettings(checkpointing="selective"),
    "full-offload": MemorySettings(checkpointing="full", offload=True),
    "selective-offload": MemorySettings(checkpointing="selective", offload=True),
}
"""Bit for bit the same as without."""
TILED = {
    "tiled": MemorySettings(tile_mlp=7),
    "tiled-full": MemorySettings(checkpointing="full", tile_mlp=7),
    "tiled-selective-offload": MemorySettings(checkpointing="selective", offload=True, tile_mlp=7),
}
"""The same up to rounding."""
COMPILED = {
    "compiled-full": MemorySettings(compile=True, backend="aot_eager", checkpointing="full"),
    "compiled-selective-offload-tiled": MemorySettings(
        compile=True, backend="aot_eager", checkpointing="selective", offload=True, tile_mlp=7
    ),
}
"""The same up to rounding, by a backend that needs no C++ compiler but builds the graphs that one gets."""


@dataclass(frozen=True)
class Case:
    """A memory mode under a ZeRO stage, on two ranks that share a pack.

    Attributes:
        zero: the stage.
        mode: name of the memory mode.
        host: what ZeRO keeps in host memory.
    """

    zero: int
    mode: str = "none"
    host: tuple[str, ...] = ()

    @property
    def settings(self) -> MemorySettings:
        return {"none": MemorySettings(), **EXACT, **TILED, **COMPILED}[self.mode]

    @property
    def name(self) -> str:
        return "-".join((f"zero{self.zero}", self.mode, *self.host))


REFERENCE = Case(3)
SAME = [Case(3, "full"), Case(3, "selective"), Case(3, "selective-offload")]
NEAR = [
    Case(3, "tiled-selective-offload"),
    Case(2, "tiled-full", host=("offload_optimizer",)),
    Case(1, "compiled-full"),
    Case(0, "tiled"),
    Case(3, host=("offload_optimizer", "offload_param")),
]
"""What the ranks run: the reference, what equals it bit for bit, and what does so up to rounding."""


class CountOperators(TorchDispatchMode):
    """Counts the calls of attention operators, and of all-to-alls, that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._attention = attention_ops()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._attention:
            self.calls["attention"] += 1
        elif func.namespace == "c10d" and "alltoall" in func.overloadpacket.__name__:
            self.calls["all_to_all"] += 1
        return func(*args, **(kwargs or {}))

    def take(self) -> Counter[str]:
        """The calls since the last time."""
        calls, self.calls = self.calls, Counter()
        return calls


def saved_bytes(
    forward: Callable[[], Tensor], *, besides: Iterable[Tensor] = (), elsewhere: Callable[[], int] = lambda: 0
) -> int:
    """Bytes that live on between a forward and its backward, beside the forward's result.

    Live storages are counted rather than what saved-tensor hooks are given, since those see neither what selective
    checkpointing keeps nor what is copied to the host.

    Args:
        forward: what is measured; makes its inputs itself, so that they count if they are kept.
        besides: tensors that are there anyway, such as parameters.
        elsewhere: bytes of the living that are not on the device.
    """
    with LiveMemory() as live:
        for tensor in besides:
            live.count(tensor)
        before = live.now
        out = forward()
        return live.now - before - out.untyped_storage().nbytes() - elsewhere()


def peak_bytes(forward: Callable[[], Tensor]) -> int:
    """The most bytes that live at once in a forward and its backward."""
    with LiveMemory() as live:
        forward().sum().backward()
        return live.peak
