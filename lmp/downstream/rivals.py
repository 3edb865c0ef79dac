"""The cheap rivals of retrieval, in the space of standardised base features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmp.data.index import FilmIndex
from lmp.downstream.features import Film, Scaling, films

NEAR_SHOTS = 10.0
"""Reach, in shots, of the rival that weighs its neighbours by exp(-distance / reach)."""
ALPHAS = (1.0, 10.0, 100.0, 1000.0, 10000.0)


@dataclass
class Guesses:
    """What the rivals put in place of A asked shots.

    Attributes:
        rows: rival -> [A, D], direction only (a sum where the mean is meant); 0 where nothing is seen.
        nearest_A: the shot that `copy` took, -1 where there is none.
    """

    rows: dict[str, Tensor]
    nearest_A: Tensor


def guess(base_ND: Tensor, seen_N: Tensor, asked_A: Tensor, lengths: Sequence[int], *, chunk: int = 1024) -> Guesses:
    """Guess asked shots from the seen shots of the same run, never from themselves.

    `copy` takes the nearest seen shot (of two, the earlier), `mean` all alike, `near` all, weighted by
    exp(-distance / 10).

    Args:
        base_ND: standardised base features of a film.
        seen_N: shots that may be used.
        asked_A: numbers of the shots asked for.
        lengths: the runs that the film is cut into.
        chunk: asked shots at a time; memory is chunk x N.
    """
    run_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place_N = torch.arange(len(seen_N))
    parts: dict[str, list[Tensor]] = {"copy": [], "mean": [], "near": []}
    nearest_parts = []
    for asked_B in asked_A.split(chunk):
        allowed_BN = seen_N & (run_N[asked_B, None] == run_N) & (asked_B[:, None] != place_N)
        distance_BN = (asked_B[:, None] - place_N).abs().float()
        # Half a shot more for later shots: of two equally near, the earlier wins.
        order_BN = (distance_BN + 0.5 * (place_N > asked_B[:, None])).masked_fill(~allowed_BN, float("inf"))
        nearest_B = torch.where(allowed_BN.any(1), order_BN.argmin(1), -1)
        nearest_parts.append(nearest_B)
        parts["copy"].append(base_ND[nearest_B.clamp(min=0)] * (nearest_B >= 0)[:, None])
        parts["mean"].append(allowed_BN.float() @ base_ND)
        parts["near"].append((allowed_BN * torch.exp(-distance_BN / NEAR_SHOTS)) @ base_ND)
    if not nearest_parts:
        return Guesses(dict.fromkeys(parts, base_ND[:0]), asked_A)
    return Guesses({name: torch.cat(rows) for name, rows in parts.items()}, torch.cat(nearest_parts))


class Ridge:
    """Linear regression from a shot's source features to its target features, fitted on training films.

    Source features are standardised, zero where missing, with one column per source that says whether it is
    there. The strength is chosen on every fifth film by squared error, then all films are fitted.
    """

    def __init__(self, index: FilmIndex, *, target: str, sources: Sequence[str]) -> None:
        self.target, self.sources = target, tuple(sources)
        modalities = (*self.sources, target)
        self.scaling = Scaling.of(index, modalities)
        xx_held, xy_held = self._moments(f for f in films(index, modalities) if f.number % 5 == 0)
        xx_fit, xy_fit = self._moments(f for f in films(index, modalities) if f.number % 5 != 0)
        errors = []
        for alpha in ALPHAS:
            weight_IO = _solve(xx_fit, xy_fit, alpha)
            # Squared error on the held films, less the part that no weight changes.
            errors.append(float((weight_IO * (xx_held @ weight_IO)).sum() - 2 * (weight_IO * xy_held).sum()))
        self.alpha = ALPHAS[errors.index(min(errors))]
        self.weight_IO = _solve(xx_held + xx_fit, xy_held + xy_fit, self.alpha)

    def predict(self, film: Film) -> Tensor:
        """Standardised target features as guessed from the sources: [N, K * D] float32."""
        return (self._inputs(film) @ self.weight_IO).float()

    def _inputs(self, film: Film) -> Tensor:
        columns = [self.scaling.apply(film, name) for name in self.sources]
        flags = [film.valid[name].float()[:, None] for name in self.sources]
        return torch.cat([*columns, *flags, torch.ones(len(film.shots_N2), 1)], dim=1).double()

    def _moments(self, chosen: Iterable[Film]) -> tuple[Tensor, Tensor]:
        inputs = sum(self.scaling.mean[name].numel() for name in self.sources) + len(self.sources) + 1
        outputs = self.scaling.mean[self.target].numel()
        xx, xy = torch.zeros(inputs, inputs).double(), torch.zeros(inputs, outputs).double()
        for film in chosen:
            rows_N = film.valid[self.target]
            x_NI = self._inputs(film)[rows_N]
            y_NO = self.scaling.apply(film, self.target)[rows_N].double()
            xx, xy = xx + x_NI.T @ x_NI, xy + x_NI.T @ y_NO
        return xx, xy


def _solve(xx_II: Tensor, xy_IO: Tensor, alpha: float) -> Tensor:
    return torch.linalg.solve(xx_II + alpha * torch.eye(len(xx_II)).double(), xy_IO)
