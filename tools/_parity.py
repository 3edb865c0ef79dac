"""Proof that an exported folder is the trained model: same tensors, same outputs, without lmp."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmp.errors import UserError
from lmp.model import LmpConfig, LmpForPretraining
from tools import _isolated_load

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


def fixed_input(config: LmpConfig) -> dict[str, Any]:
    """Keyword arguments of a forward: two segments, with seen, masked and missing shots in every modality.

    The last modality is missing in the whole first segment, the first one is hidden at that segment's end.
    """
    longest = config.max_positions if config.positions == "learned" else 11
    lengths = [min(7, longest), min(11, longest)]
    shots = sum(lengths)
    draw = torch.Generator().manual_seed(20230818)
    features, valid, masked = {}, {}, {}
    for name, spec in config.modalities.items():
        features[name] = torch.randn(shots, spec["tokens"], spec["width"], generator=draw)
        valid[name] = torch.rand(shots, generator=draw) < 0.8
        masked[name] = valid[name] & (torch.rand(shots, generator=draw) < 0.25)
    names = list(config.modalities)
    valid[names[-1]][: lengths[0]] = False
    masked[names[-1]] &= valid[names[-1]]
    valid[names[0]][lengths[0] - 1] = masked[names[0]][lengths[0] - 1] = True
    times = 4.0 * torch.rand(shots, generator=draw).cumsum(0)
    return {"features": features, "valid": valid, "masked": masked, "times": times, "lengths": lengths}


def check_tensors(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, source: str) -> None:
    """Hold stored weights against the model's parameters.

    Raises:
        UserError: naming tensors that are missing, unexpected, of another shape or type, or in shared memory.
    """
    faults = [f"{name} is missing" for name in wanted if name not in weights]
    faults += [f"{name} is unexpected" for name in weights if name not in wanted]
    for name, tensor in weights.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            faults.append(f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(wanted[name].shape)}")
        if tensor.dtype != torch.float32:
            faults.append(f"{name} is {tensor.dtype}, expected torch.float32")
    faults += [f"{one} and {other} share memory" for one, other in aliases(weights)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"{source}: " + "; ".join(faults[:3]) + more,
            remedy="export another step, or the checkout that trained the run",
        )


def aliases(weights: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of names whose tensors overlap in memory."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in weights.items() if t.numel())
    return [(a[2], b[2]) for a, b in itertools.pairwise(spans) if b[0] < a[1]]


def digests(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, str]]:
    """NAME -> (numel, sha256 of the bytes)."""
    return {
        name: (tensor.numel(), hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest())
        for name, tensor in weights.items()
    }


def prove(folder: Path, *, model: LmpForPretraining, prefix: str, auto_class: str) -> Proof:
    """Load `folder` in a process in which lmp cannot be imported, and compare it with the training model.

    Args:
        folder: as written by the export.
        model: the training model with the run's weights.
        prefix: of the exported tensors' names in `model`: "lmp." for the trunk, "" with heads.
        auto_class: class of transformers that loads the folder.

    Raises:
        UserError: it does not load, tensors differ, or an output differs by more than `TOLERANCE`.
    """
    inputs = fixed_input(model.config)
    with torch.no_grad():
        output = (model.lmp if prefix else model).eval()(**inputs)
    expected = dict(_isolated_load.named_tensors(output))
    weights = {name.removeprefix(prefix): t for name, t in model.state_dict().items() if name.startswith(prefix)}
    found, report = _run_isolated(folder, auto_class, inputs)
    faults = [f"{key}: {', '.join(names[:3])}" for key, names in report["faults"].items()]
    loaded = {name: (numel, digest) for name, (numel, digest) in report["tensors"].items()}
    faults += [f"tensor {name} differs" for name, digest in digests(weights).items() if loaded.get(name) != digest]
    faults += [f"tensor {name} is unexpected" for name in loaded if name not in weights]
    faults += [f"output {name} is missing or unexpected" for name in sorted(expected.keys() ^ found.keys())]
    per_output = {name: largest_difference(expected[name], found[name]) for name in sorted(expected) if name in found}
    # Written so that a difference which is not a number is a fault too.
    faults += [f"output {name} differs by {d:.3g}" for name, d in per_output.items() if not d <= TOLERANCE]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"{folder.name}: the exported model is not the trained one: " + "; ".join(faults[:3]) + more,
            remedy="report this with the run's config.yaml; nothing was exported",
        )
    return Proof(max(per_output.values()), per_output, report["transformers"])


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
