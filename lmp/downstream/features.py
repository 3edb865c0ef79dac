"""Runs a model over films, one film a call, and hands back one row per shot.

A film that is longer than what the model was trained at is cut into runs of nearly equal length, which do not
see each other. Where a modality has K tokens in a shot, they are laid side by side in the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmp.data.index import FilmIndex
from lmp.errors import UserError
from lmp.model.configuration_lmp import LmpConfig
from lmp.model.modeling_lmp import LmpForPretraining


@dataclass
class Film:
    """One film as stored: shots_N2 in ms, features [N, K, D] and valid [N] per modality."""

    number: int
    key: str
    shots_N2: Tensor
    features: dict[str, Tensor]
    valid: dict[str, Tensor]

    def raw(self, modality: str) -> Tensor:
        """Base features as float32 [N, K * D], zeros where not valid."""
        return seen_features(self.features[modality], self.valid[modality])


@dataclass
class ShotFeatures:
    """What a model says about N shots, float32 on the CPU, K tokens side by side.

    Attributes:
        contextual: per modality [N, K * D].
        cross: [N, K_target * D].
        predicted, target, aligned: per modality [N, K * E].
        reconstructed: [N, K_target * E].
    """

    contextual: dict[str, Tensor]
    cross: Tensor
    predicted: dict[str, Tensor]
    target: dict[str, Tensor]
    aligned: dict[str, Tensor]
    reconstructed: Tensor

    def joined(self) -> Tensor:
        """Contextual features of all modalities and the cross-modal ones: [N, sum], what a probe reads."""
        return torch.cat([*self.contextual.values(), self.cross], dim=1)


def films(index: FilmIndex, modalities: tuple[str, ...]) -> Iterator[Film]:
    """The films of an index that have a shot, in order, with the named modalities only."""
    for number, count in enumerate(index.shots.tolist()):
        if count:
            read = index.read(number, 0, count)
            features = {name: read.features[name] for name in modalities}
            valid = {name: read.valid[name].bool() for name in modalities}
            yield Film(number, index.keys[number], read.shots_N2, features, valid)


def run_lengths(shots: int, max_shots: int | None) -> tuple[int, ...]:
    """Lengths of the runs that a film of `shots` shots is cut into: as few as fit, as equal as can be."""
    count = 1 if max_shots is None else -(-shots // max_shots)
    base, longer = divmod(shots, count)
    return (base + 1,) * longer + (base,) * (count - longer)


def run_positions(lengths: tuple[int, ...]) -> Tensor:
    """Place of every shot within its run: int64 [N]."""
    return torch.cat([torch.arange(length) for length in lengths])


def fresh_model(config: LmpConfig, seed: int) -> LmpForPretraining:
    """An untrained model of the same shape; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LmpForPretraining(config).float().eval()


def check_modalities(config: LmpConfig, index: FilmIndex, *, name: str) -> tuple[str, ...]:
    """The modalities that the model reads.

    Raises:
        UserError: the shards lack one of them, or hold it in another shape.
    """
    for modality, shape in config.modalities.items():
        held = index.modalities.get(modality)
        wanted = f"{modality} [{shape['tokens']}, {shape['width']}]"
        if held is None or (held.tokens, held.width) != (shape["tokens"], shape["width"]):
            there = "no such modality" if held is None else f"[{held.tokens}, {held.width}]"
            raise UserError(
                f"{name}: the model reads {wanted}, the shards hold {there}",
                remedy="evaluate on shards made by the same base encoders as the training shards",
            )
    return tuple(config.modalities)


@torch.no_grad()
def run_film(
    model: LmpForPretraining,
    film: Film,
    *,
    max_shots: int | None,
    masked: Mapping[str, Tensor] | None = None,
    first: int = 0,
) -> ShotFeatures:
    """One forward pass over a film, its runs end to end in one row.

    Args:
        model: in evaluation mode, on any device.
        film: what is read.
        max_shots: longest run; None for no limit.
        masked: per modality [N] bool, the shots to hide.
        first: leave out the shots before this one, so that every other shot changes its position.

    Raises:
        UserError: the model's output is not finite.
    """
    device = next(model.parameters()).device
    lengths = run_lengths(len(film.shots_N2) - first, max_shots)
    output = model(
        {name: rows[first:].to(device) for name, rows in film.features.items()},
        {name: rows[first:].to(device) for name, rows in film.valid.items()},
        lengths=lengths,
        positions=run_positions(lengths).to(device),
        times=(film.shots_N2[first:, 0].float() / 1000).to(device),
        masked=None if masked is None else {name: rows[first:].to(device) for name, rows in masked.items()},
    )
    shot_features = ShotFeatures(
        contextual={name: _rows(tokens) for name, tokens in output.contextual.items()},
        cross=_rows(output.cross),
        predicted={name: _rows(tokens) for name, tokens in output.predicted.items()},
        target={name: _rows(tokens) for name, tokens in output.target.items()},
        aligned={name: _rows(tokens) for name, tokens in output.aligned.items()},
        reconstructed=_rows(output.reconstructed),
    )
    if not torch.isfinite(shot_features.joined()).all():
        raise UserError(
            f"film {film.key}: the model's features are not finite",
            remedy="evaluate an earlier checkpoint (--step)",
        )
    return shot_features


def _rows(tokens_NKD: Tensor) -> Tensor:
    return tokens_NKD.float().flatten(1).cpu()


@dataclass
class Scaling:
    """Mean and deviation of every base feature over valid shots, per modality [K * D] float32."""

    mean: dict[str, Tensor]
    std: dict[str, Tensor]

    @classmethod
    def of(cls, index: FilmIndex, modalities: tuple[str, ...]) -> Scaling:
        """Measured over all valid shots of an index, film by film."""
        sums: dict[str, list[Tensor]] = {}
        for film in films(index, modalities):
            for name in modalities:
                rows_ND = film.raw(name)[film.valid[name]].double()
                one = [torch.tensor(float(len(rows_ND))), rows_ND.sum(0), rows_ND.square().sum(0)]
                sums[name] = [a + b for a, b in zip(sums[name], one, strict=True)] if name in sums else one
        mean, std = {}, {}
        for name, (count, total_D, square_D) in sums.items():
            mean_D = total_D / count.clamp(min=1)
            std_D = (square_D / count.clamp(min=1) - mean_D.square()).clamp(min=0).sqrt()
            mean[name] = mean_D.float()
            # A feature that never changes says nothing: its deviation of 0 becomes 1, so that it scales to 0.
            std[name] = torch.where(std_D > 1e-6 * mean_D.abs().clamp(min=1e-6), std_D, 1.0).float()
        return cls(mean, std)

    def apply(self, film: Film, modality: str) -> Tensor:
        """Centred and standardised base features [N, K * D], zeros where not valid."""
        rows_ND = (film.raw(modality) - self.mean[modality]) / self.std[modality]
        return rows_ND.masked_fill(~film.valid[modality][:, None], 0.0)


def seen_features(features_NKD: Tensor, seen_N: Tensor) -> Tensor:
    """Base features side by side [N, K * D] float32, zeros where not seen."""
    return features_NKD.float().flatten(1).masked_fill(~seen_N[:, None], 0.0)
