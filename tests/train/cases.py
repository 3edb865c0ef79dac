"""The engines between which test_zero_state.py moves training state, and the order of the moves."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """An engine: ZeRO stage, precision, optimizer in host memory or not, some parameters frozen or not."""

    stage: int
    precision: str = "fp32"
    offload: bool = False
    frozen: bool = False

    @property
    def name(self) -> str:
        extras = "-offload" * self.offload + "-frozen" * self.frozen
        return f"zero{self.stage}-{self.precision}{extras}"


class Action(NamedTuple):
    """Build an engine of a kind, restore the checkpoint `start` or make two steps, and look; then one step more."""

    kind: Kind
    start: str | None = None
    ranks: int = 2

    @property
    def name(self) -> str:
        """Also of the checkpoint that is saved before the last step."""
        return (f"{self.start}-to-" if self.start else "") + f"{self.kind.name}-on-{self.ranks}"


PLAIN = [Kind(stage) for stage in range(4)]
HALF = [Kind(1, "bf16"), Kind(3, "bf16")]
OFFLOADED = [Kind(2, offload=True), Kind(3, offload=True)]
FROZEN = [Kind(0, frozen=True), Kind(3, frozen=True), Kind(1, "bf16", frozen=True)]
PAIRS = [
    *((source, target) for source in PLAIN for target in PLAIN),
    (HALF[0], HALF[1]),
    (HALF[1], HALF[0]),
    (HALF[0], PLAIN[1]),
    (PLAIN[2], HALF[1]),
    (OFFLOADED[0], OFFLOADED[1]),
    (OFFLOADED[1], PLAIN[1]),
    (PLAIN[3], OFFLOADED[0]),
    (FROZEN[0], FROZEN[1]),
    (FROZEN[1], FROZEN[2]),
    (FROZEN[2], FROZEN[0]),
]
SOURCES = list(dict.fromkeys(source for source, _ in PAIRS))
ON_TWO = [*map(Action, SOURCES), *(Action(target, Action(source).name) for source, target in PAIRS)]
"""All pairs of stages on two ranks."""


def goes_on(action: Action) -> bool:
    """Whether a step is made after the move: of the plain pairs, each stage's to the next one."""
    plain = {Action(kind).name: kind.stage for kind in PLAIN}
    if action.start in plain and action.kind in PLAIN:
        return action.kind.stage == (plain[action.start] + 1) % 4
    return True


FOUR = [Action(kind, ranks=4) for kind in (PLAIN[2], PLAIN[3], HALF[0])]
ONE = [Action(kind, four.name, 1) for kind, four in zip((PLAIN[3], PLAIN[0], PLAIN[1]), FOUR, strict=True)]
TWO = [Action(PLAIN[1], ONE[0].name), Action(PLAIN[2], ONE[1].name), Action(HALF[1], ONE[2].name)]
"""Four ranks (dp 2 x sp 2), then one, then two."""

_LINKED = [
    ("optimizer", "_hp_optimizer_states_linked"),
    ("optimizer", "_lazy_init_hp_params_optimizer_state"),
    ("optimizer", "update_lp_params"),
    ("parameter", "_hp_mapping"),
    ("mapping", "lp_fragment_address.start"),
    ("mapping", "get_hp_fragment"),
]
_FRAGMENTS = [*_LINKED, ("optimizer", "single_partition_of_fp32_groups")]
_PARTITIONED = [
    ("optimizer", "fp32_partitioned_groups_flat"),
    ("optimizer", "_get_fp32_opt_state_partition"),
    ("optimizer", "_reassign_or_swap_out_partitioned_parameters"),
    ("optimizer", "persistent_parameters"),
    ("parameter", "ds_numel"),
    ("parameter", "ds_shape"),
    ("parameter", "ds_tensor"),
    ("parameter", "partition"),
]
PRIVATE = {
    PLAIN[0]: [],
    PLAIN[1]: _FRAGMENTS,
    PLAIN[2]: _FRAGMENTS,
    PLAIN[3]: _PARTITIONED,
    HALF[0]: [*_LINKED, ("optimizer", "fp32_groups_flat_partition")],
}
"""Names of deepspeed that lmp/train/zero_state.py stands on."""
