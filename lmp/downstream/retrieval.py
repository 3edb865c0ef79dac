"""Masked-shot and cross-modal retrieval on held-out films, each beside its rivals.

Masked-shot: some shots are hidden from the model, and each must be found among all hidden shots of all films.
The gallery holds hidden shots only, so the shot that `copy` copies is never in the way of its own guess.

Cross-modal: a shot's target modality is guessed from the sources alone and must be found among all shots.
There the gallery does hold the shot that `copy` copies; it is taken out for that query.

Contextual features know their position, and two views of one shot share it, so position alone finds much.
The rival `position` says how much: it knows the place in the run and nothing else. `model_moved` is the model
asked with the beginning of each film left out, so that a shot's position differs between query and gallery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor

from lmp.data.index import FilmIndex
from lmp.downstream.features import Film, Scaling, films, run_film, run_lengths, run_positions
from lmp.downstream.metrics import RetrievalMetrics, Ties, chance, cosine_ranks, summarise
from lmp.downstream.rivals import Ridge, guess
from lmp.model.modeling_lmp import LmpForPretraining
from lmp.objectives.masking import draw_masks


@dataclass(frozen=True)
class RetrievalSettings:
    """How retrieval is asked.

    Attributes:
        mask_ratio: share of valid shots hidden, as trained.
        mask_span: length of the hidden runs, as trained.
        max_shots: longest run of shots the model sees at once, as trained; None for whole films.
        ties: how equal scores are settled.
    """

    mask_ratio: float = 0.15
    mask_span: int = 1
    max_shots: int | None = None
    ties: Ties = "mean"


@dataclass
class _Rows:
    """Rows of a query or gallery, film after film."""

    parts: list[Tensor] = field(default_factory=list)

    def add(self, rows_ND: Tensor) -> None:
        self.parts.append(rows_ND)

    @property
    def count(self) -> int:
        return sum(len(part) for part in self.parts)

    def cat(self) -> Tensor:
        return torch.cat(self.parts)


def hidden_shots(film: Film, *, seed: int, settings: RetrievalSettings) -> dict[str, Tensor]:
    """The shots to hide, per modality [N] bool: drawn as in training, from (seed, film, shot) alone."""
    shots = len(film.shots_N2)
    return draw_masks(
        film.valid,
        torch.full((shots,), film.number),
        torch.arange(shots),
        seed=seed,
        epoch=0,
        pack=0,
        ratio=settings.mask_ratio,
        span=settings.mask_span,
    )


def masked_shot(
    models: dict[str, LmpForPretraining],
    index: FilmIndex,
    *,
    scaling: Scaling,
    seed: int,
    settings: RetrievalSettings,
) -> dict[str, dict[str, RetrievalMetrics]]:
    """Masked-shot retrieval under one draw.

    Args:
        models: contender -> model; all see the same films with the same shots hidden.
        index: held-out films.
        scaling: of the base features.
        seed: of the draw.
        settings: how it is asked.

    Returns:
        modality -> contender -> metrics, with the rivals copy, mean, near and chance. A modality with fewer
        than two hidden shots is left out.
    """
    modalities = tuple(scaling.mean)
    queries: dict[str, dict[str, _Rows]] = {name: {} for name in modalities}
    gallery: dict[str, dict[str, _Rows]] = {name: {} for name in modalities}
    for film in films(index, modalities):
        masked = hidden_shots(film, seed=seed, settings=settings)
        lengths = run_lengths(len(film.shots_N2), settings.max_shots)
        for contender, model in models.items():
            found = run_film(model, film, max_shots=settings.max_shots, masked=masked)
            for name in modalities:
                queries[name].setdefault(contender, _Rows()).add(found.predicted[name][masked[name]])
                gallery[name].setdefault(contender, _Rows()).add(found.target[name][masked[name]])
        for name in modalities:
            base_ND = scaling.apply(film, name)
            asked_A = masked[name].nonzero()[:, 0]
            gallery[name].setdefault("base", _Rows()).add(base_ND[asked_A])
            guesses = guess(base_ND, film.valid[name] & ~masked[name], asked_A, lengths)
            for rival, rows_AD in guesses.rows.items():
                queries[name].setdefault(rival, _Rows()).add(rows_AD)
    found_by = {}
    for name in modalities:
        count = gallery[name]["base"].count if gallery[name] else 0
        if count >= 2:
            found_by[name] = {
                contender: summarise(
                    cosine_ranks(
                        rows.cat(),
                        gallery[name].get(contender, gallery[name]["base"]).cat(),
                        ties=settings.ties,
                    ),
                    count,
                )
                for contender, rows in queries[name].items()
            } | {"chance": chance(torch.full((count,), count), count)}
    return found_by


@dataclass
class _Views:
    """Two views of the shots of all films, and which of them are asked and offered.

    Gallery rows are all offered shots in order; `own` numbers the asked ones among them.
    """

    query: _Rows = field(default_factory=_Rows)
    gallery: _Rows = field(default_factory=_Rows)
    own: _Rows = field(default_factory=_Rows)

    def add(self, query_ND: Tensor, gallery_ND: Tensor, asked_N: Tensor, offered_N: Tensor) -> None:
        """One film. `asked` must be among `offered`."""
        number_N = offered_N.cumsum(0) - 1 + self.gallery.count
        self.query.add(query_ND[asked_N])
        self.gallery.add(gallery_ND[offered_N])
        self.own.add(number_N[asked_N])

    def metrics(self, ties: Ties) -> RetrievalMetrics:
        ranks_Q = cosine_ranks(self.query.cat(), self.gallery.cat(), self.own.cat(), ties=ties)
        return summarise(ranks_Q, self.gallery.count)


def cross_modal(
    model: LmpForPretraining, index: FilmIndex, *, settings: RetrievalSettings, moved: bool = False
) -> dict[str, RetrievalMetrics]:
    """Retrieval across modalities by one model; nothing is hidden, but queries read the sources alone.

    Args:
        model: what is measured.
        index: held-out films.
        settings: how it is asked.
        moved: leave the first third of every film out of the queries' pass, so that positions differ.

    Returns:
        "reconstruction" (query `reconstructed`, gallery `aligned` of the target) and every "query->gallery"
        pair of modalities (both `aligned`). A task with one candidate or no query is left out.
    """
    config = model.config
    modalities = tuple(config.modalities)
    views: dict[str, _Views] = {"reconstruction": _Views()}
    views |= {f"{a}->{b}": _Views() for a, b in permutations(modalities, 2)}
    for film in films(index, modalities):
        whole = run_film(model, film, max_shots=settings.max_shots)
        first = len(film.shots_N2) // 3 if moved else 0
        # Left-out shots are not asked and have no rows in the later pass: zeros keep the numbering.
        later = run_film(model, film, max_shots=settings.max_shots, first=first) if first else whole
        present_N = torch.arange(len(film.shots_N2)) >= first
        valid, target = film.valid, config.target
        asked_N = source_shots(film, target, config.sources) & present_N
        views["reconstruction"].add(_pad(later.reconstructed, first), whole.aligned[target], asked_N, valid[target])
        for a, b in permutations(modalities, 2):
            views[f"{a}->{b}"].add(
                _pad(later.aligned[a], first), whole.aligned[b], valid[a] & valid[b] & present_N, valid[b]
            )
    return {
        name: view.metrics(settings.ties)
        for name, view in views.items()
        if view.gallery.count >= 2 and view.query.count
    }


def cross_modal_rivals(
    index: FilmIndex,
    *,
    target: str,
    sources: Sequence[str],
    scaling: Scaling,
    ridge: Ridge | None,
    settings: RetrievalSettings,
) -> dict[str, dict[str, RetrievalMetrics]]:
    """The rivals of `cross_modal`, for the same queries and galleries.

    Returns:
        task -> rival -> metrics. "reconstruction" has copy, mean and near (which see the target modality of
        the other shots of the run), ridge (if given), position and chance; pairs have position and chance.
    """
    modalities = tuple(scaling.mean)
    base: dict[str, _Views] = {name: _Views() for name in ("copy", "mean", "near")}
    if ridge is not None:
        base["ridge"] = _Views()
    taken = _Rows()
    pairs = {f"{a}->{b}": (a, b) for a, b in permutations(modalities, 2)}
    asked_at = {name: _Rows() for name in ("reconstruction", *pairs)}
    offered_at = {name: _Rows() for name in ("reconstruction", *pairs)}
    for film in films(index, modalities):
        lengths = run_lengths(len(film.shots_N2), settings.max_shots)
        place_N = run_positions(lengths)
        valid_N, asked_N = film.valid[target], source_shots(film, target, sources)
        base_ND = scaling.apply(film, target)
        offered_before = base["copy"].gallery.count
        guesses = guess(base_ND, valid_N, torch.arange(len(valid_N)), lengths)
        number_N = torch.where(valid_N, valid_N.cumsum(0) - 1 + offered_before, -1)
        nearest_N = guesses.nearest_A
        taken.add(torch.where(nearest_N >= 0, number_N[nearest_N.clamp(min=0)], -1)[asked_N])
        for rival, rows_ND in guesses.rows.items():
            base[rival].add(rows_ND, base_ND, asked_N, valid_N)
        if ridge is not None:
            base["ridge"].add(ridge.predict(film), base_ND, asked_N, valid_N)
        asked_at["reconstruction"].add(place_N[asked_N])
        offered_at["reconstruction"].add(place_N[valid_N])
        for name, (a, b) in pairs.items():
            asked_at[name].add(place_N[film.valid[a] & film.valid[b]])
            offered_at[name].add(place_N[film.valid[b]])
    found: dict[str, dict[str, RetrievalMetrics]] = {}
    for name, asked in asked_at.items():
        if asked.count and offered_at[name].count >= 2:
            found[name] = blind_rivals(asked.cat(), offered_at[name].cat())
    if "reconstruction" in found:
        for rival, view in base.items():
            excluded_Q = taken.cat() if rival == "copy" else None
            ranks_Q = cosine_ranks(
                view.query.cat(),
                view.gallery.cat(),
                view.own.cat(),
                ties=settings.ties,
                excluded_Q=excluded_Q,
            )
            found["reconstruction"][rival] = summarise(ranks_Q, view.gallery.count)
    return found


def source_shots(film: Film, target: str, sources: Sequence[str]) -> Tensor:
    """Shots whose target and at least one source are there: [N] bool."""
    return film.valid[target] & torch.stack([film.valid[name] for name in sources]).any(0)


def blind_rivals(asked_Q: Tensor, offered_G: Tensor) -> dict[str, RetrievalMetrics]:
    """Chance, and the rival that knows the asked shot's position and draws among the candidates there.

    Args:
        asked_Q: position of each query.
        offered_G: position of each candidate.
    """
    gallery = len(offered_G)
    there = torch.bincount(offered_G)
    return {
        "position": chance(there[asked_Q], gallery),
        "chance": chance(torch.full((len(asked_Q),), gallery), gallery),
    }


def _pad(rows_ND: Tensor, first: int) -> Tensor:
    return torch.cat([rows_ND.new_zeros(first, rows_ND.shape[1]), rows_ND]) if first else rows_ND
