"""Finding damage in shards: every byte is read and held against what the manifest and the indexes say."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lmp.data.film_slice import FilmSlice, Part
from lmp.data.index import FilmIndex
from lmp.data.manifest import CHECK, SAFETENSORS_NAMES, Column, modalities_to_json
from lmp.data.members import Member, Walk, walk
from lmp.data.record import not_finite
from lmp.data.storage import Range, ReadError
from lmp.errors import UserError

_INFO = "info"


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was written.

    Attributes:
        shard: number of the shard, into FilmIndex.shards.
        film: number of the film, None where the fault lies outside of any.
        column: the tensor, `info` for KEY.json, or None where it lies in neither.
        what: what is wrong, without the place.
        place: shard, film and column, as messages name them.
    """

    shard: int
    film: int | None
    column: str | None
    what: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}{' ' if self.film is None else ': '}{' '.join(self.what.split())}"


def verify(index: FilmIndex, *, progress: Callable[[int], None] = lambda _: None) -> Iterator[Fault]:
    """Read everything and name every fault, a film in memory at a time; each byte is read twice.

    Looked at: size and sha256 of each shard; tar headers, safetensors headers and KEY.json against the index; crc32
    and checksums; whether features are finite, valid bits 0 or 1, and shots in order. Shards of which every film is
    quarantined are not looked at.

    Args:
        index: loaded with check_sizes=False, so that shards that are cut or missing can be looked at too.
        progress: told of bytes read; `bytes_to_read` in all where nothing is missing.
    """
    for shard, size_fault in enumerate(index.size_faults()):
        yield from verify_shard(index, shard, size_fault=size_fault, progress=progress)


def bytes_to_read(index: FilmIndex) -> int:
    """What verify reads of shards without faults."""
    films = sum(size for film in range(len(index)) for _, _, size, _ in index.stored(film))
    return films + sum(index.entries[shard]["bytes"] for shard in np.unique(index.shard_of).tolist())


def unhashed(index: FilmIndex) -> list[str]:
    """What cannot be held against anything because an index was built without reading features; one line each."""
    shards = [index.shards[n] for n in np.unique(index.shard_of).tolist() if index.entries[n]["sha256"] is None]
    films = range(len(index))
    no_crc32 = sum(any(crc32 is None for *_, crc32 in index.stored(film)) for film in films)
    no_checks = sum(not index.checked(film) for film in films)
    lines = []
    if shards:
        named = ", ".join(shards[:5]) + (f" and {len(shards) - 5} more" if len(shards) > 5 else "")
        lines.append(f"not hashed: {len(shards)} shards have no sha256 in the manifest: {named}")
    if no_crc32:
        lines.append(f"not hashed: {no_crc32} films have no crc32 in the index")
    if no_checks:
        lines.append(f"not hashed: {no_checks} films carry no checksums of their shots")
    return lines


def films_of(index: FilmIndex, shard: int) -> range:
    """The numbers of a shard's films."""
    first, last = np.searchsorted(index.shard_of, [shard, shard + 1]).tolist()
    return range(first, last)


def verify_shard(
    index: FilmIndex,
    shard: int,
    *,
    size_fault: str | None = None,
    found: Walk | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Fault]:
    """The faults of one shard and of the films in it.

    Args:
        size_fault: of FilmIndex.size_faults.
        found: the walk through the shard, if it was made already.
    """
    films = films_of(index, shard)
    if not films:
        return
    path = index.shards[shard]
    if size_fault:
        yield Fault(shard, None, None, size_fault.removeprefix(path), path)
    try:
        if found is None:
            with index.files_of(shard).open(path) as file:
                found = walk(file, progress=progress)
    except FileNotFoundError:
        if not size_fault:
            yield Fault(shard, None, None, "is missing", path)
        return
    except Exception as error:  # each kind of remote storage has its own
        yield Fault(shard, None, None, f"cannot be read: {type(error).__name__}: {error}", path)
    wanted = index.entries[shard]["sha256"]
    if found and not size_fault and wanted is not None and found.sha256 != wanted:
        yield Fault(shard, None, None, "has another sha256 than its manifest says", path)
    for film in films:
        faults = read_film(index, film).faults
        if found and not any(isinstance(fault, _Unread) for fault in faults):
            yield from _member_faults(index, film, found)
        yield from faults
        progress(sum(size for _, _, size, _ in index.stored(film)))


@dataclass(frozen=True)
class _Unread(Fault):
    """Bytes that could not be read at all."""


@dataclass
class ReadFilm:
    """A film as it is now.

    Attributes:
        rows: all shots; what could not be read is undefined.
        info: KEY.json, empty where it could not be read.
        faults: what is wrong with its bytes; none means that it is what was written.
    """

    rows: FilmSlice
    info: dict[str, Any]
    faults: list[Fault]


def read_film(index: FilmIndex, film: int) -> ReadFilm:
    """Read a whole film and hold it against its index and its own checksums."""
    shard, shots = int(index.shard_of[film]), int(index.shots[film])
    rows = FilmSlice.empty(index.modalities, shots)
    stored = index.stored(film)
    ranges = []
    for name, offset, size, _ in stored:
        buffer = memoryview(bytearray(size)) if name == _INFO else rows.bytes_of(name)
        ranges.append(Range(index.shards[shard], offset, buffer, name))
    unread = _read_each(index, shard, ranges)
    faults: list[Fault] = []
    for wanted, (name, *_, crc32) in zip(ranges, stored, strict=True):
        if name in unread:
            faults.append(_Unread(shard, film, name, unread[name], index.place(film, name)))
        elif crc32 is not None and zlib.crc32(wanted.buffer) != crc32:
            faults.append(Fault(shard, film, name, "crc32 differs", index.place(film, name)))
    bad = {fault.column for fault in faults}
    info: dict[str, Any] = {}
    if _INFO not in bad:
        info, problems = _look_at_info(index, film, bytes(ranges[0].buffer))
        faults += [Fault(shard, film, _INFO, p, index.place(film, _INFO)) for p in problems]
    whole = {name for name, *_ in stored} - bad
    for name, problem in _look_at_rows(index, film, rows, whole):
        faults.append(Fault(shard, film, name, problem, index.place(film, name)))
    return ReadFilm(rows, info, faults)


def _read_each(index: FilmIndex, shard: int, ranges: list[Range]) -> dict[str, str]:
    """Fill the ranges, at once if it goes; else one by one. What went wrong with each that could not be read."""
    files = index.files_of(shard)
    try:
        files.read(ranges)
        return {}
    except ReadError:
        problems = {}
        for wanted in ranges:
            try:
                files.read([wanted])
            except ReadError as error:
                problems[wanted.tag] = error.problem
        return problems


def _look_at_info(index: FilmIndex, film: int, data: bytes) -> tuple[dict[str, Any], list[str]]:
    """KEY.json, and in what it differs from the index."""
    try:
        info = json.loads(data)
    except ValueError as error:
        return {}, [f"is not JSON: {error}"]
    if not isinstance(info, dict):
        return {}, ["is no JSON object"]
    if not index.checked(film):  # others may use these fields in their own way
        return info, []
    expected = {
        "key": index.keys[film],
        "shots": int(index.shots[film]),
        "modalities": modalities_to_json(index.modalities),
    }
    return info, [f"{n} is {info.get(n)!r}, the index says {v!r}" for n, v in expected.items() if info.get(n) != v]


def _look_at_rows(index: FilmIndex, film: int, rows: FilmSlice, whole: set[str]) -> Iterator[tuple[str, str]]:
    """What the numbers themselves show: (column, problem). Only the columns in `whole` are looked at."""
    part = Part(film, 0, rows)
    if "shots" in whole:
        start_N, stop_N = rows.shots_N2.numpy().T
        wrong_N = (start_N < 0) | (stop_N <= start_N)
        wrong_N[1:] |= start_N[1:] < start_N[:-1]
        if wrong_N.any():
            shot = int(wrong_N.argmax())
            yield "shots", f"shot {shot} spans {rows.shots_N2[shot].tolist()} ms, which is out of order"
    for column in index.columns:
        needed = {CHECK, column.name} | ({f"{column.name}_valid"} if column.name in index.modalities else set())
        if index.checked(film) and needed <= whole:
            try:
                index.check_rows(part, column)
            except UserError as error:
                yield column.name, error.problem.removeprefix(f"{index.place(film, column.modality)}: ")
    for name in index.modalities:
        valid = f"{name}_valid"
        if valid in whole and (rows.valid[name].view(torch.uint8) > 1).any():
            yield valid, "holds bytes other than 0 and 1"
        if name in whole and (bad_N := not_finite(rows.features[name])).any():
            yield name, f"holds NaN or infinity, first in shot {int(bad_N.int().argmax())}"


def _member_faults(index: FilmIndex, film: int, found: Walk) -> Iterator[Fault]:
    """Whether whole tar headers and safetensors headers lead to where the index says that the film lies."""
    shard, key = int(index.shard_of[film]), index.keys[film]

    def fault(column: str | None, what: str, problem: str) -> Fault:
        return Fault(shard, film, column, problem, index.place(film, what))

    _, info_at, info_bytes, _ = index.stored(film)[0]
    member = found.starting_at(info_at)
    if member is None:
        yield fault(None, f"{key}.json", "its tar header is damaged or missing")
    elif member.size != info_bytes or not _named(member, key):
        yield fault(None, f"{key}.json", f"its tar header says {member.name}, {member.size} bytes, not {info_bytes}")
    columns = {c.name: c for c in index.columns}
    shots = int(index.shots[film])
    lost: list[str] = []
    headers: dict[int, dict[str, Any] | None] = {}
    for name, offset, size, _ in index.stored(film)[1:]:
        member = found.around(offset)
        if member is None or offset + size > member.stop:
            lost.append(name)
            continue
        if member.start not in headers:
            headers[member.start] = _safetensors_header(member)
            if not _named(member, key):
                yield fault(None, f"{key}.safetensors", f"its tar header says {member.name}")
            if headers[member.start] is None:
                yield fault(None, f"{key}.safetensors", "its safetensors header is damaged")
        header = headers[member.start]
        if header is not None and (problem := _entry_problem(member, header, columns[name], shots, offset)):
            yield fault(name, name, problem)
    if lost:
        yield fault(None, f"{key}.safetensors", f"the tar header before {', '.join(lost)} is damaged or missing")


def _named(member: Member, key: str) -> bool:
    return member.name.rpartition("/")[2].startswith(f"{key}.")


def _safetensors_header(member: Member) -> dict[str, Any] | None:
    try:
        header = json.loads(member.head or b"")
    except ValueError:
        return None
    return header if isinstance(header, dict) else None


def _entry_problem(member: Member, header: Mapping[str, Any], column: Column, shots: int, offset: int) -> str | None:
    """What the safetensors header says of a column that the index does not."""
    try:
        entry = header[column.name]
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        start = member.start + 8 + len(member.head or b"") + int(first)
        size = int(last) - int(first)
    except (ValueError, KeyError, TypeError):
        return "its entry in the safetensors header is damaged or missing"
    wanted = [shots, *column.row_shape]
    if dtype != SAFETENSORS_NAMES[column.dtype] or shape != wanted:
        expected = f"{SAFETENSORS_NAMES[column.dtype]} {wanted}"
        return f"is {dtype} {shape} in the safetensors header, the index says {expected}"
    if start != offset or size != shots * column.row_bytes:
        return (
            f"is at bytes {start} to {start + size} in the safetensors header, "
            f"the index says {offset} to {offset + shots * column.row_bytes}"
        )
    return None
