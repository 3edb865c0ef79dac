"""Reading files wherever they lie: local paths by preadv, URLs through fsspec (lmp.data.remote).

A location is a local path or a URL (`s3://bucket/folder`, `gs://`, `hf://`, `https://`, `memory://`). Credentials and
endpoints come from fsspec's own configuration (`FSSPEC_S3_ENDPOINT_URL`, `~/.config/fsspec/`) and each provider's.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from lmp.errors import UserError

_T = TypeVar("_T")

MISSING = "the file is missing"
_MAX_OPEN = 256  # well under the usual limit of 1024 descriptors of a process


class Range(NamedTuple):
    """Bytes wanted: `buffer` (flat) is to be filled from `offset` of the file at `path` on."""

    path: str
    offset: int
    buffer: memoryview
    tag: Any = None


class ReadError(Exception):
    """A range could not be read in full: the file is missing, shorter, or gave an error.

    Attributes:
        range: the range.
        problem: what went wrong, without the path.
        remedy: what to do about it, where the file itself is not to blame; else None.
    """

    def __init__(self, wanted: Range, problem: str, *, remedy: str | None = None) -> None:
        super().__init__(f"{wanted.path}: {problem}")
        self.range = wanted
        self.problem = problem
        self.remedy = remedy


class Files(Protocol):
    """What a kind of storage can do; all of it from many threads at once."""

    in_order: bool
    """Whether ranges are filled one after another, in the order given within a file; else all at once."""

    def read(self, ranges: Sequence[Range]) -> None:
        """Fill every range.

        Raises:
            ReadError: for the first that cannot be read in full.
        """

    def contents(self, paths: Sequence[str]) -> list[bytes | None]:
        """Whole small files; None for each that is not there.

        Raises:
            UserError: the storage does not answer, or refuses.
        """

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Bytes of each file; None for each that is not there.

        Raises:
            UserError: the storage does not answer, or refuses.
        """

    def open(self, path: str) -> BinaryIO:
        """For reading from start to end. Raises OSError."""

    def forget(self, path: str) -> bool:
        """Drop the copy of this file that reading goes through, as damaged; False where there is none."""


class LocalFiles:
    """Ranges of local files.

    Descriptors are kept open for the files used last. One is closed only when no thread reads from it any
    more: a reader holds a reference, and the file closes with the last reference.
    """

    in_order = True

    def __init__(self) -> None:
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, ranges: Sequence[Range]) -> None:
        """See Files.read; one after another."""
        for wanted in ranges:
            try:
                file = self._file(wanted.path)
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                raise ReadError(wanted, MISSING if missing else error.strerror or str(error)) from error
            read_fully(file.descriptor, wanted)

    def contents(self, paths: Sequence[str]) -> list[bytes | None]:
        """See Files.contents."""
        return [_unless_missing(p, lambda path: path.read_bytes()) for p in paths]

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """See Files.sizes."""
        return [_unless_missing(p, lambda path: path.stat().st_size) for p in paths]

    def open(self, path: str) -> BinaryIO:
        """See Files.open."""
        return Path(path).open("rb")

    def forget(self, path: str) -> bool:
        """See Files.forget."""
        return False

    def _file(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = _OpenFile(path)
                if len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return file


def is_url(location: str | Path) -> bool:
    """Whether a location is reached through fsspec."""
    return "://" in str(location)


def normal(location: str | Path) -> str:
    """A location without trailing slashes; `file://` becomes a local path."""
    text = str(location).removeprefix("file://")
    if not is_url(text):
        return str(Path(text))
    protocol, _, rest = text.partition("://")
    return f"{protocol}://{rest.rstrip('/')}"


def join(folder: str, name: str) -> str:
    """The location of a file in a folder."""
    return f"{folder}/{name}"


def files_at(location: str) -> Files:
    """The storage of a location; one for all locations that the same file system reaches.

    Raises:
        UserError: a kind that is not known, or whose package is not installed.
    """
    if not is_url(location):
        return _LOCAL
    protocol, _, rest = location.partition("://")
    root = f"{protocol}://{rest.partition('/')[0]}"
    with _LOCK:
        if root not in _REMOTE:
            from lmp.data.remote import RemoteFiles, file_system

            found = file_system(location)
            same = (f for f in _REMOTE.values() if isinstance(f, RemoteFiles) and f.file_system is found)
            _REMOTE[root] = next(same, None) or RemoteFiles(found)
        return _REMOTE[root]


def read_fully(descriptor: int, wanted: Range) -> None:
    """Fill one range from an open file.

    Raises:
        ReadError: the file ends before, or cannot be read.
    """
    done, size = 0, len(wanted.buffer)
    while done < size:
        try:
            got = os.preadv(descriptor, [wanted.buffer[done:]], wanted.offset + done)
        except OSError as error:
            raise ReadError(wanted, error.strerror or str(error)) from error
        if got == 0:
            raise ReadError(wanted, f"the file ends before byte {wanted.offset + size}")
        done += got


_LOCAL = LocalFiles()
_REMOTE: dict[str, Files] = {}
_LOCK = threading.Lock()


def _unless_missing(path: str, ask: Callable[[Path], _T]) -> _T | None:
    try:
        return ask(Path(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}", remedy="check the path, and who may read it"
        ) from error


class _OpenFile:
    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if (descriptor := getattr(self, "descriptor", None)) is not None:
            os.close(descriptor)
