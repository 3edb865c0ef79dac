"""Walking a tar strictly: what other readers pass over as the end of the file is an error here.

tarfile, and webdataset through it, take a cut at the boundary of a member or an overwritten header for the end of
the archive, and lose the rest without a word.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from lmp.data.storage import Files, Range, ReadError, files_at, is_url
from lmp.errors import UserError

_BLOCK = 512
_AHEAD = 1 << 16  # bytes asked of a URL at once: headers and small members lie close to each other
_MOST_ZEROS = 2 * tarfile.RECORDSIZE  # the end marker, and zeros up to a full record
_MOST_META = 1 << 20  # bytes of a PAX header or a long name
_GZIP = b"\x1f\x8b"
AGAIN = "copy the shard again from its source, or write it again"


class Member(NamedTuple):
    """A file in a tar: its name, where its bytes start, how many they are."""

    name: str
    offset: int
    size: int


class Sample(NamedTuple):
    """The members of one key as webdataset forms it: the name up to the first dot; by what comes after."""

    key: str
    members: dict[str, Member]


class Tar:
    """A tar, a local path or a URL, open for reading; a context manager. Understands ustar, PAX and GNU long names.

    Raises:
        UserError: the file is not there or empty.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self._files: Files | None = None
        self._piece, self._piece_at = bytearray(), 0
        if is_url(path):
            self._files = files_at(str(path))
            (size,) = self._files.sizes([str(path)])
            if size is None:
                raise UserError(f"{path} is not there", remedy="give a tar that is there")
            self.size = size
        else:
            try:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                remedy = "give a tar that is there"
                raise UserError(f"{path} cannot be opened: {error.strerror}", remedy=remedy) from error
            self.size = os.fstat(self._descriptor).st_size
        if self.size == 0:
            self.close()
            raise UserError(f"{path} is an empty file", remedy=AGAIN)

    def __enter__(self) -> Tar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; once."""
        if self._files is None:
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytearray:
        """Bytes [offset, offset + size).

        Raises:
            UserError: the file ends before, or cannot be read.
        """
        if self._files is not None:
            return self._read_remote(self._files, offset, size)
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        while done < size:
            try:
                got = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise UserError(f"{self.path} cannot be read: {error.strerror}", remedy=AGAIN) from error
            if got == 0:
                raise UserError(f"{self.path} ends before byte {offset + size}", remedy=AGAIN)
            done += got
        return buffer

    def record(self, sample: Sample, place: str) -> dict[str, Any] | None:
        """What a sample's member `json` holds; None where it has none.

        Raises:
            UserError: that is no JSON object, or as `read`; `place` names the sample.
        """
        if (member := sample.members.get("json")) is None:
            return None
        try:
            told = json.loads(self.read(member.offset, member.size))
        except ValueError as error:
            raise UserError(f"{place}: its json is not JSON: {error}", remedy="write the tar again") from error
        if not isinstance(told, dict):
            raise UserError(f"{place}: its json is no object", remedy="write {...}")
        return told

    def _read_remote(self, files: Files, offset: int, size: int) -> bytearray:
        if offset + size > self.size:
            raise UserError(f"{self.path} ends before byte {offset + size}", remedy=AGAIN)
        if not self._piece_at <= offset <= offset + size <= self._piece_at + len(self._piece):
            piece = bytearray(min(max(size, _AHEAD), self.size - offset))
            try:
                files.read([Range(str(self.path), offset, memoryview(piece))])
            except ReadError as error:
                raise UserError(f"{self.path} cannot be read: {error.problem}", remedy=error.remedy or AGAIN) from error
            self._piece, self._piece_at = piece, offset
        return self._piece[offset - self._piece_at :][:size]

    def members(self) -> Iterator[Member]:
        """All regular files, in order; reads their headers only.

        Raises:
            UserError: anything that is not a whole tar of files: a damaged header, an end inside of a member or
                without the end-of-archive blocks, data after them, no member; names the tar and the member.
        """
        at, last, found = 0, "", 0
        extended: dict[str, str] = {}
        for_all: dict[str, str] = {}
        while True:
            header = self._header(at, last)
            if header is None:
                if extended:
                    raise UserError(f"{self.path} ends within a header{_after(last)}", remedy=AGAIN)
                break
            start = at + _BLOCK
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extended |= self._pax(start, header.size, last)
            elif header.type == tarfile.XGLTYPE:
                for_all |= self._pax(start, header.size, last)
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = _text(self._meta(start, header.size, last).split(b"\0", 1)[0])
            elif header.type == tarfile.GNUTYPE_LONGLINK:
                self._meta(start, header.size, last)
            else:
                header = self._with_extended(header, for_all | extended, last)
                extended = {}
                last = header.name
                if header.type == tarfile.DIRTYPE:
                    header.size = 0
                elif header.type in tarfile.REGULAR_TYPES and header.type != tarfile.GNUTYPE_SPARSE:
                    found += 1
                    yield self._member(header, start)
                else:
                    raise UserError(
                        f"{self.path}, member {last}: is a link, device or sparse file",
                        remedy="write the tar from plain files (tar --dereference)",
                    )
            at = start + -(-header.size // _BLOCK) * _BLOCK
        if not found:
            raise UserError(f"{self.path} holds no member", remedy=AGAIN)

    def samples(self) -> Iterator[Sample]:
        """Members grouped by key. A leading `./` is no part of it; members named `__x__` are metadata of webdataset.

        Raises:
            UserError: as `members`; members of a key that are not adjacent or of the same name; a name without a dot.
        """
        current: Sample | None = None
        done: dict[str, tuple[str, ...]] = {}
        for member in self.members():
            name = member.name.removeprefix("./")
            if name.startswith("__") and name.endswith("__") and "/" not in name:
                continue
            folder, slash, file = name.rpartition("/")
            stem, dot, extension = file.partition(".")
            if not (stem and dot and extension):
                raise UserError(
                    f"{self.path}, member {member.name}: is not named KEY.TYPE",
                    remedy="leave it out, or name it after its film or shot",
                )
            key = folder + slash + stem
            if current is not None and current.key != key:
                done[current.key] = tuple(current.members)
                yield current
                current = None
            if extension in (current.members if current else done.get(key, ())):
                raise UserError(f"{self.path}, member {member.name}: occurs twice", remedy="give every key once")
            if current is None:
                if key in done:
                    raise UserError(
                        f"{self.path}, member {member.name}: lies apart from the other members of {key}",
                        remedy="write all members of a key one after another (tar --sort=name)",
                    )
                current = Sample(key, {})
            current.members[extension] = member
        if current is not None:
            yield current

    def _header(self, at: int, last: str) -> tarfile.TarInfo | None:
        """The header at a byte; None at the end of the archive."""
        if at + _BLOCK > self.size:
            raise UserError(
                f"{self.path} is cut off{_after(last)}: it ends without the end-of-archive blocks", remedy=AGAIN
            )
        block = bytes(self.read(at, _BLOCK))
        if not any(block):
            self._check_end(at, last)
            return None
        if at == 0 and block.startswith(_GZIP):
            raise UserError(f"{self.path} is compressed", remedy="unpack it with gunzip: rows are read from plain tars")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise UserError(
                f"{self.path}: the tar header at byte {at}{_after(last)} is damaged: {error}", remedy=AGAIN
            ) from error
        if header.size < 0:
            raise UserError(f"{self.path}: the tar header at byte {at}{_after(last)} is damaged", remedy=AGAIN)
        return header

    def _check_end(self, at: int, last: str) -> None:
        """Raise UserError unless zeros, and not too few or many, fill the file from `at` on."""
        rest = self.size - at
        if any(self.read(at, min(rest, _MOST_ZEROS + 1))):
            raise UserError(
                f"{self.path}: there is data after the end-of-archive block at byte {at}{_after(last)}: "
                "a header was zeroed, or tars were joined",
                remedy=AGAIN,
            )
        if rest < 2 * _BLOCK or rest % _BLOCK:
            raise UserError(f"{self.path} is cut off{_after(last)}: its end-of-archive blocks are cut", remedy=AGAIN)
        if rest > _MOST_ZEROS:
            raise UserError(
                f"{self.path} ends in {rest} bytes of zeros{_after(last)}: its tail was lost",
                remedy=f"{AGAIN}, with tar's usual record size",
            )

    def _with_extended(self, header: tarfile.TarInfo, extended: dict[str, str], last: str) -> tarfile.TarInfo:
        """The header with what PAX headers and long names before it say."""
        header.name = extended.get("path", header.name).rstrip("/")
        if any(key.startswith("GNU.sparse") for key in extended):
            header.type = tarfile.GNUTYPE_SPARSE
        if "size" in extended:
            if not extended["size"].isdecimal():
                raise UserError(f"{self.path}: the PAX header{_after(last)} is damaged", remedy=AGAIN)
            header.size = int(extended["size"])
        return header

    def _member(self, header: tarfile.TarInfo, start: int) -> Member:
        padded = start + -(-header.size // _BLOCK) * _BLOCK
        if padded > self.size:
            raise UserError(
                f"{self.path} is cut inside of member {header.name}: it has {self.size} bytes, not {padded} or more",
                remedy=AGAIN,
            )
        return Member(header.name, start, header.size)

    def _meta(self, start: int, size: int, last: str) -> bytes:
        if size > _MOST_META or start + size > self.size:
            raise UserError(f"{self.path} is cut or damaged in the header{_after(last)}", remedy=AGAIN)
        return bytes(self.read(start, size))

    def _pax(self, start: int, size: int, last: str) -> dict[str, str]:
        """The records `LENGTH KEY=VALUE\\n` of a PAX header."""
        data, records = self._meta(start, size, last), {}
        while data:
            length, _, _ = data.partition(b" ")
            record = data[: int(length)] if length.isdigit() and 0 < len(length) < 8 else b""
            key, equals, value = record[len(length) + 1 :].partition(b"=")
            if not (key and equals and len(record) == int(length) and value.endswith(b"\n")):
                raise UserError(f"{self.path}: the PAX header{_after(last)} is damaged", remedy=AGAIN)
            records[_text(key)] = _text(value[:-1])
            data = data[len(record) :]
        return records


def _after(last: str) -> str:
    return f" after member {last}" if last else ""


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
