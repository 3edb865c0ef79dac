"""`lmp data inspect`: one film shot by shot, from its shards and, where it is at hand, from the film itself."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmp.data.head import Table, clock
from lmp.data.index import FilmIndex
from lmp.errors import UserError

THUMBNAIL = 135
"""Pixels, the height of a shot's picture."""
_PICTURES = 3  # of each shot; the middle one is shown, all must be black for the shot to be


@dataclass
class Inspected:
    """A film as its shards have it.

    Attributes:
        key: of the film.
        info: its record, KEY.json.
        first: number of the first of the shots here.
        shots_S2: int32 [S, 2], milliseconds.
        features: NAME -> float32 [S, K * D].
        valid: NAME -> bool [S].
        like: NAME -> float [S], cosine of a shot's features and those of the shot before; NaN if either is missing.
        marks: of each shot, what is odd.
    """

    key: str
    info: dict[str, Any]
    first: int
    shots_S2: np.ndarray
    features: dict[str, np.ndarray]
    valid: dict[str, np.ndarray]
    like: dict[str, np.ndarray]
    marks: list[list[str]]


@dataclass
class Seen:
    """What the film itself shows in each of the shots.

    Attributes:
        words: of the subtitles, as ingest deals them; "" where nothing is said.
        loudness_db: RMS in dB below full scale, -inf for digital silence; None where there is no sound.
        notes: what does not fit together.
    """

    words: list[str] = field(default_factory=list)
    loudness_db: list[float | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def inspect_film(index: FilmIndex, film: int, *, first: int = 0, count: int | None = None) -> Inspected:
    """Read shots of a film, all from `first` on or `count` of them.

    Raises:
        UserError: it has no such shot, or the shard is damaged.
    """
    shots = int(index.shots[film])
    if not 0 <= first < shots:
        raise UserError(
            f"film {index.keys[film]} has shots 0 to {shots - 1}, not {first}", remedy="give another --first"
        )
    # One more, to compare the first with the one before it.
    before = min(first, 1)
    found = index.read(film, first - before, min(shots, first + count) if count else shots)
    spans = found.shots_N2.numpy().copy()
    features = {name: tensor.float().flatten(1).numpy() for name, tensor in found.features.items()}
    valid = {name: tensor.numpy().copy() for name, tensor in found.valid.items()}
    like = {name: _likeness(features[name], valid[name]) for name in features}
    marks: list[list[str]] = [[] for _ in spans]
    for shot in range(1, len(spans)):
        if spans[shot, 0] > spans[shot - 1, 1]:
            marks[shot].append(f"gap {(spans[shot, 0] - spans[shot - 1, 1]) / 1000:.1f} s")
        if spans[shot, 0] < spans[shot - 1, 1]:
            marks[shot].append("overlap")
    for name, features_SF in features.items():
        constant = valid[name] & (features_SF.shape[1] > 1) & (np.ptp(features_SF, axis=1) == 0)
        repeated = np.zeros_like(constant)
        repeated[1:] = (features_SF[1:] == features_SF[:-1]).all(axis=1) & valid[name][1:] & valid[name][:-1]
        for shot in np.flatnonzero(constant).tolist():
            marks[shot].append(f"{name} constant")
        for shot in np.flatnonzero(repeated).tolist():
            marks[shot].append(f"{name} repeated")
    return Inspected(
        index.keys[film],
        index.info(film),
        first,
        spans[before:],
        {name: array[before:] for name, array in features.items()},
        {name: array[before:] for name, array in valid.items()},
        {name: array[before:] for name, array in like.items()},
        marks[before:],
    )


def _likeness(features_SF: np.ndarray, valid_S: np.ndarray) -> np.ndarray:
    """float [S]: cosine with the row before."""
    like_S = np.full(len(features_SF), np.nan)
    norms_S = np.linalg.norm(features_SF, axis=1)
    both = valid_S[1:] & valid_S[:-1] & (norms_S[1:] > 0) & (norms_S[:-1] > 0)
    products = (features_SF[1:] * features_SF[:-1]).sum(axis=1)
    like_S[1:][both] = products[both] / (norms_S[1:] * norms_S[:-1])[both]
    return like_S


@contextmanager
def film_at_hand(found: Inspected, films: str, subtitles: Path | None) -> Generator[tuple[Path, Path | None]]:
    """Local paths of the film of this key and of its subtitles.

    Args:
        films: whatever `lmp ingest` takes: a film, folder, tar or list.
        subtitles: folder of subtitles; None looks beside the film.

    Raises:
        UserError: there is no film of this key, or it cannot be read.
    """
    try:
        from lmp.films.sources import brought, expand
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", remedy="pip install 'lmp[films]'") from error
    film = next((film for film in expand([films]).films if film.key == found.key), None)
    if film is None:
        source = found.info.get("source")
        told = f", which was {source}" if source else ""
        raise UserError(
            f"{films} has no film {found.key}{told}", remedy="give what `lmp ingest` was given, or leave --films out"
        )
    with ExitStack() as stack:
        path, _, spoken = stack.enter_context(brought(film.file, None, film.subtitles_in(subtitles)))
        yield path, spoken


def listen(found: Inspected, film: Path, subtitles: Path | None) -> Seen:
    """Words and loudness of each shot. Marks the silent ones."""
    from lmp.films.media import probe, read_sound
    from lmp.films.outputs import SILENT
    from lmp.films.subtitles import read_subtitles, words_of_shots

    seen = Seen()
    facts = probe(film)
    told_s = found.info.get("duration_s")
    if told_s and facts.duration_s and abs(told_s - facts.duration_s) > 0.5:
        seen.notes.append(f"{film.name} is {facts.duration_s:.1f} s long, the film of the shards {told_s:.1f} s")
    spans_S2 = _apart(found.shots_S2)
    spoken = None if subtitles is None else read_subtitles(subtitles)
    seen.words = words_of_shots(spoken, spans_S2)
    if not facts.sound:
        seen.loudness_db = [None] * len(spans_S2)
        return seen
    for shot, sound in enumerate(read_sound(film, spans_S2)):
        power = float(np.mean(np.square(sound, dtype=np.float64))) if len(sound) else 0.0
        seen.loudness_db.append((10 * math.log10(power) if power else -math.inf) if len(sound) else None)
        if len(sound) and np.abs(sound).max() < SILENT:
            found.marks[shot].append("silent")
    return seen


def look(found: Inspected, film: Path) -> Generator[np.ndarray]:
    """The picture in the middle of each shot, uint8 [135, width, 3]. Marks the black shots as it goes."""
    from lmp.films.media import Sampling, read_pictures
    from lmp.films.outputs import BLACK

    sampling = Sampling(_PICTURES, THUMBNAIL)
    pictures = read_pictures(film, [sampling], shots=_apart(found.shots_S2))
    for shot, shown in zip(range(len(found.shots_S2)), pictures, strict=False):
        sample = shown.samples[sampling]
        if sample.max() <= BLACK:
            found.marks[shot].append("black")
        yield sample[_PICTURES // 2]


def _apart(shots_S2: np.ndarray) -> np.ndarray:
    """Shots that overlap end where the next one begins; films are read in order."""
    spans_S2 = shots_S2.copy()
    spans_S2[:-1, 1] = np.maximum(np.minimum(spans_S2[:-1, 1], spans_S2[1:, 0]), spans_S2[:-1, 0] + 1)
    return spans_S2


def facts(found: Inspected) -> list[str]:
    """What the film's record says, line by line."""
    info = found.info
    by = info.get("shots_from")
    lines = [
        f"{found.key}: {info.get('title', '')} ({info.get('source', 'source unknown')})",
        ", ".join([f"{info['shots']} shots", *_length(info), *([f"shots from {_told(by)}"] if by else [])]),
    ]
    if spoken := info.get("subtitles"):
        lines.append(f"subtitles: {_told(spoken)}")
    quality, cleared = info.get("quality", {}), info.get("cleared", {})
    for name in found.features:
        modality = info["modalities"][name]
        odd = {what: count for part in quality if part.split("/")[0] == name for what, count in quality[part].items()}
        if cleared.get(name):
            odd["cleared"] = cleared[name]
        counted = "".join(f", {count} {what}" for what, count in sorted(odd.items()))
        made_by = info.get("encoders", {}).get(name, {}).get("name", "an unknown encoder")
        lines.append(f"{name}: {modality['tokens']} x {modality['width']} from {made_by}{counted}")
    return lines


def _length(info: dict[str, Any]) -> list[str]:
    """How long the film is, if its record says so."""
    return [clock(round(float(info["duration_s"]) * 1000))] if info.get("duration_s") else []


def _told(value: Any) -> str:
    """A small JSON object in words."""
    if not isinstance(value, dict):
        return str(value)
    parts: list[str] = []
    for name, inner in value.items():
        if name in ("name", "list"):
            parts.insert(0, str(inner))
        elif inner not in ({}, None):
            parts.append(f"{name} {_told(inner)}")
    return ", ".join(parts)


def table(found: Inspected, seen: Seen | None) -> Table:
    """A row for each shot: number, times, norm and likeness of each modality, marks, loudness and words."""
    names = ["shot", "start", "end", "s", *found.features, "marks", *(["dB", "words"] if seen else [])]
    norms = {name: np.linalg.norm(array, axis=1) for name, array in found.features.items()}
    rows = []
    for shot, (start, end) in enumerate(found.shots_S2.tolist()):
        row = [str(found.first + shot), clock(start), clock(end), f"{(end - start) / 1000:.1f}"]
        for name in found.features:
            like = found.like[name][shot]
            alike = "" if math.isnan(like) else f" {like:.2f}"
            row.append(f"{norms[name][shot]:.3g}{alike}" if found.valid[name][shot] else "none")
        row.append(", ".join(found.marks[shot]))
        if seen:
            row += [decibels(seen.loudness_db[shot]), seen.words[shot]]
        rows.append(row)
    return Table(names, rows)


def decibels(loudness_db: float | None) -> str:
    """Loudness for reading."""
    return "none" if loudness_db is None else "-inf" if math.isinf(loudness_db) else f"{loudness_db:.0f}"


def overview(index: FilmIndex, keys: Sequence[str]) -> Table:
    """A row for each film: shots, length, where they come from, and what was odd while it was read."""
    rows = []
    for key, info in zip(keys, index.infos(range(len(keys))), strict=True):
        odd = [
            f"{part}: {count} {what}" for part, told in info.get("quality", {}).items() for what, count in told.items()
        ]
        odd += [f"{name}: {count} cleared" for name, count in info.get("cleared", {}).items() if count]
        rows.append(
            [key, str(info["shots"]), "".join(_length(info)), _told(info.get("shots_from", "")), "; ".join(odd)]
        )
    return Table(["film", "shots", "length", "shots from", "odd shots"], rows)
