"""Notices that a run has stopped moving, finds out who was first, and ends it so that it can be started again.

A thread on every rank knows what the main thread is at: phase, step, micro-batch, films, collectives entered. When the
main thread has not moved for `health.hang_seconds`, the rank writes the stacks of all its threads and its state to

    RUN/hangs/step-00000120/rank-0003.txt, rank-0003.json

and asks the others for the same, which their threads do even where their main threads are stuck. The first of those
that answered compares the states, names the first that diverged in report.txt, in the ledger and on stderr; then all
leave with exit code 75. Nothing of this needs communication: the run folder is the meeting place.

Collectives are counted by the process groups themselves (their sequence numbers), so DeepSpeed's count as ours do.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from lmp.config import Config
from lmp.errors import EXIT_AGAIN
from lmp.parallel.mesh import Mesh
from lmp.train.run_folder import RunFolder, write_atomic

SLOW_PHASES = ("saving", "restoring")
SLOW_FACTOR = 3.0
"""How much longer slow phases may take."""
_TRAIL = 400  # phases remembered: enough for the steps by which ranks can be apart


@dataclass(frozen=True)
class RankState:
    """What a rank was at when it was looked at; plain data.

    Attributes:
        rank, host, process: which one.
        phase, step, micro_batch: what its main thread was at.
        films: what it read or worked on.
        seconds: for how long it had not moved.
        collectives: entered since the start, over all process groups.
        trail: of the last phases: (step, micro_batch, phase, collectives when it began).
    """

    rank: int
    host: str
    process: int
    phase: str
    step: int
    micro_batch: int
    films: list[str]
    seconds: float
    collectives: int
    trail: list[tuple[int, int, str, int]] = field(default_factory=list)

    @property
    def where(self) -> str:
        """In words."""
        pack = f", micro-batch {self.micro_batch}" if self.micro_batch else ""
        films = f", films {', '.join(self.films[:8])}{', ...' if len(self.films) > 8 else ''}" if self.films else ""
        return f"rank {self.rank} on {self.host}: {self.phase}, step {self.step}{pack}{films}"


class Watch:
    """What the main thread is at. Telling it costs microseconds; nothing here communicates.

    Attributes:
        step: being made.
        micro_batch: from 1; 0 outside forward and backward.
        films: gives the films in hand; called when somebody asks.
    """

    def __init__(self) -> None:
        self.phase = "starting"
        self.steps_begun = 0
        self.step = 0
        self.micro_batch = 0
        self.films: Callable[[], Sequence[str]] = tuple
        self.moved_at = time.monotonic()
        self.trail: deque[tuple[int, int, str, int]] = deque(maxlen=_TRAIL)

    def enter(self, phase: str, *, micro_batch: int | None = None) -> None:
        """A phase begins; that is how the main thread tells that it moves."""
        self.phase = phase
        if micro_batch is not None:
            self.micro_batch = micro_batch
        self.trail.append((self.step, self.micro_batch, phase, collectives_entered()))
        self.moved_at = time.monotonic()

    def begin_step(self, step: int, films: Callable[[], Sequence[str]]) -> None:
        """A step begins: reading comes first.

        Args:
            step: from 1.
            films: gives those that are being read.
        """
        self.step, self.films = step, films
        self.steps_begun += 1
        self.enter("reading", micro_batch=0)

    @property
    def slow(self) -> bool:
        """Whether it may take long until something moves: what comes first also compiles, and saving writes much."""
        return self.steps_begun < 2 or self.phase in SLOW_PHASES

    def state(self, rank: int) -> RankState:
        return RankState(
            rank=rank,
            host=platform.node(),
            process=os.getpid(),
            phase=self.phase,
            step=self.step,
            micro_batch=self.micro_batch,
            films=list(self.films()),
            seconds=round(time.monotonic() - self.moved_at, 3),
            collectives=collectives_entered(),
            trail=list(self.trail),
        )


class Watchdog:
    """The thread that watches one rank; a context manager, which must be entered by all ranks together.

    Args:
        watch: what the main thread tells.
        folder: of the run.
        mesh: where this process stands.
        seconds: without a move, after which the run is taken for hung.
        leave: ends the process; it does not return.
    """

    def __init__(
        self,
        watch: Watch,
        folder: RunFolder,
        mesh: Mesh,
        *,
        seconds: float,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.watch, self.folder, self.mesh, self.seconds, self._leave = watch, folder, mesh, seconds, leave
        self._pause = min(5.0, seconds / 20)
        self._patience = min(60.0, max(2.0, seconds / 4))
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._asked = Path()

    def __enter__(self) -> Watchdog:
        # A name for this start that all ranks know and no other start has.
        told: list[Any] = [uuid.uuid4().hex]
        dist.broadcast_object_list(told, src=0)
        self._asked = self.folder.path / "hangs" / f".asked-{told[0]}"
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._pause):
            allowed = self.seconds * (SLOW_FACTOR if self.watch.slow else 1.0)
            if time.monotonic() - self.watch.moved_at > allowed or self._asked.exists():
                self._answer()

    def _answer(self) -> None:
        """Write what this rank was at, have the report made, and leave."""
        try:
            folder = self._meet()
            state = self.watch.state(self.mesh.rank)
            dump(folder, state)
            self._report(folder)
        except Exception as error:  # a full or dead disk must not keep the rank from leaving
            print(f"rank {self.mesh.rank}: no report of the hang: {error}", file=sys.stderr, flush=True)
        sys.stderr.flush()
        self._leave(EXIT_AGAIN)

    def _meet(self) -> Path:
        """The folder of this hang: that of the first rank that noticed."""
        hangs = self._asked.parent
        hangs.mkdir(parents=True, exist_ok=True)
        mine = self._asked.with_name(f"{self._asked.name}-{self.mesh.rank}")
        mine.write_text(_free(hangs / f"step-{self.watch.step:08d}").name, encoding="utf-8")
        try:
            os.link(mine, self._asked)  # whole or not at all, and only once
        except FileExistsError:
            pass
        finally:
            mine.unlink()
        folder = hangs / self._asked.read_text(encoding="utf-8")
        folder.mkdir(exist_ok=True)
        return folder

    def _report(self, folder: Path) -> None:
        """Wait for the other ranks; the first of those that answered writes the report, the others wait for it."""
        report = folder / "report.txt"
        deadline = time.monotonic() + self._patience
        while len(_answers(folder)) < self.mesh.world_size and time.monotonic() < deadline:
            time.sleep(0.05)
        answers = _answers(folder)
        if min(answers) == self.mesh.rank:
            states = [RankState(**json.loads(answers[rank].read_text(encoding="utf-8"))) for rank in sorted(answers)]
            found = diagnose(states, self.mesh.world_size)
            write_atomic(report, "\n".join(found.lines(states, self.seconds)) + "\n")
            first = found.words
            self.folder.note("hang", ranks=found.ranks, step=states[0].step, report=str(report), what=first)
            print(f"hang: {first}; see {report}", file=sys.stderr, flush=True)
        deadline = time.monotonic() + self._patience
        while not report.exists() and time.monotonic() < deadline:
            time.sleep(0.05)


def watchdog(watch: Watch, folder: RunFolder, mesh: Mesh, config: Config) -> AbstractContextManager[Any]:
    """The watchdog that a configuration asks for; entered by all ranks together."""
    if config.health.hang_seconds is None:
        return nullcontext()
    # Before the process group gives up by itself, which would tell less.
    seconds = min(config.health.hang_seconds, 0.8 * 60 * config.parallel.timeout_minutes)
    return Watchdog(watch, folder, mesh, seconds=seconds)


@dataclass(frozen=True)
class Diagnosis:
    """Who diverged first.

    Attributes:
        ranks: one, or several that are alike.
        words: how, in one line.
    """

    ranks: list[int]
    words: str

    def lines(self, states: Sequence[RankState], seconds: float) -> list[str]:
        """The report for people."""
        text = [f"no rank moved on for {seconds:g} s", f"first that diverged: {self.words}", "", "all ranks:"]
        text += [
            f"  {state.where}; for {state.seconds:.1f} s, {state.collectives} collectives entered" for state in states
        ]
        return [*text, "", "the stacks of each rank's threads are beside this file"]


def diagnose(states: Sequence[RankState], world_size: int) -> Diagnosis:
    """Name the first rank that diverged.

    In this order: a rank that does not answer at all; a rank that entered other collectives than most in a phase that
    all have left, in the earliest such phase; a rank that is behind all others. If all are at the same place in the
    same way, all are named.

    Args:
        states: of the ranks that answered.
        world_size: how many there are.
    """
    silent = sorted(set(range(world_size)) - {state.rank for state in states})
    if silent:
        return Diagnosis(
            silent, f"rank{_s(silent)} {_list(silent)} did not answer: ended, stopped, or its machine is gone"
        )
    odd = _other_collectives(states)
    if odd is not None:
        return odd
    position = {state.rank: _position(state) for state in states}
    behind = [state for state in states if position[state.rank] == min(position.values())]
    ranks = [state.rank for state in behind]
    if len(behind) == len(states):
        words = f"all {len(states)} ranks alike, such as {states[0].where}" if len(states) > 1 else states[0].where
        return Diagnosis(ranks, words)
    return Diagnosis(ranks, "; ".join(state.where for state in behind[:4]) + ", while the others wait")


def _other_collectives(states: Sequence[RankState]) -> Diagnosis | None:
    """The rank that entered fewer or more collectives than most in the earliest phase where any did.

    A rank that is still in a phase has entered at least so many there; one that has left it will enter no more.
    """
    phases = [_phases(state) for state in states]
    common = set(phases[0]).intersection(*phases[1:])
    for place in sorted(common, key=lambda place: phases[0][place].number):
        here = [own[place] for own in phases]
        left = [visit.collectives for visit in here if visit.left]
        if not left:
            continue
        usual = Counter(left).most_common(1)[0][0]
        odd = [
            state
            for state, visit in zip(states, here, strict=True)
            if (visit.left and visit.collectives != usual) or (not visit.left and visit.collectives > usual)
        ]
        if odd and 2 * len(odd) >= len(states):
            # Most have entered what the others have left out, or it is one rank against one.
            fewest = min(visit.collectives for visit in here if visit.left)
            odd = [s for s, visit in zip(states, here, strict=True) if visit.left and visit.collectives == fewest]
        if odd:
            first = odd[0]
            others = max(v.collectives for s, v in zip(states, here, strict=True) if s not in odd)
            mine = here[states.index(first)].collectives
            step, micro_batch, phase, _ = place
            pack = f", micro-batch {micro_batch}" if micro_batch else ""
            films = f", films {', '.join(first.films[:8])}" if first.films else ""
            return Diagnosis(
                [state.rank for state in odd],
                f"rank{_s(odd)} {_list([s.rank for s in odd])} on {first.host}: {phase}, step {step}{pack}{films}: "
                f"entered {mine} collectives there, the others {others}",
            )
    return None


@dataclass(frozen=True)
class _Visit:
    """A phase of a rank: which one of its trail, collectives entered in it, and whether it has left it."""

    number: int
    collectives: int
    left: bool


def _phases(state: RankState) -> dict[tuple[int, int, str, int], _Visit]:
    """Every phase by (step, micro_batch, phase, which of that name)."""
    seen: Counter[tuple[int, int, str]] = Counter()
    found = {}
    # A trail that was cut may lack phases of its first step, so that the later ones of it would be misnumbered.
    whole = state.trail[0][0] if len(state.trail) == _TRAIL else -1
    ends = [*(entry[3] for entry in state.trail[1:]), state.collectives]
    for number, ((step, micro_batch, phase, began), ended) in enumerate(zip(state.trail, ends, strict=True)):
        name = (step, micro_batch, phase)
        if step > whole:
            found[(*name, seen[name])] = _Visit(number, ended - began, left=number + 1 < len(state.trail))
        seen[name] += 1
    return found


def _position(state: RankState) -> tuple[int, int]:
    """How far a rank has come: its step, and the phases of it that it has begun."""
    return state.step, sum(1 for entry in state.trail if entry[0] == state.step)


def dump(folder: Path, state: RankState) -> None:
    """Write the state of a rank, and before it the stacks of all threads of this process."""
    file = folder / f"rank-{state.rank:04d}.txt"
    with file.open("w", encoding="utf-8") as text:
        text.write(f"{state.where}\nnot moved for {state.seconds} s, {state.collectives} collectives entered\n\n")
        text.flush()
        faulthandler.dump_traceback(text, all_threads=True)
    write_atomic(file.with_suffix(".json"), json.dumps(asdict(state)) + "\n")


def collectives_entered() -> int:
    """Over all process groups of this process, since they were made."""
    if not dist.is_initialized():
        return 0
    # torch has no public name for all groups of a process; tests/train/test_watchdog.py guards this one.
    groups: list[Any] = list(distributed_c10d._world.pg_names)
    return sum(group._get_sequence_number_for_group() for group in groups)


def _answers(folder: Path) -> dict[int, Path]:
    return {int(file.stem.removeprefix("rank-")): file for file in folder.glob("rank-*.json")}


def _free(path: Path) -> Path:
    """The path, or with a number behind it if an earlier start hung there."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def _s(many: Sequence[Any]) -> str:
    return "s" if len(many) > 1 else ""


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f", ... ({len(ranks)} in all)" if len(ranks) > 8 else "")
