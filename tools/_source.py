"""What is exported of a run: a checkpoint's model, or a part of it, with the training model's outputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmp.errors import UserError
from lmp.model import LmpConfig, LmpContextualConfig, LmpCrossConfig, LmpForPretraining
from lmp.train.checkpoint import TrainedModel, load_trained
from tools._output import listed

CROSS_MODAL = "cross_modal"
"""The part that is no modality's."""


@dataclass(frozen=True)
class Origin:
    """Where weights come from; also the head of fingerprint.json.

    Attributes:
        run: name of the run folder.
        step: optimizer steps made.
        finished: whether the run was finished.
        shots_seen: shots that training went over, repeats counted.
        tokens_seen: the same of tokens.
        data_digest: digest of the training shards.
        left_out: what the list of films that must not be trained on dropped (see FilmIndex.left_out); None without one.
        config_sha256: of the run's config.yaml.
        checkpoint_sha256: of the checkpoint's manifest.json, which holds the sha256 of every file of it.
        commit: of the code that trained; None if unknown.
        changed: whether the checkout differed from that commit.
        lmp: version that trained.
        license: of the exported weights.
    """

    run: str
    step: int
    finished: bool
    shots_seen: int | None
    tokens_seen: int | None
    data_digest: str
    left_out: dict[str, Any] | None
    config_sha256: str
    checkpoint_sha256: str
    commit: str | None
    changed: bool
    lmp: str | None
    license: str


@dataclass(frozen=True)
class Source:
    """A checkpoint, and what of it is exported.

    Attributes:
        trained: the checkpoint.
        model: the training model with its weights.
        part: a modality, `CROSS_MODAL`, or None for the whole model.
        with_heads: whether the heads of pretraining are exported.
        tied: name in the training model -> the name of the same parameter that comes first.
        origin: where the weights come from.
    """

    trained: TrainedModel
    model: LmpForPretraining
    part: str | None
    with_heads: bool
    tied: dict[str, str]
    origin: Origin

    def of_part(self, part: str) -> Source:
        """The same checkpoint, of which only a part is taken.

        Raises:
            UserError: the model has no such part.
        """
        parts = [*self.trained.config.modalities, CROSS_MODAL]
        if part not in parts:
            raise UserError(f"--part {part}: the model has no such part", remedy=f"name one of {', '.join(parts)}")
        if self.with_heads:
            raise UserError(f"--part {part} with --with-heads: heads belong to the whole model", remedy="leave one out")
        return replace(self, part=part)

    @property
    def ties(self) -> dict[str, str]:
        """Exported name -> the exported name whose tensor the training model shares with it."""
        pairs = (tuple(_exported_name(n, self.part, self.with_heads) for n in pair) for pair in self.tied.items())
        return {name: first for name, first in pairs if name is not None and first is not None}

    @property
    def config(self) -> LmpConfig:
        """The exported model's configuration, without `auto_map`."""
        facts = {key: value for key, value in self.trained.config.to_dict().items() if key != "model_type"}
        if self.part is None:
            config = LmpConfig(**facts)
        elif self.part == CROSS_MODAL:
            config = LmpCrossConfig(**facts)
        else:
            config = LmpContextualConfig(**facts, modality=self.part)
        config.architectures = [self.architecture]
        return config

    @property
    def architecture(self) -> str:
        """Name of the exported model's class."""
        if self.part is not None:
            return "LmpCrossModel" if self.part == CROSS_MODAL else "LmpContextualModel"
        return "LmpForPretraining" if self.with_heads else "LmpModel"

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads the exported model."""
        return "AutoModelForPreTraining" if self.with_heads else "AutoModel"

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """fp32 by the names of the exported model, each in memory of its own."""
        return {
            exported: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.model.state_dict().items()
            if (exported := _exported_name(name, self.part, self.with_heads)) is not None
        }

    @cached_property
    def digests(self) -> dict[str, tuple[int, str]]:
        """`digests` of the weights."""
        return digests(self.weights)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the exported model's forward, with every case of seen, hidden and missing shots."""
        whole = fixed_input(self.trained.config)
        if self.part is None:
            return whole
        shared = {key: whole[key] for key in ("times", "lengths")}
        if self.part == CROSS_MODAL:
            contextual = self._outputs["contextual"]
            return {"contextual": {name: contextual[name] for name in self.trained.config.sources}, **shared}
        return {key: whole[key][self.part] for key in ("features", "valid", "masked")} | shared

    @cached_property
    def expected(self) -> dict[str, Any]:
        """What the training model gives for `inputs`, by the exported model's output names."""
        if self.part is None:
            return self._outputs
        found = self._outputs["cross"] if self.part == CROSS_MODAL else self._outputs["contextual"][self.part]
        return {"last_hidden_state": found}

    @cached_property
    def _outputs(self) -> dict[str, Any]:
        with torch.no_grad():
            model: nn.Module = self.model if self.with_heads else self.model.lmp
            return dict(model.eval()(**fixed_input(self.trained.config)))

    def preprocessing(self) -> dict[str, Any]:
        """How the features that the model expects are made, as the training shards recorded it."""
        data = self.trained.manifest["data"]
        config = self.trained.config
        if self.part is None:
            names = list(config.modalities)
        else:
            names = list(config.sources) if self.part == CROSS_MODAL else [self.part]
        return {
            "modalities": {name: data["modalities"][name] for name in names},
            "encoders": {name: data["encoders"].get(name) for name in names},
            "shape": "features[NAME]: [shots, tokens, width]; one row per shot, in film order",
            "missing": "valid[NAME] is False where the shot lacks the modality; its row may hold anything",
            "times": "seconds from the start of the film to the start of the shot",
            "window_shots": trained_window(self.trained.manifest.get("config", {})),
        }


def trained_window(config: Mapping[str, Any]) -> int | None:
    """Shots in the windows of training, by a run's configuration; None if it does not say."""
    data = config.get("data") or {}
    return data.get("window_shots") or data.get("pack_shots")


def open_source(
    run: Path,
    *,
    step: int | None = None,
    part: str | None = None,
    with_heads: bool = False,
    allow_unfinished: bool = False,
    license_name: str = "unknown",
) -> Source:
    """The newest checkpoint of a run (or that of `step`), with its tensors held against the model's.

    Raises:
        UserError: no such run, step or part, not finished, or tensors that are not the model's.
    """
    trained = load_trained(run, step=step, require_finished=not allow_unfinished)
    model = LmpForPretraining(trained.config).float()
    ties = _ties(model)
    weights = dict(trained.weights)
    for name, first in ties.items():
        if first in weights:
            weights.setdefault(name, weights[first].clone())
            if not torch.equal(weights[name], weights[first]):
                raise UserError(
                    f"{trained.path}: {name} and {first} are one tensor in the model, but differ",
                    remedy="export another step, or the checkout that trained the run",
                )
    check_tensors(weights, model.state_dict(), source=str(trained.path))
    model.load_state_dict(weights, strict=True)
    source = Source(
        trained=trained,
        model=model.requires_grad_(False).eval(),
        part=None,
        with_heads=with_heads,
        tied=ties,
        origin=_origin(run, trained, license_name),
    )
    return source if part is None else source.of_part(part)


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
        raise UserError(
            f"{source}: {listed(faults)}",
            remedy="export another step, or the checkout that trained the run",
        )


def digests(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, str]]:
    """NAME -> (numel, sha256 of the bytes)."""
    return {
        name: (tensor.numel(), hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest())
        for name, tensor in weights.items()
    }


def aliases(weights: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of names whose tensors overlap in memory."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in weights.items() if t.numel())
    pairs, (end, last) = [], (0, "")
    for start, stop, name in spans:
        if start < end:
            pairs.append((last, name))
        if stop > end:
            end, last = stop, name
    return pairs


def _exported_name(name: str, part: str | None, with_heads: bool) -> str | None:
    """The name that a tensor of the training model has in the exported one; None if it is not exported."""
    if with_heads:
        return name
    if not name.startswith("lmp."):
        return None
    name = name.removeprefix("lmp.")
    if part is None:
        return name
    heads = ("cross.",) if part == CROSS_MODAL else (f"embeddings.{part}.", f"contextual.{part}.")
    return name if name.startswith((*heads, "positions.")) else None


def _ties(model: nn.Module) -> dict[str, str]:
    """Name -> the first name of the same parameter, for every further name that a parameter has."""
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (known := first.setdefault(id(parameter), name)) != name:
            ties[name] = known
    return ties


def _origin(run: Path, trained: TrainedModel, license_name: str) -> Origin:
    data = trained.manifest.get("data", {})
    lacking = [key for key in ("digest", "encoders", "modalities") if key not in data]
    lacking += [f"modalities.{m}" for m in trained.config.modalities if m not in data.get("modalities", {})]
    if lacking:
        raise UserError(
            f"{trained.path / 'manifest.json'}: lacks data.{lacking[0]}, so the features cannot be described",
            remedy="export a checkpoint that `lmp train` wrote",
        )
    code_file = run / "code.json"
    code = json.loads(code_file.read_text(encoding="utf-8")) if code_file.is_file() else {}
    progress = trained.manifest.get("progress", {})
    return Origin(
        run=run.resolve().name,
        step=trained.step,
        finished=trained.finished,
        shots_seen=progress.get("shots_seen"),
        tokens_seen=progress.get("tokens_seen"),
        data_digest=data["digest"],
        left_out=data.get("left_out"),
        config_sha256=hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest(),
        checkpoint_sha256=hashlib.sha256((trained.path / "manifest.json").read_bytes()).hexdigest(),
        commit=code.get("commit"),
        changed=bool(code.get("changed")),
        lmp=code.get("lmp"),
        license=license_name,
    )
