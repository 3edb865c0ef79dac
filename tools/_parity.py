"""Proof that an exported folder is the trained model: same tensors, same outputs, without lmp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmp.errors import UserError
from tools import _isolated_load
from tools._output import listed
from tools._source import Source

TOLERANCE = 1e-5
"""Largest difference of any output between the training model and the exported one."""


@dataclass(frozen=True)
class Proof:
    """What the comparison found.

    Attributes:
        difference: largest absolute difference of any output.
        per_output: the same for each output.
        transformers: version that loaded the folder.
    """

    difference: float
    per_output: dict[str, float]
    transformers: str


def prove(folder: Path, source: Source) -> Proof:
    """Load `folder` in a process in which lmp cannot be imported, and compare it with the training model.

    Args:
        folder: as written by the export.
        source: what was exported.

    Raises:
        UserError: it does not load, tensors differ, or an output differs by more than `TOLERANCE`.
    """
    expected = dict(_isolated_load.named_tensors(source.expected))
    found, report = _run_isolated(folder, source.auto_class, source.inputs)
    faults = [f"{key}: {', '.join(names[:3])}" for key, names in report["faults"].items()]
    loaded = {name: (numel, digest) for name, (numel, digest) in report["tensors"].items()}
    faults += different(source.digests, loaded)
    per_output, more = compare(expected, found)
    if faults := faults + more:
        raise UserError(
            f"{folder.name}: the exported model is not the trained one: {listed(faults)}",
            remedy="report this with the run's config.yaml; nothing was exported",
        )
    return Proof(max(per_output.values()), per_output, report["transformers"])


def fingerprint(source: Source, differences: dict[str, float]) -> dict[str, Any]:
    """Where weights come from, what they are, and how far what was exported is from the training model."""
    return {
        **asdict(source.origin),
        "part": source.part,
        "architecture": source.architecture,
        "largest_difference": max(differences.values()),
        "differences": differences,
        "torch": torch.__version__,
        "ties": source.ties,
        "tensors": {name: {"numel": numel, "sha256": sha256} for name, (numel, sha256) in source.digests.items()},
    }


def different(wanted: Mapping[str, tuple[int, str]], found: Mapping[str, tuple[int, str]]) -> list[str]:
    """What is wrong with tensors, by their numels and digests."""
    faults = [f"tensor {name} is missing" for name in wanted if name not in found]
    faults += [f"tensor {name} differs" for name, digest in wanted.items() if found.get(name, digest) != digest]
    return faults + [f"tensor {name} is unexpected" for name in found if name not in wanted]


def compare(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, tolerance: float = TOLERANCE
) -> tuple[dict[str, float], list[str]]:
    """The largest difference of each output, and what is wrong with them."""
    faults = [f"output {name} is missing or unexpected" for name in sorted(expected.keys() ^ found.keys())]
    per_output = {name: largest_difference(expected[name], found[name]) for name in sorted(expected) if name in found}
    # Written so that a difference which is not a number is a fault too.
    faults += [f"output {name} differs by {d:.3g}" for name, d in per_output.items() if not d <= tolerance]
    return per_output, faults


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; not a number where either holds one, infinity where shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    return (one.double() - other.double()).abs().max().item()


def _run_isolated(folder: Path, auto_class: str, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Outputs by name, and what the other process reported."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "empty").mkdir()
        # transformers 4.51 cannot load remote code from a folder with a dot in its name.
        (scratch / "model").symlink_to(folder.resolve(), target_is_directory=True)
        source, sink, report = (scratch / file for file in ("in.safetensors", "out.safetensors", "report.json"))
        tensors = {key: torch.as_tensor(value) for key, value in _isolated_load.named_tensors(inputs)}
        save_file(tensors, source)
        hidden = ("PYTHON", "HF_", "TRANSFORMERS_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(scratch),
            "HF_MODULES_CACHE": str(scratch / "modules"),
        }
        # With -I python sees neither PYTHONPATH nor the user's packages: name where these come from.
        paths = {str(Path(str(package.__file__)).parents[1]) for package in (torch, transformers, safetensors)}
        script = Path(_isolated_load.__file__).resolve()
        arguments = [str(scratch / "model"), auto_class, str(source), str(sink), str(report), *sorted(paths)]
        done = subprocess.run(
            [sys.executable, "-I", str(script), *arguments],
            cwd=scratch / "empty",
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise UserError(
                f"{folder.name}: the exported model does not load without lmp: {lines[-1]}",
                remedy="report this with the run's config.yaml; nothing was exported",
            )
        return load_file(sink), json.loads(report.read_text(encoding="utf-8"))
