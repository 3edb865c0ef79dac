"""Reading files wherever they lie: local paths by preadv, URLs through fsspec. The only place that knows how.

A location is a local path or a URL (`s3://bucket/folder`, `gs://`, `hf://`, `https://`, `memory://`). Credentials and
endpoints come from fsspec's own configuration (`FSSPEC_S3_ENDPOINT_URL`, `~/.config/fsspec/`) and each provider's.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from lmp.errors import UserError

_MAX_OPEN = 256  # well under the usual limit of 1024 descriptors of a process
_MERGE_GAP = 1 << 16  # remote ranges closer than this are one request: cheaper than another round trip
_RETRIES = 4
_FIRST_WAIT_S = 0.5
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf", "http": "http", "https": "http"}


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
    """

    def __init__(self, wanted: Range, problem: str) -> None:
        super().__init__(f"{wanted.path}: {problem}")
        self.range = wanted
        self.problem = problem


Done = Callable[[Range], None]


class Files(Protocol):
    """What a kind of storage can do; all of it from many threads at once."""

    def read(self, ranges: Sequence[Range], done: Done) -> None:
        """Fill every range and call `done` with each once it is filled.

        Raises:
            ReadError: for the first that cannot be read in full.
        """

    def contents(self, paths: Sequence[str]) -> list[bytes | None]:
        """Whole small files; None for each that is not there."""

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """Bytes of each file; None for each that is not there."""

    def open(self, path: str) -> BinaryIO:
        """For reading from start to end. Raises OSError."""


class LocalFiles:
    """Ranges of local files.

    Descriptors are kept open for the files used last. One is closed only when no thread reads from it any
    more: a reader holds a reference, and the file closes with the last reference.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, ranges: Sequence[Range], done: Done) -> None:
        """See Files.read; one after another."""
        for wanted in ranges:
            try:
                file = self._file(wanted.path)
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                problem = "the file is missing" if missing else error.strerror or str(error)
                raise ReadError(wanted, problem) from error
            read_fully(file.descriptor, wanted)
            done(wanted)

    def contents(self, paths: Sequence[str]) -> list[bytes | None]:
        """See Files.contents."""
        return [Path(p).read_bytes() if Path(p).is_file() else None for p in paths]

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """See Files.sizes."""
        return [Path(p).stat().st_size if Path(p).is_file() else None for p in paths]

    def open(self, path: str) -> BinaryIO:
        """See Files.open."""
        return Path(path).open("rb")

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


class RemoteFiles:
    """Ranges of files that an fsspec file system reaches; all ranges of a call at once, close ones merged."""

    def __init__(self, protocol: str, url: str) -> None:
        self.protocol = protocol
        self._fs = _file_system(protocol, url)

    def read(self, ranges: Sequence[Range], done: Done) -> None:
        """See Files.read. Requests that fail for a passing reason are made again, a few times."""
        merged = list(_merge(ranges))
        waiting = list(range(len(merged)))
        for attempt in range(_RETRIES + 1):
            spans = [merged[n] for n in waiting]
            answers = self._fs.cat_ranges(
                [s.path for s in spans], [s.start for s in spans], [s.stop for s in spans], on_error="return"
            )
            failed = []
            for number, span, answer in zip(waiting, spans, answers, strict=True):
                problem = _problem(span, answer)
                if problem is None:
                    for wanted in span.ranges:
                        at = wanted.offset - span.start
                        wanted.buffer[:] = answer[at : at + len(wanted.buffer)]
                        done(wanted)
                elif attempt < _RETRIES and _may_pass(answer):
                    failed.append(number)
                else:
                    raise ReadError(span.ranges[0], problem)
            if not failed:
                return
            waiting = failed
            time.sleep(_FIRST_WAIT_S * 2**attempt)

    def contents(self, paths: Sequence[str]) -> list[bytes | None]:
        """See Files.contents."""
        return [cast("bytes | None", v) for v in self._each(self._fs.cat, paths)]

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """See Files.sizes."""
        return self._each(lambda paths, on_error: dict(zip(paths, self._infos(paths), strict=True)), paths)

    def open(self, path: str) -> BinaryIO:
        """See Files.open."""
        return self._fs.open(path, "rb")

    def _infos(self, paths: list[str]) -> list[int | Exception]:
        """A listing of each folder, where the store lists; else one question per file."""
        listed: dict[str, int] = {}
        for folder in {p.rpartition("/")[0] for p in paths}:
            try:
                listed |= {self._fs._strip_protocol(e["name"]): e["size"] for e in self._fs.ls(folder, detail=True)}
            except (OSError, NotImplementedError, KeyError):
                continue
        found: list[int | Exception] = []
        for path in paths:
            size = listed.get(self._fs._strip_protocol(path))
            if size is None:
                try:
                    size = self._fs.info(path)["size"]
                except FileNotFoundError as error:
                    found.append(error)
                    continue
            found.append(size)
        return found

    def _each(self, ask: Callable[..., dict[str, Any]], paths: Sequence[str]) -> list[Any]:
        if not paths:
            return []
        stripped = [self._fs._strip_protocol(p) for p in paths]
        for attempt in range(_RETRIES + 1):
            try:
                answers = ask(list(stripped), on_error="return")
                values = [answers[p] for p in stripped]
                if bad := next((v for v in values if isinstance(v, Exception) and not _missing(v)), None):
                    raise bad
                return [None if isinstance(v, Exception) else v for v in values]
            except Exception as error:
                if attempt == _RETRIES or not _may_pass(error):
                    raise UserError(
                        f"{paths[0]} cannot be read: {_told(error)}",
                        remedy="check the address, the credentials and the network",
                    ) from error
                time.sleep(_FIRST_WAIT_S * 2**attempt)
        raise AssertionError


def is_url(location: str | Path) -> bool:
    """Whether a location is reached through fsspec."""
    return "://" in str(location)


def normal(location: str | Path) -> str:
    """A location without a trailing slash; `file://` becomes a local path."""
    text = str(location).removeprefix("file://")
    return text.rstrip("/") if is_url(text) else str(Path(text))


def join(folder: str, name: str) -> str:
    """The location of a file in a folder."""
    return f"{folder}/{name}"


def files_at(location: str) -> Files:
    """The storage of a location; one for all locations of a kind.

    Raises:
        UserError: a kind that is not known, or whose package is not installed.
    """
    protocol = location.partition("://")[0] if is_url(location) else ""
    with _LOCK:
        if protocol not in _FILES:
            _FILES[protocol] = RemoteFiles(protocol, location) if protocol else LocalFiles()
        return _FILES[protocol]


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


_FILES: dict[str, Files] = {}
_LOCK = threading.Lock()


class _OpenFile:
    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if (descriptor := getattr(self, "descriptor", None)) is not None:
            os.close(descriptor)


class _Span(NamedTuple):
    path: str
    start: int
    stop: int
    ranges: list[Range]


def _merge(ranges: Iterable[Range]) -> Iterator[_Span]:
    """Ranges of one file with small gaps between them, as one."""
    span: _Span | None = None
    for wanted in sorted(ranges, key=lambda r: (r.path, r.offset)):
        stop = wanted.offset + len(wanted.buffer)
        if span and span.path == wanted.path and wanted.offset - span.stop <= _MERGE_GAP:
            span.ranges.append(wanted)
            span = span._replace(stop=max(span.stop, stop))
            continue
        if span:
            yield span
        span = _Span(wanted.path, wanted.offset, stop, [wanted])
    if span:
        yield span


def _file_system(protocol: str, url: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'lmp[{extra}]'" if extra else f"install the fsspec package for {protocol}://"
        raise UserError(f"{url}: the package that reads {protocol}:// is not installed", remedy=remedy) from error
    except ValueError as error:
        raise UserError(
            f"{url}: {protocol}:// is no kind of address that fsspec knows",
            remedy="give a local path, or a URL such as s3://bucket/folder",
        ) from error


def _problem(span: _Span, answer: Any) -> str | None:
    if isinstance(answer, Exception):
        return "the file is missing" if _missing(answer) else _told(answer)
    if len(answer) < span.stop - span.start:
        return f"the file ends before byte {span.stop}"
    return None


def _missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError | KeyError)


def _may_pass(answer: Any) -> bool:
    """Whether trying again could help."""
    lasting = FileNotFoundError | PermissionError | KeyError | NotImplementedError | UserError
    out_of_range = isinstance(answer, OSError) and answer.errno == errno.EINVAL
    return isinstance(answer, Exception) and not isinstance(answer, lasting) and not out_of_range


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
