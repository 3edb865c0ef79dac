"""Scene boundaries: which gaps between shots end a scene. Average precision per film, mean over films.

Labels of a film KEY, in one of two forms:

    LABELS/KEY/shots.txt, scenesByFrames.txt    Open Video Scene Detection: `start end` frames per line, end inclusive
    LABELS/KEY.txt                              MovieNet: `shot 0|1` per line, 1 where a scene ends with the shot

Mapping of frames to gaps: the end of every scene but the last goes to the nearest shot end (of two, the earlier), and
the gap after that shot is a boundary. Scores depend on this mapping; say which one beside any figure.

With LABELS/split.json there is one head, fitted on train; without, each film is left out in turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import normalize

from lmp.downstream.scores import average_precision, mean_iou, purity
from lmp.downstream.tasks.base import Coverage, ItemRows, Items, Loss, Task, Videos, by_group
from lmp.downstream.tasks.splits import read_json_split
from lmp.downstream.trunk import Blocks
from lmp.errors import UserError

REACHES = (1, 2, 4, 8, 16)
"""Shots on either side of a gap that are compared."""


def boundary_gaps(shots_N2: np.ndarray, scenes_M2: np.ndarray) -> np.ndarray:
    """bool [N - 1]: the gaps at which a scene ends (see the module).

    Args:
        shots_N2, scenes_M2: start and end of each, in the same unit.
    """
    gaps_N = np.zeros(len(shots_N2) - 1, dtype=bool)
    for end in scenes_M2[:-1, 1]:
        nearest = int(np.abs(shots_N2[:, 1] - end).argmin())
        if nearest < len(gaps_N):
            gaps_N[nearest] = True
    return gaps_N


def scenes_of(gap_N: np.ndarray, shots_N2: np.ndarray) -> np.ndarray:
    """Start and end [M, 2] of the scenes that boundaries make of the shots."""
    last = np.append(np.flatnonzero(gap_N), len(shots_N2) - 1)
    first = np.insert(last[:-1] + 1, 0, 0)
    return np.stack([shots_N2[first, 0], shots_N2[last, 1]], axis=1)


def similarity_windows(rows_SF: Tensor) -> Tensor:
    """How alike the two sides of each gap are: [S - 1, 1 + 5 * reaches].

    Of unit-length rows: the cosine of the two shots at the gap; and for k shots on either side (fewer at the film's
    ends) the mean and the largest cosine across the gap, the cosine of the two mean rows, the mean cosine within
    either side.
    """
    unit_SF = normalize(rows_SF.float(), dim=1)
    shots = len(unit_SF)
    # Sums over squares of the matrix of cosines are differences of its cumulated sums.
    cosine_SS = unit_SF @ unit_SF.T
    area = torch.zeros(shots + 1, shots + 1, dtype=torch.float64, device=unit_SF.device)
    area[1:, 1:] = cosine_SS.double().cumsum(0).cumsum(1)
    gap = torch.arange(1, shots, device=unit_SF.device)  # rows before it are on its left
    columns = [cosine_SS.diagonal(1)]
    for reach in REACHES:
        left, right = (gap - reach).clamp(min=0), (gap + reach).clamp(max=shots)

        def total(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
            (a, b), (c, d) = rows, columns
            return area[b, d] - area[a, d] - area[b, c] + area[a, c]

        lefts, rights = (left, gap), (gap, right)
        n, m = gap - left, right - gap
        across, within_left, within_right = total(lefts, rights), total(lefts, lefts), total(rights, rights)
        # The cosine of two mean rows: their product over their lengths, all of which are such sums.
        of_means = across / (within_left * within_right).clamp(min=1e-12).sqrt()
        columns += [across / (n * m), _largest(cosine_SS, reach)]
        columns += [of_means, within_left / n**2, within_right / m**2]
    return torch.stack([column.float() for column in columns], dim=1)


def _largest(cosine_SS: Tensor, reach: int) -> Tensor:
    """The largest cosine between the `reach` shots before each gap and those after it: [S - 1]."""
    padded = F.pad(cosine_SS, (reach, reach, reach, reach), value=-2.0)
    best = torch.full((len(cosine_SS) - 1,), -2.0, device=cosine_SS.device)
    gap = torch.arange(1, len(cosine_SS), device=cosine_SS.device)
    for before in range(1, reach + 1):
        for after in range(reach):
            best = torch.maximum(best, padded[gap - before + reach, gap + after + reach])
    return best


class SceneBoundaries(Task):
    """A head on similarity windows of every block of features, and on the lengths of the shots."""

    name = "boundaries"
    needs: ClassVar[str] = "LABELS/KEY/{shots,scenesByFrames}.txt or LABELS/KEY.txt for the films' keys"
    metric: ClassVar[str] = "AP"
    loss: ClassVar[Loss] = "class"
    balanced: ClassVar[bool] = True

    def ids(self, labels: Path) -> dict[str, list[str]]:
        if (Path(labels) / "split.json").is_file():
            return read_json_split(Path(labels) / "split.json")
        found = {path.parent.name for path in Path(labels).glob("*/scenesByFrames.txt")}
        return {"train": [], "val": [], "test": sorted(found or {path.stem for path in Path(labels).glob("*.txt")})}

    def items(self, labels: Path, videos: Videos) -> tuple[Items, Coverage]:
        rows, coverage = ItemRows(), Coverage()
        split_of = {name: split for split, names in self.ids(labels).items() for name in names}
        leave_one_out = not (Path(labels) / "split.json").is_file()
        shown: list[np.ndarray] = []
        for key, split in sorted(split_of.items()):
            clip = coverage.look(videos, key, split)
            if clip is None or clip.stop - clip.start < 2:
                continue
            gap_N = read_gaps(Path(labels), key, clip.stop - clip.start)
            window = rows.window(clip.window())
            for gap, ends in enumerate(gap_N.tolist()):
                rows.add(window, [(gap, gap + 1)], int(ends), group=len(shown), split=split)
            shown.append(videos.times(clip))
        items = rows.items(np.int64)
        if leave_one_out:
            if len(shown) < 3:
                raise UserError(
                    f"boundaries: only {len(shown)} labelled films, too few to leave one out",
                    remedy="give more films, or LABELS/split.json",
                )
            items.fold_I = items.group_I.copy()
        items.facts["films"] = shown
        return items, coverage

    def outputs(self, items: Items) -> int:
        return 2

    def represent(self, blocks: Blocks, parts_IP2: Tensor, shots_S2: np.ndarray) -> Tensor:
        columns = [similarity_windows(rows_SF) for rows_SF in blocks.values()]
        length_S = torch.log(torch.from_numpy(shots_S2[:, 1] - shots_S2[:, 0]).float().clamp(min=0.04))
        apart = torch.from_numpy(shots_S2[1:, 0] - shots_S2[:-1, 1]).float().clamp(min=0)
        length_S = (length_S - length_S.mean()).to(columns[0].device)
        columns.append(torch.stack([length_S[:-1], length_S[1:], apart.log1p().to(length_S.device)], dim=1))
        every = torch.cat(columns, dim=1)
        # Films differ in how alike their shots are; no label is used.
        every = (every - every.mean(0)) / every.std(0, unbiased=False).clamp(min=1e-6)
        return every[parts_IP2[:, 0, 0].to(every.device)]

    def scores(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, float]:
        score_I = output_IC[:, 1] - output_IC[:, 0]
        true_I, group_I = items.target_I[chosen], items.group_I[chosen]
        found: dict[str, list[float]] = {"AP": [], "AUC": [], "mIoU": [], "purity": []}
        for places in by_group(group_I):
            if not true_I[places].any():
                continue  # a film of one scene has no boundary to find
            film = int(group_I[places[0]])
            fitted_I = items.group_I != film if items.fold_I is not None else items.split_I == "train"
            prior = float(items.target_I[fitted_I].mean())
            shots_N2 = items.facts["films"][film]
            truth_N = true_I[places] > 0
            found["AP"].append(average_precision(truth_N, score_I[places]))
            found["AUC"].append(_auc(truth_N, score_I[places]))
            marked_N = np.zeros(len(places), dtype=bool)
            marked_N[np.argsort(-score_I[places], kind="stable")[: max(1, round(prior * len(places)))]] = True
            scenes, predicted = scenes_of(truth_N, shots_N2), scenes_of(marked_N, shots_N2)
            found["mIoU"].append(mean_iou(scenes, predicted))
            found["purity"].append(purity(scenes, predicted))
        means = {name: float(np.mean(values)) for name, values in found.items()}
        return means | {"AP_deviation": float(np.std(found["AP"], ddof=1)) if len(found["AP"]) > 1 else 0.0}


def read_gaps(labels: Path, key: str, shots: int) -> np.ndarray:
    """The boundaries of a film: bool [shots - 1].

    Raises:
        UserError: no labels, or of another number of shots.
    """
    folder = labels / key
    if (folder / "scenesByFrames.txt").is_file():
        shots_N2, scenes_M2 = (_spans(folder / name) for name in ("shots.txt", "scenesByFrames.txt"))
        if len(shots_N2) != shots:
            raise UserError(
                f"{folder / 'shots.txt'} has {len(shots_N2)} shots, the shards have {shots}",
                remedy="make the shards of these shots",
            )
        return boundary_gaps(shots_N2, scenes_M2)
    path = labels / f"{key}.txt"
    try:
        marks = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        ends_N = np.array([int(mark[1]) for mark in marks]) > 0
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path}: cannot be read as `shot 0|1` lines", remedy="give MovieNet's label file") from error
    # MovieNet lists every shot but the last.
    if len(ends_N) not in (shots - 1, shots):
        raise UserError(f"{path} has {len(ends_N)} lines, the shards {shots} shots", remedy="make them of these shots")
    return ends_N[: shots - 1]


def _spans(path: Path) -> np.ndarray:
    try:
        return np.array([[int(word) for word in line.split()[:2]] for line in path.read_text().splitlines() if line])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as `start end` lines", remedy="give the published file") from error


def _auc(truth_N: np.ndarray, score_N: np.ndarray) -> float:
    """Chance that a boundary is scored above another gap; ties count half."""
    right, wrong = score_N[truth_N], score_N[~truth_N]
    above = (right[:, None] > wrong[None]).mean() + (right[:, None] == wrong[None]).mean() / 2
    return float(above)


TASKS: tuple[Task, ...] = (SceneBoundaries(),)
