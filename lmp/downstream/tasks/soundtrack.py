"""Scene-soundtrack retrieval (Suris et al., CVPR 2022, on film clips): the picture against the sound of a segment.

LABELS/split.json, `{"train": [ids], "val": [ids], "test": [ids]}`: of films, or of clips in their records. Each is
cut into segments of `SEGMENT_SHOTS` shots; those with no valid picture or sound are left out. Queries are the whole
test set in galleries of a fixed size: the right segment and others, drawn anew by each seed. Ties count by the mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lmp.downstream.metrics import rank_scores, summarise
from lmp.downstream.tasks.base import Coverage, RetrievalTask, Videos, need_file
from lmp.downstream.tasks.splits import read_json_split
from lmp.downstream.trunk import Window
from lmp.errors import UserError

SEGMENT_SHOTS = 8
GALLERY = 2000


def gallery_ranks(scores_NN: Tensor, *, gallery: int, seed: int) -> Tensor:
    """Rank from 0 of each row's own column among itself and `gallery - 1` others drawn without replacement: [N]."""
    random = np.random.default_rng([seed, 0x50D])
    count = len(scores_NN)
    ranks = []
    for query in range(count):
        drawn = random.choice(count - 1, gallery - 1, replace=False)
        others = torch.from_numpy(np.where(drawn >= query, drawn + 1, drawn))
        row = torch.cat([scores_NN[query, query : query + 1], scores_NN[query, others]])[None]
        ranks.append(rank_scores(row, torch.zeros(1, dtype=torch.int64), ties="mean"))
    return torch.cat(ranks)


class Soundtrack(RetrievalTask):
    """Picture to sound and back."""

    name = "soundtrack"
    needs: ClassVar[str] = "LABELS/split.json with ids by split, and shards with modalities video and audio"
    metric: ClassVar[str] = "v2a R@10"
    sides = (("video",), ("audio",))

    def ids(self, labels: Path) -> dict[str, list[str]]:
        return read_json_split(need_file(Path(labels) / "split.json", self))

    def pairs(self, labels: Path, videos: Videos) -> tuple[list[Window], np.ndarray, Coverage]:
        coverage = Coverage()
        windows, of, silent = [], [], 0
        for split, names in self.ids(labels).items():
            for name in names:
                clip = coverage.look(videos, name, split)
                if clip is None:
                    continue
                _, _, valid = videos.films.read(clip.film)
                for start in range(clip.start, clip.stop - SEGMENT_SHOTS + 1, SEGMENT_SHOTS):
                    rows_S = np.arange(start, start + SEGMENT_SHOTS)
                    if all(bool(valid[side[0]][rows_S].any()) for side in self.sides):
                        windows.append(Window(clip.film, rows_S))
                        of.append(split)
                    else:
                        silent += 1
        if not windows:
            raise UserError(f"{self.name}: the shards hold no segment with picture and sound", remedy=self.needs)
        coverage.notes.append(f"{silent} segments of {SEGMENT_SHOTS} shots lack picture or sound and are left out")
        return windows, np.array(of), coverage

    def gallery(self, clips: int) -> int:
        return min(GALLERY, clips)

    def scores(self, scores_NN: Tensor, *, seed: int) -> dict[str, float]:
        size = self.gallery(len(scores_NN))
        found: dict[str, float] = {}
        for side, rows in (("v2a", scores_NN), ("a2v", scores_NN.T)):
            metrics = summarise(gallery_ranks(rows, gallery=size, seed=seed), size)
            found |= {f"{side} {name}": value for name, value in metrics.as_dict().items()}
        return found


TASKS: tuple[RetrievalTask, ...] = (Soundtrack(),)
