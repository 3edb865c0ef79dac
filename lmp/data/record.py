"""A film's record before it is written: what it holds, and every check that it must pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lmp.data.manifest import CHECK, FEATURE_DTYPES, Modality, film_salts, modalities_to_json, row_checks
from lmp.errors import UserError

# No dot, for webdataset cuts keys there; at most 80, so that KEY.safetensors fits a ustar header.
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")
NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
WRITER_FIELDS = ("key", "shots", "modalities", "encoders", "cleared")
"""What the writer of shards puts into KEY.json itself."""
_EXPONENTS = {
    torch.float16: (torch.int16, np.int16(0x7C00)),
    torch.bfloat16: (torch.int16, np.int16(0x7F80)),
    torch.float32: (torch.int32, np.int32(0x7F800000)),
    torch.float64: (torch.int64, np.int64(0x7FF0000000000000)),
}


@dataclass
class FilmRecord:
    """One film, ready to be written.

    Attributes:
        key: name of the film, [A-Za-z0-9_-]+, at most 80 characters.
        info: title, duration_s, fps, source, split, ...; must survive JSON.
        shots_S2: int32 [S, 2], start and end of each shot in milliseconds, [start, end), in order of time.
        features: NAME -> [S, K, D], float16 or bfloat16; float32 is stored as float16.
        valid: NAME -> [S] bool, False where the shot has nothing in this modality.
        cleared: NAME -> shots that had been zeroed for NaN or infinity already when the film was read.
    """

    key: str
    info: dict[str, Any]
    shots_S2: np.ndarray
    features: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]
    cleared: dict[str, int] = field(default_factory=dict)


def check_film(
    film: FilmRecord,
) -> tuple[dict[str, torch.Tensor], dict[str, Modality], dict[str, int]]:
    """The tensors to store but their checksums, their modalities, and how many shots of each were cleared."""
    if not KEY_PATTERN.fullmatch(film.key):
        raise UserError(
            f"film key {film.key!r} cannot name a sample",
            remedy="use letters, digits, _ and - only, at most 80 of them",
        )
    tensors = {"shots": check_shots(film.key, film.shots_S2)}
    if not film.features:
        raise UserError(f"film {film.key} has no modality", remedy="give features of at least one")
    if set(film.features) != set(film.valid):
        raise UserError(
            f"film {film.key} has features {sorted(film.features)} but valid {sorted(film.valid)}",
            remedy="give one `valid` tensor per modality",
        )
    modalities: dict[str, Modality] = {}
    cleared: dict[str, int] = {}
    for name in film.features:
        if not NAME_PATTERN.fullmatch(name) or name in ("shots", CHECK) or name.endswith("_valid"):
            raise UserError(
                f"film {film.key}: {name!r} cannot name a modality",
                remedy="use a letter, then letters, digits and _; not `shots` or `check`, not ending in `_valid`",
            )
        features_SKD, valid_S, bad = _checked_modality(film, name)
        cleared[name] = film.cleared.get(name, 0) + bad
        tensors[name], tensors[f"{name}_valid"] = features_SKD, valid_S
        dtype = str(features_SKD.dtype).removeprefix("torch.")
        modalities[name] = Modality(name, features_SKD.shape[1], features_SKD.shape[2], dtype)
    return tensors, modalities, cleared


def shot_checks(tensors: dict[str, torch.Tensor], names: Iterable[str], info_crc32: int) -> torch.Tensor:
    """[S, 1 + M] int64, see manifest.CHECK.

    Args:
        tensors: of a film, by column.
        names: its modalities.
        info_crc32: of its KEY.json.
    """
    salt = film_salts(info_crc32)
    columns = [row_checks(tensors["shots"].numpy(), salt=salt)]
    for name in sorted(names):
        rows = tensors[name].flatten(1).view(torch.uint8).numpy()
        columns.append(row_checks(rows, tensors[f"{name}_valid"].view(torch.uint8).numpy(), salt=salt))
    return torch.from_numpy(np.stack(columns, axis=1))


def check_shots(key: str, shots_S2: np.ndarray) -> torch.Tensor:
    """The shots as a tensor of their own.

    Raises:
        UserError: they are not int32 [S, 2], none, empty, before 0 or not in order of time.
    """
    if shots_S2.ndim != 2 or shots_S2.shape[1] != 2 or len(shots_S2) == 0 or shots_S2.dtype != np.int32:
        raise UserError(
            f"film {key}: shots are {shots_S2.dtype} {list(shots_S2.shape)}",
            remedy="give int32 [S, 2] milliseconds, S >= 1",
        )
    bad = (shots_S2[:, 0] < 0) | (shots_S2[:, 1] <= shots_S2[:, 0])
    bad[1:] |= shots_S2[1:, 0] < shots_S2[:-1, 0]
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"film {key}: shot {row} spans {shots_S2[row].tolist()} ms",
            remedy="give shots in order of time, each ending after its start, none before 0",
        )
    return torch.from_numpy(np.array(shots_S2, order="C"))


def not_finite(features_SKD: torch.Tensor) -> torch.Tensor:
    """bool [S], the shots with NaN or infinity, whose exponents have all bits set. Far faster than torch.isfinite.

    Args:
        features_SKD: of any floating dtype, on the CPU.
    """
    integers, exponent = _EXPONENTS[features_SKD.dtype]
    bits_SB = features_SKD.contiguous().view(integers).flatten(1).numpy()
    return torch.from_numpy((bits_SB & exponent).max(axis=1) == exponent)


def _checked_modality(film: FilmRecord, name: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Features in their stored dtype, valid bits, number of shots cleared."""
    features_SKD, valid_S = film.features[name].detach().cpu(), film.valid[name].detach().cpu()
    shots = len(film.shots_S2)
    where = f"film {film.key}, modality {name}"
    if features_SKD.ndim != 3 or len(features_SKD) != shots or 0 in features_SKD.shape:
        raise UserError(
            f"{where}: features have shape {list(features_SKD.shape)}",
            remedy=f"give [S, K, D] with S = {shots} shots",
        )
    if valid_S.dtype != torch.bool or valid_S.shape != (shots,):
        raise UserError(f"{where}: valid is {valid_S.dtype} {list(valid_S.shape)}", remedy=f"give bool [{shots}]")
    if features_SKD.dtype not in (torch.float32, *FEATURE_DTYPES.values()):
        raise UserError(f"{where}: features are {features_SKD.dtype}", remedy="give float16, bfloat16 or float32")
    bad_S = not_finite(features_SKD)
    features_SKD = features_SKD.masked_fill(bad_S[:, None, None], 0)
    if features_SKD.dtype == torch.float32:
        largest = features_SKD.abs().max()
        features_SKD = features_SKD.to(torch.float16)
        if not_finite(features_SKD).any():
            raise UserError(
                f"{where}: {largest:.6g} is too large for float16",
                remedy="convert it to bfloat16 first",
            )
    return features_SKD.contiguous(), (valid_S & ~bad_S).contiguous(), int(bad_S.sum())


def check_same_modalities(key: str, found: dict[str, Modality], wanted: dict[str, Modality]) -> None:
    if found == wanted:
        return
    for name in sorted(set(found) | set(wanted)):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"film {key}, modality {name}: {_describe(found.get(name))}, "
                f"but the films before have {_describe(wanted.get(name))}",
                remedy="give all films of a folder the same modalities; mark missing shots by `valid`",
            )


def _describe(modality: Modality | None) -> str:
    if modality is None:
        return "nothing"
    return f"{modality.dtype} [S, {modality.tokens}, {modality.width}]"


def film_json(
    film: FilmRecord,
    modalities: dict[str, Modality],
    encoders: dict[str, dict[str, Any]],
    cleared: dict[str, int],
) -> bytes:
    """KEY.json: the film's own facts beside what the writer knows of it."""
    own = {
        "key": film.key,
        "cleared": cleared,
        "shots": len(film.shots_S2),
        "modalities": modalities_to_json(modalities),
        "encoders": encoders,
    }
    for name, value in own.items():
        if name in film.info and film.info[name] != value:
            raise UserError(
                f"film {film.key}: info[{name!r}] is {film.info[name]!r}, the writer puts {value!r}",
                remedy=f"leave {name!r} out of info",
            )
    try:
        return json.dumps(film.info | own, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"info of film {film.key} is not JSON: {error}",
            remedy="use text, numbers, lists and dicts",
        ) from error
