"""Memory for shots: a row per shot of every column, and how it is used again."""

from __future__ import annotations

import weakref
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from lmp.data.manifest import CHECK, Column, Modality, columns_of

_ALIGN = 64


class Blocks:
    """Blocks of memory, each used again once no tensor refers to it any more. Safe from many threads.

    The system clears fresh memory and takes it back, which costs as much as reading into it. Nothing is kept beyond
    what was in use at one time.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, size: int) -> np.ndarray:
        """uint8 [size], uninitialised."""
        free = self._free.setdefault(size, [])
        try:
            memory = free.pop()
        except IndexError:
            # NumPy asks for huge pages. It aligns to 16 bytes only, where the kernel copies at half its speed.
            memory = np.empty(size + _ALIGN, dtype=np.uint8)
        first = -memory.ctypes.data % _ALIGN
        block = memory[first : first + size]
        weakref.finalize(block, free.append, memory).atexit = False
        return block


class FilmSlice:
    """N rows, one per shot, of every column: a block of memory, or some rows of one.

    Attributes:
        shots_N2: int32 [N, 2] milliseconds.
        features: NAME -> [N, K, D], dtype as stored.
        valid: NAME -> [N] bool.
        check: int64 [N, 1 + M], see manifest.CHECK.
    """

    def __init__(self, block: torch.Tensor, memory: memoryview, layout: _Layout, span: tuple[int, int]) -> None:
        """Use FilmSlice.empty or rows."""
        self._block, self._bytes, self._layout = block, memory, layout
        self._start, self._stop = span

    @classmethod
    def empty(
        cls, modalities: dict[str, Modality], rows: int, *, pin: bool = False, blocks: Blocks | None = None
    ) -> FilmSlice:
        """Uninitialised memory for `rows` shots, all tensors in one block.

        Args:
            pin: page-locked.
            blocks: where the block comes from, if it is not page-locked.
        """
        layout = _Layout(tuple(modalities.values()), rows)
        if pin:  # torch itself uses such memory again
            block = torch.empty(layout.bytes, dtype=torch.uint8, pin_memory=True)
        else:
            block = torch.from_numpy((blocks or Blocks()).take(layout.bytes))
        return cls(block, block.numpy().data, layout, (0, rows))

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def shots_N2(self) -> torch.Tensor:  # noqa: N802
        return self.column("shots")

    @cached_property
    def features(self) -> dict[str, torch.Tensor]:
        return {name: self.column(name) for name in self._layout.modalities}

    @cached_property
    def valid(self) -> dict[str, torch.Tensor]:
        return {name: self.column(f"{name}_valid") for name in self._layout.modalities}

    @property
    def check(self) -> torch.Tensor:
        return self.column(CHECK)

    def rows(self, start: int, stop: int) -> FilmSlice:
        """Shots [start, stop) as views into the same memory."""
        return FilmSlice(self._block, self._bytes, self._layout, (self._start + start, self._start + stop))

    def through(self, last: FilmSlice) -> FilmSlice:
        """From the first of these rows to the last of `last`, which lie in the same memory."""
        return FilmSlice(self._block, self._bytes, self._layout, (self._start, last._stop))

    def follows(self, other: FilmSlice) -> bool:
        """Whether these rows begin in memory where those of `other` end."""
        return self._block is other._block and self._start == other._stop

    def clear(self) -> None:
        """Set everything to zero and False."""
        for name in self._layout.columns:
            self.column(name).zero_()

    def column(self, name: str) -> torch.Tensor:
        """The tensor of the column NAME, NAME_valid, shots or check."""
        column, first, size = self._layout.columns[name]
        part = self._block[first + self._start * size : first + self._stop * size]
        return part.view(column.dtype).view(len(self), *column.row_shape)

    def bytes_of(self, name: str) -> memoryview:
        """The memory of a column, flat and writable."""
        _, first, size = self._layout.columns[name]
        return self._bytes[first + self._start * size : first + self._stop * size]


class _Layout:
    """Where in a block of memory each column's rows lie.

    Attributes:
        modalities: their names.
        columns: name -> (column, bytes before row 0, bytes of a row).
        bytes: of all.
    """

    def __init__(self, modalities: tuple[Modality, ...], rows: int) -> None:
        self.modalities = [m.name for m in modalities]
        self.columns: dict[str, tuple[Column, int, int]] = {}
        self.bytes = 0
        for column, size in sized_columns(modalities):
            self.columns[column.name] = (column, self.bytes, size)
            self.bytes += -(-rows * size // _ALIGN) * _ALIGN


@lru_cache
def sized_columns(modalities: tuple[Modality, ...]) -> list[tuple[Column, int]]:
    return [(column, column.row_bytes) for column in columns_of({m.name: m for m in modalities})]


class Part(NamedTuple):
    """As many shots as `out` holds, from shot `start` of film number `film` on, wanted in `out`."""

    film: int
    start: int
    out: FilmSlice
