"""What a folder of shards says about itself: modalities, columns of a film, shard list, digest of all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch

from lmp.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT = "lmp-film-shards"
VERSION = 1

FEATURE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


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
    """A shard as the manifest lists it; `name` and `index` are file names in the manifest's folder."""

    name: str
    bytes: int
    sha256: str
    films: int
    shots: int
    index: str
    index_sha256: str


class Manifest(TypedDict):
    """manifest.json. `cleared` counts, per modality, the shots zeroed for holding NaN or infinity."""

    format: str
    version: int
    modalities: dict[str, dict[str, Any]]
    encoders: dict[str, dict[str, Any]]
    shards: list[ShardEntry]
    films: int
    shots: int
    cleared: dict[str, int]
    digest: str


def columns_of(modalities: Mapping[str, Modality]) -> list[Column]:
    """The tensors of every film record: shots, then NAME and NAME_valid per modality."""
    columns = [Column("shots", "shots", (2,), torch.int32)]
    for m in modalities.values():
        columns.append(Column(m.name, m.name, (m.tokens, m.width), FEATURE_DTYPES[m.dtype]))
        columns.append(Column(f"{m.name}_valid", m.name, (), torch.bool))
    return columns


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


def read_manifest(folder: Path) -> Manifest:
    """Read and check FOLDER/manifest.json.

    Raises:
        UserError: no such folder, no manifest in it, or one that is cut, edited or of another format.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", remedy="give the folder that holds the film shards")
    if not path.is_file():
        raise UserError(f"{folder} holds no {MANIFEST_NAME}", remedy="run `lmp ingest` first")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
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


def load_index_arrays(path: Path, sha256: str) -> dict[str, np.ndarray]:
    """Read the index beside a shard.

    Raises:
        UserError: it is missing, or its bytes are not those that the manifest lists.
    """
    remedy = "restore the index from a copy, or write the shards again"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise UserError(f"index {path} is missing", remedy=remedy) from error
    if found != sha256:
        raise UserError(f"index {path} differs from what its manifest lists", remedy=remedy)
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
