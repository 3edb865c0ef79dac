"""Heads on features of films: a linear probe on frozen features, or a head fitted together with the trunk.

Whatever is chosen is chosen on val, never on test: a probe's penalty by the loss, the epoch of fine-tuning by the
score. Where a task has no val items, parts of the training groups, drawn by the seed, stand in for it: each quarter in
turn for a probe, which is then fitted on all of them; one quarter for fine-tuning.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lmp.downstream.tasks.base import Items, Loss, Task, by_group
from lmp.downstream.trunk import BATCH_SHOTS, Films, Trunk, Window
from lmp.model import LmpModel

STRENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
"""Of the penalty on the squared weights of a probe, strongest first: each fit begins where the last one ended."""
ITERATIONS = 50


@dataclass(frozen=True)
class FineTuning:
    """How a head is fitted together with the trunk.

    Attributes:
        layers: the last so many layers of each transformer learn; None for all of the trunk.
        head_lr, trunk_lr: of AdamW.
        weight_decay: of both.
        epochs: at most.
        patience: epochs without a better val score after which it stops.
        batch: groups (videos, questions) in a step.
    """

    layers: int | None = None
    head_lr: float = 1e-3
    trunk_lr: float = 1e-4
    weight_decay: float = 0.01
    epochs: int = 20
    patience: int = 3
    batch: int = 16


@dataclass(frozen=True)
class Part:
    """Items to fit on, to select on (maybe none), and to test."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def parts(items: Items) -> list[Part]:
    """One part, or one for each fold; their tests are disjoint."""
    if items.fold_I is None:
        return [Part(*(items.of_split(split) for split in ("train", "val", "test")))]
    nothing = np.zeros(0, dtype=np.int64)
    folds = np.unique(items.fold_I)
    return [Part(np.flatnonzero(items.fold_I != n), nothing, np.flatnonzero(items.fold_I == n)) for n in folds]


def inner_parts(items: Items, part: Part, *, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """What to fit on and what to select on: train and val, or the training groups less a quarter, and that quarter."""
    if len(part.val):
        return [(part.train, part.val)]
    groups = np.random.default_rng([seed, 0x4A1]).permutation(np.unique(items.group_I[part.train]))
    quarters = [np.isin(items.group_I[part.train], quarter) for quarter in np.array_split(groups, 4) if len(quarter)]
    return [(part.train[~held], part.train[held]) for held in quarters]


def rows_of(task: Task, trunk: Trunk, films: Films, items: Items) -> Tensor:
    """The head's input for every item, from frozen features: [I, R] float32."""
    found: list[Tensor] = [torch.empty(0)] * len(items.windows)
    of_window = _items_of_windows(items)
    for first in track(
        range(0, len(items.windows), 256), f"{task.name}: {trunk.name}", console=Console(stderr=True), transient=True
    ):
        windows = items.windows[first : first + 256]
        for number, blocks in enumerate(trunk.blocks(films, windows), first):
            found[number] = represent(task, items, of_window[number], films, blocks, items.windows[number])
    order = np.argsort(np.concatenate(of_window), kind="stable")
    return torch.cat(found)[torch.from_numpy(order)]


def represent(
    task: Task, items: Items, chosen: np.ndarray, films: Films, blocks: dict[str, Tensor], window: Window
) -> Tensor:
    """The head's input for some items of one window: [len(chosen), R]."""
    shots_S2 = films.shots(window.film)[window.rows_S] / 1000.0
    return task.represent(blocks, torch.from_numpy(items.parts_IP2[chosen]), shots_S2)


def _items_of_windows(items: Items) -> list[np.ndarray]:
    order = np.argsort(items.window_I, kind="stable")
    edges = np.searchsorted(items.window_I[order], np.arange(len(items.windows) + 1))
    return [order[a:b] for a, b in itertools.pairwise(edges)]


def fit_probe(task: Task, items: Items, rows_IR: Tensor, part: Part, *, seed: int) -> tuple[np.ndarray, float]:
    """The output for the tested items of a linear head, [len(part.test), C], and the strength that was chosen.

    Args:
        rows_IR: of all items; standardised here on the training items.
        seed: of the quarters where there is no val; the fit itself is convex and draws nothing.
    """
    if rows_IR.shape[1]:
        std_R, mean_R = torch.std_mean(rows_IR[part.train], dim=0, unbiased=False)
        kept_R = std_R > 1e-6 * mean_R.abs().clamp(min=1e-6)
        rows_IR = (rows_IR[:, kept_R] - mean_R[kept_R]) / std_R[kept_R]
    strengths = STRENGTHS if rows_IR.shape[1] else STRENGTHS[:1]
    inner = inner_parts(items, part, seed=seed) if len(strengths) > 1 else []
    found = np.zeros((len(inner), len(strengths)))
    fits: list[tuple[Tensor, Tensor]] = []
    for n, (train, val) in enumerate(inner):
        target, weight_I = targets(task, items, val)
        group_I = torch.from_numpy(items.group_I[val])
        fits = []
        for k, (weight_RC, bias_C) in enumerate(_fits(task, items, rows_IR, train, strengths)):
            found[n, k] = float(head_loss(task.loss, rows_IR[val] @ weight_RC + bias_C, target, weight_I, group_I))
            fits.append((weight_RC, bias_C))
    best = int(found.mean(0).argmin()) if len(inner) else 0
    if not inner or not len(part.val):  # nothing was fitted so far, or all of it without a quarter
        fits = list(_fits(task, items, rows_IR, part.train, strengths[: best + 1]))
    weight_RC, bias_C = fits[best]
    return (rows_IR[part.test] @ weight_RC + bias_C).numpy(), strengths[best]


def _fits(
    task: Task, items: Items, rows_IR: Tensor, train: np.ndarray, strengths: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights [R, C] and biases [C] of the linear head under each strength."""
    outputs = task.outputs(items)
    weight_RC = torch.zeros(rows_IR.shape[1], outputs, requires_grad=True)
    bias_C = torch.zeros(outputs, requires_grad=True)
    target, weight_I = targets(task, items, train)
    group_I, train_IR = torch.from_numpy(items.group_I[train]), rows_IR[train]
    for strength in strengths:
        optimiser = torch.optim.LBFGS(
            [weight_RC, bias_C],
            max_iter=ITERATIONS,
            tolerance_grad=1e-5,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )

        def closure(strength: float = strength, optimiser: torch.optim.LBFGS = optimiser) -> Tensor:
            optimiser.zero_grad()
            loss = head_loss(task.loss, train_IR @ weight_RC + bias_C, target, weight_I, group_I)
            loss = loss + strength * weight_RC.square().sum() / 2
            loss.backward()
            return loss

        optimiser.step(closure)
        yield weight_RC.detach().clone(), bias_C.detach().clone()


def constant(task: Task, items: Items, part: Part) -> np.ndarray:
    """The output of a head that sees nothing: the best constant for the training items."""
    rows_I0 = torch.zeros(len(items), 0)
    return fit_probe(task, items, rows_I0, part, seed=0)[0]


def targets(task: Task, items: Items, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """What some items' outputs should be, and their weights in the loss, with mean 1."""
    target = torch.from_numpy(items.target_I[chosen])
    weight_I = torch.from_numpy(items.weight_I[chosen])
    if task.balanced:
        count_C = torch.bincount(target, weights=weight_I)
        weight_I = weight_I / count_C[target].float()
    return target, weight_I / weight_I.mean()


def head_loss(loss: Loss, output_IC: Tensor, target: Tensor, weight_I: Tensor, group_I: Tensor) -> Tensor:
    """Mean loss of items.

    Args:
        loss: `class`: cross-entropy; `multilabel`: mean binary cross-entropy of the labels; `multilabel_one`:
            cross-entropy to the right labels in equal shares; `regression`: squared error; `choice`: cross-entropy
            among the items of each group.
        target: as Items.target_I.
    """
    if loss == "class":
        each_I = F.cross_entropy(output_IC, target, reduction="none")
    elif loss == "multilabel":
        each_I = F.binary_cross_entropy_with_logits(output_IC, target, reduction="none").mean(1)
    elif loss == "multilabel_one":
        share_IC = target / target.sum(1, keepdim=True).clamp(min=1)
        each_I = F.cross_entropy(output_IC, share_IC, reduction="none")
    elif loss == "regression":
        each_I = (output_IC[:, 0] - target).square()
    else:
        _, place_I = group_I.unique(return_inverse=True)
        total_G = torch.zeros(int(place_I.max()) + 1, device=output_IC.device)
        score_I = output_IC[:, 0]
        # Scores are shifted by their largest, so that no exponential overflows.
        top_G = torch.full_like(total_G, -torch.inf).scatter_reduce(0, place_I, score_I.detach(), "amax")
        total_G = total_G.scatter_add(0, place_I, (score_I - top_G[place_I]).exp())
        each_I = top_G[place_I] + total_G.log()[place_I] - score_I
        return each_I[target].mean()
    return (each_I * weight_I).mean()


class Head(nn.Module):
    """Layer norm without weights, dropout, linear."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.linear = nn.Linear(width, outputs)

    def forward(self, rows_IR: Tensor) -> Tensor:
        return self.linear(self.dropout(F.layer_norm(rows_IR, rows_IR.shape[-1:])))


def trainable(model: LmpModel, layers: int | None) -> list[nn.Parameter]:
    """Freeze all of a model but the last `layers` layers of each transformer and their norms; None: nothing."""
    model.requires_grad_(layers is None)
    if layers is not None:
        for name, parameter in model.named_parameters():
            # contextual.MODALITY.layers.N..., cross.layers.N..., and their norms
            transformer, _, rest = name.partition(".layers.")
            if rest:
                total = len(model.get_submodule(f"{transformer}.layers"))  # type: ignore[arg-type]
                parameter.requires_grad_(int(rest.partition(".")[0]) >= total - layers)
            elif name.startswith(("contextual.", "cross.norm")):
                parameter.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fine_tune(
    task: Task, items: Items, trunk: Trunk, films: Films, part: Part, *, seed: int, settings: FineTuning
) -> tuple[np.ndarray, int]:
    """The output for the tested items of a head fitted together with a copy of the trunk, and the epoch val chose.

    Args:
        seed: of the head's weights, the order and the draws; the global random state is left as it was.
    """
    assert trunk.model is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = copy.deepcopy(trunk.model)
        learnt = replace(trunk, model=model)
        width = _forward(task, items, learnt, films, part.train[:1]).shape[1]
        head = Head(width, task.outputs(items)).to(model.device)
        optimiser = torch.optim.AdamW(
            [
                {"params": trainable(model, settings.layers), "lr": settings.trunk_lr},
                {"params": head.parameters(), "lr": settings.head_lr},
            ],
            weight_decay=settings.weight_decay,
        )
        random = np.random.default_rng([seed, 0xF17E])
        train, val = inner_parts(items, part, seed=seed)[0]
        best: tuple[float, int, np.ndarray] | None = None
        for epoch in range(1, settings.epochs + 1):
            head.train()
            for chosen in _batches(task, items, train, settings.batch, random):
                target, weight_I = targets(task, items, chosen)
                output_IC = head(_forward(task, items, learnt, films, chosen))
                group_I = torch.from_numpy(items.group_I[chosen])
                of_device = (one.to(output_IC.device) for one in (target, weight_I, group_I))
                loss = head_loss(task.loss, output_IC, *of_device)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            head.eval()
            judged = task.scores(items, val, _output(task, items, learnt, films, head, val))
            score = judged[task.metric] * (1 if task.higher else -1)
            tell_epoch(task.name, trunk.name, epoch, judged[task.metric])
            if best is None or score > best[0]:
                best = score, epoch, _output(task, items, learnt, films, head, part.test)
            elif epoch - best[1] >= settings.patience:
                break
    assert best is not None
    return best[2], best[1]


def tell_epoch(task: str, trunk: str, epoch: int, score: float) -> None:
    """Say on stderr how far a fit is."""
    Console(stderr=True).print(f"{task}: {trunk}, epoch {epoch}: {score:.4g} on val", highlight=False)


def _batches(
    task: Task, items: Items, train: np.ndarray, size: int, random: np.random.Generator
) -> Iterator[np.ndarray]:
    """Items of `size` groups at a time, in random order; of a group all items, or one drawn by its weight."""
    groups = by_group(items.group_I[train])
    order = random.permutation(len(groups))
    for first in range(0, len(order), size):
        chosen = []
        for number in order[first : first + size].tolist():
            of = train[groups[number]]
            if task.one_window:
                weight = items.weight_I[of].astype(np.float64)
                of = random.choice(of, 1, p=weight / weight.sum())
            chosen.append(of)
        yield np.concatenate(chosen)


def _forward(task: Task, items: Items, trunk: Trunk, films: Films, chosen: np.ndarray) -> Tensor:
    """The head's input for some items, with gradients: [len(chosen), R] in the order of `chosen`."""
    numbers, place_I = np.unique(items.window_I[chosen], return_inverse=True)
    windows = [items.windows[n] for n in numbers.tolist()]
    rows, order = [], []
    for n, blocks in enumerate(trunk.run(films, windows)):
        of = np.flatnonzero(place_I == n)
        rows.append(represent(task, items, chosen[of], films, blocks, windows[n]))
        order.append(of)
    back = torch.from_numpy(np.argsort(np.concatenate(order), kind="stable"))
    return torch.cat(rows)[back]


@torch.no_grad()
def _output(task: Task, items: Items, trunk: Trunk, films: Films, head: Head, chosen: np.ndarray) -> np.ndarray:
    found = [head(_forward(task, items, trunk, films, few)).float().cpu() for few in _by_shots(items, chosen)]
    return torch.cat(found).numpy()


def _by_shots(items: Items, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Items in order, as many at a time as their windows hold shots for one row."""
    few: list[int] = []
    windows: set[int] = set()
    shots = 0
    for item in chosen.tolist():
        window = int(items.window_I[item])
        if window not in windows:
            size = len(items.windows[window].rows_S)
            if few and shots + size > BATCH_SHOTS:
                yield np.array(few)
                few, windows, shots = [], set(), 0
            windows.add(window)
            shots += size
        few.append(item)
    if few:
        yield np.array(few)
