"""One rank of a run in which rank 1 goes astray: python -m tests.faults.hang_worker FAULT CONFIG RUN."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any
from unittest import mock

import torch.distributed as dist

import lmp.train.step
from lmp.cli import main
from lmp.data.index import FilmIndex

STEP = 4


def sleep_in_a_read() -> None:
    """The read of step STEP never ends."""
    read, calls, lock = FilmIndex.read_parts, [0], threading.Lock()

    def reading(self: FilmIndex, parts: Any) -> None:
        with lock:
            calls[0] += 1
        if calls[0] >= 2 * STEP:  # packs of a rank and step: 2
            threading.Event().wait()
        read(self, parts)

    FilmIndex.read_parts = reading  # type: ignore[method-assign]


def leave_out_a_collective() -> None:
    """The sum of the counts of step STEP is not formed."""
    summed, calls = lmp.train.step.global_counts, [0]

    def counting(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] != STEP:
            return summed(*arguments)
        with mock.patch.object(dist, "all_reduce"):
            return summed(*arguments)

    lmp.train.step.global_counts = counting


if __name__ == "__main__":
    fault, config, run = sys.argv[1:]
    if os.environ["RANK"] == "1":
        {"read": sleep_in_a_read, "collective": leave_out_a_collective}[fault]()
    sys.exit(main(["train", config, "--run", run]))
