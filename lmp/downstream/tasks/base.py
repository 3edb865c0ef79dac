"""What a benchmark is here: labelled items in windows of shots, a head's output, a metric.

A task reads its labels' own files, finds their videos among the shards, and says which windows the model is shown
and which of their shots each item is about. The rest (features, heads, seeds, the report) is shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lmp.data.leave_out import record_ids
from lmp.downstream.trunk import Blocks, Films, Window, joined
from lmp.errors import UserError

SPLITS = ("train", "val", "test")
Loss = Literal["class", "multilabel", "multilabel_one", "regression", "choice"]
"""`multilabel_one` has a softmax over the classes, for one of several right labels is asked for."""


@dataclass(frozen=True)
class Clip:
    """Shots [start, stop) of a film."""

    film: int
    start: int
    stop: int

    def window(self) -> Window:
        """All its shots."""
        return Window(self.film, np.arange(self.start, self.stop))


class Videos:
    """Finds videos by id: a film's key, an id in its record (see leave_out.ID_FIELDS), or one of its clips.

    Clips are listed in a film's record as `"clips": [{"videoid": ..., "start": shot, "stop": shot}, ...]`. A record's
    id that several films bear, as clips of one film do, finds none of them.
    """

    def __init__(self, films: Films) -> None:
        self.films = films
        index = films.index
        self._found: dict[str, Clip] = {}
        borne: Counter[str] = Counter()
        whole: dict[str, Clip] = {}
        for film, info in enumerate(index.infos(range(len(index)))):
            clip = self.whole(film)
            self._found[index.keys[film]] = clip
            for name in set(record_ids(info)):
                borne[name] += 1
                whole[name] = clip
            for part in info.get("clips", ()):
                self._found.setdefault(str(part["videoid"]), Clip(film, int(part["start"]), int(part["stop"])))
        for name, clip in whole.items():
            if borne[name] == 1:
                self._found.setdefault(name, clip)

    def find(self, name: str) -> Clip | None:
        """The shots of a video; None if the shards do not hold it."""
        return self._found.get(name)

    def whole(self, film: int) -> Clip:
        """All shots of a film."""
        return Clip(film, 0, int(self.films.index.shots[film]))

    def times(self, clip: Clip) -> np.ndarray:
        """float64 [S, 2], start and end of each shot in seconds from the clip's start."""
        shots_S2 = self.films.shots(clip.film)[clip.start : clip.stop]
        return (shots_S2 - shots_S2[0, 0]) / 1000.0


@dataclass
class Coverage:
    """How many of the labelled videos the shards hold.

    Attributes:
        listed, found: split -> number.
        missed: some ids that are not there.
        notes: what else was left out, and why.
    """

    listed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    found: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    missed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def look(self, videos: Videos, name: str, split: str) -> Clip | None:
        """Find a video and count it."""
        self.listed[split] += 1
        clip = videos.find(name)
        if clip is None:
            self.missed.append(name)
        else:
            self.found[split] += 1
        return clip

    def __str__(self) -> str:
        parts = [f"{split} {self.found[split]} of {self.listed[split]}" for split in SPLITS if self.listed[split]]
        missed = (
            f", missed {', '.join(self.missed[:3])}{', ...' if len(self.missed) > 3 else ''}" if self.missed else ""
        )
        return "found " + ", ".join(parts) + missed


@dataclass
class Items:
    """I labelled items; arrays have a row each.

    Attributes:
        windows: what the model is shown.
        window_I: the item's window.
        parts_IP2: [start, stop) rows of the window; features are averaged over each part.
        target_I: int64 class, float32 [I, C] of 0 and 1, float32 number, or bool "the right one of its group".
        group_I: what is put together: a video's windows, a question's candidates.
        split_I: "train", "val" or "test".
        weight_I: how often the item stands in its group.
        fold_I: items of a fold are tested by a head fitted on the others; None: one head, by split.
        facts: what the task's own metric needs besides.
    """

    windows: list[Window]
    window_I: np.ndarray
    parts_IP2: np.ndarray
    target_I: np.ndarray
    group_I: np.ndarray
    split_I: np.ndarray
    weight_I: np.ndarray
    fold_I: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.window_I)

    def of_split(self, split: str) -> np.ndarray:
        """Numbers of the items of a split."""
        return np.flatnonzero(self.split_I == split)


class ItemRows:
    """Gathers items one by one."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self._rows: list[tuple[int, Sequence[tuple[int, int]], Any, int, str, float]] = []

    def window(self, window: Window) -> int:
        """Add a window; its number."""
        self.windows.append(window)
        return len(self.windows) - 1

    def add(
        self,
        window: int,
        parts: Sequence[tuple[int, int]],
        target: Any,
        *,
        group: int,
        split: str,
        weight: float = 1.0,
    ) -> None:
        """Add an item."""
        self._rows.append((window, parts, target, group, split, weight))

    def items(self, dtype: Any) -> Items:
        """All of them.

        Args:
            dtype: of the targets.
        """
        window, parts, target, group, split, weight = zip(*self._rows, strict=True) if self._rows else ([],) * 6
        return Items(
            windows=self.windows,
            window_I=np.array(window, dtype=np.int64),
            parts_IP2=np.array(parts, dtype=np.int64),
            target_I=np.array(target, dtype=dtype),
            group_I=np.array(group, dtype=np.int64),
            split_I=np.array(split, dtype="<U5"),
            weight_I=np.array(weight, dtype=np.float32),
        )


class Task(ABC):
    """A benchmark whose head gives numbers for items.

    Attributes:
        name: as `--task` takes it.
        needs: the labels and shards that it needs, in a sentence.
        metric: the score that selects on val and heads the report.
        higher: whether more of it is better.
        loss: what the head is trained with.
        balanced: classes weigh alike in the loss.
        one_window: fine-tuning draws one item of each group an epoch.
    """

    name: str
    needs: ClassVar[str]
    metric: ClassVar[str]
    higher: ClassVar[bool] = True
    loss: ClassVar[Loss]
    balanced: ClassVar[bool] = False
    one_window: ClassVar[bool] = False

    @abstractmethod
    def ids(self, labels: Path) -> dict[str, list[str]]:
        """The ids of the labelled videos by split, for `lmp tasks ids`."""

    @abstractmethod
    def items(self, labels: Path, videos: Videos) -> tuple[Items, Coverage]:
        """The items of the videos that the shards hold.

        Raises:
            UserError: the labels are not there or not as they should be.
        """

    @abstractmethod
    def scores(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, float]:
        """The metric of some items, from the head's output for each of them.

        Args:
            items: all items.
            chosen: numbers of the items judged.
            output_IC: [len(chosen), C], logits or numbers.
        """

    @abstractmethod
    def outputs(self, items: Items) -> int:
        """C, the numbers that the head gives for an item."""

    def submission(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, Any] | None:
        """What the benchmark's own toolkit scores, as JSON; None where it has no such file. Arguments as `scores`."""
        return None

    def tested(self, items: Items, chosen: np.ndarray) -> int:
        """n: the things that a score is a mean over; here groups."""
        return len(np.unique(items.group_I[chosen]))

    def represent(self, blocks: Blocks, parts_IP2: Tensor, shots_S2: np.ndarray) -> Tensor:
        """The head's input for the items of one window, [I, R]: the mean features of each part, side by side.

        Args:
            blocks: features of the window's shots.
            parts_IP2: of the items.
            shots_S2: start and end of the window's shots in seconds.
        """
        return self.parts(blocks, parts_IP2).flatten(1)

    def parts(self, blocks: Blocks, parts_IP2: Tensor) -> Tensor:
        """Mean features of each part: [I, P, F]."""
        rows_SF = joined(blocks)
        sums_SF = torch.cat([rows_SF.new_zeros(1, rows_SF.shape[1]), rows_SF.cumsum(0)])
        start_IP, stop_IP = parts_IP2.to(rows_SF.device).unbind(-1)
        return (sums_SF[stop_IP] - sums_SF[start_IP]) / (stop_IP - start_IP)[..., None]


def need_file(path: Path, task: Task | Any) -> Path:
    """The path, if it is a file.

    Raises:
        UserError: it is not; says what the task needs.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {task.name} needs {task.needs}", remedy="give --labels that folder")
    return path


def softmax(logits_IC: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    e = np.exp(logits_IC - logits_IC.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sum_by_group(values_IC: np.ndarray, group_I: np.ndarray, weight_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups in order of number [G], and the weighted sums of their rows [G, C]."""
    groups, place_I = np.unique(group_I, return_inverse=True)
    sums_GC = np.zeros((len(groups), values_IC.shape[1]))
    np.add.at(sums_GC, place_I, values_IC * weight_I[:, None])
    return groups, sums_GC


def first_of_group(values_I: np.ndarray, group_I: np.ndarray) -> np.ndarray:
    """The value of each group's first item, groups in order of number."""
    _, first_G = np.unique(group_I, return_index=True)
    return values_I[first_G]


def by_group(group_I: np.ndarray) -> list[np.ndarray]:
    """For each group, in order of number, the places of its items."""
    order = np.argsort(group_I, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group_I[order])) + 1)


def choice_accuracy(right_I: np.ndarray, score_I: np.ndarray, group_I: np.ndarray) -> float:
    """Share of groups whose best-scored item is the right one; of n that tie, 1 / n counts."""
    hits = []
    for of in by_group(group_I):
        best = score_I[of] == score_I[of].max()
        hits.append(float((right_I[of] & best).any()) / best.sum())
    return float(np.mean(hits))


class RetrievalTask(ABC):
    """A benchmark whose queries and candidates are two modalities of the same clips.

    A clip's contextual features of a modality know nothing of the other one, so that neither side sees the answer.

    Attributes:
        name, needs: as of Task.
        sides: the modalities of query and candidate, each one or several joined.
        metric: selects on val and heads the report; more of it is better.
    """

    name: str
    needs: ClassVar[str]
    metric: ClassVar[str]
    sides: tuple[tuple[str, ...], tuple[str, ...]]

    @abstractmethod
    def ids(self, labels: Path) -> dict[str, list[str]]:
        """The ids of the clips by split."""

    @abstractmethod
    def pairs(self, labels: Path, videos: Videos) -> tuple[list[Window], np.ndarray, Coverage]:
        """The clips [N], their splits [N], and how many were found."""

    @abstractmethod
    def scores(self, scores_NN: Tensor, *, seed: int) -> dict[str, float]:
        """The metric.

        Args:
            scores_NN: row i is query i, column j candidate j; the diagonal is right.
            seed: of what is drawn, such as the gallery.
        """

    def gallery(self, clips: int) -> int:
        """Candidates that a query has among so many clips."""
        return clips
