"""What becomes of a step whose loss or gradient is not finite, or far above what it was lately.

Decided from the loss and the norm of the gradient as reduced over all ranks, so that every rank decides the same. What
is remembered is in the checkpoint, so that a run that goes on decides as one that was never cut off.

A value is a spike when it is above median + sigmas * 1.4826 * MAD of the last values (the robust z-score of Iglewicz
and Hoaglin, How to Detect and Handle Outliers, 1993) and above `factor` times the median. Leaving out the update is
what OLMo does (OLMo 2, arXiv:2501.00656; there with mean and standard deviation of 128 steps); going back and past the
data of the spike is what PaLM did (arXiv:2204.02311, section 5.1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from lmp.config import HealthConfig

_MAD_TO_SIGMA = 1.4826  # of a normal distribution


class Action(IntEnum):
    """What is done about a step, the mildest first."""

    GO = 0
    SKIP = 1
    ROLL_BACK = 2
    STOP = 3


@dataclass(frozen=True)
class Verdict:
    """What is done about a step, and why."""

    action: Action
    reason: str = ""
    spike: bool = False


@dataclass(frozen=True)
class Memory:
    """What the policy remembers of a run; plain data.

    Attributes:
        skips: updates left out in the whole run.
        in_a_row: and without one made between them.
        rollbacks: in the whole run.
        spikes: values far above the others, whatever was done about them.
        losses, norms: of the last steps that were made.
    """

    skips: int = 0
    in_a_row: int = 0
    rollbacks: int = 0
    spikes: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Memory:
        """The inverse of to_json."""
        return cls(**facts)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Policy:
    """Judges steps by the settings and by what it remembers.

    Args:
        settings: section `health` of the configuration.
        memory: of the run so far.
    """

    def __init__(self, settings: HealthConfig, memory: Memory | None = None) -> None:
        self.settings = settings
        self.memory = memory or Memory()

    def gate(self, loss: float) -> Callable[[float], bool]:
        """What says, once the gradient's norm is known, whether the update of a step of this loss is made."""
        return lambda norm: self.judge(loss, norm).action is Action.GO

    def judge(self, loss: float, norm: float) -> Verdict:
        """What to do about a step. Changes nothing.

        Args:
            loss: of the step, over all ranks.
            norm: of its gradient before clipping, over all ranks.
        """
        settings = self.settings
        for what, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                return self._bounded(Action[settings.non_finite.upper()], f"the {what} is not finite")
        for what, value, before in (("loss", loss, self.memory.losses), ("gradient", norm, self.memory.norms)):
            if value > self.threshold(before, value):
                reason = f"the {what} is {value:.4g}, the last were around {statistics.median(before):.4g}"
                action = Action.GO if settings.spike.action == "none" else Action[settings.spike.action.upper()]
                return replace(self._bounded(action, reason), spike=True)
        return Verdict(Action.GO)

    def threshold(self, before: Sequence[float], value: float) -> float:
        """Above which a value is a spike; infinite while too little is known, and where it is plainly none."""
        spike = self.settings.spike
        if len(before) < spike.window // 2 or value <= spike.factor * max(0.0, min(before)):
            return math.inf
        middle = statistics.median(before)
        deviation = statistics.median(abs(value - middle) for value in before)
        return max(middle + spike.sigmas * _MAD_TO_SIGMA * deviation, middle + (spike.factor - 1) * abs(middle))

    def take(self, verdict: Verdict, loss: float, norm: float) -> None:
        """Remember a step on which all ranks have agreed."""
        memory, window = self.memory, self.settings.spike.window
        spikes = memory.spikes + verdict.spike
        if verdict.action is Action.GO:
            self.memory = replace(
                memory,
                in_a_row=0,
                spikes=spikes,
                losses=[*memory.losses, loss][-window:],
                norms=[*memory.norms, norm][-window:],
            )
        elif verdict.action is Action.SKIP:
            self.memory = replace(memory, skips=memory.skips + 1, in_a_row=memory.in_a_row + 1, spikes=spikes)
        else:
            self.memory = replace(memory, spikes=spikes)

    def rolled_back(self, then: Memory) -> None:
        """Go on with what was remembered at the checkpoint; what is bounded is counted on."""
        now = self.memory
        self.memory = replace(then, skips=now.skips, spikes=now.spikes, rollbacks=now.rollbacks + 1, in_a_row=0)

    def _bounded(self, action: Action, reason: str) -> Verdict:
        """Too many skips ask for going back, too much going back for a person."""
        settings, memory = self.settings, self.memory
        if action is Action.SKIP:
            if memory.in_a_row >= settings.max_skips_in_a_row:
                action, reason = Action.ROLL_BACK, f"{reason}, and {memory.in_a_row} updates in a row were left out"
            elif memory.skips >= settings.max_skips:
                action, reason = Action.ROLL_BACK, f"{reason}, and {memory.skips} updates were left out before"
        if action is Action.ROLL_BACK and memory.rollbacks >= settings.max_rollbacks:
            action, reason = Action.STOP, f"{reason}, and the run was rolled back {memory.rollbacks} times"
        return Verdict(action, reason)
