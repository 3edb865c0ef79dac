"""Where the networks run, and that they give the same numbers there each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lmp.errors import UserError


def check_device(device: str) -> None:
    """Whether tensors can be put there.

    Raises:
        UserError: they cannot.
    """
    try:
        torch.zeros(1, device=device)
    # Torch raises AssertionError where it was built without CUDA, RuntimeError for all else.
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"--device {device} cannot be used: {str(error).splitlines()[0]}",
            remedy="give cpu, or a device that this machine and its torch have, such as cuda",
        ) from error


@contextmanager
def exact() -> Iterator[None]:
    """Convolutions on a GPU in whole float32, which are rounded to TF32 else, and by algorithms without races."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
