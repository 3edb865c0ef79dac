"""Where shots begin: short ones merged, detectors that tell late, pictures of the right shot."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")

from lmp.films.cuts import Cut, Look, ShotFinder, ShotStarts  # noqa: E402
from lmp.films.media import Sampling, read_pictures  # noqa: E402

FRAME_MS = 40.0
PICTURE = np.zeros((2, 2, 3), np.uint8)


class Told:
    """A detector that knows its cuts, and tells each of them some frames late."""

    look = Look(2, 4)

    def __init__(self, cuts: dict[int, float], *, late: int = 0) -> None:
        self._cuts, self._late = cuts, late
        self._frames = self.undecided = 0

    def describe(self) -> dict[str, object]:
        return {"name": "told"}

    def start(self) -> Told:
        return Told(self._cuts, late=self._late)

    def feed(self, picture_HWC: np.ndarray) -> list[Cut]:
        self._frames += 1
        return self._until(max(self._frames - self._late, 0))

    def finish(self) -> list[Cut]:
        return self._until(self._frames)

    def _until(self, frame: int) -> list[Cut]:
        first, self.undecided = self.undecided, frame
        return [Cut(n, self._cuts[n]) for n in range(first, frame) if n in self._cuts]


def starts_of(cuts: dict[int, float], *, frames: int = 100, min_shot_s: float = 0.5, late: int = 0) -> list[int]:
    """Frames with which shots begin, of a film with 25 frames a second."""
    starts = ShotStarts(Told(cuts, late=late), min_shot_s=min_shot_s)
    found: list[float] = []
    for frame in range(frames):
        told = starts.feed(frame * FRAME_MS, PICTURE)
        found += told
        assert all(time < starts.undecided_ms for time in found)
    return [round(time / FRAME_MS) for time in found + starts.finish(frames * FRAME_MS)]


@pytest.mark.parametrize("late", [0, 2, 75, 1000])
@pytest.mark.parametrize(
    ("cuts", "starts"),
    [
        ({20: 1, 33: 1, 60: 1}, [20, 33, 60]),  # 13 frames are 0.52 s
        ({20: 1, 32: 2, 60: 1}, [32, 60]),  # 12 are 0.48 s: the weaker cut goes
        ({20: 2, 32: 1, 60: 1}, [20, 60]),
        ({20: 1, 32: 1, 60: 1}, [20, 60]),  # of equals the later
        ({12: 9, 40: 1}, [40]),  # a short first shot goes to the second
        ({40: 1, 88: 9}, [40]),  # a short last one to the one before
        ({20: 1, 26: 2, 32: 3, 38: 4}, [38]),  # each gives way to the stronger one after it
        ({20: 4, 26: 3, 32: 2, 38: 1}, [20, 38]),  # 38 is far enough from 20
        ({}, []),
    ],
)
def test_a_short_shot_goes_to_the_neighbour_it_is_less_cut_off_from(
    cuts: dict[int, float], starts: list[int], late: int
) -> None:
    assert starts_of(cuts, late=late) == starts


def test_the_minimum_is_a_choice() -> None:
    cuts = {2: 1.0, 3: 1.0, 50: 1.0, 75: 2.0}
    assert starts_of(cuts, min_shot_s=0) == [2, 3, 50, 75]
    assert starts_of(cuts, min_shot_s=1.0) == [50, 75]
    assert starts_of(cuts, min_shot_s=1.01) == []
    assert starts_of({1: 1.0}, frames=5) == []


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2000 frames, 25 a second; the colour of each is its number."""
    path = tmp_path_factory.mktemp("films") / "counting.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=25)
        video.width, video.height, video.pix_fmt = 16, 16, "bgr0"
        for number in range(2000):
            colour = np.array([number // 200 * 25, number % 200, 0], np.uint8)
            picture = np.ascontiguousarray(np.broadcast_to(colour, (16, 16, 3)))
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    return path


@pytest.mark.parametrize("late", [0, 75, 600, 5000])
def test_pictures_are_those_of_the_shot_however_late_it_is_told(counting: Path, late: int) -> None:
    samplings = [Sampling(1, 16), Sampling(8, 8), Sampling(40, 4)]
    finder = ShotFinder(Told({100: 1.0, 120: 1.0, 620: 1.0, 1990: 1.0}, late=late))
    shots = list(read_pictures(counting, samplings, shots=finder))
    spans = list(pairwise([0, 100, 120, 620, 2000]))
    assert [(s.start_ms, s.end_ms) for s in shots] == [(first * 40, last * 40) for first, last in spans]
    if late <= 75:  # more pictures than frames: each frame, from the first to the last
        red, green, _ = shots[1].samples[samplings[2]].mean(axis=(1, 2)).T
        assert (red * 8 + green).tolist() == np.arange(100, 120).repeat(2).tolist()
    for shot, (first, last) in zip(shots, spans, strict=True):
        for sampling in samplings:
            red, green, _ = shot.samples[sampling].mean(axis=(1, 2)).T
            seen = red * 8 + green
            part = (last - first) / sampling.frames
            wanted = first + (np.arange(sampling.frames) + 0.5) * part
            # Pictures of a long shot are thinned to four for each that is wanted; of all frames, if it is told late.
            far = max(part / 2, 1) if late <= 75 else 2000 / sampling.frames / 2
            assert np.abs(seen - wanted).max() <= far
            if late <= 75:
                assert seen.min() >= first and seen.max() < last
