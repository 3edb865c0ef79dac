"""Temporal event localisation in the manner of MUSES (Liu et al., CVPR 2021): mAP over tIoU 0.3 to 0.7.

LABELS/annotations.json is ActivityNet's: `{"database": {video: {"subset": "training", "duration": s, "annotations":
[{"label": name, "segment": [start, end]}]}}}`; subsets `training`, `validation`, `testing` (or train, val, test).
Without a test part the validation part is tested, and a fifth of the training videos is val.

The head gives each shot a score for each class. Proposals of a class are the runs of shots above several shares of
the video's best score, scored by their mean; overlapping ones are suppressed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lmp.downstream.scores import detection_map, suppress
from lmp.downstream.tasks.base import SPLITS, Coverage, ItemRows, Items, Loss, Task, Videos, by_group, need_file
from lmp.errors import UserError

SUBSETS = {"training": "train", "train": "train", "validation": "val", "val": "val", "testing": "test", "test": "test"}
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)
NMS_TIOU = 0.4
TOP = 500
INSIDE = 0.5
"""Share of a shot that must lie in an event to be taught as such."""

Result = dict[str, Any]
"""`{"label": name, "segment": [start, end], "score": number}`."""


def proposals(score_S: np.ndarray, shots_S2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spans [N, 2] in seconds and their scores [N], after suppression, best first.

    Args:
        score_S: probability of the class for each shot.
        shots_S2: seconds.
    """
    runs: set[tuple[int, int]] = set()
    for share in SHARES:
        above = np.concatenate([[False], score_S >= share * score_S.max(), [False]])
        edges = np.flatnonzero(above[1:] != above[:-1])
        runs |= set(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    ordered = sorted(runs)
    spans_N2 = np.array([(shots_S2[start, 0], shots_S2[stop - 1, 1]) for start, stop in ordered])
    score_N = np.array([score_S[start:stop].mean() for start, stop in ordered])
    kept = suppress(spans_N2, score_N, threshold=NMS_TIOU, top=TOP)
    return spans_N2[kept], score_N[kept]


class EventLocalisation(Task):
    """Events of films."""

    name = "muses"
    needs: ClassVar[str] = "LABELS/annotations.json in ActivityNet's form, and shards whose films bear the videos' ids"
    metric: ClassVar[str] = "mean"
    loss: ClassVar[Loss] = "multilabel"

    def ids(self, labels: Path) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {name: [] for name in SPLITS}
        for video, split in self._splits(self._read(labels)).items():
            found[split].append(video)
        return found

    def items(self, labels: Path, videos: Videos) -> tuple[Items, Coverage]:
        database = self._read(labels)
        split_of = self._splits(database)
        names = sorted({event["label"] for one in database.values() for event in one["annotations"]})
        if not names:
            raise UserError(f"{labels}: holds no event", remedy="give annotations with events")
        rows, coverage = ItemRows(), Coverage()
        shown: list[tuple[str, np.ndarray]] = []
        for video, split in split_of.items():
            clip = coverage.look(videos, video, split)
            if clip is None:
                continue
            shots_S2 = videos.times(clip)
            window = rows.window(clip.window())
            target_SC = shot_targets(shots_S2, database[video]["annotations"], names)
            for row, target_C in enumerate(target_SC):
                rows.add(window, [(row, row + 1)], target_C, group=len(shown), split=split)
            shown.append((video, shots_S2))
        items = rows.items(np.float32)
        items.facts |= {"names": names, "videos": shown, "database": database}
        return items, coverage

    def outputs(self, items: Items) -> int:
        return len(items.facts["names"])

    def scores(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, float]:
        results = self.results(items, chosen, output_IC)
        truth: dict[str, list[Any]] = {name: [] for name in items.facts["names"]}
        found: dict[str, list[Any]] = {name: [] for name in items.facts["names"]}
        for video, listed in results.items():
            for event in items.facts["database"][video]["annotations"]:
                truth[event["label"]].append((video, *event["segment"]))
            for one in listed:
                found[one["label"]].append((video, *one["segment"], one["score"]))
        return detection_map(truth, found)

    def submission(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, Any]:
        """ActivityNet's result file, which its toolkit scores."""
        results = self.results(items, chosen, output_IC)
        return {"version": "VERSION 1.3", "results": results, "external_data": {"used": True, "details": "lmp"}}

    def results(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, list[Result]]:
        """Video -> predictions, the best `TOP` of all classes."""
        probability_IC = 1 / (1 + np.exp(-output_IC))
        results: dict[str, list[Result]] = {}
        for places in by_group(items.group_I[chosen]):
            video, shots_S2 = items.facts["videos"][int(items.group_I[chosen[places[0]]])]
            listed: list[Result] = []
            for number, name in enumerate(items.facts["names"]):
                spans_N2, score_N = proposals(probability_IC[places, number], shots_S2)
                listed += [
                    {"label": name, "segment": span.tolist(), "score": float(score)}
                    for span, score in zip(spans_N2, score_N, strict=True)
                ]
            results[video] = sorted(listed, key=lambda one: -one["score"])[:TOP]
        return results

    def _read(self, labels: Path) -> dict[str, Any]:
        path = need_file(Path(labels) / "annotations.json", self)
        try:
            database = json.loads(path.read_text(encoding="utf-8"))["database"]
            for one in database.values():
                _ = SUBSETS[one["subset"]], [(e["label"], float(e["segment"][1])) for e in one["annotations"]]
        except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: is not ActivityNet's JSON ({error!r})", remedy="see docs/evaluate.md") from error
        return database

    def _splits(self, database: dict[str, Any]) -> dict[str, str]:
        split_of = {video: SUBSETS[one["subset"]] for video, one in database.items()}
        if "test" not in split_of.values():
            split_of = {video: "test" if split == "val" else split for video, split in split_of.items()}
            for video in sorted(v for v, split in split_of.items() if split == "train")[::5]:
                split_of[video] = "val"
        return split_of


def shot_targets(shots_S2: np.ndarray, events: Sequence[dict[str, Any]], names: Sequence[str]) -> np.ndarray:
    """float32 [S, C]: 1 where at least half of the shot lies in an event of the class."""
    target_SC = np.zeros((len(shots_S2), len(names)), np.float32)
    for event in events:
        start, end = event["segment"]
        shared_S = np.minimum(shots_S2[:, 1], end) - np.maximum(shots_S2[:, 0], start)
        inside_S = shared_S >= INSIDE * (shots_S2[:, 1] - shots_S2[:, 0])
        target_SC[inside_S, names.index(event["label"])] = 1.0
    return target_SC


TASKS: tuple[Task, ...] = (EventLocalisation(),)
