"""What of a run's configuration decides how activations are kept. Pure: imports neither torch nor deepspeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Checkpointing = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class MemorySettings:
    """How the blocks of a model trade memory for work.

    Attributes:
        checkpointing: "none" keeps what autograd keeps; "full" keeps each block's inputs and runs the block again in
            backward; "selective" also keeps the output and log-sum-exp of attention, which is never run twice.
        offload: the kept block inputs wait in host memory.
        tile_mlp: tokens of one tile of each block's MLP, or None for all at once.
        compile: torch.compile each block, attention aside.
        backend: of torch.compile; "inductor" makes kernels, "aot_eager" and "eager" run without a compiler.
    """

    checkpointing: Checkpointing = "none"
    offload: bool = False
    tile_mlp: int | None = None
    compile: bool = False
    backend: str = "inductor"
