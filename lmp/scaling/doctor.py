"""`lmp doctor`: what this machine and this installation have, what they lack, and why."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement
from torch import Tensor

from lmp.errors import EXIT_DONE
from lmp.model.attention import Segments
from lmp.model.backends import BACKENDS, Backend, reasons, resolve

PACKAGES = (
    "lmp",
    "torch",
    "deepspeed",
    "transformers",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "webdataset",
    "safetensors",
    "submitit",
)
SLURM_SETTINGS = (
    "SLURM_VERSION",
    "AccountingStorageType",
    "JobRequeue",
    "PreemptType",
    "PreemptMode",
    "PreemptParameters",
    "SlurmctldParameters",
    "ProctrackType",
    "KillWait",
)
HEAD_DIM = 128
"""Of the presets."""


def doctor(*, as_json: bool = False) -> int:
    """Print the findings, for people or as one JSON object; what is lacking is no failure."""
    found = examine()
    print(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))
    return EXIT_DONE


def examine() -> dict[str, Any]:
    """All findings, as plain values.

    Returns:
        versions: by name, None where absent.
        machine: CPU, cores, memory in GiB.
        devices: name, compute capability and memory in GiB of each CUDA device.
        attention: the device and dtype that were asked about, what `auto` takes there, and for each backend
            whether it is available, why not, and how far it was from fp64 when it was tried (see `try_backend`).
        distributed: whether torch was built with gloo and nccl.
        slurm: the commands that are there, the variables of the job that this runs in, and what of the cluster's
            settings decides whether jobs are requeued; why not, where it does not answer.
        limits: open files of a process, and shared memory in GiB.
        disk: of the current folder, in GiB.
        extras: for each extra of lmp what it lacks, and how to install it.
    """
    return {
        "versions": _versions(),
        "machine": _machine(),
        "devices": _devices(),
        "attention": _attention(),
        "distributed": _distributed(),
        "slurm": _slurm(),
        "limits": _limits(),
        "disk": _disk(Path.cwd()),
        "extras": _extras(),
    }


def try_backend(backend: Backend, *, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> float:
    """Run a backend forward and backward on small ragged and equal segments.

    Returns:
        the largest deviation of output or gradient from a plain softmax in fp64, over the largest value of each.
    """
    worst = 0.0
    for q_lengths, k_lengths in (((70, 1, 33), (40, 90, 2)), ((24, 24), (48, 48))):
        segments = [Segments.from_lengths(n, device=device) for n in (q_lengths, k_lengths)]
        draw = torch.Generator().manual_seed(0)
        tokens = (segments[0].total, segments[1].total, segments[1].total, segments[0].total)
        q, k, v, grad = (torch.randn(n, 2, head_dim, generator=draw).to(device, dtype) for n in tokens)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = backend.attend(q, k, v, q_segments=segments[0], k_segments=segments[1])
        found = (out.detach(), *torch.autograd.grad(out, inputs, grad))
        exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
        exact = _softmax_attention(exact_inputs, (q_lengths, k_lengths, k_lengths))
        expected = (exact.detach(), *torch.autograd.grad(exact, exact_inputs, grad.double()))
        for ours, true in zip(found, expected, strict=True):
            worst = max(worst, float((ours.double() - true).abs().max() / true.abs().max()))
    return worst


def _softmax_attention(tensors: Sequence[Tensor], lengths: Sequence[tuple[int, ...]]) -> Tensor:
    """Queries, keys and values, and the lengths of the segments of each."""
    parts = [x.split(list(n)) for x, n in zip(tensors, lengths, strict=True)]
    out = []
    for q, k, v in zip(*parts, strict=True):
        weight_HQK = torch.einsum("qhc,khc->hqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        out.append(torch.einsum("hqk,khc->qhc", weight_HQK, v))
    return torch.cat(out)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        found[name] = _version(name)
    cuda = torch.cuda.is_available()
    found["cuda"] = torch.version.cuda
    found["cudnn"] = str(torch.backends.cudnn.version()) if cuda else None
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if cuda else None
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    from lmp.scaling.bench_data import machine_facts

    facts = machine_facts()
    memory = psutil.virtual_memory()
    return {
        **{name: facts[name] for name in ("cpu", "cores", "system", "commit", "changed")},
        "memory_gib": round(memory.total / 2**30, 1),
        "available_gib": round(memory.available / 2**30, 1),
    }


def _devices() -> list[dict[str, Any]]:
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(total / 2**30, 1),
                "free_gib": round(free / 2**30, 1),
            }
        )
    return found


def _attention() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    backends: dict[str, dict[str, Any]] = {}
    for name, reason in reasons(device=device, dtype=dtype, head_dim=HEAD_DIM).items():
        error = None
        if reason is None:
            try:
                error = try_backend(BACKENDS[name], device=device, dtype=dtype, head_dim=HEAD_DIM)
            except Exception as failure:  # the point is to find out whether it runs
                reason = f"fails when run: {str(failure).splitlines()[0] if str(failure) else type(failure).__name__}"
        backends[name] = {"available": reason is None, "reason": reason, "deviation": error}
    auto = resolve("auto", device=device, dtype=dtype, head_dim=HEAD_DIM)
    return {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": HEAD_DIM,
        "auto": str(auto),
        "backends": backends,
    }


def _distributed() -> dict[str, bool]:
    available = torch.distributed.is_available()
    return {
        "gloo": available and torch.distributed.is_gloo_available(),
        "nccl": available and torch.distributed.is_nccl_available(),
    }


def _slurm() -> dict[str, Any]:
    return {
        "commands": {name: shutil.which(name) for name in ("sbatch", "srun", "scontrol")},
        "job": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SLURM_")},
        "cluster": _cluster(),
    }


def _cluster() -> dict[str, Any]:
    """What `scontrol show config` says, or why it says nothing."""
    if shutil.which("scontrol") is None:
        return {"answers": False, "reason": "no scontrol here"}
    try:
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return {"answers": False, "reason": "scontrol did not answer within 20 s"}
    if done.returncode:
        return {"answers": False, "reason": (done.stderr.strip().splitlines() or ["no words"])[-1]}
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    settings = {name.strip(): value.strip() for name, equals, value in pairs if equals}
    return {"answers": True, "settings": {name: settings[name] for name in SLURM_SETTINGS if name in settings}}


def _limits() -> dict[str, Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shared = Path("/dev/shm")
    size = round(shutil.disk_usage(shared).total / 2**30, 1) if shared.is_dir() else None
    return {"open_files": soft, "open_files_hard": hard, "shared_memory_gib": size}


def _disk(folder: Path) -> dict[str, Any]:
    usage = shutil.disk_usage(folder)
    return {
        "folder": str(folder),
        "free_gib": round(usage.free / 2**30, 1),
        "total_gib": round(usage.total / 2**30, 1),
    }


def _extras() -> dict[str, dict[str, Any]]:
    """By the metadata of the installed lmp; empty if it runs from a checkout that is not installed."""
    try:
        own = metadata.distribution("lmp")
    except metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(text) for text in own.requires or []]
    found = {}
    for extra in own.metadata.get_all("Provides-Extra") or []:
        wanted = [r for r in requirements if r.marker and not r.marker.evaluate({"extra": ""})]
        wanted = [r for r in wanted if r.marker and r.marker.evaluate({"extra": extra})]
        lacking = [f"{r.name}{r.specifier}" for r in wanted if not _satisfied(r)]
        found[extra] = {"missing": lacking, "install": f"pip install 'lmp[{extra}]'"}
    return found


def _satisfied(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def lines(found: dict[str, Any]) -> list[str]:
    """The findings of `examine` for people."""
    versions, machine, disk, slurm = found["versions"], found["machine"], found["disk"], found["slurm"]
    attention, backends = found["attention"], found["attention"]["backends"]
    text = ["versions"]
    text += [f"  {name:13} {version or '-'}" for name, version in versions.items()]
    text += ["machine", f"  {machine['cores']} cores of {machine['cpu']}, {machine['system']}"]
    text.append(f"  memory {machine['available_gib']} GiB available of {machine['memory_gib']}")
    text.append(f"  disk   {disk['free_gib']} GiB free of {disk['total_gib']} at {disk['folder']}")
    limits = found["limits"]
    text.append(
        f"  limits {limits['open_files']} open files a process (at most {limits['open_files_hard']}), "
        f"shared memory {limits['shared_memory_gib'] or '-'} GiB"
    )
    text += [
        f"  GPU {number}: {d['name']}, capability {d['capability']}, {d['free_gib']} GiB free of {d['memory_gib']}"
        for number, d in enumerate(found["devices"])
    ] or ["  no CUDA device"]
    text.append(f"attention on {attention['device']} in {attention['dtype']}, head dimension {attention['head_dim']}")
    for name, backend in backends.items():
        state = f"yes, {backend['deviation']:.1e} from fp64" if backend["available"] else f"no: {backend['reason']}"
        text.append(f"  {name:13} {state}")
    text.append(f"  auto          {attention['auto']}")
    text.append("processes")
    text += [f"  {name:13} {'yes' if there else 'no'}" for name, there in found["distributed"].items()]
    commands = [name for name, path in slurm["commands"].items() if path]
    job = slurm["job"].get("SLURM_JOB_ID")
    text.append(
        f"  SLURM         {', '.join(commands) or 'no commands here'}; {f'job {job}' if job else 'not in a job'}"
    )
    cluster = slurm["cluster"]
    if cluster["answers"]:
        text += [f"  {name:21} {value}" for name, value in cluster["settings"].items()]
    elif commands:
        text.append(f"  the cluster does not answer: {cluster['reason']}")
    text.append("extras")
    for extra, needs in found["extras"].items():
        lacks = f"lacks {', '.join(needs['missing'])}: {needs['install']}" if needs["missing"] else "installed"
        text.append(f"  {extra:13} {lacks}")
    if not found["extras"]:
        text.append("  unknown: lmp is not installed; run pip install -e . in its checkout")
    return text
