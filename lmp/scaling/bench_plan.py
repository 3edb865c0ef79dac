"""`lmp bench plan`: what planning an epoch costs, how full its packs are, how even the attention of ranks is."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from lmp.errors import UserError
from lmp.scaling.bench_data import in_process, lognormal_shots, machine_facts
from lmp.scaling.bench_readers import run_in_child

RANKS = 8
_MOST_STEPS = 1000


@dataclass(frozen=True)
class PlanReport:
    """What `lmp bench plan` found.

    Attributes:
        films, pack_shots, packs_per_step: as asked.
        cpu_seconds: of planning one epoch.
        peak_mb: resident memory at its peak, over that of a process that does all but planning.
        packs: in the epoch.
        fill: shots of films over all shots of the packs.
        imbalance_mean, imbalance_p95, imbalance_max: over steps, how much more attention the busiest of 8 ranks
            has than the mean rank: max / mean - 1.
        steps: steps looked at, spread evenly over the epoch.
        machine: see bench_data.machine_facts.
    """

    films: int
    pack_shots: int
    packs_per_step: int
    cpu_seconds: float
    peak_mb: float
    packs: int
    fill: float
    imbalance_mean: float
    imbalance_p95: float
    imbalance_max: float
    steps: int
    machine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Question(NamedTuple):
    films: int
    pack_shots: int
    packs_per_step: int


class _Cost(NamedTuple):
    cpu_seconds: float
    peak_bytes: int


class _Quality(NamedTuple):
    packs: int
    fill: float
    imbalance_S: np.ndarray


def bench_plan(films: int, pack_shots: int, packs_per_step: int) -> PlanReport:
    """Plan one epoch of films of lognormal length (1,220 shots on average); each part in its own process.

    Raises:
        UserError: a number below 1, packs that do not divide among 8 ranks, or fewer than 8 packs.
    """
    for name, value in (("films", films), ("pack-shots", pack_shots), ("packs-per-step", packs_per_step)):
        if value < 1:
            raise UserError(f"--{name} {value}", remedy="give at least 1")
    if packs_per_step % RANKS:
        raise UserError(f"--packs-per-step {packs_per_step}", remedy=f"give a multiple of the {RANKS} ranks simulated")
    question = _Question(films, pack_shots, packs_per_step)
    machine = machine_facts()
    idle: _Cost = in_process(_measure_nothing, question)
    cost: _Cost = in_process(_measure_cost, question)
    quality: _Quality = in_process(_measure_quality, question)
    imbalance_S = quality.imbalance_S
    return PlanReport(
        *question,
        cpu_seconds=cost.cpu_seconds,
        peak_mb=(cost.peak_bytes - idle.peak_bytes) / 1e6,
        packs=quality.packs,
        fill=quality.fill,
        imbalance_mean=float(imbalance_S.mean()),
        imbalance_p95=float(np.quantile(imbalance_S, 0.95)),
        imbalance_max=float(imbalance_S.max()),
        steps=len(imbalance_S),
        machine=machine,
    )


def _measure_nothing(question: _Question, answer: Connection) -> None:
    run_in_child(lambda: _cost_of(question, planned=False), answer)


def _measure_cost(question: _Question, answer: Connection) -> None:
    run_in_child(lambda: _cost_of(question, planned=True), answer)


def _measure_quality(question: _Question, answer: Connection) -> None:
    run_in_child(lambda: _quality_of(question), answer)


def _cost_of(question: _Question, *, planned: bool) -> _Cost:
    shots_F = _lengths(question)
    start = time.process_time()
    kept = _plan(question, shots_F) if planned else None
    seconds = time.process_time() - start
    del kept
    unit = 1 if sys.platform == "darwin" else 1024
    return _Cost(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _quality_of(question: _Question) -> _Quality:
    from lmp.data.stream import deal

    shots_F = _lengths(question)
    plan = _plan(question, shots_F)
    size = min(question.packs_per_step, plan.packs // RANKS * RANKS)
    if not size:
        raise UserError(f"{plan.packs} packs are fewer than {RANKS} ranks", remedy="give more films")
    steps = plan.packs // size
    imbalances = []
    for step in np.unique(np.linspace(0, steps - 1, min(steps, _MOST_STEPS)).astype(int)).tolist():
        packs = [plan.pack(step * size + n) for n in range(size)]
        loads = [sum(packs[slot].cost for slot in slots) for slots in deal(packs, RANKS)]
        imbalances.append(max(loads) * RANKS / sum(loads) - 1)
    return _Quality(plan.packs, int(shots_F.sum()) / (plan.packs * question.pack_shots), np.array(imbalances))


def _lengths(question: _Question) -> np.ndarray:
    return lognormal_shots(question.films, np.random.default_rng(0))


def _plan(question: _Question, shots_F: np.ndarray) -> Any:
    from lmp.data.plan import Films, PlanSettings, plan

    settings = PlanSettings(seed=0, pack_shots=question.pack_shots, packs_per_step=question.packs_per_step)
    return plan(Films(shots_F), settings, 0)
