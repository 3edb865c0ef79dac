"""Lists of where a film's shots begin and end."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np

from lmp.errors import UserError

_REMEDY = (
    "give lines of `start end` (seconds with a decimal point, or whole frames), "
    "a PySceneDetect CSV, a TransNetV2 .scenes.txt, or a CSV with clip_start and clip_end"
)


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
