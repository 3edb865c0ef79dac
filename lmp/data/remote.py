"""Files that fsspec reaches: ranges merged and asked for at once, passing errors waited out, lasting ones named."""

from __future__ import annotations

import errno
import io
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from lmp.data.storage import MISSING, Range, ReadError
from lmp.errors import UserError

READ_PATIENCE_S = 120.0
"""How long reading waits for a storage that fails for passing reasons: a run outlives a blip of the network."""
ASK_PATIENCE_S = 10.0
"""The same where somebody waits for the start."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0
_MERGE_GAP = 1 << 16  # ranges closer than this are one request: cheaper than one more
_MERGED = 1 << 24  # longer ones are several, which run beside each other
_LIST_FROM = 8  # asking for more sizes than this in a folder: list the folder
_THREADS = 16
_CONNECTIONS = 64  # botocore's own default of 10 holds back the reading of many small files
_PIECE = 1 << 23

# What fsspec's file systems call the facts of a file that differ once it was written anew.
_CHANGING = ("size", "ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "Digest", "Last-Modified", "mtime", "created")

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf", "http": "http", "https": "http"}
_ACCESS = {
    "s3": "check the address, and set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; a public bucket "
    "needs FSSPEC_S3_ANON=true",
    "gcs": "check the address, and run `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "check the address, and run `hf auth login` or set HF_TOKEN",
}
_SERVER = "check that the server is up and can be reached from here"
_ENDPOINT = {"s3": f"{_SERVER}; FSSPEC_S3_ENDPOINT_URL names a server other than Amazon's"}
_RANGES = (
    "serve the folder by a server that answers ranges, such as nginx or an object store, or copy it to a local disk"
)

_T = TypeVar("_T")
_Asked = tuple[str, int, int | None]  # bytes [start, stop) of a file, to its end if None


class RemoteFiles:
    """Ranges of files that an fsspec file system reaches; all ranges of a call at once, close ones merged."""

    in_order = False

    def __init__(self, file_system: Any) -> None:
        self.file_system = file_system
        # What fsspec does not run side by side by itself, or has no call for.
        self._pool = ThreadPoolExecutor(_THREADS, "lmp-remote")

    def read(self, ranges: Sequence[Range]) -> None:
        """See Files.read. Requests that fail for a passing reason are made again, for READ_PATIENCE_S."""
        waiting = list(_merge(ranges))
        pauses = _pauses(READ_PATIENCE_S)
        while waiting:
            failed: list[_Span] = []
            for span, answer in zip(waiting, self._cat([s.asked for s in waiting]), strict=True):
                if isinstance(answer, Exception):
                    if not (may_pass(answer) and (bool(failed) or next(pauses, False))):
                        raise _read_error(span.ranges[0], answer)
                    failed.append(span)
                    continue
                _check_length(span, len(answer))
                for wanted in span.ranges:
                    at = wanted.offset - span.start
                    wanted.buffer[:] = answer[at : at + len(wanted.buffer)]
            waiting = failed

    def contents(self, paths: Sequence[str]) -> list[bytes | None]:
        """See Files.contents; all at once."""
        # Without a start s3fs asks for each size first; with one an empty file is a range that is not there.
        return self._ask(
            paths,
            lambda some: [b"" if _status(a) == 416 else a for a in self._cat([(p, 0, None) for p in some])],
        )

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """See Files.sizes; one listing for a folder of which many files are asked for."""
        return self._ask(paths, self._sizes)

    def version(self, path: str) -> list[str] | None:
        """What changes with a file's content, as far as its store tells: size, etag, checksum, time; None: no file.

        Raises:
            UserError: the storage does not answer, or refuses.
        """
        return self._ask([path], lambda some: self._each(self._version, some))[0]

    def names(self, folder: str) -> list[str]:
        """Names of what lies in a folder, sorted; none where there is no such folder.

        Raises:
            UserError: the storage does not answer, or refuses.
        """
        return self._ask([folder], lambda some: self._each(self._names, some))[0] or []

    def open(self, path: str) -> BinaryIO:
        """See Files.open."""
        try:
            (size,) = self.sizes([path])
        except UserError as error:
            raise OSError(errno.EIO, error.problem, path) from error
        if size is None:
            raise FileNotFoundError(errno.ENOENT, MISSING, path)
        return cast(BinaryIO, io.BufferedReader(_Stream(self, path, size), _PIECE))

    def forget(self, path: str) -> bool:
        """See Files.forget."""
        return False

    def _cat(self, asked: Sequence[_Asked]) -> list[Any]:
        """The bytes of each, or the exception."""
        if self.file_system.async_impl:
            paths, starts, stops = (list(column) for column in zip(*asked, strict=True))
            return self.file_system.cat_ranges(paths, starts, stops, on_error="return")
        return self._each(lambda a: self.file_system.cat_file(a[0], start=a[1], end=a[2]), asked)

    def _sizes(self, paths: Sequence[str]) -> list[Any]:
        """The size of each, or the exception."""
        listed: dict[str, int | None] = {}
        folders = Counter(p.rpartition("/")[0] for p in paths)
        for folder in (f for f, count in folders.items() if count > _LIST_FROM):
            try:
                self.file_system.invalidate_cache(folder)
                entries = self.file_system.ls(folder, detail=True)
            except Exception as error:
                if may_pass(error):
                    return [error] * len(paths)
                continue  # not every store lists; asking for each file says what is wrong
            listed |= {f"{folder}/{e['name'].rpartition('/')[2]}": e["size"] for e in entries}
        unknown = [p for p in paths if listed.get(p) is None]
        found = dict(zip(unknown, self._each(self._size, unknown), strict=True))
        return [found[p] if p in found else listed[p] for p in paths]

    def _size(self, path: str) -> int:
        self.file_system.invalidate_cache(path)
        size = self.file_system.info(path)["size"]
        if size is None:
            raise ValueError("the server does not tell the file's size")
        return size

    def _version(self, path: str) -> list[str]:
        self.file_system.invalidate_cache(path)
        facts = self.file_system.info(path)
        return [f"{name} {facts[name]}" for name in _CHANGING if facts.get(name) is not None]

    def _names(self, folder: str) -> list[str]:
        self.file_system.invalidate_cache(folder)
        return sorted(found.rstrip("/").rpartition("/")[2] for found in self.file_system.ls(folder, detail=False))

    def _each(self, ask: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Of each its answer, or the exception."""

        def answer(item: Any) -> Any:
            try:
                return ask(item)
            except Exception as error:
                return error

        return list(self._pool.map(answer, items))

    def _ask(self, paths: Sequence[str], ask: Callable[[Sequence[str]], list[_T]]) -> list[Any]:
        """The answer for each file, None where it is missing; asked again, for ASK_PATIENCE_S, what may pass."""
        found: dict[str, Any] = {}
        waiting = list(paths)
        pauses = _pauses(ASK_PATIENCE_S)
        while waiting:
            failed: list[str] = []
            for path, answer in zip(waiting, ask(waiting), strict=True):
                if not isinstance(answer, Exception):
                    found[path] = answer
                elif _missing(answer):
                    found[path] = None
                elif may_pass(answer) and (bool(failed) or next(pauses, False)):
                    failed.append(path)
                else:
                    raise UserError(f"{path} cannot be read: {_told(answer)}", remedy=_remedy(path, answer)) from answer
            waiting = failed
        return [found[p] for p in paths]


def file_system(url: str) -> Any:
    """The fsspec file system of a URL.

    Raises:
        UserError: a kind that fsspec does not know, or whose package is not installed.
    """
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        config = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": _CONNECTIONS, **config}
    try:
        return fsspec.core.url_to_fs(url, **options)[0]
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'lmp[{extra}]'" if extra else f"install the fsspec package for {protocol}://"
        raise UserError(f"{url}: the package that reads {protocol}:// is not installed", remedy=remedy) from error
    except ValueError as error:
        raise UserError(
            f"{url} is no address that fsspec understands: {error}",
            remedy="give a local path, or a URL such as s3://bucket/folder",
        ) from error
    except Exception as error:
        raise UserError(f"{url} cannot be reached: {_told(error)}", remedy=_remedy(url, error)) from error


def may_pass(error: Exception) -> bool:
    """Whether trying again could help."""
    if isinstance(error, TimeoutError):
        return True
    if (status := _status(error)) is not None:
        return status in (408, 425, 429) or (status >= 500 and status != 501)
    kinds = {c.__name__ for c in type(error).__mro__}
    if "BotoCoreError" in kinds:  # never translated; most tell of the configuration
        return bool(kinds & {"ConnectionError", "HTTPClientError", "ResponseParserError", "IncompleteReadError"})
    if isinstance(error, FileNotFoundError):
        return not _missing(error)
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG):
        return False
    lasting = LookupError | ValueError | TypeError | AttributeError | NotImplementedError
    return not isinstance(error, lasting) and "DefaultCredentialsError" not in kinds


class _Span(NamedTuple):
    """Bytes [start, stop) of a file, and the ranges that lie in them."""

    path: str
    start: int
    stop: int
    ranges: list[Range]

    @property
    def asked(self) -> _Asked:
        return self.path, self.start, self.stop


class _Stream(io.RawIOBase):
    """A file from start to end, by ranges."""

    def __init__(self, files: RemoteFiles, path: str, size: int) -> None:
        self._files, self._path, self._size, self._at = files, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        if view:
            try:
                self._files.read([Range(self._path, self._at, view)])
            except ReadError as error:
                raise OSError(errno.EIO, error.problem, self._path) from error
        self._at += len(view)
        return len(view)


def _merge(ranges: Iterable[Range]) -> Iterator[_Span]:
    """Ranges of one file with small gaps between them, as one."""
    path, start, stop, held = "", 0, 0, list[Range]()
    for wanted in sorted(ranges, key=lambda r: (r.path, r.offset)):
        end = wanted.offset + len(wanted.buffer)
        near = held and path == wanted.path and wanted.offset - stop <= _MERGE_GAP
        if near and max(stop, end) - start <= _MERGED:
            stop = max(stop, end)
            held.append(wanted)
            continue
        if held:
            yield _Span(path, start, stop, held)
        path, start, stop, held = wanted.path, wanted.offset, end, [wanted]
    if held:
        yield _Span(path, start, stop, held)


def _pauses(patience_s: float) -> Iterator[bool]:
    """Waits, longer each time, before each True; ends once `patience_s` have gone by since the first call."""
    deadline, wait = time.monotonic() + patience_s, _FIRST_WAIT_S
    while time.monotonic() + wait < deadline:
        time.sleep(wait)
        yield True
        wait = min(2 * wait, _LONGEST_WAIT_S)


def _check_length(span: _Span, length: int) -> None:
    wanted = span.stop - span.start
    if length < wanted:
        raise ReadError(span.ranges[0], f"the file ends before byte {span.stop}")
    if length > wanted:
        raise ReadError(span.ranges[0], "the server sends the whole file when asked for a range of it", remedy=_RANGES)


def _read_error(wanted: Range, error: Exception) -> ReadError:
    if _missing(error):
        found = ReadError(wanted, MISSING)
    elif _status(error) == 416:
        found = ReadError(wanted, f"the file ends before byte {wanted.offset + len(wanted.buffer)}")
    else:
        found = ReadError(wanted, _told(error), remedy=_remedy(wanted.path, error))
    found.__cause__ = error
    return found


def _missing(error: Exception) -> bool:
    """Whether the file is not there, though its bucket is and the server has said so."""
    if not isinstance(error, FileNotFoundError) or _code(error) == "NoSuchBucket":
        return False
    if (status := _status(error)) is not None:
        return status in (404, 410)
    # fsspec's http gives FileNotFoundError for a server that is down, too.
    return not (isinstance(error.__cause__, Exception) and may_pass(error.__cause__))


def _remedy(path: str, error: Exception) -> str:
    protocol = path.partition("://")[0]
    protocol = {"s3a": "s3", "gs": "gcs"}.get(protocol, protocol)
    kinds = {c.__name__ for c in type(error).__mro__}
    unknown_user = kinds & {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
    if unknown_user or isinstance(error, PermissionError) or _status(error) in (401, 403):
        return _ACCESS.get(protocol, "check the address and who may read it")
    if _code(error) == "NoSuchBucket":
        return "give a bucket that exists, and check FSSPEC_S3_ENDPOINT_URL if the server is not Amazon's"
    if may_pass(error):
        return _ENDPOINT.get(protocol, _SERVER)
    return "check the address and the configuration of its storage"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(answer: Any) -> int | None:
    """The HTTP status that an error tells of; each library keeps it elsewhere."""
    for cause in _causes(answer) if isinstance(answer, Exception) else ():
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for found in (getattr(cause, "status", None), getattr(cause, "code", None), response):
            found = getattr(found, "status_code", found)
            if isinstance(found, int | str) and str(found).isdigit() and 400 <= int(found) < 600:
                return int(found)
        if isinstance(cause, OSError) and str(cause).startswith("Forbidden: "):  # gcsfs leaves nothing but the text
            return 403
    return None


def _code(error: Exception) -> str | None:
    """The error code of an S3 answer."""
    for cause in _causes(error):
        if isinstance(response := getattr(cause, "response", None), dict):
            return response.get("Error", {}).get("Code")
    return None


def _told(error: Exception) -> str:
    """The error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
