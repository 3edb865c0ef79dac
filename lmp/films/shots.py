"""Where a film's shots begin and end: found in the picture, or read from a list."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmp.errors import UserError

MIN_SHOT_MS = 400
DETECTION_HEIGHT = 72
"""Pixels. Smaller pictures are faster, and hide the noise of single pixels from the detector."""
_CHANGE, _JUMP = 8.0, 2.5  # how much a cut changes, at least; and as a multiple of what came just before
_COARSE = (12, 8)
_FLAT = 8.0  # contrast below which pictures have no layout to compare
_REMEDY = (
    "give lines of `start end` (seconds with a decimal point, or whole frames), "
    "a PySceneDetect CSV, a TransNetV2 .scenes.txt, or a CSV with clip_start and clip_end"
)


class Verdict(NamedTuple):
    """What one more frame tells.

    Attributes:
        settled: the candidate cut that was open is now certain.
        candidate: this frame opens a candidate, and replaces the one that was open and not settled.
    """

    settled: bool
    candidate: bool


class CutFinder:
    """Finds cuts frame by frame: PySceneDetect's content score, times how much the layout changes.

    The layout is the correlation of coarse grey pictures. A cut between two cameras of one place changes it
    while the colours stay; a flash changes colours while it stays. Of cuts closer together than `min_shot_ms`
    the strongest stays; none comes so close to the start or the end.
    """

    def __init__(self, *, min_shot_ms: int = MIN_SHOT_MS) -> None:
        try:
            from scenedetect.detectors import ContentDetector
        except ImportError as error:
            raise UserError("PySceneDetect is not installed", remedy="pip install 'lmp[films]'") from error
        self._detector = ContentDetector(min_scene_len=0)
        self._min_shot_ms = min_shot_ms
        self._frames = 0
        self._layout: np.ndarray | None = None
        self._before = (0.0, 0.0)
        self._shot_ms: float | None = None
        self._open_ms: float | None = None
        self._open_score = 0.0

    def feed(self, time_ms: float, picture_HWC: np.ndarray) -> Verdict:
        """One more frame.

        Args:
            time_ms: when it is shown; never before the frame fed last.
            picture_HWC: uint8 [H, W, 3], blue first, the same size for the whole film.
        """
        if self._shot_ms is None:
            self._shot_ms = time_ms
        score = self._score(picture_HWC)
        cut = score >= max(_CHANGE, _JUMP * sum(self._before) / 2)
        self._before = (self._before[1], score)
        settled = False
        if self._open_ms is not None and time_ms - self._open_ms >= self._min_shot_ms:
            settled, self._shot_ms, self._open_ms = True, self._open_ms, None
        if self._open_ms is None:
            candidate = cut and time_ms - self._shot_ms >= self._min_shot_ms
        else:
            candidate = cut and score > self._open_score
        if candidate:
            self._open_ms, self._open_score = time_ms, score
        return Verdict(settled, candidate)

    def _score(self, picture_HWC: np.ndarray) -> float:
        import cv2
        from scenedetect.common import FrameTimecode

        # The detector only hands the time code back, so the rate does not matter.
        self._detector.process_frame(FrameTimecode(self._frames, fps=25.0), picture_HWC)
        self._frames += 1
        coarse = cv2.resize(picture_HWC, _COARSE, interpolation=cv2.INTER_AREA)
        layout = cv2.cvtColor(coarse, cv2.COLOR_BGR2GRAY).astype(np.float64).ravel()
        layout -= layout.mean()
        layout /= np.linalg.norm(layout) + _FLAT
        likeness = 0.0 if self._layout is None else float(layout @ self._layout)
        self._layout = layout
        return float(self._detector._frame_score or 0.0) * (1 - likeness)

    def ends_apart(self, end_ms: float) -> bool:
        """Whether the candidate still open is a shot of its own, when the film ends at `end_ms`."""
        return self._open_ms is not None and end_ms - self._open_ms >= self._min_shot_ms


def find_shot_list(folder: Path, film: Path) -> Path:
    """A film's shot list in a folder: STEM.scenes.txt, .shots.csv, -Scenes.csv, .csv or .txt.

    Raises:
        UserError: none of them is there.
    """
    endings = (".scenes.txt", ".shots.csv", "-Scenes.csv", ".csv", ".txt")
    for ending in (*endings, *(film.suffix + ending for ending in endings)):
        path = folder / (film.stem + ending)
        if path.is_file():
            return path
    raise UserError(
        f"{folder} has no shot list for {film.name}",
        remedy=f"add {film.stem}.txt or {film.stem}.csv, or leave the shots to detection",
    )


def read_shot_list(path: Path, fps: float, *, first_s: float = 0.0) -> np.ndarray:
    """Read a shot list.

    Text holds `start end` on each line: seconds where any number has a decimal point, otherwise frames from
    0. The end frame is inclusive in TransNetV2's NAME.scenes.txt and wherever every shot starts one frame
    after the end before it, else exclusive. A CSV is PySceneDetect's, or has `clip_start` and `clip_end`,
    frames from 0, inclusive.

    Args:
        path: the list.
        fps: frames per second of the film; turns frames into time.
        first_s: when frame 0 is shown.

    Returns:
        int32 [S, 2], milliseconds, [start, end).

    Raises:
        UserError: no such file, none of these formats, or shots that are empty or overlap.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the shot list {path}: {error}", remedy=_REMEDY) from error
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    header = next((n for n, line in enumerate(lines[:2]) if re.search(r"clip_start|Start Time", line)), None)
    try:
        if header is None:
            seconds_S2 = _from_text(path, lines, fps, first_s)
        else:
            seconds_S2 = _from_csv(lines[header:], fps, first_s)
        if not np.isfinite(seconds_S2).all():
            raise ValueError("a number is not finite")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the shot list {path} cannot be understood: {error}", remedy=_REMEDY) from error
    return _checked(path, np.rint(seconds_S2 * 1000))


def _from_csv(lines: list[str], fps: float, first_s: float) -> np.ndarray:
    rows = list(csv.DictReader(lines, skipinitialspace=True))
    if rows and "clip_start" in rows[0]:
        frames = np.array([[int(row["clip_start"]), int(row["clip_end"]) + 1] for row in rows])
        return first_s + frames / fps
    names = ("Start Time (seconds)", "End Time (seconds)")
    return np.array([[float(row[name]) for name in names] for row in rows])


def _from_text(path: Path, lines: list[str], fps: float, first_s: float) -> np.ndarray:
    cells = [re.split(r"[\s,;]+", line.strip()) for line in lines]
    for number, row in enumerate(cells, start=1):
        if len(row) != 2:
            raise ValueError(f"entry {number} has {len(row)} columns, not 2")
    if any(re.search(r"[.eE]", cell) for row in cells for cell in row):
        return np.array([[float(cell) for cell in row] for row in cells])
    frames = np.array([[int(cell) for cell in row] for row in cells], dtype=np.float64)
    touching = len(frames) > 1 and bool((frames[1:, 0] == frames[:-1, 1] + 1).all())
    if path.name.endswith(".scenes.txt") or touching:
        frames[:, 1] += 1
    return first_s + frames / fps


def _checked(path: Path, shots_S2: np.ndarray) -> np.ndarray:
    if shots_S2.ndim != 2 or len(shots_S2) == 0:
        raise UserError(f"the shot list {path} is empty", remedy=_REMEDY)
    # Times may overlap by the rounding of text.
    late = shots_S2[:-1, 1] - shots_S2[1:, 0]
    shots_S2[:-1, 1] = np.where((late > 0) & (late <= 2), shots_S2[1:, 0], shots_S2[:-1, 1])
    bad = (shots_S2[:, 0] < 0) | (shots_S2[:, 1] <= shots_S2[:, 0]) | (shots_S2[:, 1] >= 2**31)
    bad[1:] |= shots_S2[1:, 0] < shots_S2[:-1, 1]
    if bad.any():
        row = int(bad.argmax())
        start, end = (math.trunc(ms) / 1000 for ms in shots_S2[row])
        raise UserError(
            f"the shot list {path}: shot {row} spans {start} to {end} s",
            remedy="give shots in order of time that neither overlap nor end before they start",
        )
    return shots_S2.astype(np.int32)
