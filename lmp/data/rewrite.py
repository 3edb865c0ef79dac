"""Writing films of some folders anew: parts for training and validation, other shards; each film stays what it is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lmp.data.index import REPAIR, FilmIndex
from lmp.data.manifest import Manifest
from lmp.data.publish import lock_folder
from lmp.data.record import KEY_PATTERN, WRITER_FIELDS, FilmRecord
from lmp.data.shards import ShardWriter
from lmp.data.storage import is_url
from lmp.data.verify import ReadFilm, read_film
from lmp.errors import UserError

Progress = Callable[[int], None]

_AHEAD = 4  # films in memory
_THREADS = 4
_FILMS_PER_SHARD = 64


def reshard(
    index: FilmIndex,
    out: Path | str,
    *,
    films_per_shard: int = _FILMS_PER_SHARD,
    shuffle: int | None = None,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Write all films into one folder, in the order of the index.

    Args:
        out: local folder without shards.
        shuffle: seed of another order, which for each two films depends on their keys alone.
        progress: told of bytes of films done; `bytes_of_films` in all.

    Raises:
        UserError: a damaged film, encoders that differ, or `out` holds shards already.
    """
    films = list(range(len(index)))
    if shuffle is not None:
        films.sort(key=lambda film: _hash(shuffle, index.keys[film]))
    encoders = encoders_of(index)
    with ShardWriter(_local(out), encoders=encoders, films_per_shard=films_per_shard) as writer:
        for film, record in _records(index, films, encoders):
            writer.write(record)
            progress(_film_bytes(index, film))
        return writer.close()


def split(
    index: FilmIndex,
    out: Path | str,
    parts: Mapping[str, Sequence[int]],
    *,
    films_per_shard: int = _FILMS_PER_SHARD,
    progress: Progress = lambda _: None,
) -> dict[str, Manifest]:
    """Write each part into its own folder OUT/PART; OUT appears with all of them or not at all.

    Args:
        out: local folder, absent or empty.
        parts: NAME -> numbers of its films, each film of the index in exactly one.
        progress: told of bytes of films done; `bytes_of_films` in all.

    Raises:
        UserError: an empty part, a name that cannot be a folder's, a damaged film, encoders that differ, or `out` is
            not empty.
    """
    for name, films in parts.items():
        if not KEY_PATTERN.fullmatch(name):
            raise UserError(f"{name!r} cannot name a part", remedy="use letters, digits, _ and - only")
        if not films:
            raise UserError(
                f"part {name} would be empty", remedy="leave it out, give it a larger share, or take another --seed"
            )
    part_of = {film: name for name, films in parts.items() for film in films}
    if len(part_of) != sum(map(len, parts.values())) or part_of.keys() != set(range(len(index))):
        raise ValueError("every film belongs to exactly one part")
    encoders = encoders_of(index)
    with _Staged(_local(out)) as staging, ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                ShardWriter(staging / name, encoders=encoders, films_per_shard=films_per_shard),
            )
            for name in parts
        }
        for film, record in _records(index, range(len(index)), encoders):
            writers[part_of[film]].write(record)
            progress(_film_bytes(index, film))
        return {name: writer.close() for name, writer in writers.items()}


def parts_by_share(
    index: FilmIndex, shares: Mapping[str, float], *, group: str | None = None, seed: int = 0
) -> dict[str, list[int]]:
    """Deal films by a hash of their keys, so that films that come later move none of the others.

    Args:
        shares: NAME -> share of the films, in all 1.
        group: a field of the films' records that is hashed instead, so that films that have it in common stay
            together.
        seed: another one, another deal.

    Raises:
        UserError: shares that are not above 0 or do not sum to 1, or a film without the field.
    """
    if not all(share > 0 for share in shares.values()) or not abs(sum(shares.values()) - 1) <= 1e-9:
        given = " ".join(f"{name}={share:g}" for name, share in shares.items())
        raise UserError(f"shares {given} do not sum to 1", remedy="give shares above 0 such as train=0.9 val=0.1")
    values = index.keys if group is None else _field(index, group)
    names = list(shares)
    parts: dict[str, list[int]] = {name: [] for name in names}
    for film, value in enumerate(values):
        place = int.from_bytes(_hash(seed, value)[:8], "big") / 2**64
        for name in names:
            place -= shares[name]
            if place < 0:
                break
        parts[name].append(film)  # the last one where rounding leaves a rest
    return parts


def parts_by_field(index: FilmIndex, field: str) -> dict[str, list[int]]:
    """The parts that a field of the films' records names.

    Raises:
        UserError: a film without it.
    """
    parts: dict[str, list[int]] = {}
    for film, value in enumerate(_field(index, field)):
        parts.setdefault(value, []).append(film)
    return dict(sorted(parts.items()))


def parts_by_list(index: FilmIndex, lists: Mapping[str, Path]) -> dict[str, list[int]]:
    """The parts that files list: a film key a line; what follows # is a comment.

    Raises:
        UserError: a file that is not there, a key that no film has, one in two lists, or a film in none.
    """
    number = {key: film for film, key in enumerate(index.keys)}
    listed: dict[str, str] = {}
    parts: dict[str, list[int]] = {}
    for name, path in lists.items():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"list {path} cannot be read: {error}", remedy="give a text file of keys") from error
        keys = [key for line in lines if (key := line.partition("#")[0].strip())]
        for key in keys:
            if key not in number:
                raise UserError(f"{path} lists {key}, but no film has that key", remedy="take the line out")
            if key in listed:
                raise UserError(f"film {key} is listed for {listed[key]} and for {name}", remedy="list it once")
            listed[key] = name
        parts[name] = sorted(number[key] for key in keys)
    if left := [key for key in index.keys if key not in listed]:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(
            f"film {left[0]}{more} is in no list", remedy="list every film, in a part of its own if need be"
        )
    return parts


def bytes_of_films(index: FilmIndex) -> int:
    """What split and reshard read."""
    return sum(_film_bytes(index, film) for film in range(len(index)))


def _film_bytes(index: FilmIndex, film: int) -> int:
    return sum(size for _, _, size, _ in index.stored(film))


def _hash(seed: int, value: str) -> bytes:
    return hashlib.sha256(f"{seed}:{value}".encode()).digest()


def _local(out: Path | str) -> Path:
    if is_url(out):
        raise UserError(f"{out} is not a local folder", remedy="write into a local folder and copy it there")
    return Path(out)


def _field(index: FilmIndex, field: str) -> list[str]:
    """A field of every film's record, as text."""
    with ThreadPoolExecutor(_THREADS) as pool:
        values = [info.get(field) for info in pool.map(index.info, range(len(index)))]
    for key, value in zip(index.keys, values, strict=True):
        if value is None or value == "":
            raise UserError(f"the record of film {key} has no {field!r}", remedy="name a field that every film has")
    return [value if isinstance(value, str) else json.dumps(value, sort_keys=True) for value in values]


def encoders_of(index: FilmIndex) -> dict[str, dict[str, Any]]:
    """The encoders of all folders.

    Raises:
        UserError: they differ.
    """
    first, encoders = index.folders[0], index.manifests[0]["encoders"]
    for folder, manifest in zip(index.folders[1:], index.manifests[1:], strict=True):
        found = manifest["encoders"]
        if differing := [n for n in sorted(encoders | found) if encoders.get(n) != found.get(n)]:
            lines = [f"{n} is by {encoders.get(n)} in {first} but by {found.get(n)} in {folder}" for n in differing]
            raise UserError("; ".join(lines), remedy="merge only folders whose features come from the same encoders")
    return encoders


def _records(
    index: FilmIndex, films: Iterable[int], encoders: dict[str, dict[str, Any]]
) -> Iterator[tuple[int, FilmRecord]]:
    """(film, record) in the order of `films`; a few are read ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[tuple[int, Future[ReadFilm]]] = deque()
        try:
            for film in films:
                waiting.append((film, pool.submit(read_film, index, film)))
                if len(waiting) == _AHEAD:
                    number, read = waiting.popleft()
                    yield number, _record(index, number, read.result(), encoders)
            while waiting:
                number, read = waiting.popleft()
                yield number, _record(index, number, read.result(), encoders)
        finally:
            for _, read in waiting:
                read.cancel()


def _record(index: FilmIndex, film: int, read: ReadFilm, encoders: dict[str, dict[str, Any]]) -> FilmRecord:
    """What a writer needs to write the film as it was."""
    if read.faults:
        raise UserError(str(read.faults[0]), remedy=REPAIR)
    own = read.info.get("encoders") or {}
    if own and own != encoders:
        raise UserError(
            f"{index.place(film, 'info')}: encoders are {own}, the manifest has {encoders}",
            remedy="keep films of other encoders in a folder of their own",
        )
    cleared = read.info.get("cleared") if index.checked(film) else None
    return FilmRecord(
        key=index.keys[film],
        info={name: value for name, value in read.info.items() if name not in WRITER_FIELDS},
        shots_S2=read.rows.shots_N2.numpy(),
        features=read.rows.features,
        valid=read.rows.valid,
        cleared=cleared or {},
    )


class _Staged:
    """A hidden folder beside OUT that becomes OUT if all goes well and is removed otherwise."""

    def __init__(self, out: Path) -> None:
        self._out = out.absolute()
        self._staging = self._out.with_name(f".{self._out.name}.lmp-writing")

    def __enter__(self) -> Path:
        if self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir())):
            raise UserError(f"{self._out} is there already and not an empty folder", remedy="give another folder")
        self._staging.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self._staging)
        for left in self._staging.iterdir():  # by a killed process: the lock is ours
            shutil.rmtree(left)
        return self._staging

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._lock)
                self._staging.rename(self._out)
            else:
                shutil.rmtree(self._staging, ignore_errors=True)
        finally:
            os.close(self._lock)
