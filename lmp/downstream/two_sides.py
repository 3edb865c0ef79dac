"""Heads of retrieval between two modalities of the same clips: ridge regression on frozen features, or two projections
fitted together with the trunk.

A side is the mean, over the clip's shots that have the modality, of its contextual features (or base features). The
strength and the epoch are chosen on val by the task's own metric.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lmp.downstream.heads import FineTuning, tell_epoch, trainable
from lmp.downstream.metrics import chance
from lmp.downstream.tasks.base import RetrievalTask
from lmp.downstream.trunk import Films, Trunk, Window

ALPHAS = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
WIDTH = 256
TEMPERATURE = 0.05


class Clips(NamedTuple):
    """The clips of a retrieval: windows [N], and numbers of those of each split."""

    windows: list[Window]
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def split_clips(windows: list[Window], split_N: np.ndarray, *, seed: int) -> Clips:
    """By split; without val clips a quarter of the training clips, drawn by the seed, stands in."""
    train, val, test = (np.flatnonzero(split_N == split) for split in ("train", "val", "test"))
    if not len(val):
        order = np.random.default_rng([seed, 0x4A1]).permutation(train)
        train, val = np.sort(order[len(order) // 4 :]), np.sort(order[: len(order) // 4])
    return Clips(windows, train, val, test)


def sides_of(task: RetrievalTask, trunk: Trunk, films: Films, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """Frozen features of queries [N, F] and candidates [N, G]."""
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for first in track(
        range(0, len(windows), 256), f"{task.name}: {trunk.name}", console=Console(stderr=True), transient=True
    ):
        batch = windows[first : first + 256]
        for window, blocks in zip(batch, trunk.blocks(films, batch), strict=True):
            for side, rows in zip(task.sides, found, strict=True):
                rows.append(_side(side, window, blocks, films))
    return torch.stack(found[0]), torch.stack(found[1])


def ridge(task: RetrievalTask, sides: tuple[Tensor, Tensor], clips: Clips, *, seed: int) -> tuple[Tensor, float]:
    """Cosines of every tested query with every tested candidate, after regression from the one to the other.

    Candidates are standardised on the training clips; queries are centred and scaled as a whole, so that their weak
    directions (the tail of a text's components) stay weak.

    Returns:
        [n, n], and the strength that val chose.
    """
    query_NF, gallery_NG = _centred(sides[0], clips.train), _standardised(sides[1], clips.train)
    x, y = query_NF[clips.train].double(), gallery_NG[clips.train].double()
    values_F, vectors_FF = torch.linalg.eigh(x.T @ x)
    rotated_FG = vectors_FF.T @ (x.T @ y)
    best: tuple[float, float, Tensor] | None = None
    for alpha in ALPHAS:
        weight_FG = (vectors_FF @ (rotated_FG / (values_F.clamp(min=0) + alpha)[:, None])).float()
        score = task.scores(_cosines(query_NF, gallery_NG, weight_FG, clips.val), seed=seed)[task.metric]
        if best is None or score > best[0]:
            best = score, alpha, weight_FG
    assert best is not None
    return _cosines(query_NF, gallery_NG, best[2], clips.test), best[1]


def blind(task: RetrievalTask, tested: int) -> dict[str, float]:
    """What a blind draw gives in expectation, under the names of the task's metric."""
    size = task.gallery(tested)
    metrics = chance(torch.full((tested,), size), size)
    known = metrics.as_dict() | {"geometric_mean": metrics.geometric_mean}
    names = task.scores(torch.zeros(2, 2), seed=0)
    return {name: known[name.partition(" ")[2]] for name in names}


def fine_tune_sides(
    task: RetrievalTask, trunk: Trunk, films: Films, clips: Clips, *, seed: int, settings: FineTuning
) -> tuple[Tensor, int]:
    """As `ridge`, with two linear projections and a copy of the trunk fitted by symmetric InfoNCE; the epoch chosen."""
    assert trunk.model is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = copy.deepcopy(trunk.model)
        learnt = replace(trunk, model=model)
        widths = [rows.shape[1] for rows in _both(task, learnt, films, [clips.windows[clips.train[0]]])]
        heads = nn.ModuleList(nn.Linear(width, WIDTH) for width in widths).to(model.device)
        optimiser = torch.optim.AdamW(
            [
                {"params": trainable(model, settings.layers), "lr": settings.trunk_lr},
                {"params": heads.parameters(), "lr": settings.head_lr},
            ],
            weight_decay=settings.weight_decay,
        )

        @torch.no_grad()
        def judged(chosen: np.ndarray) -> Tensor:
            sides = sides_of(task, learnt, films, [clips.windows[n] for n in chosen])
            return _scores(heads, sides).cpu()

        random = np.random.default_rng([seed, 0xF17E])
        best: tuple[float, int, Tensor] | None = None
        for epoch in range(1, settings.epochs + 1):
            order = random.permutation(clips.train)
            for first in range(0, len(order) - 1, settings.batch):
                windows = [clips.windows[n] for n in order[first : first + settings.batch]]
                scores_BB = _scores(heads, _both(task, learnt, films, windows)) / TEMPERATURE
                own_B = torch.arange(len(windows), device=scores_BB.device)
                loss = (F.cross_entropy(scores_BB, own_B) + F.cross_entropy(scores_BB.T, own_B)) / 2
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            score = task.scores(judged(clips.val), seed=seed)[task.metric]
            tell_epoch(task.name, trunk.name, epoch, score)
            if best is None or score > best[0]:
                best = score, epoch, judged(clips.test)
            elif epoch - best[1] >= settings.patience:
                break
    assert best is not None
    return best[2], best[1]


def _both(task: RetrievalTask, trunk: Trunk, films: Films, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
    blocks = trunk.run(films, windows)
    query, gallery = (
        torch.stack([_side(side, window, one, films) for window, one in zip(windows, blocks, strict=True)])
        for side in task.sides
    )
    return query, gallery


def _scores(heads: nn.ModuleList, sides: tuple[Tensor, Tensor]) -> Tensor:
    device = next(heads.parameters()).device
    query, gallery = (
        F.normalize(head(F.layer_norm(rows.to(device), rows.shape[-1:])), dim=1)
        for head, rows in zip(heads, sides, strict=True)
    )
    return query @ gallery.T


def _side(names: tuple[str, ...], window: Window, blocks: dict[str, Tensor], films: Films) -> Tensor:
    """[F]: of each modality the mean over the shots that have it, zeros where none has."""
    valid = films.read(window.film)[2]
    parts = []
    for name in names:
        there_S = valid[name][torch.from_numpy(window.rows_S)].to(blocks[name].device).float()
        both = [blocks[block] for block in (name, f"base/{name}") if block in blocks]
        parts += [(rows_SF * there_S[:, None]).sum(0) / there_S.sum().clamp(min=1) for rows_SF in both]
    return torch.cat(parts)


def _standardised(rows_NF: Tensor, train: np.ndarray) -> Tensor:
    std_F, mean_F = torch.std_mean(rows_NF[train], dim=0, unbiased=False)
    return (rows_NF - mean_F) / torch.where(std_F > 1e-6, std_F, torch.inf)


def _centred(rows_NF: Tensor, train: np.ndarray) -> Tensor:
    centred_NF = rows_NF - rows_NF[train].mean(0)
    return centred_NF / centred_NF[train].square().mean().sqrt().clamp(min=1e-6)


def _cosines(query_NF: Tensor, gallery_NG: Tensor, weight_FG: Tensor, chosen: np.ndarray) -> Tensor:
    return F.normalize(query_NF[chosen] @ weight_FG, dim=1) @ F.normalize(gallery_NG[chosen], dim=1).T
