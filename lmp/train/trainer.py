"""The training loop, from a configuration to a finished run folder."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from lmp.config import Config, check_run
from lmp.data.index import FilmIndex
from lmp.data.loader import PackLoader, StepBatch
from lmp.data.stream import Cursor, Stream
from lmp.errors import UserError
from lmp.model import LmpConfig, LmpForPretraining
from lmp.model.backends import ChosenAttention, resolve
from lmp.objectives import build_objectives
from lmp.parallel.memory import apply_memory
from lmp.parallel.mesh import Mesh, mesh
from lmp.parallel.ulysses import UlyssesAttention
from lmp.scaling.flops import hardware_flops, peak_tflops, train_flops
from lmp.train import checkpoint
from lmp.train.checkpoint import Progress
from lmp.train.checkpointer import Checkpointer, remove_leftovers
from lmp.train.data import check_same_stream, data_facts, load_index, model_shape, plan_settings, stream_change
from lmp.train.engine import Engine, learning_rate
from lmp.train.health import Pace, Stop, StopRequest, health_word, stop_requests
from lmp.train.metrics import Recorder
from lmp.train.policy import Action, Memory, Policy, Verdict
from lmp.train.run_folder import RunFolder, code_state, write_atomic
from lmp.train.step import accumulate
from lmp.train.watchdog import watchdog

Resume = Literal["auto", "never"]


@dataclass(frozen=True)
class Outcome:
    """How a start of a run ended; the same on every rank, but for the words.

    Attributes:
        step: the last one made.
        finished: whether it was the last of the run.
        reason: in words.
        requeue: whether a scheduler wanted the nodes, so that the run is to go on by itself.
    """

    step: int
    finished: bool
    reason: str
    requeue: bool = False


def train(config: Config, run: Path, *, resume: Resume = "auto", new_data: bool = False) -> Outcome:
    """Train until the last step, or until a signal or stop file asks to stop. Collective over all processes of the run.

    Args:
        config: the validated configuration.
        run: the run folder; made if it is not there, continued from its newest valid checkpoint if it is.
        resume: "never" refuses a folder that holds a run already.
        new_data: where the data or its mixture differ from the checkpoint's, go on with an epoch of what is there now.

    Raises:
        UserError: configuration, data or folder do not fit, or section `health` asks to stop at an unsound step.
    """
    folder = RunFolder(run)
    finished = folder.finished_step()
    if resume == "never" and folder.config.exists():
        raise UserError(f"{run}: holds a run already", remedy="name another folder, or start with --resume auto")
    folder.check_same_run(config)
    if finished is not None and finished >= config.train.steps:
        return Outcome(step=finished, finished=True, reason="the run was finished already")
    index = load_index(config)
    with (
        mesh(config.parallel.sequence, timeout_minutes=config.parallel.timeout_minutes) as here,
        stop_requests(folder.stop, looks=here.main) as stop,
    ):
        check_run(config, world_size=here.world_size, modalities=index.modalities)
        return Start(config, folder, index, here).go(stop, new_data=new_data)


class Start:
    """One start of a run on this process; being made, it touches no file of the run folder."""

    def __init__(self, config: Config, folder: RunFolder, index: FilmIndex, here: Mesh) -> None:
        self.config, self.folder, self.index, self.mesh = config, folder, index, here
        self.plan = plan_settings(config, index)
        self.stream = Stream.of(index, self.plan)
        self.tokens_per_shot = sum(modality.tokens for modality in index.modalities.values())
        self.model_config = model_config(config, index)
        self.attention = attention_of(config, here.device)
        torch.manual_seed(config.seed)
        model = LmpForPretraining(self.model_config)
        group = here.sequence_group
        model.set_attention(self.attention if group is None else UlyssesAttention(group, self.attention))
        apply_memory(model, config.memory_settings)
        self.engine = Engine(model, config, here)
        self.saver = Checkpointer(folder, self.engine, config.checkpoint, self._manifest() if here.main else {})
        self.objectives = build_objectives(
            config.objectives, target=self.model_config.target, sources=self.model_config.sources
        )
        peak = config.train.peak_tflops
        if peak is None and here.device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(here.device))
        self.peak_flops = peak * 1e12 * here.world_size if peak else None

    def go(self, stop: StopRequest, *, new_data: bool) -> Outcome:
        """Restore, loop, leave."""
        with watchdog(self.engine.watch, self.folder, self.mesh, self.config):
            outcome = self._go(stop, new_data=new_data)
        self.engine.close()
        if self.mesh.main:
            self.folder.note("stop", step=outcome.step, finished=outcome.finished, reason=outcome.reason)
            if outcome.finished:
                write_atomic(self.folder.done, f'{{"step": {outcome.step}}}\n')
        return outcome

    def _go(self, stop: StopRequest, *, new_data: bool) -> Outcome:
        progress = self._restore(new_data=new_data)
        if self.mesh.main:
            self.folder.open(self.config)
            remove_leftovers(self.folder)
            self.folder.note(
                "start",
                step=progress.step,
                cursor=asdict(progress.cursor),
                data=self.index.digest,
                world_size=self.mesh.world_size,
                device=self._device(),
                attention=str(self.attention),
            )
        if progress.step >= self.config.train.steps:
            return Outcome(step=progress.step, finished=True, reason="the last step was made before")
        loader = PackLoader(
            self.index,
            self.plan,
            stream=self.stream,
            cursor=progress.cursor,
            dp_rank=self.mesh.dp_rank,
            dp_size=self.mesh.dp_size,
            sp_rank=self.mesh.sp_rank,
            sp_size=self.mesh.sequence,
            read_ahead=self.config.data.read_ahead,
            threads=self.config.data.threads,
            pin=self.mesh.device.type == "cuda",
            stall_seconds=self.config.data.stall_seconds,
        )
        check_same_stream(self.index, self.stream, progress.cursor, self.mesh)
        steps = self.config.train.steps
        try:
            with (
                loader,
                self.saver,
                Recorder(self.folder, steps=steps, start=progress.step, active=self.mesh.main) as recorder,
            ):
                recorder.say(f"{self.folder.path}: from step {progress.step} of {steps}, {self._topology()}")
                return self.loop(loader, stop, recorder, progress)
        except BaseException as error:
            if self.mesh.main:
                self.folder.note("failure", error=str(error)[:500])
            raise

    def loop(self, loader: PackLoader, stop: StopRequest, recorder: Recorder, progress: Progress) -> Outcome:
        """Step after step; every rank takes every branch at the same step."""
        config, steps, engine, saver = self.config, self.config.train.steps, self.engine, self.saver
        policy = Policy(config.health, Memory.from_json(progress.health))
        pace = Pace(self.mesh, percent=config.health.straggler_percent, say=self._tell)
        while True:
            step = progress.step + 1
            engine.watch.begin_step(step, loader.awaited)
            waited = time.perf_counter()
            batch = next(loader)
            began = time.perf_counter()
            engine.watch.films = partial(self._films, batch)
            full = step % config.train.log_every == 0 or step in (1, steps)
            own = engine.timed(exact=full)
            losses = accumulate(engine, self.objectives, batch, config, rivals=full)
            lr = learning_rate(step - 1, steps=steps, settings=config.optimizer)
            norm = engine.step(lr, policy.gate(losses.loss))
            verdict = policy.judge(losses.loss, norm)
            engine.watch.enter("agreeing")
            seconds = time.perf_counter() - began
            own_seconds = began - waited + own.seconds
            health = health_word(
                self.mesh,
                stop=stop(),
                save=saver.overdue,
                writing=saver.writing,
                verdict=verdict.action,
                seconds=own_seconds,
            )
            policy.take(verdict, losses.loss, norm)
            shots, cursor = loader.stream.shots(batch.cursor), loader.stream.next(batch.cursor)
            if verdict.reason:
                self._tell(f"step {step}: {self._words(verdict, batch)}", "unsound step", step=step)
            if verdict.action is Action.STOP:
                saver.settle()
                raise UserError(
                    f"step {step}: {self._words(verdict, batch)}",
                    remedy="lower optimizer.lr, look at those films, or allow more in section health; nothing was "
                    "saved since",
                )
            if verdict.action is Action.ROLL_BACK:
                progress = self._roll_back(policy, progress, cursor, recorder)
                continue
            progress = self._advance(progress, cursor, shots, policy.memory)
            if full:
                pace.compare(step, own_seconds)
            engine.watch.enter("recording")
            recorder.step(
                {
                    "step": step,
                    "epoch": batch.cursor.epoch,
                    "data": loader.stream.fingerprint(batch.cursor),
                    "loss": losses.loss,
                    **(losses.means if full else losses.by_objective()),
                    "lr": lr,
                    "grad_norm": norm,
                    "skipped": policy.memory.skips,
                    "rollbacks": policy.memory.rollbacks,
                    "spikes": policy.memory.spikes,
                    "seconds_waiting_for_data": began - waited,
                    "seconds_saving": saver.seconds_stalled(),
                    "slowest_rank": health.slowest_rank,
                    **(pace.facts if full else {}),
                    **self._rates(batch, shots, began - waited + seconds),
                }
            )
            engine.watch.enter("saving")
            saver.poll(writing=health.writing)
            if health.stop or step == steps:
                # A scheduler gets its nodes; the run goes on from an older checkpoint then.
                saver.save_last(progress, required=health.stop is not Stop.REQUEUE or step == steps)
            elif health.save or saver.due(step):
                saver.save(progress)
            if step == steps:
                return Outcome(step=step, finished=True, reason="last step")
            if health.stop:
                reason = stop.reason or "another process was asked to stop"
                recorder.say(f"stopped by {reason} at step {step}; start again to go on")
                return Outcome(step=step, finished=False, reason=reason, requeue=health.stop is Stop.REQUEUE)

    def _restore(self, *, new_data: bool) -> Progress:
        path, passed_over = checkpoint.newest_valid(self.folder, rank=self.mesh.rank, world_size=self.mesh.world_size)
        if self.mesh.main:
            for fault in passed_over:
                print(f"passed over: {fault}", flush=True)
                self.folder.note("passed over", fault=fault)
        newer = [p.name for p in checkpoint.found(self.folder) if path is None or p.name > path.name]
        self.saver.damaged.update(newer)
        if path is None:
            return Progress(step=0, cursor=self.stream.first(), shots_seen=0, tokens_seen=0)
        change = stream_change(checkpoint.read_manifest(path)["data"], self.index, self.plan)
        if change and not new_data:
            raise UserError(
                f"{path}: {change}",
                remedy="restore what data.train named, start another run folder, or go on with --new-data",
            )
        progress = checkpoint.restore(path, self.engine)
        self.saver.newest = path
        if self.mesh.main:
            print(f"{path.name}: restored, and the state verified by its hashes", flush=True)
            self.folder.note("restored", step=progress.step)
        if change:
            # What was usual for other data says nothing about these.
            progress = replace(progress, cursor=self.stream.first(progress.cursor.epoch + 1), health={})
        return progress

    def _roll_back(self, policy: Policy, progress: Progress, cursor: Cursor, recorder: Recorder) -> Progress:
        """Return to the newest checkpoint from before the unsound steps, and go on with the data after them.

        Raises:
            UserError: there is none.
        """
        self.engine.watch.enter("restoring")
        self.saver.settle()
        first = progress.step + 1 - policy.memory.in_a_row
        path, _ = checkpoint.newest_valid(
            self.folder, rank=self.mesh.rank, world_size=self.mesh.world_size, before=first
        )
        if path is None:
            raise UserError(
                f"step {first} cannot be undone: no valid checkpoint is older",
                remedy="lower optimizer.lr, look at the films that were named, or save more often",
            )
        then = checkpoint.restore(path, self.engine)
        self.saver.newest = path
        policy.rolled_back(Memory.from_json(then.health))
        if self.mesh.main:
            for newer in checkpoint.found(self.folder):
                if checkpoint.step_of(newer) > then.step:
                    shutil.rmtree(newer)
        facts = {"step": then.step, "left": progress.step + 1, "cursor": asdict(cursor), "data": self.index.digest}
        self._tell(f"rolled back to step {then.step}, past the data of the steps since", "rollback", **facts)
        recorder.rewind(then.step)
        return replace(then, cursor=cursor, health=policy.memory.to_json())

    def _advance(self, progress: Progress, cursor: Cursor, shots: int, memory: Memory) -> Progress:
        return Progress(
            step=progress.step + 1,
            cursor=cursor,
            shots_seen=progress.shots_seen + shots,
            tokens_seen=progress.tokens_seen + shots * self.tokens_per_shot,
            health=memory.to_json(),
        )

    def _rates(self, batch: StepBatch, shots: int, seconds: float) -> dict[str, float]:
        """Speed and memory of a step of `shots` shots over all ranks that took `seconds`."""
        rates = {
            "seconds": seconds,
            "shots_per_second": shots / seconds,
            "tokens_per_second": shots * self.tokens_per_shot / seconds,
            "memory_gib": _memory_gib(self.mesh.device),
        }
        if self.peak_flops:
            packs, settings = [pack.lengths for pack in batch.packs], self.config.memory
            done = hardware_flops(
                self.model_config, packs, checkpointing=settings.checkpointing, tile_mlp=settings.tile_mlp
            )
            available = seconds * self.peak_flops / self.mesh.dp_size
            rates["mfu"] = train_flops(self.model_config, packs) / available
            rates["hfu"] = done / available
        return rates

    def _manifest(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "model": self.model_config.to_dict(),
            "data": data_facts(self.index, self.plan),
            "code": code_state(),
        }

    def _device(self) -> str:
        device = self.mesh.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def _topology(self) -> str:
        here = self.mesh
        return (
            f"{here.dp_size} data x {here.sequence} sequence ranks on {here.device.type}, ZeRO {self.engine.stage}, "
            f"attention by {self.attention}"
        )

    def _films(self, batch: StepBatch) -> list[str]:
        """Those that this rank has in hand."""
        films = sorted({int(film) for pack in batch.packs for film in pack.film_P.unique() if film >= 0})
        return [self.index.keys[film] for film in films]

    def _words(self, verdict: Verdict, batch: StepBatch) -> str:
        done = {
            Action.GO: "the update was made",
            Action.SKIP: "the update was left out",
            Action.ROLL_BACK: "the run is rolled back",
            Action.STOP: "the run stops",
        }[verdict.action]
        films = ", ".join(self._films(batch)[:5])
        return f"{verdict.reason}; {done} (epoch {batch.cursor.epoch}, step {batch.cursor.step}; rank 0 read {films})"

    def _tell(self, text: str, event: str, **facts: Any) -> None:
        """A line for people and one in the ledger, of rank 0."""
        if self.mesh.main:
            print(text, flush=True)
            self.folder.note(event, **facts, what=text)


def attention_of(config: Config, device: torch.device) -> ChosenAttention:
    """The attention function that `train.attention` names, for this device and the run's precision and shape.

    Raises:
        UserError: it cannot be used here.
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    head_dim = config.model.width // config.model.heads
    try:
        return resolve(config.train.attention, device=device, dtype=dtype, head_dim=head_dim)
    except ValueError as error:
        raise UserError(
            f"train.attention={config.train.attention}: {error}",
            remedy="take auto, or one that `lmp doctor` calls available",
        ) from error


def model_config(config: Config, index: FilmIndex) -> LmpConfig:
    """The model's configuration: its shape from the run, its modalities from the data set."""
    return model_shape(config, {name: {"tokens": m.tokens, "width": m.width} for name, m in index.modalities.items()})


def _memory_gib(device: torch.device) -> float:
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30
