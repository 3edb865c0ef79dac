"""One start of a run in which steps go wrong: python -m tests.faults.unsound_worker CONFIG RUN FAULTS, as JSON.

FAULTS names steps of the data, from 1: `nan` (features that are not finite), `high` (losses far too high), `stop` (at
which the run is asked to stop).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import lmp.train.trainer
from lmp.cli import main
from lmp.data.loader import PackLoader, StepBatch
from lmp.train.step import Losses


def spoil(run: Path, wanted: dict[str, Any]) -> None:
    following, accumulate, now = PackLoader.__next__, lmp.train.trainer.accumulate, [0]

    def number(loader: PackLoader, batch: StepBatch) -> int:
        found, cursor = 1, loader.stream.first()
        while cursor != batch.cursor:
            found, cursor = found + 1, loader.stream.next(cursor)
        return found

    def spoilt(loader: PackLoader) -> StepBatch:
        batch = following(loader)
        now[0] = number(loader, batch)
        if now[0] in wanted.get("nan", []):
            for pack in batch.packs:
                pack.features["video"] *= math.nan
        if now[0] == wanted.get("stop"):
            (run / "STOP").touch()
        return batch

    def too_high(*arguments: Any, **options: Any) -> Losses:
        losses = accumulate(*arguments, **options)
        factor = 100.0 if now[0] in wanted.get("high", []) else 1.0
        return Losses(loss=losses.loss * factor, means=losses.means)

    PackLoader.__next__ = spoilt  # type: ignore[method-assign]
    lmp.train.trainer.accumulate = too_high


if __name__ == "__main__":
    config, run, faults = sys.argv[1:]
    spoil(Path(run), json.loads(faults))
    sys.exit(main(["train", config, "--run", run]))
