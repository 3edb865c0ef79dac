"""Measures a run or an exported folder on benchmarks: features, heads, seeds, rivals, a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from torch import Tensor

from lmp.data.index import FilmIndex
from lmp.data.leave_out import record_ids
from lmp.downstream.features import check_modalities
from lmp.downstream.heads import FineTuning, constant, fine_tune, fit_probe, parts, rows_of
from lmp.downstream.results import Score
from lmp.downstream.task_results import TaskReport, TaskResult, write_task_report
from lmp.downstream.tasks import AnyTask, select
from lmp.downstream.tasks.base import SPLITS, Coverage, RetrievalTask, Task, Videos
from lmp.downstream.trunk import Films, Trunk, base_features, choose_modalities, load_trunk, untrained
from lmp.downstream.two_sides import blind, fine_tune_sides, ridge, sides_of, split_clips
from lmp.errors import UserError


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are measured.

    Attributes:
        mode: heads on frozen features (`probe`), or fitted with the trunk (`finetune`).
        seeds: draws of untrained networks, heads, orders and galleries.
        modalities: what the network is shown; empty: all.
        window_shots: longest run of shots that see each other; None: as it was trained.
        with_base: heads read the base features beside the network's, trained or not.
        rivals: measure untrained networks and base features, too.
        fine_tuning: see there.
    """

    mode: Literal["probe", "finetune"] = "probe"
    seeds: int = 3
    modalities: tuple[str, ...] = ()
    window_shots: int | None = None
    with_base: bool = False
    rivals: bool = True
    fine_tuning: FineTuning = field(default_factory=FineTuning)


def evaluate_tasks(
    source: Path,
    shards: Sequence[Path],
    *,
    name: str,
    labels: Path,
    out: Path,
    settings: TaskSettings | None = None,
    step: int | None = None,
) -> TaskReport:
    """Measure a model on a task, or on all tasks of a benchmark, and write the report.

    Args:
        source: run folder, or a folder written by tools/export_huggingface.
        shards: folders of shards with the videos of all splits.
        name: of the task (`lvu/genre`) or benchmark (`lvu`).
        labels: folder of the labels' own files.
        out: folder of the report.
        settings: how it is measured.
        step: a certain checkpoint of a run.

    Raises:
        UserError: unknown task, nothing to load, shards that do not fit, labels that are not there, or too few
            of their videos among the shards.
    """
    settings = settings or TaskSettings()
    if settings.seeds < 1:
        raise UserError(f"seeds is {settings.seeds}", remedy="evaluate with at least one seed")
    tasks = select(name)
    trunk = load_trunk(source, step=step, window_shots=settings.window_shots)
    index = FilmIndex.load(list(shards))
    assert trunk.model is not None
    check_modalities(trunk.model.config, index, name="the shards")
    if settings.modalities:
        choose_modalities(trunk, settings.modalities)
    trunk.with_base = settings.with_base
    videos = Videos(Films(index))
    report = TaskReport(
        source=trunk.name,
        step=trunk.step,
        settings=asdict(settings),
        data={"digest": index.digest, "films": len(index), "shots": int(index.shots.sum())},
        left_out=trunk.left_out,
    )
    seen = _training_ids(source)
    for task in tasks:
        result = measure(task, trunk, videos, labels=labels, settings=settings)
        result.notes.append(_overlap(task.ids(labels)["test"], seen))
        report.results.append(result)
    write_task_report(report, out)
    return report


def measure(task: AnyTask, trunk: Trunk, videos: Videos, *, labels: Path, settings: TaskSettings) -> TaskResult:
    """One task, for the model and its rivals. Errors as `evaluate_tasks`."""
    if isinstance(task, RetrievalTask):
        return _measure_retrieval(task, trunk, videos, labels=labels, settings=settings)
    return _measure_items(task, trunk, videos, labels=labels, settings=settings)


def _measure_items(task: Task, trunk: Trunk, videos: Videos, *, labels: Path, settings: TaskSettings) -> TaskResult:
    items, coverage = task.items(labels, videos)
    _say(task, coverage)
    split = parts(items)
    _check_parts(task, coverage, [(part.train, part.test) for part in split])
    tested = np.concatenate([part.test for part in split])
    result = TaskResult(
        task=task.name,
        metric=task.metric,
        higher=task.higher,
        n=task.tested(items, tested),
        items={split: len(items.of_split(split)) for split in SPLITS},
        coverage=str(coverage),
        notes=list(coverage.notes),
    )
    if items.fold_I is not None:
        result.notes.append(f"Each of {len(np.unique(items.fold_I))} folds is tested by heads fitted on the others.")
    found: dict[str, list[dict[str, float]]] = {}
    frozen: dict[str, Tensor] = {}
    for seed in range(settings.seeds):
        for name, contender in _contenders(trunk, seed, settings).items():
            if settings.mode == "probe" and (name == "untrained" or seed == 0):
                frozen[name] = rows_of(task, contender, videos.films, items)
            outputs = []
            for part in split:
                if settings.mode == "probe":
                    output, chosen = fit_probe(task, items, frozen[name], part, seed=seed)
                else:
                    how = settings.fine_tuning
                    output, chosen = fine_tune(task, items, contender, videos.films, part, seed=seed, settings=how)
                outputs.append(output)
                result.chosen.setdefault(name, []).append(float(chosen))
            found.setdefault(name, []).append(task.scores(items, tested, np.concatenate(outputs)))
            if name == "model" and seed == 0:
                result.submission = task.submission(items, tested, np.concatenate(outputs))
    blind_outputs = np.concatenate([constant(task, items, part) for part in split])
    found["constant"] = [task.scores(items, tested, blind_outputs)]
    result.rows = _rows(found)
    return result


def _measure_retrieval(
    task: RetrievalTask, trunk: Trunk, videos: Videos, *, labels: Path, settings: TaskSettings
) -> TaskResult:
    lacking = [name for side in task.sides for name in side if name not in trunk.modalities]
    if lacking:
        raise UserError(f"{task.name} needs modality {lacking[0]}, the model has none such", remedy=task.needs)
    windows, split_N, coverage = task.pairs(labels, videos)
    _say(task, coverage)
    clips = split_clips(windows, split_N, seed=0)
    _check_parts(task, coverage, [(clips.train, clips.test)])
    result = TaskResult(
        task=task.name,
        metric=task.metric,
        higher=True,
        n=len(clips.test),
        items={split: int((split_N == split).sum()) for split in SPLITS},
        coverage=str(coverage),
        notes=[*coverage.notes, f"Each query has a gallery of {task.gallery(len(clips.test))}."],
    )
    found: dict[str, list[dict[str, float]]] = {}
    frozen: dict[str, tuple[Tensor, Tensor]] = {}
    for seed in range(settings.seeds):
        clips = split_clips(windows, split_N, seed=seed)
        for name, contender in _contenders(trunk, seed, settings).items():
            if settings.mode == "probe":
                if name == "untrained" or seed == 0:
                    frozen[name] = sides_of(task, contender, videos.films, windows)
                scores_NN, chosen = ridge(task, frozen[name], clips, seed=seed)
            else:
                how = settings.fine_tuning
                scores_NN, chosen = fine_tune_sides(task, contender, videos.films, clips, seed=seed, settings=how)
            result.chosen.setdefault(name, []).append(float(chosen))
            found.setdefault(name, []).append(task.scores(scores_NN, seed=seed))
    found["chance"] = [blind(task, len(clips.test))]
    result.rows = _rows(found)
    return result


def _contenders(trunk: Trunk, seed: int, settings: TaskSettings) -> dict[str, Trunk]:
    if not settings.rivals:
        return {"model": trunk}
    found = {"model": trunk, "untrained": untrained(trunk, seed)}
    return found | {"raw": base_features(trunk)} if settings.mode == "probe" else found


def _rows(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Score]]:
    return {
        name: {score: Score.of([one[score] for one in seeds]) for score in seeds[0]} for name, seeds in found.items()
    }


def _say(task: AnyTask, coverage: Coverage) -> None:
    Console(stderr=True).print(f"{task.name}: {coverage}", highlight=False)


def _check_parts(task: AnyTask, coverage: Coverage, found: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Raise UserError unless every part has something to fit on and something to test."""
    if not found or any(not len(train) or not len(test) for train, test in found):
        raise UserError(
            f"{task.name}: too few of its videos are among the shards to fit and to test ({coverage})",
            remedy=f"it needs {task.needs}",
        )


def _training_ids(source: Path) -> set[str] | None:
    """Keys and ids of the films that a run trained on; None where that cannot be known here."""
    from lmp.config import load_config
    from lmp.train.data import load_index

    path = Path(source) / "config.yaml"
    if not path.is_file():
        return None
    try:
        index = load_index(load_config(path))
    except UserError:
        return None
    return set(index.keys) | {one for info in index.infos(range(len(index))) for one in record_ids(info)}


def _overlap(tested: Sequence[str], seen: set[str] | None) -> str:
    if seen is None:
        return "Whether pretraining saw tested videos cannot be told from here: its shards are not at hand."
    both = sorted(seen & set(tested))
    if not both:
        return "Pretraining saw none of the tested videos."
    return f"**Leak**: pretraining saw {len(both)} of the {len(tested)} tested videos ({', '.join(both[:3])})."
