"""Linear probes of given labels on frozen features: what can be read off them with one linear layer.

Every contender is treated alike: features standardised on the fitted items, logistic regression, its strength
chosen on a quarter of the fitted films. Items are split by film, never within one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmp.downstream.results import ProbeTable, Score
from lmp.errors import UserError

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
MAX_ITERATIONS = 1000

Features = list[np.ndarray]
"""Per film [N, D] float32."""


@dataclass
class ProbeItems:
    """Labelled items: the film of each, and its row in that film's features (-1: the mean over the film)."""

    film_I: np.ndarray
    row_I: np.ndarray
    label_I: np.ndarray

    def rows(self, features: Features, chosen_I: np.ndarray) -> np.ndarray:
        """Features of the chosen items: [I, D] float32."""
        pairs = zip(self.film_I[chosen_I].tolist(), self.row_I[chosen_I].tolist(), strict=True)
        return np.stack([features[film].mean(0) if row < 0 else features[film][row] for film, row in pairs])


@dataclass
class Split:
    """One draw: items to fit on and items to test on, of different films."""

    fit_I: np.ndarray
    test_I: np.ndarray


def shot_items(labels: Sequence[Sequence[str | None] | None]) -> ProbeItems:
    """Items of a label per shot; None where a film or a shot has none."""
    found = [
        (film, row, label)
        for film, shots in enumerate(labels)
        for row, label in enumerate(shots or ())
        if label is not None
    ]
    return _items(found)


def film_items(labels: Sequence[str | None]) -> ProbeItems:
    """Items of a label per film."""
    return _items([(film, -1, label) for film, label in enumerate(labels) if label is not None])


def draw_splits(
    items: ProbeItems, *, seeds: int, fit_films: set[int] | None = None, fit_share: float = 0.7
) -> list[Split]:
    """One split per seed, by film.

    Args:
        items: what is split.
        seeds: number of splits.
        fit_films: films to fit on, of which each seed takes four fifths; all other films are tested. Without
            them each seed takes `fit_share` of all films to fit on and tests on the rest.
        fit_share: see above.

    Returns:
        Nothing where either part would be empty.
    """
    films = np.unique(items.film_I)
    pool = (
        films if fit_films is None else np.array([film for film in films.tolist() if film in fit_films], dtype=np.int64)
    )
    share = fit_share if fit_films is None else 0.8
    count = max(1, round(share * len(pool)))
    splits = []
    for seed in range(seeds):
        chosen = np.random.default_rng([seed, 0xF11]).permutation(pool)[:count]
        fit_I = np.isin(items.film_I, chosen)
        test_I = ~fit_I if fit_films is None else ~np.isin(items.film_I, pool)
        if fit_I.any() and test_I.any():
            splits.append(Split(np.flatnonzero(fit_I), np.flatnonzero(test_I)))
    return splits


def probe(items: ProbeItems, split: Split, contenders: dict[str, Features]) -> dict[str, float]:
    """Test accuracy of every contender, and of the most frequent label of the fitted items (`majority`).

    Args:
        items: the labelled items.
        split: what is fitted and tested.
        contenders: name -> features.
    """
    fit_I, test_I = items.label_I[split.fit_I], items.label_I[split.test_I]
    accuracy = {"majority": float((test_I == _most_frequent(fit_I)).mean())}
    for name, features in contenders.items():
        predicted_I = _fit_and_predict(
            items.rows(features, split.fit_I),
            fit_I,
            items.film_I[split.fit_I],
            items.rows(features, split.test_I),
        )
        accuracy[name] = float((predicted_I == test_I).mean())
    return accuracy


def probe_table(items: ProbeItems, splits: Sequence[Split], accuracies: Sequence[dict[str, float]]) -> ProbeTable:
    """One table of the accuracies under each split."""
    return ProbeTable(
        level="film" if (items.row_I < 0).all() else "shot",
        classes=sorted(set(items.label_I.tolist())),
        fit_items=round(float(np.mean([len(split.fit_I) for split in splits]))),
        test_items=round(float(np.mean([len(split.test_I) for split in splits]))),
        rows={name: Score.of([one[name] for one in accuracies]) for name in accuracies[0]},
    )


def _items(found: list[tuple[int, int, str]]) -> ProbeItems:
    film, row, label = zip(*found, strict=True) if found else ((), (), ())
    return ProbeItems(np.array(film, dtype=np.int64), np.array(row, dtype=np.int64), np.array(label, dtype=object))


def _fit_and_predict(fit_ID: np.ndarray, label_I: np.ndarray, film_I: np.ndarray, test_ID: np.ndarray) -> np.ndarray:
    mean_D, std_D = fit_ID.mean(0, dtype=np.float64), fit_ID.std(0, dtype=np.float64)
    # A feature that never changes among the fitted items is dropped: nothing says how to scale it in a test.
    kept = std_D > 1e-6 * np.maximum(np.abs(mean_D), 1e-6)
    fit_ID = (fit_ID[:, kept] - mean_D[kept]) / std_D[kept]
    test_ID = (test_ID[:, kept] - mean_D[kept]) / std_D[kept]
    if len(set(label_I.tolist())) == 1 or not kept.any():
        return np.full(len(test_ID), _most_frequent(label_I), dtype=object)
    strength = _strength(fit_ID, label_I, film_I)
    return _fitted(fit_ID, label_I, strength).predict(test_ID).astype(object)


def _strength(fit_ID: np.ndarray, label_I: np.ndarray, film_I: np.ndarray) -> float:
    """The best on every fourth of the fitted films; a middle one where that cannot be tried."""
    films = np.unique(film_I)
    held_I = np.isin(film_I, films[::4])
    if len(films) < 4 or len(set(label_I[~held_I].tolist())) < 2:
        return STRENGTHS[1]
    scores = [
        (_fitted(fit_ID[~held_I], label_I[~held_I], strength).predict(fit_ID[held_I]) == label_I[held_I]).mean()
        for strength in STRENGTHS
    ]
    return STRENGTHS[int(np.argmax(scores))]


def _fitted(x_ID: np.ndarray, label_I: np.ndarray, strength: float) -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("probes need scikit-learn", remedy="pip install 'lmp[report]'") from error
    return LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit(x_ID, label_I.astype(str))


def _most_frequent(label_I: np.ndarray) -> str:
    """Of equally frequent labels, the first by name."""
    return min(Counter(label_I.tolist()).items(), key=lambda pair: (-pair[1], pair[0]))[0]
