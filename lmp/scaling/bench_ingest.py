"""`lmp bench ingest`: what turning films into features costs, against decoding the same films with FFmpeg.

Each reading has a process of its own. It does its work twice and measures the second time, so that imports, and files
that are not in the page cache yet, do not count. CPU time is user and system time, of all threads and children.
"""

from __future__ import annotations

import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from lmp.errors import UserError
from lmp.scaling.bench_clock import spread
from lmp.scaling.bench_data import in_process, machine_facts
from lmp.scaling.bench_ingest_films import make_like_films, make_long_film
from lmp.scaling.bench_readers import run_in_child

_PRELOAD = ("lmp.films.ingest", "lmp.films.detectors", "lmp.scaling.bench_ingest", "av", "scenedetect")
FFMPEG, DECODE, READ, ENCODE, INGEST = "ffmpeg -f null", "decode", "read", "encode", "ingest"
SUBJECTS = {
    FFMPEG: "the ffmpeg program decodes picture and sound, and drops them",
    DECODE: "PyAV does the same: FFmpeg's libraries, as lmp uses them",
    READ: "decoding, shots found, pictures scaled and sampled, sound at 16 kHz; no encoder",
    ENCODE: "the encoders alone, on what was read before",
    INGEST: "`lmp ingest`, from films to shards",
}


class Turn(NamedTuple):
    """One reading of all films: CPU time and wall-clock."""

    cpu_seconds: float
    seconds: float


class Work(NamedTuple):
    """What the processes work on.

    Attributes:
        films: files.
        encoders: modality -> base encoder.
        scratch: a folder for shards.
    """

    films: tuple[Path, ...]
    encoders: Mapping[str, str]
    scratch: Path


class BatchRow(NamedTuple):
    """Shots of one film in batches of one size.

    Attributes:
        encoder: its name.
        batch: shots that it is given at once.
        cpu_seconds: a shot.
        difference: the largest between its features and those of each shot alone, over the largest feature.
    """

    encoder: str
    batch: int
    cpu_seconds: float
    difference: float


@dataclass
class IngestBenchReport:
    """What `lmp bench ingest` found.

    Attributes:
        films, film_seconds: how many, and how long they are together.
        turns: subject (see SUBJECTS) -> one reading a repetition.
        skipped: subject -> why it did not run.
        peaks: seconds of a long film -> bytes resident at the peak while it was ingested, and before.
        batches: what the size of batches changes, for the first film.
    """

    command: str
    machine: dict[str, Any]
    encoders: dict[str, str]
    films: int
    film_seconds: float
    turns: dict[str, list[Turn]]
    skipped: dict[str, str]
    peaks: dict[int, tuple[int, int]]
    batches: list[BatchRow]

    def of_decode(self, subject: str) -> list[float]:
        """CPU time over that of `decode` in the same repetition."""
        pairs = zip(self.turns[subject], self.turns[DECODE], strict=True)
        return [own.cpu_seconds / decode.cpu_seconds for own, decode in pairs]

    def films_per_cpu_second(self, subject: str) -> list[float]:
        return [self.films / turn.cpu_seconds for turn in self.turns[subject]]

    def to_json(self) -> dict[str, Any]:
        """For json.dump; spreads stand beside the single readings."""
        rows = {
            subject: {
                "cpu_seconds": [turn.cpu_seconds for turn in turns],
                "seconds": [turn.seconds for turn in turns],
                "films_per_cpu_second": spread(self.films_per_cpu_second(subject)),
                "of_decode": spread(self.of_decode(subject)),
            }
            for subject, turns in self.turns.items()
        }
        return asdict(self) | {"turns": rows, "batches": [row._asdict() for row in self.batches]}


def bench_ingest(
    films: Sequence[Path],
    *,
    encoders: Mapping[str, str],
    make: int = 4,
    make_shots: int = 40,
    reps: int = 3,
    lengths: Sequence[int] = (),
    batches: Sequence[int] = (),
    step: Callable[[str, int], None] = lambda what, of: None,
) -> IngestBenchReport:
    """Measure all subjects by turns, `reps` times; then the peak of memory on films of the given lengths.

    Args:
        films: files or folders; none makes some, and removes them at the end.
        encoders: modality -> base encoder, as for `ingest`.
        make, make_shots: how many films are made, and their shots (3 s or less each).
        lengths: seconds of generated films, for the peak of memory.
        batches: shots that encoders are given at once, to see what that changes; 1 comes first by itself.
        step: told before each reading what comes, and how many there are in all.

    Raises:
        UserError: films that are not there or cannot be read, an unknown encoder, no repetition, a length below 4 s.
    """
    from lmp.films.media import probe
    from lmp.films.sources import expand

    if min(reps, make, make_shots, *batches) < 1 or any(length < 4 for length in lengths):
        raise UserError("nothing to measure", remedy="give 1 or more films, shots and repetitions, and 4 s or more")
    machine = machine_facts()
    skipped = {} if shutil.which("ffmpeg") else {FFMPEG: "the program is not installed"}
    turns: dict[str, list[Turn]] = {subject: [] for subject in SUBJECTS if subject not in skipped}
    with tempfile.TemporaryDirectory(prefix="lmp-bench-") as scratch:
        folder = Path(scratch)
        step("making films", 0)
        if films:
            made = [Path(film.file.location) for film in expand(films).films]
        else:
            made = make_like_films(folder / "films", make, shots=make_shots)
        work = Work(tuple(made), dict(encoders), folder)
        film_seconds = sum(probe(film).duration_s for film in made)
        for _ in range(reps):
            for subject in turns:
                step(subject, reps * len(turns) + len(lengths))
                turns[subject].append(in_process(_measure, subject, work, preload=_PRELOAD))
        sizes = sorted({1, *batches}) if batches else []
        found = in_process(_batches, work, sizes, preload=_PRELOAD) if sizes else []
        peaks = {}
        for length in lengths:
            step(f"memory, {length} s", reps * len(turns) + len(lengths))
            film = make_long_film(folder / f"long-{length}.mkv", length)
            peaks[length] = in_process(_peak, work._replace(films=(film,)), preload=_PRELOAD)
            film.unlink()
    command = shlex.join(["lmp", *sys.argv[1:]])
    return IngestBenchReport(command, machine, dict(encoders), len(made), film_seconds, turns, skipped, peaks, found)


def _measure(subject: str, work: Work, answer: Connection) -> None:
    """Target of a process: sends a Turn."""

    def measured() -> Turn:
        todo = _subject(subject, work)
        todo()
        cpu, start = _cpu_seconds(), time.perf_counter()
        todo()
        return Turn(_cpu_seconds() - cpu, time.perf_counter() - start)

    run_in_child(measured, answer)


def _peak(work: Work, answer: Connection) -> None:
    """Target of a process: sends the bytes resident at the peak of an ingest, and before it."""

    def measured() -> tuple[int, int]:
        before = _resident_peak()
        _ingest(work)
        return _resident_peak(), before

    run_in_child(measured, answer)


def _batches(work: Work, sizes: Sequence[int], answer: Connection) -> None:
    """Target of a process: sends BatchRows."""

    def measured() -> list[BatchRow]:
        import torch

        rows = []
        for standin in _recorded(work._replace(films=work.films[:1])):
            shots = [shot for batch in standin.given for shot in batch][: max(sizes)]
            encode, alone = standin.encoder.encode, None
            with torch.inference_mode():
                encode(shots[:1])
                for size in sizes:
                    cpu = _cpu_seconds()
                    made = torch.cat([encode(shots[at : at + size])[0] for at in range(0, len(shots), size)])
                    cpu = (_cpu_seconds() - cpu) / len(shots)
                    alone = made if alone is None else alone
                    difference = float((made - alone).abs().max() / alone.abs().max())
                    rows.append(BatchRow(standin.encoder.name, size, cpu, difference))
        return rows

    run_in_child(measured, answer)


def _subject(subject: str, work: Work) -> Callable[[], object]:
    if subject == ENCODE:
        return partial(_encode, _recorded(work))
    todo: dict[str, Callable[[Work], object]] = {FFMPEG: _ffmpeg, DECODE: _decode, READ: _read, INGEST: _ingest}
    return partial(todo[subject], work)


def _ffmpeg(work: Work) -> None:
    for film in work.films:
        command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", str(film), "-f", "null", "-"]
        if subprocess.run(command, capture_output=True).returncode:
            raise UserError(f"ffmpeg cannot decode {film}", remedy="give a film that it can")


def _decode(work: Work) -> None:
    import av

    for film in work.films:
        for kind in ("video", "audio"):
            with av.open(str(film)) as container:
                for stream in getattr(container.streams, kind)[:1]:
                    stream.thread_type = "AUTO"  # with as many threads as FFmpeg sees fit, like `ingest`
                    for _ in container.decode(stream):
                        pass


class _Standin:
    """Takes an encoder's place: asks for the same, and gives zeros.

    Attributes:
        given: the batches that the encoder would have been given, where they are kept.
    """

    def __init__(self, encoder: Any, *, keep: bool) -> None:
        self.encoder, self.keep = encoder, keep
        self.given: list[list[Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode(self, shots: Sequence[Any]) -> tuple[Any, Any]:
        import torch

        if self.keep:
            self.given.append(list(shots))
        return torch.zeros(len(shots), self.tokens, self.width), torch.ones(len(shots), dtype=torch.bool)


def _read(work: Work, *, keep: bool = False) -> list[_Standin]:
    """Everything that `ingest` does to a film but encode it."""
    from lmp.films.detectors import build_finder
    from lmp.films.encoders import build_encoders
    from lmp.films.film import FilmJob, Tools, encode_film
    from lmp.films.sources import Film, Source
    from lmp.films.subtitles import find_subtitles

    built = build_encoders(work.encoders)
    standins = {name: [_Standin(one, keep=keep) for one in parts] for name, parts in built.items()}
    tools = Tools(standins, build_finder(), None)
    for film in work.films:
        job = FilmJob(Film(film.stem, Source.of(film)), None, None, 0, work.scratch, {})
        encode_film(job, tools, film, None, find_subtitles(film))
    return [one for parts in standins.values() for one in parts]


def _recorded(work: Work) -> list[_Standin]:
    return _read(work, keep=True)


def _encode(standins: list[_Standin]) -> None:
    import torch

    with torch.inference_mode():
        for standin in standins:
            for batch in standin.given:
                standin.encoder.encode(batch)


def _ingest(work: Work) -> None:
    from lmp.films.ingest import ingest

    out = work.scratch / "shards"
    report = ingest(list(work.films), out, encoders=work.encoders, overwrite=True, progress=False)
    if report.failures:
        _, problem, remedy = report.failures[0]
        raise UserError(problem, remedy=remedy)


def _cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _resident_peak() -> int:
    """Bytes: Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
