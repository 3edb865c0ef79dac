"""Pictures of a report: loss curves, retrieval bars, probe bars. Drawn without a display."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmp.downstream.results import EvaluationResult
from lmp.errors import UserError

if TYPE_CHECKING:
    from lmp.downstream.task_results import TaskResult

COLOURS = {"model": "#1f6f8b", "model_moved": "#7fb3c4", "raw": "#c98a2b"}
OTHERS = "#b0b0b0"


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Numbers of metrics.jsonl by step; of a step that was run again after a resume, the last line counts."""
    steps: dict[int, dict[str, float]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float)}
                steps[int(record["step"])] = numbers
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line cut by a kill is no reason to have no report
    return dict(sorted(steps.items()))


def plot_losses(metrics: Path, picture: Path) -> bool:
    """Every loss over steps, with its chance (`chance/NAME`, else `NAME/chance`) where that is logged.

    Returns:
        False where there is nothing to draw.
    """
    steps = read_metrics(metrics)
    names = sorted(
        {name for numbers in steps.values() for name in numbers if name == "loss" or name.startswith("loss/")}
    )
    if not names:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        part = name.removeprefix("loss/")
        for key, style in ((name, "-"), (f"chance/{part}", ":"), (f"{part}/chance", ":")):
            drawn = [(step, numbers[key]) for step, numbers in steps.items() if key in numbers]
            if drawn:
                axis.plot(*zip(*drawn, strict=True), style, color="#1f6f8b" if style == "-" else "#888888", lw=1.2)
        axis.set_title(name)
        axis.set_xlabel("step")
    _save(plt, figure, picture)
    return True


def plot_retrieval(result: EvaluationResult, picture: Path, *, metric: str = "mrr") -> bool:
    """One panel a retrieval task, one bar a contender. False where there is nothing to draw."""
    tables = {f"masked {name}": table for name, table in result.masked_shot.items()}
    if result.cross_modal is not None:
        tables["cross-modal"] = result.cross_modal
    if not tables:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(tables), figsize=(3.4 * len(tables), 3.2), squeeze=False)
    for axis, (title, table) in zip(axes[0], tables.items(), strict=True):
        _bars(axis, {name: (row[metric].mean, row[metric].std) for name, row in table.rows.items()})
        axis.set_title(f"{title} (n = {table.queries})")
        axis.set_ylabel(metric.upper() if metric == "mrr" else metric)
    _save(plt, figure, picture)
    return True


def plot_probes(result: EvaluationResult, picture: Path) -> bool:
    """One panel a label, one bar a contender. False where there is nothing to draw."""
    if not result.probes:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(result.probes), figsize=(3.4 * len(result.probes), 3.2), squeeze=False)
    for axis, (label, table) in zip(axes[0], result.probes.items(), strict=True):
        _bars(axis, {name: (score.mean, score.std) for name, score in table.rows.items()})
        axis.set_title(f"{label} (n = {table.test_items})")
        axis.set_ylabel("accuracy")
    _save(plt, figure, picture)
    return True


def plot_tasks(results: Sequence[TaskResult], picture: Path) -> bool:
    """One panel a task, one bar a contender, its main score. False where there is nothing to draw."""
    if not results:
        return False
    plt = _pyplot()
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    for axis, result in zip(axes.flat, results, strict=False):
        _bars(axis, {name: (row[result.metric].mean, row[result.metric].std) for name, row in result.rows.items()})
        axis.set_title(f"{result.task} (n = {result.n})")
        axis.set_ylabel(result.metric + ("" if result.higher else ", less is better"))
    _save(plt, figure, picture)
    return True


def _bars(axis: Any, scores: dict[str, tuple[float, float]]) -> None:
    ordered = sorted(scores.items(), key=lambda item: -item[1][0])
    names = [name for name, _ in ordered]
    means, spreads = [s[0] for _, s in ordered], [s[1] for _, s in ordered]
    axis.bar(names, means, yerr=spreads, color=[COLOURS.get(name, OTHERS) for name in names], capsize=2)
    axis.tick_params(axis="x", rotation=60)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib", remedy="pip install 'lmp[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(plt: Any, figure: Any, picture: Path) -> None:
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
