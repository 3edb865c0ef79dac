"""The fourth part of `lmp bench step`: what the trainer's loop costs beyond the forward, backward and update in it."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmp.config import Config, validate
from lmp.data.loader import PackBatch, PackLoader, StepBatch
from lmp.objectives import build_objectives
from lmp.objectives.base import Objective, ObjectiveBatch
from lmp.scaling.bench_clock import LOG_EVERY, StepSettings, spread

if TYPE_CHECKING:
    from lmp.train.engine import Engine


def trainer_overhead(settings: StepSettings) -> dict[str, Any]:
    """The trainer's own loop, engine, losses and metrics, on made films, and between its steps bare ones.

    A bare step is forward, the same objectives, backward and AdamW on the same packs with the masks drawn before; it
    neither clips nor measures nor writes anything. Reading is not part of either: the step begins when its packs
    are there. Nothing is saved.

    Returns:
        bare, trainer: seconds of an ordinary step, and in bare_update, trainer_update those of averaging, clipping and
        AdamW in it; full: seconds of a step with all metrics, one of log_every; overhead, overhead_full: what the
        trainer's takes longer than the bare step before it, as a share; parameters; shots of a step.
    """
    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from lmp.data.index import FilmIndex
    from lmp.parallel.mesh import mesh
    from lmp.scaling.bench_data import MADE_WIDTHS, make_corpus
    from lmp.train.checkpoint import Progress
    from lmp.train.health import stop_requests
    from lmp.train.metrics import Recorder
    from lmp.train.run_folder import RunFolder
    from lmp.train.trainer import Start

    with tempfile.TemporaryDirectory(prefix="lmp-bench-") as scratch, mesh(1, timeout_minutes=5) as here:
        shots = settings.trainer_shots * settings.trainer_packs
        make_corpus(Path(scratch) / "shards", max(shots, 512) * 2 * sum(MADE_WIDTHS.values()) / 1e9)
        config = _config(settings, Path(scratch) / "shards")
        folder = RunFolder(Path(scratch) / "run")
        run = Start(config, folder, FilmIndex.load(Path(scratch) / "shards"), here)
        folder.open(config)
        bare = _BareLoop(run.model_config, config, run.attention, here.device)
        with (
            PackLoader(run.index, run.plan, pin=here.device.type == "cuda") as loader,
            stop_requests(folder.stop) as stop,
            Recorder(folder, steps=config.train.steps, start=0, active=True) as recorder,
        ):
            turns = _Alternating(loader, bare, here.device, steps=settings.trainer_steps)
            turns.watch(run.engine)
            first = Progress(step=0, cursor=turns.stream.first(), shots_seen=0, tokens_seen=0)
            with suppress(_Enough):
                run.loop(turns, stop, recorder, first)  # type: ignore[arg-type]
        run.engine.close()
    return turns.report() | {"shots": shots, "parameters": sum(p.numel() for p in bare.model.parameters())}


def _config(settings: StepSettings, shards: Path) -> Config:
    shape = settings.shape
    layers = {"contextual_layers": shape.layers, "cross_layers": shape.layers}
    return validate(
        {
            "name": "bench",
            "data": {
                "train": [str(shards)],
                "pack_shots": settings.trainer_shots,
                "packs_per_step": settings.trainer_packs,
            },
            "model": {"width": shape.width, "heads": shape.heads, **layers},
            "train": {
                "steps": 10**6,
                "log_every": LOG_EVERY,
                "precision": "bf16" if settings.device == "cuda" else "fp32",
            },
            "checkpoint": {"every_steps": None, "every_minutes": 1e9},
        },
        source="lmp bench step",
    )


class _Enough(Exception):  # noqa: N818  (not an error)
    """Ends the loop before the last step, which would save."""


class _BareLoop:
    """The same model, objectives and optimizer with nothing around them; on CUDA in bf16 with fp32 master weights."""

    def __init__(self, model_config: Any, config: Config, attend: Any, device: torch.device) -> None:
        from lmp.model import LmpForPretraining
        from lmp.train.engine import parameter_groups

        torch.manual_seed(config.seed)
        self.model = LmpForPretraining(model_config).to(device)
        self.model.set_attention(attend)
        self.config, self.device = config, device
        groups = parameter_groups(self.model, config.optimizer.weight_decay)
        self.parameters = [p for group in groups for p in group["params"]]
        self.masters = self.parameters
        if device.type == "cuda":
            self.masters = [p.detach().clone().requires_grad_() for p in self.parameters]
            by = dict(zip(map(id, self.parameters), self.masters, strict=True))
            groups = [{**group, "params": [by[id(p)] for p in group["params"]]} for group in groups]
            self.model.bfloat16()
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=settings.betas, eps=settings.eps, fused=True)
        self.objectives = build_objectives(config.objectives, target=model_config.target, sources=model_config.sources)

    def prepare(self, batch: StepBatch) -> list[tuple[PackBatch, ObjectiveBatch]]:
        from lmp.train.step import objective_batch

        packs = [pack.to(self.device) for pack in batch.packs]
        return [(pack, objective_batch(pack, self.config)) for pack in packs]

    def accumulate(self, packs: list[tuple[PackBatch, ObjectiveBatch]]) -> None:
        """Forward and backward."""
        from lmp.train.step import forward

        for pack, view in packs:
            output = forward(self.model, pack, view)
            losses = [_mean_loss(objective, output, view) for objective in self.objectives]
            (torch.stack(losses).sum() / len(packs)).backward()

    def update(self) -> None:
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad, parameter.grad = None if parameter.grad is None else parameter.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)


def _mean_loss(objective: Objective, output: Any, view: ObjectiveBatch) -> Tensor:
    term = objective(output, view, lambda local: local)
    return objective.weight * term.total / term.count.clamp(min=1)


class _Alternating:
    """Stands where the trainer's loader stands: between two of its steps, a bare one on the same packs is timed."""

    def __init__(self, loader: PackLoader, bare: _BareLoop, device: torch.device, *, steps: int) -> None:
        self.loader, self.bare, self.device, self.steps = loader, bare, device, steps
        self.stream, self.awaited = loader.stream, loader.awaited
        self.seconds: dict[str, list[float]] = {}
        self._given: float | None = None

    def watch(self, engine: Engine) -> None:
        """Time the updates of the trainer's engine."""
        update = engine.step

        def timed(lr: float, allow: Callable[[float], bool] = math.isfinite) -> float:
            began = self._now()
            norm = update(lr, allow)
            self._note("trainer_update", began)
            return norm

        engine.step = timed  # type: ignore[method-assign]

    def __next__(self) -> StepBatch:
        if self._given is not None:
            self._note("trainer", self._given)
            if len(self.seconds["trainer"]) > self.steps:
                raise _Enough
        batch = next(self.loader)
        packs = self.bare.prepare(batch)
        began = self._now()
        self.bare.accumulate(packs)
        update = self._now()
        self.bare.update()
        self._note("bare_update", update)
        self._note("bare", began)
        del packs
        self._given = self._now()
        return batch

    def _note(self, what: str, began: float) -> None:
        self.seconds.setdefault(what, []).append(self._now() - began)

    def _now(self) -> float:
        """Of this thread's CPU time; on CUDA of the clock, with the device done."""
        if self.device.type == "cpu":
            return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def report(self) -> dict[str, Any]:
        """All but the first step, which warms up."""
        measured = range(1, self.steps + 1)  # step n + 1 is at place n
        full = [n for n in measured if (n + 1) % LOG_EVERY == 0]
        ordinary = [n for n in measured if n not in full]
        over = [t / b - 1 for b, t in zip(self.seconds["bare"], self.seconds["trainer"], strict=False)]
        return {
            **{what: spread([seconds[n] for n in ordinary]) for what, seconds in self.seconds.items()},
            "full": spread([self.seconds["trainer"][n] for n in full]),
            "overhead": spread([over[n] for n in ordinary]),
            "overhead_full": spread([over[n] for n in full]),
            "log_every": LOG_EVERY,
        }
