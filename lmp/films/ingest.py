"""From films to shards: shots, base encoders, one record per film, several films at once."""

from __future__ import annotations

import hashlib
import re
import shutil
import unicodedata
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import Progress

from lmp.data.leave_out import LeaveOut
from lmp.data.shards import FilmRecord, ShardWriter
from lmp.errors import UserError
from lmp.films import kept
from lmp.films.cuts import MIN_SHOT_S, ShotFinder
from lmp.films.detectors import DEFAULT, build_finder
from lmp.films.encoders import Encoder, build_encoders, describe
from lmp.films.media import Sampling, probe, read_pictures, read_sound
from lmp.films.shots import find_shot_list, read_shot_list
from lmp.films.speech import Whisper, build_speech, parts_of
from lmp.films.subtitles import find_subtitles, read_subtitles, words_of_shots

FILM_SUFFIXES = frozenset(
    {
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
    }
)
_BATCH, _BATCH_BYTES = 32, 64 << 20  # shots whose pictures or sound are held at once, and their size
_SILENT = 1e-4  # loudest sample: -80 dB
_BLACK = 16  # brightest sample of a frame's colours; video's own black is 16
_AHEAD = 2  # films under way or waiting to be written, per worker


@dataclass
class IngestReport:
    """What came of it.

    Attributes:
        films, shots: written.
        quality: modality (MODALITY/ENCODER where several are joined) -> what is odd -> in how many shots.
        failures: film, what is wrong with it, what to do; in order of the input.
        refused: films on the list of those to leave out.
    """

    films: int = 0
    shots: int = 0
    refused: list[Path] = field(default_factory=list)
    quality: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[tuple[Path, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """One film; everything that a worker needs besides the encoders."""

    film: Path
    key: str
    shot_lists: Path | None
    subtitles: Path | None
    threads: int
    kept: Path
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Done:
    """A film's record, its tensors as arrays (they cross the process boundary by value), or its fault."""

    info: dict[str, Any] = field(default_factory=dict)
    shots_S2: np.ndarray | None = None
    features: dict[str, np.ndarray] = field(default_factory=dict)
    valid: dict[str, np.ndarray] = field(default_factory=dict)
    fault: tuple[str, str] | None = None


def expand(paths: Iterable[Path]) -> list[Path]:
    """Films as given, folders replaced by the films in them, sorted by name.

    Raises:
        UserError: a path that is not there, a folder without films, or nothing at all.
    """
    films: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                p for p in path.iterdir() if p.suffix.lower() in FILM_SUFFIXES and not p.name.startswith(".")
            )
            if not inside:
                raise UserError(f"{path} holds no film", remedy=f"give films ({', '.join(sorted(FILM_SUFFIXES))})")
            films += inside
        elif path.exists():
            films.append(path)
        else:
            raise UserError(f"there is no film {path}", remedy="check the path")
    if not films:
        raise UserError("no films were given", remedy="name films, or folders of films")
    return films


def key_of(film: Path) -> str:
    """The key of a film: its stem in plain letters, digits, _ and -, at most 80 of them."""
    plain = unicodedata.normalize("NFKD", film.stem).encode("ascii", "ignore").decode()
    key = re.sub(r"[^A-Za-z0-9_-]+", "-", plain)
    if re.search("[A-Za-z0-9]", key) and len(key) <= 80:
        return key
    # Nothing readable is left, or too much: the digest keeps names apart.
    return f"{key[:60] if len(key) > 80 else 'film'}-{hashlib.sha256(film.stem.encode()).hexdigest()[:10]}"


def ingest(
    films: Sequence[Path],
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
    again. A film that cannot be
    used, or whose subtitles or shot list cannot, is skipped and reported; when none can, nothing is written.

    Args:
        films: files, or folders of films.
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
        leave_out: films that are refused, by their file's name (without suffix) or key.
        device: where the networks run, such as "cuda".
        progress: show a progress bar.

    Raises:
        UserError: films that are not there or share a key, an unknown encoder, a folder `out` in use.
    """
    report = IngestReport()
    wanted: list[Path] = []
    for film in expand(films):
        refused = leave_out is not None and (leave_out.names(film.stem) or leave_out.names(key_of(film)))
        (report.refused if refused else wanted).append(film)
    specs = _Specs(dict(encoders), device, None if shot_lists is not None else detector, min_shot_s, speech)
    # With several workers these only describe; each worker builds its own.
    built = _build(specs if workers == 1 else specs._replace(device="cpu"))
    described = {name: describe(parts) for name, parts in built.encoders.items()}
    kept_films = out / kept.FOLDER
    found_by = None if built.finder is None else built.finder.describe()
    heard_by = None if built.speech is None else built.speech.describe()
    settings = {**described, "device": device, "shots": found_by, "speech": heard_by}
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


def _jobs(
    films: list[Path],
    shot_lists: Path | None,
    subtitles: Path | None,
    workers: int,
    folder: Path,
    settings: Mapping[str, Any],
) -> list[_Job]:
    if workers < 1:
        raise UserError(f"{workers} workers cannot do anything", remedy="give at least 1")
    if subtitles is not None and not subtitles.is_dir():
        raise UserError(f"{subtitles} is no folder of subtitles", remedy="give a folder")
    if shot_lists is not None and not (shot_lists.is_dir() or (shot_lists.is_file() and len(films) == 1)):
        raise UserError(f"{shot_lists} is no folder of shot lists", remedy="give a folder, or one list for one film")
    seen: dict[str, Path] = {}
    for film in films:
        if (other := seen.setdefault(key_of(film), film)) is not film:
            raise UserError(f"{other} and {film} would share the key {key_of(film)}", remedy="rename one")
    threads = 0 if workers == 1 else 1
    return [
        _Job(film, key, shot_lists, subtitles, threads, folder / f"{key}.safetensors", settings)
        for key, film in seen.items()
    ]


def _write(writer: ShardWriter, job: _Job, done: _Done, report: IngestReport) -> None:
    if done.fault is not None or done.shots_S2 is None:
        problem, remedy = done.fault or (f"{job.film} gave no shots", "give a whole film")
        report.failures.append((job.film, problem, remedy))
        return
    features = {name: torch.from_numpy(array) for name, array in done.features.items()}
    valid = {name: torch.from_numpy(array) for name, array in done.valid.items()}
    try:
        writer.write(FilmRecord(job.key, done.info, done.shots_S2, features, valid))
    except UserError as error:
        report.failures.append((job.film, error.problem, error.remedy))
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


Encoders = Mapping[str, Sequence[Encoder]]  # by modality; the features of several are joined


class _Tools(NamedTuple):
    """What films are read with; no finder where shots are given."""

    encoders: Encoders
    finder: ShotFinder | None
    speech: Whisper | None


_tools: list[_Tools] = []  # of a worker process, built once


def _build(specs: _Specs) -> _Tools:
    finder = None
    if specs.detector is not None:
        finder = build_finder(specs.detector, min_shot_s=specs.min_shot_s, device=specs.device)
    encoders = build_encoders(specs.encoders, device=specs.device)
    speech = None if specs.speech is None else build_speech(specs.speech, device=specs.device)
    if speech is not None and not any(parts[0].kind == "words" for parts in encoders.values()):
        raise UserError(f"--speech {specs.speech}: no encoder takes words", remedy="add --encoder text=SPEC")
    return _Tools(encoders, finder, speech)


def _start_worker(specs: _Specs) -> None:
    _tools[:] = [_build(specs)]


def _work(job: _Job) -> _Done:
    return _read_film(job, _tools[0])


def _results(jobs: list[_Job], built: _Tools, specs: _Specs, workers: int) -> Iterator[tuple[_Job, _Done]]:
    """Jobs and results in order of the jobs. A film that ends its process is found by reading it alone."""
    if workers == 1:
        for job in jobs:
            yield job, _read_film(job, built)
        return
    waiting = deque(jobs)
    while waiting:
        suspects = yield from _pooled(waiting, specs, workers)
        for job in suspects:
            yield job, _alone(job, specs)


def _pooled(waiting: deque[_Job], specs: _Specs, workers: int) -> Generator[tuple[_Job, _Done], None, list[_Job]]:
    """Works through `waiting`, a bounded number at once; returns those under way when a process died."""
    pool = _pool(specs, min(workers, len(waiting)))
    under_way: deque[tuple[_Job, Future[_Done]]] = deque()
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


def _alone(job: _Job, specs: _Specs) -> _Done:
    pool = _pool(specs, 1)
    try:
        return pool.submit(_work, job).result()
    except BrokenProcessPool:
        problem = f"{job.film} ended the process that read it: no memory left, or a fault of the decoder"
        return _Done(fault=(problem, "convert the film with ffmpeg, or give the machine more memory"))
    finally:
        pool.shutdown()


def _pool(specs: _Specs, workers: int) -> ProcessPoolExecutor:
    # Spawned, for the caller may have threads and a forked child would inherit their locks.
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(specs,))


def _read_film(job: _Job, tools: _Tools) -> _Done:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of several threads have other last bits
    try:
        return _kept_film(job, tools)
    except UserError as error:
        return _Done(fault=(error.problem, error.remedy))
    finally:
        torch.set_num_threads(threads)


def _kept_film(job: _Job, tools: _Tools) -> _Done:
    if not job.film.is_file():
        raise UserError(f"there is no film {job.film}", remedy="check the path")
    shot_list = None
    if job.shot_lists is not None:
        shot_list = find_shot_list(job.shot_lists, job.film) if job.shot_lists.is_dir() else job.shot_lists
    subtitles = None
    if any(parts[0].kind == "words" for parts in tools.encoders.values()):
        subtitles = find_subtitles(job.film if job.subtitles is None else job.subtitles / job.film.name)
    sign = kept.signature(job.settings, [job.film, shot_list, subtitles])
    if (held := kept.load(job.kept, sign)) is not None:
        info, arrays = held
        features = {name: arrays[f"features.{name}"] for name in tools.encoders}
        return _Done(info, arrays["shots"], features, {name: arrays[f"valid.{name}"] for name in tools.encoders})
    done = _encoded_film(job, tools, shot_list, subtitles)
    if done.shots_S2 is not None:
        arrays = {f"features.{name}": array for name, array in done.features.items()}
        arrays |= {f"valid.{name}": array for name, array in done.valid.items()}
        kept.save(job.kept, sign, done.info, {"shots": done.shots_S2, **arrays})
    return done


def _encoded_film(job: _Job, tools: _Tools, path: Path | None, subtitles: Path | None) -> _Done:
    facts = probe(job.film)
    shots: np.ndarray | ShotFinder
    if path is not None:
        shots, source = read_shot_list(path, facts.fps, first_s=facts.first_s), {"list": path.name}
    else:
        assert tools.finder is not None  # or there would be a list
        shots, source = tools.finder, tools.finder.describe()
    # A broken subtitle file is found before the picture is decoded.
    spoken = None if subtitles is None else read_subtitles(subtitles)
    outputs = {name: [_Output(encoder) for encoder in parts] for name, parts in tools.encoders.items()}
    shots_S2 = _encode_pictures(job, shots, outputs)
    if isinstance(shots, ShotFinder):
        _check_whole(job.film, facts.duration_s, float(shots_S2[-1, 1]) / 1000)
    _encode_sound(job, shots_S2, outputs)
    if spoken is None and tools.speech is not None:
        spoken = tools.speech.transcribe(read_sound(job.film, parts_of(int(shots_S2[-1, 1]))))
    for output in _of_kind(outputs, "words"):
        for words in words_of_shots(spoken, shots_S2):
            output.add(words)
    info: dict[str, Any] = {
        "title": job.film.stem,
        "source": job.film.name,
        "duration_s": round(facts.duration_s or float(shots_S2[-1, 1]) / 1000, 3),
        "fps": round(facts.fps, 6),
        "sound": facts.sound,
        "shots_from": source,
        "subtitles": None if spoken is None else spoken.record(),
        "quality": {},
    }
    features, valid = {}, {}
    for name, parts in outputs.items():
        made, told = zip(*(output.finish() for output in parts), strict=True)
        valid[name] = np.logical_and.reduce(told)
        features[name] = np.where(valid[name][:, None, None], np.concatenate(made, axis=2), np.float32(0))
        for output in parts:
            if output.odd:
                joined = name if len(parts) == 1 else f"{name}/{output.encoder.name}"
                info["quality"][joined] = dict(sorted(output.odd.items()))
    return _Done(info, shots_S2, features, valid)


def _check_whole(film: Path, promised_s: float, found_s: float) -> None:
    """Refuse a film whose picture ends long before the length that its container states: a download cut short."""
    if promised_s - found_s > max(2.0, 0.1 * promised_s):
        raise UserError(
            f"{film} breaks off: its picture ends at {found_s:.1f} s of {promised_s:.1f} s",
            remedy="copy or download it again, or give its shots with --shots if it is meant so",
        )


class _Output:
    """Collects the inputs of one encoder into batches, and its outputs.

    Attributes:
        odd: shots that are `silent` or `black`, whose features are not finite (`nan`), or are the very same
            numbers as those of the shot before (`repeated`): a stuck picture, or a broken encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.sampling = Sampling(encoder.frames, encoder.height)
        self.odd: Counter[str] = Counter()
        self._waiting: list[Any] = []
        self._bytes = 0
        self._features: list[np.ndarray] = []
        self._valid: list[np.ndarray] = []
        self._last: np.ndarray | None = None

    def add(self, shot: Any) -> None:
        self._waiting.append(shot)
        self._bytes += getattr(shot, "nbytes", 0)
        if self.encoder.kind == "sound" and len(shot) and np.abs(shot).max() < _SILENT:
            self.odd["silent"] += 1
        if self.encoder.kind == "picture" and shot.max() <= _BLACK:
            self.odd["black"] += 1
        if len(self._waiting) == _BATCH or self._bytes >= _BATCH_BYTES:
            self._encode()

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [S, K, D] and bool [S]."""
        if self._waiting:
            self._encode()
        return np.concatenate(self._features), np.concatenate(self._valid)

    def _encode(self) -> None:
        with torch.inference_mode():
            features_nKD, valid_n = self.encoder.encode(self._waiting)
        made, valid = features_nKD.float().cpu().numpy(), valid_n.cpu().numpy()
        for vectors in made[valid]:
            if not np.isfinite(vectors).all():
                self.odd["nan"] += 1
            if self.encoder.kind != "words" and self._last is not None and np.array_equal(vectors, self._last):
                self.odd["repeated"] += 1
            self._last = vectors
        self._features.append(made)
        self._valid.append(valid)
        self._waiting, self._bytes = [], 0


_Outputs = Mapping[str, Sequence[_Output]]


def _of_kind(outputs: _Outputs, kind: str) -> list[_Output]:
    return [output for parts in outputs.values() for output in parts if output.encoder.kind == kind]


def _encode_pictures(job: _Job, shots: np.ndarray | ShotFinder, outputs: _Outputs) -> np.ndarray:
    """The shots, int32 [S, 2] ms. A given list needs no decoding where nobody looks at the picture."""
    watching = _of_kind(outputs, "picture")
    if isinstance(shots, np.ndarray) and not watching:
        return shots
    samplings = list(dict.fromkeys(output.sampling for output in watching))
    spans: list[tuple[int, int]] = []
    for shot in read_pictures(job.film, samplings, shots=shots, threads=job.threads):
        spans.append((shot.start_ms, shot.end_ms))
        for output in watching:
            output.add(shot.samples[output.sampling])
    return np.array(spans, dtype=np.int32)


def _encode_sound(job: _Job, shots_S2: np.ndarray, outputs: _Outputs) -> None:
    listening = _of_kind(outputs, "sound")
    if not listening:
        return
    for sound in read_sound(job.film, shots_S2):
        for output in listening:
            output.add(sound)
