"""Reading ahead: a thread makes what comes next while the caller works on what came before."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Protocol, TypeVar


class _Weighed(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Weighed)
LIMIT = 32 << 20
"""Bytes that may wait."""


def read_ahead(items: Generator[T], *, limit: int = LIMIT) -> Iterator[T]:
    """The items in order, each made in a thread while the ones before it are used.

    At most `limit` bytes of items wait, or one item that is larger; one more is being made. An error in making
    one is raised in its place. Who stops early waits for the item that is being made.

    Args:
        items: closed at the end, or when the caller stops.
        limit: bytes.
    """
    changed = threading.Condition()
    waiting: deque[T] = deque()
    held = 0
    done = stopped = False
    fault: BaseException | None = None

    def make() -> None:
        nonlocal held, done, fault
        try:
            for item in items:
                with changed:
                    while waiting and held + item.nbytes > limit and not stopped:
                        changed.wait()
                    if stopped:
                        break
                    waiting.append(item)
                    held += item.nbytes
                    changed.notify_all()
            items.close()
        except BaseException as error:
            fault = error
        with changed:
            done = True
            changed.notify_all()

    # A daemon, for nothing that it does must be brought to an end when the interpreter leaves.
    thread = threading.Thread(target=make, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or done)
                if not waiting:
                    break
                item = waiting.popleft()
                held -= item.nbytes
                changed.notify_all()
            yield item
        if fault is not None:
            raise fault
    finally:
        with changed:
            stopped = True
            changed.notify_all()
        thread.join()
