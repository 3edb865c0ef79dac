"""`lmp bench checkpoint`: for how long saving holds up the training, in the background and blocking.

The trainer's own engine takes real steps on made films. Between them the same state is saved by turns in both ways, so
a ratio is formed within a round, on one disk, at one load of the machine.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmp.scaling.bench_clock import spread
from lmp.scaling.bench_data import MADE_WIDTHS, machine_facts, make_corpus

if TYPE_CHECKING:
    from lmp.train.checkpointer import Checkpointer
    from lmp.train.trainer import Start


@dataclass(frozen=True)
class CheckpointSettings:
    """What is saved, and how often.

    Attributes:
        width, layers: of the model (contextual and cross-modal layers alike).
        rounds: of one blocking save and one in the background.
        folder: where the checkpoints are written; None: a temporary one.
    """

    width: int
    layers: int
    rounds: int
    folder: Path | None = None


@dataclass
class CheckpointReport:
    """Seconds of each round.

    Attributes:
        bytes: of the state that is saved.
        blocking: for how long a blocking save held up the training.
        stall: the same in the background: the copy, and the completion some steps later.
        written: from a save in the background to its completion.
        quiet, beside: a training step while nothing is written, and while something is.
    """

    settings: dict[str, Any]
    parameters: int
    bytes: int
    blocking: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)
    quiet: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=machine_facts)

    @property
    def ratios(self) -> list[float]:
        """Stall in the background over a blocking save's, round by round."""
        return [stall / blocking for stall, blocking in zip(self.stall, self.blocking, strict=True)]

    def to_json(self) -> dict[str, Any]:
        timed = ("blocking", "stall", "ratios", "written", "quiet", "beside")
        return {**asdict(self), "ratios": self.ratios, "summary": {name: spread(getattr(self, name)) for name in timed}}


def bench_checkpoint(settings: CheckpointSettings) -> CheckpointReport:
    """Measure; a first round that makes room in host memory and on disk is not counted."""
    from lmp.data.index import FilmIndex
    from lmp.data.loader import PackLoader
    from lmp.parallel.mesh import mesh
    from lmp.train.run_folder import RunFolder
    from lmp.train.trainer import Start

    with (
        tempfile.TemporaryDirectory(prefix="lmp-bench-", dir=settings.folder) as scratch,
        mesh(1, timeout_minutes=5) as here,
    ):
        shards = Path(scratch) / "shards"
        make_corpus(shards, 512 * 2 * sum(MADE_WIDTHS.values()) / 1e9)
        run = Start(_config(settings, shards), RunFolder(Path(scratch) / "run"), FilmIndex.load(shards), here)
        parameters = sum(p.numel() for p in run.engine.module.parameters())
        report = CheckpointReport(
            {**asdict(settings), "folder": str(settings.folder or "")}, parameters, 12 * parameters
        )
        with PackLoader(run.index, run.plan, pin=here.device.type == "cuda") as loader:
            rounds = _Rounds(run, loader, report, Path(scratch))
            rounds.go(settings.rounds)
        run.engine.close()
    return report


class _Rounds:
    """Steps of an engine, with saves of both kinds between them."""

    def __init__(self, run: Start, loader: Any, report: CheckpointReport, scratch: Path) -> None:
        from lmp.train.checkpointer import Checkpointer
        from lmp.train.run_folder import RunFolder

        self.run, self.loader, self.report = run, loader, report
        self.steps = 0
        self.savers: dict[str, Checkpointer] = {}
        for name, asynchronous in (("blocking", False), ("background", True)):
            folder = RunFolder(scratch / name)
            folder.path.mkdir()
            keep_one = run.config.checkpoint.model_copy(update={"asynchronous": asynchronous, "keep": 1})
            self.savers[name] = Checkpointer(folder, run.engine, keep_one, {})

    def go(self, rounds: int) -> None:
        for number in range(rounds + 1):
            self._blocking(self.savers["blocking"])
            self._quiet_steps()
            self._background(self.savers["background"])
            self._quiet_steps()
            if number == 0:
                for timed in ("blocking", "stall", "written", "quiet", "beside"):
                    getattr(self.report, timed).clear()
        for saver in self.savers.values():
            saver.close()

    def _blocking(self, saver: Checkpointer) -> None:
        self._step()
        saver.save(self._progress())
        saver.settle()
        self._check(saver)
        self.report.blocking.append(saver.seconds_stalled())

    def _background(self, saver: Checkpointer) -> None:
        self._step()
        began = time.perf_counter()
        saver.save(self._progress())
        beside = []
        while saver.writing:
            beside.append(self._step())
        saver.poll(writing=False)
        self._check(saver)
        self.report.written.append(time.perf_counter() - began)
        self.report.stall.append(saver.seconds_stalled())
        # During the last step the writing came to its end.
        self.report.beside += beside[:-1] or beside
        saver.settle()

    def _quiet_steps(self) -> None:
        for _ in range(3):
            self.report.quiet.append(self._step())

    def _step(self) -> float:
        from lmp.train.step import accumulate

        batch = next(self.loader)
        began = time.perf_counter()
        accumulate(self.run.engine, self.run.objectives, batch, self.run.config, rivals=False)
        self.run.engine.step(1e-6)
        self.steps += 1
        return time.perf_counter() - began

    def _progress(self) -> Any:
        from lmp.train.checkpoint import Progress

        return Progress(step=self.steps, cursor=self.run.stream.first(), shots_seen=0, tokens_seen=0)

    def _check(self, saver: Checkpointer) -> None:
        if saver.failure:
            raise OSError(saver.failure)


def _config(settings: CheckpointSettings, shards: Path) -> Any:
    from lmp.config import validate

    layers = {"contextual_layers": settings.layers, "cross_layers": settings.layers}
    return validate(
        {
            "name": "bench",
            "data": {"train": [str(shards)], "pack_shots": 64, "packs_per_step": 1},
            "model": {"width": settings.width, "heads": max(1, settings.width // 128), **layers},
            "train": {"steps": 10**6},
        },
        source="lmp bench checkpoint",
    )
