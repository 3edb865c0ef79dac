"""Start the processes of one run on this machine: python -m launch.local CONFIG -n 2 [a.b=c ...] [--run RUN].

Rank 0 speaks on the terminal; ranks have logs in RUN/logs. When one process fails, all are ended and the
error of the first to fail is shown. SIGTERM, SIGINT and SIGUSR2 are passed on once, so that the run saves and stops.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lmp.config import load_config
from lmp.errors import EXIT_AGAIN, EXIT_DONE, EXIT_USER, UserError

GRACE_SECONDS = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code of the run."""
    parser = argparse.ArgumentParser(prog="python -m launch.local", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("-n", "--processes", type=int, default=1)
    parser.add_argument("--run", type=Path, help="run folder (default: runs/NAME)")
    parser.add_argument("--resume", choices=["auto", "never"], default="auto")
    parser.add_argument("--new-data", action="store_true", help="go on with an epoch of other data than before")
    arguments = parser.parse_intermixed_args(argv)
    try:
        if arguments.processes < 1:
            raise UserError(f"-n {arguments.processes}: at least one process is needed", remedy="give -n 1 or more")
        config = load_config(arguments.config, arguments.overrides)
        command = [sys.executable, "-m", "lmp.cli", "train", str(arguments.config), *arguments.overrides]
        run = arguments.run or Path("runs") / config.name
        command += ["--run", str(run), "--resume", arguments.resume]
        if arguments.new_data:
            command.append("--new-data")
        return launch(command, run, arguments.processes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER


def launch(command: Sequence[str], run: Path, processes: int) -> int:
    """Start `processes` copies of a command as the ranks of one run and wait for them.

    Returns:
        0 if all ended well, 75 if a process was killed, else the exit code of the first that failed.
    """
    logs = run / "logs"
    made = not run.exists()
    logs.mkdir(parents=True, exist_ok=True)
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "PYTHONUNBUFFERED": "1",
    }
    ranks: list[subprocess.Popen[bytes]] = []
    files = [logs / f"rank-{rank:04d}.log" for rank in range(processes)]

    def pass_on(number: int, _: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        for rank, file in enumerate(files):
            with file.open("ab") as log:
                # A session of its own: Ctrl-C reaches the ranks once, through this process.
                ranks.append(
                    subprocess.Popen(
                        command,
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=None if rank == 0 else log,
                        stderr=None if rank == 0 and sys.stderr.isatty() else log,
                        start_new_session=True,
                        preexec_fn=_die_with_parent,
                    )
                )
        code, failed = _wait(ranks)
    finally:
        _end(ranks)
        for number, handler in before.items():
            signal.signal(number, handler)
    if code != EXIT_DONE:
        _explain(failed, code, files[failed])
        if made and code == EXIT_USER:
            _remove_if_only_logs(run)
    return code


def _wait(ranks: list[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Wait for all, or for the first failure: (exit code, its rank)."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(code, rank) for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            # A user's mistake or a kill says more than the broken connection of a peer.
            code, rank = min(failed, key=lambda pair: (pair[0] != EXIT_USER, pair[0] > 0, pair[1]))
            return (code if code > 0 else EXIT_AGAIN), rank
        if all(code == 0 for code in codes):
            return EXIT_DONE, 0
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs: ask, then kill."""
    alive = [rank for rank in ranks if rank.poll() is None]
    for rank in alive:
        rank.terminate()
    deadline = time.monotonic() + (GRACE_SECONDS if not alive or len(alive) == len(ranks) else 1.0)
    for rank in alive:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


def _die_with_parent() -> None:
    """Linux: a rank must not outlive a launcher that was killed."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _explain(rank: int, code: int, log: Path) -> None:
    if rank == 0 and sys.stderr.isatty():  # it has spoken there itself; its log is of other starts
        if code != EXIT_USER:
            print(f"rank {rank} failed with exit code {code}", file=sys.stderr)
    else:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        if code == EXIT_USER:
            told = [line for line in lines if line.startswith("error: ")]
            print(told[-1] if told else "\n".join(lines[-5:]), file=sys.stderr)
        else:
            print(f"rank {rank} failed with exit code {code}; the end of {log}:", file=sys.stderr)
            print("\n".join(lines[-25:]), file=sys.stderr)
    if code == EXIT_AGAIN:
        print(
            "the run hung or lost a process: start the same command again, and it goes on from its newest checkpoint",
            file=sys.stderr,
        )


def _remove_if_only_logs(run: Path) -> None:
    """A start that was refused leaves no run folder behind."""
    for file in (run / "logs").glob("rank-*.log"):
        file.unlink()
    for folder in (run / "logs", run):
        if not any(folder.iterdir()):
            folder.rmdir()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
