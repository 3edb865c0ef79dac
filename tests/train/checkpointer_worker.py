"""Saves that fail, saves beside the training and restores that go wrong, on two ranks; test_checkpointer.py judges."""

from __future__ import annotations

import json
import random
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmp.config import CheckpointConfig
from lmp.data.stream import Cursor
from lmp.parallel.mesh import Mesh, mesh
from lmp.train import checkpoint
from lmp.train.checkpoint import Progress, StateReader, found, restore
from lmp.train.checkpoint_writer import Snapshot
from lmp.train.checkpointer import Checkpointer
from lmp.train.engine import Engine
from lmp.train.run_folder import RunFolder
from tests.train.cases import Kind
from tests.train.states import whole_state
from tests.train.zero_state_worker import Bench
from tests.workers import save_findings

KIND = Kind(1)


def progress(step: int) -> Progress:
    return Progress(step=step, cursor=Cursor(epoch=0, step=step, carried=0), shots_seen=0, tokens_seen=0)


class FailingWrites:
    """Makes the next `count` writes of a rank fail half-way."""

    def __init__(self) -> None:
        self.count = 0
        self.write = Snapshot.write
        Snapshot.write = lambda snapshot, file: self(snapshot, file)  # type: ignore[method-assign,assignment]

    def __call__(self, snapshot: Snapshot, file: Path) -> Any:
        if self.count:
            self.count -= 1
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return self.write(snapshot, file)


def failures(saver: Checkpointer, here: Mesh) -> dict[str, Any]:
    """One rank cannot write: once in the course of the run, once at its end, then for ever."""
    failing = FailingWrites()
    facts: dict[str, Any] = {}
    failing.count = int(here.rank == 1)
    saver.save(progress(1))
    saver.settle()
    facts["first"] = saver.failure
    facts["left"] = sorted(path.name for path in saver.folder.checkpoints.glob("step-00000001*"))
    failing.count = int(here.rank == 1)
    saver.save_last(progress(2))
    facts["second"] = saver.failure
    failing.count = 9 * int(here.rank == 1)
    try:
        saver.save_last(progress(3))
    except OSError as error:
        facts["third"] = str(error)
    saver.save_last(progress(4), required=False)
    facts["fourth"] = saver.failure
    failing.count = 0
    facts["kept"] = [path.name for path in found(saver.folder)]
    Snapshot.write = failing.write  # type: ignore[method-assign]
    return facts


def beside(bench: Bench, engine: Engine, saver: Checkpointer, here: Mesh) -> dict[str, Any]:
    """Rank 1 writes slowly while both train; the state saved is that of the moment of the save."""
    before = whole_state(engine)
    go, write = threading.Event(), Snapshot.write

    def slow(snapshot: Snapshot, file: Path) -> Any:
        assert go.wait(200)
        return write(snapshot, file)

    if here.rank == 1:
        Snapshot.write = slow  # type: ignore[method-assign,assignment]
    saver.save(progress(5))
    bench.step(engine, KIND, 1)
    facts: dict[str, Any] = {"writing": saver.writing, "seen": [path.name for path in found(saver.folder)]}
    saver.poll(writing=True)
    facts["newest"] = saver.newest and saver.newest.name
    go.set()
    saver.save(progress(6))
    facts["after next"] = saver.newest and saver.newest.name
    saver.settle()
    Snapshot.write = write  # type: ignore[method-assign]
    facts["stalled"] = saver.seconds_stalled()
    facts["before"], facts["changed"] = before, whole_state(engine)
    restore(saver.folder.checkpoints / "step-00000005", engine)
    facts["restored"] = whole_state(engine)
    return facts


def random_draws(saver: Checkpointer, engine: Engine, here: Mesh) -> dict[str, Any]:
    """What each rank draws after a save, and after the restore of it."""

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    random.seed(here.rank)
    np.random.seed(here.rank)
    torch.manual_seed(here.rank)
    draw()
    saver.save_last(progress(7))
    expected = draw()
    draw()
    restore(saver.folder.checkpoints / "step-00000007", engine)
    return {"expected": expected, "drawn": draw()}


def wrong_restores(engine: Engine, folder: RunFolder, here: Mesh) -> dict[str, Any]:
    """One rank reads one wrong bit; and how many values the ranks read when nothing goes wrong."""
    read, facts = StateReader.read, {"values": 0}
    path = found(folder)[0]

    def counted(reader: StateReader, name: str, part: str, start: int, stop: int) -> torch.Tensor:
        facts["values"] += stop - start
        return read(reader, name, part, start, stop)

    StateReader.read = counted  # type: ignore[method-assign]
    restore(path, engine)
    facts["all"] = sum(
        torch.Size(t["shape"]).numel() * len(t["hashes"]) for t in checkpoint.read_manifest(path)["tensors"].values()
    )

    def wrong(reader: StateReader, name: str, part: str, start: int, stop: int) -> torch.Tensor:
        values = read(reader, name, part, start, stop)
        if name == "lmp.cross.query" and part == "exp_avg":
            values.view(torch.int32)[0] ^= 1
        return values

    # Whoever holds that value: each reads its own fragments only.
    StateReader.read = wrong  # type: ignore[method-assign]
    try:
        restore(path, engine)
    except RuntimeError as error:
        facts["said"] = str(error)
    StateReader.read = read  # type: ignore[method-assign]
    return facts


def main(folder: Path) -> None:
    with mesh(1, timeout_minutes=5) as here:
        bench = Bench(folder / "shards", here)
        engine = bench.engine(KIND, seed=0)
        bench.step(engine, KIND, 0)
        run = RunFolder(folder / "run")
        run.path.mkdir(exist_ok=True)
        with Checkpointer(run, engine, CheckpointConfig(keep=9), {}) as saver:
            facts = {
                "failures": failures(saver, here),
                "beside": beside(bench, engine, saver, here),
                "random": random_draws(saver, engine, here),
                "wrong": wrong_restores(engine, run, here),
            }
        facts["ledger"] = [json.loads(line) for line in run.ledger.read_text().splitlines()] if here.main else []
        engine.close()
        save_findings(folder, facts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
