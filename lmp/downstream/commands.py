"""`lmp evaluate --task` and `lmp tasks`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lmp.errors import EXIT_DONE, UserError


def add_task_options(evaluate: argparse.ArgumentParser) -> None:
    """The options of `lmp evaluate` that go with --task."""
    group = evaluate.add_argument_group("a benchmark (with --task)")
    group.add_argument("--task", metavar="NAME", help="such as lvu/genre, or lvu for all of it; see `lmp tasks list`")
    group.add_argument("--mode", choices=["probe", "finetune"], default="probe", help="what learns: a head, or all")
    group.add_argument("--modalities", nargs="+", default=[], metavar="NAME", help="show the model these only")
    group.add_argument("--window-shots", type=int, metavar="N", help="longest run of shots that see each other")
    group.add_argument("--layers", type=int, metavar="N", help="finetune: the last N layers of each transformer learn")
    group.add_argument("--with-base", action="store_true", help="heads read the base features, too")
    group.add_argument("--model-only", action="store_true", help="no rivals, which are the same for every checkpoint")
    group.add_argument("--trunk-lr", type=float, default=1e-4)
    group.add_argument("--head-lr", type=float, default=1e-3)
    group.add_argument("--epochs", type=int, default=20)
    group.add_argument("--batch", type=int, default=16, help="finetune: videos, shots or questions in a step")


def register(commands: Any) -> None:
    """Add `lmp tasks` to the subparsers of `lmp`."""
    tasks = commands.add_parser("tasks", help="benchmarks").add_subparsers(dest="what", required=True)
    listing = tasks.add_parser("list", help="their names, metrics, and what they need")
    listing.set_defaults(run=_list)
    ids = tasks.add_parser("ids", help="write the ids of a benchmark's videos, as a list of films to leave out")
    ids.add_argument("task", metavar="NAME", help="a task, or a benchmark for all its tasks together")
    ids.add_argument("--labels", type=Path, required=True, metavar="FOLDER")
    ids.add_argument("--split", nargs="+", choices=["train", "val", "test"], default=["val", "test"])
    ids.add_argument("--out", type=Path, required=True, metavar="FILE")
    ids.set_defaults(run=_ids)


def evaluate_task(arguments: argparse.Namespace) -> int:
    """Run `lmp evaluate ... --task`."""
    from lmp.downstream.evaluate_task import TaskSettings, evaluate_tasks
    from lmp.downstream.heads import FineTuning
    from lmp.downstream.task_results import format_score

    if arguments.labels is None:
        raise UserError("--task without --labels", remedy="give the folder of the labels' own files")
    if arguments.check or arguments.train_shards:
        raise UserError("--check and --train-shards do not go with --task", remedy="leave them out")
    settings = TaskSettings(
        mode=arguments.mode,
        seeds=arguments.seeds,
        modalities=tuple(arguments.modalities),
        window_shots=arguments.window_shots,
        with_base=arguments.with_base,
        rivals=not arguments.model_only,
        fine_tuning=FineTuning(
            layers=arguments.layers,
            head_lr=arguments.head_lr,
            trunk_lr=arguments.trunk_lr,
            epochs=arguments.epochs,
            batch=arguments.batch,
        ),
    )
    out = arguments.out or arguments.folder / "evaluation" / arguments.task.replace("/", "-")
    report = evaluate_tasks(
        arguments.folder,
        arguments.shards,
        name=arguments.task,
        labels=arguments.labels,
        out=out,
        settings=settings,
        step=arguments.step,
    )
    for result in report.results:
        scores = ", ".join(f"{name} {format_score(row[result.metric])}" for name, row in result.rows.items())
        print(f"{result.task} {result.metric} (n = {result.n}): {scores}")
    print(f"report: {out / 'report.md'}")
    return EXIT_DONE


def _list(_: argparse.Namespace) -> int:
    from lmp.downstream.tasks import TASKS

    for name, task in TASKS.items():
        print(f"{name}  [{task.metric}]  {task.needs}")
    return EXIT_DONE


def _ids(arguments: argparse.Namespace) -> int:
    from lmp.downstream.tasks import select

    found: set[str] = set()
    for task in select(arguments.task):
        by_split = task.ids(arguments.labels)
        found |= {one for split in arguments.split for one in by_split[split]}
    if not found:
        raise UserError(f"{arguments.task} has no ids in {', '.join(arguments.split)}", remedy="name other splits")
    arguments.out.write_text("\n".join(sorted(found)) + "\n", encoding="utf-8")
    print(f"{len(found)} ids -> {arguments.out}")
    return EXIT_DONE
