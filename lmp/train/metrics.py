"""Where the numbers of a run go: JSON lines, TensorBoard, and a progress bar. Main process only."""

from __future__ import annotations

import json
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lmp.train.run_folder import RunFolder


class Recorder:
    """Writes each step's metrics; a silent one for the other ranks.

    Args:
        folder: of the run.
        steps: of the whole run.
        start: the step resumed from; events of later steps are purged.
        active: whether this process writes.
    """

    def __init__(self, folder: RunFolder, *, steps: int, start: int, active: bool) -> None:
        self.active = active
        if not active:
            return
        self._folder = folder
        self._open(start)
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:.0f} shots/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start, loss=float("nan"), rate=0.0)
        self._bar.start()

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.active:
            self._bar.console.print(text, highlight=False, markup=False)

    def rewind(self, step: int) -> None:
        """Forget the steps after this one; they will be made again."""
        if self.active:
            self._lines.close()
            self._events.close()
            self._open(step)

    def _open(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder.drop_metrics_after(start)
        self._lines = self._folder.metrics.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(self._folder.tensorboard), purge_step=start + 1 if start else None)

    def step(self, facts: dict[str, Any]) -> None:
        """Record one step; `facts` holds "step", "loss", "shots_per_second" and more; text goes into lines only."""
        if not self.active:
            return
        with suppress(OSError):  # a full disk must not end rank 0 alone; what is buffered comes with a later step
            self._lines.write(json.dumps({k: _short(v) for k, v in facts.items()}) + "\n")
            self._lines.flush()
            for name, value in facts.items():
                if name != "step" and not isinstance(value, str):
                    self._events.add_scalar(name, value, facts["step"])
        self._bar.update(self._task, completed=facts["step"], loss=facts["loss"], rate=facts["shots_per_second"])

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._bar.stop()
            self._lines.close()
            self._events.close()


def _short(value: Any) -> Any:
    # Nine digits keep every fp32 value apart.
    return float(f"{value:.9g}") if isinstance(value, float) else value
