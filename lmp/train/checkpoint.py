"""Checkpoints: a folder that appears whole or not at all, in a format that knows no topology.

    step-00000120/
        state-00000-of-00002.safetensors    what rank 0 held: fragments of parameters, fp32
        state-00001-of-00002.safetensors
        manifest.json                       step, cursor, configs, data fingerprint, versions; bytes and sha256 of every
                                            file; of every parameter its shape, where its fragments are, its hashes

A fragment is a stretch of a flattened parameter, so a reader of any world size, ZeRO stage, precision or sequence
degree puts what it needs together from the files and reads no other bytes. The hashes do not depend on the cut (see
state_hash), so a restored engine proves that it holds what was saved. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from lmp.data.stream import Cursor
from lmp.errors import UserError
from lmp.train.checkpoint_writer import Written, file_name, set_random_states
from lmp.train.run_folder import RunFolder, write_atomic
from lmp.train.state_hash import MODULUS, as_signed, fragment_hash
from lmp.train.zero_state import PARTS, held, publish, set_optimizer_step, shapes, trained

if TYPE_CHECKING:
    from lmp.model import LmpConfig
    from lmp.train.engine import Engine

FORMAT = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Progress:
    """What a run has done, and where in the stream it goes on; `health` is what policy.Memory holds."""

    step: int
    cursor: Cursor
    shots_seen: int
    tokens_seen: int
    health: dict[str, Any] = field(default_factory=dict)

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


def folder_of(folder: RunFolder, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder.checkpoints / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def found(folder: RunFolder) -> list[Path]:
    """The checkpoints of a run, newest first, valid or not."""
    named = (p for p in folder.checkpoints.glob("step-*") if p.name.removeprefix("step-").isdecimal() and p.is_dir())
    return sorted(named, key=step_of, reverse=True)


def newest_valid(
    folder: RunFolder, *, rank: int = 0, world_size: int = 1, before: int | None = None
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole. Collective when there are several processes: they share the work and agree.

    Returns:
        the folder (None when there is none), and why newer ones were passed over.
    """
    # All look at the list of one, for a shared file system need not show all the same at once.
    listed = [path.name for path in found(folder) if before is None or step_of(path) < before]
    if world_size > 1:
        told: list[Any] = [listed]
        dist.broadcast_object_list(told, src=0)
        listed = told[0]
    passed_over: list[str] = []
    for name in listed:
        path = folder.checkpoints / name
        faults = verify(path, part=rank, parts=world_size)
        if world_size > 1:
            gathered: list[Any] = [None] * world_size
            dist.all_gather_object(gathered, faults)
            faults = list(dict.fromkeys(fault for some in gathered for fault in some))
        if not faults:
            return path, passed_over
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        passed_over.append(faults[0] + more)
    return None, passed_over


def verify(path: Path, *, part: int = 0, parts: int = 1, content: bool = True) -> list[str]:
    """What is wrong with a checkpoint.

    Args:
        path: its folder.
        part, parts: this process reads every `parts`-th file, from number `part`.
        content: read the files; else only their sizes are looked at.
    """
    try:
        manifest = read_manifest(path)
        faults = _tiling_faults(manifest["tensors"])
        files = sorted(manifest["files"].items())
    except OSError as error:
        return [f"{path.name}: {MANIFEST} cannot be read ({type(error).__name__})"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path.name}: {error if isinstance(error, _ManifestError) else f'{MANIFEST} cannot be read'}"]
    faults = [f"{path.name}: {fault}" for fault in faults]
    for name, facts in files[part::parts]:
        file = path / name
        try:
            if not file.is_file():
                faults.append(f"{path.name}/{name}: is missing")
            elif file.stat().st_size != facts["bytes"]:
                faults.append(f"{path.name}/{name}: has {file.stat().st_size} bytes instead of {facts['bytes']}")
            elif content and _sha256(file) != facts["sha256"]:
                faults.append(f"{path.name}/{name}: its content does not match its sha256")
        except OSError as error:
            faults.append(f"{path.name}/{name}: cannot be read ({error.strerror})")
    return faults


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, held against its own sha256.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of another format.
    """
    raw = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise _ManifestError(f"{MANIFEST} cannot be read ({type(error).__name__})") from error
    if version != FORMAT:
        raise _ManifestError(f"is of format {version}, this lmp reads format {FORMAT}")
    body = raw[: -len(_seal(b""))]
    if raw != body + _seal(body):
        raise _ManifestError(f"{MANIFEST}: its content does not match its sha256")
    return manifest


def write_manifest(path: Path, shares: Iterable[Written], state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint whose files are all written.

    Args:
        path: the folder.
        shares: what the ranks wrote.
        state: `shapes` of all parameters, names of the `trained` ones.
        facts: further entries.

    Raises:
        OSError: it cannot be written.
        RuntimeError: the fragments are not the whole state.
    """
    shares = sorted(shares, key=lambda share: share.file)
    tensors: dict[str, Any] = {
        name: {"shape": shape, "fragments": {part: [] for part in parts}, "hashes": dict.fromkeys(parts, 0)}
        for name, shape in state["shapes"].items()
        for parts in [PARTS if name in state["trained"] else PARTS[:1]]
    }
    for number, share in enumerate(shares):
        for stretch, value in zip(share.stretches, share.hashes, strict=True):
            tensor = tensors[stretch.name]
            tensor["fragments"][stretch.part].append([stretch.start, stretch.stop, number])
            tensor["hashes"][stretch.part] = (tensor["hashes"][stretch.part] + value) % MODULUS
    for tensor in tensors.values():
        for ranges in tensor["fragments"].values():
            ranges.sort()
    if faults := _tiling_faults(tensors):
        raise RuntimeError(f"{path.name}: {faults[0]}")
    manifest = {
        "format": FORMAT,
        **facts,
        "files": {share.file: {"bytes": share.bytes, "sha256": share.sha256} for share in shares},
        "tensors": tensors,
    }
    body = ("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in manifest.items())).encode()
    write_atomic(path / MANIFEST, (body + _seal(body)).decode())


def restore(path: Path, engine: Engine) -> Progress:
    """Load a verified checkpoint into an engine and prove that the engine holds it. Collective.

    Random states are restored too where the world size is the one of the checkpoint.

    Raises:
        UserError: the checkpoint holds other parameters than the model.
        RuntimeError: on all ranks, naming parameters: what the engine holds is not what was saved.
    """
    manifest = read_manifest(path)
    _check_fit(path, manifest, engine)
    hashes = {f"{part} of {name}": 0 for name, t in manifest["tensors"].items() for part in t["hashes"]}
    copies = dict.fromkeys(hashes, 1)
    with StateReader(path, manifest) as reader, torch.no_grad():
        pieces = held(engine)
        for piece in pieces:
            piece.values.copy_(reader.read(piece.name, piece.part, piece.offset, piece.stop))
        set_optimizer_step(engine, manifest["optimizer_step"])
        publish(engine)
        for piece in held(engine):
            values = piece.values
            if values.dtype != torch.float32:
                # A frozen weight of a bf16 run: rounded, it has no hash, so its source is proven in its place.
                source = reader.read(piece.name, piece.part, piece.offset, piece.stop).to(values.device)
                values = source if torch.equal(source.to(values.dtype), values) else values.float()
            what = f"{piece.part} of {piece.name}"
            hashes[what] = (hashes[what] + fragment_hash(values, piece.offset)) % MODULUS
            copies[what] = piece.copies
        if manifest["topology"]["world_size"] == engine.mesh.world_size:
            set_random_states(reader.random_states(engine.mesh.rank), engine.mesh.device)
    _compare(path, manifest, engine, hashes, copies)
    return Progress.from_json(manifest["progress"])


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
        path = folder_of(folder, step)
        passed_over = verify(path)
        path = None if passed_over else path
    if path is None:
        have = ", ".join(str(step_of(p)) for p in found(folder)) or "none"
        what = "no valid checkpoint" if step is None else f"no valid checkpoint of step {step} (there are: {have})"
        because = f": {'; '.join(passed_over)}" if passed_over else ""
        raise UserError(f"{run}: {what}{because}", remedy="let the run reach a checkpoint, or name another step")
    manifest = read_manifest(path)
    with StateReader(path, manifest) as reader:
        weights = {name: reader.whole(name, "weight") for name in manifest["tensors"]}
    return TrainedModel(
        config=LmpConfig(**manifest["model"]),
        weights=weights,
        step=manifest["progress"]["step"],
        manifest=manifest,
        path=path,
        finished=finished is not None,
    )


class StateReader:
    """Gives any stretch of any parameter's state, reading only its bytes; a context manager.

    Args:
        path: of a checkpoint.
        manifest: of it.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self._names = sorted(manifest["files"])
        self._files: dict[str, Any] = {}
        self._open = ExitStack()

    def read(self, name: str, part: str, start: int, stop: int) -> Tensor:
        """The values start .. stop of a flattened part, fp32 [stop - start]."""
        values = torch.empty(stop - start, dtype=torch.float32)
        for first, last, number in self.manifest["tensors"][name]["fragments"][part]:
            low, high = max(first, start), min(last, stop)
            if low < high:
                fragment = self._file(self._names[number]).get_slice(f"{name}/{part}@{first}")
                values[low - start : high - start] = fragment[low - first : high - first]
        return values

    def whole(self, name: str, part: str) -> Tensor:
        """A part of a parameter in its shape."""
        shape = torch.Size(self.manifest["tensors"][name]["shape"])
        return self.read(name, part, 0, shape.numel()).view(shape)

    def random_states(self, rank: int) -> dict[str, Any]:
        """What a rank's random generators held."""
        name = file_name(rank, self.manifest["topology"]["world_size"])
        return json.loads(self._file(name).metadata()["random"])

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = self._open.enter_context(safe_open(self.path / name, framework="pt"))
        return self._files[name]

    def __enter__(self) -> StateReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


class _ManifestError(ValueError):
    """What is wrong with a manifest, in words for a user."""


def _check_fit(path: Path, manifest: Mapping[str, Any], engine: Engine) -> None:
    stored, mine = manifest["tensors"], shapes(engine)
    remedy = "resume with the model section that the run was started with"
    if mine.keys() != stored.keys():
        lacks, adds = sorted(mine.keys() - stored.keys())[:3], sorted(stored.keys() - mine.keys())[:3]
        raise UserError(f"{path}: does not fit the model: lacks {lacks}, adds {adds}", remedy=remedy)
    for name, shape in mine.items():
        if shape != stored[name]["shape"]:
            raise UserError(f"{path}: {name} has shape {stored[name]['shape']}, the model's is {shape}", remedy=remedy)
    if frozen := sorted(name for name in trained(engine) if "exp_avg" not in stored[name]["fragments"]):
        raise UserError(f"{path}: {frozen[0]} was frozen and has no moments, here it is trained", remedy=remedy)


def _compare(
    path: Path, manifest: Mapping[str, Any], engine: Engine, hashes: Mapping[str, int], copies: Mapping[str, int]
) -> None:
    """Hold the hashes of all ranks' pieces against those of the manifest. Collective."""
    device = engine.mesh.device
    total = torch.tensor([as_signed(value) for value in hashes.values()], dtype=torch.int64, device=device)
    dist.all_reduce(total)
    shared = torch.tensor(list(copies.values()), dtype=torch.int64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    hold_moments = trained(engine)
    wrong = []
    for what, value, times in zip(hashes, total.tolist(), shared.tolist(), strict=True):
        part, _, name = what.partition(" of ")
        if part != "weight" and name not in hold_moments:
            continue
        if value % MODULUS != manifest["tensors"][name]["hashes"][part] * times % MODULUS:
            wrong.append(what)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RuntimeError(
            f"{path}: the restored state is not what was saved: {', '.join(wrong[:3])}{more}; this is a fault of lmp "
            "or of the machine, for the files match their sha256"
        )


def _tiling_faults(tensors: Mapping[str, Any]) -> list[str]:
    """Parameters that their fragments do not cover exactly once."""
    faults = []
    for name, tensor in tensors.items():
        count = torch.Size(tensor["shape"]).numel()
        for part, ranges in tensor["fragments"].items():
            edges = [0, *(edge for start, stop, _ in ranges for edge in (start, stop)), count]
            if any(before != after for before, after in zip(edges[::2], edges[1::2], strict=True)):
                faults.append(f"the fragments of {part} of {name} do not make each of its {count} values once")
    return faults


def _seal(body: bytes) -> bytes:
    """The end of a manifest: the sha256 of all that is before it."""
    return b',\n"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
