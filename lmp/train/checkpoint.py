"""Checkpoints: a folder that appears whole or not at all, in a format that knows no topology.

    step-00000120/
        state-00000-of-00002.safetensors    a share of the parameters: NAME/weight, NAME/exp_avg, NAME/exp_avg_sq, fp32
        state-00001-of-00002.safetensors
        manifest.json                       step, cursor, configs, data fingerprint, versions; bytes and sha256 per file

Parameters are stored by name as whole fp32 tensors, so another world size, ZeRO stage, precision or sequence degree
loads them. No random state is stored, for every draw of a run is keyed by (seed, epoch, step, film, shot).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmp.data.stream import Cursor
from lmp.errors import UserError
from lmp.train.run_folder import RunFolder, write_atomic
from lmp.train.zero_state import PARTS, State, export_state, import_state, names

if TYPE_CHECKING:
    from lmp.model import LmpConfig
    from lmp.train.engine import Engine

FORMAT = 2


@dataclass(frozen=True)
class Progress:
    """What a run has done, and where in the stream it goes on."""

    step: int
    cursor: Cursor
    shots_seen: int
    tokens_seen: int

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Progress:
        """The inverse of asdict."""
        return cls(**{**facts, "cursor": Cursor(**facts["cursor"])})


@dataclass(frozen=True)
class TrainedModel:
    """The weights of a run as one process needs them.

    Attributes:
        config: the model's configuration.
        weights: fp32, by the names of LmpForPretraining.
        step: optimizer steps made.
        manifest: of the checkpoint.
        path: of the checkpoint.
        finished: whether the run was finished when it was saved.
    """

    config: LmpConfig
    weights: dict[str, Tensor]
    step: int
    manifest: dict[str, Any]
    path: Path
    finished: bool


def save(folder: RunFolder, engine: Engine, progress: Progress, facts: dict[str, Any], *, keep: int) -> Path:
    """Save the whole state. Collective; returns when the checkpoint is complete on disk.

    Args:
        folder: of the run.
        engine: with at least one step made.
        progress: what the state stands for.
        facts: further entries of the manifest (configurations, data fingerprint, versions).
        keep: older checkpoints beyond this number are removed.

    Raises:
        OSError: on every rank, when any rank could not write; the unfinished folder is removed.
    """
    mesh = engine.mesh
    final = folder.checkpoints / f"step-{progress.step:08d}"
    partial = final.with_name(final.name + ".tmp")
    if mesh.main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    written = _write_share(engine, partial)
    shares: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(shares, written)
    failures = [share["error"] for share in shares if "error" in share]
    if failures:
        if mesh.main:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        raise OSError(f"checkpoint {final.name} was not saved: " + "; ".join(failures))
    if mesh.main:
        manifest = {
            "format": FORMAT,
            "progress": asdict(progress),
            "topology": {"world_size": mesh.world_size, "sequence": mesh.sequence, "zero": engine.stage},
            "tensors": {name: size for share in shares for name, size in share["tensors"].items()},
            "files": {share["file"]: share["facts"] for share in shares},
            **facts,
        }
        write_atomic(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        _sync_folder(folder.checkpoints)
        for old in found(folder)[keep:]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def found(folder: RunFolder) -> list[Path]:
    """The checkpoints of a run, newest first, valid or not."""
    return sorted((p for p in folder.checkpoints.glob("step-*") if p.suffix != ".tmp" and p.is_dir()), reverse=True)


def newest_valid(folder: RunFolder, *, rank: int = 0, world_size: int = 1) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole. Collective when there are several processes: they share the work and agree.

    Returns:
        the folder (None when there is none), and why newer ones were passed over.
    """
    passed_over: list[str] = []
    for path in found(folder):
        faults = verify(path, part=rank, parts=world_size)
        if world_size > 1:
            gathered: list[Any] = [None] * world_size
            dist.all_gather_object(gathered, faults)
            faults = [fault for some in gathered for fault in some]
        if not faults:
            return path, passed_over
        passed_over += faults
    return None, passed_over


def verify(path: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint; this process reads every `parts`-th file, from number `part`."""
    try:
        manifest = read_manifest(path)
        files = sorted(manifest["files"].items())
    except (OSError, ValueError, KeyError) as error:
        return [f"{path.name}: manifest.json cannot be read ({type(error).__name__})"]
    if manifest.get("format") != FORMAT:
        return [f"{path.name}: is of format {manifest.get('format')}, this is {FORMAT}"]
    faults = []
    for name, facts in files[part::parts]:
        file = path / name
        if not file.is_file():
            faults.append(f"{path.name}/{name}: is missing")
        elif file.stat().st_size != facts["bytes"]:
            faults.append(f"{path.name}/{name}: has {file.stat().st_size} bytes instead of {facts['bytes']}")
        elif _sha256(file) != facts["sha256"]:
            faults.append(f"{path.name}/{name}: its content does not match its sha256")
    return faults


def restore(path: Path, engine: Engine) -> Progress:
    """Load a verified checkpoint into a fresh engine. Collective.

    Raises:
        UserError: the checkpoint holds other parameters than the model.
    """
    manifest = read_manifest(path)
    progress = Progress.from_json(manifest["progress"])
    mine, stored = set(names(engine)), set(manifest["tensors"])
    if mine != stored:
        raise UserError(
            f"{path}: does not fit the model: lacks {sorted(mine - stored)[:3]}, adds {sorted(stored - mine)[:3]}",
            remedy="resume with the model section that the run was started with",
        )
    with _reader(path, manifest) as read:
        import_state(engine, lambda name: _state(read, name), step=progress.step)
    return progress


def load_trained(run: Path, *, step: int | None = None, require_finished: bool = False) -> TrainedModel:
    """The newest valid weights of a run, in one process.

    Args:
        run: a run folder.
        step: a certain step instead of the newest.
        require_finished: refuse a run without its DONE mark.

    Raises:
        UserError: no run, no valid checkpoint, no such step, or not finished.
    """
    from lmp.model import LmpConfig

    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        raise UserError(
            f"{run}: is not a run folder (no config.yaml)",
            remedy="give the folder named by `lmp train --run`",
        )
    finished = folder.finished_step()
    if require_finished and finished is None:
        raise UserError(
            f"{run}: the run is not finished",
            remedy="start it again to finish it, or pass --allow-unfinished",
        )
    if step is None:
        path, passed_over = newest_valid(folder)
    else:
        path = folder.checkpoints / f"step-{step:08d}"
        passed_over = verify(path)
        path = None if passed_over else path
    if path is None:
        have = ", ".join(str(int(p.name[5:])) for p in found(folder)) or "none"
        what = "no valid checkpoint" if step is None else f"no valid checkpoint of step {step} (there are: {have})"
        because = f": {'; '.join(passed_over)}" if passed_over else ""
        raise UserError(f"{run}: {what}{because}", remedy="let the run reach a checkpoint, or name another step")
    manifest = read_manifest(path)
    with _reader(path, manifest) as read:
        weights = {name: read(f"{name}/weight") for name in manifest["tensors"]}
    return TrainedModel(
        config=LmpConfig(**manifest["model"]),
        weights=weights,
        step=manifest["progress"]["step"],
        manifest=manifest,
        path=path,
        finished=finished is not None,
    )


def _write_share(engine: Engine, folder: Path) -> dict[str, Any]:
    """Write this rank's share of the parameters; an error is returned, so that all ranks can agree on it."""
    mesh = engine.mesh
    owner = _owners(engine, mesh.world_size)
    tensors: dict[str, Tensor] = {}
    for name, state in export_state(engine):
        if owner[name] == mesh.rank:
            for part, value in zip(PARTS, state, strict=True):
                tensors[f"{name}/{part}"] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    file = folder / f"state-{mesh.rank:05d}-of-{mesh.world_size:05d}.safetensors"
    try:
        # safetensors makes private files; those of a run belong to whoever may read the run.
        file.touch()
        mode = file.stat().st_mode
        save_file(tensors, file, metadata={"format": str(FORMAT)})
        file.chmod(mode)
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
        facts = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    except Exception as error:
        return {"error": f"rank {mesh.rank}: {error}"}
    sizes = {name: list(tensors[f"{name}/weight"].shape) for name, rank in owner.items() if rank == mesh.rank}
    return {"file": file.name, "facts": facts, "tensors": sizes}


def _owners(engine: Engine, ranks: int) -> dict[str, int]:
    """Deal parameters to ranks so that bytes are even: largest first, each to the least loaded."""
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
    load = [0] * ranks
    owner = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        rank = load.index(min(load))
        owner[name] = rank
        load[rank] += sizes[name]
    return owner


@contextmanager
def _reader(path: Path, manifest: dict[str, Any]) -> Iterator[Callable[[str], Tensor]]:
    """Gives any tensor of a checkpoint by its key, reading only its bytes."""
    with ExitStack() as stack:
        where = {}
        for name in manifest["files"]:
            file = stack.enter_context(safe_open(path / name, framework="pt"))
            where.update(dict.fromkeys(file.keys(), file))
        yield lambda key: where[key].get_tensor(key)


def _state(read: Callable[[str], Tensor], name: str) -> State:
    weight, exp_avg, exp_avg_sq = (read(f"{name}/{part}") for part in PARTS)
    return weight, exp_avg, exp_avg_sq


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint."""
    return json.loads((path / "manifest.json").read_text(encoding="utf-8"))


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
