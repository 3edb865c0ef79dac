"""From films to shards: shots, base encoders, one record per film, several films at once."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress

from lmp.data.leave_out import LeaveOut
from lmp.data.shards import FilmRecord, ShardWriter
from lmp.errors import UserError
from lmp.films import kept
from lmp.films.cuts import MIN_SHOT_S
from lmp.films.detectors import DEFAULT, build_finder
from lmp.films.encoders import build_encoders, describe
from lmp.films.encoders.device import check_device
from lmp.films.film import FilmJob, FilmResult, Tools, read_film
from lmp.films.sources import Film, check_keys, expand
from lmp.films.speech import build_speech

_AHEAD = 2  # films under way or waiting to be written, per worker


@dataclass
class IngestReport:
    """What came of it.

    Attributes:
        films, shots: written.
        quality: modality (MODALITY/ENCODER where several are joined) -> what is odd -> in how many shots.
        failures: film (or tar), what is wrong with it, what to do; tars first, films in order.
        refused: films on the list of those to leave out.
    """

    films: int = 0
    shots: int = 0
    refused: list[str] = field(default_factory=list)
    quality: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, part: IngestReport) -> None:
        """Count what came of further films."""
        self.films += part.films
        self.shots += part.shots
        self.refused += part.refused
        for name, counts in part.quality.items():
            self.quality.setdefault(name, Counter()).update(counts)
        self.failures += part.failures

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> IngestReport:
        """A report that was written as JSON, from its __dict__."""
        quality = {name: Counter(counts) for name, counts in told["quality"].items()}
        failures = [(film, problem, remedy) for film, problem, remedy in told["failures"]]
        return cls(**{**told, "quality": quality, "failures": failures})


def ingest(
    films: Iterable[str | Path | Film],
    out: Path,
    *,
    encoders: Mapping[str, str],
    shot_lists: Path | None = None,
    detector: str = DEFAULT,
    min_shot_s: float = MIN_SHOT_S,
    subtitles: Path | None = None,
    speech: str | None = None,
    workers: int = 1,
    films_per_shard: int = 64,
    overwrite: bool = False,
    leave_out: LeaveOut | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> IngestReport:
    """Turn films into shards of shot features.

    The output depends on the films, their order and the settings, not on `workers`. Films that were read are
    kept beside the shards until these are whole: the same call after an interruption does not read them
    again. A film that cannot be used, or whose subtitles or shot list cannot, is skipped and reported; when
    none can, nothing is written.

    Args:
        films: files, folders, tars or lists of films, see `expand`.
        out: folder for the shards.
        encoders: modality -> base encoder, such as {"video": "signal", "text": "/models/bart"}.
        shot_lists: folder with one list per film (see `find_shot_list`), or the list of the only film;
            None finds the shots.
        detector: what finds them, see `build_finder`.
        min_shot_s: shots that are found and shorter than so many seconds are merged, see `ShotStarts`.
        subtitles: folder with STEM.srt, .vtt or .ass; None looks beside each film. A film may have none.
        speech: what hears the words of a film without subtitles, see `build_speech`; None leaves it without.
        workers: processes, each with one thread of computation and its own networks; with 1 the work is
            done in this one.
        films_per_shard: films in a tar file.
        overwrite: replace shards that `out` holds.
        leave_out: films that are refused, by their file's name (without suffix), key, or an id in their record.
        device: where the networks run, such as "cuda".
        progress: show a progress bar.

    Raises:
        UserError: films that are not there or share a key, an unknown encoder, a folder `out` in use.
    """
    wanted, report = choose(films, leave_out)
    check_device(device)
    specs = _Specs(dict(encoders), device, None if shot_lists is not None else detector, min_shot_s, speech)
    # With several workers these only describe; each worker builds its own.
    built = _build(specs if workers == 1 else specs._replace(device="cpu"))
    described = {name: describe(parts) for name, parts in built.encoders.items()}
    kept_films = out / kept.FOLDER
    found_by = None if built.finder is None else built.finder.describe()
    heard_by = None if built.speech is None else built.speech.describe()
    settings = {"encoders": described, "device": device, "shots": found_by, "speech": heard_by}
    jobs = _jobs(wanted, shot_lists, subtitles, workers, kept_films, settings)
    writer = ShardWriter(out, encoders=described, films_per_shard=films_per_shard, prefix="films", overwrite=overwrite)
    try:
        with Progress(disable=not progress) as bar:
            task = bar.add_task("reading films", total=len(jobs))
            for job, done in _results(jobs, built, specs, workers):
                _write(writer, job, done, report)
                bar.advance(task)
        if report.films:
            writer.close()
        shutil.rmtree(kept_films, ignore_errors=True)
    finally:
        writer.abort()  # nothing is left to remove after close
    return report


def choose(films: Iterable[str | Path | Film], leave_out: LeaveOut | None) -> tuple[list[Film], IngestReport]:
    """The films to be read, all with their own keys, and what there is to report before that.

    Raises:
        UserError: as `expand`, or two films that share a key.
    """
    found = expand(films)
    report = IngestReport(failures=[*found.failures])
    wanted: list[Film] = []
    for film in found.films:
        if leave_out is not None and (leave_out.names(film.file.stem) or leave_out.names(film.key, film.info)):
            report.refused.append(str(film))
        else:
            wanted.append(film)
    check_keys(wanted)
    return wanted, report


def check(
    films: Sequence[Film],
    *,
    encoders: Mapping[str, str],
    shot_lists: Path | None = None,
    detector: str = DEFAULT,
    min_shot_s: float = MIN_SHOT_S,
    subtitles: Path | None = None,
    speech: str | None = None,
    device: str = "cpu",
) -> None:
    """Raise UserError where `ingest` with these settings would before it reads a film; `device` is not looked at."""
    _check_folders(films, shot_lists, subtitles)
    _build(_Specs(dict(encoders), "cpu", None if shot_lists is not None else detector, min_shot_s, speech))


def _check_folders(films: Sequence[Film], shot_lists: Path | None, subtitles: Path | None) -> None:
    if subtitles is not None and not subtitles.is_dir():
        raise UserError(f"{subtitles} is no folder of subtitles", remedy="give a folder")
    if shot_lists is not None and not (shot_lists.is_dir() or (shot_lists.is_file() and len(films) == 1)):
        raise UserError(f"{shot_lists} is no folder of shot lists", remedy="give a folder, or one list for one film")


def _jobs(
    films: list[Film],
    shot_lists: Path | None,
    subtitles: Path | None,
    workers: int,
    folder: Path,
    settings: Mapping[str, Any],
) -> list[FilmJob]:
    if workers < 1:
        raise UserError(f"{workers} workers cannot do anything", remedy="give at least 1")
    _check_folders(films, shot_lists, subtitles)
    threads = 0 if workers == 1 else 1
    return [
        FilmJob(film, shot_lists, subtitles, threads, folder / f"{film.key}.safetensors", settings) for film in films
    ]


def _write(writer: ShardWriter, job: FilmJob, done: FilmResult, report: IngestReport) -> None:
    if done.fault is not None or done.shots_S2 is None:
        problem, remedy = done.fault or (f"{job.film} gave no shots", "give a whole film")
        report.failures.append((str(job.film), problem, remedy))
        return
    features = {name: torch.from_numpy(array) for name, array in done.features.items()}
    valid = {name: torch.from_numpy(array) for name, array in done.valid.items()}
    try:
        writer.write(FilmRecord(job.film.key, done.info, done.shots_S2, features, valid))
    except UserError as error:
        report.failures.append((str(job.film), error.problem, error.remedy))
        return
    report.films += 1
    report.shots += len(done.shots_S2)
    for name, counts in done.info["quality"].items():
        report.quality.setdefault(name, Counter()).update(counts)


class _Specs(NamedTuple):
    """What a worker builds its tools from; no detector where shots are given."""

    encoders: dict[str, str]
    device: str
    detector: str | None
    min_shot_s: float
    speech: str | None


_tools: list[Tools] = []  # of a worker process, built once


def _build(specs: _Specs) -> Tools:
    finder = None
    if specs.detector is not None:
        finder = build_finder(specs.detector, min_shot_s=specs.min_shot_s, device=specs.device)
    encoders = build_encoders(specs.encoders, device=specs.device)
    speech = None if specs.speech is None else build_speech(specs.speech, device=specs.device)
    if speech is not None and not any(parts[0].kind == "words" for parts in encoders.values()):
        raise UserError(f"--speech {specs.speech}: no encoder takes words", remedy="add --encoder text=SPEC")
    return Tools(encoders, finder, speech)


def _start_worker(specs: _Specs) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tools[:] = [_build(specs)]


def _end_with_parent() -> None:
    """A killed ingest takes its workers along: they would wait for films for ever, and hold their networks."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: FilmJob) -> FilmResult:
    return read_film(job, _tools[0])


def _results(jobs: list[FilmJob], built: Tools, specs: _Specs, workers: int) -> Iterator[tuple[FilmJob, FilmResult]]:
    """Jobs and results in order of the jobs. A film that ends its process is found by reading it alone."""
    if workers == 1:
        for job in jobs:
            yield job, read_film(job, built)
        return
    waiting = deque(jobs)
    while waiting:
        suspects = yield from _pooled(waiting, specs, workers)
        for job in suspects:
            yield job, _alone(job, specs)


def _pooled(
    waiting: deque[FilmJob], specs: _Specs, workers: int
) -> Generator[tuple[FilmJob, FilmResult], None, list[FilmJob]]:
    """Works through `waiting`, a bounded number at once; returns those under way when a process died."""
    pool = _pool(specs, min(workers, len(waiting)))
    under_way: deque[tuple[FilmJob, Future[FilmResult]]] = deque()
    try:
        while waiting or under_way:
            while waiting and len(under_way) < _AHEAD * workers:
                future = pool.submit(_work, waiting[0])
                under_way.append((waiting.popleft(), future))
            done = under_way[0][1].result()
            yield under_way.popleft()[0], done
    except BrokenProcessPool:
        return [job for job, _ in under_way] or [waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)
    return []


def _alone(job: FilmJob, specs: _Specs) -> FilmResult:
    pool = _pool(specs, 1)
    try:
        return pool.submit(_work, job).result()
    except BrokenProcessPool:
        problem = f"{job.film} ended the process that read it: no memory left, or a fault of the decoder"
        return FilmResult(fault=(problem, "convert the film with ffmpeg, or give the machine more memory"))
    finally:
        pool.shutdown()


def _pool(specs: _Specs, workers: int) -> ProcessPoolExecutor:
    # Spawned, for the caller may have threads and a forked child would inherit their locks.
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(specs,))
