"""Run a study, a grid of runs, and report it: python -m launch.study STUDY.yaml [--out STUDY] [--local] [a.b=c ...].

Cells are SLURM jobs, or with --local runs on this machine, one after another. Started again it goes on with what is
missing. Further commands, at any time: python -m launch.study report|status|cancel STUDY.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.study.cells import Cell, make_cells
from launch.study.config import Study, load_study
from lmp.errors import EXIT_DONE, EXIT_USER, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0: every cell that can run is done and measured, 1: not yet, or some failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in COMMANDS:
            return _of_folder(words[0], words[1:])
        return _study(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER


def _study(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.study", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="of the study's keys")
    parser.add_argument("--out", type=Path, metavar="STUDY", help="folder (default: studies/NAME)")
    parser.add_argument("--list", action="store_true", help="show the cells, and what the planner says; start nothing")
    parser.add_argument("--local", action="store_true", help="on this machine, one cell after another")
    parser.add_argument("-n", "--processes", type=int, help="of each cell, in place of the study's `processes`")
    parser.add_argument("--no-wait", action="store_true", help="submit and end; the jobs go on")
    parser.add_argument("--poll", type=float, default=5.0, metavar="SECONDS", help="between two looks at the jobs")
    arguments = parser.parse_intermixed_args(words)
    overrides = [*arguments.overrides]
    if arguments.processes is not None:
        overrides.append(f"processes={arguments.processes}")
    study = load_study(arguments.study, overrides)
    if arguments.list:
        show_cells(study, make_cells(study))
        return EXIT_DONE
    return run_study(
        study,
        arguments.out or Path("studies") / study.name,
        local=arguments.local,
        wait=not arguments.no_wait,
        poll=arguments.poll,
    )


def run_study(study: Study, out: Path, *, local: bool, wait: bool = True, poll: float = 5.0) -> int:
    """Run or go on with a study in the folder `out`, and report it.

    Raises:
        UserError: the folder holds another study or is being run, no cell can run, or there is no SLURM.
    """
    from launch.study.folder import StudyFolder

    folder = StudyFolder(out)
    with folder.locked():
        cells = folder.open(study)
        for cell in cells:
            if cell.left_out:
                print(f"left out: {cell.name}: {cell.left_out}", flush=True)
        try:
            if local:
                from launch.study.local import run_local

                if not run_local(folder, study, cells):
                    print("stopped; start again to go on", file=sys.stderr)
            else:
                from launch.study.slurm import SlurmRunner

                runner = SlurmRunner(folder, study, cells, poll=poll)
                runner.start()
                if not wait:
                    print(f"submitted; `python -m launch.study status {out}` shows how far it is")
                    return EXIT_DONE
                runner.watch()
        except KeyboardInterrupt:
            print("interrupted" + ("" if local else "; the jobs go on") + "; start again to go on", file=sys.stderr)
        return _report(folder.path)


def show_cells(study: Study, cells: Sequence[Cell]) -> None:
    """A table of the cells that run, with the planner's predictions, and a line for each that is left out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN)
    for heading in ("cell", "processes", "steps", "GiB", "of", "s/step", "MFU", "hours"):
        table.add_column(heading, justify="left" if heading == "cell" else "right", no_wrap=True)
    kept = [cell for cell in cells if cell.left_out is None]
    for cell in kept:
        told = cell.prediction
        assert told is not None
        table.add_row(
            cell.name,
            f"{cell.nodes} x {cell.processes}",
            str(cell.steps),
            f"{told.memory_gib:.2f}",
            f"{told.limit_gib:.1f}",
            f"{told.seconds:.3g}",
            f"{told.mfu:.1%}",
            f"{(cell.steps or 0) * told.seconds / 3600:.3g}",
        )
    if not console.is_terminal:
        console.width = 200
    devices = sorted({cell.prediction.device for cell in kept if cell.prediction})
    print(f"{study.name}: {len(kept)} of {len(cells)} cells run; memory and time as planned for {devices[0]}")
    console.print(table)
    for cell in cells:
        if cell.left_out:
            print(f"left out: {cell.name}: {cell.left_out}")


def _of_folder(command: str, words: Sequence[str]) -> int:
    """report, status or cancel."""
    parser = argparse.ArgumentParser(prog=f"python -m launch.study {command}", description=COMMANDS[command])
    parser.add_argument("folder", type=Path, metavar="STUDY")
    folder = parser.parse_args(words).folder
    if command == "report":
        _report(folder)
        return EXIT_DONE
    if command == "status":
        return _status(folder)
    from launch.study.folder import StudyFolder
    from launch.study.slurm import SlurmRunner

    of = StudyFolder(folder)
    runner = SlurmRunner(of, load_study(of.study_file), of.cells())
    jobs = runner.cancel()
    if not of.is_run():  # a launcher that watches them sees it by itself
        of.save(runner.states)
    print(f"cancelled: {' '.join(jobs) or 'nothing'}")
    return EXIT_DONE


def _status(folder: Path) -> int:
    from launch.study.collect import collect
    from launch.study.report import summary

    rows = collect(folder)
    for row in rows:
        steps = f"{row.step or 0} of {row.cell.steps} steps" if row.cell.steps else ""
        print(f"{row.status:10s} {row.cell.name}  {steps}" + (f"  {row.reason}" if row.reason else ""))
    print(summary(rows))
    return EXIT_DONE


def _report(folder: Path) -> int:
    """Write the report, as far as the study is; 0 when nothing is missing in it."""
    from launch.study.collect import collect
    from launch.study.report import summary, write_report

    rows = collect(folder)
    try:
        page = write_report(folder, rows)
        print(f"report: {page}")
    except UserError as error:
        if "matplotlib" not in error.problem:
            raise
        print(f"no report: {error}", file=sys.stderr)
    rows = [row for row in rows if row.status != "left out"]
    print(summary(rows))
    measured = not load_study(folder / "study.yaml").evaluate or all(row.scores for row in rows)
    return EXIT_DONE if measured and all(row.status == "done" for row in rows) else 1


COMMANDS = {
    "report": "Make the report again from what the cells have now.",
    "status": "How far each cell is.",
    "cancel": "Cancel the jobs of a study.",
}

if __name__ == "__main__":
    sys.exit(main())
