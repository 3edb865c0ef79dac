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
MOVES = {
    PLAIN[0]: [PLAIN[3]],
    PLAIN[1]: [PLAIN[2]],
    PLAIN[2]: [PLAIN[0]],
    PLAIN[3]: [PLAIN[1]],
    HALF: [PLAIN[1], Kind(3, "bf16")],
}
"""Every stage gives its state once and receives one at least once."""

_FULL = [
    ("deepspeed.utils", "safe_get_full_fp32_param"),
    ("deepspeed.utils", "safe_get_full_optimizer_state"),
]
_LINKED = [
    *_FULL,
    ("deepspeed.utils", "safe_set_full_fp32_param"),
    ("deepspeed.utils", "safe_set_full_optimizer_state"),
    ("optimizer", "_hp_optimizer_states_linked"),
    ("optimizer", "_lazy_init_hp_params_optimizer_state"),
    ("optimizer", "update_lp_params"),
]
_FRAGMENTS = [*_LINKED, ("optimizer", "single_partition_of_fp32_groups")]
_PARTITIONED = [
    *_FULL,
    ("deepspeed.utils", "safe_set_local_fp32_param"),
    ("deepspeed.utils", "safe_set_local_optimizer_state"),
    ("optimizer", "fp32_partitioned_groups_flat"),
    ("parameter", "ds_numel"),
]
PRIVATE = {
    PLAIN[0]: [],
    PLAIN[1]: _FRAGMENTS,
    PLAIN[2]: _FRAGMENTS,
    PLAIN[3]: _PARTITIONED,
    HALF: [*_LINKED, ("optimizer", "fp32_groups_flat_partition")],
}
"""Names of deepspeed that lmp/train/zero_state.py stands on."""
