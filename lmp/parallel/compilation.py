"""torch.compile per block, with attention left out of the graphs.

What is compiled sees tensors and constants only: the segments, which change from pack to pack, stay outside with the
attention call, so a new pack never means a new compilation.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmp.errors import UserError
from lmp.model.attention import Attend, Segments
from lmp.parallel.memory_settings import MemorySettings

QUERIES, KEYS = 0, 1
"""What stands for the segments inside compiled code."""


class CompiledForward:
    """Compiled `forward` of a block; the same arguments and values up to rounding."""

    def __init__(self, forward: Callable[..., Tensor], *, backend: str) -> None:
        # Dynamic from the first: were the first length taken for a constant, a block that is run again for its
        # backward could meet another graph than in forward, which keeps other tensors. The widths are constants all
        # the same, since the weights have them.
        self._compiled = torch.compile(forward, backend=backend, dynamic=True)

    def __call__(self, *arguments: Any) -> Tensor:
        *inputs, segments, rotary, attend = arguments
        pair = isinstance(segments, tuple)
        known = segments if pair else (segments, segments)
        stand_in = (QUERIES, KEYS) if pair else QUERIES
        return self._compiled(*inputs, stand_in, rotary, _Outside(attend, known))  # type: ignore[no-any-return]


class _Outside:
    """The attention call as compiled code sees it: opaque."""

    def __init__(self, attend: Attend, segments: tuple[Segments, Segments]) -> None:
        self.attend, self.segments = attend, segments

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def __call__(self, q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, *, q_segments: int, k_segments: int) -> Tensor:
        return self.attend(
            q_THC, k_THC, v_THC, q_segments=self.segments[q_segments], k_segments=self.segments[k_segments]
        )


def check_compiler(settings: MemorySettings, *, cuda: bool) -> None:
    """Find out before the first step whether kernels can be made.

    Args:
        settings: with `compile`.
        cuda: whether they are for a GPU.

    Raises:
        UserError: this machine lacks a compiler, the headers of Python, or Triton.
    """
    if settings.backend != "inductor":
        return
    names = ("CC", "gcc", "clang", "cc") if cuda else ("CXX", "g++", "clang++", "c++")
    language = "C" if cuda else "C++"
    if not any(shutil.which(os.environ.get(names[0]) or name) for name in names[1:]):
        raise UserError(
            f"train.compile: there is no {language} compiler on this machine, which torch.compile needs",
            remedy=f"install {names[1]}, name one in {names[0]}, or set train.compile=false",
        )
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").is_file():
        raise UserError(
            f"train.compile: {include} lacks Python.h, which torch.compile needs",
            remedy="install the development package of this Python, or set train.compile=false",
        )
    if cuda and not _has_triton():
        raise UserError(
            "train.compile: torch.compile needs the package triton on a GPU",
            remedy="install triton, or set train.compile=false",
        )


def _has_triton() -> bool:
    from torch.utils._triton import has_triton_package

    return bool(has_triton_package())
