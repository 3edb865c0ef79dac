"""A real SLURM of virtual nodes on this machine, started once for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import psutil
import pytest

from tests.runs import ROOT

SCRIPT = ROOT / "slurm" / "cluster.sh"
NODES = 8
DAEMONS = ("slurmctld", "slurmd", "munged", "slurmdbd", "mariadbd")


class Slurm:
    """The cluster of the tests, and what may befall its nodes and jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given_up = Event()
        """Set when nobody waits for the outcome any more."""

    def script(self, command: str, *arguments: str) -> str:
        """Run a command of slurm/cluster.sh on this cluster."""
        return _run(str(SCRIPT), command, str(self.folder), *arguments)

    def kill_node(self, node: str) -> None:
        """Node `lmp-nodeN` loses power."""
        self.script("kill-node", node.removeprefix("lmp-node"))

    def start_node(self, node: str) -> None:
        self.script("start-node", node.removeprefix("lmp-node"))

    def pid_of(self, node: str) -> int:
        """The process that holds the node's namespaces."""
        return int((self.folder / "run" / f"{node}.pid").read_text())

    def field(self, job: str, name: str) -> str:
        """What the controller knows of a job, such as JobState, Reason, Restarts, NodeList."""
        shown = _run("scontrol", "show", "job", "-o", job)
        return dict(word.partition("=")[::2] for word in shown.split())[name]

    def nodes_of(self, job: str) -> list[str]:
        """The nodes that a running job has, in the order of its ranks."""
        return _run("scontrol", "show", "hostnames", self.field(job, "NodeList")).split()

    def wait(self, job: str, timeout: float = 600) -> str:
        """Until a job has ended and will not start again; its last state."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY"}
        self.until(f"job {job} to end", lambda: self.field(job, "JobState") in final, timeout)
        return self.field(job, "JobState")

    def until(self, what: str, test: Callable[[], bool], timeout: float = 300) -> None:
        """Wait for something, and say what when it does not come."""
        end = time.monotonic() + timeout
        while not test():
            assert not self.given_up.is_set(), "interrupted"
            assert time.monotonic() < end, f"waited {timeout:.0f} s for {what}\n{_run('squeue')}"
            time.sleep(0.2)

    def ranks_of(self, job: str) -> dict[int, psutil.Process]:
        """The processes that are the ranks of a running job: what srun started that is Python."""
        found = {}
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                ours = environment.get("SLURM_CONF") == str(self.folder / "etc" / "slurm.conf")
                if ours and environment.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in environment:
                    parent = process.parent()
                    if parent is not None and "slurmstepd" in parent.name():
                        found[int(environment["SLURM_PROCID"])] = process
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Started once; the environment variable SLURM_CONF leads every client to it."""
    path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    missing = [daemon for daemon in DAEMONS if shutil.which(daemon, path=path) is None]
    if missing:
        pytest.skip(f"no SLURM here: {', '.join(missing)} missing (as root: slurm/cluster.sh install)")
    isolate = ["unshare", "--pid", "--uts", "--mount", "--fork", "--mount-proc", "true"]
    if subprocess.run(isolate, capture_output=True).returncode != 0:
        pytest.skip("the nodes of the test cluster need namespaces of their own, which takes root and its capabilities")
    # Under a short path, for it holds unix sockets.
    folder = Path(tempfile.mkdtemp(prefix="lmp-slurm-"))
    cluster = Slurm(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMP_SLURM_NODES", str(NODES))
        patch.setenv("LMP_SLURM_PORT", str(_free_ports(NODES + 11)))
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            patch.delenv(name)
        try:
            cluster.script("start")
            patch.setenv("SLURM_CONF", str(folder / "etc" / "slurm.conf"))
            yield cluster
        finally:
            cluster.script("stop")
    shutil.rmtree(folder)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row, below those that the kernel hands out."""
    # Workers of pytest-xdist look in ranges of their own, so that none takes what another is about to use.
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    begin = 26900 + 1200 * worker
    for first in range(begin, begin + 1200 - count, count):
        probes = [socket.socket() for _ in range(count)]
        try:
            for number, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise OSError("no free ports")
