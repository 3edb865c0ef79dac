"""`lmp bench ...`: what reading, planning, ingest and training steps cost on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lmp.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from lmp.scaling.bench_checkpoint import CheckpointReport
    from lmp.scaling.bench_data import DataReport
    from lmp.scaling.bench_ingest import IngestBenchReport
    from lmp.scaling.bench_plan import PlanReport


def register(bench: Any) -> None:
    """Add the commands to the subparsers of `lmp bench`."""
    data = bench.add_parser("data", help="reading speed, of lmp and others, against a raw read in the same run")
    data.add_argument("shards", nargs="?", help="a local folder of film shards (default: made here, and removed)")
    data.add_argument("--make", type=float, default=0.75, metavar="GB", help="size of the films made (0.75)")
    data.add_argument("--reps", type=int, default=5)
    data.add_argument("--cold", action="store_true", help="throw the files out of the page cache before each reading")
    data.add_argument("--readers", default="", metavar="A,B", help="names or starts of names, such as lmp,litdata")
    data.add_argument("--out", type=Path, metavar="REPORT.json")
    data.set_defaults(run=_data)

    plan = bench.add_parser("plan", help="cost of planning an epoch, filling of packs, evenness of attention")
    plan.add_argument("--films", type=int, default=1_000_000)
    plan.add_argument("--pack-shots", type=int, default=4096)
    plan.add_argument("--packs-per-step", type=int, default=64)
    plan.add_argument("--out", type=Path, metavar="REPORT.json")
    plan.set_defaults(run=_plan)

    step = bench.add_parser("step", help="training steps, against this machine's ceilings and other encoders")
    step.add_argument("--quick", action="store_true", help="small shapes and few rounds, within 90 s on two cores")
    step.add_argument(
        "--parts", default="", metavar="A,B", help="some of ceilings, attention, step, trainer, length, loss"
    )
    step.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    for name in ("width", "heads", "layers", "tokens", "rounds"):
        step.add_argument(f"--{name}", type=int, help="instead of the setting's")
    step.add_argument("--lengths", type=_numbers, metavar="N,N", help="tokens of a sequence, a row of the tables each")
    step.add_argument("--loss-tokens", type=_numbers, metavar="N,N", help="tokens of the contrastive loss")
    step.add_argument("--trainer-shots", type=int, metavar="P", help="shots of one of the trainer's packs")
    step.add_argument("--trainer-steps", type=int, metavar="N", help="steps of the trainer that are measured")
    step.add_argument("--budget", dest="budget_mib", type=float, metavar="MIB", help="memory for the longest sequence")
    step.add_argument(
        "--encoders", type=lambda text: tuple(text.split(";")), metavar="A;B", help="which take part (all)"
    )
    step.add_argument("--compiled", action="store_true", default=None, help="compiled encoders too")
    step.add_argument("--out", type=Path, metavar="REPORT.json")
    step.set_defaults(run=_step)

    saving = bench.add_parser("checkpoint", help="for how long saving holds up the training, beside it and blocking")
    saving.add_argument("--width", type=int, default=512)
    saving.add_argument("--layers", type=int, default=2)
    saving.add_argument("--rounds", type=int, default=5)
    saving.add_argument("--folder", type=Path, help="a folder on the disk to be measured (default: a temporary one)")
    saving.add_argument("--out", type=Path, metavar="REPORT.json")
    saving.set_defaults(run=_checkpoint)

    films = bench.add_parser("ingest", help="what films cost to turn into features, against decoding them alone")
    films.add_argument("films", nargs="*", type=Path, metavar="FILM", help="films or folders (default: made here)")
    films.add_argument("--encoder", action="append", default=[], metavar="NAME=SPEC", help="as for lmp ingest")
    films.add_argument("--make", type=int, default=4, metavar="N", help="films made, if none are given (4)")
    films.add_argument("--make-shots", type=int, default=40, metavar="N", help="shots of each of them (40)")
    films.add_argument("--reps", type=int, default=3)
    films.add_argument(
        "--memory", type=_numbers, default=(), metavar="S,S", help="seconds of long films, for the peak of memory"
    )
    films.add_argument(
        "--batches", type=_numbers, default=(), metavar="N,N", help="shots encoded at once: what that changes"
    )
    films.add_argument("--out", type=Path, metavar="REPORT.json")
    films.set_defaults(run=_ingest)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _data(arguments: argparse.Namespace) -> int:
    from lmp.scaling.bench_data import bench_data, progress

    _check_out(arguments.out)
    with progress() as step:
        report = bench_data(
            arguments.shards,
            make_gb=arguments.make,
            reps=arguments.reps,
            cold=arguments.cold,
            names=[name for name in arguments.readers.split(",") if name],
            step=step,
        )
    _print_data(report)
    _write(arguments.out, report.to_json())
    return EXIT_DONE


def _plan(arguments: argparse.Namespace) -> int:
    from lmp.scaling.bench_plan import bench_plan

    _check_out(arguments.out)
    report = bench_plan(arguments.films, arguments.pack_shots, arguments.packs_per_step)
    _print_plan(report)
    _write(arguments.out, report.to_json())
    return EXIT_DONE


def _step(arguments: argparse.Namespace) -> int:
    from lmp.scaling.bench_data import progress
    from lmp.scaling.bench_step import PARTS, bench_step, settings_of
    from lmp.scaling.bench_tables import print_parts

    _check_out(arguments.out)
    names = (
        "width",
        "heads",
        "layers",
        "tokens",
        "rounds",
        "lengths",
        "loss_tokens",
        "budget_mib",
        "encoders",
        "compiled",
    )
    changes = {name: getattr(arguments, name) for name in (*names, "trainer_shots", "trainer_steps")}
    settings = settings_of(arguments.device, quick=arguments.quick, **changes)
    parts = [part for part in arguments.parts.split(",") if part] or PARTS
    with progress() as step:
        report = bench_step(settings, parts, step)
    print_parts(report)
    _print_machine(report.machine)
    _write(arguments.out, report.to_json())
    return 1 if report.failed else EXIT_DONE


def _checkpoint(arguments: argparse.Namespace) -> int:
    from lmp.scaling.bench_checkpoint import CheckpointSettings, bench_checkpoint

    _check_out(arguments.out)
    for name in ("width", "layers", "rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}", remedy="give at least 1")
    if arguments.folder is not None and not arguments.folder.is_dir():
        raise UserError(f"--folder {arguments.folder}: is not a folder", remedy="make it, or give another")
    names = ("width", "layers", "rounds", "folder")
    report = bench_checkpoint(CheckpointSettings(**{name: getattr(arguments, name) for name in names}))
    _print_checkpoint(report)
    _write(arguments.out, report.to_json())
    return EXIT_DONE


def _ingest(arguments: argparse.Namespace) -> int:
    from lmp.films.commands import encoders_of
    from lmp.scaling.bench_data import progress
    from lmp.scaling.bench_ingest import bench_ingest

    _check_out(arguments.out)
    with progress() as step:
        report = bench_ingest(
            arguments.films,
            encoders=encoders_of(arguments.encoder),
            make=arguments.make,
            make_shots=arguments.make_shots,
            reps=arguments.reps,
            lengths=arguments.memory,
            batches=arguments.batches,
            step=step,
        )
    _print_ingest(report)
    _write(arguments.out, report.to_json())
    return EXIT_DONE


def _check_out(out: Path | None) -> None:
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is not a folder", remedy="make it, or give another place")


def _write(out: Path | None, report: dict[str, Any]) -> None:
    from lmp.train.run_folder import write_atomic

    if out is not None:
        write_atomic(out, json.dumps(report, indent=1) + "\n")
        print(f"report: {out}")


def _print_data(report: DataReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from lmp.scaling.bench_data import counter_ratios

    console = Console()
    corpus = report.corpus
    print(
        f"{corpus['films']} films, {corpus['shots']} shots, {corpus['bytes'] / 1e6:.1f} MB in {corpus['shards']} "
        f"shards{', made here' if corpus['made'] else ''}; page cache {report.cache}; median (min - max)"
    )
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN)
    for heading in ("reader", "delivers", "items/s", "MB/s", "of raw", "CPU s/GB", "of raw's CPU"):
        table.add_column(heading, justify="left" if heading in ("reader", "delivers") else "right", no_wrap=True)
    for result in report.results:
        table.add_row(
            result.name,
            result.items,
            f"{median(result.items_per_s):.0f}",
            _spread(result.mb_per_s, 0),
            _spread(result.speed_to_raw, 2),
            _spread(result.cpu_s_per_gb, 3),
            _spread(result.cpu_to_raw, 2),
        )
    if not console.is_terminal:
        console.width = 200  # a pipe has no width to keep to
    console.print(table)
    for name, why in report.skipped.items():
        print(f"{name}: skipped, {why}")
    if report.counters is None:
        print("bytes read: not counted, for this system has no /proc/self/io")
    else:
        ratios = counter_ratios(report.counters)
        print(
            f"bytes read, counted by the system: a window of 60 of 1,200 shots {ratios['window_ratio']:.4f} of its "
            f"payload; each of 4 sequence ranks {', '.join(f'{r:.4f}' for r in ratios['rank_ratios'])} of the pack"
        )
    _print_machine(report.machine)


def _spread(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def _print_plan(report: PlanReport) -> None:
    from lmp.scaling.bench_plan import RANKS

    print(f"one epoch of {report.films} films in packs of {report.pack_shots} shots, {report.packs_per_step} a step")
    print(f"planning: {report.cpu_seconds:.2f} CPU s, {report.peak_mb:.0f} MB at the peak, {report.packs} packs")
    print(f"filled: {report.fill:.4f} of all shots of the packs")
    print(
        f"attention of the busiest of {RANKS} ranks over the mean: {report.imbalance_mean:.2%} on average, "
        f"95 % of steps below {report.imbalance_p95:.2%}, at most {report.imbalance_max:.2%} ({report.steps} steps)"
    )
    _print_machine(report.machine)


def _print_checkpoint(report: CheckpointReport) -> None:
    print(
        f"state of {report.parameters / 1e6:.1f} million parameters, {report.bytes / 1e6:.0f} MB; "
        f"{len(report.blocking)} rounds; median (min - max)"
    )
    rows = [
        ("a blocking save holds up training, s", report.blocking, 3),
        ("one beside the training holds it up, s", report.stall, 3),
        ("the second over the first", report.ratios, 3),
        ("from its start to its completion, s", report.written, 2),
        ("a step while nothing is written, s", report.quiet, 3),
        ("a step while something is written, s", report.beside, 3),
    ]
    print("| | |\n|---|---|")
    for name, values, digits in rows:
        print(f"| {name} | {_spread(values, digits)} |")
    _print_machine(report.machine)


def _print_ingest(report: IngestBenchReport) -> None:
    from lmp.scaling.bench_ingest import SUBJECTS

    made = ", ".join(f"{name}={spec}" for name, spec in report.encoders.items())
    print(f"{report.films} films of {report.film_seconds:.0f} s in all, {made}; median (min - max)")
    print("| | films per CPU second | CPU s | CPU time over decode's | what |\n|---|---|---|---|---|")
    for subject, turns in report.turns.items():
        cells = (
            _spread(report.films_per_cpu_second(subject), 2),
            _spread([turn.cpu_seconds for turn in turns], 2),
            _spread(report.of_decode(subject), 2),
        )
        print(f"| {subject} | {' | '.join(cells)} | {SUBJECTS[subject]} |")
    for subject, why in report.skipped.items():
        print(f"{subject}: skipped, {why}")
    if report.batches:
        print("\n| encoder | shots at once | CPU ms a shot | features differ from those of each alone by |")
        print("|---|---|---|---|")
    for row in report.batches:
        print(f"| {row.encoder} | {row.batch} | {row.cpu_seconds * 1000:.1f} | {row.difference:.1g} |")
    for seconds, (peak, before) in report.peaks.items():
        print(f"a film of {seconds} s: at most {peak / 1e6:.0f} MB resident, {before / 1e6:.0f} MB before it")
    _print_machine(report.machine)


def _print_machine(machine: dict[str, Any]) -> None:
    changed = ", with changes" if machine["changed"] else ""
    print(
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB; load average at the start "
        f"{machine['load_average'][0]}; {machine['system']}, Python {machine['python']}; commit "
        f"{machine['commit'] or 'unknown'}{changed}"
    )
