"""The film maker: files that open, labels that fit, equal bytes for equal seeds, cuts that can be found."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

av = pytest.importorskip("av")

from lmp.errors import UserError  # noqa: E402
from lmp.films.synthetic import FilmSettings, FilmTruth, make_film, make_films  # noqa: E402

SMALL = FilmSettings(shots=40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, FilmTruth]]:
    path = tmp_path_factory.mktemp("made") / "film-0007.mp4"
    yield path, make_film(path, seed=5, settings=SMALL)


def labels_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".labels.json").read_text())


def digest(folder: Path) -> str:
    files = sorted(folder.iterdir())
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def test_streams_hold_what_was_promised(made: tuple[Path, FilmTruth]) -> None:
    path, truth = made
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.width, video.height, video.average_rate) == (SMALL.width, SMALL.height, SMALL.fps)
        times = [frame.time for frame in container.decode(video)]
    assert len(times) == truth.frames
    assert times == pytest.approx([number / SMALL.fps for number in range(truth.frames)])
    with av.open(str(path)) as container:
        sounds = list(container.decode(audio=0))
    assert sounds[0].sample_rate == SMALL.sample_rate
    assert sum(sound.samples for sound in sounds) / SMALL.sample_rate == pytest.approx(
        truth.frames / SMALL.fps, abs=0.15
    )


def test_labels_tile_the_film(made: tuple[Path, FilmTruth]) -> None:
    path, truth = made
    labels = labels_of(path)
    shots = labels["shots"]
    assert labels["film"] == {"genre": truth.genre} and labels["fps"] == SMALL.fps
    assert len(shots) == SMALL.shots
    assert shots[0]["start_ms"] == 0
    assert shots[-1]["end_ms"] == round(truth.frames * 1000 / SMALL.fps)
    assert all(one["end_ms"] == other["start_ms"] for one, other in pairwise(shots))
    assert all(650 <= shot["end_ms"] - shot["start_ms"] <= 2100 for shot in shots)
    assert [round(cut * 1000 / SMALL.fps) for cut in labels["cuts_frames"]] == [s["start_ms"] for s in shots[1:]]
    assert [shot["act"] for shot in shots] == sorted(shot["act"] for shot in shots)
    assert {shot["act"] for shot in shots} == {1, 2, 3}
    assert all(shot["people"] and shot["mood"] for shot in shots)


def test_subtitles_lie_in_the_shot_that_speaks(made: tuple[Path, FilmTruth]) -> None:
    pysubs2 = pytest.importorskip("pysubs2")
    path, truth = made
    lines = list(pysubs2.load(str(path.with_suffix(".srt"))))
    speaking = [shot for shot in truth.shots if shot.speaker]
    assert [line.text for line in lines] == [shot.line for shot in speaking]
    assert 0.3 * SMALL.shots < len(lines) < 0.9 * SMALL.shots
    for line, shot in zip(lines, speaking, strict=True):
        assert shot.start_frame * 1000 / truth.fps <= line.start < line.end <= shot.end_frame * 1000 / truth.fps


@pytest.mark.parametrize("name", ["ContentDetector", "AdaptiveDetector"])
def test_cuts_can_be_found(made: tuple[Path, FilmTruth], name: str) -> None:
    scenedetect = pytest.importorskip("scenedetect")
    path, truth = made
    detector = getattr(scenedetect.detectors, name)(min_scene_len=5)
    found = {start.frame_num for start, _ in scenedetect.detect(str(path), detector)[1:]}
    true = set(truth.cuts_frames)
    assert len(found & true) >= 0.97 * len(true)
    assert len(found & true) >= 0.97 * len(found)


def test_picture_of_a_shot_looks_like_the_one_two_away(made: tuple[Path, FilmTruth]) -> None:
    """The cameras alternate: the neighbour differs, the shot two away is of the same set-up."""
    path, truth = made
    middles = [(shot.start_frame + shot.end_frame) // 2 for shot in truth.shots]
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24").mean((0, 1)) for frame in container.decode(video=0)]
    colours = [frames[middle] for middle in middles]
    scenes = [shot.scene for shot in truth.shots]
    near, two_away = (
        [abs(colours[i] - colours[i + k]).mean() for i in range(len(scenes) - k) if scenes[i] == scenes[i + k]]
        for k in (1, 2)
    )
    assert sum(near) / len(near) > 2 * sum(two_away) / len(two_away)


def test_places_return_after_other_places(made: tuple[Path, FilmTruth]) -> None:
    places = [shot.place for shot in made[1].shots]
    scenes = [place for number, place in enumerate(places) if number == 0 or place != places[number - 1]]
    assert len(scenes) > len(set(scenes)), "no place returns"
    first_act, last_act = ({shot.place for shot in made[1].shots if shot.act == act} for act in (1, 3))
    assert first_act & last_act


def test_same_seed_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    tiny = FilmSettings(shots=12)
    paths = make_films(tmp_path / "a", films=2, seed=3, settings=tiny, workers=2, progress=False)
    make_films(tmp_path / "b", films=2, seed=3, settings=tiny, workers=1, progress=False)
    assert [path.name for path in paths] == ["film-0000.mp4", "film-0001.mp4"]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        f"film-000{number}{suffix}" for number in (0, 1) for suffix in (".mp4", ".srt", ".labels.json")
    }
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert labels_of(paths[0])["film"] != labels_of(paths[1])["film"], "genres are taken in turn"


def test_other_seed_other_film(tmp_path: Path) -> None:
    one, two = tmp_path / "one.mp4", tmp_path / "two.mp4"
    for path, seed in ((one, 1), (two, 2)):
        make_film(path, seed=seed, settings=FilmSettings(shots=12, genre="western"))
    assert one.read_bytes() != two.read_bytes()
    assert labels_of(one) != labels_of(two)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("width 100")) as caught:
        FilmSettings(width=100, shots=3, genre="opera")
    assert "shots 3" in str(caught.value) and "opera" in str(caught.value)
    with pytest.raises(UserError, match="no name for a film"):
        make_film(tmp_path / "my film.mp4", seed=0)
    with pytest.raises(UserError, match="0 films"):
        make_films(tmp_path, films=0, seed=0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        make_film(tmp_path / "file" / "film.mp4", seed=0, settings=FilmSettings(shots=12))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
