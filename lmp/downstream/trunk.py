"""A pretrained model without heads, from a run or from an exported folder, run over windows of shots.

A window is a list of shots of one film in the order in which the model is to see them; it need not be the film's
order (shot ordering shows them shuffled). What comes out is one row of features per shot, by block: the contextual
features of each modality, the cross-modal ones, or the base features themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lmp.data.index import FilmIndex
from lmp.data.stats import read_times_and_valid
from lmp.downstream.features import run_lengths, run_positions, seen_features
from lmp.errors import UserError
from lmp.model import LmpConfig, LmpModel

BATCH_SHOTS = 2048
"""Shots in one row of several windows."""

Blocks = dict[str, Tensor]
"""Block -> [S, width] float32: the modalities' names, `cross`, and `base/NAME` for base features beside them."""


@dataclass(frozen=True)
class Window:
    """Shots of one film, in the order in which they are shown.

    Attributes:
        film: number in the index.
        rows_S: int64 [S], numbers of the shots in the film.
        hidden: places in the window of shots whose features the model may not see.
        in_time: shots begin when they do in the film; otherwise one after the other, so that times tell nothing.
    """

    film: int
    rows_S: np.ndarray
    hidden: tuple[int, ...] = ()
    in_time: bool = True


class Films:
    """The films of an index, read whole and kept while they are in use.

    Attributes:
        read: film -> shots, features, valid bits.
        shots: film -> shots alone.
    """

    def __init__(self, index: FilmIndex, *, kept: int = 256) -> None:
        self.index = index
        self.read = lru_cache(kept)(self._read)
        self.shots = lru_cache(None)(self._shots)

    def _shots(self, film: int) -> np.ndarray:
        """int64 [S, 2], milliseconds; no feature is read."""
        (times,) = read_times_and_valid(self.index, [film])
        return times.shots_N2.numpy().astype(np.int64)

    def _read(self, film: int) -> tuple[np.ndarray, dict[str, Tensor], dict[str, Tensor]]:
        count = int(self.index.shots[film])
        read = self.index.read(film, 0, count)
        valid = {name: read.valid[name].bool() for name in self.index.modalities}
        return read.shots_N2.numpy().astype(np.int64), dict(read.features), valid


@dataclass
class Trunk:
    """What is probed or fine-tuned.

    Attributes:
        model: the network; None stands for the base features themselves.
        name: of the run or folder.
        step: of the checkpoint, if known.
        max_shots: longest run of shots that see each other; None for no limit.
        modalities: what the network is shown; the others are missing in every shot.
        left_out: what the training data left out, as the checkpoint or folder says.
        with_base: the base features come, too, as blocks of their own.
    """

    model: LmpModel | None
    name: str
    modalities: tuple[str, ...]
    step: int | None = None
    max_shots: int | None = None
    left_out: dict[str, object] | None = field(default=None)
    with_base: bool = False

    def blocks(self, films: Films, windows: Sequence[Window]) -> list[Blocks]:
        """Features of each window's shots, on the CPU, without gradients."""
        found: list[Blocks] = []
        with torch.no_grad():
            for batch in _batches(windows):
                found += [{name: rows.cpu() for name, rows in one.items()} for one in self.run(films, batch)]
        return found

    def run(self, films: Films, windows: Sequence[Window]) -> list[Blocks]:
        """As `blocks`, in one row, with gradients and on the model's device."""
        shown = [_gather(films, window) for window in windows]
        sizes = [len(window.rows_S) for window in windows]
        features = {name: torch.cat([one[0][name] for one in shown]) for name in films.index.modalities}
        valid = {name: torch.cat([one[1][name] for one in shown]) for name in films.index.modalities}
        hidden_N = torch.zeros(sum(sizes), dtype=torch.bool)
        for first, window in zip(np.cumsum([0, *sizes]), windows, strict=False):
            hidden_N[[first + place for place in window.hidden]] = True
        base = {}
        if self.model is None or self.with_base:
            seen = {name: valid[name] & ~hidden_N for name in self.modalities}
            base = {
                name: torch.cat([seen_features(features[name], seen[name]), seen[name][:, None].float()], 1)
                for name in self.modalities
            }
        if self.model is None:
            rows = base
        else:
            lengths = tuple(length for size in sizes for length in run_lengths(size, self.max_shots))
            device = self.model.device
            output = self.model(
                {name: features[name].to(device) for name in self.modalities},
                {name: valid[name].to(device) for name in self.modalities},
                lengths=lengths,
                positions=run_positions(lengths).to(device),
                times=torch.cat([one[2] for one in shown]).to(device),
                masked={name: (valid[name] & hidden_N).to(device) for name in self.modalities},
            )
            rows = {name: output.contextual[name].float().flatten(1) for name in self.modalities}
            if any(name in self.modalities for name in self.model.config.sources):
                rows["cross"] = output.cross.float().flatten(1)
            rows |= {f"base/{name}": block.to(device) for name, block in base.items()}
        parts = {name: block.split(sizes) for name, block in rows.items()}
        return [{name: parts[name][n] for name in parts} for n in range(len(windows))]


def load_trunk(source: Path, *, step: int | None = None, window_shots: int | None = None) -> Trunk:
    """The trained network of a run folder or of a folder that tools/export_huggingface wrote.

    Args:
        source: the folder; an exported one holds config.json.
        step: a certain checkpoint of a run.
        window_shots: longest run of shots; default: as the run was trained, for an exported folder no limit but
            that of learned positions.

    Raises:
        UserError: neither, or one that cannot be loaded.
    """
    source = Path(source)
    if (source / "config.json").is_file():
        return _load_exported(source, step=step, window_shots=window_shots)
    from lmp.config import load_config
    from lmp.train.checkpoint import load_trained  # imports DeepSpeed's neighbourhood: only where a run is loaded

    trained = load_trained(source, step=step)
    model = LmpModel(trained.config).float().eval()
    model.load_state_dict(
        {name.removeprefix("lmp."): t for name, t in trained.weights.items() if name.startswith("lmp.")}
    )
    data = load_config(source / "config.yaml").data
    return Trunk(
        model=model.to(_device()),
        name=source.name,
        modalities=tuple(trained.config.modalities),
        step=trained.step,
        max_shots=window_shots or data.window_shots or data.pack_shots,
        left_out=trained.manifest.get("data", {}).get("left_out"),
    )


def _load_exported(folder: Path, *, step: int | None, window_shots: int | None) -> Trunk:
    if step is not None:
        raise UserError(f"{folder}: an exported folder holds one step", remedy="leave --step out, or give the run")
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != LmpConfig.model_type:
        raise UserError(f"{folder}: holds a model of type {kind}", remedy="export the whole model, not a part of it")
    try:
        model, info = LmpModel.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be loaded ({error})", remedy="export the run again") from error
    if info["missing_keys"]:
        raise UserError(
            f"{folder}: lacks {sorted(info['missing_keys'])[0]}",
            remedy="export the run again",
        )
    config: LmpConfig = model.config
    facts: dict[str, object] = {}
    if (folder / "fingerprint.json").is_file():
        facts = json.loads((folder / "fingerprint.json").read_text(encoding="utf-8"))
    left_out, of_step = facts.get("left_out"), facts.get("step")
    return Trunk(
        model=model.float().eval().to(_device()),
        name=str(facts.get("run", folder.resolve().name)),
        modalities=tuple(config.modalities),
        step=of_step if isinstance(of_step, int) else None,
        max_shots=window_shots or (config.max_positions if config.positions == "learned" else None),
        left_out=left_out if isinstance(left_out, dict) else None,
    )


def untrained(trunk: Trunk, seed: int) -> Trunk:
    """The same network with fresh weights; the global random state is left as it was."""
    assert trunk.model is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LmpModel(trunk.model.config).float().eval().to(trunk.model.device)
    assert isinstance(model, LmpModel)
    return Trunk(model, "untrained", trunk.modalities, max_shots=trunk.max_shots, with_base=trunk.with_base)


def base_features(trunk: Trunk) -> Trunk:
    """The features that the network reads, as they are."""
    return Trunk(None, "raw", trunk.modalities)


def choose_modalities(trunk: Trunk, names: Sequence[str]) -> None:
    """Show the network these modalities only.

    Raises:
        UserError: the network has no such modality.
    """
    if unknown := [name for name in names if name not in trunk.modalities]:
        raise UserError(
            f"{trunk.name} has no modality {unknown[0]}", remedy=f"choose from {', '.join(trunk.modalities)}"
        )
    trunk.modalities = tuple(name for name in trunk.modalities if name in names)


def joined(blocks: Mapping[str, Tensor]) -> Tensor:
    """All blocks side by side: [S, sum of the widths]."""
    return torch.cat(list(blocks.values()), dim=1)


def _gather(films: Films, window: Window) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Features, valid bits, and start times in seconds from the window's start."""
    shots_N2, features, valid = films.read(window.film)
    rows = torch.from_numpy(window.rows_S)
    spans_S2 = shots_N2[window.rows_S]
    if window.in_time and (np.diff(window.rows_S) > 0).all():
        start_S = spans_S2[:, 0] - spans_S2[0, 0]
    else:
        length_S = spans_S2[:, 1] - spans_S2[:, 0]
        start_S = np.cumsum(length_S) - length_S
    times = torch.from_numpy(start_S / 1000.0).float()
    return {n: x[rows] for n, x in features.items()}, {n: x[rows] for n, x in valid.items()}, times


def _batches(windows: Sequence[Window]) -> list[list[Window]]:
    batches: list[list[Window]] = []
    room = 0
    for window in windows:
        size = len(window.rows_S)
        if size > room:
            batches.append([])
            room = BATCH_SHOTS
        batches[-1].append(window)
        room -= size
    return batches


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
