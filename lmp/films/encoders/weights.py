"""Reading the weights of an encoder from a local file, without ever running what the file holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmp.errors import UserError

SUFFIXES = (".pt", ".pth", ".safetensors")
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # what trainers put around the weights
_PREFIX = "module."  # left by DataParallel


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pt or .pth file read with `weights_only`, by name.

    Raises:
        UserError: no such file, another format, or more in it than tensors.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"there is no weights file {path}", remedy=f"give a file ({', '.join(SUFFIXES)})")
    try:
        held = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    # A cut file shows as any of RuntimeError, EOFError, UnpicklingError, SafetensorError.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot read the weights {path}: {reason}",
            remedy="give a state_dict saved by torch.save, or a .safetensors file",
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(held.get(wrapper), Mapping):
            held = held[wrapper]
    return {str(name).removeprefix(_PREFIX): torch.as_tensor(tensor) for name, tensor in held.items()}


def fill(module: nn.Module, weights: Mapping[str, Tensor], *, source: Path) -> None:
    """Load weights into a module: every parameter and buffer, and nothing else.

    Raises:
        UserError: missing, further or misshapen tensors; the first of them is named.
    """
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is not one of its tensors" for name in weights if name not in own]
    faults += [
        f"{name} is {list(weights[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if faults:
        more = f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(
            f"the weights {source} do not fit {type(module).__name__}: {faults[0]}{more}",
            remedy="give the published weights of this network",
        )
    module.load_state_dict(dict(weights))


def digest(module: nn.Module, *also: str) -> str:
    """16 hexadecimal digits that change with any weight, and with any text in `also`."""
    sha256 = hashlib.sha256("\0".join(also).encode())
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()[:16]


def _safetensors(path: Path) -> dict[str, Any]:
    import safetensors.torch

    return dict(safetensors.torch.load_file(path))


def _pickled(path: Path) -> dict[str, Any]:
    # Arrays of numpy are data as well; VGGish's published PCA is saved as two of them.
    reconstruct = np.zeros(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, type(np.dtype("float32")), type(np.dtype("float64")), reconstruct]
    # The same function under the name that it had before numpy 2.
    allowed += [(reconstruct, "numpy.core.multiarray._reconstruct")]
    with torch.serialization.safe_globals(allowed):
        held = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(held, Mapping):
        raise TypeError(f"it holds a {type(held).__name__}, not tensors by name")
    return dict(held)
