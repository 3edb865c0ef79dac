"""The readers that `lmp bench data` compares. Each runs in a process of its own; see `measure`."""

from __future__ import annotations

import gc
import itertools
import os
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lmp.data.index import FilmIndex
from lmp.errors import UserError

_RAW_PIECE = 4 << 20
_RAW_BLOCK, _RAW_BLOCKS = 16 << 20, 3
_WINDOW = 60
_PEER_CHUNK = 64 << 20


class Places(NamedTuple):
    """Where readers find the films: the folder of shards, and the same films as litdata's chunks."""

    shards: Path
    litdata: Path


Open = Callable[[Places], Iterator[int]]
"""Gets ready (imports, index) and returns an iterator that reads: it gives the bytes of one item after another."""


@dataclass(frozen=True)
class Reader:
    """One way to read every byte of the shards once.

    Attributes:
        name: how the command line and the report call it.
        items: what it delivers one by one.
        open: see Open.
        needs: packages that it imports and lmp does not require.
    """

    name: str
    items: str
    open: Open
    needs: tuple[str, ...] = ()


class Reading(NamedTuple):
    """One reading from start to end: what was delivered, wall-clock, and user and system time with children."""

    items: int
    bytes: int
    seconds: float
    cpu_seconds: float


def readers() -> dict[str, Reader]:
    """All of them by name, in the order of the report."""
    packs = [
        Reader(f"lmp-{label}-t{threads}", "packs", partial(_packs, shots=shots, window=window, threads=threads))
        for label, shots, window in (("packs4096", 4096, None), ("packs256", 256, _WINDOW))
        for threads in (0, 1, 2)
    ]
    found = [
        Reader("raw", "pieces", partial(_raw, summed=False)),
        Reader("raw+sum", "pieces", partial(_raw, summed=True)),
        Reader("raw-plain", "pieces", _raw_plain),
        Reader("raw-blocks", "pieces", _raw_blocks),
        Reader("lmp-films", "films", _films),
        Reader("lmp-windows", "windows", _windows),
        *packs,
        Reader("webdataset", "films", _webdataset),
        *(
            Reader(f"webdataset+torchdata-w{n}", "films", partial(_webdataset_loader, workers=n), ("torchdata",))
            for n in (0, 2)
        ),
        Reader("litdata-w0", "films", partial(_litdata, workers=0), ("litdata",)),
        Reader("litdata-w0+copy", "films", partial(_litdata, workers=0, copied=True), ("litdata",)),
        Reader("litdata-w2", "films", partial(_litdata, workers=2), ("litdata",)),
    ]
    return {reader.name: reader for reader in found}


class Failure(NamedTuple):
    """What a process sends in place of its answer; `remedy` where it is a UserError's."""

    problem: str
    remedy: str | None


def measure(name: str, places: Places, answer: Connection) -> None:
    """Target of a process: read once and send a Reading, or a Failure."""

    def read() -> Reading:
        found = readers()[name].open(places)
        gc.collect()
        gc.freeze()  # going through what the imports left would cost more than a small reading
        cpu, start = _cpu_seconds(), time.perf_counter()
        items = total = 0
        for size in found:
            items += 1
            total += size
        seconds = time.perf_counter() - start
        del found
        gc.collect()  # workers that still run are waited for, so that their time is counted
        return Reading(items, total, seconds, _cpu_seconds() - cpu)

    run_in_child(read, answer)


def run_in_child(work: Callable[[], Any], answer: Connection) -> None:
    """Send what `work` returns, or a Failure; what packages print is dropped."""
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    try:
        answer.send(work())
    except UserError as error:
        answer.send(Failure(error.problem, error.remedy))
    except BaseException:
        answer.send(Failure(traceback.format_exc(), None))
    answer.close()


def write_litdata(places: Places, answer: Connection) -> None:
    """Target of a process: the films of the shards as litdata's chunks, by its own optimize()."""

    def write() -> None:
        keep_litdata_in(places.litdata.parent)
        import litdata

        litdata.optimize(
            partial(_film_tensors, str(places.shards)),
            list(range(len(FilmIndex.load(places.shards)))),
            str(places.litdata),
            chunk_bytes=_PEER_CHUNK,
            num_workers=1,
            verbose=False,
        )

    run_in_child(write, answer)


def keep_litdata_in(folder: Path) -> None:
    """Its caches would lie in the home folder otherwise."""
    for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        os.environ[name] = str(folder / name.lower())


def _film_tensors(shards: str, film: int) -> dict[str, torch.Tensor]:
    """Runs in litdata's worker."""
    index = FilmIndex.load(shards)
    rows = index.read(film, 0, int(index.shots[film]))
    return {column.name: rows.column(column.name) for column in index.columns}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _row_bytes(index: FilmIndex) -> int:
    return sum(column.row_bytes for column in index.columns)


def _raw(places: Places, *, summed: bool) -> Iterator[int]:
    """The fastest that one thread can: into one aligned buffer again and again."""
    return _read_into(places, [_aligned(_RAW_PIECE)], summed=summed)


def _raw_plain(places: Places) -> Iterator[int]:
    """As a program reads that does not think of alignment: into one bytearray."""
    return _read_into(places, [np.frombuffer(bytearray(_RAW_PIECE), np.uint8)], summed=False)


def _raw_blocks(places: Places) -> Iterator[int]:
    """Into as much memory as packs of 4,096 shots take that are made, ready and in use."""
    return _read_into(places, [_aligned(_RAW_BLOCK) for _ in range(_RAW_BLOCKS)], summed=False)


def _aligned(size: int) -> np.ndarray:
    memory = np.empty(size + 4096, dtype=np.uint8)
    first = -memory.ctypes.data % 4096
    memory.fill(0)
    return memory[first : first + size]


def _read_into(places: Places, blocks: list[np.ndarray], *, summed: bool) -> Iterator[int]:
    """Every byte of the shards, in pieces laid end to end into each of the blocks by turns."""
    places_in_turn = itertools.cycle(
        block[start : start + _RAW_PIECE] for block in blocks for start in range(0, len(block), _RAW_PIECE)
    )
    for shard in sorted(places.shards.glob("*.tar")):
        with shard.open("rb", buffering=0) as file:
            for piece in places_in_turn:
                if not (size := file.readinto(piece.data)):
                    break
                if summed:
                    _sum_bytes(piece[:size])
                yield size


def _films(places: Places) -> Iterator[int]:
    index = FilmIndex.load(places.shards)
    row_bytes = _row_bytes(index)

    def read() -> Iterator[int]:
        for film, shots in enumerate(index.shots.tolist()):
            index.read(film, 0, shots)
            yield shots * row_bytes

    return read()


def _windows(places: Places) -> Iterator[int]:
    """Every shot once, in windows of 60 in random order."""
    index = FilmIndex.load(places.shards)
    row_bytes = _row_bytes(index)
    windows = [
        (film, start, min(start + _WINDOW, shots))
        for film, shots in enumerate(index.shots.tolist())
        for start in range(0, shots, _WINDOW)
    ]
    order = np.random.default_rng(0).permutation(len(windows)).tolist()

    def read() -> Iterator[int]:
        for number in order:
            film, start, stop = windows[number]
            index.read(film, start, stop)
            yield (stop - start) * row_bytes

    return read()


def _packs(places: Places, *, shots: int, window: int | None, threads: int) -> Iterator[int]:
    """One epoch. With threads a few packs beyond it are read too: they cost time but are not counted."""
    from lmp.data.loader import PackLoader
    from lmp.data.plan import PlanSettings

    index = FilmIndex.load(places.shards)
    row_bytes, left = _row_bytes(index), int(index.shots.sum())
    settings = PlanSettings(seed=0, pack_shots=shots, packs_per_step=1, window_shots=window)
    loader = PackLoader(index, settings, threads=threads)

    def read(left: int) -> Iterator[int]:
        with loader:
            for step in loader:
                real = int((step.packs[0].film_P >= 0).sum())
                left -= real
                yield real * row_bytes
                if left <= 0:
                    return

    return read(left)


def _webdataset(places: Places) -> Iterator[int]:
    return map(_touch, _webdataset_of(places))


def _webdataset_loader(places: Places, *, workers: int) -> Iterator[int]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return _touched(lambda: StatefulDataLoader(_webdataset_of(places), batch_size=None, **_worker_settings(workers)))


def _webdataset_of(places: Places) -> Any:
    import webdataset

    shards = [str(path) for path in sorted(places.shards.glob("*.tar"))]
    return webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).map(_decode)


def _decode(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(sample["safetensors"])


def _litdata(places: Places, *, workers: int, copied: bool = False) -> Iterator[int]:
    """Without workers its tensors are read-only views of a mapped file; `copied` gives them memory of their own."""
    keep_litdata_in(places.litdata.parent)
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(places.litdata), shuffle=False)
    if copied:
        return (_touch({name: tensor.clone() for name, tensor in film.items()}) for film in dataset)
    if not workers:
        return map(_touch, dataset)
    settings = _worker_settings(workers)
    return _touched(lambda: StreamingDataLoader(dataset, batch_size=1, collate_fn=_only, **settings))


def _worker_settings(workers: int) -> dict[str, Any]:
    """Forked workers start at once; spawned ones would import torch while the clock runs."""
    return {"num_workers": workers, **({"multiprocessing_context": "fork"} if workers else {})}


def _touched(loader: Callable[[], Iterable[dict[str, torch.Tensor]]]) -> Iterator[int]:
    """The workers start with the first item and end with the last."""
    made = loader()

    def read() -> Iterator[int]:
        iterator = iter(made)
        for sample in iterator:
            yield _touch(sample)

    return read()


def _only(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return batch[0]


def _touch(sample: dict[str, Any]) -> int:
    """Sum every byte of a film, as checking does; returns how many there were."""
    total = 0
    for tensor in sample.values():
        if not isinstance(tensor, torch.Tensor):
            continue  # webdataset adds the key
        flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        _sum_bytes(flat)
        total += flat.size
    return total


def _sum_bytes(flat: np.ndarray) -> None:
    words = flat.size // 8 * 8
    flat[:words].view(np.uint64).sum()
    flat[words:].sum()


class Counters(NamedTuple):
    """Bytes asked of the operating system, counted by it: exact, and the same on every machine.

    Attributes:
        window_read, window_payload: a window of 60 shots of a film of 1,200: bytes read, and bytes of its features.
        pack_read: bytes read by one rank that holds a whole pack.
        rank_read: bytes read by each of four sequence ranks, which hold a quarter of it each.
    """

    window_read: int
    window_payload: int
    pack_read: int
    rank_read: tuple[int, ...]


COUNTED_SHOTS = 1200


def count(folder: str, answer: Connection) -> None:
    """Target of a process: the counters, read from a folder of one film of 1,200 shots."""
    run_in_child(lambda: _count(folder), answer)


def _count(folder: str) -> Counters:
    from lmp.data.loader import PackLoader
    from lmp.data.plan import PlanSettings

    index = FilmIndex.load(folder)
    settings = PlanSettings(seed=0, pack_shots=COUNTED_SHOTS, packs_per_step=1)

    def pack(rank: int, ranks: int) -> int:
        with PackLoader(index, settings, sp_rank=rank, sp_size=ranks, threads=0) as loader:
            return _bytes_read(lambda: next(loader))

    features = [column for column in index.columns if column.name in index.modalities]
    for warm_up in (lambda: index.read(0, 0, 1), lambda: pack(0, 1)):
        warm_up()  # what Python itself reads, to import, is not ours to count
    first = COUNTED_SHOTS // 2
    return Counters(
        window_read=_bytes_read(lambda: index.read(0, first, first + _WINDOW)),
        window_payload=_WINDOW * sum(column.row_bytes for column in features),
        pack_read=pack(0, 1),
        rank_read=tuple(pack(rank, 4) for rank in range(4)),
    )


def _bytes_read(work: Callable[[], Any]) -> int:
    """Bytes that this process asked for while `work` ran."""

    def counter() -> str:
        return Path("/proc/self/io").read_text()

    def value(text: str) -> int:
        return int(text.split()[1])

    before = counter()
    work()
    return value(counter()) - value(before) - len(before)  # reading the counter counts too
