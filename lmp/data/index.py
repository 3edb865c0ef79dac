"""Films of one or several shard folders as numbered rows, read by ranges of shots."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmp.data.manifest import (
    Column,
    Manifest,
    Modality,
    ShardEntry,
    columns_of,
    load_index_arrays,
    modalities_from_json,
    read_manifest,
)
from lmp.data.storage import LocalFiles, ShortReadError
from lmp.errors import UserError

_REPAIR = "restore the shard from a copy, or write it again"


@dataclass
class FilmSlice:
    """N consecutive shots of one film.

    Attributes:
        shots_N2: int32 [N, 2] milliseconds.
        features: NAME -> [N, K, D], dtype as stored.
        valid: NAME -> [N] bool.
    """

    shots_N2: torch.Tensor
    features: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]

    @classmethod
    def empty(cls, modalities: dict[str, Modality], rows: int) -> FilmSlice:
        """Uninitialised memory for `rows` shots."""
        tensors = {c.name: torch.empty((rows, *c.row_shape), dtype=c.dtype) for c in columns_of(modalities)}
        return cls(
            shots_N2=tensors["shots"],
            features={name: tensors[name] for name in modalities},
            valid={name: tensors[f"{name}_valid"] for name in modalities},
        )

    def rows(self, start: int, stop: int) -> FilmSlice:
        """Shots [start, stop) as views into the same memory."""
        return FilmSlice(
            shots_N2=self.shots_N2[start:stop],
            features={name: t[start:stop] for name, t in self.features.items()},
            valid={name: t[start:stop] for name, t in self.valid.items()},
        )

    def clear(self) -> None:
        """Set everything to zero and False."""
        for tensor in (self.shots_N2, *self.features.values(), *self.valid.values()):
            tensor.zero_()

    def column(self, name: str) -> torch.Tensor:
        """The tensor of the column NAME, NAME_valid or shots."""
        if name == "shots":
            return self.shots_N2
        return self.features[name] if name in self.features else self.valid[name.removesuffix("_valid")]


class FilmIndex:
    """All films of one or several folders, numbered 0..F-1 in the order of folders, shards, writing.

    Attributes:
        keys: the films' keys, all different.
        shots: int64 [F], shots of each film.
        modalities: NAME -> Modality, the same in every folder.
        digest: names the data: another digest, other data (or another order).
        shard_of: int64 [F], number of the shard of each film, into `shards`.
        shards: paths of the shards.
        manifests: one per folder.
    """

    def __init__(self, folders: Sequence[Path], manifests: list[Manifest]) -> None:
        """Use FilmIndex.load."""
        self.manifests = manifests
        self.modalities = modalities_from_json(manifests[0]["modalities"])
        self.columns = columns_of(self.modalities)
        self.digest = _joint_digest(manifests)
        self.entries: list[ShardEntry] = [s for m in manifests for s in m["shards"]]
        self.shards = [f / s["name"] for f, m in zip(folders, manifests, strict=True) for s in m["shards"]]
        arrays = [
            load_index_arrays(p.with_name(s["index"]), s["index_sha256"])
            for p, s in zip(self.shards, self.entries, strict=True)
        ]
        self.keys: list[str] = [str(k) for a in arrays for k in a["keys"]]
        self.shots: np.ndarray = np.concatenate([a["shots"] for a in arrays])
        self.shard_of: np.ndarray = np.repeat(np.arange(len(arrays)), [len(a["keys"]) for a in arrays])
        self._offset_FC = self._in_column_order(arrays, "offset")
        self._crc32_FC = self._in_column_order(arrays, "crc32")
        self._info_F3 = np.concatenate([a["info"] for a in arrays])
        self._files = LocalFiles()

    @classmethod
    def load(cls, folders: Path | Sequence[Path], *, check_sizes: bool = True) -> FilmIndex:
        """Read the manifests and indexes; no feature is read.

        Args:
            folders: one folder of shards, or several taken together.
            check_sizes: compare every shard's size with its manifest; False is for verify() on damaged data.

        Raises:
            UserError: a folder, manifest, index or shard is missing or damaged; the modalities of two folders
                differ; a key occurs twice.
        """
        listed = [Path(folders)] if isinstance(folders, str | Path) else [Path(f) for f in folders]
        if not listed:
            raise UserError("no folder of film shards is given", remedy="give at least one")
        manifests = [read_manifest(folder) for folder in listed]
        for folder, manifest in zip(listed[1:], manifests[1:], strict=True):
            _check_same(listed[0], manifests[0], folder, manifest)
        index = cls(listed, manifests)
        if check_sizes and (faults := [f for s in range(len(index.shards)) if (f := index._size_fault(s))]):
            raise UserError("; ".join(faults[:5]), remedy=_REPAIR)
        if twice := [key for key, count in Counter(index.keys).items() if count > 1]:
            raise UserError(
                f"film {twice[0]} occurs twice in {', '.join(map(str, listed))}",
                remedy="give every film once",
            )
        return index

    def __len__(self) -> int:
        return len(self.keys)

    def info(self, film: int) -> dict[str, Any]:
        """The film's KEY.json."""
        offset, size, _ = self._info_F3[film].tolist()
        buffer = bytearray(size)
        self._read_range(film, "info", offset, memoryview(buffer))
        try:
            return json.loads(buffer)
        except ValueError as error:
            raise UserError(f"{self._place(film, 'info')} is not JSON", remedy=_REPAIR) from error

    def read(self, film: int, start: int, stop: int) -> FilmSlice:
        """Shots [start, stop) of a film; reads just those rows.

        Raises:
            UserError: the shard is gone or too short; names shard, film and modality.
            ValueError: start and stop are no range of the film's shots.
        """
        out = FilmSlice.empty(self.modalities, stop - start)
        self.read_into(film, start, out)
        return out

    def read_into(self, film: int, start: int, out: FilmSlice) -> None:
        """As `read`, from `start` on into memory that is there already, as many shots as it holds."""
        stop = start + len(out.shots_N2)
        if not 0 <= start < stop <= self.shots[film]:
            raise ValueError(f"film {self.keys[film]} has {self.shots[film]} shots, not [{start}, {stop})")
        for column, offset in zip(self.columns, self._offset_FC[film].tolist(), strict=True):
            buffer = _bytes_of(out.column(column.name))
            self._read_range(film, column.modality, offset + start * column.row_bytes, buffer)

    def verify(self) -> list[str]:
        """Read everything and name every fault: size and sha256 per shard, crc32 per film and tensor, NaN.

        Load with check_sizes=False to have it look at shards that are cut or missing.
        """
        return [fault for shard in range(len(self.shards)) for fault in self._verify_shard(shard)]

    def _verify_shard(self, shard: int) -> Iterator[str]:
        if fault := self._size_fault(shard):
            yield fault
        if not self.shards[shard].is_file():
            return
        if not fault and _sha256_of(self.shards[shard]) != self.entries[shard]["sha256"]:
            yield f"{self.shards[shard]}: sha256 differs from the manifest"
        for film in np.flatnonzero(self.shard_of == shard).tolist():
            yield from self._verify_film(film)

    def _verify_film(self, film: int) -> Iterator[str]:
        offset, size, crc32 = self._info_F3[film].tolist()
        info = bytearray(size)
        if fault := self._checked_read(film, "info", offset, memoryview(info), crc32):
            yield fault
        for number, column in enumerate(self.columns):
            rows = torch.empty((int(self.shots[film]), *column.row_shape), dtype=column.dtype)
            offset, crc32 = int(self._offset_FC[film, number]), int(self._crc32_FC[film, number])
            if fault := self._checked_read(film, column.name, offset, _bytes_of(rows), crc32):
                yield fault
            elif column.dtype.is_floating_point and not torch.isfinite(rows).all():
                yield f"{self._place(film, column.name)}: holds NaN or infinity"

    def _checked_read(self, film: int, what: str, offset: int, buffer: memoryview, crc32: int) -> str | None:
        try:
            self._files.read_into(self.shards[self.shard_of[film]], offset, buffer)
        except (ShortReadError, OSError) as error:
            return f"{self._place(film, what)}: {error}"
        return None if zlib.crc32(buffer) == crc32 else f"{self._place(film, what)}: crc32 differs"

    def _read_range(self, film: int, what: str, offset: int, buffer: memoryview) -> None:
        try:
            self._files.read_into(self.shards[self.shard_of[film]], offset, buffer)
        except (ShortReadError, FileNotFoundError) as error:
            raise UserError(f"{self._place(film, what)}: {error}", remedy=_REPAIR) from error

    def _place(self, film: int, what: str) -> str:
        return f"{self.shards[self.shard_of[film]]}, film {self.keys[film]}, {what}"

    def _size_fault(self, shard: int) -> str | None:
        try:
            size = self.shards[shard].stat().st_size
        except FileNotFoundError:
            return f"{self.shards[shard]} is missing"
        wanted = self.entries[shard]["bytes"]
        return None if size == wanted else f"{self.shards[shard]} has {size} bytes, its manifest says {wanted}"

    def _in_column_order(self, arrays: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
        """[F, C] in the order of self.columns, whatever the order in each shard."""
        parts = []
        for array in arrays:
            place = {str(c): i for i, c in enumerate(array["columns"])}
            parts.append(array[name][:, [place[c.name] for c in self.columns]])
        return np.concatenate(parts)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, flat and writable."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _joint_digest(manifests: list[Manifest]) -> str:
    if len(manifests) == 1:
        return manifests[0]["digest"]
    return hashlib.sha256("\n".join(m["digest"] for m in manifests).encode()).hexdigest()


def _check_same(first: Path, wanted: Manifest, folder: Path, found: Manifest) -> None:
    """Raise UserError with every modality in which two folders differ."""
    names = list(wanted["modalities"] | found["modalities"])
    differing = [n for n in names if wanted["modalities"].get(n) != found["modalities"].get(n)]
    if differing:
        lines = [
            f"{n} is {wanted['modalities'].get(n, 'absent')} in {first} but "
            f"{found['modalities'].get(n, 'absent')} in {folder}"
            for n in differing
        ]
        raise UserError("; ".join(lines), remedy="give folders whose features come from the same encoders")


__all__ = ["Column", "FilmIndex", "FilmSlice", "Modality"]
