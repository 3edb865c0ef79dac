"""Measures a run on held-out films: retrieval beside its rivals, probes beside raw features, and a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lmp.config import load_config
from lmp.data.index import FilmIndex
from lmp.downstream.features import Scaling, check_modalities, films, fresh_model, run_film
from lmp.downstream.labels import FilmLabels, check_labels, read_labels
from lmp.downstream.probes import (
    Features,
    ProbeItems,
    Split,
    draw_splits,
    film_items,
    probe,
    probe_table,
    shot_items,
)
from lmp.downstream.report import write_report
from lmp.downstream.results import EvaluationResult, RetrievalTable
from lmp.downstream.retrieval import RetrievalSettings, cross_modal, cross_modal_rivals, masked_shot
from lmp.downstream.rivals import Ridge
from lmp.errors import UserError
from lmp.model.modeling_lmp import LmpForPretraining

Tick = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is measured.

    Attributes:
        seeds: draws of hidden shots, untrained models and splits; figures are means and spreads over them.
        retrieval: see there.
        shot_labels, film_labels: labels that are probed, where the label files have them.
    """

    seeds: int = 3
    retrieval: RetrievalSettings = field(default_factory=RetrievalSettings)
    shot_labels: tuple[str, ...] = ("place", "mood")
    film_labels: tuple[str, ...] = ("genre",)


def evaluate(
    run: Path,
    shards: Sequence[Path],
    *,
    labels: Path | None,
    train_shards: Sequence[Path] | None,
    out: Path,
    seeds: int = 3,
    step: int | None = None,
) -> EvaluationResult:
    """Measure a run's checkpoint and write report.md, results.json and plots.

    Args:
        run: run folder.
        shards: folders of held-out shards.
        labels: folder of KEY.labels.json; without it there are no probes.
        train_shards: folders of training shards, on which ridge and probes are fitted; without them there is
            no ridge, and probes are fitted on a part of the held-out films.
        out: folder of the report.
        seeds: number of draws.
        step: a certain checkpoint instead of the newest.

    Raises:
        UserError: nothing to load, shards that do not fit the model, films both held out and trained on, no
            labels.
    """
    from lmp.train.checkpoint import (
        load_trained,
    )  # imports DeepSpeed's neighbourhood: only where a run is loaded

    trained = load_trained(run, step=step)
    model = LmpForPretraining(trained.config).float()
    model.load_state_dict(trained.weights)
    index = FilmIndex.load(list(shards))
    train_index = FilmIndex.load(list(train_shards)) if train_shards else None
    result = evaluate_model(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        index,
        labels=labels,
        train_index=train_index,
        settings=settings_of_run(run, seeds=seeds),
        run=Path(run).name,
        step=trained.step,
        progress=True,
    )
    write_report(result, out, metrics=Path(run) / "metrics.jsonl")
    return result


def settings_of_run(run: Path, *, seeds: int) -> EvaluationSettings:
    """Windows as long, and shots hidden as often, as the run's configuration has them."""
    config = load_config(Path(run) / "config.yaml")
    masking = config.objectives.masked_shot
    retrieval = RetrievalSettings(
        mask_ratio=masking.ratio,
        mask_span=masking.span,
        max_shots=config.data.window_shots or config.data.pack_shots,
    )
    return EvaluationSettings(seeds=seeds, retrieval=retrieval)


def evaluate_model(
    model: LmpForPretraining,
    index: FilmIndex,
    *,
    labels: Path | None = None,
    train_index: FilmIndex | None = None,
    settings: EvaluationSettings | None = None,
    run: str = "model",
    step: int = 0,
    progress: bool = False,
) -> EvaluationResult:
    """Measure a model on held-out films. Arguments and errors as `evaluate`; nothing is written."""
    settings = settings or EvaluationSettings()
    if settings.seeds < 1:
        raise UserError(f"seeds is {settings.seeds}", remedy="evaluate with at least one seed")
    check_modalities(model.config, index, name="the evaluated shards")
    if train_index is not None:
        check_modalities(model.config, train_index, name="the training shards")
        _check_apart(index, train_index)
    work = _Work(model.eval(), index, train_index, settings, _held_labels(labels, index, train_index))
    result = EvaluationResult(
        run=run,
        step=step,
        data={"digest": index.digest, "films": len(index.keys), "shots": int(index.shots.sum())},
        settings=asdict(settings),
        notes=_notes(work, labels),
    )
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        disable=not progress,
    )
    with bar:
        task = bar.add_task("evaluating", total=5 + 3 * settings.seeds)

        def tick(what: str) -> None:
            bar.update(task, advance=1, description=what)

        with torch.random.fork_rng(devices=[]):
            work.measure(result, tick)
    return result


@dataclass
class _Work:
    """One evaluation: what is measured, and on what. Probes number held-out films, then training films."""

    model: LmpForPretraining
    index: FilmIndex
    train_index: FilmIndex | None
    settings: EvaluationSettings
    labels: list[FilmLabels | None] | None
    """Of the films that have a shot: held-out, then training."""

    def measure(self, result: EvaluationResult, tick: Tick) -> None:
        """Fill in the result."""
        config, retrieval = self.model.config, self.settings.retrieval
        scaling = Scaling.of(self.index, tuple(config.modalities))
        tick("ridge regression")
        fitted = (
            None if self.train_index is None else Ridge(self.train_index, target=config.target, sources=config.sources)
        )
        tick("cross-modal rivals")
        found = cross_modal_rivals(
            self.index,
            target=config.target,
            sources=config.sources,
            scaling=scaling,
            ridge=fitted,
            settings=retrieval,
        )
        tick("cross-modal retrieval")
        cross = {
            "model": cross_modal(self.model, self.index, settings=retrieval),
            "model_moved": cross_modal(self.model, self.index, settings=retrieval, moved=True),
        }
        tick("features")
        tasks = self._probe_tasks()
        shared = {"model": self._features(self.model), "raw": self._raw_features(scaling)} if tasks else {}
        tick("features")
        masked, fresh_cross, accuracies = [], [], []
        for seed in range(self.settings.seeds):
            fresh = fresh_model(config, seed).to(next(self.model.parameters()).device)
            models = {"model": self.model, "untrained": fresh}
            masked.append(masked_shot(models, self.index, scaling=scaling, seed=seed, settings=retrieval))
            tick(f"masked shots, seed {seed}")
            fresh_cross.append(cross_modal(fresh, self.index, settings=retrieval))
            tick(f"untrained model, seed {seed}")
            contenders = shared | {"untrained": self._features(fresh)} if tasks else {}
            accuracies.append({name: probe(items, splits[seed], contenders) for name, (items, splits) in tasks.items()})
            tick(f"probes, seed {seed}")
        for name in config.modalities:
            if all(name in one for one in masked):
                result.masked_shot[name] = RetrievalTable.of([one[name] for one in masked])
            else:
                result.notes.append(f"{name}: too few hidden shots to ask for, no masked-shot retrieval")
        for task, rivals in found.items():
            measured = {name: tables[task] for name, tables in cross.items() if task in tables}
            table = RetrievalTable.of([measured | {"untrained": one[task]} | rivals for one in fresh_cross])
            if task == "reconstruction":
                result.cross_modal = table
            else:
                result.alignment[task] = table
        for name, (items, splits) in tasks.items():
            result.probes[name] = probe_table(items, splits, [one[name] for one in accuracies])

    def _features(self, model: LmpForPretraining) -> Features:
        """Per film [N, D]: contextual features of all modalities and the cross-modal ones."""
        names, limit = tuple(model.config.modalities), self.settings.retrieval.max_shots
        return [
            run_film(model, film, max_shots=limit).joined().numpy()
            for held in self._indexes()
            for film in films(held, names)
        ]

    def _raw_features(self, scaling: Scaling) -> Features:
        """Per film [N, D]: base features of all modalities, and whether each is there."""
        names = tuple(scaling.mean)
        rows = []
        for held in self._indexes():
            for film in films(held, names):
                columns = [
                    part for name in names for part in (scaling.apply(film, name), film.valid[name].float()[:, None])
                ]
                rows.append(torch.cat(columns, dim=1).numpy())
        return rows

    def _indexes(self) -> list[FilmIndex]:
        return [self.index] if self.train_index is None else [self.index, self.train_index]

    def _probe_tasks(self) -> dict[str, tuple[ProbeItems, list[Split]]]:
        """Label -> items and one split per seed, for the labels that can be probed."""
        if self.labels is None:
            return {}
        held = int((self.index.shots > 0).sum())
        fit_films = set(range(held, len(self.labels)))
        # Training shards without a label fit nothing: then the held-out films are split.
        usable = fit_films if any(self.labels[film] is not None for film in fit_films) else None
        items = {
            name: shot_items([None if one is None else one.shots.get(name) for one in self.labels])
            for name in self.settings.shot_labels
        } | {
            name: film_items([None if one is None else one.film.get(name) for one in self.labels])
            for name in self.settings.film_labels
        }
        tasks = {}
        for name, of_label in items.items():
            splits = draw_splits(of_label, seeds=self.settings.seeds, fit_films=usable)
            if len(splits) == self.settings.seeds and len(set(of_label.label_I.tolist())) > 1:
                tasks[name] = (of_label, splits)
        return tasks


def _held_labels(
    folder: Path | None, index: FilmIndex, train_index: FilmIndex | None
) -> list[FilmLabels | None] | None:
    if folder is None:
        return None
    found: list[FilmLabels | None] = []
    for held in [index] if train_index is None else [index, train_index]:
        for number, count in enumerate(held.shots.tolist()):
            if count:
                shots_N2: np.ndarray = held.read(number, 0, count).shots_N2.numpy()
                found.append(read_labels(Path(folder), held.keys[number], shots_N2))
    evaluated = found[: int((index.shots > 0).sum())]
    check_labels(Path(folder), sum(one is not None for one in evaluated))
    return found


def _notes(work: _Work, labels: Path | None) -> list[str]:
    notes = []
    if work.train_index is None:
        notes.append("No training shards were given: no ridge, and probes are fitted on a part of the held-out films.")
    if work.labels is None:
        notes.append("No labels were given: no probes.")
    elif missing := sum(one is None for one in work.labels):
        notes.append(f"{missing} of {len(work.labels)} films have no file in {labels} and are left out of the probes.")
    return notes


def _check_apart(index: FilmIndex, train_index: FilmIndex) -> None:
    both = sorted(set(index.keys) & set(train_index.keys))
    if both:
        more = f" and {len(both) - 3} more" if len(both) > 3 else ""
        raise UserError(
            f"films {', '.join(both[:3])}{more} are both held out and in the training shards",
            remedy="evaluate on films that were not trained on",
        )
