"""What the cells of a study measured, from the files of their run folders alone. What is not there stays empty."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.study.cells import Cell
from launch.study.folder import CellState, StudyFolder

WARMUP = 3
"""First steps of each start, which pay for compilers, caches and connections."""
SMOOTHED = 0.1
"""The last share of the steps over which the smoothed loss is a mean."""


@dataclass(frozen=True)
class Measure:
    """A score of an evaluation: mean and deviation over its own draws, on n test items."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Row:
    """One cell as it is now. Numbers that were not measured are None.

    Attributes:
        cell: as planned.
        status: done, running, stopped, failed, waiting or left out.
        reason: why it failed or is left out.
        step: the last one made.
        world_size, device, commit: of the newest start.
        seconds: median of a step, warm-up left out; the other rates and shares are medians too.
        memory_gib: highest of rank 0 (CUDA: tensors; CPU: the whole process, its libraries included).
        shots_seen: by all steps made.
        loss, loss_smoothed: of the last step, and the mean over the last tenth of the steps.
        scores: name -> measure, of the evaluation of the last step.
    """

    cell: Cell
    status: str
    reason: str | None = None
    step: int | None = None
    world_size: int | None = None
    device: str | None = None
    commit: str | None = None
    seconds: float | None = None
    shots_per_second: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    memory_gib: float | None = None
    shots_seen: float | None = None
    loss: float | None = None
    loss_smoothed: float | None = None
    scores: dict[str, Measure] = field(default_factory=dict)

    @property
    def series(self) -> tuple[tuple[str, str], ...]:
        """Where it is in the grid, the seed left out."""
        return tuple((key, str(value)) for key, value in self.cell.values.items())

    def number(self, name: str) -> float | None:
        """A number of this row, of its cell, its prediction ("predicted_...") or its scores, by name."""
        if name in self.scores:
            return self.scores[name].mean
        if name.startswith("predicted_"):
            return getattr(self.cell.prediction, name.removeprefix("predicted_"), None)
        value = getattr(self, name, None)
        return getattr(self.cell, name, None) if value is None else value


@dataclass(frozen=True)
class Group:
    """Cells that differ in their seeds alone."""

    rows: list[Row]

    def spread(self, name: str) -> tuple[float, float, int] | None:
        """Mean, sample deviation and number of seeds of one number; None where no seed has it."""
        found = [value for row in self.rows if (value := row.number(name)) is not None]
        if not found:
            return None
        return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found)


def collect(folder: Path) -> list[Row]:
    """Every cell of a study's folder, in the order of the grid.

    Raises:
        UserError: the folder holds no study.
    """
    of = StudyFolder(folder)
    states = of.states().cells
    return [_row(of.run_of(cell.name), cell, states.get(cell.name, CellState())) for cell in of.cells()]


def groups(rows: Sequence[Row]) -> list[Group]:
    """Rows that differ in their seeds alone, together; in order."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row.series, []).append(row)
    return [Group(of) for of in found.values()]


def score_names(rows: Iterable[Row]) -> list[str]:
    """All scores that any row has, in the order of the evaluation."""
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def last_step(run: Path) -> int | None:
    """The step of the last whole line of a run's metrics, without reading the rest."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 65536))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if facts := _json_line(line):
            return int(facts["step"])
    return None


def _row(run: Path, cell: Cell, state: CellState) -> Row:
    if cell.left_out:
        return Row(cell, "left out", cell.left_out)
    lines, events = _metric_lines(run), _lines(run / "ledger.jsonl")
    starts = [event for event in events if event.get("event") == "start"]
    done = (run / "DONE").is_file()
    status = "done" if done else state.state
    facts: dict[str, Any] = {}
    if lines:
        facts = {"step": lines[-1]["step"], **_rates(lines, [int(s["step"]) for s in starts if "step" in s])}
    if starts:
        facts |= {"world_size": starts[-1].get("world_size"), "device": starts[-1].get("device")}
    if (run / "code.json").is_file():
        code = json.loads((run / "code.json").read_text(encoding="utf-8"))
        facts["commit"] = code.get("commit") and code["commit"][:12] + ("+" if code.get("changed") else "")
    scores = read_scores(run / "evaluation" / f"step-{lines[-1]['step']:08d}") if done and lines else {}
    return Row(cell, status, None if done else state.reason, scores=scores, **facts)


def _rates(lines: Sequence[Mapping[str, Any]], starts: Sequence[int]) -> dict[str, float | None]:
    """Medians after warm-up, and losses. A run of so few steps that all are warm-up has no rates."""
    cold = {start + n for start in starts or [0] for n in range(1, WARMUP + 1)}
    steady = [line for line in lines if line["step"] not in cold]

    def median(name: str) -> float | None:
        found = [line[name] for line in steady if name in line]
        return statistics.median(found) if found else None

    losses = [line["loss"] for line in lines]
    last = losses[-max(1, round(SMOOTHED * len(losses))) :]
    memory = [line["memory_gib"] for line in lines if "memory_gib" in line]
    return {
        "seconds": median("seconds"),
        "shots_per_second": median("shots_per_second"),
        "tokens_per_second": median("tokens_per_second"),
        "mfu": median("mfu"),
        "hfu": median("hfu"),
        "memory_gib": max(memory) if memory else None,
        "shots_seen": sum(line["shots_per_second"] * line["seconds"] for line in lines),
        "loss": losses[-1],
        "loss_smoothed": statistics.fmean(last),
    }


def read_scores(folder: Path) -> dict[str, Measure]:
    """The model's own scores of an evaluation's results.json; empty where there is none.

    Retrieval is the mean reciprocal rank; masked shots are the mean over modalities, each with its own queries.
    Benchmarks have their main metric.
    """
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    scores: dict[str, Measure] = {}
    if masked := found.get("masked_shot"):
        models = [table["rows"]["model"]["mrr"] for table in masked.values()]
        queries = sum(table["queries"] for table in masked.values())
        means, stds = ([one[part] for one in models] for part in ("mean", "std"))
        scores["masked-shot MRR"] = Measure(statistics.fmean(means), statistics.fmean(stds), queries)
    if cross := found.get("cross_modal"):
        scores["cross-modal MRR"] = _measure(cross["rows"]["model"]["mrr"], cross["queries"])
    for label, table in found.get("probes", {}).items():
        scores[f"{label} accuracy"] = _measure(table["rows"]["model"], table["test_items"])
    for task, of in found.get("tasks", {}).items():
        scores[f"{task} {of['metric']}"] = _measure(of["scores"][of["metric"]], of["n"])
    return scores


def _measure(score: Mapping[str, float], n: int) -> Measure:
    return Measure(score["mean"], score["std"], n)


def _metric_lines(run: Path) -> list[dict[str, Any]]:
    """By step; of a step that was made again, the last line counts."""
    by_step = {line["step"]: line for line in _lines(run / "metrics.jsonl") if "step" in line and "loss" in line}
    return [by_step[step] for step in sorted(by_step)]


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [facts for line in file.read_bytes().splitlines() if (facts := _json_line(line))]


def _json_line(line: bytes) -> dict[str, Any] | None:
    """None for a line that a kill has cut."""
    try:
        facts = json.loads(line)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) else None
