"""The `lmp` command: the jobs of a single process. Several processes are started by `python -m launch.local`."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmp.errors import EXIT_AGAIN, EXIT_DONE, EXIT_USER, UserError

if TYPE_CHECKING:
    from lmp.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = parse(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 128 + signal.SIGPIPE


def _reader_has_gone() -> bool:
    """Whether nobody reads the output any more, as after `| head`; what is left of it then goes nowhere."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in watch.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; overrides may stand before and after options, which argparse alone does not take."""
    top = parser()
    arguments, more = top.parse_known_args(argv)
    if more and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in more)):
        top.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        arguments.overrides = [*arguments.overrides, *more]
    return arguments


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="lmp", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    from lmp.data import commands as data
    from lmp.downstream import commands as downstream
    from lmp.films import commands as films
    from lmp.scaling import commands as bench
    from lmp.scaling import parity, plan_command

    films.register(commands)
    shards = commands.add_parser("data", help="shards").add_subparsers(dest="what", required=True)
    data.register(shards)
    replay = shards.add_parser("replay", help="what a step of a run showed: films, shots, tensors, masks")
    replay.add_argument("folder", type=Path, metavar="RUN")
    replay.add_argument("overrides", nargs="*", metavar="a.b=c")
    replay.add_argument("--step", type=int, required=True, help="from 1")
    replay.add_argument("--out", type=Path, metavar="FILE.safetensors", help="for the tensors")
    replay.set_defaults(run=_replay)
    bench.register(commands.add_parser("bench", help="measurements").add_subparsers(dest="what", required=True))
    plan_command.register(commands)

    train = commands.add_parser("train", help="pretrain, as one process of a run")
    train.add_argument("config", type=Path)
    train.add_argument("overrides", nargs="*", metavar="a.b=c")
    train.add_argument("--run", dest="folder", type=Path, help="run folder (default: runs/NAME)")
    train.add_argument("--resume", choices=["auto", "never"], default="auto")
    train.add_argument("--new-data", action="store_true", help="go on with an epoch of other data than before")
    train.add_argument("--dry-run", action="store_true", help="build everything, make the worst step, write nothing")
    train.add_argument("--json", type=Path, metavar="REPORT.json", help="of a dry run, for lmp plan --calibrate")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="measure a run on held-out shards")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="with --task also an exported folder")
    evaluate.add_argument("shards", nargs="+", type=Path)
    evaluate.add_argument(
        "--train-shards", nargs="*", type=Path, default=[], help="to fit probes and the linear rival on"
    )
    evaluate.add_argument("--labels", type=Path, help="folder of KEY.labels.json, or of a benchmark's own files")
    evaluate.add_argument("--out", type=Path, help="report folder (default: RUN/evaluation)")
    evaluate.add_argument("--seeds", type=int, default=3)
    evaluate.add_argument("--step", type=int)
    evaluate.add_argument("--check", action="store_true", help="exit with 1 unless the model beats its rivals")
    downstream.add_task_options(evaluate)
    evaluate.set_defaults(run=_evaluate)
    downstream.register(commands)

    config = commands.add_parser("config", help="read configurations").add_subparsers(dest="what", required=True)
    show = config.add_parser("show", help="print the resolved configuration")
    show.add_argument("config", type=Path)
    show.add_argument("overrides", nargs="*", metavar="a.b=c")
    show.set_defaults(run=_config_show)
    config.add_parser("keys", help="every key, its default and meaning").set_defaults(run=_config_keys)

    doctor = commands.add_parser("doctor", help="what this machine and installation have, what they lack, and why")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)
    parity.register(doctor.add_subparsers(dest="what", metavar="parity"))

    demo = commands.add_parser("demo", help="the whole path on films made here")
    demo.add_argument("--out", type=Path, default=Path("demo-out"))
    demo.set_defaults(run=_demo)
    return top


def _replay(arguments: argparse.Namespace) -> int:
    from lmp.train.replay import replay

    found = replay(arguments.folder, arguments.step, arguments.overrides)
    print("\n".join(found.lines()))
    if arguments.out:
        found.write(arguments.out)
        print(f"tensors: {arguments.out}")
    return EXIT_DONE


def _train(arguments: argparse.Namespace) -> int:
    from lmp.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        return _dry_run(config, arguments.json)
    from lmp.parallel.mesh import lost_peer
    from lmp.train.trainer import train

    folder = arguments.folder or Path("runs") / config.name
    try:
        outcome = train(config, folder, resume=arguments.resume, new_data=arguments.new_data)
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        what = str(error).splitlines()[0][:300]
        print(f"error: another process of the run is gone: {what} -> start again to go on", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_AGAIN)  # without unwinding, which may wait for the lost one
    if os.environ.get("RANK", "0") == "0":
        end = "finished" if outcome.finished else "stopped"
        print(f"{end} at step {outcome.step}: {outcome.reason}; see {folder}")
    return EXIT_DONE


def _dry_run(config: Config, out: Path | None) -> int:
    from lmp.train.dry_run import dry_run
    from lmp.train.run_folder import write_atomic

    report = dry_run(config)
    if report is None:
        return EXIT_DONE
    print("\n".join(report.lines()))
    if out is not None:
        write_atomic(out, json.dumps(report.to_json(), indent=1) + "\n")
        print(f"report: {out}")
    return EXIT_DONE if report.fits else EXIT_USER


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.task is not None:
        from lmp.downstream.commands import evaluate_task

        return evaluate_task(arguments)
    from lmp.downstream.evaluate import evaluate
    from lmp.downstream.results import verdicts

    out = arguments.out or arguments.folder / "evaluation"
    result = evaluate(
        arguments.folder,
        arguments.shards,
        labels=arguments.labels,
        train_shards=arguments.train_shards or None,
        out=out,
        seeds=arguments.seeds,
        step=arguments.step,
    )
    judged = verdicts(result)
    for verdict in judged:
        print(f"{'pass' if verdict.passed else 'FAIL'}  {verdict.name}: {verdict.detail}")
    print(f"report: {out / 'report.md'}")
    return 1 if arguments.check and not all(verdict.passed for verdict in judged) else EXIT_DONE


def _config_show(arguments: argparse.Namespace) -> int:
    from lmp.config import load_config

    print(load_config(arguments.config, arguments.overrides).dump(), end="")
    return EXIT_DONE


def _config_keys(_: argparse.Namespace) -> int:
    from lmp.config import config_help

    for key, default, meaning in config_help():
        print(f"{key}  [{default}]  {meaning}")
    return EXIT_DONE


def _doctor(arguments: argparse.Namespace) -> int:
    from lmp.scaling.doctor import doctor

    return doctor(as_json=arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from lmp.demo import demo

    return demo(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
