"""Arrays in the files of others (npy, npz, safetensors, pt, h5) as tensors, and in the dtypes that shards store."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

from lmp.data.manifest import FEATURE_DTYPES
from lmp.data.record import not_finite
from lmp.errors import UserError

KINDS = ("npy", "npz", "safetensors", "pt", "pth")
H5_KINDS = ("h5", "hdf5")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_array(file: BinaryIO, kind: str, *, modality: str, tensor: str | None = None, where: str) -> torch.Tensor:
    """The features in a file; no pickled code is run.

    Args:
        file: open, from its start.
        kind: one of KINDS.
        modality: of several arrays, the one of this name is taken.
        tensor: take the array of this name.
        where: names the file in messages.

    Raises:
        UserError: the file cannot be read, holds no such array or more than one, or no floats.
    """
    try:
        found = _decode(file, kind, modality, tensor, where)
    except UserError:
        raise
    except Exception as error:  # damaged files raise whatever their reader stumbles over
        raise UserError(f"{where}: cannot be read as {kind}: {_told(error)}", remedy="write the file again") from error
    return _floats(found, where)


def read_h5(group: Any, *, modality: str, where: str) -> torch.Tensor:
    """The features in an h5py data set; of a file or group, in its one data set or the one named after the modality.

    Raises:
        UserError: as read_array.
    """
    import h5py

    if not isinstance(group, h5py.Dataset):
        sets: list[str] = []
        group.visititems(lambda name, item: sets.append(name) if isinstance(item, h5py.Dataset) else None)
        group = group[_pick(sets, modality, None, where)]
    try:
        found = group[()]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{where}: cannot be read: {_told(error)}", remedy="write the file again") from error
    return _floats(found, where)


def open_h5(path: Path) -> Any:
    """An h5py file, for reading.

    Raises:
        UserError: h5py is not installed, or the file is no HDF5.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path}: h5py is not installed", remedy="pip install 'lmp[import]'") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} cannot be read as HDF5: {_told(error)}", remedy="give a whole HDF5 file") from error


def to_stored(rows_SKD: torch.Tensor, dtype: torch.dtype | None, where: str) -> torch.Tensor:
    """Features in the dtype to store.

    Args:
        rows_SKD: floats.
        dtype: float16 or bfloat16; None keeps these two and makes float16 of wider ones.
        where: names the features in messages.

    Raises:
        UserError: a finite number does not fit.
    """
    if dtype is None:
        dtype = rows_SKD.dtype if rows_SKD.dtype in FEATURE_DTYPES.values() else torch.float16
    stored_SKD = rows_SKD.to(dtype)
    lost_S = ~not_finite(rows_SKD) & not_finite(stored_SKD)
    if lost_S.any():
        largest = float(rows_SKD[lost_S].abs().max())
        narrow = dtype == torch.float16 and largest < torch.finfo(torch.bfloat16).max
        raise UserError(
            f"{where}: {largest:.6g} is too large for {str(dtype).removeprefix('torch.')}",
            remedy="store it with --dtype bfloat16" if narrow else "scale the features down",
        )
    return stored_SKD


def _decode(file: BinaryIO, kind: str, modality: str, tensor: str | None, where: str) -> Any:
    if kind == "npy":
        if tensor is not None:
            raise UserError(f"{where}: an npy holds one array without a name", remedy=f"leave out :{tensor}")
        return np.lib.format.read_array(file, allow_pickle=False)
    if kind == "npz":
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[_pick(arrays.files, modality, tensor, where)]
    if kind == "safetensors":
        tensors = safetensors.torch.load(file.read())
        return tensors[_pick(tensors, modality, tensor, where)]
    found = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(found, dict):
        return found[_pick([k for k in found if isinstance(found[k], torch.Tensor)], modality, tensor, where)]
    if tensor is not None:
        raise UserError(f"{where}: holds no dict of tensors", remedy=f"leave out :{tensor}")
    return found


def _pick(names: Iterable[str], modality: str, tensor: str | None, where: str) -> str:
    names = list(names)
    if tensor is not None and tensor not in names:
        raise UserError(f"{where}: holds {_listed(names)}, not {tensor}", remedy="name one that is there")
    wanted = tensor if tensor is not None else modality
    if wanted in names:
        return wanted
    if len(names) != 1:
        raise UserError(
            f"{where}: holds {_listed(names)}: which are the features?",
            remedy=f"keep one array, or name it {modality}",
        )
    return names[0]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(map(str, names[:5])) or "no array") + more


def _floats(found: Any, where: str) -> torch.Tensor:
    if isinstance(found, np.ndarray | np.generic):
        array = np.asarray(found)
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise UserError(f"{where}: holds {array.dtype}", remedy="give float16, float32 or float64")
        # In this machine's byte order, and in memory of its own.
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    if not isinstance(found, torch.Tensor):
        raise UserError(f"{where}: holds a {type(found).__name__}", remedy="give a tensor, or a dict of tensors")
    if found.dtype not in _FLOATS or found.layout != torch.strided:
        raise UserError(
            f"{where}: holds {found.dtype}, {found.layout}", remedy="give dense float16, bfloat16, float32 or float64"
        )
    return found.detach()


def _told(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
