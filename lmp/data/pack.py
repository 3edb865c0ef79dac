"""Which lengths share a row (best-fit decreasing), and which rows go to which rank."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

_BLOCK = 4096
_ROWS_PER_BLOCK = 128


def pack_lengths(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items, in blocks of consecutive ones, into rows of `capacity`.

    Blocks keep the rows as random as the order of the items; a block is long enough (4096 items, and about
    128 rows) that its unfilled last rows weigh little.

    Args:
        lengths: int64 [W], each 1..capacity.

    Returns:
        items: int64 [W], item numbers, row after row.
        bounds: int64 [N + 1], row n holds items[bounds[n]:bounds[n + 1]].
    """
    total = int(lengths.sum())
    block = max(_BLOCK, -(-_ROWS_PER_BLOCK * capacity * len(lengths) // max(total, 1)))
    rows: list[list[int]] = []
    for start in range(0, len(lengths), block):
        part = lengths[start : start + block]
        order = np.argsort(-part, kind="stable")
        rows += _best_fit((order + start).tolist(), part[order].tolist(), capacity)
    items = np.array([item for row in rows for item in row], dtype=np.int64)
    bounds = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=bounds[1:])
    return items, bounds


def _best_fit(items: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    """Put each item (longest first) into the fullest row that still holds it."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> rows
    rooms: list[int] = []  # the keys of with_room, ascending
    for item, length in zip(items, lengths, strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(item)
        room -= length
        if room > 0:
            if room not in with_room:
                with_room[room] = []
                insort(rooms, room)
            with_room[room].append(row)
    return rows


def deal_costs(costs: list[int], ranks: int) -> list[list[int]]:
    """Deal items to ranks, equally many each, so that the ranks' total costs come out even.

    Round by round from the costliest item down, the rank with the least so far takes the costliest of the
    round. So what the ranks work on at the same time costs about the same too, and the costliest come first.

    Args:
        costs: as many as a multiple of `ranks`.

    Returns:
        Per rank its item numbers, in the order in which it works on them.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for start in range(0, len(order), ranks):
        takers = sorted(range(ranks), key=lambda r: (loads[r], r))
        for rank, item in zip(takers, order[start : start + ranks], strict=True):
            dealt[rank].append(item)
            loads[rank] += costs[item]
    return dealt
