"""DeepSpeed behind a narrow door: forward, backward, step, and nothing else of it is used by the trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmp.config import Config, OptimizerConfig
from lmp.parallel.deepspeed_config import deepspeed_config
from lmp.parallel.mesh import Mesh
from lmp.train.watchdog import Watch


class GatedAdamW(torch.optim.AdamW):
    """AdamW that makes a step only while its gate is open; else weights, moments and step counts stay as they are.

    Attributes:
        gate: asked at each step, when the gradients are there.
    """

    def __init__(self, *args: Any, gate: Callable[[], bool], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = gate

    def step(self, closure: Any = None) -> Any:
        if self.gate():
            return super().step(closure)
        self.make_state()
        return None

    def make_state(self) -> None:
        """Make the moments that a first step would have made, for DeepSpeed links to them after it."""
        for group in self.param_groups:
            if any(p.grad is not None and not self.state[p] for p in group["params"]):
                self._init_group(group, [], [], [], [], [], [])


class ForwardClock:
    """Adds up the time in it; a context manager that may be entered again and again."""

    def __init__(self, device: torch.device, *, exact: bool) -> None:
        self.seconds = 0.0
        self._wait = exact and device.type == "cuda"
        self._began = 0.0

    def __enter__(self) -> None:
        if self._wait:
            torch.cuda.synchronize()
        self._began = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if self._wait:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began


class Engine:
    """One model with its sharded optimizer. Every call is collective: all ranks make it, in the same order.

    Args:
        model: the whole model in fp32, the same on every rank.
        config: the run's configuration.
        mesh: where this process stands.

    Attributes:
        watch: is told what the process is at.
        made: whether the last step changed the weights.
    """

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        import deepspeed
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        if GatedAdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # else it warns that this AdamW is not one that it knows
            ZERO_SUPPORTED_OPTIMIZERS.append(GatedAdamW)
        self.stage = config.parallel.zero
        self.mesh = mesh
        self.clip = config.optimizer.clip
        self.watch = Watch()
        self._clock = ForwardClock(mesh.device, exact=False)
        self.made = False
        self._norm = math.nan
        self._allow: Callable[[float], bool] = math.isfinite
        self._open: bool | None = None
        optimizer = GatedAdamW(
            parameter_groups(model, config.optimizer.weight_decay),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True,
            gate=self._gate,
        )
        self.deepspeed, *_ = deepspeed.initialize(
            model=model.to(mesh.device),
            optimizer=optimizer,
            config=deepspeed_config(config.deepspeed, parameters=sum(p.numel() for p in model.parameters())),
            dist_init_required=False,
        )

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer; only `zero_state` looks inside."""
        return self.deepspeed.optimizer

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.enter("forward", micro_batch=self.watch.micro_batch + 1)
        with self._clock:
            return self.deepspeed(*args, **kwargs)

    def timed(self, *, exact: bool) -> ForwardClock:
        """Time the forward passes from now on.

        Args:
            exact: wait for the device around each of them; a little slower, and the only way to know there.
        """
        self._clock = ForwardClock(self.mesh.device, exact=exact)
        return self._clock

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; any number of them makes a step."""
        self.watch.enter("backward")
        self.deepspeed.backward(loss)

    def step(self, lr: float, allow: Callable[[float], bool] = math.isfinite) -> float:
        """Average the gradients over all ranks, clip, update, and forget the gradients.

        Args:
            lr: learning rate.
            allow: is given the norm, the same on every rank, and says whether the update is made. One of a norm that is
                not finite never is, for DeepSpeed makes most of these not at all.

        Returns:
            the norm of the gradient before clipping.
        """
        self.watch.enter("updating", micro_batch=0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._allow, self._open = allow, None
        self.deepspeed.step()
        if self.stage:
            self._norm = float(self.deepspeed.get_global_grad_norm())
        self.made = bool(self._open)
        return self._norm

    def close(self) -> None:
        self.deepspeed.destroy()

    def _gate(self) -> bool:
        """Asked by the optimizer, by DeepSpeed once for each group or sub-group: one answer for the whole step."""
        if self._open is None:
            if self.stage:
                # Set before the inner optimizer steps; tests/train/test_health_gate.py guards that.
                self._norm = float(self.optimizer._global_grad_norm)
            else:
                self._clip_without_zero()
            self._open = math.isfinite(self._norm) and self._allow(self._norm)
        return self._open

    def _clip_without_zero(self) -> None:
        """Clip where DeepSpeed reports no norm; decay also what has no gradient, as stages 1-3 do."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._norm = float(nn.utils.clip_grad_norm_(parameters, self.clip))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: the weights of linear maps, which decay, and everything else, which does not."""
    decaying = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in decaying], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decaying], "weight_decay": 0.0},
    ]


def learning_rate(step: int, *, steps: int, settings: OptimizerConfig) -> float:
    """The rate of step number `step` (from 0): linear warm-up, then cosine decay to `final_lr_fraction`."""
    warmup = max(1, round(settings.warmup_fraction * steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.final_lr_fraction + (1 - settings.final_lr_fraction) * cosine)
