"""The hidden variables of synthetic films: what happens in every shot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmp.errors import UserError
from lmp.films.synthetic_world import FILLERS, GENRES, MOODS, PEOPLE, PLACES, THINGS, VERBS

ACTS = ((0.28, (0, 1, 2)), (0.44, (3, 4, 1, 5)), (0.28, (0, 2, 1, 0)))
"""Share of the film's shots, and which of the film's places its scenes visit, the first one first."""
SIZES = ("wide", "medium", "close")
SOUNDS = ("ambience", "music", "silence")


@dataclass(frozen=True)
class FilmSettings:
    """Size and length of a film.

    Attributes:
        width, height: pixels, multiples of 16.
        fps: frames per second.
        shots: shots in the film.
        sample_rate: of the mono sound, in Hz.
        crf: quality of x264; lower is better.
        genre: one of the world's genres; None draws it from the seed.

    Raises:
        UserError: values out of range, all of them in one message.
    """

    width: int = 160
    height: int = 96
    fps: int = 12
    shots: int = 100
    sample_rate: int = 16000
    crf: int = 23
    genre: str | None = None

    def __post_init__(self) -> None:
        checks = (
            (
                self.width % 16 == 0 and self.width >= 64,
                f"width {self.width} is no multiple of 16 from 64 up",
            ),
            (
                self.height % 16 == 0 and self.height >= 48,
                f"height {self.height} is no multiple of 16 from 48 up",
            ),
            (8 <= self.fps <= 60, f"fps {self.fps} is not in 8..60"),
            (self.shots >= 12, f"shots {self.shots} is below 12, too few for three acts"),
            (
                self.sample_rate in (16000, 22050, 32000, 44100, 48000),
                f"sample_rate {self.sample_rate} is unusual",
            ),
            (0 <= self.crf <= 51, f"crf {self.crf} is not in 0..51"),
            (
                self.genre is None or self.genre in GENRES,
                f"genre {self.genre!r} is none of {', '.join(GENRES)}",
            ),
        )
        faults = [text for good, text in checks if not good]
        if faults:
            raise UserError(f"film settings: {'; '.join(faults)}", remedy="correct these values")


@dataclass
class ShotTruth:
    """What drives one shot, of frames [start_frame, end_frame)."""

    start_frame: int
    end_frame: int
    place: str
    people: list[str]
    """The person (or, in a wide shot, both) in the picture; the first one is nearest to the camera."""
    mood: str
    act: int
    scene: int
    camera: int
    size: str
    thing: str
    speed: float
    light: float
    sound: str
    """Of the background: ambience, music or silence."""
    speaker: str | None = None
    line: str = ""


@dataclass
class FilmTruth:
    """A film's hidden variables."""

    key: str
    genre: str
    fps: int
    shots: list[ShotTruth] = field(default_factory=list)

    @property
    def frames(self) -> int:
        """Frames in the whole film."""
        return self.shots[-1].end_frame

    @property
    def cuts_frames(self) -> list[int]:
        """First frame of every shot but the first."""
        return [shot.start_frame for shot in self.shots[1:]]

    def labels(self) -> dict[str, Any]:
        """The content of KEY.labels.json."""
        shots = [
            {
                "start_ms": round(shot.start_frame * 1000 / self.fps),
                "end_ms": round(shot.end_frame * 1000 / self.fps),
                "place": shot.place,
                "people": shot.people,
                "mood": shot.mood,
                "act": shot.act,
            }
            for shot in self.shots
        ]
        return {
            "film": {"genre": self.genre},
            "shots": shots,
            "cuts_frames": self.cuts_frames,
            "fps": self.fps,
        }


def write_script(rng: np.random.Generator, key: str, settings: FilmSettings) -> FilmTruth:
    """Draw the hidden variables of a film.

    The camera changes with every shot, across scenes too, and one camera's side is darker: no cut is lost.
    """
    genre_name = settings.genre or str(rng.choice(list(GENRES)))
    genre = GENRES[genre_name]
    weights = np.array([3.0 if name in genre.places else 0.8 for name in PLACES])
    places = [str(name) for name in rng.choice(list(PLACES), 6, replace=False, p=weights / weights.sum())]
    cast = [str(name) for name in rng.choice(list(PEOPLE), 5, replace=False)]
    pairs = {place: [str(name) for name in rng.choice(cast, 2, replace=False)] for place in places}
    truth = FilmTruth(key=key, genre=genre_name, fps=settings.fps)
    speed, camera = 0.5, 0
    for scene, (act, place_number, shots) in enumerate(_scenes(rng, settings.shots)):
        place = places[place_number]
        pair = list(pairs[place])
        if rng.random() < 0.15:
            pair[1] = str(rng.choice([name for name in cast if name != pair[0]]))
        mood = str(rng.choice(genre.moods if rng.random() < 0.7 else list(MOODS)))
        topics, usual_sizes = rng.choice(list(THINGS), 2), rng.choice(SIZES, 2, p=(0.08, 0.38, 0.54))
        odds = (0.77 * (1 - genre.music), 0.77 * genre.music, 0.23)
        usual_sounds = rng.choice(SOUNDS, 2, p=odds)
        talk = 0.93 if rng.random() < 0.6 else 0.1
        level, slope = rng.normal(1.0, 0.06), rng.choice((-1, 1)) * rng.uniform(0.01, 0.05)
        for number in range(shots):
            start = truth.frames if truth.shots else 0
            length_s = float(np.clip(genre.shot_s * math.exp(rng.normal(0, 0.28)), 0.8, 2.0))
            size = str(usual_sizes[camera] if rng.random() < 0.6 else rng.choice(SIZES, p=(0.1, 0.3, 0.6)))
            size = "wide" if number == 0 else size
            thing = str(topics[camera] if rng.random() < 0.6 else rng.choice(list(THINGS)))
            speed = float(np.clip(0.5 + 0.6 * (speed - 0.5) + rng.normal(0, 0.24), 0, 1))
            sound = str(usual_sounds[camera] if rng.random() < 0.7 else rng.choice(SOUNDS, p=odds))
            shot = ShotTruth(
                start_frame=start,
                end_frame=start + round(length_s * settings.fps),
                place=place,
                people=[pair[camera], pair[1 - camera]] if size == "wide" else [pair[camera]],
                mood=mood,
                act=act,
                scene=scene,
                camera=camera,
                size=size,
                thing=thing,
                speed=speed,
                light=float(np.clip(level + slope * (number - shots / 2) + rng.normal(0, 0.015), 0.75, 1.25)),
                sound=sound,
            )
            if rng.random() < talk:
                shot.speaker = pair[camera] if rng.random() < 0.9 else pair[1 - camera]
                shot.line = _line(rng, shot, listener=pair[0] if shot.speaker == pair[1] else pair[1])
            truth.shots.append(shot)
            camera = 1 - camera
    return truth


def _scenes(rng: np.random.Generator, shots: int) -> Iterator[tuple[int, int, int]]:
    """Act (from 1), number of the place, and number of shots of each scene; the shots add up."""
    ends = [*np.round(np.cumsum([share for share, _ in ACTS[:-1]]) * shots).astype(int), shots]
    done, place = 0, -1
    for act, (end, (_, visits)) in enumerate(zip(ends, ACTS, strict=True), start=1):
        first = True
        while done < end:
            left = int(end) - done
            count = min(int(rng.integers(5, 10)), left)
            if 0 < left - count < 4:
                count = left - 4 if left >= 8 else left
            choices = [visit for visit in visits if visit != place]
            place = visits[0] if first and visits[0] != place else int(rng.choice(choices))
            yield act, place, count
            done, first = done + count, False


def _line(rng: np.random.Generator, shot: ShotTruth, *, listener: str) -> str:
    parts: list[str] = []
    if rng.random() < 0.8:
        parts.append(str(rng.choice(PEOPLE[str(shot.speaker)].fillers)))
    if rng.random() < 0.8:
        parts.append(listener)
    if rng.random() < 0.6:
        verb = rng.choice(VERBS[min(int(shot.speed * 3), 2)])
        parts.append(f"the {rng.choice(THINGS[shot.thing].words)} {verb}")
    if rng.random() < 0.2:
        parts.append(str(rng.choice(MOODS[shot.mood].phrases)))
    if rng.random() < 0.22:
        parts.append(f"here by the {rng.choice(PLACES[shot.place].words)}")
    line = ", ".join(parts or [str(rng.choice(FILLERS))])
    return line[0].upper() + line[1:] + "."


def line_span(shot: ShotTruth, fps: int) -> tuple[float, float]:
    """Start and end of the line, in seconds from the start of its shot."""
    length_s = (shot.end_frame - shot.start_frame) / fps
    return 0.1, 0.1 + min(length_s - 0.2, 0.3 + 0.05 * len(shot.line))
