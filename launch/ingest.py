"""Ingest films over a SLURM array: python -m launch.slurm ingest FILM... --out SHARDS [options].

The films are split into parts, in their order. Each part is an element of an array that writes shards of its own; when
all are done the shards are put together in SHARDS. The same command again goes on with what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import lmp
from launch.executor import CHECKOUT, executor, submit_array
from launch.follow import one_process
from launch.ingest_part import PATHS, Part, read_part
from launch.slurm_state import RESTART_SECONDS, answers, exit_code, known_state, slurm
from launch.snapshot import Snapshot
from lmp.cluster import ClusterConfig, cluster_faults
from lmp.config import build, raise_faults, read_raw
from lmp.errors import EXIT_RESTARTS, EXIT_USER, UserError
from lmp.films.commands import add_options, settings_of, tell
from lmp.train.run_folder import write_atomic

FOLDER = ".lmp-parts"
"""Hidden folder in that of the shards: the parts, the code that their jobs run, and the jobs' logs."""
PLAN = "plan.json"
OPTIONS = [
    *("cpus_per_task", "gpus_per_node", "memory", "time", "partition", "account", "qos", "constraint", "reservation"),
    *("nodelist", "exclude", "comment", "gres", "environment", "signal_seconds"),
]
"""Keys of the cluster section that have an option of their own. A part is one process."""
_PARTS_PER_PLACE, _MOST_PARTS = 4, 1000  # without --parts; the sites' usual MaxArraySize is 1001


def main(words: Sequence[str]) -> int:
    """Run the command.

    Returns:
        0: all films are in the shards; 2: some were skipped; 3: some parts are not done, and there are no shards.

    Raises:
        UserError: films, settings or folder that cannot be used, or no SLURM here.
    """
    arguments = parse(words)
    cluster = one_process(cluster_of(arguments))
    from lmp.data.leave_out import LeaveOut
    from lmp.data.merge import merge
    from lmp.films.ingest import IngestReport, check, choose

    films, report = choose(arguments.films, LeaveOut.read(arguments.leave_out))
    if not films:
        return tell(report, arguments.out)
    settings = settings_of(arguments)
    out = arguments.out.absolute()
    concurrency = arguments.concurrency or cluster.array_parallelism
    count = parts_of(len(films), asked=arguments.parts, concurrency=concurrency, folder=out / FOLDER)
    if not (out / FOLDER / PLAN).exists():
        check(films, **settings)
        _check_free(out, overwrite=arguments.overwrite)
    told = {name: str(value.absolute()) if name in PATHS and value else value for name, value in settings.items()}
    contents = [
        {"settings": told, "films": [_absolute(dataclasses.asdict(film)) for film in share]}
        for share in (films[n * len(films) // count : (n + 1) * len(films) // count] for n in range(count))
    ]
    array = IngestArray(
        out / FOLDER,
        [len(content["films"]) for content in contents],
        cluster,
        concurrency=concurrency,
        retries=arguments.retries,
        # Each has networks of its own, which a GPU's memory must hold beside each other.
        workers=arguments.workers or (cluster.cpus_per_task if arguments.device == "cpu" else 1) or 1,
        poll=arguments.poll,
    )
    if arguments.dry_run:
        print(array.script())
        return 0
    with _locked(out / FOLDER):
        _write_plan(out / FOLDER, contents)
        try:
            given_up = array.run()
        except KeyboardInterrupt:
            print(f"the jobs go on; the same command watches them again, and `scancel {array.ids()}` ends them")
            return 130
        if given_up:
            return _tell_given_up(given_up, out / FOLDER)
        parts = array.parts
        for part in parts:
            report.add(IngestReport.from_json(json.loads(part.report.read_text(encoding="utf-8"))))
        if report.films:
            merge([part.shards for part in parts if (part.shards / "manifest.json").exists()], out, overwrite=True)
        # Out of the way first, whole: the last jobs may still be writing their logs.
        over = (out / FOLDER).rename(out / f"{FOLDER}-{time.time_ns():x}")
        shutil.rmtree(over, ignore_errors=True)
        if not report.films:
            with contextlib.suppress(OSError):
                out.rmdir()
    return tell(report, arguments.out)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options: those of `lmp ingest`, those of the array, and those of the cluster."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm ingest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.set_defaults(workers=None)  # as many as the job has cores, where there is no GPU
    parser.add_argument("--parts", type=int, metavar="N", help="elements of the array (default: 4 x concurrency)")
    parser.add_argument("--concurrency", type=int, metavar="N", help="of them at a time (cluster.array_parallelism)")
    parser.add_argument("--retries", type=int, default=3, metavar="N", help="how often a part is tried again (3)")
    parser.add_argument(
        "--cluster", type=Path, metavar="FILE", help="YAML with a `cluster` section; others are ignored"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print the batch script, write nothing")
    parser.add_argument("--poll", type=float, default=5.0, metavar="SECONDS", help="between two looks at the jobs")
    for key in OPTIONS:
        meaning = (ClusterConfig.model_fields[key].description or "").replace("%", "%%")
        parser.add_argument(f"--{key.replace('_', '-')}", metavar="X", help=meaning)
    arguments = parser.parse_args(words)
    for name in ("parts", "concurrency", "workers"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}", remedy="give 1 or more")
    if arguments.retries < 0:
        raise UserError(f"--retries {arguments.retries}", remedy="give 0 or more")
    return arguments


def cluster_of(arguments: argparse.Namespace) -> ClusterConfig:
    """What each part asks of SLURM.

    Raises:
        UserError: naming every fault.
    """
    given = {key: value for key in OPTIONS if (value := getattr(arguments, key)) is not None}
    section = read_raw(arguments.cluster).get("cluster") if arguments.cluster else {}
    if not isinstance(section, dict):
        raise UserError(f"{arguments.cluster} has no section `cluster`", remedy="write cluster: {partition: ...}")
    cluster, faults = build(ClusterConfig, {**section, **given})
    raise_faults(faults + (cluster_faults(cluster) if cluster else []), str(arguments.cluster or "the options"))
    assert cluster is not None
    if cluster.environment is not None and not Path(cluster.environment).is_file():
        raise UserError(f"--environment {cluster.environment}: no such file", remedy="name a shell file that is there")
    return cluster


def parts_of(films: int, *, asked: int | None, concurrency: int, folder: Path) -> int:
    """Into how many parts so many films are split; as before where an earlier start has split them.

    Raises:
        UserError: the earlier start had another number of parts.
    """
    wanted = min(films, asked or min(_PARTS_PER_PLACE * concurrency, _MOST_PARTS))
    if not (folder / PLAN).exists():
        return wanted
    before = json.loads((folder / PLAN).read_text(encoding="utf-8"))["parts"]
    if asked and before != wanted:
        raise UserError(
            f"{folder} has {before} parts, and --parts {asked} asks for {wanted}",
            remedy=f"leave --parts out to go on, or remove {folder} to begin anew",
        )
    return before


class IngestArray:
    """Submits the parts that are not done, and watches them.

    What is under way is found by the jobs' names, so a launcher that ends or is killed loses nothing.

    Args:
        folder: of the ingest.
        films: of each part.
        cluster: what a part asks for.
        concurrency: parts at a time.
        retries: how often a part whose job failed is submitted again, and see `read_part`.
        workers: of a part.
        poll: seconds between two looks at the jobs.
    """

    def __init__(
        self,
        folder: Path,
        films: Sequence[int],
        cluster: ClusterConfig,
        *,
        concurrency: int,
        retries: int,
        workers: int,
        poll: float,
    ) -> None:
        self.parts = [Part(folder, number) for number in range(len(films))]
        self._folder, self._films, self._cluster = folder, films, cluster
        self._concurrency, self._retries, self._workers, self._poll = concurrency, retries, workers, poll
        self._jobs: dict[int, str] = {}  # of parts that have or had one in this start
        self._gone_since: dict[int, float] = {}
        self._failures: Counter[int] = Counter()

    def script(self) -> str:
        """The batch script, as it would be submitted."""
        return executor(self._folder / "slurm", self._cluster, name="lmp-ingest").script()

    def ids(self) -> str:
        """The ids of the arrays."""
        return " ".join(sorted({job.partition("_")[0] for job in self._jobs.values()}))

    def run(self) -> dict[int, str]:
        """Until every part is done or given up; returns why, for those given up.

        Raises:
            UserError: no SLURM here, or sbatch refused.
        """
        given_up: dict[int, str] = {}
        waiting = {part.number for part in self.parts if not part.report.exists()}
        if waiting and not answers():
            raise UserError("SLURM does not answer here", remedy="run on a login node of the cluster")
        with _Shown(sum(self._films)) as shown:
            while True:
                active = self._active() if waiting else {}
                if active is not None:
                    waiting = {n for n in waiting if not self.parts[n].report.exists()}
                    missing = [n for n in sorted(waiting) if n not in active and not self._goes_on(n, given_up)]
                    waiting -= given_up.keys()
                    self._submit([n for n in missing if n in waiting], under_way=len(active))
                    shown.tell(*self._progress(waiting, active))
                    if not waiting:
                        return given_up
                time.sleep(self._poll)

    def _active(self) -> dict[int, str] | None:
        """Parts that wait or run, and the state of each; None where SLURM does not answer."""
        listed = {
            _job_name(path.parent.name): json.loads(path.read_text(encoding="utf-8"))
            for path in (self._folder / "slurm").glob("*/parts.json")
        }
        if not listed:
            return {}
        told = slurm("squeue", "-h", "-r", "-o", "%j %F_%K %T", "--name", ",".join(listed))
        if told.returncode:
            return None
        active: dict[int, str] = {}
        for line in told.stdout.splitlines():
            name, job, state = line.split()
            index = job.rpartition("_")[2]
            if name in listed and index.isdigit():
                number = listed[name][int(index)]
                active[number], self._jobs[number] = state, job
                self._gone_since.pop(number, None)
        return active

    def _goes_on(self, number: int, given_up: dict[int, str]) -> bool:
        """Whether a part that is not in the queue is not to be submitted: yet, or any more."""
        if number not in self._jobs:
            return False
        since = self._gone_since.setdefault(number, time.monotonic())
        if time.monotonic() - since < RESTART_SECONDS:  # SLURM may be about to start it again
            return True
        job = self._jobs[number]
        state = known_state(job)
        if state is None:
            return True
        code, words = exit_code(job), self._last_words(job)
        del self._jobs[number], self._gone_since[number]
        self._failures[number] += 1
        reason = f"{state}{f', exit code {code}' if code else ''}: {words}"
        final = state == "CANCELLED" or code in (EXIT_USER, EXIT_RESTARTS)
        if final or self._failures[number] > self._retries:
            given_up[number] = reason
        else:
            print(f"part {number} is tried again: {reason}", flush=True)
        return False

    def _submit(self, numbers: Sequence[int], *, under_way: int) -> None:
        if not numbers:
            return
        token, at_once = f"{time.time_ns():x}", min(len(numbers), max(1, self._concurrency - under_way))
        code = Snapshot.of(CHECKOUT, self._folder)
        code.take()
        folder = self._folder / "slurm" / token
        folder.mkdir(parents=True)
        # On disk before the jobs are: what a kill keeps from being known is found by the jobs' name.
        write_atomic(folder / "parts.json", json.dumps(numbers))
        made = executor(
            folder,
            self._cluster,
            name=_job_name(token),
            array_parallelism=at_once,
            code=code.folder,
        )
        calls = [(str(self._folder), number, self._retries, self._workers) for number in numbers]
        for number, job in zip(numbers, submit_array(made, read_part, calls), strict=True):
            self._jobs[number] = str(job.job_id)
        array = self._jobs[numbers[0]].partition("_")[0]
        print(f"array {array}: {len(numbers)} parts, {at_once} at a time", flush=True)

    def _progress(self, waiting: set[int], active: Mapping[int, str]) -> tuple[int, str]:
        """Films that are read, and a line."""
        read = sum(self.parts[n].read() for n in waiting)
        read += sum(films for n, films in enumerate(self._films) if self.parts[n].report.exists())
        running = sum(state != "PENDING" for state in active.values())
        done = sum(part.report.exists() for part in self.parts)
        return read, f"{done} of {len(self.parts)} parts done, {running} at work"

    def _last_words(self, job: str) -> str:
        """What a job's log says of its end."""
        for log in (self._folder / "slurm").glob(f"*/{job}_0_log.out"):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            faults = [line for line in lines if re.match(r"error: |\w*(Error|Exception)\b", line)]
            return f"{(faults or lines or ['an empty log'])[-1]} (see {log})"
        return "it left no log"


class _Shown:
    """A bar of films; without a terminal a line for each change."""

    def __init__(self, films: int) -> None:
        console = Console(stderr=True)
        self._bar = Progress(console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=films)
        self._films, self._told = films, ""

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, read: int, line: str) -> None:
        self._bar.update(self._task, completed=read, description=line)
        if self._bar.disable and line != self._told:
            print(f"{line}, {read} of {self._films} films read", flush=True)
            self._told = line


def _absolute(film: dict[str, Any]) -> dict[str, Any]:
    """A film whose local files are named so that every node finds them."""
    from lmp.data.storage import is_url

    for source in (film["file"], film["shots"], film["subtitles"]):
        if source is not None and not is_url(source["location"]):
            source["location"] = str(Path(source["location"]).absolute())
    return film


def _check_free(out: Path, *, overwrite: bool) -> None:
    from lmp.data.shards import held_files

    if out.is_dir() and not overwrite and (held := held_files(out, "films")):
        raise UserError(
            f"{out} already holds {held[0].name}",
            remedy="give an empty folder, or ask for overwriting with --overwrite",
        )


def _write_plan(folder: Path, contents: Sequence[Mapping[str, Any]]) -> None:
    """Write the lists of the parts, or find that they are there already.

    Raises:
        UserError: the folder holds parts of other films, or of other settings.
    """
    texts = [json.dumps(content) for content in contents]
    digest = hashlib.sha256("\n".join([lmp.__version__, *texts]).encode()).hexdigest()
    plan = json.dumps({"parts": len(texts), "digest": digest})
    if not (folder / PLAN).exists():
        for number, text in enumerate(texts):
            write_atomic(Part(folder, number).films, text)
        write_atomic(folder / PLAN, plan)
    elif (folder / PLAN).read_text(encoding="utf-8") != plan:
        raise UserError(
            f"{folder} holds an ingest of other films, or with other settings, that is not finished",
            remedy="give the command that began it, or cancel its jobs and remove that folder",
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One launcher at a time; makes the folder."""
    from lmp.data.publish import lock_folder

    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    try:
        yield
    finally:
        os.close(lock)


def _tell_given_up(given_up: Mapping[int, str], folder: Path) -> int:
    for number, reason in sorted(given_up.items()):
        print(f"error: part {number} is not done: {reason}", file=sys.stderr)
    print(f"{len(given_up)} parts are not done, the others wait in {folder}; the same command tries these again")
    return EXIT_RESTARTS


def _job_name(token: str) -> str:
    return f"lmp-ingest-{token}"
