"""The report of an evaluation: report.md with tables and plots, and results.json with every figure."""

from __future__ import annotations

import json
from pathlib import Path

from lmp.downstream.plots import plot_losses, plot_probes, plot_retrieval
from lmp.downstream.results import (
    EvaluationResult,
    ProbeTable,
    RetrievalTable,
    Score,
    mean_over_tables,
    verdicts,
)

MEANINGS = {
    "model": "the trained model",
    "model_moved": "the trained model, asked without each film's first third, so that positions differ",
    "untrained": "the same network with fresh weights",
    "copy": "base features of the nearest shot that may be seen",
    "mean": "mean base features of the shots of the window that may be seen",
    "near": "the same mean, weighted by exp(-distance / 10 shots)",
    "ridge": "ridge regression from the shot's own source features, fitted on training films",
    "position": "knows the shot's place in the window and draws among the candidates there",
    "chance": "draws among all candidates",
    "raw": "base features of all modalities",
    "majority": "the most frequent label",
}
PERCENT = ("R@1", "R@5", "R@10", "R@50", "mrr")
RANKS = ("median_rank", "mean_rank")


def write_report(result: EvaluationResult, out: Path, *, metrics: Path | None = None) -> Path:
    """Write report.md, results.json and the plots.

    Args:
        result: what was found.
        out: folder, made where needed.
        metrics: the run's metrics.jsonl, for the loss curves.

    Returns:
        The path of report.md.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "losses.png": metrics is not None and plot_losses(metrics, out / "losses.png"),
        "retrieval.png": plot_retrieval(result, out / "retrieval.png"),
        "probes.png": plot_probes(result, out / "probes.png"),
    }
    (out / "results.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
    path = out / "report.md"
    path.write_text(render(result, [name for name, drawn in pictures.items() if drawn]), encoding="utf-8")
    return path


def render(result: EvaluationResult, pictures: list[str]) -> str:
    """The report as markdown; `pictures` are the plots beside it."""
    seeds = result.settings["seeds"]
    parts = [
        f"# Evaluation of {result.run}, step {result.step}",
        f"{result.data['films']} held-out films, {result.data['shots']} shots "
        f"(data {result.data['digest'][:12]}). Scores are means over {seeds} seeds, "
        "with the deviation over seeds where something is drawn. "
        "Recalls, MRR and accuracies are percentages.",
        _verdict_table(result),
    ]
    if "losses.png" in pictures:
        parts += ["## Training", "![losses](losses.png)"]
    if result.masked_shot or result.cross_modal is not None:
        parts += _retrieval_parts(result, "retrieval.png" in pictures)
    if result.probes:
        parts += _probe_parts(result, "probes.png" in pictures)
    if result.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in result.notes)]
    used = _contenders(result)
    parts += [
        "## Contenders",
        "\n".join(f"- **{name}**: {text}" for name, text in MEANINGS.items() if name in used),
    ]
    return "\n\n".join(parts) + "\n"


def _verdict_table(result: EvaluationResult) -> str:
    found = verdicts(result)
    passed = sum(one.passed for one in found)
    rows = [["passed" if one.passed else "**FAILED**", one.name, one.detail] for one in found]
    return f"## Verdicts: {passed} of {len(found)} passed\n\n" + _table(["", "claim", "figures"], rows)


def _retrieval_parts(result: EvaluationResult, plotted: bool) -> list[str]:
    parts = ["## Retrieval", "![retrieval](retrieval.png)"] if plotted else ["## Retrieval"]
    if result.masked_shot:
        parts += [
            "### Masked shots",
            "Hidden shots are to be found among all hidden shots of all films. Mean over modalities:",
            _mean_table(result.masked_shot),
        ]
        for name, table in result.masked_shot.items():
            parts += [f"**{name}**, {_sizes(table)}:", _retrieval_table(table)]
    if result.cross_modal is not None:
        parts += [
            "### Cross-modal",
            "The target modality of a shot, told by the other modalities, is to be found among all shots; "
            f"{_sizes(result.cross_modal)}:",
            _retrieval_table(result.cross_modal),
        ]
    for name, table in result.alignment.items():
        parts += [
            f"**{name.replace('->', ' to ')}** of the same shot, {_sizes(table)}:",
            _retrieval_table(table),
        ]
    return parts


def _probe_parts(result: EvaluationResult, plotted: bool) -> list[str]:
    parts = ["## Linear probes", "![probes](probes.png)"] if plotted else ["## Linear probes"]
    names = [name for name in MEANINGS if any(name in table.rows for table in result.probes.values())]
    rows = [_probe_row(label, table, names) for label, table in result.probes.items()]
    return [*parts, _table(["label", "of", "classes", "fitted on", "tested on", *names], rows)]


def _probe_row(label: str, table: ProbeTable, names: list[str]) -> list[str]:
    counts = [str(len(table.classes)), str(table.fit_items), str(table.test_items)]
    return [
        label,
        table.level,
        *counts,
        *(_percent(table.rows[name]) if name in table.rows else "" for name in names),
    ]


def _retrieval_table(table: RetrievalTable) -> str:
    rows = [
        [name, *(_percent(row[m]) for m in PERCENT), *(_rank(row[m]) for m in RANKS)]
        for name, row in _by_mrr(table.rows)
    ]
    return _table(["", *PERCENT, "median rank", "mean rank"], rows)


def _mean_table(tables: dict[str, RetrievalTable]) -> str:
    names = sorted(next(iter(tables.values())).rows, key=lambda name: -mean_over_tables(tables, name, "mrr"))
    rows = [[name, *(f"{100 * mean_over_tables(tables, name, m):.2f}" for m in PERCENT)] for name in names]
    return _table(["", *PERCENT], rows)


def _by_mrr(rows: dict[str, dict[str, Score]]) -> list[tuple[str, dict[str, Score]]]:
    return sorted(rows.items(), key=lambda item: -item[1]["mrr"].mean)


def _sizes(table: RetrievalTable) -> str:
    return f"{table.queries} queries, gallery of {table.gallery}"


def _contenders(result: EvaluationResult) -> set[str]:
    tables = [*result.masked_shot.values(), *result.alignment.values()]
    tables += [result.cross_modal] if result.cross_modal is not None else []
    names = {name for table in tables for name in table.rows}
    return names | {name for table in result.probes.values() for name in table.rows}


def _percent(score: Score) -> str:
    return f"{100 * score.mean:.2f}" + (f" ± {100 * score.std:.2f}" if score.std else "")


def _rank(score: Score) -> str:
    return f"{score.mean:.1f}" + (f" ± {score.std:.1f}" if score.std else "")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
