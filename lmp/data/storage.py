"""Ranged reads of shard files: the only place that knows where the bytes lie."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

_MAX_OPEN = 256  # well under the usual limit of 1024 descriptors of a process


class ShortReadError(Exception):
    """A file ended before the bytes asked for."""


class LocalFiles:
    """Reads ranges of local files; may be used by many threads at once.

    Descriptors are kept open for the files used last. One is closed only when no thread reads from it any
    more: a reader holds a reference, and the file closes with the last reference.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (flat, bytes) from `offset` on.

        Raises:
            ShortReadError: the file ends before.
            OSError: the file cannot be opened or read; its name is in the message.
        """
        file = self._file(path)
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(file.descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
            if got == 0:
                raise ShortReadError(f"the file ends before byte {offset + len(buffer)}")
            done += got

    def _file(self, path: Path) -> _OpenFile:
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = _OpenFile(path)
                if len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return file


class _OpenFile:
    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if (descriptor := getattr(self, "descriptor", None)) is not None:
            os.close(descriptor)
