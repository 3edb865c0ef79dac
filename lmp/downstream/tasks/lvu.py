"""Long-form Video Understanding (Wu and Krahenbuhl, CVPR 2021): 7 classification and 2 regression tasks.

LABELS/TASK/{train,val,test}.csv, separated by single spaces, with a header; columns are read from the right: the last
is the IMDb id, the last but one the video id. Classification has `class_id class_name` before them, like_ratio
`like_count dislike_count`, view_count `view_count`.

A video is cut into windows of 60 s that begin every second. A class is the largest sum of the windows' softmaxes; a
number is the mean over the windows, and the error of a video is squared once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from lmp.downstream.tasks.base import (
    SPLITS,
    Coverage,
    ItemRows,
    Items,
    Loss,
    Task,
    Videos,
    first_of_group,
    need_file,
    softmax,
    sum_by_group,
)
from lmp.downstream.trunk import Window
from lmp.errors import UserError

CLASSES = {
    "director": 10,
    "genre": 4,
    "relationship": 4,
    "scene": 6,
    "way_speaking": 5,
    "writer": 10,
    "year": 9,
}
"""Sizes of the published heads; ids that never occur (director 2, 3; writer 3, 4, 8) keep their places."""
REGRESSION = ("like_ratio", "view_count")
WINDOW_S = 60.0
STRIDE_S = 1
FITTED_STRIDE_S = 10
"""Windows of training videos overlap less: the reference draws one window per video and epoch."""


@dataclass(frozen=True)
class Labelled:
    """One line of a label file: `value` is a class id or the transformed number."""

    video: str
    film: str
    value: float
    text: str


def like_ratio(likes: float, dislikes: float) -> float:
    """The label of like_ratio, shifted as published."""
    return 10 * likes / (likes + dislikes) - 9.138220535629456


def view_count(views: float) -> float:
    """The label of view_count, shifted as published."""
    return math.log(views) - 11.76425435683139


def read_labels(path: Path, kind: str) -> list[Labelled]:
    """The lines of a label file, in order.

    Args:
        path: the file.
        kind: name of the task.

    Raises:
        UserError: a line that does not fit the task.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], 2):
        words = line.split()
        if not words:
            continue
        try:
            *values, video, film = words
            found.append(Labelled(video, film, *_value(kind, values)))
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise UserError(
                f"{path}, line {number}: {line[:60]!r} does not fit {kind}", remedy="give the published files"
            ) from error
    if not found:
        raise UserError(f"{path}: holds no labels", remedy="give the published files")
    return found


def _value(kind: str, values: list[str]) -> tuple[float, str]:
    if kind == "like_ratio":
        likes, dislikes = map(float, values)
        return like_ratio(likes, dislikes), ""
    if kind == "view_count":
        (views,) = map(float, values)
        return view_count(views), ""
    number = int(values[0])
    if not 0 <= number < CLASSES[kind] or len(values) != 2:
        raise ValueError(f"class {number} of {kind}")
    return number, values[1]


def spans(shots_S2: np.ndarray, *, stride: int) -> list[tuple[int, int, int]]:
    """The windows of a video as shots [start, stop), each with the number of windows that hold just these shots.

    A shot is in a window if it overlaps it. Windows begin at 0, stride, 2 stride, ... while they end within the
    video; a video of 60 s or less is one window.

    Args:
        shots_S2: seconds.
        stride: seconds between the starts.
    """
    last = max(0.0, float(shots_S2[-1, 1]) - WINDOW_S)
    counts: dict[tuple[int, int], int] = {}
    for start in np.arange(0.0, last + 1e-9, stride):
        inside = np.flatnonzero((shots_S2[:, 1] > start) & (shots_S2[:, 0] < start + WINDOW_S))
        if len(inside):
            span = int(inside[0]), int(inside[-1]) + 1
            counts[span] = counts.get(span, 0) + 1
    return [(start, stop, count) for (start, stop), count in counts.items()]


class _Lvu(Task):
    needs: ClassVar[str] = (
        "LABELS/TASK/{train,val,test}.csv as published, and shards whose films (or their records' clips) bear the "
        "YouTube ids"
    )
    one_window: ClassVar[bool] = True

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = f"lvu/{kind}"

    def ids(self, labels: Path) -> dict[str, list[str]]:
        return {split: [one.video for one in self._read(labels, split)] for split in SPLITS}

    def _read(self, labels: Path, split: str) -> list[Labelled]:
        return read_labels(need_file(Path(labels) / self.kind / f"{split}.csv", self), self.kind)

    def items(self, labels: Path, videos: Videos) -> tuple[Items, Coverage]:
        rows, coverage, group = ItemRows(), Coverage(), 0
        for split in SPLITS:
            for one in self._read(labels, split):
                clip = coverage.look(videos, one.video, split)
                if clip is None:
                    continue
                stride = FITTED_STRIDE_S if split == "train" else STRIDE_S
                found = spans(videos.times(clip), stride=stride)
                total = sum(count for _, _, count in found)
                for start, stop, count in found:
                    window = rows.window(Window(clip.film, np.arange(clip.start + start, clip.start + stop)))
                    weight = count / total
                    rows.add(window, [(0, stop - start)], one.value, group=group, split=split, weight=weight)
                group += 1
        return rows.items(np.int64 if self.loss == "class" else np.float32), coverage


class Classification(_Lvu):
    """One of the seven classification tasks."""

    metric: ClassVar[str] = "accuracy"
    loss: ClassVar[Loss] = "class"

    def outputs(self, items: Items) -> int:
        return CLASSES[self.kind]

    def scores(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, float]:
        groups, votes_GC = sum_by_group(softmax(output_IC), items.group_I[chosen], items.weight_I[chosen])
        true_G = first_of_group(items.target_I[chosen], items.group_I[chosen])
        assert len(groups) == len(true_G)
        return {"accuracy": float((votes_GC.argmax(1) == true_G).mean())}


class Regression(_Lvu):
    """like_ratio or view_count."""

    metric: ClassVar[str] = "squared_error"
    higher: ClassVar[bool] = False
    loss: ClassVar[Loss] = "regression"

    def outputs(self, items: Items) -> int:
        return 1

    def scores(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, float]:
        group_I, weight_I = items.group_I[chosen], items.weight_I[chosen]
        _, sums_G1 = sum_by_group(output_IC, group_I, weight_I)
        _, weights_G1 = sum_by_group(np.ones_like(output_IC), group_I, weight_I)
        mean_G = (sums_G1 / weights_G1)[:, 0]
        true_G = first_of_group(items.target_I[chosen], group_I)
        return {"squared_error": float(((mean_G - true_G) ** 2).mean())}


TASKS: tuple[Task, ...] = (*map(Classification, CLASSES), *map(Regression, REGRESSION))
