"""The engines between which test_zero_state.py moves training state."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """An engine's ZeRO stage and precision."""

    stage: int
    precision: str

    @property
    def name(self) -> str:
        return f"zero{self.stage}-{self.precision}"


PLAIN = [Kind(stage, "fp32") for stage in range(4)]
HALF = Kind(1, "bf16")
MOVES = {source: list(PLAIN) for source in PLAIN} | {HALF: [HALF, Kind(3, "bf16"), Kind(1, "fp32")]}

_FULL = [
    ("deepspeed.utils", "safe_get_full_fp32_param"),
    ("deepspeed.utils", "safe_get_full_optimizer_state"),
]
_FRAGMENTS = [
    *_FULL,
    ("deepspeed.utils", "safe_set_full_fp32_param"),
    ("deepspeed.utils", "safe_set_full_optimizer_state"),
    ("optimizer", "single_partition_of_fp32_groups"),
    ("optimizer", "_hp_optimizer_states_linked"),
    ("optimizer", "_lazy_init_hp_params_optimizer_state"),
    ("optimizer", "update_lp_params"),
]
_PARTITIONED = [
    *_FULL,
    ("deepspeed.utils", "safe_set_local_fp32_param"),
    ("deepspeed.utils", "safe_set_local_optimizer_state"),
    ("optimizer", "fp32_partitioned_groups_flat"),
    ("parameter", "ds_numel"),
]
PRIVATE = {0: [], 1: _FRAGMENTS, 2: _FRAGMENTS, 3: _PARTITIONED}
"""Names of deepspeed that lmp/train/zero_state.py stands on, by stage."""
