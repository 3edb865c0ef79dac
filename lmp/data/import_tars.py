"""WebDataset tars of one shot per sample become film shards."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lmp.data.arrays import KINDS, read_array, to_stored
from lmp.data.imports import ShotLists, Target, tracked
from lmp.data.manifest import Manifest
from lmp.data.record import KEY_PATTERN, WRITER_FIELDS, FilmRecord
from lmp.data.shards import ShardWriter
from lmp.data.tar import Sample, Tar
from lmp.errors import UserError

FILM_PATTERN = r"(?P<film>.+)_(?P<shot>\d+)"
_TIMES = ("start_ms", "end_ms", "start", "end")


class Feature(NamedTuple):
    """Where a modality lies in a sample: type of the member, and the tensor in it if that has a name."""

    extension: str
    tensor: str | None

    @classmethod
    def parse(cls, source: str) -> Feature:
        """`video.npy`, or `safetensors:video`.

        Raises:
            UserError: no type that can be read.
        """
        extension, colon, tensor = source.partition(":")
        if extension.rpartition(".")[2] not in KINDS or (colon and not tensor):
            raise UserError(
                f"{source} is no type of a member with features",
                remedy=f"give for example video.npy or safetensors:video; types are {', '.join(KINDS)}",
            )
        return cls(extension, tensor or None)


@dataclass(frozen=True)
class Naming:
    """How samples name their film and shot.

    Attributes:
        pattern: has the groups `film` and `shot`, and fits the whole key of a sample.
        first: number of a film's first shot; None finds out whether it is 0 or 1.
    """

    pattern: re.Pattern[str]
    first: int | None

    @classmethod
    def parse(cls, pattern: str, first: int | None) -> Naming:
        """Check the pattern.

        Raises:
            UserError: it is no regular expression, or lacks a group.
        """
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"the film pattern {pattern} is no regular expression: {error}", remedy="mend it"
            ) from error
        if lacking := {"film", "shot"} - set(compiled.groupindex):
            raise UserError(
                f"the film pattern {pattern} has no group named {min(lacking)}", remedy=f"write it like {FILM_PATTERN}"
            )
        return cls(compiled, first)

    def of(self, sample: Sample, place: str) -> tuple[str, int]:
        """Film and shot of a sample."""
        found = self.pattern.fullmatch(sample.key)
        remedy = f"give a --film-pattern that fits, as {FILM_PATTERN}"
        if found is None:
            raise UserError(f"{place}: the film pattern {self.pattern.pattern} does not fit its key", remedy=remedy)
        film, shot = found["film"] or "", found["shot"] or ""
        if not KEY_PATTERN.fullmatch(film):
            raise UserError(
                f"{place}: {film!r} cannot be a film's key: letters, digits, _ and - only, at most 80", remedy=remedy
            )
        if not re.fullmatch(r"[0-9]{1,9}", shot):
            raise UserError(f"{place}: {shot!r} is no number of a shot", remedy=remedy)
        return film, int(shot)


@dataclass
class _Shot:
    place: str
    times: tuple[int, int] | None
    info: dict[str, Any]
    features: dict[str, torch.Tensor]


@dataclass
class _Gathered:
    """The shots of a film so far, by number."""

    key: str
    shots: dict[int, _Shot] = field(default_factory=dict)


def import_tars(
    target: Target,
    tars: Sequence[Path],
    features: Mapping[str, Feature],
    *,
    naming: Naming,
    shots: ShotLists | None,
) -> Manifest:
    """Write film shards of tars that hold a sample per shot. One film at a time is held in memory.

    A sample without a member of some modality is a shot that lacks it. The samples of a film follow each other, in
    any order, also from one tar to the next.

    Args:
        target: where to, and how. With allow_missing, shots without a sample are marked as lacking everything if
            `shots` lists them, and left out otherwise.
        tars: files, or folders whose *.tar are taken by name; in this order.
        features: NAME -> where it lies in a sample.
        naming: how a sample's key names film and shot.
        shots: the times of shots. None takes `start_ms` and `end_ms`, or `start` and `end` in seconds, of KEY.json;
            what else the KEY.json of all shots of a film agree on goes into the film's.

    Raises:
        UserError: names tar and sample, or film and shot. Nothing is written.
    """
    paths = _listed(tars)
    reader = _Reader(features, _widths(paths, features), timed=shots is None)
    with target.writer() as writer:
        current: _Gathered | None = None
        done: set[str] = set()
        for path, sample, tar in _samples(paths):
            place = f"{path}, sample {sample.key}"
            film, number = naming.of(sample, place)
            if current is not None and film != current.key:
                _write(writer, reader.film(current, naming.first, shots, target), target)
                done.add(current.key)
                current = None
            if film in done:
                raise UserError(
                    f"{place}: film {film} goes on after samples of other films",
                    remedy="write the samples film by film, or give the tars in that order",
                )
            if current is None:
                current = _Gathered(film)
            if (other := current.shots.get(number)) is not None:
                raise UserError(f"{place}: is shot {number} of film {film}, as {other.place}", remedy="give it once")
            current.shots[number] = reader.shot(tar, sample, place)
        if current is not None:
            _write(writer, reader.film(current, naming.first, shots, target), target)
        return writer.close()


def _write(writer: ShardWriter, film: FilmRecord, target: Target) -> None:
    if not target.refuses(film.key, film.info):
        writer.write(film)


def _listed(tars: Sequence[Path]) -> list[Path]:
    paths: list[Path] = []
    for path in tars:
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path} holds no .tar", remedy="give tars, or folders of them")
        paths += found
    if twice := [p for p in paths if paths.count(p) > 1]:
        raise UserError(f"{twice[0]} is given twice", remedy="give every tar once")
    return paths


def _samples(paths: Sequence[Path]) -> Iterator[tuple[Path, Sample, Tar]]:
    for path in tracked(paths, "importing tars"):
        with Tar(path) as tar:
            for sample in tar.samples():
                yield path, sample, tar


def _widths(paths: Sequence[Path], features: Mapping[str, Feature]) -> dict[str, torch.Tensor]:
    """The first features [K, D] of each modality; reads up to there, mostly one sample."""
    widths: dict[str, torch.Tensor] = {}
    first: Sample | None = None
    for path in paths:
        with Tar(path) as tar:
            for sample in tar.samples():
                first = first or sample
                for name in features.keys() - widths.keys():
                    if (rows := _read(tar, sample, name, features[name], path)) is not None:
                        widths[name] = rows
                if len(widths) == len(features):
                    return widths
    name = min(features.keys() - widths.keys())
    held = ", ".join(first.members) if first is not None else "nothing"
    raise UserError(
        f"no sample has a member of type {features[name].extension} for modality {name}; the first has {held}",
        remedy="give the type that the members have",
    )


def _read(tar: Tar, sample: Sample, name: str, feature: Feature, path: Path | str) -> torch.Tensor | None:
    """[K, D]; None if the sample has no such member."""
    member = sample.members.get(feature.extension)
    if member is None:
        return None
    where = f"{path}, member {member.name}"
    file = io.BytesIO(tar.read(member.offset, member.size))
    kind = feature.extension.rpartition(".")[2]
    rows = read_array(file, kind, modality=name, tensor=feature.tensor, where=where)
    if rows.ndim == 1:
        rows = rows[None]
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"{where}: has shape {list(rows.shape)}", remedy="give [D] or [K, D] for each shot")
    return rows


class _Reader:
    """Turns samples into shots, and shots into films.

    Args:
        features: NAME -> where it lies in a sample.
        widths: NAME -> [K, D] of some shot; all others must be like it.
        timed: KEY.json has the times.
    """

    def __init__(self, features: Mapping[str, Feature], widths: Mapping[str, torch.Tensor], *, timed: bool) -> None:
        self._features, self._widths, self._timed = features, widths, timed

    def shot(self, tar: Tar, sample: Sample, place: str) -> _Shot:
        """Read one sample."""
        info = tar.record(sample, place)
        if info is None and self._timed:
            raise UserError(f"{place}: has no json, so no times", remedy="give shot lists with --shots")
        info = info or {}
        found = {}
        for name, feature in self._features.items():
            rows_KD = _read(tar, sample, name, feature, tar.path)
            if rows_KD is None:
                continue
            wanted_KD = self._widths[name]
            if rows_KD.shape != wanted_KD.shape or rows_KD.dtype != wanted_KD.dtype:
                raise UserError(
                    f"{place}, modality {name}: {_kind(rows_KD)}, but the shots before have {_kind(wanted_KD)}",
                    remedy="give all shots features of the same shape and dtype",
                )
            found[name] = rows_KD
        return _Shot(place, _times(info, place) if self._timed else None, info, found)

    def film(self, gathered: _Gathered, first: int | None, lists: ShotLists | None, target: Target) -> FilmRecord:
        """The film of all its shots."""
        numbers = sorted(gathered.shots)
        if lists is None:
            base = first if first is not None else min(numbers[0], 1)
            _check_holes(gathered.key, numbers, base, numbers[-1] + 1, target)
            rows = list(range(len(numbers)))
            shots_S2 = np.array([gathered.shots[n].times for n in numbers], dtype=np.int32)
        else:
            shots_S2 = lists.of(gathered.key)
            base = _base(gathered.key, numbers, len(shots_S2), first)
            _check_holes(gathered.key, numbers, base, base + len(shots_S2), target)
            rows = [n - base for n in numbers]
        features, valid = {}, {}
        for name, wanted_KD in self._widths.items():
            rows_SKD = torch.zeros(len(shots_S2), *wanted_KD.shape, dtype=wanted_KD.dtype)
            valid_S = torch.zeros(len(shots_S2), dtype=torch.bool)
            for row, number in zip(rows, numbers, strict=True):
                if (rows_KD := gathered.shots[number].features.get(name)) is not None:
                    rows_SKD[row], valid_S[row] = rows_KD, True
            features[name] = to_stored(rows_SKD, target.dtype, f"film {gathered.key}, modality {name}")
            valid[name] = valid_S
        info = _common([shot.info for shot in gathered.shots.values()])
        if lists is not None and lists.fps is not None:
            info["fps"] = lists.fps
        return FilmRecord(gathered.key, info, shots_S2, features, valid)


def _base(film: str, numbers: list[int], count: int, first: int | None) -> int:
    """The number of the film's first shot."""
    fitting = [b for b in ((0, 1) if first is None else (first,)) if b <= numbers[0] and numbers[-1] - b < count]
    if not fitting:
        raise UserError(
            f"film {film}: its samples are numbered {numbers[0]} to {numbers[-1]}, but its list has {count} shots",
            remedy="give one shot in the list per sample, numbered from 0 or from 1",
        )
    if len(fitting) > 1:
        raise UserError(
            f"film {film}: {count} shots are listed, and samples {numbers[0]} to {numbers[-1]} fit both from 0 and 1",
            remedy="say with --first-shot which number the first shot has",
        )
    return fitting[0]


def _check_holes(film: str, numbers: list[int], start: int, stop: int, target: Target) -> None:
    if numbers[0] < start:
        raise UserError(f"film {film} has a shot {numbers[0]}", remedy="give the right --first-shot")
    if target.allow_missing or len(numbers) == stop - start:
        return
    present = set(numbers)
    missing = next(n for n in range(start, stop) if n not in present)
    raise UserError(
        f"film {film}: shot {missing} is missing, {stop - start - len(numbers)} of {stop - start} in all",
        remedy="put it next to the other samples of the film, or allow holes with --allow-missing",
    )


def _times(info: Mapping[str, Any], place: str) -> tuple[int, int]:
    """Start and end in milliseconds."""
    for names, unit in ((_TIMES[:2], 1), (_TIMES[2:], 1000)):
        if all(name in info for name in names):
            values = [info[name] for name in names]
            if not all(type(v) in (int, float) and math.isfinite(v) and abs(v) * unit < 2**31 for v in values):
                raise UserError(f"{place}: {' and '.join(names)} are {values}", remedy="give two numbers")
            return round(values[0] * unit), round(values[1] * unit)
    raise UserError(
        f"{place}: its json has neither start_ms and end_ms nor start and end",
        remedy="give shot lists with --shots",
    )


def _common(infos: list[dict[str, Any]]) -> dict[str, Any]:
    """What all shots of a film agree on."""
    return {
        name: value
        for name, value in infos[0].items()
        if name not in (*_TIMES, *WRITER_FIELDS) and all(name in i and i[name] == value for i in infos)
    }


def _kind(rows_KD: torch.Tensor) -> str:
    return f"{str(rows_KD.dtype).removeprefix('torch.')} {list(rows_KD.shape)}"
