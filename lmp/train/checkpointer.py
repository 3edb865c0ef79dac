"""Saves a run's state: a snapshot on the main thread, the writing beside the training, the end by agreement.

    save      every rank copies what it holds to host memory; a thread of its own writes its file
    poll      once a step: when the health word says that no rank writes any more, the ranks tell what they wrote, and
              rank 0 writes the manifest and renames the folder, or removes it if any rank failed

The thread takes part in no communication. At most one checkpoint is in flight.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from lmp.config import CheckpointConfig
from lmp.train.checkpoint import Progress, folder_of, found, step_of, verify, write_manifest
from lmp.train.checkpoint_writer import Snapshot, Written, file_name
from lmp.train.engine import Engine
from lmp.train.run_folder import RunFolder
from lmp.train.zero_state import optimizer_step, owned, shapes, trained


@dataclass
class _InFlight:
    """A checkpoint that is being written."""

    progress: Progress
    optimizer_step: int
    partial: Path
    share: Future[Written | str]
    seconds_stalled: float = 0.0


class Checkpointer:
    """The checkpoints of one start of a run. Methods are collective unless they say otherwise; a context manager.

    Args:
        folder: of the run.
        engine: whose state is saved.
        settings: when, and which are kept.
        facts: further entries of each manifest (configurations, data fingerprint, versions); of rank 0 alone.

    Attributes:
        newest: the newest checkpoint that this start has completed or restored.
        failure: why the last one was not saved; None if it was.
        damaged: names of checkpoints known to be so; these never stand for one that is kept. Of rank 0 alone.
    """

    def __init__(
        self,
        folder: RunFolder,
        engine: Engine,
        settings: CheckpointConfig,
        facts: Mapping[str, Any],
    ) -> None:
        self.folder, self.engine, self.settings, self.facts = folder, engine, settings, facts
        self.mesh = engine.mesh
        self.newest: Path | None = None
        self.failure: str | None = None
        self.damaged: set[str] = set()
        self._sound: set[str] = set()
        self._snapshot = Snapshot(self.mesh.device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: _InFlight | None = None
        self._cleaning: Future[None] = Future()
        self._cleaning.set_result(None)
        self._saved_at = time.monotonic()
        self._stalled = 0.0

    @property
    def writing(self) -> bool:
        """Whether this rank's thread still writes. Not collective."""
        return self._in_flight is not None and not self._in_flight.share.done()

    @property
    def overdue(self) -> bool:
        """Whether this rank's clock says that it is time for a checkpoint. Not collective, and not agreed."""
        minutes = self.settings.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def due(self, step: int) -> bool:
        """Whether a checkpoint is made at this step, whatever the clock says. Not collective."""
        periods = (self.settings.every_steps, self.settings.keep_every_steps)
        return any(period and step % period == 0 for period in periods)

    def seconds_stalled(self) -> float:
        """For how long saving has held up this rank since the last call. Not collective."""
        stalled, self._stalled = self._stalled, 0.0
        return stalled

    def save(self, progress: Progress) -> None:
        """Save the state as it is now; with `checkpoint.asynchronous` return as soon as it is copied.

        A failure is noted in the ledger and in `failure`; training may go on.
        """
        self._settle()
        began = time.perf_counter()
        partial = folder_of(self.folder, progress.step).with_suffix(".tmp")
        self._snapshot.take(owned(self.engine))
        self._in_flight = _InFlight(
            progress=progress,
            optimizer_step=optimizer_step(self.engine),
            partial=partial,
            share=self._thread.submit(self._write, partial),
        )
        self._saved_at = time.monotonic()
        self._count_stall(began)
        if not self.settings.asynchronous:
            self._settle()

    def save_last(self, progress: Progress, *, required: bool = True) -> None:
        """Save the state and wait until it is complete on disk; try once more if that fails.

        Args:
            progress: what the state stands for.
            required: an older checkpoint does not do in its place.

        Raises:
            OSError: on every rank, when it failed twice.
        """
        for _ in range(2):
            self.save(progress)
            self.settle()
            if self.failure is None:
                return
        if required or self.newest is None:
            raise OSError(f"the checkpoint of step {progress.step} was not saved: {self.failure}")

    def poll(self, *, writing: bool) -> None:
        """Complete the checkpoint in flight if no rank is writing any more.

        Args:
            writing: whether any rank is, as all ranks agreed.
        """
        if not writing:
            self._settle()

    def settle(self) -> None:
        """Wait for the checkpoint in flight, if there is one, complete it, and see older ones removed."""
        self._settle()
        futures.wait([self._cleaning])

    def _settle(self) -> None:
        if self._in_flight is None:
            return
        began = time.perf_counter()
        now, self._in_flight = self._in_flight, None
        share = now.share.result()
        shares: list[Any] | None = [None] * self.mesh.world_size if self.mesh.main else None
        dist.gather_object(share, shares, dst=0)
        told: list[Any] = [self._complete(now, shares, began) if shares is not None else None]
        dist.broadcast_object_list(told, src=0)
        self.failure = told[0]
        if self.failure is None:
            self.newest = folder_of(self.folder, now.progress.step)
        self._stalled += time.perf_counter() - began

    def close(self) -> None:
        """End the thread; a checkpoint in flight stays incomplete. Not collective."""
        self._thread.shutdown(cancel_futures=True)

    def _write(self, partial: Path) -> Written | str:
        """On the thread: write this rank's file, or say why not."""
        mesh = self.mesh
        try:
            partial.mkdir(parents=True, exist_ok=True)
            return self._snapshot.write(partial / file_name(mesh.rank, mesh.world_size))
        except Exception as error:
            return f"rank {mesh.rank}: {error}"

    def _complete(self, now: _InFlight, shares: Sequence[Written | str], began: float) -> str | None:
        """On rank 0: make the folder a checkpoint, or remove it and say why."""
        step, mesh = now.progress.step, self.mesh
        failures = [share for share in shares if isinstance(share, str)]
        written = [share for share in shares if isinstance(share, Written)]
        try:
            if failures:
                raise OSError("; ".join(failures))
            facts = {
                "progress": asdict(now.progress),
                "optimizer_step": now.optimizer_step,
                "topology": {"world_size": mesh.world_size, "sequence": mesh.sequence, "zero": self.engine.stage},
                **self.facts,
            }
            state = {"shapes": shapes(self.engine), "trained": trained(self.engine)}
            write_manifest(now.partial, written, state, facts)
            _appear(now.partial, folder_of(self.folder, step))
        except (OSError, RuntimeError) as error:
            shutil.rmtree(now.partial, ignore_errors=True)
            self._note("save failed", step=step, error=str(error)[:500])
            print(f"the checkpoint of step {step} was not saved: {error}", flush=True)
            return str(error)
        self.damaged.discard(folder_of(self.folder, step).name)
        self._cleaning = self._thread.submit(self._clean)
        seconds = round(now.seconds_stalled + time.perf_counter() - began, 4)
        self._note("saved", step=step, seconds_saving=seconds, bytes=sum(share.bytes for share in written))
        return None

    def _clean(self) -> None:
        """On rank 0's thread, after a checkpoint is complete: remove those that are not kept any more."""

        def sound(path: Path) -> bool:
            if path.name in self.damaged:
                return False
            if path.name not in self._sound and not verify(path, content=False):
                self._sound.add(path.name)
            return path.name in self._sound

        for path in outdated(found(self.folder), self.settings, sound):
            shutil.rmtree(path, ignore_errors=True)

    def _note(self, event: str, **facts: Any) -> None:
        # A full disk must not end rank 0 while the others wait for it.
        with suppress(OSError):
            self.folder.note(event, **facts)

    def _count_stall(self, began: float) -> None:
        assert self._in_flight is not None
        seconds = time.perf_counter() - began
        self._in_flight.seconds_stalled += seconds
        self._stalled += seconds

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def outdated(listed: Sequence[Path], settings: CheckpointConfig, sound: Callable[[Path], bool]) -> list[Path]:
    """Which checkpoints are not kept.

    Args:
        listed: all, newest first.
        settings: `keep` newest sound ones are kept, and sound ones at multiples of `keep_every_steps`.
        sound: tells whether one is whole. One that is not is kept until there is a newer one that is.
    """
    removed, kept = [], 0
    for path in listed:
        if not sound(path):
            if kept:
                removed.append(path)
            continue
        forever = settings.keep_every_steps is not None and step_of(path) % settings.keep_every_steps == 0
        if kept >= settings.keep and not forever:
            removed.append(path)
        kept += 1
    return removed


def remove_leftovers(folder: RunFolder) -> None:
    """Remove what starts that were cut off had not completed. Of rank 0 alone, before anything is saved."""
    for path in folder.checkpoints.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _appear(partial: Path, final: Path) -> None:
    """Give a complete folder its name; one of that name makes room."""
    _sync_folder(partial)
    if final.exists():
        former = final.with_suffix(".old.tmp")
        shutil.rmtree(former, ignore_errors=True)
        final.replace(former)
        partial.replace(final)
        shutil.rmtree(former, ignore_errors=True)
    else:
        partial.replace(final)
    _sync_folder(final.parent)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
