"""A run as a job of a SLURM cluster.

    python -m launch.slurm CONFIG --nodes 2 --gpus-per-node 8 --partition P [--run RUN] [--dry-run] [a.b=c ...]
    python -m launch.slurm status RUN        what SLURM and the run folder tell
    python -m launch.slurm tail RUN [-f]     the log of a rank
    python -m launch.slurm cancel RUN        save, stop, and not go back to the queue
    python -m launch.slurm ingest FILM...    films become shards, by an array of jobs (launch.ingest)

Options stand for keys of the configuration's `cluster` section and win over it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.executor import executor, submit, submit_array
from launch.slurm_state import job_state, wait
from lmp.cluster import ClusterConfig
from lmp.config import load_config
from lmp.errors import EXIT_DONE, EXIT_USER, UserError

__all__ = ["executor", "job_state", "submit", "submit_array", "wait"]

OPTIONS = [
    *("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "memory", "time", "partition", "account", "qos"),
    *("constraint", "reservation", "nodelist", "exclude", "comment", "gres", "environment", "signal_seconds"),
]
"""Keys of the cluster section that have an option of their own; every other is given as cluster.KEY=VALUE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"status": _status, "tail": _tail, "cancel": _cancel, "ingest": _ingest}
    try:
        if words and words[0] in commands:
            return commands[words[0]](words[1:])
        return _submit(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER


def _submit(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--run", type=Path, help="run folder, which all nodes see (default: runs/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="check, print the batch script, write nothing")
    parser.add_argument("--resume", choices=["auto", "never"], default="auto")
    parser.add_argument("--new-data", action="store_true", help="go on with an epoch of other data than before")
    for key in OPTIONS:
        meaning = (ClusterConfig.model_fields[key].description or "").replace("%", "%%")
        parser.add_argument(f"--{key.replace('_', '-')}", metavar="X", help=meaning)
    arguments = parser.parse_intermixed_args(words)
    # JSON is YAML: a partition called `on` or `1e3` stays a text.
    options = [
        f"cluster.{key}={value if value.isdigit() else json.dumps(value)}"
        for key in OPTIONS
        if (value := getattr(arguments, key)) is not None
    ]
    config = load_config(arguments.config, [*arguments.overrides, *options])

    from launch.submission import Submission

    submission = Submission(
        config=config,
        run=(arguments.run or Path("runs") / config.name).resolve(),
        command=["python", "-m", "launch.slurm", *words],
        more=["--new-data"] if arguments.new_data else [],
    )
    if submission.finished is not None:
        print(f"{submission.run}: the run was finished already, at step {submission.finished}")
        return EXIT_DONE
    submission.check(resume=arguments.resume)
    if arguments.dry_run:
        print(submission.script())
        return EXIT_DONE
    record = submission.submit()
    cluster = config.cluster
    print(f"job {record.job}: {cluster.nodes} nodes x {cluster.tasks} processes; run folder {submission.run}")
    print(f"watch it with: python -m launch.slurm status {submission.run}")
    return EXIT_DONE


def _status(words: Sequence[str]) -> int:
    from launch.watch import status, status_json

    parser = _run_parser("status", "what SLURM and the run folder tell")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(words)
    print(status_json(arguments.run) if arguments.json else "\n".join(status(arguments.run).lines()))
    return EXIT_DONE


def _tail(words: Sequence[str]) -> int:
    from launch.watch import tail

    parser = _run_parser("tail", "the end of a rank's log")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("-n", "--lines", type=int, default=25)
    parser.add_argument("-f", "--follow", action="store_true")
    arguments = parser.parse_args(words)
    tail(arguments.run, rank=arguments.rank, lines=arguments.lines, follow=arguments.follow)
    return EXIT_DONE


def _cancel(words: Sequence[str]) -> int:
    from launch.watch import cancel

    parser = _run_parser("cancel", "save, stop, and not go back to the queue")
    parser.add_argument("--now", action="store_true", help="at once; what came after the newest checkpoint is lost")
    arguments = parser.parse_args(words)
    print(cancel(arguments.run, now=arguments.now))
    return EXIT_DONE


def _ingest(words: Sequence[str]) -> int:
    from launch.ingest import main as ingest

    return ingest(words)


def _run_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m launch.slurm {command}", description=description)
    parser.add_argument("run", type=Path, metavar="RUN")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `status RUN | head` is no error
    sys.exit(main())
