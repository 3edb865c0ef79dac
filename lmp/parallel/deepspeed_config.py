"""The DeepSpeed configuration that the schema generates. Pure: imports neither torch nor deepspeed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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


DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's own reduce_bucket_size, in elements."""


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What of a run's configuration reaches DeepSpeed: ZeRO stage, precision, clipping norm, keys passed through."""

    zero: int
    bf16: bool
    clip: float
    extra: Mapping[str, Any]


def generated(settings: DeepSpeedSettings) -> dict[str, Any]:
    """What the schema says about DeepSpeed: never `mpu` or a mesh, for sequence parallelism is hidden from it."""
    zero: dict[str, Any] = {"stage": settings.zero, "overlap_comm": False}
    if settings.zero == 3:
        # Keeps stage 3 on the same Linear kernel as the others, so that all stages agree bit by bit in bf16.
        zero["memory_efficient_linear"] = False
    keys: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Stage 0 in fp32 reports no gradient norm; lmp clips there itself.
        "gradient_clipping": settings.clip if settings.zero else 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": settings.bf16},
    }
    if _offload_device(settings, "offload_optimizer"):
        # The optimizer is torch's AdamW wherever its state lies, so that offload changes no result. DeepSpeed's own
        # for the CPU is compiled at start-up.
        keys["zero_force_ds_cpu_optimizer"] = False
    if settings.bf16:
        keys["data_types"] = {"grad_accum_dtype": "fp32"}
    return keys


def deepspeed_config(settings: DeepSpeedSettings, *, parameters: int) -> dict[str, Any]:
    """The whole DeepSpeed configuration: what is generated, joined by the keys passed through.

    Args:
        settings: what the schema says.
        parameters: of the model. DeepSpeed allocates its reduction bucket whole, so it is made no larger.
    """
    bucket = {"zero_optimization": {"reduce_bucket_size": min(DEFAULT_BUCKET, parameters)}}
    return merge(merge(bucket, generated(settings)), settings.extra)


def deepspeed_faults(settings: DeepSpeedSettings) -> list[str]:
    """Keys passed through that DeepSpeed does not have or that say something else than the schema."""
    faults = []
    if settings.zero == 0 and settings.bf16:
        faults.append(
            "parallel.zero=0 with train.precision=bf16: DeepSpeed applies a step of weight decay at start-up "
            "(use parallel.zero=1)"
        )
    ours = generated(settings)
    for key in settings.extra:
        if key not in ours and key not in PASS_THROUGH:
            near = difflib.get_close_matches(key, [*ours, *PASS_THROUGH], n=1, cutoff=0.6)
            hint = f", did you mean {near[0]}?" if near else ""
            faults.append(f"parallel.deepspeed.{key}: not a DeepSpeed key that lmp passes through{hint}")
    for path, mine, theirs in _clashes(ours, settings.extra):
        faults.append(f"parallel.deepspeed.{path}={theirs!r} clashes with {mine!r}, which lmp's own keys generate")
    return faults + _offload_faults(settings)


def _offload_device(settings: DeepSpeedSettings, kind: str) -> str | None:
    """Where `offload_optimizer` or `offload_param` puts its tensors, or None if they stay on the device."""
    zero = settings.extra.get("zero_optimization")
    section = zero.get(kind) if isinstance(zero, Mapping) else None
    device = section.get("device", "none") if isinstance(section, Mapping) else "none"
    return None if device == "none" else str(device)


def _offload_faults(settings: DeepSpeedSettings) -> list[str]:
    """ZeRO offload that DeepSpeed would ignore, or whose state a checkpoint could not hold."""
    faults = []
    for kind, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = _offload_device(settings, kind)
        key = f"parallel.deepspeed.zero_optimization.{kind}"
        if device is None:
            continue
        if device != "cpu":
            faults.append(f"{key}.device={device}: lmp's checkpoints cannot read state from there (use cpu)")
        if settings.zero not in stages:
            faults.append(
                f"{key}: DeepSpeed ignores it with parallel.zero={settings.zero} (use parallel.zero={stages[0]})"
            )
        if settings.extra["zero_optimization"][kind].get("super_offload"):
            faults.append(f"{key}.super_offload: it needs an optimizer of its own, which lmp does not use")
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
