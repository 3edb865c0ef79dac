"""Detectors by name: cuts are those of PySceneDetect, mistakes are told, what found the shots is on record."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("scenedetect")

from scenedetect import detectors as theirs
from scenedetect.common import FrameTimecode

from lmp.cli import main
from lmp.data.index import FilmIndex
from lmp.errors import UserError
from lmp.films import kept
from lmp.films.detectors import NAMES, build_finder
from lmp.films.ingest import ingest
from lmp.films.synthetic import FilmSettings, make_films


def film_of(levels: list[tuple[int, int, int]]) -> list[np.ndarray]:
    """Scenes of (frames, picture, fade): noise on one of several grounds, its last frames fading to black and back."""
    rng = np.random.default_rng(0)
    grounds = [rng.integers(30, 200, (9, 16, 3)).repeat(8, 0).repeat(8, 1) for _ in range(4)]
    pictures = []
    for frames, ground, fade in levels:
        for number in range(frames):
            dark = min(1.0, number / fade, (frames - 1 - number) / fade) if fade else 1.0
            noise = rng.normal(0, 3, (72, 128, 3))
            pictures.append(((grounds[ground] + noise) * dark).clip(0, 255).astype(np.uint8))
    return pictures


FILM = film_of([(30, 0, 0), (25, 1, 0), (3, 2, 0), (40, 0, 10), (30, 3, 10), (20, 2, 0), (25, 1, 8)])


def theirs_on(detector: Any, pictures: list[np.ndarray]) -> list[int]:
    cuts = []
    for number, picture in enumerate(pictures):
        cuts += detector.process_frame(FrameTimecode(number, fps=24.0), picture)
    cuts += detector.post_process(FrameTimecode(len(pictures) - 1, fps=24.0))
    return [cut.frame_num for cut in cuts]


@pytest.mark.parametrize(
    ("spec", "detector"),
    [
        ("content", theirs.ContentDetector(min_scene_len=0)),
        ("content:threshold=5,luma_only=true", theirs.ContentDetector(5.0, 0, luma_only=True)),
        (
            "content:weights=1/0/1/2,kernel_size=5",
            theirs.ContentDetector(27.0, 0, theirs.ContentDetector.Components(1, 0, 1, 2), kernel_size=5),
        ),
        ("adaptive", theirs.AdaptiveDetector(min_scene_len=0)),
        ("adaptive:adaptive_threshold=1.5,window_width=7", theirs.AdaptiveDetector(1.5, 0, 7)),
        ("threshold", theirs.ThresholdDetector(min_scene_len=0)),
        ("threshold:threshold=40,fade_bias=-1", theirs.ThresholdDetector(40, 0, -1.0)),
        ("threshold:add_final_scene=true", theirs.ThresholdDetector(12, 0, add_final_scene=True)),
        (
            "threshold:threshold=90,method=ceiling,min_out_length=4",
            theirs.ThresholdDetector(90, 0, method=theirs.ThresholdDetector.Method.CEILING, min_out_length=4),
        ),
        ("hash", theirs.HashDetector(min_scene_len=0)),
        ("hash:threshold=0.1,size=4", theirs.HashDetector(0.1, 4, min_scene_len=0)),
        ("hist", theirs.HistogramDetector(min_scene_len=0)),
        ("hist:threshold=0.7,bins=32", theirs.HistogramDetector(0.7, 32, min_scene_len=0)),
    ],
)
def test_cuts_are_those_of_pyscenedetect(spec: str, detector: Any) -> None:
    reading, cuts = build_finder(spec).detector.start(), []
    for number, picture in enumerate(FILM, start=1):
        before = reading.undecided
        told = reading.feed(picture)
        assert before <= reading.undecided <= number
        assert all(before <= cut.frame < number for cut in told)
        cuts += told
    last = reading.finish()
    assert all(cut.frame >= reading.undecided for cut in last)
    found = [cut.frame for cut in cuts + last]
    assert len(found) >= 2
    assert found == theirs_on(detector, FILM)


@pytest.mark.parametrize("name", ["content", "adaptive", "hash", "hist"])
def test_the_clearer_of_two_cuts_stays(name: str) -> None:
    """A flash of 3 frames between two scenes: the cut to it changes half of the picture, the one after it all."""
    before, after = FILM[0], FILM[31]
    between = np.concatenate([before[:, :64], after[:, 64:] // 2], axis=1)
    pictures = [before] * 20 + [between] * 3 + [255 - before[::-1]] * 20
    (start_ms,) = starts_of(build_finder(name), pictures)
    assert start_ms == 23 * 40


def test_a_new_layout_in_the_same_colours_is_a_cut_and_a_flash_is_none() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(60, 120, (6, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    other = one[:, ::-1]
    flash = one + np.uint8(90)
    pictures = [one] * 20 + [other] * 20 + [one] * 20 + [flash] * 2 + [one] * 20
    assert starts_of(build_finder(), pictures) == [20 * 40, 40 * 40]
    assert starts_of(build_finder("layout:change=300"), pictures) == []


def starts_of(finder: Any, pictures: list[np.ndarray]) -> list[float]:
    starts, found = finder.start(), []
    for number, picture in enumerate(pictures):
        found += starts.feed(number * 40.0, np.ascontiguousarray(picture))
    return found + starts.finish(len(pictures) * 40.0)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("contnet", ["did you mean content", *NAMES]),
        ("adaptive:threshold=3", ["adaptive", "no option threshold", "adaptive_threshold, window_width"]),
        ("hist:min_scene_len=15", ["--min-shot"]),
        ("content:threshold", ["OPTION=VALUE"]),
        ("content:threshold=1,threshold=2", ["of its own"]),
        ("hash:size=2.5", ["size", "whole number"]),
        ("content:threshold=nan", ["threshold", "a number"]),
        ("content:luma_only=yes", ["true or false"]),
        ("content:weights=1/1", ["1/1/1/0"]),
        ("content:weights=0/0/0/0", ["cannot work with"]),
        ("threshold:method=roof", ["floor or ceiling"]),
        ("threshold:fade_bias=2", ["-1 to 1"]),
        ("adaptive:window_width=0", ["window_width must be at least 1"]),
        ("hist:bins=0", ["cannot work with"]),
        ("transnetv2", ["transnetv2:FILE"]),
        ("transnetv2:/nowhere.pth", ["/nowhere.pth"]),
        ("transnetv2:/nowhere.pth,width=3", ["no option width", "threshold"]),
    ],
)
def test_what_cannot_be_is_said_in_one_line(spec: str, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_finder(spec)
    assert all(part in str(caught.value) for part in said)
    assert "\n" not in str(caught.value)


def test_no_minimum_is_below_nothing() -> None:
    with pytest.raises(UserError, match="-1"):
        build_finder(min_shot_s=-1)


def test_what_found_the_shots_is_on_record_and_another_finder_reads_films_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films = make_films(tmp_path / "films", films=2, seed=2, settings=FilmSettings(shots=12), workers=1, progress=False)
    read: list[str] = []
    honest = kept.save

    def watched(path: Path, *rest: Any) -> None:
        read.append(path.stem)
        if len(read) in (2, 3):
            raise KeyboardInterrupt
        honest(path, *rest)

    monkeypatch.setattr(kept, "save", watched)
    for detector, min_shot_s in (("content", 0.5), ("content", 0.5), ("content:threshold=20", 1.5)):
        again = partial(ingest, films, tmp_path / "out", encoders={"video": "signal"}, progress=False)
        try:
            again(detector=detector, min_shot_s=min_shot_s)
        except KeyboardInterrupt:
            continue
    # The same finder does not read the first film again, another one does.
    assert read == ["film-0000", "film-0001", "film-0001", "film-0000", "film-0001"]
    index = FilmIndex.load(tmp_path / "out")
    told = index.info(0)["shots_from"]
    assert told.pop("version").startswith("PySceneDetect ")
    assert told == {"name": "content", "options": {"threshold": 20.0}, "min_shot_s": 1.5}
    spans = index.read(0, 0, int(index.shots[0])).shots_N2.numpy()
    assert (spans[:, 1] - spans[:, 0]).min() >= 1500


def test_the_command_takes_a_detector_or_shots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (film,) = make_films(tmp_path, films=1, seed=2, settings=FilmSettings(shots=12), workers=1, progress=False)
    (tmp_path / "list.txt").write_text("0 12\n12 40\n")
    ask = ["ingest", str(film), "--out", str(tmp_path / "out"), "--encoder", "video=signal"]
    assert main([*ask, "--shots", str(tmp_path / "list.txt"), "--min-shot", "1"]) == 2
    assert main([*ask, "--detector", "adaptve"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "--min-shot" in told[0] and "adaptive" in told[1]
    assert not (tmp_path / "out").exists()
    assert main([*ask, "--detector", "hash:threshold=0.2", "--min-shot", "0.25"]) == 0
    told = FilmIndex.load(tmp_path / "out").info(0)["shots_from"]
    assert (told["name"], told["options"], told["min_shot_s"]) == ("hash", {"threshold": 0.2}, 0.25)
