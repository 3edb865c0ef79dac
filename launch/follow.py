"""Evaluate a run's checkpoints as they appear: python -m launch.follow RUN [SHARDS...] [--task NAME LABELS SHARDS...]

Each checkpoint is measured once, as by `lmp evaluate`, on held-out shards and on benchmarks (frozen, no rivals): report
and results.json are in RUN/evaluation/step-00000120, the scores in RUN/tensorboard/evaluation at that step. Started
again it goes on with what is missing; it ends when the run is DONE and all is measured, with --once when what is there
is measured. With --slurm every evaluation is a job of its own on one GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmp.config import load_config
from lmp.errors import EXIT_DONE, EXIT_USER, UserError
from lmp.train.run_folder import RunFolder, write_atomic

ATTEMPTS = 2
"""How often one evaluation is started."""


class TaskRequest(NamedTuple):
    """A benchmark; as the options of `lmp evaluate --task`."""

    task: str
    labels: str
    shards: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """What a checkpoint is measured on; as the options of `lmp evaluate`. Shards or tasks may be empty."""

    shards: tuple[str, ...]
    train_shards: tuple[str, ...] = ()
    labels: str | None = None
    seeds: int = 3
    tasks: tuple[TaskRequest, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.follow", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("shards", nargs="*", help="held-out shards")
    parser.add_argument(
        "--task", nargs="+", action="append", default=[], metavar="WORD", help="NAME LABELS SHARDS...; may be repeated"
    )
    parser.add_argument("--train-shards", nargs="*", default=[], help="to fit probes and the linear rival on")
    parser.add_argument("--labels", help="folder of KEY.labels.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--once", action="store_true", help="measure what is there and end")
    parser.add_argument("--last", action="store_true", help="measure nothing but the last step of a finished run")
    parser.add_argument("--slurm", action="store_true", help="each as a SLURM job, by the run's cluster section")
    parser.add_argument("--poll", type=float, default=20.0, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        request = _request(arguments)
        if not arguments.run.is_dir():
            raise UserError(f"{arguments.run}: there is no such run folder", remedy="give the folder of a run")
        follow(
            arguments.run,
            request,
            once=arguments.once,
            last=arguments.last,
            slurm=arguments.slurm,
            poll=arguments.poll,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("interrupted; start again to go on", file=sys.stderr)
        return 130
    return EXIT_DONE


def _request(arguments: argparse.Namespace) -> Request:
    if short := [words for words in arguments.task if len(words) < 3]:
        raise UserError(f"--task {' '.join(short[0])}", remedy="give NAME LABELS SHARDS...")
    if not arguments.shards and not arguments.task:
        raise UserError("nothing to measure on", remedy="give held-out shards, or --task NAME LABELS SHARDS...")
    return Request(
        tuple(arguments.shards),
        tuple(arguments.train_shards),
        arguments.labels,
        seeds=arguments.seeds,
        tasks=tuple(TaskRequest(name, labels, tuple(shards)) for name, labels, *shards in arguments.task),
    )


def follow(run: Path, request: Request, *, once: bool, last: bool = False, slurm: bool = False, poll: float) -> None:
    """Measure checkpoint after checkpoint, until the run is done or, with `once`, until those there are measured.

    Raises:
        UserError: shards that do not fit the run, films both held out and trained on.
    """
    folder = RunFolder(run)
    given_up: set[int] = set()
    while True:
        done = folder.finished_step() is not None
        waiting = [step for step in unmeasured(run, last=last) if step not in given_up]
        if slurm:
            under_way = _submit(run, waiting, request, given_up)
        else:
            under_way = False
            for step in waiting[:1]:
                if not measure(run, step, request):
                    given_up.add(step)
        more = [step for step in unmeasured(run, last=last) if step not in given_up]
        if not under_way and not more and (once or done):
            return
        if slurm or not more:
            time.sleep(poll)


def unmeasured(run: Path, *, last: bool = False) -> list[int]:
    """Steps of the checkpoints that have no results yet; with `last` nothing but a finished run's last step."""
    folder = RunFolder(run)
    if last:
        step = folder.finished_step()
        steps = [] if step is None else [step]
    else:
        paths = folder.checkpoints.glob("step-*[0-9]")
        steps = sorted(int(path.name[5:]) for path in paths if (path / "manifest.json").is_file())
    return [step for step in steps if not results_of(run, step).is_file()]


def results_of(run: Path, step: int) -> Path:
    """Where the results of a step are."""
    return run / "evaluation" / f"step-{step:08d}" / "results.json"


def measure(run: Path, step: int, request: Request) -> bool:
    """Measure one checkpoint: its folder appears whole or not at all, after its scores are in TensorBoard.

    Returns:
        False where the checkpoint is gone (an older one, not kept) or damaged.

    Raises:
        UserError: as `lmp.downstream.evaluate.evaluate` and `lmp.downstream.evaluate_task.evaluate_tasks`.
    """
    final = results_of(run, step).parent
    partial = final.with_name(f"{final.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        results = _measured(run, step, request, partial)
        if not final.exists():
            _to_tensorboard(run, step, results)
            partial.replace(final)
    except UserError as error:
        if "no valid checkpoint" not in error.problem:
            raise
        print(f"step {step} is passed over: {error.problem}", flush=True)
        return False
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"step {step} is measured: {final}", flush=True)
    return True


def _measured(run: Path, step: int, request: Request, out: Path) -> dict[str, Any]:
    """Reports in `out`, and what results.json there says: of `lmp evaluate`, and `tasks` by name."""
    from lmp.downstream.evaluate import evaluate
    from lmp.downstream.evaluate_task import TaskSettings, evaluate_tasks

    results: dict[str, Any] = {}
    if request.shards:
        held_out = evaluate(
            run,
            [Path(folder) for folder in request.shards],
            labels=Path(request.labels) if request.labels else None,
            train_shards=[Path(folder) for folder in request.train_shards] or None,
            out=out,
            seeds=request.seeds,
            step=step,
        )
        results = held_out.as_dict()
    if request.tasks:
        results["tasks"] = {}
    for one in request.tasks:
        report = evaluate_tasks(
            run,
            [Path(folder) for folder in one.shards],
            name=one.task,
            labels=Path(one.labels),
            out=out / one.task.replace("/", "-"),
            settings=TaskSettings(seeds=request.seeds, rivals=False),
            step=step,
        )
        for found in report.results:
            scores = {name: asdict(score) for name, score in found.rows["model"].items()}
            results["tasks"][found.task] = {"metric": found.metric, "n": found.n, "scores": scores}
    if request.tasks:
        write_atomic(out / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def measure_finished(runs: Sequence[str], request: Request) -> None:
    """A job's work: the last step of each of these runs that is finished and not measured.

    Raises:
        RuntimeError: at the end, when some could not be measured.
    """
    _set_threads()
    failed = []
    for run in map(Path, runs):
        for step in unmeasured(run, last=True):
            try:
                measure(run, step, request)
            except Exception:
                # The other runs are measured all the same.
                traceback.print_exc()
                failed.append(run.name)
    if failed:
        raise RuntimeError(f"not measured: {', '.join(failed)}")


def measure_step(run: str, step: int, request: Request) -> None:
    """A job's work: one checkpoint."""
    _set_threads()
    measure(Path(run), step, request)


def _set_threads() -> None:
    """Before torch is imported: as many threads as the job has cores."""
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))


def _submit(run: Path, steps: Sequence[int], request: Request, given_up: set[int]) -> bool:
    """Submit what has no job; returns whether any job is under way."""
    from launch.executor import executor, submit
    from launch.slurm_state import may_go_on

    file = run / "evaluation" / "jobs.json"
    jobs: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    under_way = False
    for step in steps:
        started = jobs.setdefault(str(step), [])
        if started and may_go_on(started[-1]):
            under_way = True
        elif len(started) >= ATTEMPTS:
            print(f"step {step} is given up after {ATTEMPTS} jobs; see {run / 'evaluation' / 'slurm'}", flush=True)
            given_up.add(step)
        else:
            cluster = one_process(load_config(run / "config.yaml").cluster)
            made = executor(run / "evaluation" / "slurm", cluster, name=f"{run.name}-evaluation")
            started.append(str(submit(made, measure_step, str(run.resolve()), step, request).job_id))
            write_atomic(file, json.dumps(jobs) + "\n")
            print(f"step {step}: job {started[-1]}", flush=True)
            under_way = True
    return under_way


def one_process(cluster: Any) -> Any:
    """A cluster section for one process of the same kind."""
    gpus = None if cluster.gpus_per_node is None else 1
    return cluster.model_copy(update={"nodes": 1, "tasks_per_node": 1, "gpus_per_node": gpus})


def _to_tensorboard(run: Path, step: int, results: Mapping[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    # A folder of its own: what the run writes and purges on resume is not touched.
    with SummaryWriter(str(RunFolder(run).tensorboard / "evaluation")) as writer:
        for name, value in scalars(results):
            writer.add_scalar(f"evaluation/{name}", value, step)


def scalars(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The model's own scores in results.json, by name."""
    tables = {f"masked_shot/{name}": table for name, table in results.get("masked_shot", {}).items()}
    tables |= {"cross_modal": results["cross_modal"]} if results.get("cross_modal") else {}
    tables |= {f"alignment/{name}": table for name, table in results.get("alignment", {}).items()}
    for name, table in tables.items():
        for metric, score in table["rows"]["model"].items():
            yield f"{name}/{metric}", score["mean"]
    for label, table in results.get("probes", {}).items():
        yield f"probe/{label}", table["rows"]["model"]["mean"]
    for task, found in results.get("tasks", {}).items():
        for name, score in found["scores"].items():
            yield f"{task}/{name}", score["mean"]


if __name__ == "__main__":
    sys.exit(main())
