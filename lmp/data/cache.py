"""Whole shards kept on a disk of the node, for storage that is far or slow; shared by all processes of the node.

In the folder, KEY is what names a shard's bytes (their sha256, where it is known):

    KEY.tar     a whole, verified shard; its modification time is that of its last use
    KEY.part    one being fetched, as long from the start as it will be
    KEY.lock    held (flock) by whoever fetches, removes or looks for KEY in vain; empty, never removed
    cache.lock  held while room is made, and while a fetched shard takes its name

A process that is killed loses its locks, so what it left behind is seen to be nobody's. A shard may be removed at any
time by another process; a file that is open stays readable, so one is opened for each read and closed after it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from lmp.data.storage import Files, Range, ReadError, read_fully
from lmp.errors import UserError

if TYPE_CHECKING:
    from lmp.data.manifest import ShardEntry

_PIECE = 1 << 23
_AT_ONCE = 4  # pieces asked for together: one connection alone is slow on object stores
_AHEAD = 2  # threads that fetch ahead
_POLL_S = 0.05
_JOIN_S = 5.0
_NAME = re.compile(r"([0-9a-f]{64})\.(tar|part)")
_GIB = 1 << 30


class CachedShard(NamedTuple):
    """A shard that the cache can hold.

    Attributes:
        location: where it comes from.
        files: the storage of that place.
        bytes: its size.
        sha256: of its bytes, None if not known.
        key: 64 hexadecimal digits that name its content.
    """

    location: str
    files: Files
    bytes: int
    sha256: str | None
    key: str


def cached_shard(location: str, files: Files, entry: ShardEntry) -> CachedShard:
    """The shard that a manifest lists."""
    unknown = f"{location}\n{entry['bytes']}\n{entry['index_sha256']}"
    key = entry["sha256"] or hashlib.sha256(unknown.encode()).hexdigest()
    return CachedShard(location, files, entry["bytes"], entry["sha256"], key)


class ShardCache:
    """Copies of whole shards in a local folder, at most `max_bytes` of them; the least recently used make room.

    One process of the node fetches a shard, the others wait for it. What is being fetched counts in full.

    Args:
        folder: made if absent; on a disk of this node.
        max_bytes: at least the size of the largest shard; better what the nodes read in some steps.

    Raises:
        UserError: the folder cannot be made or written, or its file system has no locks.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._fault("cannot be made", error) from error
        with self._locked("cache"):
            pass
        self._queue: queue.SimpleQueue[CachedShard | None] = queue.SimpleQueue()
        self._queued: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._threads_lock = threading.Lock()
        self._closed = threading.Event()

    def check(self, shards: Iterable[CachedShard]) -> None:
        """Raise UserError if one of them is larger than the whole cache."""
        largest = max(shards, key=lambda s: s.bytes, default=None)
        if largest and largest.bytes > self.max_bytes:
            raise UserError(
                f"{largest.location} has {largest.bytes} bytes ({_gib(largest.bytes)}), "
                f"but the cache {self.folder} may hold {self.max_bytes} ({_gib(self.max_bytes)})",
                remedy="give data.cache.gib larger, write smaller shards, or do without the cache",
            )

    def open(self, shard: CachedShard) -> int:
        """A descriptor of the shard's copy, fetched if need be; to be closed by the caller, soon.

        Raises:
            ReadError: the source cannot be read, or is damaged; the range is an empty one.
            UserError: the shard is larger than the cache; its disk is full or cannot be written.
        """
        if (held := self._open_copy(shard)) is not None:
            return held
        self.check([shard])
        with self._locked(shard.key):
            if (held := self._open_copy(shard)) is not None:  # another process has fetched it meanwhile
                return held
            return self._fetch(shard)

    def fetch(self, shards: Iterable[CachedShard]) -> None:
        """Have shards fetched by threads, in this order, ahead of their use. Errors are left to who reads them."""
        for shard in shards:
            if (held := self._open_copy(shard)) is not None:
                os.close(held)
                continue
            with self._threads_lock:
                if self._closed.is_set() or shard.key in self._queued:
                    continue
                self._queued.add(shard.key)
                self._queue.put(shard)
                if len(self._threads) < _AHEAD:
                    # Daemons: a process that ends must not wait for a download; what they leave is nobody's.
                    self._threads.append(threading.Thread(target=self._work, daemon=True, name="lmp-fetch"))
                    self._threads[-1].start()

    def forget(self, shard: CachedShard) -> None:
        """Remove the copy of a shard."""
        with self._locked(shard.key):
            self._path(shard, "tar").unlink(missing_ok=True)

    def close(self) -> None:
        """Stop fetching ahead; what is under way is given up. Reading goes on working."""
        with self._threads_lock:
            self._closed.set()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _work(self) -> None:
        while (shard := self._queue.get()) is not None and not self._closed.is_set():
            with suppress(Exception):  # who reads it meets the error again, and says whose data it is
                os.close(self.open(shard))
            self._queued.discard(shard.key)

    def _give_up_if_closed(self) -> None:
        if self._closed.is_set() and threading.current_thread() in self._threads:
            raise _ClosedError

    def _open_copy(self, shard: CachedShard) -> int | None:
        path = self._path(shard, "tar")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._fault("cannot be read", error) from error
        if os.fstat(descriptor).st_size != shard.bytes:  # cut by a crash of the disk, or by somebody
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # a copy of another user: its age is as it is
            os.utime(descriptor)
        return descriptor

    def _fetch(self, shard: CachedShard) -> int:
        """Bring the shard in, its lock being held; a descriptor of it."""
        part = self._path(shard, "part")
        part.unlink(missing_ok=True)
        try:
            descriptor = self._reserve(part, shard.bytes)
            try:
                self._download(shard, descriptor)
                with self._writing():
                    os.fsync(descriptor)
                    with self._locked("cache"):  # or making room could see the shard under neither name
                        part.rename(self._path(shard, "tar"))
            except BaseException:
                os.close(descriptor)
                raise
        finally:
            part.unlink(missing_ok=True)
        return descriptor

    def _download(self, shard: CachedShard, descriptor: int) -> None:
        for _ in range(2):
            digest = hashlib.sha256()
            for offset, data in self._pieces(shard):
                digest.update(data)
                with self._writing():
                    _write_fully(descriptor, data, offset)
            if shard.sha256 is None or digest.hexdigest() == shard.sha256:
                return
        raise ReadError(_all_of(shard), "the shard is damaged: its sha256 is not that of its manifest")

    def _pieces(self, shard: CachedShard) -> Iterator[tuple[int, memoryview]]:
        """The source from start to end, some MB at a time."""
        (size,) = shard.files.sizes([shard.location])
        if size is not None and size != shard.bytes:
            raise ReadError(_all_of(shard), f"the file has {size} bytes, its manifest says {shard.bytes}")
        buffer = memoryview(bytearray(min(_PIECE * _AT_ONCE, shard.bytes)))
        for start in range(0, shard.bytes, len(buffer)):
            self._give_up_if_closed()
            data = buffer[: shard.bytes - start]
            shard.files.read(
                [Range(shard.location, start + at, data[at : at + _PIECE]) for at in range(0, len(data), _PIECE)]
            )
            yield start, data

    def _reserve(self, part: Path, size: int) -> int:
        """Make room for `size` bytes, waiting for others' downloads if it must be; an open file that holds it."""
        while True:
            with self._locked("cache"), self._writing():
                if self._make_room(size):
                    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                    os.ftruncate(descriptor, size)
                    return descriptor
            self._give_up_if_closed()
            time.sleep(_POLL_S)

    def _make_room(self, size: int) -> bool:
        """Remove what nobody fetches any more, then what was used least recently; whether `size` bytes fit now."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if match := _NAME.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        stat = entry.stat()
                        # Parts first: those that are nobody's are of no use.
                        found.append((match[2] == "tar", stat.st_mtime_ns, stat.st_size, match[1], Path(entry.path)))
        used = sum(held for _, _, held, _, _ in found)
        for whole, _, held, key, path in sorted(found):
            if whole and used + size <= self.max_bytes:
                break
            with self._locked(key, wait=False) as mine:
                if mine:
                    path.unlink(missing_ok=True)
                    used -= held
        return used + size <= self.max_bytes

    @contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold NAME.lock; without `wait`, yields False where another holds it."""
        path = self.folder / f"{name}.lock"
        with self._writing():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            mine = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                mine = False
            except OSError as error:
                raise UserError(
                    f"the file system of the cache {self.folder} has no file locks: {error.strerror}",
                    remedy="give data.cache.folder on a local disk of the node",
                ) from error
            yield mine
        finally:
            os.close(descriptor)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._fault("cannot be written", error) from error

    def _path(self, shard: CachedShard, kind: str) -> Path:
        return self.folder / f"{shard.key}.{kind}"

    def _fault(self, what: str, error: OSError) -> UserError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(
                f"the disk of the cache {self.folder} is full: {error.strerror}",
                remedy="free space there, give data.cache.gib smaller, or another data.cache.folder",
            )
        return UserError(
            f"the cache {self.folder} {what}: {error.strerror or error}",
            remedy="give data.cache.folder where this user may write",
        )


class CachedFiles:
    """Reading shards through a cache (a kind of storage.Files).

    Raises:
        UserError: a shard is larger than the cache.
    """

    in_order = True

    def __init__(self, cache: ShardCache, shards: Mapping[str, CachedShard]) -> None:
        """shards: by their location."""
        cache.check(shards.values())
        self.cache = cache
        self.shards = shards

    def read(self, ranges: Sequence[Range]) -> None:
        """See Files.read; shard by shard."""
        groups: dict[str, list[Range]] = {}
        for wanted in ranges:
            groups.setdefault(wanted.path, []).append(wanted)
        if len(groups) > 1:
            self.cache.fetch(self.shards[path] for path in groups)
        for path, group in groups.items():
            try:
                descriptor = self.cache.open(self.shards[path])
            except ReadError as error:
                raise ReadError(group[0], error.problem, remedy=error.remedy) from error
            try:
                for wanted in group:
                    read_fully(descriptor, wanted)
            finally:
                os.close(descriptor)

    def contents(self, paths: Sequence[str]) -> list[bytes | None]:
        """See Files.contents; of the sources."""
        return [self.shards[p].files.contents([p])[0] for p in paths]

    def sizes(self, paths: Sequence[str]) -> list[int | None]:
        """See Files.sizes; of the sources."""
        return [self.shards[p].files.sizes([p])[0] for p in paths]

    def open(self, path: str) -> BinaryIO:
        """See Files.open; the copy."""
        try:
            return os.fdopen(self.cache.open(self.shards[path]), "rb")
        except ReadError as error:
            raise OSError(errno.EIO, error.problem, path) from error

    def forget(self, path: str) -> bool:
        """See Files.forget."""
        self.cache.forget(self.shards[path])
        return True


class _ClosedError(Exception):
    """The cache was closed while a shard was being fetched."""


def _all_of(shard: CachedShard) -> Range:
    """What an error that concerns no range in particular names."""
    return Range(shard.location, 0, memoryview(b""))


def _write_fully(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _gib(size: int) -> str:
    return f"{size / _GIB:.3g} GiB"
