"""One film: its shots, pictures, sound and words, decoded once and given to all encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lmp.errors import UserError
from lmp.films import kept
from lmp.films.ahead import read_ahead
from lmp.films.cuts import ShotFinder
from lmp.films.encoders import Encoder
from lmp.films.media import probe, read_pictures, read_sound
from lmp.films.outputs import Output, Outputs, of_kind
from lmp.films.shots import read_shot_list
from lmp.films.sources import Film, brought
from lmp.films.speech import Whisper, parts_of
from lmp.films.subtitles import read_subtitles, words_of_shots


@dataclass(frozen=True)
class FilmJob:
    """One film; everything that a worker needs besides the encoders."""

    film: Film
    shot_lists: Path | None
    subtitles: Path | None
    threads: int
    kept: Path
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class FilmResult:
    """A film's record, its tensors as arrays (they cross the process boundary by value), or its fault."""

    info: dict[str, Any] = field(default_factory=dict)
    shots_S2: np.ndarray | None = None
    features: dict[str, np.ndarray] = field(default_factory=dict)
    valid: dict[str, np.ndarray] = field(default_factory=dict)
    fault: tuple[str, str] | None = None


Encoders = Mapping[str, Sequence[Encoder]]  # by modality; the features of several are joined


class Tools(NamedTuple):
    """What films are read with; no finder where shots are given."""

    encoders: Encoders
    finder: ShotFinder | None
    speech: Whisper | None


def read_film(job: FilmJob, tools: Tools) -> FilmResult:
    """Its record and features, or what is wrong with it; read again only if it was not kept."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of several threads have other last bits
    try:
        return _kept_film(job, tools)
    except UserError as error:
        return FilmResult(fault=(error.problem, error.remedy))
    finally:
        torch.set_num_threads(threads)


def _kept_film(job: FilmJob, tools: Tools) -> FilmResult:
    film, shot_list = job.film, job.film.shots_in(job.shot_lists)
    subtitles = None
    if any(parts[0].kind == "words" for parts in tools.encoders.values()):
        subtitles = film.subtitles_in(job.subtitles)
    sources = (film.file, shot_list, subtitles)
    sign = kept.signature(job.settings, [film.info, *(None if one is None else one.state() for one in sources)])
    if (held := kept.load(job.kept, sign)) is not None:
        info, arrays = held
        features = {name: arrays[f"features.{name}"] for name in tools.encoders}
        return FilmResult(info, arrays["shots"], features, {name: arrays[f"valid.{name}"] for name in tools.encoders})
    with brought(*sources) as paths:
        done = encode_film(job, tools, *paths)
    if done.shots_S2 is not None:
        arrays = {f"features.{name}": array for name, array in done.features.items()}
        arrays |= {f"valid.{name}": array for name, array in done.valid.items()}
        kept.save(job.kept, sign, done.info, {"shots": done.shots_S2, **arrays})
    return done


def encode_film(
    job: FilmJob, tools: Tools, film: Path, shot_list: Path | None = None, subtitles: Path | None = None
) -> FilmResult:
    """Decode a film and encode it: a thread decodes, finds shots and scales pictures while this one encodes.

    Args:
        film: where it lies.
        shot_list: its shot list; None finds the shots.
        subtitles: its subtitle file; None is a film without.

    Raises:
        UserError: a film, list or subtitle file that cannot be read.
    """
    facts = probe(film)
    shots: np.ndarray | ShotFinder
    if shot_list is not None:
        shots, source = read_shot_list(shot_list, facts.fps, first_s=facts.first_s), {"list": shot_list.name}
    else:
        assert tools.finder is not None  # or there would be a list
        shots, source = tools.finder, tools.finder.describe()
    # A broken subtitle file is found before the picture is decoded.
    spoken = None if subtitles is None else read_subtitles(subtitles)
    outputs = {name: [Output(encoder) for encoder in parts] for name, parts in tools.encoders.items()}
    shots_S2 = _encode_pictures(film, shots, outputs, threads=job.threads)
    if isinstance(shots, ShotFinder):
        _check_whole(film, facts.duration_s, float(shots_S2[-1, 1]) / 1000)
    _encode_sound(film, shots_S2, outputs)
    if spoken is None and tools.speech is not None:
        spoken = tools.speech.transcribe(read_ahead(read_sound(film, parts_of(int(shots_S2[-1, 1])))))
    for output in of_kind(outputs, "words"):
        for words in words_of_shots(spoken, shots_S2):
            output.add(words)
    info: dict[str, Any] = {
        "title": job.film.file.stem,
        **job.film.info,
        "source": job.film.file.name,
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
    return FilmResult(info, shots_S2, features, valid)


def _check_whole(film: Path, promised_s: float, found_s: float) -> None:
    """Refuse a film whose picture ends long before the length that its container states: a download cut short."""
    if promised_s - found_s > max(2.0, 0.1 * promised_s):
        raise UserError(
            f"{film} breaks off: its picture ends at {found_s:.1f} s of {promised_s:.1f} s",
            remedy="copy or download it again, or give its shots with --shots if it is meant so",
        )


def _encode_pictures(film: Path, shots: np.ndarray | ShotFinder, outputs: Outputs, *, threads: int) -> np.ndarray:
    """The shots, int32 [S, 2] ms. A given list needs no decoding where nobody looks at the picture."""
    watching = of_kind(outputs, "picture")
    if isinstance(shots, np.ndarray) and not watching:
        return shots
    samplings = list(dict.fromkeys(output.sampling for output in watching))
    spans: list[tuple[int, int]] = []
    pictures = read_pictures(film, samplings, shots=shots, threads=threads)
    for shot in read_ahead(pictures):
        spans.append((shot.start_ms, shot.end_ms))
        for output in watching:
            output.add(shot.samples[output.sampling])
    return np.array(spans, dtype=np.int32)


def _encode_sound(film: Path, shots_S2: np.ndarray, outputs: Outputs) -> None:
    listening = of_kind(outputs, "sound")
    if not listening:
        return
    for sound in read_ahead(read_sound(film, shots_S2)):
        for output in listening:
            output.add(sound)
