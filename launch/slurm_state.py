"""What SLURM says about jobs. Asks the controller, and the accounting only for what the controller has forgotten."""

from __future__ import annotations

import re
import subprocess
import time

from lmp.errors import UserError

FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
FINAL |= {"NODE_FAIL", "PREEMPTED", "REVOKED"}
"""States of a job that is over; NODE_FAIL and PREEMPTED may be followed by a new start."""

RESTART_SECONDS = 15.0


def slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands; its failure is the caller's to judge.

    Raises:
        UserError: there is no such command here.
    """
    try:
        return subprocess.run(command, text=True, capture_output=True)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {command[0]} on this machine", remedy="submit from a login node of the cluster"
        ) from error


def job_state(job: str) -> str:
    """The state of a job or of an array's element; of a whole array that of an element which is not over, if any.

    Exact at once, and without accounting. UNKNOWN: neither the controller nor the accounting knows the job.
    """
    states = re.findall(r"\bJobState=(\w+)", slurm("scontrol", "show", "job", "-o", job).stdout)
    if not states:
        told = slurm("sacct", "-X", "-n", "-P", "-j", job, "-o", "State").stdout
        states = [line.split()[0] for line in told.splitlines() if line.strip()]
    if not states:
        return "UNKNOWN"
    # Not over comes first, then what went wrong.
    return min(states, key=lambda state: (state in FINAL, state == "COMPLETED"))


def is_over(state: str) -> bool:
    """Whether a job in this state has no process left and, as far as SLURM knows, gets none."""
    return state in FINAL or state == "UNKNOWN"


def exit_code(job: str) -> int | None:
    """Of a job that is over, while the controller remembers it."""
    found = re.search(r"\bExitCode=(\d+):", slurm("scontrol", "show", "job", "-o", job).stdout)
    return int(found[1]) if found else None


def answers() -> bool:
    """Whether there is a controller that answers."""
    return slurm("squeue", "-h", "--name", "none").returncode == 0


def known_state(job: str) -> str | None:
    """The state of a job; None where SLURM does not answer, for then UNKNOWN says nothing about the job."""
    state = job_state(job)
    if state != "UNKNOWN":
        return state
    return job_state(job) if answers() else None


def may_go_on(job: str) -> bool:
    """Whether a job is not over, or SLURM does not say: no reason to submit another one."""
    state = known_state(job)
    return state is None or not is_over(state)


def wait(job: str, timeout_s: float, *, poll_s: float = 1.0) -> str:
    """Wait until a job is over and not about to start again.

    Returns:
        its state.

    Raises:
        TimeoutError: it was not over in time; names its state.
    """
    end = time.monotonic() + timeout_s
    over_since: float | None = None
    while (now := time.monotonic()) < end:
        state = job_state(job)
        over_since = (over_since or now) if is_over(state) else None
        restarts = state in ("NODE_FAIL", "PREEMPTED")
        if over_since is not None and (not restarts or now - over_since > RESTART_SECONDS):
            return state
        time.sleep(poll_s)
    raise TimeoutError(f"job {job} is {job_state(job)} after {timeout_s:.0f} s")


def cluster_name() -> str | None:
    """The name of the cluster that this shell talks to: job ids mean nothing on another one."""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", slurm("scontrol", "show", "config").stdout, re.M)
    return found[1] if found else None


def refusal(words: str) -> str:
    """The one line of what sbatch printed that tells why it refused."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in words.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("Batch job submission failed")]
    # "Batch job submission failed: Invalid account..." is the summary of the lines before it.
    return "; ".join(dict.fromkeys([*told, *(line.partition(": ")[2] for line in lines if line not in told)]))
