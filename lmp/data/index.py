"""Films of one or several shard folders as numbered rows, read by ranges of shots."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmp.data.cache import CachedFiles, ShardCache, cached_shard
from lmp.data.film_slice import FilmSlice, Part, sized_columns
from lmp.data.leave_out import LeaveOut
from lmp.data.manifest import (
    CHECK,
    Column,
    Manifest,
    Modality,
    ShardEntry,
    film_salts,
    load_indexes,
    modalities_from_json,
    read_manifest,
    row_checks,
)
from lmp.data.storage import Files, LocalFiles, Range, ReadError, files_at, is_url, join, normal
from lmp.errors import UserError

REPAIR = "restore the shard from a copy, write it again, or take the film out with `lmp data quarantine`"
_INFOS = 4096  # records read at a time
_TOGETHER = 4 << 20  # bytes read before they are checked, which they are while the processor's cache holds them


class FilmIndex:
    """All films of one or several folders, numbered 0..F-1 in the order of folders, shards, writing.

    Quarantined films are not among them. Reading is safe from many threads.

    Attributes:
        keys: the films' keys, all different.
        shots: int64 [F], shots of each film.
        modalities: NAME -> Modality, the same in every folder.
        columns: the tensors of a film.
        digest: names the data: another digest, other data (or another order).
        shard_of: int64 [F], number of the shard of each film, into `shards`.
        folder_of: int64 [F], number of the folder of each film.
        shards: locations of the shards.
        entries: the shards' lines in their manifests.
        folders: locations of the folders.
        manifests: one per folder.
        left_out: what `leave_out` dropped: files, ids, digest of the ids, films, shots; None without such a list.
    """

    def __init__(self, folders: list[str], manifests: list[Manifest], cache: ShardCache | None = None) -> None:
        """Use FilmIndex.load."""
        self.folders, self.manifests = folders, manifests
        self.left_out: dict[str, Any] | None = None
        self.modalities = modalities_from_json(manifests[0]["modalities"])
        self._sized = sized_columns(tuple(self.modalities.values()))
        self.columns = [column for column, _ in self._sized]
        self._row_bytes = sum(size for _, size in self._sized)
        self.digest = _joint_digest(manifests)
        self.entries: list[ShardEntry] = [s for m in manifests for s in m["shards"]]
        self.shards = [join(f, s["name"]) for f, m in zip(folders, manifests, strict=True) for s in m["shards"]]
        arrays = [a for f, m in zip(folders, manifests, strict=True) for a in load_indexes(f, m["shards"])]
        lengths = [len(a["keys"]) for a in arrays]
        folder_of_shard = np.repeat(np.arange(len(folders)), [len(m["shards"]) for m in manifests])
        keys = np.array([str(k) for a in arrays for k in a["keys"]], dtype=object)
        # Of its own folder only: another may hold the film whole.
        out = {(number, key) for number, m in enumerate(manifests) for key in m["quarantined"]}
        kept = np.ones(len(keys), dtype=bool)
        if out:
            folder_of_film = np.repeat(folder_of_shard, lengths).tolist()
            kept[:] = [film not in out for film in zip(folder_of_film, keys, strict=True)]
        self.keys: list[str] = keys[kept].tolist()
        self.shots: np.ndarray = np.concatenate([a["shots"] for a in arrays])[kept]
        self.shard_of: np.ndarray = np.repeat(np.arange(len(arrays)), lengths)[kept]
        self.folder_of: np.ndarray = folder_of_shard[self.shard_of]
        self._offset_FC = self._in_column_order(arrays, "offset")[kept]
        self._crc32_FC = self._in_column_order(arrays, "crc32")[kept]
        self._info_F3 = np.concatenate([a["info"] for a in arrays])[kept]
        self._salt_F = film_salts(self._info_F3[:, 2])
        # Local files are opened by each index on its own: a folder may have been written anew since the last one.
        local = LocalFiles()
        by_folder = [files_at(f) if is_url(f) else local for f in folders]
        self._files: list[Files] = [by_folder[n] for n in folder_of_shard.tolist()]
        self._cached: CachedFiles | None = None
        if cache:
            listed = zip(self.shards, self._files, self.entries, strict=True)
            self._cached = CachedFiles(cache, {path: cached_shard(path, f, entry) for path, f, entry in listed})
            self._files = [self._cached] * len(self.shards)
        self._check_column = {name: n for n, name in enumerate(["shots", *sorted(self.modalities)])}
        self._summed = [column for column in self.columns if column.name in self._check_column]

    @classmethod
    def load(
        cls,
        folders: Path | str | Sequence[Path | str],
        *,
        check_sizes: bool = True,
        cache: ShardCache | None = None,
        leave_out: LeaveOut | None = None,
    ) -> FilmIndex:
        """Read the manifests and indexes; no feature is read.

        Args:
            folders: one folder of shards (a path or URL), or several taken together.
            check_sizes: compare every shard's size with its manifest; False is for verify() on damaged data.
            cache: read shards through copies of them on a disk of this node.
            leave_out: films that are not to be among them; for these every film's record is read.

        Raises:
            UserError: a folder, manifest, index or shard is missing or damaged; the modalities of two folders
                differ; a key occurs twice; every film is quarantined or left out.
        """
        listed = [normal(f) for f in ([folders] if isinstance(folders, str | Path) else folders)]
        if not listed:
            raise UserError("no folder of film shards is given", remedy="give at least one")
        manifests = [read_manifest(folder) for folder in listed]
        for folder, manifest in zip(listed[1:], manifests[1:], strict=True):
            _check_same(listed[0], manifests[0], folder, manifest)
        index = cls(listed, manifests, cache)
        if check_sizes and (faults := [f for f in index.size_faults() if f]):
            raise UserError("; ".join(faults[:5]), remedy=REPAIR)
        if twice := [key for key, count in Counter(index.keys).items() if count > 1]:
            raise UserError(
                f"film {twice[0]} occurs twice in {', '.join(listed)}",
                remedy="give every film once",
            )
        if not len(index):
            raise UserError(f"every film of {', '.join(listed)} is quarantined", remedy="give other shards")
        if leave_out is not None:
            index._drop(leave_out)
        return index

    def __len__(self) -> int:
        return len(self.keys)

    def info(self, film: int) -> dict[str, Any]:
        """The film's KEY.json."""
        return self.infos([film])[0]

    def infos(self, films: Sequence[int]) -> list[dict[str, Any]]:
        """As `info`, of several films; what is far away is asked for at once."""
        buffers = [bytearray(int(self._info_F3[film, 1])) for film in films]
        self._read(
            [
                Range(self.shards[self.shard_of[film]], int(self._info_F3[film, 0]), memoryview(buffer), (film, "info"))
                for film, buffer in zip(films, buffers, strict=True)
            ]
        )
        found = []
        for film, buffer in zip(films, buffers, strict=True):
            crc32 = int(self._info_F3[film, 2])
            if _known(crc32) is not None and zlib.crc32(buffer) != crc32:
                raise UserError(f"{self.place(film, 'info')}: the bytes are not those written", remedy=REPAIR)
            try:
                found.append(json.loads(buffer))
            except ValueError as error:
                raise UserError(f"{self.place(film, 'info')} is not JSON", remedy=REPAIR) from error
        return found

    def read(self, film: int, start: int, stop: int) -> FilmSlice:
        """Shots [start, stop) of a film; reads just those rows.

        Raises:
            UserError: the shard is gone, too short or holds other bytes than were written; names shard, film and
                modality.
            ValueError: start and stop are no range of the film's shots.
        """
        self._check_range(film, start, stop)
        out = FilmSlice.empty(self.modalities, stop - start)
        self.read_parts([Part(film, start, out)])
        return out

    def read_parts(self, parts: Sequence[Part], *, only: Sequence[str] | None = None) -> None:
        """As `read`, any number of ranges into memory that is there already; what is far away is asked for at once.

        Args:
            parts: what is wanted.
            only: read these columns and no others; their bytes are not checked.
        """
        ranges: list[Range] = []
        for part in parts:
            self._check_range(part.film, part.start, part.start + len(part.out))
            shard = self.shards[self.shard_of[part.film]]
            for (column, size), offset in zip(self._sized, self._offset_FC[part.film].tolist(), strict=True):
                if offset >= 0 and (only is None or column.name in only):
                    buffer = part.out.bytes_of(column.name)
                    ranges.append(Range(shard, offset + part.start * size, buffer, (part.film, column, part)))
        if only is not None:
            return self._read(ranges)
        try:
            return self._read_checked(parts, ranges)
        except _ChangedError as error:
            # It may be the copy in the cache that has changed.
            if not self._files[error.shard].forget(self.shards[error.shard]):
                raise
        return self._read_checked(parts, ranges)

    @property
    def cached(self) -> bool:
        """Whether shards are read through copies on this node."""
        return self._cached is not None

    def fetch(self, films: Iterable[int]) -> None:
        """Bring the shards of these films into the cache, if there is one, ahead of their reading; does not wait."""
        if self._cached:
            paths = dict.fromkeys(self.shards[self.shard_of[film]] for film in films)
            self._cached.cache.fetch(self._cached.shards[path] for path in paths)

    def _read_checked(self, parts: Sequence[Part], ranges: Sequence[Range]) -> None:
        self._read(ranges)
        for run in _runs([part for part in parts if self.checked(part.film)]):
            self._check(run, self._summed)

    def together(self, parts: Sequence[Part]) -> list[list[Part]]:
        """Parts as they are best read: those far away in one call, the others as many as a processor's cache holds."""
        far: list[Part] = []
        near: list[list[Part]] = []
        room = 0
        for part in parts:
            size = len(part.out) * self._row_bytes
            if not self._files[self.shard_of[part.film]].in_order:
                far.append(part)
            elif size <= room:
                near[-1].append(part)
                room -= size
            else:
                near.append([part])
                room = _TOGETHER - size
        return [*near, far] if far else near

    def checked(self, film: int) -> bool:
        """Whether the film's shots carry checksums, so that reading sees every changed bit."""
        return bool(self._offset_FC[film, 0] >= 0)

    def size_faults(self) -> list[str | None]:
        """For each shard what is wrong with its size, None if nothing is or if every film of it is quarantined."""
        needed = set(self.shard_of.tolist())
        sizes: list[int | None] = []
        for folder, manifest in zip(self.folders, self.manifests, strict=True):
            sizes += files_at(folder).sizes([join(folder, s["name"]) for s in manifest["shards"]])
        faults: list[str | None] = []
        for shard, (path, entry, size) in enumerate(zip(self.shards, self.entries, sizes, strict=True)):
            if shard not in needed:
                faults.append(None)
            elif size is None:
                faults.append(f"{path} is missing")
            elif size != entry["bytes"]:
                faults.append(f"{path} has {size} bytes, its manifest says {entry['bytes']}")
            else:
                faults.append(None)
        return faults

    def stored(self, film: int) -> list[tuple[str, int, int, int | None]]:
        """Where the film's bytes lie in its shard: (name, offset, bytes, crc32) of KEY.json (as `info`) and columns."""
        offset, size, crc32 = self._info_F3[film].tolist()
        found: list[tuple[str, int, int, int | None]] = [("info", offset, size, _known(crc32))]
        for number, column in enumerate(self.columns):
            if (start := int(self._offset_FC[film, number])) >= 0:
                rows_bytes = int(self.shots[film]) * column.row_bytes
                found.append((column.name, start, rows_bytes, _known(int(self._crc32_FC[film, number]))))
        return found

    def files_of(self, shard: int) -> Files:
        """The storage that holds a shard."""
        return self._files[shard]

    def place(self, film: int, what: str) -> str:
        """How messages name a part of a film."""
        return f"{self.shards[self.shard_of[film]]}, film {self.keys[film]}, {what}"

    def _drop(self, leave_out: LeaveOut) -> None:
        """Take out the films that the list names, by key or record; the digest then names what is left."""
        kept = np.ones(len(self), dtype=bool)
        for first in range(0, len(self), _INFOS):
            films = range(first, min(first + _INFOS, len(self)))
            for film, info in zip(films, self.infos(films), strict=True):
                kept[film] = not leave_out.names(self.keys[film], info)
        dropped = [self.keys[film] for film in np.flatnonzero(~kept).tolist()]
        self.left_out = {
            "files": list(leave_out.files),
            "ids": len(leave_out.ids),
            "digest": leave_out.digest,
            "films": len(dropped),
            "shots": int(self.shots[~kept].sum()),
        }
        if not kept.any():
            raise UserError(
                f"every film of {', '.join(self.folders)} is left out by {', '.join(leave_out.files)}",
                remedy="give other shards, or a shorter list",
            )
        if dropped:
            self.digest = hashlib.sha256("\n".join([self.digest, "without", *dropped]).encode()).hexdigest()
            self.keys = [self.keys[film] for film in np.flatnonzero(kept).tolist()]
            for name in ("shots", "shard_of", "folder_of", "_offset_FC", "_crc32_FC", "_info_F3", "_salt_F"):
                setattr(self, name, getattr(self, name)[kept])

    def _check_range(self, film: int, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.shots[film]:
            raise ValueError(f"film {self.keys[film]} has {self.shots[film]} shots, not [{start}, {stop})")

    def check_rows(self, part: Part, column: Column) -> None:
        """Hold the rows of a column against their checksums.

        Raises:
            UserError: they differ; names shard, film, modality and shot.
        """
        if column in self._summed and self.checked(part.film):
            self._check([part], [column])

    def _check(self, run: list[Part], columns: list[Column]) -> None:
        """As check_rows, for parts whose memory lies end to end."""
        out = run[0].out.through(run[-1].out)
        salts = self._salt_F[[part.film for part in run]]
        salt = salts[0] if len(run) == 1 else np.repeat(salts, [len(part.out) for part in run])
        check_NC = _words(out, CHECK).view(np.int64)
        for column in columns:
            name = column.name
            valid_N = np.frombuffer(out.bytes_of(f"{name}_valid"), np.uint8) if name in self.modalities else None
            found_N = row_checks(_words(out, name), valid_N, salt=salt)
            wrong_N = found_N != check_NC[:, self._check_column[name]]
            if wrong_N.any():
                raise self._changed(run, int(wrong_N.argmax()), column)

    def _changed(self, run: list[Part], row: int, column: Column) -> _ChangedError:
        """Names the shot that is row `row` of the run."""
        for part in run:
            if row < len(part.out):
                break
            row -= len(part.out)
        place = f"{self.place(part.film, column.modality)}: the bytes of shot {part.start + row}"
        return _ChangedError(f"{place} are not those written", shard=int(self.shard_of[part.film]))

    def _read(self, ranges: Sequence[Range]) -> None:
        groups: dict[int, tuple[Files, list[Range]]] = {}
        for wanted in ranges:
            files = self._files[self.shard_of[wanted.tag[0]]]
            groups.setdefault(id(files), (files, []))[1].append(wanted)
        try:
            for files, group in groups.values():
                files.read(group)
        except ReadError as error:
            film, what = error.range.tag[:2]
            name = what.modality if isinstance(what, Column) else what
            raise UserError(f"{self.place(film, name)}: {error.problem}", remedy=error.remedy or REPAIR) from error

    def _in_column_order(self, arrays: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
        """int64 [F, C] in the order of self.columns, whatever the order in each shard; -1 where a shard has none."""
        parts = []
        for array in arrays:
            place = {str(c): i for i, c in enumerate(array["columns"])}
            part_FC = np.full((len(array["keys"]), len(self.columns)), -1, dtype=np.int64)
            for number, column in enumerate(self.columns):
                if column.name in place and name in array:
                    part_FC[:, number] = array[name][:, place[column.name]]
            parts.append(part_FC)
        return np.concatenate(parts)


class _ChangedError(UserError):
    """Rows differ from their checksums."""

    def __init__(self, problem: str, *, shard: int) -> None:
        super().__init__(problem, remedy=REPAIR)
        self.shard = shard


def _known(crc32: int) -> int | None:
    return None if crc32 < 0 else crc32


def _runs(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts whose memory lies end to end, together."""
    runs: list[list[Part]] = []
    for part in parts:
        if runs and part.out.follows(runs[-1][-1].out):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _words(out: FilmSlice, name: str) -> np.ndarray:
    """The bytes of a column, uint8 [N, row bytes]."""
    return np.frombuffer(out.bytes_of(name), np.uint8).reshape(len(out), -1)


def _joint_digest(manifests: list[Manifest]) -> str:
    if len(manifests) == 1:
        return manifests[0]["digest"]
    return hashlib.sha256("\n".join(m["digest"] for m in manifests).encode()).hexdigest()


def _check_same(first: str, wanted: Manifest, folder: str, found: Manifest) -> None:
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


__all__ = ["Column", "FilmIndex", "Modality"]
