"""One process of a training job: python -m launch.job RUN CONFIG [a.b=c ...], one task of srun for each GPU.

submitit runs the same as TrainJob(run, arguments). It reads its place from SLURM's variables, trains, and leaves with
0 (finished, or stopped and the job goes back to the queue), 2 (the user's mistake), 3 (too many restarts, crash loop)
or 75 (try again). The run folder is the only state, so any start goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from launch.handover import tell
from launch.network import set_defaults
from launch.place import Place
from launch.record import JobRecord, check_free, read_record
from launch.restarts import ledger, newest_checkpoint, refused
from lmp.config import Config, load_config
from lmp.errors import EXIT_AGAIN, EXIT_DONE, EXIT_RESTARTS, EXIT_USER, UserError
from lmp.train.run_folder import RunFolder


@dataclass(frozen=True)
class TrainJob:
    """A run as what each task of a SLURM job calls; plain data, so that a pickle of it outlives many restarts.

    Args:
        run: the run folder, seen by all nodes.
        arguments: CONFIG [a.b=c ...] [--resume auto|never] [--new-data], as of `lmp train`.
    """

    run: str
    arguments: list[str]

    def __call__(self) -> dict[str, Any]:
        """Train. Returns how the run was finished; does not return when it was not."""
        with os.fdopen(os.dup(1), "w", buffering=1) as console:
            try:
                return self._run(console)
            except UserError as error:
                print(f"error: {error}", file=console)
                _leave(EXIT_USER, f"error: {error}", told=EXIT_USER)
            except Exception as error:
                # Mostly a dead peer. No result may be left behind: the batch script puts the job back in the queue.
                traceback.print_exc()
                print(f"{type(error).__name__}: {error}", file=console)
                _leave(EXIT_AGAIN, f"leave with {EXIT_AGAIN}: to be tried again")

    def _run(self, console: TextIO) -> dict[str, Any]:
        place = Place.read()
        Interruption().install()
        folder = RunFolder(Path(self.run))
        _log_to(folder, place, console)
        if place.rank == 0:
            tell("run", str(folder.path.resolve()))
        arguments = parser().parse_args([self.run, *self.arguments])
        config = load_config(arguments.config, arguments.overrides)
        finished = folder.finished_step()
        if finished is not None and finished >= config.train.steps:
            # SLURM 24.11 starts a finished job again that was requeued in its grace time.
            print(f"the run was finished already, at step {finished}")
            return {"step": finished, "finished": True}
        if place.rank == 0:
            self._launch(folder, place, config, console)
        place.export()
        set_defaults(job=place.job, restart=place.restart)
        from lmp.train.trainer import train

        outcome = train(config, folder.path, resume=arguments.resume, new_data=arguments.new_data)
        told = f"{'finished' if outcome.finished else 'stopped'} at step {outcome.step}: {outcome.reason}"
        print(told, flush=True)
        if place.rank == 0:
            print(told, file=console)
        if not outcome.finished:
            if place.rank == 0 and outcome.requeue:
                tell("requeue", f"stopped by {outcome.reason} at step {outcome.step}")
            # At once, and all with 0: srun would end the others at the first that leaves with anything else.
            _leave(EXIT_DONE, "")
        return {"step": outcome.step, "finished": True}

    def _launch(self, folder: RunFolder, place: Place, config: Config, console: TextIO) -> None:
        """Rank 0, before torch is imported: may this start go on?"""
        checkpoint = newest_checkpoint(folder)
        facts: dict[str, Any] = {"job": place.job, "restart": place.restart}
        if shutil.which("scontrol"):
            check_free(folder.path, job=place.job)
        self._keep_record(folder, place)
        reason = refused(ledger(folder), **facts, checkpoint=checkpoint, cluster=config.cluster)
        if folder.stop.exists():
            folder.stop.unlink()
            if place.restart:
                # Asked to stop, but it ended otherwise before it could. The exit code makes srun end the other
                # processes. In a first start the file was meant for an earlier job.
                _leave(EXIT_AGAIN, f"stopped by the file {folder.stop.name}", told=EXIT_DONE)
        if reason is not None:
            folder.note("refused", **facts, reason=reason)
            remedy = f"read {folder.logs / 'rank-0000.log'}, mend it, and submit again"
            print(f"error: {reason} -> {remedy}", file=console)
            _leave(EXIT_RESTARTS, f"error: {reason} -> {remedy}", told=EXIT_RESTARTS)
        folder.note("launch", **facts, checkpoint=checkpoint, world_size=place.world_size, code=str(_code()))

    def _keep_record(self, folder: RunFolder, place: Place) -> None:
        """A job that `python -m launch.slurm` has not submitted is found by its `status` and `cancel` too."""
        before = read_record(folder.path)
        if before is not None and before.job == place.job:
            return
        JobRecord(
            job=place.job,
            cluster=os.environ.get("SLURM_CLUSTER_NAME"),
            submitted=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            directory=str(Path.cwd()),
            command=["python", "-m", "launch.job", self.run, *self.arguments],
            code=str(_code()),
            config=str(Path(self.arguments[0]).resolve()),
            world_size=place.world_size,
            earlier=[*before.earlier, before.job] if before else [],
        ).write(folder.path)


class Interruption:
    """SIGTERM and SIGUSR2 before the trainer listens for them are kept until it does.

    These handlers take the place of submitit's, which would end rank 0 alone.
    """

    def __init__(self) -> None:
        self._process = os.getpid()

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._keep)

    def _keep(self, number: int, _: FrameType | None) -> None:
        if os.getpid() == self._process:
            again = threading.Timer(0.5, os.kill, (self._process, number))
            again.daemon = True
            again.start()
        elif number == signal.SIGTERM:  # a forked child has inherited this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _log_to(folder: RunFolder, place: Place, console: TextIO) -> None:
    """Send what this process prints to the run folder's log of its rank, one file for all restarts."""
    folder.logs.mkdir(parents=True, exist_ok=True)
    file = folder.logs / f"rank-{place.rank:04d}.log"
    print(f"rank {place.rank} of {place.world_size} on {platform.node()} writes to {file}", file=console)
    sys.stdout.flush()
    sys.stderr.flush()
    with file.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable()
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    print(f"--- {began} job {place.job}, restart {place.restart}: {platform.node()}, code {_code()}", flush=True)


def _code() -> Path:
    return Path(__file__).resolve().parents[1]


def _leave(code: int, words: str, *, told: int | None = None) -> NoReturn:
    """End this process without unwinding: no peer may be waited for, no result be left.

    Args:
        code: the exit code.
        words: the last line of the log.
        told: what the batch script is to end with, whatever becomes of the other processes.
    """
    if told is not None:
        tell("exit", f"{told} {words}")
    if words:
        print(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parser() -> argparse.ArgumentParser:
    """RUN CONFIG [a.b=c ...] and the options of a start."""
    made = argparse.ArgumentParser(prog="python -m launch.job", description=(__doc__ or "").splitlines()[0])
    made.add_argument("run", type=Path, metavar="RUN")
    made.add_argument("config", type=Path, metavar="CONFIG")
    made.add_argument("overrides", nargs="*", metavar="a.b=c")
    made.add_argument("--resume", choices=["auto", "never"], default="auto")
    made.add_argument("--new-data", action="store_true", help="go on with an epoch of other data than before")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one task of a batch script."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_intermixed_args(words)
    more = ["--new-data"] if arguments.new_data else []
    TrainJob(
        str(arguments.run),
        [str(arguments.config), *arguments.overrides, "--resume", arguments.resume, *more],
    )()
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
