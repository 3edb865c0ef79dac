"""Where shots begin: what a detector of cuts is, and how shots that are too short are merged."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

MIN_SHOT_S = 0.5
"""Seconds. A shot that was found and is shorter goes to a neighbour."""


class Look(NamedTuple):
    """How frames are made into pictures.

    Attributes:
        height: pixels.
        width: pixels; None keeps the film's shape.
        pixels: "rgb24" or "bgr24": the order of the colours.
        scaling: FFmpeg's scaler. "AREA" is the mean of the pixels beneath; "BILINEAR" and "BICUBIC" cost more.
    """

    height: int
    width: int | None = None
    pixels: str = "rgb24"
    scaling: str = "AREA"


class Cut(NamedTuple):
    """A new shot begins with this frame, counted from 0; of two cuts the one with the higher score is surer."""

    frame: int
    score: float


class Reading(Protocol):
    """Cuts of one film, told in order of time, at once or some frames late.

    Attributes:
        undecided: a cut that is told later lies at this frame or after it; never falls.
    """

    undecided: int

    def feed(self, picture_HWC: np.ndarray) -> list[Cut]:
        """The cuts that one more frame makes certain; uint8 [H, W, 3] as `Look` says."""
        ...

    def finish(self) -> list[Cut]:
        """The cuts that the end of the film makes certain."""
        ...


class Detector(Protocol):
    """Finds cuts, in one film after the other."""

    @property
    def look(self) -> Look: ...

    def describe(self) -> dict[str, Any]:
        """Name, version and options, as JSON."""
        ...

    def start(self) -> Reading:
        """Begin a film."""
        ...


@dataclass(frozen=True)
class ShotFinder:
    """Finds the shots of films: a detector of cuts, and how many seconds a shot lasts at least."""

    detector: Detector
    min_shot_s: float = MIN_SHOT_S

    def describe(self) -> dict[str, Any]:
        """What finds the shots, as JSON: other descriptions may mean other shots."""
        return {**self.detector.describe(), "min_shot_s": self.min_shot_s}

    def start(self) -> ShotStarts:
        """Begin a film."""
        return ShotStarts(self.detector.start(), min_shot_s=self.min_shot_s)


class ShotStarts:
    """The times at which the shots of one film begin, none of them shorter than a minimum.

    Of two cuts closer together than that the one with the lower score goes, of equals the later: a short shot
    goes to the neighbour that it is less clearly cut off from. A short first shot goes to the second, a short
    last one to the one before. A film shorter than the minimum is one shot.
    """

    def __init__(self, reading: Reading, *, min_shot_s: float) -> None:
        self._reading = reading
        self._min_ms = max(min_shot_s * 1000, 1.0)  # a shot of no length is none
        self._times: deque[float] = deque()  # of the frames from number `_first` on
        self._first = 0
        self._shot_ms = 0.0  # where the last shot that is certain begins
        self._open: tuple[float, float] | None = None  # time and score of a cut that a stronger one may replace

    @property
    def undecided_ms(self) -> float:
        """A shot that is told later begins at this time or after it; infinite if only frames to come can begin one."""
        if self._open is not None:
            return self._open[0]
        waiting = self._reading.undecided - self._first
        return self._times[waiting] if waiting < len(self._times) else math.inf

    def feed(self, time_ms: float, picture_HWC: np.ndarray) -> list[float]:
        """One more frame; the times of shot starts that are now certain.

        Args:
            time_ms: when it is shown; never before the frame fed last.
            picture_HWC: uint8 [H, W, 3] as the detector's `Look` says.
        """
        if not self._first and not self._times:
            self._shot_ms = time_ms
        self._times.append(time_ms)
        starts = self._take(self._reading.feed(picture_HWC))
        while self._first < self._reading.undecided - 1 and len(self._times) > 1:
            self._times.popleft()
            self._first += 1
        if self._first < self._reading.undecided:
            starts += self._settled(self._times[0])
        return starts

    def finish(self, end_ms: float) -> list[float]:
        """The same at the end of the film, which is shown until `end_ms`."""
        return self._take(self._reading.finish()) + self._settled(end_ms)

    def _take(self, cuts: list[Cut]) -> list[float]:
        starts = []
        for cut in cuts:
            time_ms = self._times[cut.frame - self._first]
            starts += self._settled(time_ms)
            if self._open is None:
                if time_ms - self._shot_ms >= self._min_ms:
                    self._open = (time_ms, cut.score)
            elif cut.score > self._open[1]:
                self._open = (time_ms, cut.score)
        return starts

    def _settled(self, now_ms: float) -> list[float]:
        """The open cut, if no cut from now on is close enough to replace it."""
        if self._open is None or now_ms - self._open[0] < self._min_ms:
            return []
        self._shot_ms, self._open = self._open[0], None
        return [self._shot_ms]
