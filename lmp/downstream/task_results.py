"""What a task's evaluation found, and its report: report.md, results.json and a plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmp.downstream.plots import plot_tasks
from lmp.downstream.results import Score

MEANINGS = {
    "model": "the pretrained network",
    "untrained": "the same network with fresh weights, drawn by each seed",
    "raw": "the base features that the network reads",
    "constant": "the best answer that does not depend on the input",
    "chance": "a blind draw, in expectation",
}


@dataclass
class TaskResult:
    """One task.

    Attributes:
        task, metric, higher: its name, its main score, and whether more of that is better.
        n: things that the scores are means over: tested videos, shots, cuts, queries, films.
        items: split -> items fitted on, selected on, tested.
        coverage: how many of the labelled ids the shards hold, in words.
        rows: contender -> score's name -> mean and deviation over seeds.
        chosen: contender -> what val chose under each seed (strength of the penalty, or epoch).
        notes: what else matters to who reads the scores.
        submission: what the benchmark's own toolkit scores, of the model under the first seed.
    """

    task: str
    metric: str
    higher: bool
    n: int
    items: dict[str, int]
    coverage: str
    rows: dict[str, dict[str, Score]] = field(default_factory=dict)
    chosen: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    submission: dict[str, Any] | None = None


@dataclass
class TaskReport:
    """All tasks of one call.

    Attributes:
        source, step: the run or exported folder, and its checkpoint.
        settings: how it was measured.
        data: digest, films and shots of the shards.
        left_out: what pretraining left out, as the checkpoint says; None if it says nothing.
        results: of each task.
    """

    source: str
    step: int | None
    settings: dict[str, Any]
    data: dict[str, Any]
    left_out: dict[str, Any] | None
    results: list[TaskResult] = field(default_factory=list)


def write_task_report(report: TaskReport, out: Path) -> Path:
    """Write report.md, results.json, tasks.png and TASK.submission.json into `out`; returns the path of report.md."""
    out.mkdir(parents=True, exist_ok=True)
    plot_tasks(report.results, out / "tasks.png")
    facts = asdict(report)
    for result in facts["results"]:
        if (submission := result.pop("submission")) is not None:
            path = out / f"{result['task'].replace('/', '-')}.submission.json"
            path.write_text(json.dumps(submission) + "\n", encoding="utf-8")
    (out / "results.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    path = out / "report.md"
    path.write_text(render_tasks(report), encoding="utf-8")
    return path


def render_tasks(report: TaskReport) -> str:
    """The report as markdown."""
    step = "" if report.step is None else f", step {report.step}"
    mode = "Heads on frozen features" if report.settings["mode"] == "probe" else "Heads fitted together with the trunk"
    mode += ", beside the base features" if report.settings["with_base"] else ""
    parts = [
        f"# {report.source}{step}",
        f"{mode}; means over {report.settings['seeds']} seeds, with the deviation over seeds where it is not 0. "
        "What is chosen is chosen on val, never on test. n is the number of tested things.",
        _table(report.results),
        "![scores](tasks.png)",
        f"Shards: {report.data['films']} films, {report.data['shots']} shots (data {report.data['digest'][:12]}). "
        + _left_out(report.left_out),
    ]
    for result in report.results:
        parts += _task_parts(result)
    used = {name for result in report.results for name in result.rows}
    parts += ["## Contenders", "\n".join(f"- **{name}**: {text}" for name, text in MEANINGS.items() if name in used)]
    return "\n\n".join(parts) + "\n"


def _table(results: list[TaskResult]) -> str:
    names = [name for name in MEANINGS if any(name in result.rows for result in results)]
    head = ["task", "score", "n", *names]
    lines = [head, ["---"] * len(head)]
    for result in results:
        arrow = "" if result.higher else " (less is better)"
        cells = [format_score(result.rows[name][result.metric]) if name in result.rows else "" for name in names]
        lines.append([result.task, result.metric + arrow, str(result.n), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _task_parts(result: TaskResult) -> list[str]:
    contenders = list(result.rows)
    scores = list(result.rows[contenders[0]])
    lines = [["", *contenders], ["---"] * (len(contenders) + 1)]
    lines += [[score, *(format_score(result.rows[name][score]) for name in contenders)] for score in scores]
    sizes = ", ".join(f"{split} {count}" for split, count in result.items.items())
    notes = [f"Labels: {result.coverage}.", f"Items: {sizes}; n = {result.n}.", *result.notes]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return [f"## {result.task}", "\n".join(f"- {note}" for note in notes), table]


def _left_out(left_out: dict[str, Any] | None) -> str:
    if left_out is None:
        return "The checkpoint names no films that pretraining left out."
    return (
        f"Pretraining left out {left_out['films']} films, by {left_out['ids']} ids "
        f"({', '.join(left_out['files'])}; digest {left_out['digest'][:12]})."
    )


def format_score(score: Score) -> str:
    """Four digits, and the deviation where there is one."""
    return f"{score.mean:.4g}" + (f" ± {score.std:.2g}" if score.std > 1e-9 else "")
