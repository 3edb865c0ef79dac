"""Shots: cuts found in real and synthetic films, and lists in every format."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.errors import UserError
from lmp.films.cuts import Cut, ShotFinder
from lmp.films.detectors import build_finder
from lmp.films.media import read_pictures
from lmp.films.shots import find_shot_list, read_shot_list
from lmp.films.synthetic import FilmSettings, make_films


def cuts_of(film: Path, fps: float) -> list[int]:
    return [round(shot.start_ms * fps / 1000) for shot in read_pictures(film, [], shots=build_finder())][1:]


def score(found: list[int], true: list[int], tolerance: int) -> tuple[float, float]:
    hits = sum(any(abs(f - t) <= tolerance for t in true) for f in found)
    recalled = sum(any(abs(f - t) <= tolerance for f in found) for t in true)
    return hits / max(len(found), 1), recalled / len(true)


class Recorder:
    """A detector that keeps the pictures it is shown, and finds nothing."""

    look = build_finder().detector.look

    def __init__(self) -> None:
        self.pictures: list[np.ndarray] = []

    @property
    def undecided(self) -> int:
        return len(self.pictures)

    def describe(self) -> dict[str, Any]:
        return {}

    def start(self) -> Recorder:
        return self

    def feed(self, picture_HWC: np.ndarray) -> list[Cut]:
        self.pictures.append(picture_HWC)
        return []

    def finish(self) -> list[Cut]:
        return []


class RealFilm(NamedTuple):
    pictures: list[np.ndarray]
    cuts: list[int]


@pytest.fixture(scope="module")
def real_film(real_data: Path) -> RealFilm:
    film = real_data / "films/tears_of_steel_battle.webm"
    listed = film.with_name("tears_of_steel_battle.shots.csv")
    if not (film.exists() and listed.exists()):
        pytest.skip("the real film is absent")
    with listed.open() as file:
        cuts = [int(row["clip_start"]) for row in csv.DictReader(file)][1:]
    recorder = Recorder()
    assert len(list(read_pictures(film, [], shots=ShotFinder(recorder)))) == 1
    return RealFilm(recorder.pictures, cuts)


@pytest.mark.parametrize(
    ("detector", "least_recall", "most_extra"),
    [
        ("layout", 0.95, 5),
        ("content", 0.95, 10),
        ("hist", 0.90, 7),
        ("hash", 0.80, 15),
        ("adaptive", 0.70, 3),
        ("threshold", 0.0, 0),  # which finds fades, and here are none
    ],
)
def test_real_cuts_are_found(
    real_film: RealFilm, detector: str, least_recall: float, most_extra: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list lacks the flashes of the battle, so some cuts more are found."""
    starts, found = build_finder(detector).start(), []
    for number, picture in enumerate(real_film.pictures):
        found += starts.feed(number * 1000 / 24, picture)
    found += starts.finish(len(real_film.pictures) * 1000 / 24)
    cuts = [round(start_ms * 24 / 1000) for start_ms in found]
    precision, recall = score(cuts, real_film.cuts, 1)
    extra = round((1 - precision) * len(cuts)) if cuts else 0
    with capsys.disabled():
        print(f"\n{detector}: {recall * len(real_film.cuts):.0f} of {len(real_film.cuts)} cuts, {extra} more")
    assert recall >= least_recall
    assert extra <= most_extra


def test_synthetic_cuts_are_found(tmp_path: Path) -> None:
    settings = FilmSettings(shots=30)
    for film in make_films(tmp_path, films=3, seed=11, settings=settings, workers=1, progress=False):
        true = json.loads(film.with_suffix(".labels.json").read_text())["cuts_frames"]
        precision, recall = score(cuts_of(film, settings.fps), true, 0)
        assert precision >= 0.97
        assert recall >= 0.97


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "0.0 1.0\n1.0 2.5\n"),
        ("a.txt", "0 24\n24 60\n"),
        ("a.txt", "0 23\n24 59\n"),
        ("a.scenes.txt", "0 23\n24 59\n"),
        ("a.csv", "shot,clip_start,clip_end\n7,0,23\n8,24,59\n"),
        (
            "a.csv",
            "Timecode List:,00:00:01.000\nScene Number,Start Frame,Start Timecode,Start Time (seconds),"
            "End Frame,End Timecode,End Time (seconds)\n1,1,x,0.000,24,x,1.000\n2,25,x,1.000,60,x,2.500\n",
        ),
    ],
)
def test_lists_in_every_format_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    shots_S2 = read_shot_list(path, 24.0)
    assert shots_S2.dtype == np.int32
    assert shots_S2.tolist() == [[0, 1000], [1000, 2500]]


@pytest.mark.parametrize("text", ["", "0 1 2\n", "a b\n", "5 3\n", "0 9\n4 12\n", "nan 1.0\n", "-3 4\n"])
def test_a_bad_list_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.txt"):
        read_shot_list(path, 24.0)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"film\.mp4"):
        find_shot_list(tmp_path, Path("film.mp4"))
