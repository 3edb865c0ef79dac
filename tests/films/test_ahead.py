"""Reading ahead: the same items, a bounded number of bytes, errors in their place."""

from __future__ import annotations

import threading
from collections.abc import Generator

import numpy as np
import pytest

from lmp.films.ahead import read_ahead


def test_reading_is_ahead_by_so_many_bytes() -> None:
    """The maker stops by itself once three items of ten bytes wait; each one taken lets it make another."""
    made: list[int] = []
    enough = threading.Event()

    def items() -> Generator[np.ndarray]:
        for number in range(20):
            made.append(number)
            if number == 4:
                enough.set()
            yield np.full(10, number, np.uint8)

    ahead = read_ahead(items(), limit=30)
    taken = [next(ahead)]
    assert enough.wait(10)  # 0 was taken, 1 to 3 wait, 4 is made and finds no place
    assert made == [0, 1, 2, 3, 4]
    for item in ahead:
        taken.append(item)
        assert len(made) <= len(taken) + 4
    assert [item.tolist() for item in taken] == [[number] * 10 for number in range(20)]


def test_an_item_beyond_the_limit_passes_alone() -> None:
    sizes = (100, 5, 200)
    assert [item.nbytes for item in read_ahead((np.zeros(n, np.uint8) for n in sizes), limit=10)] == list(sizes)


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Generator[np.ndarray]:
        yield np.zeros(1)
        raise ValueError("broken")

    ahead = read_ahead(items())
    assert next(ahead).shape == (1,)
    with pytest.raises(ValueError, match="broken"):
        next(ahead)


def test_who_stops_early_closes_what_is_read() -> None:
    closed = threading.Event()

    def items() -> Generator[np.ndarray]:
        try:
            for _ in range(100):
                yield np.zeros(10, np.uint8)
        finally:
            closed.set()

    ahead = read_ahead(items(), limit=20)
    next(ahead)
    ahead.close()  # type: ignore[attr-defined]
    assert closed.is_set()
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())
