"""What lies beside the tars: index files and manifest, made in one way and put in place whole, manifest last."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmp.data.manifest import (
    FORMAT,
    MANIFEST_NAME,
    VERSION,
    Column,
    Manifest,
    Modality,
    ShardEntry,
    columns_of,
    manifest_bytes,
    manifest_digest,
    modalities_to_json,
)
from lmp.errors import UserError

STAGING = ".lmp-writing"
"""Hidden folder in which everything is written before it is moved into place."""


class IndexRows:
    """The index of one shard as it grows, a row per film.

    Attributes:
        columns: the tensors of a film, in the order of `offsets` and `crc32`.
        keys: of the films so far.
    """

    def __init__(self, modalities: Mapping[str, Modality]) -> None:
        self.columns: list[Column] = columns_of(modalities)
        self.keys: list[str] = []
        self._modalities = modalities
        self._shots: list[int] = []
        self._offsets: list[list[int]] = []
        self._crc32: list[list[int]] = []
        self._info: list[tuple[int, int, int]] = []

    def add(
        self,
        key: str,
        *,
        shots: int,
        offsets: list[int],
        crc32: list[int] | None,
        info: tuple[int, int, int],
    ) -> None:
        """Add a film.

        Args:
            key: the film's key.
            shots: how many it has.
            offsets: of row 0 of each column, from the start of the tar; -1 where the film has no such column.
            crc32: of the bytes of each column; None if they were not read, then for every film.
            info: (offset, bytes, crc32) of KEY.json.
        """
        self.keys.append(key)
        self._shots.append(shots)
        self._offsets.append(offsets)
        if crc32 is not None:
            self._crc32.append(crc32)
        self._info.append(info)

    def write(self, folder: Path, shard: str, *, size: int, sha256: str | None) -> ShardEntry:
        """Write the index into `folder`, synced, and return the shard's line of the manifest.

        Args:
            folder: must not hold this index yet.
            shard: file name of the tar.
            size: bytes of the tar.
            sha256: of the tar, None if it was not read.
        """
        arrays: dict[str, Any] = {
            "keys": np.array(self.keys),
            "shots": np.array(self._shots, dtype=np.int64),
            "modalities": np.array(json.dumps(modalities_to_json(self._modalities))),
            "columns": np.array([c.name for c in self.columns]),
            "offset": np.array(self._offsets, dtype=np.int64),  # [film, column], from the start of the tar
        }
        if self._crc32:
            arrays["crc32"] = np.array(self._crc32, dtype=np.uint32)  # [film, column]
        arrays["info"] = np.array(self._info, dtype=np.int64)  # [film, (offset, bytes, crc32)] of KEY.json
        path = (folder / shard).with_suffix(".idx.npz")
        with path.open("xb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        return {
            "name": shard,
            "bytes": size,
            "sha256": sha256,
            "films": len(self.keys),
            "shots": sum(self._shots),
            "index": path.name,
            "index_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }


def make_manifest(
    modalities: Mapping[str, Modality],
    shards: list[ShardEntry],
    *,
    encoders: dict[str, dict[str, Any]],
    cleared: Mapping[str, int],
    quarantined: Mapping[str, str] | None = None,
) -> Manifest:
    """The manifest of these shards, with its digest."""
    manifest: Manifest = {
        "format": FORMAT,
        "version": VERSION,
        "modalities": modalities_to_json(modalities),
        "encoders": encoders,
        "shards": shards,
        "films": sum(s["films"] for s in shards),
        "shots": sum(s["shots"] for s in shards),
        "cleared": {name: cleared.get(name, 0) for name in modalities},
        "quarantined": dict(quarantined or {}),
        "digest": "",
    }
    manifest["digest"] = manifest_digest(manifest)
    return manifest


def publish(folder: Path, lock: int, *, names: Iterable[str], old: Iterable[Path], manifest: Manifest) -> None:
    """Move staged files into place, and then the manifest.

    Args:
        folder: where to.
        lock: of lock_folder.
        names: files in FOLDER/STAGING, each complete and synced.
        old: files that go.
        manifest: is written here.
    """
    staging = folder / STAGING
    # Until the last rename the folder has no manifest: a reader sees no data rather than a mixture.
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    os.fsync(lock)
    for path in old:
        path.unlink(missing_ok=True)
    for name in names:
        (staging / name).replace(folder / name)
    os.fsync(lock)
    staged = staging / MANIFEST_NAME
    with staged.open("xb") as file:
        file.write(manifest_bytes(manifest))
        file.flush()
        os.fsync(file.fileno())
    staged.replace(folder / MANIFEST_NAME)
    os.fsync(lock)


def lock_folder(folder: Path) -> int:
    """A descriptor of the folder that keeps other writers out until it is closed.

    Raises:
        UserError: another process is writing there.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"another process is writing into {folder}", remedy="wait for it, or give another folder"
        ) from error
    except OSError:
        pass  # a file system without locks: exclusive creation of each shard still stops a second writer
    return descriptor
