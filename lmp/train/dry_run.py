"""`lmp train --dry-run`: everything that a real start builds, and the worst step that the data can give, measured.

Nothing of the run folder is read or written. The step is made three times: the first makes the optimizer's states and
whatever kernels are built on first use, the second is timed, the third gives the peak of memory with everything in
place. The first and the third also measure the cheap rivals, as logged steps do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmp.config import Config, check_run
from lmp.data.index import FilmIndex
from lmp.data.loader import PackBatch, StepBatch, read_pack
from lmp.data.plan import Pack, Window
from lmp.data.stream import Cursor
from lmp.errors import UserError
from lmp.parallel.mesh import Mesh, mesh
from lmp.scaling.devices import GIB, Device, find_device, known_device
from lmp.scaling.live_memory import LiveMemory
from lmp.scaling.plan_inputs import inputs_of, setting_of
from lmp.scaling.planner import Estimate, Setting, config_choice, estimate, overrides, plan, recommended
from lmp.train.data import load_index
from lmp.train.run_folder import RunFolder
from lmp.train.step import accumulate
from lmp.train.trainer import Start


@dataclass(frozen=True)
class DryRun:
    """What the worst step took on this rank.

    Attributes:
        peak, reserved: bytes of tensors (on CUDA as the allocator counts them, on the CPU live storages), and bytes
            that the allocator held (None on the CPU).
        limit: bytes that there are.
        seconds: of the second step.
        predicted: for the same configuration on this device.
    """

    setting: Setting
    lengths: tuple[int, ...]
    peak: int
    reserved: int | None
    limit: float
    seconds: float
    predicted: Estimate

    @property
    def fits(self) -> bool:
        return (self.reserved or self.peak) <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Also what `lmp plan --calibrate` reads."""
        memory = self.predicted.memory
        return {
            "config": self.setting.config.model_dump(mode="json"),
            "modalities": self.setting.model.modalities,
            "feature_bytes": self.setting.feature_bytes,
            "world_size": self.setting.world_size,
            "lengths": list(self.lengths),
            "seconds": self.seconds,
            "memory_gib": self.peak / GIB,
            "reserved_gib": None if self.reserved is None else self.reserved / GIB,
            "limit_gib": self.limit / GIB,
            "fits": self.fits,
            "predicted": {"seconds": self.predicted.seconds, "memory_gib": memory.peak / GIB},
        }

    def lines(self) -> list[str]:
        """For a person."""
        memory, measured = self.predicted.memory, self.peak / GIB
        ratio = memory.peak / self.peak
        held = "" if self.reserved is None else f" ({self.reserved / GIB:.3f} GiB held by the allocator)"
        return [
            f"worst step: {self.predicted.packs_per_step} packs of {sum(self.lengths)} shots in windows of "
            f"{max(self.lengths)} and less, every modality there",
            f"memory: measured {measured:.3f} GiB{held}, predicted {memory.peak / GIB:.3f} ({ratio:.0%}): states "
            f"{memory.states.backward / GIB:.3f}, activations {memory.kept / GIB:.3f}, the rest "
            f"{(memory.backward - memory.states.backward - memory.kept) / GIB:.3f}",
            f"time: measured {self.seconds:.3g} s, predicted {self.predicted.seconds:.3g} s",
            f"{'fits' if self.fits else 'does not fit'}: {self.limit / GIB:.1f} GiB are there",
        ]


def dry_run(config: Config) -> DryRun | None:
    """Build everything and make the worst step. Collective over all processes of the run.

    Returns:
        what it took; None on all ranks but the first.

    Raises:
        UserError: configuration and data do not fit, or the step does not fit into memory: then the remedy names what
            `lmp plan` recommends.
    """
    index = load_index(config)
    with mesh(config.parallel.sequence, timeout_minutes=config.parallel.timeout_minutes) as here:
        check_run(config, world_size=here.world_size, modalities=index.modalities)
        setting = _setting(config, here)
        lengths = worst_pack(index.shots, config.data.pack_shots, config.data.window_shots).lengths
        predicted = estimate(setting, config_choice(config), longest=False, lengths=lengths)
        if here.device.type == "cpu" and predicted.memory.peak > setting.device.limit:
            # Nothing but the kernel's killer would stop the step.
            raise _out_of_memory(
                setting, predicted.problem or "the step is predicted to need more memory than there is"
            )
        batch = worst_step(config, index, here)
        try:
            peak, reserved, seconds = _measure(config, index, here, batch)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(setting, f"out of memory: {str(error).splitlines()[0]}") from error
        if not here.main:
            return None
        limit = setting.device.limit
        if here.device.type == "cuda":
            limit = float(torch.cuda.mem_get_info(here.device)[1])
        return DryRun(
            setting=setting,
            lengths=lengths,
            peak=peak,
            reserved=reserved,
            limit=limit,
            seconds=seconds,
            predicted=predicted,
        )


def _measure(config: Config, index: FilmIndex, here: Mesh, batch: StepBatch) -> tuple[int, int | None, float]:
    """Peak bytes, bytes held by the allocator (CUDA), seconds."""
    with _counted(here.device) as counter:
        start = Start(config, RunFolder(Path("runs") / config.name), index, here)
        for pack in batch.packs:
            counter.include([*pack.features.values(), *pack.valid.values(), pack.film_P, pack.shot_P])
        _step(start, batch, rivals=True)
        with counter.paused():
            seconds = _timed(lambda: _step(start, batch, rivals=False), here.device)
        counter.reset()
        _step(start, batch, rivals=True)
        found = counter.peak(), counter.reserved(), seconds
        start.engine.close()
    return found


def _step(start: Start, batch: StepBatch, *, rivals: bool) -> None:
    accumulate(start.engine, start.objectives, batch, start.config, rivals=rivals)
    # No weight moves far: the step is the worst in memory, not a step of the run.
    start.engine.step(0.0)


def _timed(work: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    began = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Counter:
    """Peak memory: the allocator's own count on CUDA, live storages on the CPU."""

    def __init__(self, device: torch.device, live: LiveMemory | None) -> None:
        self.device, self.live = device, live

    def include(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            if self.live is not None:
                self.live.count(tensor)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counting every operation costs time."""
        if self.live is None:
            yield
            return
        self.live.__exit__(None, None, None)
        try:
            yield
        finally:
            self.live.__enter__()

    def reset(self) -> None:
        if self.live is not None:
            self.live.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return self.live.peak if self.live is not None else torch.cuda.max_memory_allocated(self.device)

    def reserved(self) -> int | None:
        return None if self.live is not None else torch.cuda.max_memory_reserved(self.device)


@contextmanager
def _counted(device: torch.device) -> Iterator[_Counter]:
    if device.type == "cuda":
        yield _Counter(device, None)
        return
    with LiveMemory() as live:
        yield _Counter(device, live)


def worst_step(config: Config, index: FilmIndex, here: Mesh) -> StepBatch:
    """This rank's share of a step whose packs are full of the longest windows there are, all modalities valid."""
    rows = config.data.pack_shots // here.sequence
    start = here.sp_rank * rows
    pack = worst_pack(index.shots, config.data.pack_shots, config.data.window_shots)
    own = config.data.packs_per_step // here.dp_size
    packs = [_all_valid(read_pack(index, pack, slot, start=start, stop=start + rows)) for slot in range(own)]
    return StepBatch(Cursor(0, 0), packs)


def worst_pack(shots_F: np.ndarray, pack_shots: int, window_shots: int | None) -> Pack:
    """A full pack of the longest windows that the films allow, the longest film first, and so on round."""
    longest, room = window_shots or pack_shots, pack_shots
    windows: list[Window] = []
    order = np.argsort(-shots_F.astype(np.int64), kind="stable")
    while room:
        film = int(order[len(windows) % len(order)])
        length = min(int(shots_F[film]), longest, room)
        windows.append(Window(film, 0, length))
        room -= length
    return Pack(epoch=0, number=0, windows=tuple(windows), idle=())


def _all_valid(pack: PackBatch) -> PackBatch:
    for valid_P in pack.valid.values():
        valid_P.fill_(True)
    return pack


def _setting(config: Config, here: Mesh) -> Setting:
    """The planner's view of this very run."""
    per_node = torch.cuda.device_count() if here.device.type == "cuda" else here.world_size
    nodes = max(1, here.world_size // max(1, per_node))
    return setting_of(
        config,
        inputs_of(config, None),
        _this_device(here.device, per_node),
        nodes=nodes,
        per_node=here.world_size // nodes,
    )


def _this_device(device: torch.device, per_node: int) -> Device:
    if device.type == "cpu":
        return find_device("cpu", per_node=per_node)
    properties = torch.cuda.get_device_properties(device)
    return known_device(properties.name) or find_device(
        f"{properties.name}:{properties.total_memory / GIB}:300:50", per_node=per_node
    )


def _out_of_memory(setting: Setting, problem: str) -> UserError:
    best = recommended(setting, [e for e in plan(setting) if e.choice != config_choice(setting.config)])
    if best is None:
        return UserError(
            problem, remedy="give more devices or a smaller data.pack_shots: `lmp plan` finds nothing that fits"
        )
    return UserError(problem, remedy=f"add what `lmp plan` recommends: {' '.join(overrides(setting, best))}")
