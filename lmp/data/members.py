"""Walking through a tar from start to end: its members, its hash, and where headers are damaged."""

from __future__ import annotations

import hashlib
import tarfile
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

_BLOCK = 512
_PIECE = 1 << 22
_MAX_HEAD = 100_000_000  # what the safetensors library itself allows for a header
_WITHOUT_DATA = {tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE}


@dataclass(frozen=True)
class Member:
    """A file in a tar whose header is whole.

    Attributes:
        name: as in its header; film keys are short enough that no extension header is needed to name it.
        start: first byte of its data, from the start of the tar.
        size: bytes of its data.
        head: of NAME.safetensors the JSON header, None if its length is impossible or the tar ends in it.
    """

    name: str
    start: int
    size: int
    head: bytes | None

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass
class Walk:
    """What a walk through a tar found.

    Attributes:
        members: in the order of the tar; those behind a damaged header are found again.
        bytes: length of the tar.
        sha256: of the whole tar.
    """

    members: list[Member] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""

    def starting_at(self, offset: int) -> Member | None:
        """The member whose data starts there."""
        found = self.around(offset)
        return found if found is not None and found.start == offset else None

    def around(self, offset: int) -> Member | None:
        """The member whose data holds this byte of the tar."""
        number = bisect_right(self.members, offset, key=lambda m: m.start) - 1
        if number < 0:
            return None
        member = self.members[number]
        return member if offset < member.stop or offset == member.start else None


def walk(file: BinaryIO, *, progress: Callable[[int], None] = lambda _: None) -> Walk:
    """Read a tar to its end; holds no more than one piece of it.

    Where a header is damaged or zeroed, the next whole one is looked for block by block.

    Args:
        file: open at the start of the tar.
        progress: told of bytes read.
    """
    found = Walk()
    reader = _Reader(file, progress)
    astray = False
    while len(block := reader.read(_BLOCK)) == _BLOCK:
        # A block of features whose bytes pass for a header has to bear its magic, too.
        header = None if astray and block[257:262] != b"ustar" else _header(block)
        astray = header is None
        if header is None:
            continue
        start = reader.at
        size = 0 if header.type in _WITHOUT_DATA else header.size
        head = _head(reader, size) if header.name.endswith(".safetensors") else None
        if header.isreg():
            found.members.append(Member(header.name, start, size, head))
        reader.skip(start + size + -size % _BLOCK - reader.at)
    reader.skip(None)
    found.bytes, found.sha256 = reader.at, reader.sha256.hexdigest()
    return found


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _head(reader: _Reader, size: int) -> bytes | None:
    if size < 8:
        return None
    wanted = int.from_bytes(reader.read(8), "little")
    if wanted > min(size - 8, _MAX_HEAD):
        return None
    head = reader.read(wanted)
    return head if len(head) == wanted else None


class _Reader:
    def __init__(self, file: BinaryIO, progress: Callable[[int], None]) -> None:
        self._file, self._progress = file, progress
        self.at = 0
        self.sha256 = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end of the file."""
        pieces = []
        while size > 0 and (piece := self._file.read(size)):
            self.sha256.update(piece)
            self._progress(len(piece))
            self.at += len(piece)
            size -= len(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def skip(self, size: int | None) -> None:
        """Go on by `size` bytes, to the end if None."""
        stop = None if size is None else self.at + size
        while stop is None or self.at < stop:
            if not self.read(_PIECE if stop is None else min(_PIECE, stop - self.at)):
                return
