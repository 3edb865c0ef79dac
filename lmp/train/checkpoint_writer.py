"""How the state of a rank gets from its device into one file: a snapshot in host memory, then a stream of bytes.

The file is plain safetensors. Its tensors are fragments, named NAME/PART@OFFSET: the values of one part (weight,
exp_avg, exp_avg_sq) of a flattened parameter from OFFSET on, fp32. Its metadata hold the rank's random states as JSON.

The snapshot lies in host memory in the order of the file, so writing is a few calls on large blocks of bytes. Those
calls, hashing and fsync let other Python threads run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmp.train.state_hash import MODULUS, fragment_hash
from lmp.train.zero_state import Piece

_BLOCK = 1 << 26
"""Values in the largest block of host memory (256 MiB). Blocks are powers of two, for torch rounds pinned memory up to
these."""
_CHUNK = 1 << 22
"""Bytes hashed and written at a time: few calls, and still in the processor's cache for the second."""


@dataclass(frozen=True)
class Stretch:
    """The values start .. stop of one part of a flattened parameter."""

    name: str
    part: str
    start: int
    stop: int

    @property
    def key(self) -> str:
        return f"{self.name}/{self.part}@{self.start}"


@dataclass(frozen=True)
class Written:
    """What a rank says of the file that it wrote.

    Attributes:
        file: its name.
        bytes, sha256: of the whole file.
        stretches: what is in it.
        hashes: of each stretch, see state_hash.
    """

    file: str
    bytes: int
    sha256: str
    stretches: list[Stretch]
    hashes: list[int]


class Snapshot:
    """A copy of this rank's pieces in host memory, which is kept and used again for the next one.

    Args:
        device: of the pieces; where it is CUDA the memory is pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stretches: list[Stretch] = []
        self.random_states = "{}"
        self._blocks: list[Tensor] = []
        self._values = 0

    def take(self, pieces: Sequence[Piece]) -> None:
        """Copy the pieces as they are now; returns when the copy is whole."""
        self.stretches = [Stretch(p.name, p.part, p.offset, p.stop) for p in pieces]
        self.random_states = json.dumps(random_states(self.device))
        self._values = sum(piece.values.numel() for piece in pieces)
        self._make_room()
        place = 0
        for piece in pieces:
            done = 0
            for part in self._parts(place, piece.values.numel()):
                part.copy_(piece.values[done : done + part.numel()], non_blocking=True)
                done += part.numel()
            place += done
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def hashes(self) -> list[int]:
        """The hash of each stretch."""
        found, place = [], 0
        for stretch in self.stretches:
            total, offset = 0, stretch.start
            for part in self._parts(place, stretch.stop - stretch.start):
                total += fragment_hash(part, offset)
                offset += part.numel()
            place += stretch.stop - stretch.start
            found.append(total % MODULUS)
        return found

    def write(self, file: Path) -> Written:
        """Write the file, with sync. Touches no device and no communication.

        Raises:
            OSError: the file could not be written.
        """
        digest = hashlib.sha256()
        size = 0
        with file.open("wb", buffering=0) as handle:
            for view in (memoryview(self._header()), *self._bytes()):
                digest.update(view)
                size += len(view)
                written = 0
                while written < len(view):
                    written += handle.write(view[written:])
            os.fsync(handle.fileno())
        return Written(
            file=file.name, bytes=size, sha256=digest.hexdigest(), stretches=self.stretches, hashes=self.hashes()
        )

    def _make_room(self) -> None:
        have = sum(block.numel() for block in self._blocks)
        while have < self._values:
            count = min(_BLOCK, 1 << max(10, (self._values - have).bit_length() - 1))
            self._blocks.append(_host_block(count, pinned=self.device.type == "cuda"))
            have += count

    def _parts(self, place: int, count: int) -> Iterator[Tensor]:
        """The host memory of `count` values from `place` on, block by block."""
        for block in self._blocks:
            if place < block.numel() and count:
                part = block[place : place + count]
                yield part
                place, count = 0, count - part.numel()
            else:
                place -= block.numel()

    def _bytes(self) -> Iterator[memoryview]:
        for part in self._parts(0, self._values):
            view = part.numpy().view(np.uint8).data
            for start in range(0, len(view), _CHUNK):
                yield view[start : start + _CHUNK]

    def _header(self) -> bytes:
        facts: dict[str, Any] = {"__metadata__": {"random": self.random_states}}
        place = 0
        for stretch in self.stretches:
            count = stretch.stop - stretch.start
            facts[stretch.key] = {
                "dtype": "F32",
                "shape": [count],
                "data_offsets": [4 * place, 4 * (place + count)],
            }
            place += count
        text = json.dumps(facts, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _host_block(count: int, *, pinned: bool) -> Tensor:
    if pinned:
        try:
            return torch.empty(count, dtype=torch.float32, pin_memory=True)
        except RuntimeError:
            # The system grants no more of it; copies into ordinary memory are only slower.
            pass
    return torch.empty(count, dtype=torch.float32)


def file_name(rank: int, ranks: int) -> str:
    """The file of a rank."""
    return f"state-{rank:05d}-of-{ranks:05d}.safetensors"


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of this process's random generators, ready for JSON."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        states["cuda"] = _text(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """The inverse of random_states."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_tensor(states["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
