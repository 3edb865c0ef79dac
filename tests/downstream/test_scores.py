"""Metrics of the benchmarks: published values, other libraries, cases worked by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lmp.downstream.metrics import rank_scores, summarise
from lmp.downstream.scores import (
    average_precision,
    detection_average_precision,
    detection_map,
    kendall_tau,
    mean_iou,
    per_class_accuracy,
    per_class_average_precision,
    purity,
    suppress,
)
from lmp.downstream.tasks.condensed_movies import both_ways

GOLDEN_NAMES = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "R50": "R@50"}


def test_published_retrieval_rows(real_data: Path) -> None:
    golden = json.loads((real_data / "goldens" / "retrieval_metrics.json").read_text())
    a = np.random.default_rng(0).standard_normal((200, 200))
    b = a + 3 * np.eye(200)
    scores = {"A": a, "B": b, "C": np.round(b)}
    assert len(golden["rows"]) == 7
    for row in golden["rows"]:
        assert scores[row["matrix"]].sum() == pytest.approx(golden["checks"][row["matrix"]]["sum"], abs=1e-9)
        version = "challenge" if row["source"].startswith("m-bain/CondensedMovies-chall") else "2020"
        found = both_ways(torch.from_numpy(scores[row["matrix"]]), version=version)[row["side"]]
        for name, ours in GOLDEN_NAMES.items():
            assert 100 * found[ours] == pytest.approx(row[name], abs=1e-9)
        assert found["median_rank"] == row["MedR"]
        assert found["mean_rank"] == pytest.approx(row["MeanR"], abs=1e-9)
        assert 100 * found["geometric_mean"] == pytest.approx(row["gmean"], abs=1e-9)


def test_published_purity(real_data: Path) -> None:
    golden = json.loads((real_data / "goldens" / "scene_purity.json").read_text())
    checked = 0
    for film in golden["films"]:
        for one in film["predictions"].values():
            found = purity(np.array(film["scenes"]), np.array(one["predicted"]))
            assert found == pytest.approx(one["purity"], abs=1e-12)
            checked += 1
    assert checked == golden["count"]["values"] == 188


def test_a_rank_of_a_half_is_no_hit_at_one() -> None:
    scores = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    found = summarise(rank_scores(scores, ties="mean"), 2)
    assert found.recall[1] == 0.5
    assert found.recall[5] == 1.0
    assert both_ways(scores, version="challenge")["t2v"]["R@1"] == 1.0


def test_average_precision_by_hand() -> None:
    # Order by score: right, wrong, right, wrong -> (1/1 + 2/3) / 2.
    assert average_precision(np.array([0, 1, 1, 0]), np.array([0.8, 0.9, 0.4, 0.1])) == pytest.approx(5 / 6)
    # All tied: one step, precision 2/4.
    assert average_precision(np.array([0, 1, 1, 0]), np.ones(4)) == pytest.approx(0.5)
    assert math.isnan(average_precision(np.zeros(3), np.arange(3)))


def test_average_precision_as_in_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(4)
    relevant = random.random((300, 10)) < 0.2
    relevant[:, 9] = False
    for score in (random.standard_normal((300, 10)), random.integers(0, 5, (300, 10)).astype(float)):
        ours = per_class_average_precision(relevant, score)
        theirs = [metrics.average_precision_score(relevant[:, c], score[:, c]) for c in range(9)]
        assert ours[:9] == pytest.approx(theirs, abs=1e-12)
        assert math.isnan(ours[9])


def test_kendall_by_hand_and_as_in_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert kendall_tau([2, 0, 1], [0, 1, 2]) == pytest.approx(-1 / 3)
    for order in itertools.permutations(range(4)):
        place = np.argsort(order)
        assert kendall_tau(order, [0, 1, 2, 3]) == pytest.approx(stats.kendalltau(place, range(4)).statistic)
    with pytest.raises(ValueError, match="same two or more"):
        kendall_tau([0, 1], [0, 2])


def test_per_class_accuracy_weighs_classes_alike() -> None:
    found = per_class_accuracy(np.array([0, 0, 0, 0, 0]), np.array([0, 0, 0, 0, 1]))
    assert found == {0: 1.0, 1: 0.0}


def test_mean_iou_by_hand() -> None:
    scenes = np.array([[0, 10], [10, 20]])
    assert mean_iou(scenes, scenes) == 1.0
    # One scene over all: each true scene has IoU 1/2 with it, and it has 1/2 at best.
    assert mean_iou(scenes, np.array([[0, 20]])) == pytest.approx(0.5)
    # [0,10] against [0,10]: 1; [10,20] against [10,15] or [15,20]: 1/2. Back: 1, 1/2, 1/2.
    found = mean_iou(scenes, np.array([[0, 10], [10, 15], [15, 20]]))
    assert found == pytest.approx(((1 + 0.5) / 2 + (1 + 0.5 + 0.5) / 3) / 2)


def test_suppression_keeps_the_best_of_overlapping_spans() -> None:
    spans = np.array([[0.0, 10], [1, 10], [20, 30], [0, 4]])
    kept = suppress(spans, np.array([0.5, 0.9, 0.3, 0.8]), threshold=0.4, top=9)
    assert kept.tolist() == [1, 3, 2]
    assert suppress(spans, np.array([0.5, 0.9, 0.3, 0.8]), threshold=0.4, top=1).tolist() == [1]


def test_detection_by_hand() -> None:
    truth = [("a", 0.0, 10.0), ("b", 0.0, 10.0)]
    # Right; a second on the same event: wrong; tIoU 1/2 on b; another video: wrong.
    found = [("a", 0, 10, 0.9), ("a", 0, 9, 0.8), ("b", 5, 10, 0.7), ("c", 0, 10, 0.6)]
    # At 0.5: hits at places 1 and 3 of recall 1/2 and 1 -> (1 + 2/3) / 2. At 0.7: recall 1/2 at precision 1.
    assert detection_average_precision(truth, found, (0.5, 0.7)).tolist() == pytest.approx([5 / 6, 0.5])
    both = detection_map({"kiss": truth, "run": [("a", 0, 1)], "none": []}, {"kiss": found}, (0.5, 0.7))
    assert both == pytest.approx({"mAP@0.5": 5 / 12, "mAP@0.7": 0.25, "mean": 1 / 3})


def test_a_late_prediction_lifts_no_earlier_precision() -> None:
    # Wrong, then right: interpolated precision is 1/2 everywhere.
    found = [("a", 50, 60, 0.9), ("a", 0, 10, 0.8)]
    assert detection_average_precision([("a", 0.0, 10.0)], found, (0.5,)).tolist() == [0.5]
