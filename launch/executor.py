"""Jobs through submitit: the batch script from a `cluster` section, the environment it is submitted in.

submitit writes the script and carries the function; stopping and requeueing are ours (slurm/step.sh), for submitit's
checkpoint() runs on rank 0 alone, inside a signal handler, while the other ranks go on.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from launch.slurm_state import refusal
from lmp.cluster import ClusterConfig
from lmp.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]


class Executor(submitit.SlurmExecutor):
    """submitit's, but made also where there is no srun, so that a script can be shown anywhere."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        """The batch script as it would be submitted."""
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def executor(
    folder: Path,
    cluster: ClusterConfig,
    *,
    name: str,
    array_parallelism: int | None = None,
    dependency: str | None = None,
    code: Path = CHECKOUT,
    run: Path | None = None,
) -> Executor:
    """An executor whose jobs are put back in the queue after a crash, a time limit or a node failure.

    Args:
        folder: for submitit's files; on a file system that all nodes see. One folder, one cluster.
        cluster: what to ask for.
        name: of the job.
        array_parallelism: elements of an array at the same time; None: the section's.
        dependency: such as afterok:12. A job whose dependency cannot come true is cancelled.
        code: the folder that `lmp` and `launch` are imported from.
        run: the run folder of a job that trains one run; its nodes are looked at first, where the section says so.

    Raises:
        UserError: the folder's path cannot be used.
    """
    folder = folder.resolve()
    if "%" in str(folder):
        raise UserError(f"{folder}: SLURM would replace the % in the path", remedy="name a folder without one")
    python = shlex.quote(cluster.python or sys.executable)
    made = Executor(folder, max_num_timeout=cluster.max_restarts, python=python)
    options: dict[str, Any] = {
        "kill-on-invalid-dep": "yes",
        "requeue": True,
        "reservation": cluster.reservation,
        **{key.lstrip("-").replace("_", "-"): value for key, value in cluster.sbatch.items()},
    }
    asked: dict[str, Any] = {
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": None if cluster.gres else cluster.gpus_per_node,
        "gres": cluster.gres,
        "mem": cluster.memory,
        "time": cluster.minutes,
        "signal_delay_s": cluster.signal_seconds,
        "dependency": dependency,
        **{key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint", "comment")},
        **{key: getattr(cluster, key) for key in ("nodelist", "exclude")},
    }
    made.update_parameters(
        job_name=name,
        wckey=None,
        stderr_to_stdout=True,
        array_parallelism=array_parallelism or cluster.array_parallelism,
        setup=_setup(folder, cluster, code, run),
        srun_args=["--kill-on-bad-exit=1", "--wait=60", *cluster.srun],
        teardown=["after_step $?"],
        additional_parameters={key: value for key, value in options.items() if value not in (None, False)},
        **{key: value for key, value in asked.items() if value is not None},
    )
    return made


def _setup(folder: Path, cluster: ClusterConfig, code: Path, run: Path | None) -> list[str]:
    """The lines of the batch script before its srun."""
    lines = [*cluster.setup]
    if cluster.environment:
        lines.append(f". {shlex.quote(str(Path(cluster.environment).resolve()))}")
    lines += [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1 # else `python -m` looks into the working directory first",
    ]
    if run is not None and cluster.preflight:
        settings = {
            "RUN": str(run),
            "PYTHON": cluster.python or sys.executable,
            "PREFLIGHT_SRUN": " ".join(cluster.srun),
        }
        lines.append("export " + " ".join(f"LMP_{name}={shlex.quote(value)}" for name, value in settings.items()))
        lines.append(f". {shlex.quote(str(code / 'slurm/preflight.sh'))} && preflight")
    lines.append(f". {shlex.quote(str(code / 'slurm/step.sh'))} {shlex.quote(str(folder))} {cluster.max_restarts}")
    return lines


def submit(executor: Executor, function: Callable[..., Any], *arguments: Any) -> submitit.Job[Any]:
    """Submit a call as a job; each of its tasks makes the call.

    The function is pickled by its name: it is one of a module under the executor's `code`, and paths in its arguments
    are seen by all nodes.

    Raises:
        UserError: sbatch refused; says why in one line.
    """
    with _submission(executor):
        return executor.submit(function, *arguments)


def submit_array(
    executor: Executor, function: Callable[..., Any], arguments: Sequence[Sequence[Any]]
) -> list[submitit.Job[Any]]:
    """Submit one call for each list of arguments as elements of one array, `array_parallelism` of them at a time.

    Raises:
        UserError: sbatch refused; says why in one line.
    """
    with _submission(executor):
        return executor.map_array(function, *zip(*arguments, strict=True))


@contextlib.contextmanager
def _submission(executor: Executor) -> Iterator[None]:
    """An environment that sbatch may pass on, and sbatch's refusal as one line."""
    executor.folder.mkdir(parents=True, exist_ok=True)  # a missing folder would end the job without any log
    before = set(executor.folder.iterdir())
    try:
        with _outside_of_jobs(), contextlib.redirect_stderr(io.StringIO()):
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        for file in set(executor.folder.iterdir()) - before:
            file.unlink()
        raise UserError(
            f"sbatch refused the job: {refusal(str(error))}",
            remedy="mend the `cluster` section, or the options that stand for it",
        ) from error
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {error.filename} on this machine", remedy="submit from a login node of the cluster"
        ) from error


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Inside a job, hide its variables: sbatch would take them for options. SLURM_CONF still finds the cluster."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    found = os.environ.get("SLURM_CONF")
    with submitit.helpers.clean_env():
        if found is not None:
            os.environ["SLURM_CONF"] = found
        yield
