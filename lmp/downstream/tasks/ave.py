"""Anatomy of Video Editing (Argaw et al., ECCV 2022): shot attributes, shot ordering, next-shot selection.

LABELS/annotations.json: `scene -> shot -> {"start-time", "end-time", "shot-size", "shot-angle", ...}`, each attribute a
list of which the first counts; times in seconds or H:M:S. LABELS/split.json: `{"train": [scenes], "val": [], "test":
[]}`. The vocabulary is read from the data. A shot of the shards takes the annotation that it shares most time with.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lmp.downstream.labels import overlapped_most
from lmp.downstream.scores import kendall_tau, per_class_accuracy
from lmp.downstream.tasks.base import Clip, Coverage, ItemRows, Items, Loss, Task, Videos, choice_accuracy, need_file
from lmp.downstream.tasks.splits import read_json_split
from lmp.downstream.trunk import Blocks, Window
from lmp.errors import UserError

ATTRIBUTES = (
    "shot-size",
    "shot-angle",
    "shot-type",
    "shot-motion",
    "shot-location",
    "shot-subject",
    "num-people",
    "sound-source",
)
ORDERED = 3
"""Shots to be put in order."""
CONTEXT, CANDIDATES = 4, 5
"""Shots before the one to be chosen, and shots to choose from: the next one and later ones of the scene."""
_SEED = 0xAFE


class _Scenes(Task):
    needs: ClassVar[str] = "LABELS/split.json with scene ids by split, and shards whose films (or clips) bear the ids"

    def ids(self, labels: Path) -> dict[str, list[str]]:
        return read_json_split(need_file(Path(labels) / "split.json", self))

    def found(self, labels: Path, videos: Videos, coverage: Coverage) -> Iterator[tuple[str, str, Clip]]:
        """(split, scene, its shots) of every scene that the shards hold; all are counted."""
        for split, scenes in self.ids(labels).items():
            for scene in scenes:
                clip = coverage.look(videos, scene, split)
                if clip is not None:
                    yield split, scene, clip


class Attribute(_Scenes):
    """One attribute of every shot; the score is the mean of the per-class accuracies."""

    needs: ClassVar[str] = "LABELS/annotations.json and split.json, and shards whose films (or clips) bear the ids"
    metric: ClassVar[str] = "per_class_accuracy"
    loss: ClassVar[Loss] = "class"
    balanced: ClassVar[bool] = True

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute
        self.name = f"ave/{attribute}"

    def items(self, labels: Path, videos: Videos) -> tuple[Items, Coverage]:
        path = need_file(Path(labels) / "annotations.json", self)
        annotated = read_annotations(path, self.attribute)
        names = sorted({value for shots in annotated.values() for _, _, value in shots})
        rows, coverage, item = ItemRows(), Coverage(), 0
        for split, scene, clip in self.found(labels, videos, coverage):
            if not annotated.get(scene):
                continue
            spans_M2 = np.array([shot[:2] for shot in annotated[scene]])
            window = rows.window(clip.window())
            for row, best in enumerate(overlapped_most(videos.times(clip), spans_M2).tolist()):
                if best >= 0:
                    value = names.index(annotated[scene][best][2])
                    rows.add(window, [(row, row + 1)], value, group=item, split=split)
                    item += 1
        items = rows.items(np.int64)
        items.facts["names"] = names
        return items, coverage

    def outputs(self, items: Items) -> int:
        return len(items.facts["names"])

    def scores(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, float]:
        predicted_I, true_I = output_IC.argmax(1), items.target_I[chosen]
        by_class = per_class_accuracy(predicted_I, true_I)
        found = {
            "per_class_accuracy": float(np.mean(list(by_class.values()))),
            "accuracy": float((predicted_I == true_I).mean()),
        }
        return found | {f"accuracy {items.facts['names'][c]}": value for c, value in by_class.items()}


class ShotOrdering(_Scenes):
    """Three consecutive shots, shown shuffled as a sequence of their own; the head tells which order is true."""

    name = "ave/ordering"
    metric: ClassVar[str] = "order_accuracy"
    loss: ClassVar[Loss] = "class"
    orders: ClassVar[list[tuple[int, ...]]] = list(itertools.permutations(range(ORDERED)))

    def items(self, labels: Path, videos: Videos) -> tuple[Items, Coverage]:
        rows, coverage, item = ItemRows(), Coverage(), 0
        random = np.random.default_rng(_SEED)
        for split, _, clip in self.found(labels, videos, coverage):
            for start in range(clip.start, clip.stop - ORDERED + 1, ORDERED):
                order = int(random.integers(len(self.orders)))
                shown = np.argsort(self.orders[order])  # so that orders[order] of what is shown is the film's order
                # Not at the film's times where they happen to be in order: gaps between shots would give it away.
                window = rows.window(Window(clip.film, start + shown, in_time=False))
                parts = [(place, place + 1) for place in range(ORDERED)]
                rows.add(window, parts, order, group=item, split=split)
                item += 1
        return rows.items(np.int64), coverage

    def outputs(self, items: Items) -> int:
        return len(self.orders)

    def scores(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, float]:
        predicted_I, true_I = output_IC.argmax(1), items.target_I[chosen]
        pairs = [(self.orders[p], self.orders[t]) for p, t in zip(predicted_I.tolist(), true_I.tolist(), strict=True)]
        return {
            "order_accuracy": float((predicted_I == true_I).mean()),
            "kendall_tau": float(np.mean([kendall_tau(p, t) for p, t in pairs])),
        }


class NextShot(_Scenes):
    """Four shots, then which of five: the candidate is shown as the fifth shot of the sequence."""

    name = "ave/next_shot"
    metric: ClassVar[str] = "accuracy"
    loss: ClassVar[Loss] = "choice"

    def items(self, labels: Path, videos: Videos) -> tuple[Items, Coverage]:
        rows, coverage, question = ItemRows(), Coverage(), 0
        random = np.random.default_rng(_SEED)
        for split, _, clip in self.found(labels, videos, coverage):
            for start in range(clip.start, clip.stop - CONTEXT - CANDIDATES + 1, CONTEXT):
                following = start + CONTEXT
                wrong = random.choice(np.arange(following + 1, clip.stop), CANDIDATES - 1, replace=False)
                for candidate in random.permutation([following, *wrong.tolist()]).tolist():
                    shown = np.append(np.arange(start, following), candidate)
                    # Not in the film's order where it is wrong: a leap in time would give it away.
                    window = rows.window(Window(clip.film, shown, in_time=False))
                    parts = [(0, CONTEXT), (CONTEXT - 1, CONTEXT), (CONTEXT, CONTEXT + 1)]
                    rows.add(window, parts, candidate == following, group=question, split=split)
                question += 1
        return rows.items(np.bool_), coverage

    def outputs(self, items: Items) -> int:
        return 1

    def represent(self, blocks: Blocks, parts_IP2: Tensor, shots_S2: np.ndarray) -> Tensor:
        context_IF, last_IF, candidate_IF = self.parts(blocks, parts_IP2).unbind(1)
        # A linear head cannot compare what merely stands side by side.
        both = [candidate_IF, candidate_IF * context_IF, candidate_IF * last_IF, (candidate_IF - last_IF).abs()]
        return torch.cat(both, dim=1)

    def scores(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, float]:
        return {"accuracy": choice_accuracy(items.target_I[chosen], output_IC[:, 0], items.group_I[chosen])}


def read_annotations(path: Path, attribute: str) -> dict[str, list[tuple[float, float, str]]]:
    """Scene -> (start, end, value) of the shots that have the attribute, in order of time.

    Raises:
        UserError: not such a file, or no shot has the attribute.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {
            scene: sorted(
                (_seconds(shot["start-time"]), _seconds(shot["end-time"]), str(_first(shot[attribute])))
                for shot in shots.values()
                if _first(shot.get(attribute)) is not None
            )
            for scene, shots in content.items()
        }
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: is not AVE's JSON ({error!r})", remedy="give the published file") from error
    if not any(found.values()):
        raise UserError(f"{path}: no shot has {attribute}", remedy="give the published file")
    return found


def _first(value: Any) -> Any:
    return (value[0] if value else None) if isinstance(value, list) else value


def _seconds(value: Any) -> float:
    value = _first(value)
    if isinstance(value, str) and ":" in value:
        parts = [float(part) for part in value.split(":")]
        return sum(part * 60**power for power, part in enumerate(reversed(parts)))
    return float(value)


TASKS: tuple[Task, ...] = (*map(Attribute, ATTRIBUTES), ShotOrdering(), NextShot())
