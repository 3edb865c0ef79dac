"""The report of a study: report.md, results.csv, figures as PNG, and one page that needs nothing else."""

from __future__ import annotations

import csv
import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml

from launch.study.collect import Group, Row, collect, groups, score_names
from launch.study.figures import Figure, draw_figures
from lmp.train.run_folder import write_atomic

NUMBERS = (
    "world_size",
    "steps",
    "step",
    "seconds",
    "predicted_seconds",
    "shots_per_second",
    "tokens_per_second",
    "mfu",
    "hfu",
    "memory_gib",
    "predicted_memory_gib",
    "shots_seen",
    "flops",
    "loss",
    "loss_smoothed",
)
MEANINGS = {
    "world_size": "processes",
    "steps": "steps planned",
    "step": "steps made",
    "seconds": "s/step",
    "predicted_seconds": "s/step planned",
    "shots_per_second": "shots/s",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "hfu": "HFU",
    "memory_gib": "GiB",
    "predicted_memory_gib": "GiB planned",
    "shots_seen": "shots seen",
    "flops": "FLOPs planned",
    "loss": "last loss",
    "loss_smoothed": "loss",
}
GROUPED = ("seconds", "shots_per_second", "mfu", "memory_gib", "loss_smoothed")


def write_report(folder: Path, rows: Sequence[Row] | None = None) -> Path:
    """Make STUDY/report again from what the cells have now, or from their `rows` where these are read already.

    Returns:
        the path of report.html.

    Raises:
        UserError: the folder holds no study; matplotlib is not installed.
    """
    rows = collect(folder) if rows is None else rows
    study = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
    out = folder / "report"
    ran = [row for row in rows if row.status != "left out"]
    figures = draw_figures(ran, out, budget=_budget(study))
    for old in out.glob("*.png"):
        if old.stem not in {figure.name for figure in figures}:
            old.unlink()
    write_atomic(out / "results.csv", results_csv(rows))
    write_atomic(out / "report.md", render_markdown(study, rows, figures))
    write_atomic(out / "report.html", render_html(study, rows, figures))
    return out / "report.html"


def results_csv(rows: Sequence[Row]) -> str:
    """A line per cell with everything that is known; empty where it is not."""
    axes, scores = list(rows[0].cell.values), score_names(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["cell", "status", *axes, "seed", "nodes", "processes", *NUMBERS, "device", "commit"]
    writer.writerow([*head, *(f"{name}{part}" for name in scores for part in ("", " std", " n")), "reason"])
    for row in rows:
        cell = row.cell
        values = [json.dumps(v) if isinstance(v, dict | list) else v for v in cell.values.values()]
        line: list[Any] = [cell.name, row.status, *values, cell.seed, cell.nodes, cell.processes]
        line += [row.number(name) for name in NUMBERS] + [row.device, row.commit]
        for name in scores:
            measure = row.scores.get(name)
            line += ["", "", ""] if measure is None else [measure.mean, measure.std, measure.n]
        writer.writerow(["" if value is None else value for value in [*line, row.reason]])
    return text.getvalue()


def summary(rows: Sequence[Row]) -> str:
    """How far the study is, in one line."""
    counts = Counter(row.status for row in rows)
    order = ("done", "running", "submitted", "waiting", "stopped", "cancelled", "failed", "left out")
    told = ", ".join(f"{counts[name]} {name}" for name in order if counts[name])
    measured = sum(1 for row in rows if row.scores)
    return f"{len(rows)} cells: {told}" + (f"; {measured} evaluated" if measured else "")


def render_markdown(study: dict[str, Any], rows: Sequence[Row], figures: Sequence[Figure]) -> str:
    """The report as markdown; the figures lie beside it."""
    head, lines = _group_table(rows)
    parts = [f"# {study['name']}", f"{summary(rows)}. {_provenance(study, rows)}"]
    for figure in figures:
        parts += [f"## {figure.title}", f"![{figure.title}]({figure.name}.png)", figure.caption]
    parts += ["## Means over seeds", "± is one sample deviation over seeds.", _markdown_table(head, lines)]
    head, cells = _cell_table(rows)
    parts += ["## Cells", _markdown_table(head, [texts for _, texts in cells])]
    if out := _without_result(rows):
        parts += ["## Without a result", "\n".join(f"- `{name}`: {why}" for name, why in out)]
    return "\n\n".join(parts) + "\n"


def render_html(study: dict[str, Any], rows: Sequence[Row], figures: Sequence[Figure]) -> str:
    """One page: styles, figures and the script that sorts tables are in it."""
    cards = "\n".join(
        f'<figure id="figure-{f.name}"><h2>{html.escape(f.title)}</h2>{f.svg}<figcaption>{html.escape(f.caption)}'
        "</figcaption></figure>"
        for f in figures
    )
    group_head, group_lines = _group_table(rows)
    cell_head, cell_lines = _cell_table(rows)
    without = "".join(f"<li><code>{html.escape(n)}</code>: {html.escape(why)}</li>" for n, why in _without_result(rows))
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=html.escape(study["name"]),
        summary=html.escape(summary(rows)),
        provenance=html.escape(_provenance(study, rows)),
        figures=cards,
        groups=_html_table(group_head, [(None, line) for line in group_lines]),
        cells=_html_table(cell_head, cell_lines),
        without=f"<h2>Without a result</h2><ul>{without}</ul>" if without else "",
        study=html.escape(yaml.safe_dump(study, sort_keys=False, allow_unicode=True)),
    )


def _budget(study: dict[str, Any]) -> str:
    amounts = {key: value for key, value in study["budget"].items() if value is not None}
    (kind, amount), *_ = amounts.items()
    return {
        "steps": f"{amount} steps",
        "shots": f"{amount:.3g} shots seen",
        "flops": f"equal compute ({amount:.3g} FLOPs)",
    }[kind]


def _provenance(study: dict[str, Any], rows: Sequence[Row]) -> str:
    devices = sorted({row.device for row in rows if row.device})
    commits = sorted({row.commit for row in rows if row.commit})
    seeds = len(study["seeds"])
    parts = [f"Each cell has {_budget(study)}", f"{seeds} seed{'s' if seeds != 1 else ''}"]
    parts += [f"on {', '.join(devices)}"] if devices else []
    parts += (
        [f"lmp {', '.join(commits)}" + (" (+: with changes)" if "+" in "".join(commits) else "")] if commits else []
    )
    if not study["evaluate"]:
        parts.append("no held-out evaluation")
    return "; ".join(parts) + "."


def _group_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Means over seeds of what was measured."""
    found = [group for group in groups(rows) if any(row.step for row in group.rows)]
    axes, scores = list(rows[0].cell.values), score_names(rows)
    names = [name for name in GROUPED if any(group.spread(name) for group in found)]
    ends = [f"{name} (n = {_items(rows, name)})" for name in scores]
    head = [*(_short(key) for key in axes), "seeds", *(MEANINGS[name] for name in names), *ends]
    return head, [
        [*(str(value) for value in group.rows[0].cell.values.values()), _seeds(group)]
        + [_spread(group, name) for name in [*names, *scores]]
        for group in found
    ]


def _items(rows: Sequence[Row], name: str) -> str:
    counts = sorted({row.scores[name].n for row in rows if name in row.scores})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _seeds(group: Group) -> str:
    return str(sum(1 for row in group.rows if row.step))


def _spread(group: Group, name: str) -> str:
    found = group.spread(name)
    if found is None:
        return ""
    mean, deviation, seeds = found
    if seeds == 1:
        return _text(name, mean)
    percent = name in ("mfu", "hfu")
    return f"{_text(name, mean)} ± {100 * deviation if percent else deviation:.2g}"


def _cell_table(rows: Sequence[Row]) -> tuple[list[str], list[tuple[Row, list[str]]]]:
    """Everything of each cell that ran."""
    shown = [row for row in rows if row.status != "left out"]
    axes, scores = list(rows[0].cell.values), score_names(rows)
    names = [name for name in NUMBERS if any(row.number(name) is not None for row in shown)]
    head = ["cell", "status", *(_short(key) for key in axes), "seed", *(MEANINGS[n] for n in names), *scores]
    lines = []
    for row in shown:
        values = [str(value) for value in row.cell.values.values()]
        texts = [row.cell.name, row.status, *values, str(row.cell.seed)]
        lines.append((row, [*texts, *(_text(n, row.number(n)) for n in [*names, *scores])]))
    return head, lines


def _without_result(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [
        (row.cell.name, f"{row.status}: {row.reason}" if row.reason else row.status)
        for row in rows
        if row.status != "done"
    ]


def _text(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in ("mfu", "hfu"):
        return f"{100 * value:.1f} %"
    if name in ("steps", "step", "world_size"):
        return str(int(value))
    if name in ("shots_seen", "shots_per_second", "tokens_per_second"):
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.2e}" if name == "flops" else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(head), ["---"] * len(head), *(list(line) for line in lines)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _html_table(head: Sequence[str], lines: Sequence[tuple[Row | None, Sequence[str]]]) -> str:
    cells = "".join(f'<th><button type="button">{html.escape(text)}</button></th>' for text in head)
    body = []
    for row, texts in lines:
        inner = "".join(f"<td>{_cell(row, column, text)}</td>" for column, text in enumerate(texts))
        mark = "" if row is None else f' id="cell-{html.escape(row.cell.name)}"'
        body.append(f"<tr{mark}>{inner}</tr>")
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cell(row: Row | None, column: int, text: str) -> str:
    if row is None or column > 1:
        return html.escape(text)
    if column == 0:
        return f'<a href="../cells/{html.escape(text)}/">{html.escape(text)}</a>'
    return f'<span class="status {html.escape(text.replace(" ", "-"))}">{html.escape(text)}</span>'
