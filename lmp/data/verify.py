"""Finding damage in shards: every byte is read and held against what the manifest and the indexes say."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lmp.data.index import FilmIndex, FilmSlice, Part
from lmp.data.storage import Range, ReadError
from lmp.errors import UserError

_PIECE = 1 << 22


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was written.

    Attributes:
        shard: number of the shard, into FilmIndex.shards.
        film: number of the film, None where the fault lies outside of any.
        problem: names shard, film and column.
    """

    shard: int
    film: int | None
    problem: str

    def __str__(self) -> str:
        return self.problem


def verify(index: FilmIndex, *, progress: Callable[[int], None] = lambda _: None) -> Iterator[Fault]:
    """Read everything and name every fault: size and sha256 per shard, crc32 per film and tensor, checksums, NaN.

    Args:
        index: loaded with check_sizes=False, so that shards that are cut or missing can be looked at too.
        progress: told the number of bytes of each shard once it is done.
    """
    sizes = index.size_faults()
    for shard, fault in enumerate(sizes):
        yield from _verify_shard(index, shard, fault)
        progress(index.entries[shard]["bytes"])


def _verify_shard(index: FilmIndex, shard: int, size_fault: str | None) -> Iterator[Fault]:
    if size_fault:
        yield Fault(shard, None, size_fault)
        if size_fault.endswith("is missing"):
            return
    wanted = index.entries[shard]["sha256"]
    if not size_fault and wanted is not None and sha256_of(index, shard) != wanted:
        yield Fault(shard, None, f"{index.shards[shard]}: sha256 differs from the manifest")
    for film in np.flatnonzero(index.shard_of == shard).tolist():
        yield from verify_film(index, film)


def verify_film(index: FilmIndex, film: int) -> Iterator[Fault]:
    """The faults of one film."""
    shard = int(index.shard_of[film])
    damaged = False
    for name, offset, size, crc32 in index.stored(film):
        buffer = bytearray(size)
        try:
            index.files_of(shard).read([Range(index.shards[shard], offset, memoryview(buffer))], lambda _: None)
        except (ReadError, OSError) as error:
            problem = error.problem if isinstance(error, ReadError) else str(error)
            yield Fault(shard, film, f"{index.place(film, name)}: {problem}")
            damaged = True
            continue
        if crc32 is not None and zlib.crc32(buffer) != crc32:
            yield Fault(shard, film, f"{index.place(film, name)}: crc32 differs")
            damaged = True
    if not damaged:
        yield from _look_at_rows(index, film, shard)


def _look_at_rows(index: FilmIndex, film: int, shard: int) -> Iterator[Fault]:
    """What only the numbers themselves show."""
    rows = FilmSlice.empty(index.modalities, int(index.shots[film]))
    try:
        index.read_parts([Part(film, 0, rows)])
    except UserError as error:
        yield Fault(shard, film, error.problem)
        return
    for name, features_NKD in rows.features.items():
        if not torch.isfinite(features_NKD).all():
            yield Fault(shard, film, f"{index.place(film, name)}: holds NaN or infinity")


def sha256_of(index: FilmIndex, shard: int) -> str:
    """Of the shard as it is now."""
    digest = hashlib.sha256()
    with index.files_of(shard).open(index.shards[shard]) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
