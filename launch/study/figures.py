"""Figures of a study. Each is drawn once and kept as PNG and as SVG in which text and lines take the page's colour."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.study.collect import Group, Row, groups, score_names
from launch.study.config import PLACES
from lmp.errors import UserError

COLOURS = ("#2a78b5", "#d1742a", "#3a9a5c", "#b0477a", "#7a64b8", "#8a8a2a", "#2a9d9d", "#c04848")
INK = "#1b2733"
"""Text and lines; becomes currentColor in the SVG."""
FAINT = "#8893a0"
LENGTH_KEYS = ("data.window_shots", "data.pack_shots")


@dataclass(frozen=True)
class Figure:
    """A picture and what it says.

    Attributes:
        name: of its file.
        title, caption: for reports.
        svg: to be put into a page: no size of its own, ids that no other figure has.
    """

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class _Series:
    label: str
    colour: str
    groups: list[Group]


def draw_figures(rows: Sequence[Row], out: Path, *, budget: str) -> list[Figure]:
    """Draw what the rows have numbers for, as NAME.png in `out`, made where needed.

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = _pyplot()
    out.mkdir(parents=True, exist_ok=True)
    found = []
    drawers: tuple[Callable[[Any, Sequence[Row], str], tuple[Any, str, str, str] | None], ...] = (
        _cost,
        _speed_up,
        _quality,
        _predicted,
    )
    for draw in drawers:
        drawn = draw(plt, rows, budget)
        if drawn is None:
            continue
        figure, name, title, caption = drawn
        figure.savefig(out / f"{name}.png", dpi=120, facecolor="white")
        text = io.StringIO()
        with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator"), None))
        plt.close(figure)
        found.append(Figure(name, title, caption, _inline(text.getvalue(), name)))
    return found


def length_of(row: Row) -> int | None:
    """Shots that attend to each other in the longest window."""
    return row.cell.window


def slope(lengths: Sequence[float], costs: Sequence[float]) -> float | None:
    """Exponent of cost = a * length ^ slope, by least squares on logarithms; None for fewer than two lengths."""
    pairs = [(x, y) for x, y in zip(lengths, costs, strict=True) if x > 0 and y > 0]
    if len({x for x, _ in pairs}) < 2:
        return None
    xs, ys = np.log(np.array(pairs, dtype=float)).T
    return float(np.polyfit(xs, ys, 1)[0])


def speed_ups(series: Sequence[Group]) -> list[tuple[int, float, Group]]:
    """(processes, speed-up, group), against the fewest processes, which count as that many."""
    measured = [
        (group.rows[0].cell.world_size, spread[0], group)
        for group in series
        if (spread := group.spread("shots_per_second")) is not None
    ]
    if not measured:
        return []
    fewest, base, _ = min(measured, key=lambda one: one[0])
    return sorted(((n, rate / base * fewest, group) for n, rate, group in measured), key=lambda one: one[0])


def _cost(plt: Any, rows: Sequence[Row], budget: str) -> tuple[Any, str, str, str] | None:
    """Time and memory of a step against length."""
    series = _series(rows, without=_length_axes(rows))
    if not _varies(rows, length_of) or not any(row.seconds for row in rows):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.7), layout="constrained")
    for axis, name, label in ((axes[0], "seconds", "seconds a step"), (axes[1], "memory_gib", "peak GiB a process")):
        for one in series:
            points = [(length_of(g.rows[0]) or 0, s, g) for g in one.groups if (s := g.spread(name)) is not None]
            points.sort(key=lambda point: point[0])
            if not points:
                continue
            xs, ys = [p[0] for p in points], [p[1][0] for p in points]
            exponent = slope(xs, ys) if name == "seconds" else None
            text = one.label + ("" if exponent is None else f" (slope {exponent:.2f})")
            axis.plot(xs, ys, color=one.colour, lw=1.6, label=text.strip())
            _dots(axis, xs, ys, one.colour, [p[2].rows for p in points])
        _log_lengths(axis, rows)
        axis.set_yscale("log")
        _plain_log(axis, "y")
        _label(axis, "longest window, shots", label)
    caption = (
        "Time and memory of a step against the longest window, on logarithmic axes; medians of the steps after "
        "warm-up, means over seeds. The slope is the exponent of the time, by least squares over the points shown."
    )
    return figure, "cost", "Cost against length", caption


def _speed_up(plt: Any, rows: Sequence[Row], budget: str) -> tuple[Any, str, str, str] | None:
    """Throughput against processes."""
    if not _varies(rows, lambda row: row.cell.world_size):
        return None
    figure, axis = plt.subplots(figsize=(5.6, 3.9), layout="constrained")
    largest, drawn = 1, False
    for one in _series(rows, without=_place_axes(rows)):
        points = speed_ups(one.groups)
        if len(points) < 2:
            continue
        drawn = True
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        largest = max(largest, *xs)
        axis.plot(xs, ys, color=one.colour, lw=1.6, label=one.label)
        _dots(axis, xs, ys, one.colour, [p[2].rows for p in points])
    if not drawn:
        plt.close(figure)
        return None
    fewest = min(row.cell.world_size for row in rows)
    axis.plot([fewest, largest], [fewest, largest], "--", color=FAINT, lw=1.2, label="ideal")
    ticks = sorted({row.cell.world_size for row in rows if row.cell.world_size <= largest})
    for which in ("x", "y"):
        getattr(axis, f"set_{which}scale")("log", base=2)
        _ticks(axis, which, ticks)
    _label(axis, "processes", "speed-up in shots a second")
    caption = (
        "Shots a second against those of the fewest processes, which count as that many; dashed: ideal. All cells of a "
        "line do the same work in a step."
    )
    return figure, "speedup", "Speed-up against processes", caption


def _quality(plt: Any, rows: Sequence[Row], budget: str) -> tuple[Any, str, str, str] | None:
    """Scores, or the loss where there are none, against length at an equal budget."""
    names = score_names(rows)[:3]
    names = [*names, "loss_smoothed"] if len(names) < 3 else names
    if not any(row.number(name) is not None for row in rows for name in names):
        return None
    by_length = _varies(rows, length_of)
    axes_left_out = _length_axes(rows) if by_length else [next(iter(rows[0].cell.values), "")]
    series = _series(rows, without=axes_left_out)
    figure, axes = plt.subplots(1, len(names), figsize=(3.9 * len(names), 3.7), layout="constrained", squeeze=False)
    places = list(dict.fromkeys(str(row.cell.values.get(axes_left_out[0])) for row in rows))
    lengths = [length for row in rows if (length := length_of(row))]
    reach = 0.012 * float(np.log2(max(lengths) / min(lengths))) if by_length else 0.12
    shifts = np.linspace(-reach, reach, len(series)) if len(series) > 1 else [0.0]
    for axis, name in zip(axes[0], names, strict=True):
        for one, shift in zip(series, shifts, strict=True):

            def x_of(row: Row, shift: float = float(shift)) -> float:
                if by_length:
                    return float(length_of(row) or 0) * 2**shift
                return places.index(str(row.cell.values.get(axes_left_out[0]))) + shift

            points = [(x_of(g.rows[0]), s, g) for g in one.groups if (s := g.spread(name)) is not None]
            points.sort(key=lambda point: point[0])
            if not points:
                continue
            means, spreads = [p[1][0] for p in points], [p[1][1] for p in points]
            axis.errorbar(
                [p[0] for p in points], means, yerr=spreads, color=one.colour, lw=1.6, capsize=3, label=one.label
            )
            measured = [(p[0], v, [row]) for p in points for row in p[2].rows if (v := row.number(name)) is not None]
            _dots(axis, [m[0] for m in measured], [m[1] for m in measured], one.colour, [m[2] for m in measured], 14)
        if by_length:
            _log_lengths(axis, rows)
        else:
            axis.set_xticks(range(len(places)), places)
        _label(axis, "longest window, shots" if by_length else axes_left_out[0], _title(name))
    against = "length" if by_length else axes_left_out[0]
    caption = (
        f"Held-out scores (or the training loss, a mean over the last tenth of the steps) at {budget}; each dot is a "
        "cell, lines are means over seeds, bars one sample deviation over seeds. Losses of windows of different "
        "lengths are not alike where their candidates are not."
    )
    return figure, "quality", f"Quality against {against} at {budget}", caption


def _predicted(plt: Any, rows: Sequence[Row], budget: str) -> tuple[Any, str, str, str] | None:
    """What the planner said beside what was measured."""
    pairs = (("seconds", "seconds a step"), ("memory_gib", "GiB a process"))
    if not any(row.number("predicted_seconds") and row.seconds for row in rows):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.7), layout="constrained")
    for axis, (name, label) in zip(axes, pairs, strict=True):
        reached: list[float] = []
        for one in _series(rows, without=_length_axes(rows)):
            of = [row for group in one.groups for row in group.rows]
            both = [(p, m, row) for row in of if (p := row.number(f"predicted_{name}")) and (m := row.number(name))]
            if both:
                xs, ys = [b[0] for b in both], [b[1] for b in both]
                reached += [*xs, *ys]
                _dots(axis, xs, ys, one.colour, [[b[2]] for b in both], label=one.label)
        ends = [min(reached) / 1.3, max(reached) * 1.3]
        axis.plot(ends, ends, "--", color=FAINT, lw=1.2, label="as predicted")
        axis.set_xscale("log")
        axis.set_yscale("log")
        _plain_log(axis, "x")
        _plain_log(axis, "y")
        _label(axis, f"predicted {label}", f"measured {label}")
    caption = (
        "The planner's prediction of each cell beside its measurement. On CUDA the memory is the allocator's peak; on "
        "the CPU it is the whole process with its libraries, of which the planner counts only the tensors."
    )
    return figure, "predicted", "Planned and measured", caption


def _series(rows: Sequence[Row], *, without: Sequence[str]) -> list[_Series]:
    """Groups of one line each: those that differ in the axes of `without` alone."""
    varying = [key for key in (rows[0].cell.values if rows else {}) if key not in without]
    varying = [key for key in varying if len({str(row.cell.values.get(key)) for row in rows}) > 1]
    found: dict[str, list[Group]] = {}
    for group in groups(rows):
        values = group.rows[0].cell.values
        found.setdefault(", ".join(f"{_short(key)} {values.get(key)}" for key in varying), []).append(group)
    return [_Series(label or "all cells", COLOURS[n % len(COLOURS)], of) for n, (label, of) in enumerate(found.items())]


def _length_axes(rows: Sequence[Row]) -> list[str]:
    """Axes that set the length, by their own name or because the longest window follows them one to one."""
    axes = list(rows[0].cell.values) if rows else []
    found = [key for key in axes if key in LENGTH_KEYS]
    if found or not _varies(rows, length_of):
        return found
    return [key for key in axes if _follows(rows, key, length_of)]


def _place_axes(rows: Sequence[Row]) -> list[str]:
    """Axes that set the number of processes, whether by themselves or with other keys."""
    axes = list(rows[0].cell.values) if rows else []
    found = [key for key in axes if key in PLACES]
    return found or [key for key in axes if _follows(rows, key, lambda row: row.cell.world_size)]


def _follows(rows: Sequence[Row], key: str, fact: Callable[[Row], Any]) -> bool:
    """Whether a fact changes with an axis and is one and the same for each of its values."""
    seen: dict[str, set[Any]] = {}
    for row in rows:
        seen.setdefault(str(row.cell.values.get(key)), set()).add(fact(row))
    return all(len(facts) == 1 for facts in seen.values()) and len({f for facts in seen.values() for f in facts}) > 1


def _varies(rows: Sequence[Row], fact: Callable[[Row], Any]) -> bool:
    return len({value for row in rows if (value := fact(row)) is not None}) > 1


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _title(name: str) -> str:
    return "training loss, smoothed" if name == "loss_smoothed" else name


def _dots(
    axis: Any,
    xs: Sequence[float],
    ys: Sequence[float],
    colour: str,
    rows: Sequence[Sequence[Row]],
    size: int = 26,
    *,
    label: str | None = None,
) -> None:
    """Points that lead to their cells in the page's table."""
    dots = axis.scatter(xs, ys, s=size, color=colour, zorder=3, label=label)
    dots.set_urls([f"#cell-{of[0].cell.name}" for of in rows])


def _log_lengths(axis: Any, rows: Sequence[Row]) -> None:
    axis.set_xscale("log", base=2)
    _ticks(axis, "x", sorted({value for row in rows if (value := length_of(row))}))


def _ticks(axis: Any, which: str, places: Sequence[int]) -> None:
    getattr(axis, f"set_{which}ticks")(places, [str(place) for place in places])
    getattr(axis, f"{which}axis").set_minor_locator(_ticker().NullLocator())


def _plain_log(axis: Any, which: str) -> None:
    """Plain numbers on a logarithmic axis, and enough of them where it spans less than a decade."""
    ticker, of = _ticker(), getattr(axis, f"{which}axis")
    plain = ticker.FuncFormatter(lambda value, _: f"{value:.3g}")
    of.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    of.set_major_formatter(plain)
    low, high = getattr(axis, f"get_{which}lim")()
    if high / low < 2:  # a flat line is to look flat
        low, high = low / 1.5, high * 1.5
        getattr(axis, f"set_{which}lim")(low, high)
    of.set_minor_locator(ticker.NullLocator() if high / low > 4 else ticker.LogLocator(subs=(1.5, 3, 4, 7)))
    of.set_minor_formatter(plain)


def _label(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(True, which="major", color=FAINT, alpha=0.25, lw=0.6)
    axis.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _inline(svg: str, name: str) -> str:
    """For a page: no prolog, ids of its own, the page's colour, its font, and the cell's name where one points."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)(?!cell-)', rf"\g<1>{name}-", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(<a href="#cell-([^"]+)"[^>]*>)', r"\1<title>\2</title>", svg)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1 role='img'>", svg, count=1)


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("figures need matplotlib", remedy="pip install 'lmp[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    pyplot.rcParams.update({**dict.fromkeys(keys, INK), "font.size": 9, "axes.axisbelow": True})
    return pyplot
