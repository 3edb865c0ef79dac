"""The DeepSpeed configuration that the schema generates. Pure: imports neither torch nor deepspeed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmp.config import Config

# DeepSpeed accepts misspelt top-level keys in silence, so they are checked here.
PASS_THROUGH = (
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "data_types",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "sparse_gradients",
    "torch_autocast",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)


def generated(config: Config) -> dict[str, Any]:
    """What the schema says about DeepSpeed: never `mpu` or a mesh, for sequence parallelism is hidden from it."""
    bf16 = config.train.precision == "bf16"
    zero: dict[str, Any] = {"stage": config.parallel.zero, "overlap_comm": False}
    if config.parallel.zero == 3:
        # Keeps stage 3 on the same Linear kernel as the others, so that all stages agree bit by bit in bf16.
        zero["memory_efficient_linear"] = False
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Stage 0 in fp32 reports no gradient norm; lmp clips there itself.
        "gradient_clipping": config.optimizer.clip if config.parallel.zero else 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
    }
    if bf16:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The whole DeepSpeed configuration: what is generated, joined by the keys passed through."""
    return merge(generated(config), config.parallel.deepspeed)


def deepspeed_faults(config: Config) -> list[str]:
    """Keys passed through that DeepSpeed does not have or that say something else than the schema."""
    faults = []
    if config.parallel.zero == 0 and config.train.precision == "bf16":
        faults.append(
            "parallel.zero=0 with train.precision=bf16: DeepSpeed applies a step of weight decay at start-up "
            "(use parallel.zero=1)"
        )
    ours = generated(config)
    for key in config.parallel.deepspeed:
        if key not in ours and key not in PASS_THROUGH:
            near = difflib.get_close_matches(key, [*ours, *PASS_THROUGH], n=1, cutoff=0.6)
            hint = f", did you mean {near[0]}?" if near else ""
            faults.append(f"parallel.deepspeed.{key}: not a DeepSpeed key that lmp passes through{hint}")
    for path, mine, theirs in _clashes(ours, config.parallel.deepspeed):
        faults.append(f"parallel.deepspeed.{path}={theirs!r} clashes with {mine!r}, which lmp's own keys generate")
    return faults


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `over` laid over it, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def _clashes(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, value in theirs.items():
        if key not in ours:
            continue
        if isinstance(value, Mapping) and isinstance(ours[key], Mapping):
            yield from _clashes(ours[key], value, f"{prefix}{key}.")
        elif value != ours[key]:
            yield f"{prefix}{key}", ours[key], value
