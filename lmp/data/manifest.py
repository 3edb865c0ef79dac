"""What a folder of shards says about itself: modalities, columns of a film, shard list, digest of all."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch

from lmp.data.storage import files_at, join, normal
from lmp.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT = "lmp-film-shards"
VERSION = 2

CHECK = "check"
"""Name of the tensor [S, 1 + M] int64 of checksums per shot: of its times, then of each modality by sorted name."""

FEATURE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SAFETENSORS_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
"""How a safetensors header calls the dtypes of a film's columns."""


@dataclass(frozen=True)
class Modality:
    """One named stream of features: `tokens` vectors of `width` numbers per shot, stored as `dtype`."""

    name: str
    tokens: int
    width: int
    dtype: str


@dataclass(frozen=True)
class Column:
    """One tensor of a film record: a row per shot, each of `row_shape` and `dtype`."""

    name: str
    modality: str
    row_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize


class ShardEntry(TypedDict):
    """A shard as the manifest lists it; `name` and `index` are file names in the manifest's folder.

    `films` and `shots` count what the tar holds, quarantined films too. `sha256` is None where an index was built
    from headers alone.
    """

    name: str
    bytes: int
    sha256: str | None
    films: int
    shots: int
    index: str
    index_sha256: str


class Manifest(TypedDict):
    """manifest.json.

    `cleared` counts, per modality, the shots zeroed for holding NaN or infinity. `quarantined` gives the reason for
    each film, by key, that lies in the shards but is not to be read.
    """

    format: str
    version: int
    modalities: dict[str, dict[str, Any]]
    encoders: dict[str, dict[str, Any]]
    shards: list[ShardEntry]
    films: int
    shots: int
    cleared: dict[str, int]
    quarantined: dict[str, str]
    digest: str


def columns_of(modalities: Mapping[str, Modality]) -> list[Column]:
    """The tensors of every film record: check, shots, NAME_valid and NAME per modality; features come last."""
    return [
        Column(CHECK, CHECK, (1 + len(modalities),), torch.int64),
        Column("shots", "shots", (2,), torch.int32),
        *(Column(f"{m.name}_valid", m.name, (), torch.bool) for m in modalities.values()),
        *(Column(m.name, m.name, (m.tokens, m.width), FEATURE_DTYPES[m.dtype]) for m in modalities.values()),
    ]


_FILM = 0x94D049BB133111EB
_NEVER_ZERO = np.uint64(0x9E3779B97F4A7C15)
_VALID = np.uint64(0xBF58476D1CE4E5B9)


def film_salts(info_crc32: Any) -> np.ndarray:
    """What is added to all checksums of a film, from the crc32 of its KEY.json, or of several films: uint64 [F].

    So a shard that was replaced by one of other films, or of other encoders, does not pass for what the index lists.
    """
    return np.multiply(np.atleast_1d(info_crc32).astype(np.uint64), np.uint64(_FILM), dtype=np.uint64)


def row_checks(
    rows: np.ndarray, valid_N: np.ndarray | None = None, *, salt: np.ndarray | np.uint64 | None = None
) -> np.ndarray:
    """The checksum of each shot's bytes: their sum as words, so that any single changed word is seen.

    A word is the longest of 8, 4, 2 and 1 bytes that divides a row. What is added beside keeps rows of zeros from
    having the checksum zero, and covers the valid bit and the film.

    Args:
        rows: [N, ...] contiguous, of any dtype.
        valid_N: uint8 or bool [N].
        salt: the film's, or [N] each row's, see film_salts.

    Returns:
        int64 [N]; the sum modulo 2^64.
    """
    bytes_NB = rows.reshape(len(rows), -1).view(np.uint8)
    word = next(w for w in (8, 4, 2, 1) if bytes_NB.shape[1] % w == 0)
    sum_N = np.add.reduce(bytes_NB.view(f"<u{word}"), axis=1, dtype=np.uint64)
    sum_N += _NEVER_ZERO
    if valid_N is not None:
        sum_N += np.multiply(valid_N.view(np.uint8), _VALID, dtype=np.uint64)
    if salt is not None:
        sum_N += salt
    return sum_N.view(np.int64)


def modalities_to_json(modalities: Mapping[str, Modality]) -> dict[str, dict[str, Any]]:
    """NAME -> {tokens, width, dtype}, in the order of `modalities`."""
    return {m.name: {k: v for k, v in asdict(m).items() if k != "name"} for m in modalities.values()}


def modalities_from_json(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Modality]:
    """The inverse of modalities_to_json."""
    return {name: Modality(name=name, **entry) for name, entry in entries.items()}


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 over everything in the manifest but the digest itself, whatever the order of its keys."""
    body = {k: v for k, v in manifest.items() if k != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check FOLDER/manifest.json; the folder may be a URL.

    Raises:
        UserError: no manifest there, or one that is cut, edited or of another format.
    """
    folder = normal(folder)
    path = join(folder, MANIFEST_NAME)
    (data,) = files_at(folder).contents([path])
    if data is None:
        raise UserError(
            f"{folder} holds no {MANIFEST_NAME}",
            remedy="give a folder of film shards: `lmp ingest` writes one, `lmp data index` makes one of other tars",
        )
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {error}", remedy="restore it from a copy") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not a manifest of film shards", remedy="give a folder written by lmp")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path} has version {manifest.get('version')}, this lmp reads version {VERSION}",
            remedy="use the lmp that wrote it, or write the shards again",
        )
    if manifest.get("digest") != manifest_digest(manifest):
        raise UserError(f"{path} does not match its own digest", remedy="restore it from a copy")
    return cast(Manifest, manifest)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The file's content."""
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def load_indexes(folder: str, shards: list[ShardEntry]) -> list[dict[str, np.ndarray]]:
    """Read the indexes beside the shards of a folder.

    Raises:
        UserError: one is missing, or its bytes are not those that the manifest lists.
    """
    remedy = "restore the index from a copy, or write the shards again"
    paths = [join(folder, s["index"]) for s in shards]
    arrays = []
    for path, shard, data in zip(paths, shards, files_at(folder).contents(paths), strict=True):
        if data is None:
            raise UserError(f"index {path} is missing", remedy=remedy)
        if hashlib.sha256(data).hexdigest() != shard["index_sha256"]:
            raise UserError(f"index {path} differs from what its manifest lists", remedy=remedy)
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            arrays.append(dict(found))
    return arrays
