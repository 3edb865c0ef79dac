"""Writing films into WebDataset shards: KEY.json and KEY.safetensors per film, an index beside each tar.

The same films give the same bytes. Everything is written under a hidden folder and moved into place at the
end, manifest last, so a folder with a manifest is always whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch

from lmp.data.manifest import (
    CHECK,
    MANIFEST_NAME,
    Manifest,
    Modality,
    ShardEntry,
    read_manifest,
)
from lmp.data.publish import STAGING, IndexRows, lock_folder, make_manifest, publish
from lmp.data.record import KEY_PATTERN, FilmRecord, check_film, check_same_modalities, film_json, shot_checks
from lmp.errors import UserError

__all__ = ["FilmRecord", "Manifest", "Modality", "ShardWriter"]

_BLOCK = 512


class ShardWriter:
    """Writes films into FOLDER/PREFIX-NNNNNN.tar; a context manager.

    Leaving it normally publishes the folder; leaving it by an exception removes every trace and, with
    `overwrite`, leaves what was there before untouched. A refused film (UserError) leaves the writer usable.

    Args:
        folder: made if absent.
        encoders: NAME -> what made the features (names, versions); goes into the manifest and every KEY.json.
        films_per_shard: films in a tar; 64 films of 1,200 shots and 4 KiB a shot make about 300 MB.
        prefix: start of the shards' file names.
        overwrite: replace shards that the folder already holds.

    Raises:
        UserError: the folder holds shards already, or another process is writing there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        encoders: dict[str, dict[str, Any]],
        films_per_shard: int = 64,
        prefix: str = "films",
        overwrite: bool = False,
    ) -> None:
        if films_per_shard < 1:
            raise UserError(f"films_per_shard is {films_per_shard}", remedy="give at least 1")
        if not KEY_PATTERN.fullmatch(prefix):
            raise UserError(f"prefix {prefix!r} is no file name", remedy="use letters, digits, _ and - only")
        self._folder = Path(folder)
        self._encoders = encoders
        self._films_per_shard = films_per_shard
        self._prefix = prefix
        self._made_folder = not self._folder.exists()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{self._folder} is not a folder", remedy="give another folder") from error
        if not overwrite and (old := held_files(self._folder, prefix)):
            raise UserError(
                f"{self._folder} already holds {old[0].name}",
                remedy="give an empty folder, or ask for overwriting",
            )
        self._lock: int | None = lock_folder(self._folder)
        self._staging = self._folder / STAGING
        shutil.rmtree(self._staging, ignore_errors=True)  # left by a killed writer: the lock is ours
        self._staging.mkdir()
        self._modalities: dict[str, Modality] = {}
        self._keys: set[str] = set()
        self._cleared: dict[str, int] = {}
        self._shards: list[ShardEntry] = []
        self._shard: _Shard | None = None

    def write(self, film: FilmRecord) -> None:
        """Add one film. A shot with NaN or infinity in a modality is zeroed there, marked invalid, counted.

        Raises:
            UserError: a bad or repeated key, shots out of order, tensors whose shape or dtype does not fit
                the shots or the films before, numbers too large for float16, or info that is not JSON.
        """
        if self._lock is None:
            raise RuntimeError("this ShardWriter is closed")
        tensors, modalities, cleared = check_film(film)
        if film.key in self._keys:
            raise UserError(f"film {film.key} was written before", remedy="give every film its own key")
        if self._modalities:
            check_same_modalities(film.key, modalities, self._modalities)
        elif unknown := sorted(set(self._encoders) - set(modalities)):
            raise UserError(
                f"encoders name {unknown}, but film {film.key} has only {sorted(modalities)}",
                remedy="name the encoders after the modalities",
            )
        info = film_json(film, modalities, self._encoders, cleared)
        tensors[CHECK] = shot_checks(tensors, modalities, zlib.crc32(info))
        try:
            self._append(film.key, len(film.shots_S2), info, tensors, modalities)
        except BaseException:
            self.abort()  # the open tar may be cut: nothing of it can be kept
            raise
        self._modalities = modalities
        self._keys.add(film.key)
        for name, count in cleared.items():
            self._cleared[name] = self._cleared.get(name, 0) + count

    def close(self) -> Manifest:
        """Publish the shards, manifest last, and return the manifest.

        Raises:
            UserError: no film was written.
        """
        if self._lock is None:
            raise RuntimeError("this ShardWriter is closed")
        try:
            self._finish_shard()
            if not self._shards:
                raise UserError(f"no film was written into {self._folder}", remedy="give at least one film")
            manifest = make_manifest(self._modalities, self._shards, encoders=self._encoders, cleared=self._cleared)
            publish(
                self._folder,
                self._lock,
                names=[name for s in self._shards for name in (s["name"], s["index"])],
                old=held_files(self._folder, self._prefix),
                manifest=manifest,
            )
        except BaseException:
            self.abort()
            raise
        self._release()
        return manifest

    def abort(self) -> None:
        """Remove everything that was not published."""
        if self._lock is None:
            return
        if self._shard is not None:
            self._shard.discard()
            self._shard = None
        self._release()
        if self._made_folder:
            with suppress(OSError):
                self._folder.rmdir()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._lock is not None:
            self.close()

    def _append(
        self,
        key: str,
        shots: int,
        info: bytes,
        tensors: dict[str, torch.Tensor],
        modalities: dict[str, Modality],
    ) -> None:
        if self._shard is None:
            name = f"{self._prefix}-{len(self._shards):06d}.tar"
            self._shard = _Shard(self._staging / name, modalities)
        self._shard.append(key, shots, info, tensors)
        if len(self._shard.rows.keys) == self._films_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.finish())
            self._shard = None

    def _release(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class _Shard:
    """One tar being written, and the rows of its index."""

    def __init__(self, path: Path, modalities: dict[str, Modality]) -> None:
        self.path = path
        self.rows = IndexRows(modalities)
        self._file = path.open("xb")
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def append(self, key: str, shots: int, info: bytes, tensors: dict[str, torch.Tensor]) -> None:
        """Add KEY.json and KEY.safetensors and note where every column's row 0 lies."""
        blob = safetensors.torch.save(tensors)
        info_offset = self._member(f"{key}.json", info)
        start = self._member(f"{key}.safetensors", blob)
        header_bytes = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + header_bytes])
        spans = [header[c.name]["data_offsets"] for c in self.rows.columns]
        view = memoryview(blob)[8 + header_bytes :]
        self.rows.add(
            key,
            shots=shots,
            offsets=[start + 8 + header_bytes + lo for lo, _ in spans],
            crc32=[zlib.crc32(view[lo:hi]) for lo, hi in spans],
            info=(info_offset, len(info), zlib.crc32(info)),
        )

    def finish(self) -> ShardEntry:
        """Close the tar, write its index, return its line of the manifest."""
        self._put(bytes(2 * _BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self.rows.write(self.path.parent, self.path.name, size=self._bytes, sha256=self._sha256.hexdigest())

    def discard(self) -> None:
        self._file.close()

    def _member(self, name: str, data: bytes) -> int:
        """Append one tar member; returns where its data starts."""
        header = tarfile.TarInfo(name)  # mtime, uid and gid are 0 by default
        header.size = len(data)
        self._put(header.tobuf(tarfile.USTAR_FORMAT))
        start = self._bytes
        self._put(data)
        self._put(bytes(-len(data) % _BLOCK))
        return start

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)


def held_files(folder: Path, prefix: str) -> list[Path]:
    """The manifest, what it lists, and whatever bears the names that a writer with `prefix` would use."""
    names = {p.name for p in folder.iterdir() if re.fullmatch(rf"{prefix}-\d{{6}}\.(tar|idx\.npz)", p.name)}
    if (folder / MANIFEST_NAME).exists():
        names.add(MANIFEST_NAME)
        with suppress(UserError):  # a damaged manifest lists nothing that could be trusted
            names |= {n for s in read_manifest(folder)["shards"] for n in (s["name"], s["index"])}
    return sorted((folder / n for n in names), key=lambda p: (p.name != MANIFEST_NAME, p.name))
