"""Metrics of the benchmarks but retrieval's (see `metrics`): one function each, on NumPy arrays.

All shares are in 0..1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

TIOU = (0.3, 0.4, 0.5, 0.6, 0.7)
"""Thresholds of the temporal overlap for event localisation (MUSES, Liu et al., CVPR 2021)."""


def average_precision(relevant_N: np.ndarray, score_N: np.ndarray) -> float:
    """Area under the precision-recall steps, equal scores taken together (scikit-learn's average_precision_score).

    Args:
        relevant_N: bool.
        score_N: higher is more likely relevant.

    Returns:
        nan where nothing is relevant.
    """
    relevant_N = np.asarray(relevant_N, dtype=bool)
    if not relevant_N.any():
        return float("nan")
    order = np.argsort(-np.asarray(score_N, dtype=np.float64), kind="stable")
    hits = np.cumsum(relevant_N[order])
    # Equal scores are one step of the curve: only its end counts.
    ends = np.append(np.flatnonzero(np.diff(np.asarray(score_N)[order])), len(order) - 1)
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def per_class_average_precision(relevant_NC: np.ndarray, score_NC: np.ndarray) -> np.ndarray:
    """Average precision of each class of a multi-label problem: [C], nan for a class without a positive.

    mAP is the mean of those that are numbers (MovieCuts, Pardo et al., ECCV 2022, section 4).
    """
    return np.array([average_precision(relevant_NC[:, c], score_NC[:, c]) for c in range(relevant_NC.shape[1])])


def per_class_accuracy(predicted_N: np.ndarray, true_N: np.ndarray) -> dict[int, float]:
    """Share of right answers among the items of each class that occurs; their mean is AVE's accuracy."""
    return {int(c): float((predicted_N[true_N == c] == c).mean()) for c in np.unique(true_N)}


def kendall_tau(predicted: Sequence[int], true: Sequence[int]) -> float:
    """(concordant - discordant) / all pairs, of two orders of the same items without ties.

    Raises:
        ValueError: fewer than two items, or other items.
    """
    if sorted(predicted) != sorted(true) or len(set(true)) != len(true) or len(true) < 2:
        raise ValueError(f"orders {list(predicted)} and {list(true)} are not of the same two or more items")
    place = {item: n for n, item in enumerate(predicted)}
    pairs = list(itertools.combinations(true, 2))
    return sum(1 if place[a] < place[b] else -1 for a, b in pairs) / len(pairs)


def purity(scenes_M2: np.ndarray, predicted_N2: np.ndarray) -> float:
    """Purity of two divisions of one film, in the convention of the published values for Open Video Scene Detection.

    P(scenes, predicted) * P(predicted, scenes), with P(X, Y) the sum over x of len(x) / T times the sum over y of
    overlap(x, y)^2 / len(x)^2. Lengths are end - start without + 1, and T is the last predicted end.

    Args:
        scenes_M2, predicted_N2: start and end of each scene, in frames (or any unit).
    """
    total = float(predicted_N2[-1, 1])

    def one_way(x_M2: np.ndarray, y_N2: np.ndarray) -> float:
        overlap_MN = _overlaps(x_M2, y_N2)
        length_M = (x_M2[:, 1] - x_M2[:, 0]).astype(np.float64)
        share_M = np.divide(
            (overlap_MN**2).sum(1), length_M**2, out=np.zeros_like(length_M), where=length_M > 0
        )  # a scene of one frame has length 0 here, and weight 0
        return float((length_M / total * share_M).sum())

    return one_way(scenes_M2, predicted_N2) * one_way(predicted_N2, scenes_M2)


def mean_iou(scenes_M2: np.ndarray, predicted_N2: np.ndarray) -> float:
    """Mean of both directions of the mean best intersection over union (SceneSeg, Rao et al., CVPR 2020).

    Every scene counts once, whatever its length. Spans are [start, end).
    """
    overlap_MN = _overlaps(scenes_M2, predicted_N2)
    length_M, length_N = (spans[:, 1] - spans[:, 0] for spans in (scenes_M2, predicted_N2))
    iou_MN = overlap_MN / np.maximum(length_M[:, None] + length_N[None] - overlap_MN, 1e-12)
    return float((iou_MN.max(1).mean() + iou_MN.max(0).mean()) / 2)


def temporal_iou(span_2: np.ndarray, spans_N2: np.ndarray) -> np.ndarray:
    """Intersection over union of one span with each of several: [N]."""
    shared_N = np.minimum(span_2[1], spans_N2[:, 1]) - np.maximum(span_2[0], spans_N2[:, 0])
    shared_N = np.maximum(shared_N, 0.0)
    union_N = (span_2[1] - span_2[0]) + (spans_N2[:, 1] - spans_N2[:, 0]) - shared_N
    return shared_N / np.maximum(union_N, 1e-12)


def suppress(spans_N2: np.ndarray, score_N: np.ndarray, *, threshold: float, top: int) -> np.ndarray:
    """Greedy non-maximum suppression: numbers of the spans kept, best first.

    Args:
        threshold: a span that overlaps a better one by more than this (tIoU) is dropped.
        top: at most so many are kept.
    """
    left = np.argsort(-score_N, kind="stable")
    kept: list[int] = []
    while len(left) and len(kept) < top:
        best, left = int(left[0]), left[1:]
        kept.append(best)
        left = left[temporal_iou(spans_N2[best], spans_N2[left]) <= threshold]
    return np.array(kept, dtype=np.int64)


Event = tuple[str, float, float]
"""Video, start, end."""


def detection_average_precision(
    truth: Sequence[Event], found: Sequence[tuple[str, float, float, float]], thresholds: Sequence[float] = TIOU
) -> np.ndarray:
    """Average precision of one class at each tIoU, as ActivityNet's toolkit defines it: [thresholds].

    Best-scored first, a prediction is right if it overlaps an event of its video, that no better prediction took, by
    at least the threshold; of several events it takes the one it overlaps most. Precision is interpolated (the
    largest at this recall or above).

    Args:
        truth: events of the class.
        found: predictions: video, start, end, score.
    """
    if not truth:
        return np.full(len(thresholds), np.nan)
    events = {
        video: np.array([one[1:] for one in group], dtype=np.float64)
        for video, group in itertools.groupby(sorted(truth), key=lambda one: one[0])
    }
    taken = [{video: np.zeros(len(spans), dtype=bool) for video, spans in events.items()} for _ in thresholds]
    right_TN = np.zeros((len(thresholds), len(found)), dtype=bool)
    order = np.argsort([-one[3] for one in found], kind="stable").tolist()
    for place, number in enumerate(order):
        video, start, end, _ = found[number]
        if video not in events:
            continue
        iou_E = temporal_iou(np.array([start, end]), events[video])
        for t, threshold in enumerate(thresholds):
            for event in np.argsort(-iou_E, kind="stable"):
                if iou_E[event] < threshold:
                    break
                if not taken[t][video][event]:
                    taken[t][video][event] = right_TN[t, place] = True
                    break
    return np.array([_interpolated(right_N, len(truth)) for right_N in right_TN])


def detection_map(
    truth: Mapping[str, Sequence[Event]],
    found: Mapping[str, Sequence[tuple[str, float, float, float]]],
    thresholds: Sequence[float] = TIOU,
) -> dict[str, float]:
    """mAP at each tIoU over the classes that have an event, and `mean` over the thresholds."""
    table = [detection_average_precision(truth[c], found.get(c, ()), thresholds) for c in truth if truth[c]]
    by_threshold = np.mean(table, axis=0) if table else np.zeros(len(thresholds))
    flat = {f"mAP@{t:g}": float(value) for t, value in zip(thresholds, by_threshold, strict=True)}
    return flat | {"mean": float(by_threshold.mean())}


def _interpolated(right_N: np.ndarray, events: int) -> float:
    hits_N = np.cumsum(right_N)
    precision = np.concatenate([[0.0], hits_N / np.arange(1, len(right_N) + 1), [0.0]])
    recall = np.concatenate([[0.0], hits_N / events, [1.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(((recall[steps] - recall[steps - 1]) * precision[steps]).sum())


def _overlaps(x_M2: np.ndarray, y_N2: np.ndarray) -> np.ndarray:
    shared_MN = np.minimum(x_M2[:, None, 1], y_N2[None, :, 1]) - np.maximum(x_M2[:, None, 0], y_N2[None, :, 0])
    return np.maximum(shared_MN, 0).astype(np.float64)
