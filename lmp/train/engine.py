"""DeepSpeed behind a narrow door: forward, backward, step, and nothing else of it is used by the trainer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lmp.config import Config, OptimizerConfig
from lmp.parallel.deepspeed_config import deepspeed_config
from lmp.parallel.mesh import Mesh


class Engine:
    """One model with its sharded optimizer. Every call is collective: all ranks make it, in the same order.

    Args:
        model: the whole model in fp32, the same on every rank.
        config: the run's configuration.
        mesh: where this process stands.
    """

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        import deepspeed

        self.stage = config.parallel.zero
        self.mesh = mesh
        self.clip = config.optimizer.clip
        self._norm = math.nan
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optimizer.weight_decay),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True,
        )
        if self.stage == 0:
            optimizer.register_step_pre_hook(self._clip_without_zero)
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
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; any number of them makes a step."""
        self.deepspeed.backward(loss)

    def step(self, lr: float) -> float:
        """Average the gradients over all ranks, clip, update, and forget the gradients.

        Returns:
            the norm of the gradient before clipping.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        return self._norm if self.stage == 0 else float(self.deepspeed.get_global_grad_norm())

    def close(self) -> None:
        self.deepspeed.destroy()

    def _clip_without_zero(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Clip where DeepSpeed reports no norm; decay also what has no gradient, as stages 1-3 do."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
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
