"""`lmp bench data`: how fast films are read, by lmp and by others, against a raw read of the same bytes."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from lmp.data.index import FilmIndex
from lmp.data.shards import FilmRecord, ShardWriter
from lmp.data.storage import is_url
from lmp.errors import UserError
from lmp.scaling.bench_readers import (
    COUNTED_SHOTS,
    Counters,
    Failure,
    Places,
    Reader,
    Reading,
    count,
    measure,
    readers,
    write_litdata,
)
from lmp.train.run_folder import code_state

MADE_WIDTHS = {"video": 512, "audio": 768, "text": 768}
_MADE_SHOTS = 1220
_MADE_SPREAD = 0.5
_FILMS_PER_SHARD = 16
_LEAST_FILMS = 8
_PATIENCE_S = 900.0
PRELOAD = ("lmp.scaling.bench_readers", "lmp.data.loader", "webdataset", "safetensors.torch")


class ProcessError(RuntimeError):
    """A process failed; the message is its traceback."""

    @property
    def last_line(self) -> str:
        return str(self).strip().splitlines()[-1]


@dataclass
class ReaderResult:
    """The readings of one reader, one per repetition.

    Attributes:
        name, items: see Reader.
        bytes: payload of one reading.
        count: items of one reading.
        seconds, cpu_seconds: of each reading.
        speed_to_raw, cpu_to_raw: MB/s and CPU per byte over those of the raw reading of the same repetition.
    """

    name: str
    items: str
    bytes: int = 0
    count: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    speed_to_raw: list[float] = field(default_factory=list)
    cpu_to_raw: list[float] = field(default_factory=list)

    @property
    def mb_per_s(self) -> list[float]:
        return [self.bytes / s / 1e6 for s in self.seconds]

    @property
    def cpu_s_per_gb(self) -> list[float]:
        return [s / self.bytes * 1e9 for s in self.cpu_seconds]

    @property
    def items_per_s(self) -> list[float]:
        return [self.count / s for s in self.seconds]


@dataclass
class DataReport:
    """What `lmp bench data` found.

    Attributes:
        command: as typed.
        machine: cores, memory, load average at the start, versions, commit.
        corpus: films, shots, bytes and shards, and whether it was made for this.
        cache: "warm": read once before; "cold": thrown out of the page cache before each reading.
        results: reader by reader.
        skipped: reader -> why it did not run.
        counters: see bench_readers.Counters; None where the operating system does not count.
    """

    command: str
    machine: dict[str, Any]
    corpus: dict[str, Any]
    cache: str
    results: list[ReaderResult]
    skipped: dict[str, str]
    counters: Counters | None

    def to_json(self) -> dict[str, Any]:
        """For json.dump; medians stand beside the single readings."""
        median = statistics.median
        readings = [
            asdict(r)
            | {"mb_per_s": median(r.mb_per_s), "items_per_s": median(r.items_per_s)}
            | {"cpu_s_per_gb": median(r.cpu_s_per_gb)}
            | {"speed_to_raw_median": median(r.speed_to_raw), "cpu_to_raw_median": median(r.cpu_to_raw)}
            for r in self.results
        ]
        counters = self.counters and self.counters._asdict() | counter_ratios(self.counters)
        return asdict(self) | {"results": readings, "counters": counters}


def bench_data(
    shards: str | None,
    *,
    make_gb: float = 0.75,
    reps: int = 5,
    cold: bool = False,
    names: Sequence[str] = (),
    step: Callable[[str, int], None] = lambda what, of: None,
) -> DataReport:
    """Read the shards through every reader, one after another, `reps` times.

    Args:
        shards: a local folder of film shards; None makes one, and removes it at the end.
        make_gb: payload of the made shards.
        cold: throw the files out of the page cache before each reading.
        names: readers, or the starts of their names; none stands for all.
        step: told before each reading what comes, and how many there are in all.

    Raises:
        UserError: an unknown reader, shards that are not local or no shards.
    """
    if reps < 1:
        raise UserError(f"reps is {reps}", remedy="give at least 1")
    if shards is not None and is_url(shards):
        raise UserError(f"{shards} is not a local folder", remedy="copy it, or give a folder of this machine")
    chosen, skipped = _choose(names)
    machine = machine_facts()
    with tempfile.TemporaryDirectory(prefix="lmp-bench-") as scratch:
        places = Places(Path(shards) if shards else Path(scratch) / "shards", Path(scratch) / "litdata")
        if shards is None:
            step("making films", 0)
            make_corpus(places.shards, make_gb)
        index = FilmIndex.load(places.shards)
        if any(r.needs == ("litdata",) for r in chosen):
            step("making litdata's chunks", 0)
            try:
                in_process(write_litdata, places)
            except ProcessError as error:
                skipped |= {r.name: error.last_line for r in chosen if r.needs == ("litdata",)}
                chosen = [r for r in chosen if r.name not in skipped]
        results = _run(chosen, places, reps=reps, cold=cold, skipped=skipped, step=step)
        counters = _count(index, Path(scratch) / "counted")
        corpus = {
            "made": shards is None,
            "films": len(index),
            "shots": int(index.shots.sum()),
            "bytes": sum(entry["bytes"] for entry in index.entries),
            "shards": len(index.entries),
        }
    command = shlex.join(["lmp", *sys.argv[1:]])
    return DataReport(command, machine, corpus, "cold" if cold else "warm", results, skipped, counters)


def counter_ratios(counters: Counters) -> dict[str, Any]:
    """Bytes read over payload of the window, and of the pack per rank."""
    return {
        "window_ratio": counters.window_read / counters.window_payload,
        "rank_ratios": [read / counters.pack_read for read in counters.rank_read],
    }


def make_corpus(folder: Path, gigabytes: float, *, seed: int = 0) -> None:
    """Write films of lognormal length, 1,220 shots on average (fewer if there would be less than 8 films).

    video 512, audio 768, text 768, float16; a shard holds at most 16 films, about 80 MB.

    Raises:
        UserError: gigabytes is not above 0.
    """
    if not gigabytes > 0:
        raise UserError(f"--make {gigabytes}", remedy="give gigabytes above 0")
    shots_wanted = max(_LEAST_FILMS, round(gigabytes * 1e9 / (2 * sum(MADE_WIDTHS.values()))))
    random = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < shots_wanted:
        lengths += lognormal_shots(1, random, mean=min(_MADE_SHOTS, shots_wanted / _LEAST_FILMS)).tolist()
    per_shard = min(_FILMS_PER_SHARD, -(-len(lengths) // 2))  # at least two shards, for readers with two workers
    with ShardWriter(folder, encoders={}, films_per_shard=per_shard) as writer:
        for number, shots in enumerate(lengths):
            writer.write(_film(f"film-{number:06d}", shots, MADE_WIDTHS, random))


def lognormal_shots(films: int, random: np.random.Generator, *, mean: float = _MADE_SHOTS) -> np.ndarray:
    """int64 [films], shots of each, at least 1."""
    drawn = random.lognormal(np.log(mean) - _MADE_SPREAD**2 / 2, _MADE_SPREAD, films)
    return np.maximum(1, drawn).astype(np.int64)


def _film(key: str, shots: int, widths: dict[str, int], random: np.random.Generator) -> FilmRecord:
    """Random finite float16 below 2, one token a modality."""
    start = np.arange(shots, dtype=np.int32) * 3000
    features = {}
    for name, width in widths.items():
        bits = random.integers(0, 1 << 16, (shots, 1, width), dtype=np.uint16) & np.uint16(0xBFFF)
        features[name] = torch.from_numpy(bits.view(np.float16))
    return FilmRecord(
        key=key,
        info={"fps": 24.0},
        shots_S2=np.stack([start, start + 3000], axis=1),
        features=features,
        valid={name: torch.ones(shots, dtype=torch.bool) for name in widths},
    )


def machine_facts() -> dict[str, Any]:
    """What a figure depends on besides the code, and the code's commit."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": cpu,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        **code_state(),
    }


def in_process(target: Callable[..., None], *arguments: Any, preload: Sequence[str] = PRELOAD) -> Any:
    """Run `target(*arguments, connection)` in a fresh process, which sends one answer by run_in_child.

    The process is forked from a server that has imported `preload` (if no call before has started it with other
    modules) and holds nothing else, so it starts in no time and knows nothing of the measurements before.

    Raises:
        UserError: what the process sent.
        ProcessError: the process failed otherwise.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    try:
        answer = _answer(ours, process)
    finally:
        if process.is_alive():
            process.join(timeout=10)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()
    if not isinstance(answer, Failure):
        return answer
    if answer.remedy is not None:
        raise UserError(answer.problem, remedy=answer.remedy)
    raise ProcessError(answer.problem)


def _answer(connection: Connection, process: Any) -> Any:
    if not connection.poll(_PATIENCE_S):
        process.kill()
        return Failure(f"it had not ended after {_PATIENCE_S:.0f} s", None)
    try:
        return connection.recv()
    except EOFError:
        process.join()
        return Failure(f"its process ended with {process.exitcode}", None)


def _choose(names: Sequence[str]) -> tuple[list[Reader], dict[str, str]]:
    """The readers wanted and installed, raw always among them; and why others are not."""
    known = readers()
    for name in names:
        if not any(key.startswith(name) for key in known):
            raise UserError(f"there is no reader {name!r}", remedy=f"give some of {', '.join(known)}")
    wanted = [r for r in known.values() if r.name == "raw" or not names or any(r.name.startswith(n) for n in names)]
    skipped = {}
    for reader in wanted:
        if absent := [package for package in reader.needs if importlib.util.find_spec(package) is None]:
            skipped[reader.name] = f"{', '.join(absent)} is not installed: pip install 'lmp[bench]'"
    return [r for r in wanted if r.name not in skipped], skipped


def _run(
    chosen: list[Reader],
    places: Places,
    *,
    reps: int,
    cold: bool,
    skipped: dict[str, str],
    step: Callable[[str, int], None],
) -> list[ReaderResult]:
    """All readings, the readers taking turns; one that fails is moved to `skipped`."""
    results = {reader.name: ReaderResult(reader.name, reader.items) for reader in chosen}
    if not cold:
        _read_through(places)
    for _ in range(reps):
        in_process(measure, "raw", places)  # else the first reader alone would pay for memory that was given back
        for name in list(results):
            step(name, reps * len(chosen))
            if cold:
                _evict(places)
            try:
                _add(results[name], in_process(measure, name, places), results["raw"])
            except ProcessError as error:
                if name.startswith(("raw", "lmp")):
                    raise
                skipped[name] = error.last_line
                del results[name]
    return list(results.values())


def _add(result: ReaderResult, reading: Reading, raw: ReaderResult) -> None:
    """`raw` has its own reading of this repetition already."""
    result.bytes, result.count = reading.bytes, reading.items
    result.seconds.append(reading.seconds)
    result.cpu_seconds.append(reading.cpu_seconds)
    result.speed_to_raw.append(result.mb_per_s[-1] / raw.mb_per_s[-1])
    result.cpu_to_raw.append(result.cpu_s_per_gb[-1] / max(raw.cpu_s_per_gb[-1], 1e-9))


def _count(index: FilmIndex, folder: Path) -> Counters | None:
    if not Path("/proc/self/io").is_file():
        return None
    widths = {name: modality.tokens * modality.width for name, modality in index.modalities.items()}
    with ShardWriter(folder, encoders={}) as writer:
        writer.write(_film("counted", COUNTED_SHOTS, widths, np.random.default_rng(0)))
    return in_process(count, str(folder))


def _files(places: Places) -> Iterator[Path]:
    yield from sorted(places.shards.glob("*.tar"))
    if places.litdata.is_dir():
        yield from sorted(p for p in places.litdata.rglob("*") if p.is_file())


def _read_through(places: Places) -> None:
    for path in _files(places):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


def _evict(places: Places) -> None:
    for path in _files(places):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def progress() -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        started = 0

        def step(what: str, of: int) -> None:
            nonlocal started
            bar.update(task, description=what, total=of or None, completed=started)
            started += bool(of)

        yield step
