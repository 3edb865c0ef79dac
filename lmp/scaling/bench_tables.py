"""The tables that `lmp bench step` prints: one of each part, from the values that go into the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmp.scaling.bench_step import StepReport
from lmp.scaling.bench_subjects import OWN

Rows = list[list[str]]
_MIB = 2**20


def print_parts(report: StepReport) -> None:
    """All tables, what did not run and why."""
    printers: dict[str, Callable[[StepReport, Any], None]] = {
        "ceilings": _ceilings,
        "attention": _attention,
        "step": _step,
        "trainer": _trainer,
        "length": _length,
        "loss": _loss,
    }
    shape = report.settings.shape
    where = f"bf16 on {report.machine['gpu']}" if "gpu" in report.machine else "fp32 on one core, CPU time of a thread"
    heads = f"{shape.heads} heads of {shape.head_dim}"
    print(f"width {shape.width}, {heads}, {shape.layers} layers; {where}; median (min - max)")
    for part, found in report.parts.items():
        printers[part](report, found)
    for part, why in report.failed.items():
        print(f"{part}: FAILED, {why}")


def table(title: str, headings: Sequence[str], rows: Rows, *, left: int = 1) -> None:
    """Print a table; the first `left` columns hold names."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    drawn = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN)
    for number, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if number < left else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    if not console.is_terminal:
        console.width = 220  # a pipe has no width to keep to
    print(f"\n{title}")
    console.print(drawn)


def spread_text(values: dict[str, float] | None, *, unit: float = 1.0, digits: int = 2) -> str:
    """Median (min - max) in units."""
    if values is None:
        return "-"
    median, least, most = (f"{values[name] / unit:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({least} - {most})"


def _absent(found: dict[str, Any]) -> None:
    for name, why in found["absent"].items():
        print(f"{name}: not measured, {why}")


def _unit(report: StepReport) -> tuple[float, str]:
    return (1e12, "TFLOP/s") if report.settings.device == "cuda" else (1e9, "GFLOP/s")


def _ceilings(report: StepReport, found: dict[str, Any]) -> None:
    unit, name = _unit(report)
    side = found["matmul"]["side"]
    rows = [[f"[{side}, {side}] x [{side}, {side}]", spread_text(found["matmul"]["rate"], unit=unit, digits=1), *"---"]]
    for product in found["products"]:
        rates = [spread_text(product[part]["rate"], unit=unit, digits=1) for part in ("forward", "input", "weight")]
        share = min(product[part]["share"]["median"] for part in ("forward", "input", "weight"))
        rows.append(
            [f"[{product['rows']}, {product['ins']}] x [{product['ins']}, {product['outs']}]", *rates, f"{share:.2f}"]
        )
    table(
        "ceilings: products of matrices",
        ["product", name, "gradient by input", "gradient by weight", "least of matmul"],
        rows,
    )
    table(
        "ceilings: copies",
        ["copy", "GB/s"],
        [[what, spread_text(rate, unit=1e9, digits=1)] for what, rate in found["copies"].items()],
    )


def _attention(report: StepReport, found: dict[str, Any]) -> None:
    unit, name = _unit(report)
    rows = []
    for row in found["rows"]:
        gradient = max(row["error"][key] for key in ("grad_q", "grad_k", "grad_v"))
        rows.append(
            [
                row["backend"],
                row["kernel"].partition("(")[0].removeprefix("aten::")[:48],
                f"{row['segments']} x {row['length']}",
                spread_text(row["forward_seconds"], unit=1e-3),
                spread_text(row["backward_seconds"], unit=1e-3),
                spread_text(row["model_rate"], unit=unit, digits=1),
                spread_text(row["of_matmul"]),
                f"{row['error']['out']:.1e}",
                f"{gradient:.1e}",
                "yes" if row["right"] else f"NO, over {row['rounding']:.0e}",
            ]
        )
    headings = ["backend", "kernel", "tokens", "forward ms", "backward ms", f"model {name}", "of matmul"]
    table(
        "attention, against fp64 on sampled rows", [*headings, "error out", "error grad", "rounding only"], rows, left=2
    )
    _absent(found)


def _step(report: StepReport, found: dict[str, Any]) -> None:
    unit, name = _unit(report)
    cuda = report.settings.device == "cuda"
    headings = ["encoder", "tokens", "tokens/s", "ms", f"model {name}", *(["MFU", "HFU"] if cuda else []), "of matmul"]
    rows = []
    for row in found["rows"]:
        utilization = [spread_text(row[key]) for key in ("mfu", "hfu")] if cuda else []
        rows.append(
            [
                row["subject"],
                f"{row['sequences']} x {row['length']}",
                f"{row['tokens_per_second']['median']:.0f}",
                spread_text(row["seconds"], unit=1e-3, digits=1),
                f"{row['model_rate']['median'] / unit:.1f}",
                *utilization,
                spread_text(row["of_matmul"]),
                f"{row['peak_bytes'] / _MIB:.1f}",
                *(spread_text(row["speed_to"].get(own)) for own in OWN),
            ]
        )
    table("training step", [*headings, "peak MiB", *(f"{own} / it" for own in OWN)], rows)
    _absent(found)


def _trainer(report: StepReport, found: dict[str, Any]) -> None:
    times = {what: spread_text(found[what], unit=1e-3, digits=1) for what in ("bare", "trainer", "full")}
    updates = {what: spread_text(found[f"{what}_update"], unit=1e-3, digits=1) for what in ("bare", "trainer")}
    over = {what: spread_text(found[what], unit=1e-2, digits=1) for what in ("overhead", "overhead_full")}
    rows = [
        ["bare loop", times["bare"], updates["bare"], "-"],
        ["trainer", times["trainer"], updates["trainer"], over["overhead"]],
        [f"trainer, each {found['log_every']}th step: all metrics", times["full"], "", over["overhead_full"]],
    ]
    table(
        f"trainer: {found['parameters'] / 1e6:.1f}M parameters, {found['shots']} shots a step",
        ["loop", "ms a step", "of these the update", "over the bare loop, %"],
        rows,
    )


def _length(report: StepReport, found: dict[str, Any]) -> None:
    first = found["rows"][0]
    budget = first["budget_bytes"]
    limit = "all memory of the device" if budget is None else f"{budget / _MIB:.0f} MiB beyond parameters and moments"
    rows = []
    for row in found["rows"]:
        slope = row["bytes_per_token"]
        rows.append(
            [
                row["mode"] + (" (bound by the host's memory)" if row["bound_by_host"] else ""),
                f"{row['tokens']:,}",
                f"{row['over']:,}",
                "-" if row["bytes"] is None else f"{row['bytes'] / _MIB:.1f}",
                "-" if slope is None else f"{slope / 1e3:.2f}",
                str(row["tried"]),
            ]
        )
    table(
        f"longest sequence in {limit} (rows of segments of {first['segment']} tokens, which need no less)",
        ["checkpointing", "tokens", "too many", "MiB", "kB a token", "tried"],
        rows,
    )


def _loss(report: StepReport, found: dict[str, Any]) -> None:
    rows = []
    for row in found["rows"]:
        further = row["bytes_per_further_token"]
        rows.append(
            [
                f"{row['tokens']:,}",
                f"{row['bytes'] / _MIB:.2f}",
                "-" if further is None else f"{further:.0f}",
                f"{row['matrix_bytes'] / _MIB:.0f}",
            ]
        )
    table(
        f"memory of InfoNCE, forward and backward: vectors of {found['width']}, tiles of {found['tile']}",
        ["tokens", "MiB", "bytes a further token", "the full logits alone would take MiB"],
        rows,
    )
