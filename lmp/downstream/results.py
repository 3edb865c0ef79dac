"""What an evaluation found, and what it proves."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmp.downstream.metrics import RetrievalMetrics


@dataclass(frozen=True)
class Score:
    """Mean over seeds, and sample deviation over seeds (0 where nothing is drawn, or with one seed)."""

    mean: float
    std: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """Mean and deviation of one value per seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


@dataclass
class RetrievalTable:
    """One retrieval: contender -> metric -> score. Contenders: model, untrained, chance and the rivals.

    `queries` and `gallery` are means over seeds, rounded.
    """

    queries: int
    gallery: int
    rows: dict[str, dict[str, Score]]

    @classmethod
    def of(cls, seeds: Sequence[dict[str, RetrievalMetrics]]) -> RetrievalTable:
        """One table of the same contenders measured under several seeds."""
        rows = {}
        for name in seeds[0]:
            flat = [seed[name].as_dict() for seed in seeds]
            rows[name] = {metric: Score.of([one[metric] for one in flat]) for metric in flat[0]}
        first = next(iter(seeds[0]))
        queries = round(statistics.fmean(seed[first].queries for seed in seeds))
        return cls(queries, round(statistics.fmean(seed[first].gallery for seed in seeds)), rows)


@dataclass
class ProbeTable:
    """One linear probe: contender -> accuracy. Contenders: model, raw, untrained, majority."""

    level: str
    classes: list[str]
    fit_items: int
    test_items: int
    rows: dict[str, Score]


@dataclass(frozen=True)
class Verdict:
    """One claim that the results must bear out."""

    name: str
    passed: bool
    detail: str


@dataclass
class EvaluationResult:
    """Everything that `lmp evaluate` found; `as_dict` is what results.json holds.

    Attributes:
        run: the run's folder name; step: the checkpoint's step.
        data: digest, number of films and shots of the evaluated shards.
        settings: how it was measured.
        masked_shot: modality -> table.
        cross_modal: reconstruction of the target modality from the others; None where nothing could be asked.
        alignment: "query->gallery" -> table.
        probes: label -> table.
        notes: what was left out, and why.
    """

    run: str
    step: int
    data: dict[str, Any]
    settings: dict[str, Any]
    masked_shot: dict[str, RetrievalTable] = field(default_factory=dict)
    cross_modal: RetrievalTable | None = None
    alignment: dict[str, RetrievalTable] = field(default_factory=dict)
    probes: dict[str, ProbeTable] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable, with the verdicts."""
        return dataclasses.asdict(self) | {"verdicts": [dataclasses.asdict(one) for one in verdicts(self)]}


JUDGED_METRICS = ("R@1", "mrr")
MASKED_RIVALS = ("chance", "copy", "mean", "untrained")
CROSS_RIVALS = ("chance", "position", "copy", "mean", "ridge", "untrained")
PROBE_RIVALS = ("majority", "raw", "untrained")


def mean_over_tables(tables: dict[str, RetrievalTable], contender: str, metric: str) -> float:
    """Plain mean of one figure over tables, such as over modalities."""
    return statistics.fmean(table.rows[contender][metric].mean for table in tables.values())


def verdicts(results: EvaluationResult) -> list[Verdict]:
    """Whether the model beats each rival: at R@1 and at MRR in retrieval, in accuracy at the place probe.

    Masked shots are judged on the mean over modalities. A rival that was not measured (ridge without training
    shards, probes without labels) is not judged, but masked-shot retrieval is: without figures it fails.
    With moved positions the model need only beat chance, which a model that matches positions alone does not.
    """
    found: list[Verdict] = []
    if not results.masked_shot:
        found.append(Verdict("masked-shot retrieval", False, "no modality has two hidden shots to tell apart"))
    else:
        tables = results.masked_shot
        for rival in MASKED_RIVALS:
            pairs = {m: _pair(tables, rival, m) for m in JUDGED_METRICS}
            found.append(_verdict(f"masked-shot retrieval beats {rival}", pairs))
    if results.cross_modal is not None:
        for rival in (name for name in CROSS_RIVALS if name in results.cross_modal.rows):
            pairs = {m: _pair({"": results.cross_modal}, rival, m) for m in JUDGED_METRICS}
            found.append(_verdict(f"cross-modal retrieval beats {rival}", pairs))
        if "model_moved" in results.cross_modal.rows:
            table = {"": results.cross_modal}
            pairs = {m: _pair(table, "chance", m, model="model_moved") for m in JUDGED_METRICS}
            found.append(_verdict("cross-modal retrieval with moved positions beats chance", pairs))
    place = results.probes.get("place")
    if place is not None:
        for rival in PROBE_RIVALS:
            pairs = {"accuracy": (place.rows["model"].mean, place.rows[rival].mean)}
            found.append(_verdict(f"place probe beats {rival}", pairs))
    return found


def _pair(tables: dict[str, RetrievalTable], rival: str, metric: str, *, model: str = "model") -> tuple[float, float]:
    return mean_over_tables(tables, model, metric), mean_over_tables(tables, rival, metric)


def _verdict(name: str, pairs: dict[str, tuple[float, float]]) -> Verdict:
    passed = all(model > rival for model, rival in pairs.values())
    detail = ", ".join(
        f"{metric} {100 * model:.1f} against {100 * rival:.1f} ({100 * (model - rival):+.1f})"
        for metric, (model, rival) in pairs.items()
    )
    return Verdict(name, passed, detail)
