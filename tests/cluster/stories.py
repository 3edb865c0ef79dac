"""What befalls the runs of test_events: each story submits as a user would, and raises where it does not end well.

Stories run side by side, since they mostly wait: for SLURM, or for each other's processors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from tests.cluster.conftest import Slurm
from tests.runs import ROOT, config_of, losses, make_shards, metrics, run, write_config

STEPS = 40
TWO_BY_TWO = {"nodes": 2, "tasks_per_node": 2}
RUNNING = {"preflight": False, "time": 10, "signal_seconds": 30}
"""Of every job; the nodes are looked at only where that is what is tested."""


class Runs:
    """Runs of one configuration on the test cluster, and the undisturbed one that each must equal."""

    def __init__(self, folder: Path, slurm: Slurm) -> None:
        self.folder, self.slurm = folder, slurm
        self.shards = make_shards(folder / "shards", films=16)
        self.lock = Lock()

    @cached_property
    def undisturbed(self) -> list[dict[str, Any]]:
        """The metrics of a run of one process on this machine."""
        ended = run(self.config("undisturbed"), "--run", str(self.folder / "undisturbed"), timeout=600)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return metrics(self.folder / "undisturbed")

    def config(self, name: str, **sections: Any) -> str:
        sections.setdefault("train", {"steps": STEPS, "log_every": 20})
        sections.setdefault("parallel", {"zero": 3})
        return str(write_config(self.folder / f"{name}.yaml", config_of(self.shards, name=name, **sections)))

    def submit(
        self,
        name: str,
        *,
        run: str | None = None,
        parallel: dict[str, Any] | None = None,
        seconds: float = 0.2,
        **cluster: Any,
    ) -> str:
        """Submit as a user does, with steps that take so many seconds more; the job's id."""
        config = self.config(name, parallel={"zero": 3, **(parallel or {})}, cluster={**RUNNING, **cluster})
        words = [sys.executable, "-m", "launch.slurm", config, "--run", str(self.folder / (run or name))]
        done = subprocess.run(words, cwd=ROOT, env=self.environment(seconds), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return re.match(r"job (\d+):", done.stdout)[1]  # type: ignore[index]

    def environment(self, seconds: float = 0.2, **more: str) -> dict[str, str]:
        """Of a submission: one thread a process, films that come so slowly."""
        slow = str(ROOT / "tests" / "cluster" / "slow_films")
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": slow, "LMP_TEST_STEP_SECONDS": str(seconds), **more}

    def steps(self, name: str) -> int:
        """Steps that the run's metrics tell of."""
        file = self.folder / name / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def events(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        """Lines of the run's ledger of these kinds."""
        file = self.folder / name / "ledger.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line for line in lines if line["event"] in kinds]

    def reach(self, name: str, job: str, *, start: int, step: int) -> None:
        """Until the run's start of that number (from 1) has made this step."""

        def there() -> bool:
            state = self.slurm.field(job, "JobState")
            assert state not in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT"), f"the job is {state}{self.tell(name)}"
            return len(self.events(name, "start")) >= start and self.steps(name) >= step

        self.slurm.until(f"step {step} of {name} in start {start}", there, 600)

    def ends_as_undisturbed(self, name: str, job: str, *, starts: int | None, rel: float = 1e-6) -> None:
        """The job ends well, and the run has every step once, with the losses and the films of the undisturbed run."""
        assert self.slurm.wait(job, 1200) == "COMPLETED", self.tell(name)
        with self.lock:
            undisturbed = self.undisturbed
        lines = metrics(self.folder / name)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert [line["data"] for line in lines] == [line["data"] for line in undisturbed]
        assert losses(self.folder / name) == pytest.approx([line["loss"] for line in undisturbed], rel=rel)
        begun = [event["step"] for event in self.events(name, "start")]
        assert len(begun) == starts or (starts is None and len(begun) > 1), f"started at steps {begun}{self.tell(name)}"
        assert begun == sorted(begun) and min(begun[1:]) > 0, f"began again: started at steps {begun}"
        assert (self.folder / name / "DONE").exists()

    def tell(self, name: str) -> str:
        """What the run's files say, for the message of a failure."""
        folder = self.folder / name
        files = [folder / "ledger.jsonl", *sorted(folder.glob("submitit/*_0_log.out")), *sorted(folder.glob("logs/*"))]
        return "".join(f"\n--- {file}\n{file.read_text(errors='replace')[-2500:]}" for file in files if file.is_file())


def signal_requeue_kill_and_node_failure(runs: Runs) -> None:
    """One run of four processes is warned, requeued by hand, loses a process and loses a node."""
    slurm, name = runs.slurm, "events"
    job = runs.submit(name, **TWO_BY_TWO, exclude="lmp-node[1-5]")
    runs.reach(name, job, start=1, step=8)
    _scancel("--signal=USR2", job)
    runs.reach(name, job, start=2, step=14)
    _scontrol("requeue", job)
    runs.reach(name, job, start=3, step=21)
    slurm.ranks_of(job)[1].send_signal(signal.SIGKILL)
    runs.reach(name, job, start=4, step=28)
    victim = slurm.nodes_of(job)[-1]
    slurm.kill_node(victim)
    runs.ends_as_undisturbed(name, job, starts=5)
    stops = [event["reason"] for event in runs.events(name, "stop")]
    # SIGTERM leaves a busy machine too little time to save.
    assert [reason for reason in stops if reason != "SIGTERM"] == ["SIGUSR2", "last step"]
    assert victim not in slurm.nodes_of(job)
    slurm.start_node(victim)


def three_preemptions(runs: Runs) -> None:
    """Jobs of a better partition take the nodes away three times in a row."""
    slurm, name = runs.slurm, "preempted"
    nodes = "lmp-node[3-4]"
    job = runs.submit(name, **TWO_BY_TWO, partition="low", nodelist=nodes)
    for turn in range(3):
        runs.reach(name, job, start=turn + 1, step=8 + 8 * turn)
        urgent = ["sbatch", "--wait", "--partition=high", "--nodes=2", f"--nodelist={nodes}", "--exclusive"]
        done = subprocess.run([*urgent, "--output=/dev/null", "--wrap=true"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    runs.ends_as_undisturbed(name, job, starts=4)
    assert int(slurm.field(job, "Restarts")) >= 3


def time_limit(runs: Runs) -> None:
    """SLURM warns 60 to 120 s before the limit; on a busy machine that may happen more than once."""
    name = "limited"
    job = runs.submit(name, **TWO_BY_TWO, time=3, signal_seconds=60, nodelist="lmp-node[1-2]", seconds=2.8)
    runs.ends_as_undisturbed(name, job, starts=None)
    stops = [event["reason"] for event in runs.events(name, "stop")]
    assert set(stops[:-1]) == {"SIGUSR2"} and stops[-1] == "last step"


def other_topologies(runs: Runs) -> None:
    """2 x 2 processes, then 1 x 2, then 2 x 1 that share each pack: the same run."""
    name = "reshaped"
    job = runs.submit(name, **TWO_BY_TWO, exclude="lmp-node[3-8]")
    _cancel_in_start(1, runs, name, job)
    job = runs.submit("fewer", run=name, nodes=1, tasks_per_node=2, nodelist="lmp-node2", preflight=True)
    _cancel_in_start(2, runs, name, job)
    report = (runs.folder / name / "logs" / f"preflight-{job}-0.log").read_text()
    assert "lmp-node2 ok  allreduce: " in report and "PREFLIGHT ok lmp-node2" in report
    shared = {"sequence": 2, "zero": 2}
    job = runs.submit("shared", run=name, nodes=2, tasks_per_node=1, parallel=shared, exclude="lmp-node[3-8]")
    runs.ends_as_undisturbed(name, job, starts=3, rel=1e-5)
    assert [event["world_size"] for event in runs.events(name, "start")] == [4, 2, 2]


def _cancel_in_start(start: int, runs: Runs, name: str, job: str) -> None:
    """Let the run's start of that number make some steps, then stop it as a user does."""
    runs.reach(name, job, start=start, step=runs.steps(name) + 5)
    words = [sys.executable, "-m", "launch.slurm", "cancel", str(runs.folder / name)]
    subprocess.run(words, cwd=ROOT, env=runs.environment(), check=True, capture_output=True)
    assert runs.slurm.wait(job) == "COMPLETED", runs.tell(name)


def crash_loop(runs: Runs) -> None:
    """A run whose process is killed at each start, as when it lacks memory, is not started for ever."""
    slurm, name = runs.slurm, "crashing"
    job = runs.submit(name, max_fruitless_starts=2, nodelist="lmp-node5", seconds=5)
    for start in (1, 2):
        slurm.until(f"start {start}", lambda start=start: len(runs.events(name, "launch")) == start)  # type: ignore[misc]
        slurm.ranks_of(job)[0].send_signal(signal.SIGKILL)
    assert slurm.wait(job) == "FAILED", runs.tell(name)
    assert slurm.field(job, "ExitCode") == "3:0", runs.tell(name)
    assert len(runs.events(name, "launch")) == 2
    (refused,) = runs.events(name, "refused")
    assert "crash loop: the last 2 starts began without a checkpoint" in refused["reason"]


def plain_sbatch_with_a_bad_node(runs: Runs) -> None:
    """Without submitit: a node that is not fit is left out, a warning leads to a requeue, and the run ends."""
    slurm, name = runs.slurm, "plain"
    bad = "lmp-node1"
    _make_shared_memory_small(slurm, bad)
    folder, code = runs.folder / name, runs.folder / "checkout"
    code.mkdir()
    for part in ("lmp", "launch", "slurm"):
        shutil.copytree(ROOT / part, code / part, ignore=shutil.ignore_patterns("__pycache__"))
    config = runs.config(name, parallel={"zero": 1})
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
    done = subprocess.run(
        ["sbatch", "--parsable", *options, "--exclude=lmp-node[3-4,6-8]", "slurm/train.sbatch", config],
        cwd=code,
        env=runs.environment(LMP_RUN=str(folder), LMP_PYTHON=sys.executable),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    runs.reach(name, job, start=1, step=10)
    assert bad not in slurm.nodes_of(job)
    assert [line.split("\t")[3] for line in (folder / "bad-nodes").read_text().splitlines()] == [bad]
    assert bad in slurm.field(job, "ExcNodeList").split(","), "the job may get the bad node again"
    _scancel("--signal=USR2", job)
    runs.ends_as_undisturbed(name, job, starts=2)
    requeues = [event["reason"] for event in runs.events(name, "requeue")]
    assert len(requeues) == 2 and "bad nodes" in requeues[0] and "SIGUSR2" in requeues[1]


def _make_shared_memory_small(slurm: Slurm, node: str) -> None:
    """In the node's own mount namespace, /dev/shm gets 1 MiB: a container that was started carelessly."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    subprocess.run(["nsenter", "--target", str(slurm.pid_of(node)), "--mount", *mount], check=True)


def _scancel(*words: str) -> None:
    subprocess.run(["scancel", *words], check=True)


def _scontrol(*words: str) -> None:
    subprocess.run(["scontrol", *words], check=True)


STORIES = {
    story.__name__: story
    for story in (
        time_limit,
        signal_requeue_kill_and_node_failure,
        three_preemptions,
        other_topologies,
        plain_sbatch_with_a_bad_node,
        crash_loop,
    )
}
"""Longest first."""
