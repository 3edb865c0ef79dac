"""Whether a node is fit to train: python -m lmp.scaling.preflight node|network|floors. slurm/preflight.sh runs it.

`node` looks at the node alone, `network` at all nodes of a job together. Each check prints one line
("NODE ok shm: ..."), and each node one verdict ("PREFLIGHT ok NODE" or "PREFLIGHT bad NODE CHECK: ..."). Standard
library, and torch. Floors come from the environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import lmp

PREFIX = "LMP_PREFLIGHT_"
GIB = 2**30
XIDS_OF_HARDWARE = {48, 62, 64, 74, 79, 92, 94, 95, 119, 120, 140}
"""NVIDIA's Xid errors that speak of the device, its memory or its links, not of a program that ran on it."""
XID_AGE_SECONDS = 24 * 3600


def _floor(default: float, meaning: str) -> float:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Floors:
    """What a healthy node has at least; each is read from LMP_PREFLIGHT_ and its name in capitals."""

    gpus: float = _floor(-1, "GPUs that a task sees; -1: as many as the job asked for")
    gpu_gib: float = _floor(0, "memory of a GPU")
    gpu_free: float = _floor(0.9, "share of a GPU's memory that nobody uses")
    matmul_tflops: float = _floor(0, "speed of a bf16 product on a GPU")
    copy_gbs: float = _floor(2, "GB/s between a GPU and the host")
    allreduce_gbs: float = _floor(5, "GB/s, bus bandwidth of an all-reduce among the GPUs of a node")
    network_gbs: float = _floor(1, "GB/s, bus bandwidth of an all-reduce over all GPUs of all nodes")
    cpu_allreduce_gbs: float = _floor(0.01, "GB/s within a node, without GPUs")
    cpu_network_gbs: float = _floor(0.005, "GB/s between nodes, without GPUs")
    ib_ports: float = _floor(1, "active InfiniBand or RoCE ports, where there is such a device")
    shm_gib: float = _floor(1, "free in /dev/shm")
    tmp_gib: float = _floor(1, "free in the folder for temporary files")
    run_gib: float = _floor(5, "free where the run folder is")
    clock_seconds: float = _floor(2, "how far a node's clock may be from the first node's (a ceiling)")

    @classmethod
    def read(cls) -> Floors:
        """The defaults, laid over by the environment.

        Raises:
            ValueError: naming the variable that is not a number.
        """
        given = {}
        for floor in fields(cls):
            name = PREFIX + floor.name.upper()
            if os.environ.get(name):
                try:
                    given[floor.name] = float(os.environ[name])
                except ValueError as error:
                    raise ValueError(f"{name}={os.environ[name]} is not a number") from error
        return cls(**given)


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    fit: bool
    facts: str


Check = Callable[[], Finding]


def node_name() -> str:
    """The node as SLURM calls it."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def report(finding: Finding) -> Finding:
    """Print the line of a check."""
    print(f"{node_name()} {'ok ' if finding.fit else 'BAD'} {finding.check}: {finding.facts}", flush=True)
    return finding


def verdict(findings: Sequence[Finding]) -> None:
    """Print the line that slurm/preflight.sh reads."""
    bad = [finding for finding in findings if not finding.fit]
    if bad:
        print(f"PREFLIGHT bad {node_name()} {bad[0].check}: {bad[0].facts}", flush=True)
    else:
        print(f"PREFLIGHT ok {node_name()}", flush=True)


# ---------------------------------------------------------------- checks of a node alone


def check_python() -> Finding:
    """This file was imported, so what is left is torch."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA that is not there
        return Finding("python", False, f"torch cannot be imported: {error}")
    where = Path(lmp.__file__).parent
    return Finding(
        "python", True, f"{platform.python_version()}, lmp {lmp.__version__} in {where}, torch {torch.__version__}"
    )


def check_space(name: str, folder: Path, floor_gib: float) -> Finding:
    """Free space, and whether a file can be written, read back the same, and removed."""
    try:
        free = shutil.disk_usage(folder).free / GIB
        facts = f"{free:.1f} GiB free in {folder}"
        if free < floor_gib:
            return Finding(name, False, f"{facts}, needs {floor_gib:g}")
        content = os.urandom(2**20) * 8
        began = time.perf_counter()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
            file.seek(0)
            if file.read() != content:
                return Finding(name, False, f"a file in {folder} does not hold what was written to it")
    except OSError as error:
        return Finding(name, False, f"{folder}: {error.strerror or error}")
    return Finding(name, True, f"{facts}, written at {len(content) / seconds / 1e6:.0f} MB/s")


def check_shm(floor_gib: float) -> Finding:
    """NCCL and data workers keep their buffers there; a container's default of 64 MiB is too little."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shm", False, "/dev/shm is not there")
    free = shutil.disk_usage(folder).free / GIB
    fit = free >= floor_gib and os.access(folder, os.W_OK)
    return Finding("shm", fit, f"{free:.1f} GiB free in /dev/shm, needs {floor_gib:g}")


def check_infiniband(floor: float, root: Path = Path("/sys/class/infiniband")) -> Finding:
    """Ports that are active, where there is an InfiniBand or RoCE device."""
    states = [file.read_text().strip() for file in sorted(root.glob("*/ports/*/state"))] if root.is_dir() else []
    if not states:
        return Finding("infiniband", True, "no such device")
    active = sum("ACTIVE" in state for state in states)
    return Finding("infiniband", active >= floor, f"{active} of {len(states)} ports active, needs {floor:g}")


def check_gpu_health() -> list[Finding]:
    """Uncorrected memory errors, rows to be remapped, and Xid errors of the hardware, where nvidia-smi is there."""
    if not shutil.which("nvidia-smi"):
        return []
    findings = []
    for check, query, wanted in (
        ("ecc", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "0"),
        ("remap", "--query-remapped-rows=gpu_bus_id,remapped_rows.pending", "0"),
        ("remap", "--query-remapped-rows=gpu_bus_id,remapped_rows.failure", "0"),
    ):
        out = _output("nvidia-smi", query, "--format=csv,noheader,nounits")
        if out is not None:
            findings.append(smi_finding(check, query.rpartition(",")[2], out, wanted))
    log = _output("dmesg")
    if log is not None:
        findings.append(xid_finding(log, uptime=float(Path("/proc/uptime").read_text().split()[0])))
    return findings


def smi_finding(check: str, what: str, out: str, wanted: str) -> Finding:
    """Hold each GPU's value against the one wanted; a GPU that does not tell (N/A) passes."""
    rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if "," in line]
    wrong = [
        f"GPU {name} has {value}"
        for name, value in rows
        if value.isdigit() or value in ("Yes", "No")
        if value not in (wanted, "No")
    ]
    return Finding(check, not wrong, f"{what}: {', '.join(wrong) or f'none on {len(rows)} GPUs'}")


def xid_finding(log: str, *, uptime: float) -> Finding:
    """Xid errors of the hardware in the kernel's log within the last day; its times count from the start."""
    seen = set()
    for line in log.splitlines():
        match = re.match(r"\[\s*(\d+\.\d+)\].*NVRM: Xid \((?:PCI:)?([^)]*)\): (\d+)", line)
        if match and int(match[3]) in XIDS_OF_HARDWARE and uptime - float(match[1]) < XID_AGE_SECONDS:
            seen.add(f"Xid {match[3]} of {match[2]}")
    return Finding("xid", not seen, ", ".join(sorted(seen)) or "none of the hardware within a day")


def _output(*command: str) -> str | None:
    """What a command prints; None if it cannot tell."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def gpus_asked() -> int:
    """GPUs that the job asked for on this node, as SLURM says; 0 outside of a job."""
    match = re.search(r"(\d+)(?:\(.*\))?$", os.environ.get("SLURM_GPUS_PER_NODE", ""))
    return int(match[1]) if match else int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))


def look_at_node(run: Path, ranks: int, floors: Floors) -> list[Finding]:
    """All checks of a node alone, each printed as it is made."""
    found = [report(check_python())]
    if found[0].fit:
        from lmp.scaling import preflight_devices as devices

        found += map(report, devices.look(floors, gpus_asked=gpus_asked(), ranks=ranks))
    found += map(report, check_gpu_health())
    found.append(report(check_infiniband(floors.ib_ports)))
    found.append(report(check_shm(floors.shm_gib)))
    found.append(report(check_space("tmp", Path(tempfile.gettempdir()), floors.tmp_gib)))
    found.append(report(check_space("run", run, floors.run_gib)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; the exit code is 0 whenever a verdict was printed."""
    parser = argparse.ArgumentParser(prog="python -m lmp.scaling.preflight", description=__doc__.splitlines()[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    node = stages.add_parser("node", help="this node alone")
    node.add_argument("--run", type=Path, required=True, help="the run folder")
    node.add_argument("--ranks", type=int, default=1, help="processes that will run here, where there are no GPUs")
    network = stages.add_parser("network", help="all nodes of the job together")
    network.add_argument("--nodes", required=True, help="their names with commas between")
    network.add_argument("--ranks", type=int, default=1)
    network.add_argument("--address", required=True, help="of the first node")
    network.add_argument("--port", type=int, required=True)
    stages.add_parser("floors", help="what is asked of a node, and the variables that change it")
    arguments = parser.parse_args(argv)
    floors = Floors.read()
    if arguments.stage == "floors":
        for floor in dataclasses.fields(Floors):
            name, value = PREFIX + floor.name.upper(), getattr(floors, floor.name)
            print(f"{name:36} {value:<8g} {floor.metadata['meaning']}")
    elif arguments.stage == "node":
        verdict(look_at_node(arguments.run, arguments.ranks, floors))
    else:
        from lmp.scaling.preflight_network import look

        look(
            arguments.nodes.split(","),
            node=int(os.environ["SLURM_NODEID"]),
            ranks=arguments.ranks,
            address=arguments.address,
            port=arguments.port,
            floors=floors,
        )
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
