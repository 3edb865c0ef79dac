"""Features stored otherwise become film shards: a file or data set per film, with a shot list."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from lmp.data.arrays import H5_KINDS, KINDS, open_h5, read_array, read_h5, to_stored
from lmp.data.grids import Grid, to_shots
from lmp.data.leave_out import LeaveOut
from lmp.data.manifest import Manifest
from lmp.data.record import KEY_PATTERN, check_shots
from lmp.data.shards import FilmRecord, ShardWriter
from lmp.errors import UserError

ReadList = Callable[[Path, str, float | None], np.ndarray | None]
"""(folder, key, frames per second if known) -> int32 [S, 2] ms; None if the folder has no list of that film."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Target:
    """Where to write, and how.

    Attributes:
        folder: of the new shards.
        encoders: NAME -> what made the features.
        dtype: to store features in; None keeps float16 and bfloat16 and makes float16 of wider ones.
        allow_missing: what is missing is marked invalid rather than refused.
        films_per_shard, overwrite: see ShardWriter.
        leave_out: films that are not imported.
        refused: keys of those that were not, filled in on the way.
    """

    folder: Path
    encoders: dict[str, dict[str, Any]]
    dtype: torch.dtype | None = None
    allow_missing: bool = False
    films_per_shard: int = 64
    overwrite: bool = False
    leave_out: LeaveOut | None = None
    refused: list[str] = field(default_factory=list)

    def refuses(self, key: str, info: Mapping[str, Any] | None = None) -> bool:
        """Whether a film is not to be imported, which is noted."""
        refused = self.leave_out is not None and self.leave_out.names(key, info)
        if refused:
            self.refused.append(key)
        return refused

    def writer(self) -> ShardWriter:
        """Of the new shards."""
        return ShardWriter(
            self.folder,
            encoders=self.encoders,
            films_per_shard=self.films_per_shard,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True)
class ShotLists:
    """A folder with a shot list per film.

    Attributes:
        folder: holds lists that `read` understands, or KEY.npy, int [S, 2] in milliseconds.
        fps: frames per second of the films, where the lists count frames.
        read: reads lists; a list goes before a KEY.npy.
    """

    folder: Path
    fps: float | None
    read: ReadList

    def of(self, key: str) -> np.ndarray:
        """int32 [S, 2], milliseconds.

        Raises:
            UserError: the film has none, or one that cannot be understood.
        """
        shots_S2 = self.read(self.folder, key, self.fps)
        if shots_S2 is not None:
            return shots_S2
        path = self.folder / f"{key}.npy"
        if not path.is_file():
            raise UserError(
                f"{self.folder} has no shot list for film {key}",
                remedy=f"add {key}.txt, {key}.csv, or {key}.npy of int [S, 2] milliseconds",
            )
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read: {error}", remedy="write it again with numpy.save") from error
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.ndim != 2 or found.shape[1] != 2:
            held = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "no array"
            raise UserError(f"{path} holds {held}", remedy="give the shots as int [S, 2] milliseconds")
        if found.size and found.max() >= 2**31:
            raise UserError(f"{path} holds times up to {found.max()}", remedy="give milliseconds")
        return found.astype(np.int32)


def import_films(
    target: Target,
    features: Mapping[str, Path],
    shots: ShotLists,
    *,
    grids: Mapping[str, Grid] | None = None,
    suffixes: Mapping[str, str] | None = None,
) -> Manifest:
    """Write shards of features that lie in a file or data set per film.

    Args:
        target: where to, and how.
        features: NAME -> a folder of KEY.npy, KEY.h5, ... or an HDF5 file with a data set (or group) per KEY;
            each [S, D] or [S, K, D] of floats. The films are all that any of them holds, by sorted key.
        shots: of each film.
        grids: of the modalities whose rows come at a fixed rate rather than one per shot.
        suffixes: NAME -> what follows the key in the names of files and data sets.

    Raises:
        UserError: names film and modality. Nothing is written.
    """
    with ExitStack() as stack:
        sources = {
            name: _open_source(name, path, (suffixes or {}).get(name, ""), stack) for name, path in features.items()
        }
        keys = sorted({key for source in sources.values() for key in source.keys})
        keys = [key for key in keys if not target.refuses(key)]
        _check_keys(keys, sources, target)
        widths: dict[str, torch.Tensor] = {}
        for name, source in sources.items():
            if not source.keys.issuperset(keys):
                widths[name] = _tokens(source, min(source.keys), name)[:1]
        with target.writer() as writer:
            for key in tracked(keys, "importing films"):
                writer.write(_film(key, sources, shots, widths, target, grids or {}))
            return writer.close()


def tracked(items: Iterable[_T], what: str) -> Iterable[_T]:
    """The items, with a progress bar where a person looks on."""
    return track(items, what, console=Console(stderr=True), disable=not sys.stderr.isatty())


class _Source(Protocol):
    """Features of one modality by film.

    Attributes:
        keys: of the films that have any.
    """

    keys: set[str]

    def read(self, key: str) -> torch.Tensor:
        """[S, D] or [S, K, D] floats."""

    def place(self, key: str) -> str:
        """How messages name where they lie."""


class _Folder:
    """KEY.npy, KEY.h5 and the like; or KEY and a suffix."""

    def __init__(self, modality: str, folder: Path, suffix: str) -> None:
        self._modality = modality
        self._paths: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.suffix.removeprefix(".").lower() not in (*KINDS, *H5_KINDS):
                continue
            if not path.stem.endswith(suffix):
                continue
            key = path.stem.removesuffix(suffix)
            if (other := self._paths.get(key)) is not None:
                raise UserError(f"{folder} holds {other.name} and {path.name}", remedy="keep one file per film")
            self._paths[key] = path
        if not self._paths:
            raise UserError(
                f"{folder} holds no features of {modality}",
                remedy=f"give a folder of KEY{suffix}.TYPE, one per film, TYPE of {', '.join((*KINDS, *H5_KINDS))}",
            )
        self.keys = set(self._paths)

    def read(self, key: str) -> torch.Tensor:
        path = self._paths[key]
        kind = path.suffix.removeprefix(".").lower()
        if kind in H5_KINDS:
            with open_h5(path) as file:
                return read_h5(file, modality=self._modality, where=str(path))
        with path.open("rb") as file:
            return read_array(file, kind, modality=self._modality, where=str(path))

    def place(self, key: str) -> str:
        return str(self._paths[key])


class _H5File:
    """One HDF5 file, with a data set or a group per film at its top."""

    def __init__(self, modality: str, path: Path, suffix: str, stack: ExitStack) -> None:
        self._modality, self._path, self._suffix = modality, path, suffix
        self._file = stack.enter_context(open_h5(path))
        self.keys = {name.removesuffix(suffix) for name in self._file if name.endswith(suffix)}
        if not self.keys:
            raise UserError(f"{path} holds no data set", remedy="give one data set per film, named by its key")

    def read(self, key: str) -> torch.Tensor:
        return read_h5(self._file[key + self._suffix], modality=self._modality, where=self.place(key))

    def place(self, key: str) -> str:
        return f"{self._path}, {key}{self._suffix}"


def _open_source(modality: str, path: Path, suffix: str, stack: ExitStack) -> _Source:
    if path.is_dir():
        return _Folder(modality, path, suffix)
    if not path.is_file():
        raise UserError(f"{path}, features of {modality}, is not there", remedy="give a folder, or an HDF5 file")
    if path.suffix.removeprefix(".").lower() not in H5_KINDS:
        raise UserError(f"{path} is neither a folder nor a .h5 file", remedy="give a folder with one file per film")
    return _H5File(modality, path, suffix, stack)


def _check_keys(keys: list[str], sources: Mapping[str, _Source], target: Target) -> None:
    for key in keys:
        if not KEY_PATTERN.fullmatch(key):
            source = next(s for s in sources.values() if key in s.keys)
            raise UserError(
                f"{source.place(key)}: {key!r} cannot be a film's key",
                remedy="rename it: letters, digits, _ and - only, at most 80",
            )
    for name, source in sources.items():
        lacking = [key for key in keys if key not in source.keys]
        if lacking and not target.allow_missing:
            more = f", nor have {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise UserError(
                f"film {lacking[0]} has no features of modality {name}{more}",
                remedy="add them, or mark their shots as lacking it with --allow-missing",
            )


def _film(
    key: str,
    sources: Mapping[str, _Source],
    shots: ShotLists,
    widths: Mapping[str, torch.Tensor],
    target: Target,
    grids: Mapping[str, Grid],
) -> FilmRecord:
    """One film; `widths` has a row [1, K, D] of each modality that some film lacks."""
    shots_S2 = check_shots(key, shots.of(key)).numpy()
    count = len(shots_S2)
    features, valid = {}, {}
    for name, source in sources.items():
        present = key in source.keys
        rows_SKD = _tokens(source, key, name) if present else torch.zeros_like(widths[name]).repeat(count, 1, 1)
        where = f"film {key}, modality {name}: {source.place(key) if present else 'missing'}"
        valid[name] = torch.full((count,), present)
        if present and name in grids:
            step_ms = grids[name].step_ms(shots.fps, where)
            rows_SKD, valid[name] = to_shots(rows_SKD, shots_S2, step_ms, where=where, strict=not target.allow_missing)
        if len(rows_SKD) != count:
            raise UserError(
                f"{where} has {len(rows_SKD)} rows, but {shots.folder} lists {count} shots",
                remedy="give one row per shot, or tell their rate with --stride",
            )
        features[name] = to_stored(rows_SKD, target.dtype, f"film {key}, modality {name}")
    info = {} if shots.fps is None else {"fps": shots.fps}
    return FilmRecord(key, info, shots_S2, features, valid)


def _tokens(source: _Source, key: str, name: str) -> torch.Tensor:
    """[S, K, D]."""
    rows = source.read(key)
    if rows.ndim == 2:
        rows = rows[:, None]
    if rows.ndim != 3 or 0 in rows.shape:
        raise UserError(
            f"film {key}, modality {name}: {source.place(key)} has shape {list(rows.shape)}",
            remedy="give [S, D] or [S, K, D] with S >= 1 shots",
        )
    return rows
