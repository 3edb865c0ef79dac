"""Which lengths share a row (best-fit decreasing), and which rows go to which rank."""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heapify, heappush, heapreplace

import numpy as np

_BLOCK = 4096
_ROWS_PER_BLOCK = 128
_REOPENED = 8
_FULL = 0.95
_EVEN = 0.005
_SHORT = 16  # items of a 16th of a row or less are short


def pack_lengths(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items, in blocks of consecutive ones, into rows of `capacity`.

    Blocks keep the rows as random as the order of the items; a block is long enough (4096 items, and about
    128 rows) that each item finds company. The emptiest rows of a block are taken apart again and their items go
    with the next block.

    Args:
        lengths: int64 [W], each 1..capacity.

    Returns:
        items: int64 [W], item numbers, row after row.
        bounds: int64 [N + 1], row n holds items[bounds[n]:bounds[n + 1]].
    """
    total = int(lengths.sum())
    block = max(_BLOCK, -(-_ROWS_PER_BLOCK * capacity * len(lengths) // max(total, 1)))
    rows: list[list[int]] = []
    again = np.zeros(0, dtype=np.int64)
    for start in range(0, len(lengths), block):
        part = np.concatenate([again, np.arange(start, min(start + block, len(lengths)))])
        part = part[np.argsort(-lengths[part], kind="stable")]
        made = _fill_rows(part.tolist(), lengths[part].tolist(), capacity)
        if start + block < len(lengths):
            made, emptiest = _emptiest(made, lengths, capacity)
            again = np.array([item for row in emptiest for item in row], dtype=np.int64)
        rows += made
    items = np.array([item for row in rows for item in row], dtype=np.int64)
    bounds = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=bounds[1:])
    return items, bounds


def _fill_rows(items: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    """Long items, longest first, into the fullest row that still holds them; then short ones into the emptiest.

    Short items fit anywhere; best fit would lay those of one length, such as the showings of one film, in one row.
    """
    rows: list[list[int]] = []
    long = bisect_left(lengths, -capacity // _SHORT, key=lambda n: -n)
    with_room = _best_fit(rows, items[:long], lengths[:long], capacity)
    heap = [(-room, row) for room, held in with_room.items() for row in held]
    missing = sum(lengths[long:]) + sum(room for room, _ in heap)
    for _ in range(-(-missing // capacity)):
        heap.append((-capacity, len(rows)))
        rows.append([])
    heapify(heap)
    for item, length in zip(items[long:], lengths[long:], strict=True):
        if not heap or -heap[0][0] < length:
            heappush(heap, (-capacity, len(rows)))
            rows.append([])
        room, row = heap[0]
        rows[row].append(item)
        heapreplace(heap, (room + length, row))
    return rows


def _best_fit(rows: list[list[int]], items: list[int], lengths: list[int], capacity: int) -> dict[int, list[int]]:
    """Append rows that hold the items; returns the rows that have room, by how much."""
    with_room: dict[int, list[int]] = {}
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
    return with_room


def _emptiest(rows: list[list[int]], lengths: np.ndarray, capacity: int) -> tuple[list[list[int]], list[list[int]]]:
    """Set a few rows that are far from full aside: (the others, those)."""
    filled = np.array([lengths[row].sum() for row in rows])
    order = np.argsort(filled, kind="stable")[:_REOPENED]
    aside = {int(n) for n in order if filled[n] < _FULL * capacity}
    return [r for n, r in enumerate(rows) if n not in aside], [rows[n] for n in sorted(aside)]


def deal_costs(costs: list[int], ranks: int) -> list[list[int]]:
    """Deal items to ranks, equally many each, so that the ranks' total costs come out even.

    Round by round from the costliest item down, the rank with the least so far takes the costliest of the
    round; then the costliest rank exchanges items with others until all are even. Each rank works on its costliest
    first, so that what the ranks do at the same time costs about the same too.

    Args:
        costs: as many as a multiple of `ranks`.

    Returns:
        Per rank its item numbers, in the order in which it works on them.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    item_KR = np.zeros((len(costs) // ranks, ranks), dtype=np.int64)
    load_R = np.zeros(ranks, dtype=np.int64)
    cost_I = np.array(costs, dtype=np.int64)
    for round_, start in enumerate(range(0, len(order), ranks)):
        takers = np.argsort(load_R, kind="stable")
        item_KR[round_, takers] = order[start : start + ranks]
        load_R[takers] += cost_I[order[start : start + ranks]]
    _exchange(item_KR, cost_I[item_KR], load_R)
    by_cost_KR = np.argsort(-cost_I[item_KR], axis=0, kind="stable")
    return np.take_along_axis(item_KR, by_cost_KR, axis=0).T.tolist()


def _exchange(item_KR: np.ndarray, cost_KR: np.ndarray, load_R: np.ndarray) -> None:
    """Exchange items between the costliest rank and another while the costlier of the two gains and it matters."""
    enough = load_R.mean() * (1 + _EVEN)
    for _ in range(4 * load_R.size):
        most = int(load_R.argmax())
        if load_R[most] <= enough:
            return
        moved_KKR = cost_KR[:, most, None, None] - cost_KR
        after_KKR = np.maximum(load_R[most] - moved_KKR, load_R + moved_KKR)
        after_KKR[:, :, most] = load_R[most]
        mine, theirs, other = np.unravel_index(after_KKR.argmin(), after_KKR.shape)
        if after_KKR[mine, theirs, other] >= load_R[most]:
            return
        moved = moved_KKR[mine, theirs, other]
        load_R[most] -= moved
        load_R[other] += moved
        for table in (item_KR, cost_KR):
            table[mine, most], table[theirs, other] = table[theirs, other], table[mine, most]
