"""Text-video retrieval on Condensed Movies (Bain et al., ACCV 2020): the description against the clip.

LABELS/descriptions.csv (`imdbid,videoid,description`), LABELS/split.csv (`imdbid,split`), as published or gzipped.
Descriptions whose text occurs more than once are dropped, every copy, as the published loader does.

Two versions of the metric differ in ties alone: `challenge` settles them optimistically from text to video and by
the mean from video to text, `2020` by the mean both ways. Under the mean R@1 counts a rank of exactly 0.
"""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from lmp.downstream.metrics import Ties, rank_scores, summarise
from lmp.downstream.tasks.base import SPLITS, Coverage, RetrievalTask, Videos, need_file
from lmp.downstream.trunk import Window
from lmp.errors import UserError

Version = Literal["challenge", "2020"]


def both_ways(scores_TV: Tensor, *, version: Version) -> dict[str, dict[str, float]]:
    """The metric of text to video (`t2v`) and video to text (`v2t`); the diagonal is right.

    Args:
        scores_TV: of text t and video v.
        version: of the published metric.
    """
    t2v: Ties = "optimistic" if version == "challenge" else "mean"
    sides: dict[str, tuple[Tensor, Ties]] = {"t2v": (scores_TV, t2v), "v2t": (scores_TV.T, "mean")}
    found = {}
    for side, (scores_QG, ties) in sides.items():
        metrics = summarise(rank_scores(scores_QG, ties=ties), scores_QG.shape[1])
        found[side] = metrics.as_dict() | {"geometric_mean": metrics.geometric_mean}
    return found


def read_csv(folder: Path, name: str, task: RetrievalTask | None = None) -> Iterator[dict[str, str]]:
    """The rows of FOLDER/NAME or FOLDER/NAME.gz."""
    packed = Path(folder) / f"{name}.gz"
    path = packed if packed.is_file() else need_file(Path(folder) / name, task or TASKS[0])
    with gzip.open(path, "rt", encoding="utf-8", newline="") if path == packed else path.open(newline="") as file:
        yield from csv.DictReader(file)


def read_split(folder: Path) -> dict[str, str]:
    """Film -> train, val or test."""
    return {row["imdbid"]: row["split"] for row in read_csv(folder, "split.csv")}


def descriptions(folder: Path) -> dict[str, tuple[str, str]]:
    """Clip -> (film, description), without the descriptions that occur more than once."""
    rows = list(read_csv(folder, "descriptions.csv"))
    count = Counter(row["description"] for row in rows)
    return {row["videoid"]: (row["imdbid"], row["description"]) for row in rows if count[row["description"]] == 1}


class CondensedMovies(RetrievalTask):
    """Description to clip and back. What a clip's shots hold as text must be its description's features."""

    needs: ClassVar[str] = (
        "LABELS/descriptions.csv and split.csv as published (or .gz), and shards whose films (or their records' "
        "clips) bear the YouTube ids, with the description as modality text"
    )
    metric: ClassVar[str] = "t2v R@10"
    sides = (("text",), ("video",))

    def __init__(self, version: Version) -> None:
        self.version: Version = version
        self.name = "condensed_movies" if version == "challenge" else "condensed_movies/2020"

    def ids(self, labels: Path) -> dict[str, list[str]]:
        split = read_split(labels)
        found: dict[str, list[str]] = {name: [] for name in SPLITS}
        for row in read_csv(labels, "descriptions.csv"):
            if row["imdbid"] in split:
                found[split[row["imdbid"]]].append(row["videoid"])
        return found

    def pairs(self, labels: Path, videos: Videos) -> tuple[list[Window], np.ndarray, Coverage]:
        split, coverage = read_split(labels), Coverage()
        windows, of = [], []
        for video, (film, _) in descriptions(labels).items():
            if film not in split or not self.takes(video):
                continue
            clip = coverage.look(videos, video, split[film])
            if clip is not None:
                windows.append(clip.window())
                of.append(split[film])
        if not windows:
            raise UserError(f"{self.name}: the shards hold none of its clips", remedy=self.needs)
        return windows, np.array(of), coverage

    def takes(self, video: str) -> bool:
        """Whether a clip is one of the benchmark's."""
        return True

    def scores(self, scores_NN: Tensor, *, seed: int) -> dict[str, float]:
        found = both_ways(scores_NN, version=self.version)
        return {f"{side} {name}": value for side, metrics in found.items() for name, value in metrics.items()}


TASKS: tuple[RetrievalTask, ...] = (CondensedMovies("challenge"), CondensedMovies("2020"))
