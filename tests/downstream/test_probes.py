"""Probes: what is planted is found, what is shuffled is not; labels reach the shots they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lmp.downstream.labels import check_labels, overlapped_most, read_labels
from lmp.downstream.probes import draw_splits, film_items, probe, probe_table, shot_items
from lmp.errors import UserError


def planted(shuffled: bool) -> tuple[list[np.ndarray], list[list[str | None]]]:
    random = np.random.default_rng(0)
    weights = random.standard_normal((20, 4))
    features, labels = [], []
    for _ in range(20):
        x = random.standard_normal((30, 20)).astype(np.float32)
        label = (x @ weights + [1, 0, 0, 0]).argmax(1)
        label = random.permutation(label) if shuffled else label
        # Scales that only standardising can undo, and a column that says nothing.
        features.append(np.concatenate([x * np.logspace(-3, 3, 20, dtype=np.float32), np.ones((30, 1), np.float32)], 1))
        labels.append([None if n % 10 == 0 else f"class{c}" for n, c in enumerate(label)])
    return features, labels


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_planted_label_is_found_and_a_shuffled_one_is_not(shuffled: bool) -> None:
    features, labels = planted(shuffled)
    items = shot_items(labels)
    splits = draw_splits(items, seeds=2)
    table = probe_table(items, splits, [probe(items, split, {"model": features}) for split in splits])
    assert table.level == "shot"
    assert table.test_items == 6 * 27
    if shuffled:
        assert table.rows["model"].mean < table.rows["majority"].mean + 0.05
    else:
        assert table.rows["model"].mean > 0.85 > table.rows["majority"].mean


def test_splits_are_by_film() -> None:
    items = shot_items([["a", "b"]] * 10)
    for split in draw_splits(items, seeds=3):
        fit, test = set(items.film_I[split.fit_I]), set(items.film_I[split.test_I])
        assert not fit & test
        assert len(fit) == 7
        assert fit | test == set(range(10))
    first, second, _ = draw_splits(items, seeds=3)
    assert set(first.fit_I) != set(second.fit_I)


def test_training_films_are_fitted_and_all_others_tested() -> None:
    items = shot_items([["a", "b"]] * 10)
    for split in draw_splits(items, seeds=2, fit_films={5, 6, 7, 8, 9}):
        assert set(items.film_I[split.test_I]) == {0, 1, 2, 3, 4}
        assert len(set(items.film_I[split.fit_I])) == 4
        assert set(items.film_I[split.fit_I]) <= {5, 6, 7, 8, 9}


def test_a_single_film_cannot_be_split() -> None:
    assert draw_splits(shot_items([["a", "b"]]), seeds=2) == []


def test_film_labels_are_read_off_the_mean_over_shots() -> None:
    random = np.random.default_rng(0)
    labels = ["drama" if n % 2 else "comedy" for n in range(30)]
    features = [random.standard_normal((12, 3)).astype(np.float32) + (2 if name == "drama" else 0) for name in labels]
    items = film_items([*labels[:-1], None])
    splits = draw_splits(items, seeds=2)
    table = probe_table(items, splits, [probe(items, split, {"model": features}) for split in splits])
    assert table.level == "film"
    assert table.test_items == 9
    assert table.rows["model"].mean == 1.0


def test_the_most_overlapped_true_shot_wins() -> None:
    spans = np.array([[0, 1000], [1000, 3000], [3000, 3500]])
    shots = np.array([[0, 900], [800, 1300], [500, 1500], [3400, 9000], [4000, 5000]])
    assert overlapped_most(shots, spans).tolist() == [0, 1, 0, 2, -1]
    assert overlapped_most(shots, np.zeros((0, 2), dtype=np.int64)).tolist() == [-1] * 5


def test_labels_of_a_file(tmp_path: Path) -> None:
    content = {
        "film": {"genre": "noir", "cast": ["a", "b"]},
        "shots": [
            {"start_ms": 0, "end_ms": 1000, "place": "dock", "people": ["a"], "night": True, "light": 0.5},
            {"start_ms": 1000, "end_ms": 2000, "people": []},
        ],
        "fps": 24,
    }
    (tmp_path / "f.labels.json").write_text(json.dumps(content))
    found = read_labels(tmp_path, "f", np.array([[0, 900], [900, 2000], [5000, 6000]]))
    assert found is not None
    assert found.film == {"genre": "noir"}
    assert found.shots == {"place": ["dock", None, None], "night": ["True", None, None]}
    assert read_labels(tmp_path, "other", np.array([[0, 900]])) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"film": {}}', '{"shots": [{"place": "x"}]}', '{"shots": 3}'])
def test_a_broken_file_of_labels_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "f.labels.json").write_text(content)
    with pytest.raises(UserError, match=r"f\.labels\.json"):
        read_labels(tmp_path, "f", np.array([[0, 900]]))


def test_no_labels_at_all_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder") as missing:
        check_labels(tmp_path / "nowhere", 0)
    assert "KEY.labels.json" in missing.value.remedy
    with pytest.raises(UserError, match=r"no KEY\.labels\.json for any film"):
        check_labels(tmp_path, 0)
    check_labels(tmp_path, 1)
