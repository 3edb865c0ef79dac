"""Cut types of MovieCuts (Pardo et al., ECCV 2022): ten labels, several at once; per-class AP and their mean.

LABELS/cut-type-{train,val,test}.json (or .gz): `{"cut_types": [10 names], "annotations": {cut: {"video_id", "subset",
"labels": [10 of 0 and 1]}}}`. The labels carry no time, so the shards hold a film per cut, keyed by the cut's id: the
two shots around it, or more with `"cut": number of the first shot after it` in the record.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lmp.downstream.scores import per_class_average_precision
from lmp.downstream.tasks.base import SPLITS, Coverage, ItemRows, Items, Loss, Task, Videos, need_file
from lmp.errors import UserError


class MovieCuts(Task):
    """Multi-label classification of cuts, from the means of the shots on both sides."""

    name = "moviecuts"
    needs: ClassVar[str] = "LABELS/cut-type-{train,val,test}.json as published (or .gz), and shards with a film per cut"
    metric: ClassVar[str] = "mAP"
    loss: ClassVar[Loss] = "multilabel"

    def ids(self, labels: Path) -> dict[str, list[str]]:
        read = {
            split: self._read(labels, split)["annotations"].values() for split in SPLITS if self._has(labels, split)
        }
        return {split: sorted({one["video_id"] for one in read[split]}) if split in read else [] for split in SPLITS}

    def items(self, labels: Path, videos: Videos) -> tuple[Items, Coverage]:
        rows, coverage, group = ItemRows(), Coverage(), 0
        names: list[str] = []
        for split in SPLITS:
            content = self._read(labels, split)
            names = names or content["cut_types"]
            if content["cut_types"] != names:
                raise UserError(
                    f"{labels}: {split} names other cut types than train", remedy="give files of one release"
                )
            for cut, one in content["annotations"].items():
                clip = coverage.look(videos, cut, split)
                if clip is None:
                    continue
                shots = clip.stop - clip.start
                place = videos.films.index.info(clip.film).get("cut", 1 if shots == 2 else None)
                if not isinstance(place, int) or not 0 < place < shots:
                    raise UserError(
                        f"film {cut} has {shots} shots and no cut among them", remedy='give "cut" in its record'
                    )
                window = rows.window(clip.window())
                rows.add(window, [(0, place), (place, shots)], one["labels"], group=group, split=split)
                group += 1
        items = rows.items(np.float32)
        items.facts["names"] = names
        return items, coverage

    def outputs(self, items: Items) -> int:
        return len(items.facts["names"])

    def scores(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, float]:
        ap_C = per_class_average_precision(items.target_I[chosen] > 0.5, output_IC)
        found = {"mAP": float(np.nanmean(ap_C))}
        return found | {f"AP {name}": float(ap) for name, ap in zip(items.facts["names"], ap_C, strict=True)}

    def _has(self, labels: Path, split: str) -> bool:
        return any((Path(labels) / f"cut-type-{split}.json{end}").is_file() for end in ("", ".gz"))

    def _read(self, labels: Path, split: str) -> dict[str, Any]:
        packed = Path(labels) / f"cut-type-{split}.json.gz"
        path = packed if packed.is_file() else need_file(Path(labels) / f"cut-type-{split}.json", self)
        try:
            content = json.loads(gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes())
            count = len(content["cut_types"])
            wrong = [cut for cut, one in content["annotations"].items() if len(one["labels"]) != count]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is not MovieCuts' JSON ({error!r})", remedy="give the published file") from error
        if wrong:
            raise UserError(f"{path}: cut {wrong[0]} has not {count} labels", remedy="give the published file")
        return content


TASKS: tuple[Task, ...] = (MovieCuts(),)
