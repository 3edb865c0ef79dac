"""Chooses how a configuration is spread over devices: what fits, how long a step takes, what is fastest.

Time is predicted as work over rate, part after part; nothing but offload is taken to overlap, for lmp asks DeepSpeed
not to overlap communication. The volumes are those of Rajbhandari et al., "ZeRO" (2020), section 7, and of Jacobs et
al., "DeepSpeed Ulysses" (2023), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lmp.config import Config
from lmp.errors import UserError
from lmp.model import LmpConfig
from lmp.parallel.memory_settings import Checkpointing
from lmp.scaling.devices import GIB, Device
from lmp.scaling.flops import contrastive_flops, forward_of, recomputed
from lmp.scaling.memory import Choice, Job, Memory, contrasts, predict_memory

TILE = 4096
"""Tokens of an MLP tile that the planner proposes."""
LONGEST = 2**26
MODES: tuple[tuple[Checkpointing, bool], ...] = (
    ("none", False),
    ("selective", False),
    ("full", False),
    ("selective", True),
    ("full", True),
)
_ELEMENTWISE = 220.0  # bytes of memory traffic per token, layer and unit of width in bf16: norms, GELU, residuals
_COMPILED = 108.0
_FP32_RATE = 0.6  # of the fp32 peak, by the matrix products of the losses
_SAME = 0.01  # seconds that differ by less are the same


@dataclass(frozen=True)
class Calibration:
    """How a short run differed from what was predicted for it.

    Attributes:
        time: measured over predicted seconds; every predicted time is multiplied by it.
        extra: bytes measured beyond the prediction (the CUDA context's or the process's own are among them).
        source: what was measured.
    """

    time: float = 1.0
    extra: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Setting:
    """What the search is given.

    Attributes:
        config: of the run.
        model: its network.
        device: of which there are nodes * per_node.
        squares: for a pack of P shots the expected sum of the squares of its segments' lengths.
        feature_bytes: of one stored feature number.
    """

    config: Config
    model: LmpConfig
    device: Device
    nodes: int
    per_node: int
    squares: Callable[[int], float]
    feature_bytes: int = 2
    calibration: Calibration = Calibration()

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node

    @property
    def shots_per_step(self) -> int:
        return self.config.data.pack_shots * self.config.data.packs_per_step

    def packs(self, pack_shots: int) -> int:
        """Packs in a step of packs this long: as many shots as the configuration's."""
        return self.shots_per_step // pack_shots

    def job(self, packs_per_step: int) -> Job:
        extra = self.config.parallel.deepspeed
        zero = extra.get("zero_optimization", {})
        offload = zero.get("offload_optimizer") or {}
        shape: dict[str, int] = {"bucket": int(zero["reduce_bucket_size"])} if "reduce_bucket_size" in zero else {}
        return Job(
            model=self.model,
            objectives=self.config.objectives,
            bf16=self.config.train.precision == "bf16",
            world_size=self.world_size,
            packs_per_step=packs_per_step,
            feature_bytes=self.feature_bytes,
            offload_optimizer=offload.get("device", "none") != "none",
            packed_kernels=self.device.cuda,
            **shape,
        )


@dataclass(frozen=True)
class Estimate:
    """What one choice costs.

    Attributes:
        memory: of one rank.
        seconds: of one step, by part.
        mfu, hfu: shares of the peak, without and with what is computed twice.
        problem: why it cannot run, or None.
        undealt: whether the reason is that the packs cannot be dealt to the ranks.
        longest: the longest pack that fits, one window long; 0: none.
    """

    choice: Choice
    packs_per_step: int
    memory: Memory
    parts: dict[str, float]
    mfu: float
    hfu: float
    problem: str | None
    undealt: bool
    longest: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.problem is None


def config_choice(config: Config) -> Choice:
    """What the configuration says."""
    return Choice(
        zero=config.parallel.zero,
        sequence=config.parallel.sequence,
        checkpointing=config.memory.checkpointing,
        offload=config.memory.offload,
        tile_mlp=config.memory.tile_mlp,
        pack_shots=config.data.pack_shots,
    )


def choices(setting: Setting, pack_shots: int) -> Iterator[Choice]:
    """Every choice that the model's heads, the ranks and the precision allow."""
    config, heads = setting.config, setting.model.heads
    # Neither stage 0 in bf16 nor stage 3 with compiled blocks is allowed by the configuration.
    first, last = int(config.train.precision == "bf16"), 2 if config.train.compile else 3
    degrees = [n for n in range(1, heads + 1) if not (heads % n or setting.world_size % n or pack_shots % n)]
    for zero in range(first, last + 1):
        for sequence in degrees:
            for checkpointing, offload in MODES:
                for tile in (None, config.memory.tile_mlp or TILE):
                    yield Choice(zero, sequence, checkpointing, offload, tile, pack_shots)


def undealt(setting: Setting, choice: Choice) -> str | None:
    """Why the packs of a step cannot be dealt to the ranks, or None."""
    ranks, packs = setting.world_size // choice.sequence, setting.packs(choice.pack_shots)
    if not packs or packs * choice.pack_shots != setting.shots_per_step:
        return f"{setting.shots_per_step} shots a step are no whole number of packs of {choice.pack_shots}"
    if packs % ranks:
        return f"{packs} packs a step cannot be dealt evenly to {ranks} data-parallel ranks"
    return None


def estimate(
    setting: Setting, choice: Choice, *, longest: bool = True, lengths: Sequence[int] | None = None
) -> Estimate:
    """Memory and time of one choice; with packs of segments of `lengths` if they are given."""
    if lengths is not None:
        squares = float(sum(length**2 for length in lengths))
        setting = replace(setting, squares=lambda _: squares)
    packs = max(1, setting.packs(choice.pack_shots))
    job = setting.job(packs)
    memory = predict_memory(job, choice, lengths)
    parts, mfu, hfu = step_time(setting, job, choice)
    uneven = undealt(setting, choice)
    return Estimate(
        choice=choice,
        packs_per_step=packs,
        memory=memory,
        parts=parts,
        mfu=mfu,
        hfu=hfu,
        problem=uneven or _too_large(setting, memory),
        undealt=uneven is not None,
        longest=longest_pack(setting, choice) if longest else 0,
    )


def _too_large(setting: Setting, memory: Memory) -> str | None:
    device, needed = setting.device, memory.peak + setting.calibration.extra
    if needed > device.limit:
        largest = max(
            ("model states", memory.states.backward),
            ("activations", memory.kept),
            ("the optimizer's update", memory.update - memory.states.backward),
            ("loss and working memory", memory.loss + memory.working),
            key=lambda part: part[1],
        )
        return (
            f"needs {needed / GIB:.1f} GiB of {device.limit / GIB:.1f}, {largest[1] / GIB:.1f} of it for {largest[0]}"
        )
    if memory.host > device.host_gib * GIB:
        return f"needs {memory.host / GIB:.1f} GiB of host memory for each device, there are {device.host_gib:.1f}"
    return None


def longest_pack(setting: Setting, choice: Choice) -> int:
    """The longest pack of one window, a pack to each data-parallel rank, that fits; 0: none."""
    ranks = setting.world_size // choice.sequence
    job = setting.job(ranks)  # its parameters are counted once

    def fits(units: int) -> bool:
        longer = replace(choice, pack_shots=units * choice.sequence)
        return _too_large(setting, predict_memory(job, longer)) is None

    return bisect(fits, to=256, limit=LONGEST // choice.sequence)[0] * choice.sequence


def bisect(fits: Callable[[int], bool], *, to: int, limit: int | None = None) -> tuple[int, int]:
    """The largest number that fits and the smallest found not to.

    Args:
        fits: monotone; fits(0) holds.
        to: they may lie a share of 1 / to apart.
        limit: doubling ends beyond it.
    """
    low, high = 0, 1
    while (limit is None or high <= limit) and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // to):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def step_time(setting: Setting, job: Job, choice: Choice) -> tuple[dict[str, float], float, float]:
    """Seconds of a step by part, MFU and HFU."""
    device, model, world = setting.device, setting.model, setting.world_size
    sequence = choice.sequence
    packs = max(1, job.packs_per_step * sequence // world)
    one = forward_of(model, shots=choice.pack_shots, squares=setting.squares(choice.pack_shots))
    peak = device.peak(bf16=job.bf16)
    wide = model.width // model.heads >= 128
    attention_rate = peak * (device.attention_rate if wide else device.narrow_attention_rate)
    share = packs / sequence
    again = recomputed(one, checkpointing=choice.checkpointing, tile_mlp=choice.tile_mlp)
    again_attention = one.attention if choice.checkpointing == "full" else 0.0
    if job.objectives.scope == "step":
        # All packs but the last run once more, for their embeddings alone.
        again += one.total * (packs - 1) / packs
        again_attention += one.attention * (packs - 1) / packs
    losses = contrastive_flops(contrasts(job, choice), model.contrastive_width)
    losses *= 1 if job.objectives.scope == "step" else packs
    linear = peak * device.dense_rate
    parts = {
        "dense": share * 3 * (one.total - one.attention) / linear,
        "attention": share * 3 * one.attention / attention_rate,
        "recompute": share * ((again - again_attention) / linear + again_attention / attention_rate),
        "elementwise": _elementwise(setting, job, choice, packs),
        "loss": losses / (device.fp32_tflops * 1e12 * _FP32_RATE),
        **_communication(setting, job, choice, packs),
    }
    computing = sum(parts[name] for name in ("dense", "attention", "recompute", "elementwise"))
    moved = 2 * packs * _offloaded(job, choice) / (device.host_gbps * 1e9)
    parts["offload"] = max(0.0, moved - computing)
    total, _ = job.parameters
    owned = total / (1 if choice.zero == 0 else world)
    parts["update"] = 32 * owned / ((device.host_gbps if job.offload_optimizer else device.memory_gbps) * 1e9)
    parts = {name: seconds * setting.calibration.time for name, seconds in parts.items()}
    available = sum(parts.values()) * peak
    return parts, share * 3 * one.total / available, share * (3 * one.total + again) / available


def _offloaded(job: Job, choice: Choice) -> float:
    """Bytes of one pack that wait in host memory."""
    if not choice.offload or choice.checkpointing == "none":
        return 0.0
    memory = predict_memory(job, choice)
    return memory.host - memory.states.host


def _elementwise(setting: Setting, job: Job, choice: Choice, packs: int) -> float:
    """Memory traffic of what is no matrix product."""
    model = setting.model
    per_unit = (_COMPILED if setting.config.train.compile else _ELEMENTWISE) * job.itemsize / 2
    tokens = {name: spec["tokens"] for name, spec in model.modalities.items()}
    rows = float(sum(tokens[name] * model.layers_of(name) for name in tokens))
    rows += 1.5 * tokens[model.target] * model.cross_layers  # a cross block has three parts, the others two
    passes = 1.0 if choice.checkpointing == "none" else 4 / 3
    traffic = passes * per_unit * model.width * rows * choice.pack_shots / choice.sequence * packs
    return traffic / (setting.device.memory_gbps * 1e9)


def _communication(setting: Setting, job: Job, choice: Choice, packs: int) -> dict[str, float]:
    """ZeRO's reductions and gathers over all ranks, and the exchanges within those that share a pack."""
    device, world = setting.device, setting.world_size
    n, _ = job.parameters
    b = job.itemsize
    over_all = (device.network_gbps if setting.nodes > 1 else device.link_gbps) * 1e9
    own = (device.network_gbps if choice.sequence > setting.per_node else device.link_gbps) * 1e9
    # Bytes of a step in units of parameters: reductions and gathers move (world - 1) / world of what they handle.
    zero = {
        0: 2 * b,  # one all-reduce
        1: 2 * b + b,  # an all-reduce, and the gathering of what was updated
        2: b * packs + b,  # a reduction for each pack
        3: 3 * b * packs,  # parameters gathered for forward and for backward
    }[choice.zero]
    parts = {"zero": zero * n * (world - 1) / world / over_all}
    size = choice.sequence
    away = (size - 1) / size
    model, shots = setting.model, choice.pack_shots / size
    exchanged = sum(4.0 * model.layers_of(name) * spec["tokens"] for name, spec in model.modalities.items())
    queries = model.modalities[model.target]["tokens"]
    memory = sum(model.modalities[name]["tokens"] for name in model.sources)
    exchanged += model.cross_layers * (4 * queries + 2 * queries + 2 * memory)
    passes = 2.0 if choice.checkpointing == "none" else 3.0
    moved = passes * exchanged * shots * model.width * b
    # Candidates: gathered in forward, their gradients summed in backward.
    moved += 3 * sum(candidates for _, candidates in contrasts(job, choice)) * model.contrastive_width * 4
    parts["sequence"] = packs * moved * away / own
    return parts


def plan(setting: Setting, packs: list[int] | None = None) -> list[Estimate]:
    """Estimates of all choices, those that run first, fastest first.

    Args:
        packs: pack lengths to try; None: the configuration's.

    Raises:
        UserError: no choice is possible, whatever the memory.
    """
    found = [
        estimate(setting, choice)
        for pack_shots in packs or [setting.config.data.pack_shots]
        for choice in choices(setting, pack_shots)
    ]
    if not found:
        raise UserError(
            f"packs of {packs} shots cannot be cut for {setting.world_size} ranks",
            remedy="give data.pack_shots as a multiple of a number of ranks",
        )
    return sorted(found, key=lambda e: (not e.fits, e.seconds, _changes(setting, e)))


def recommended(setting: Setting, found: list[Estimate]) -> Estimate | None:
    """The fastest that fits; of those as fast, the one nearest to the configuration."""
    fitting = [e for e in found if e.fits]
    if not fitting:
        return None
    best = min(e.seconds / (e.packs_per_step * e.choice.pack_shots) for e in fitting)
    near = [e for e in fitting if e.seconds / (e.packs_per_step * e.choice.pack_shots) <= best * (1 + _SAME)]
    return min(near, key=lambda e: (_changes(setting, e), e.seconds))


def overrides(setting: Setting, chosen: Estimate) -> list[str]:
    """What to add to the command line, as `a.b=c`; empty: the configuration says it already."""
    now, then = config_choice(setting.config), chosen.choice
    keys = {
        "parallel.zero": (now.zero, then.zero),
        "parallel.sequence": (now.sequence, then.sequence),
        "memory.checkpointing": (now.checkpointing, then.checkpointing),
        "memory.offload": (now.offload, then.offload),
        "memory.tile_mlp": (now.tile_mlp, then.tile_mlp),
        "data.pack_shots": (now.pack_shots, then.pack_shots),
        "data.packs_per_step": (setting.config.data.packs_per_step, chosen.packs_per_step),
    }
    return [f"{key}={_yaml(new)}" for key, (old, new) in keys.items() if old != new]


def _changes(setting: Setting, candidate: Estimate) -> tuple[int, int, str]:
    """How far a choice is from the configuration; then what is simpler."""
    choice = candidate.choice
    modes = [mode for mode, _ in MODES[:3]]
    simple = choice.zero + modes.index(choice.checkpointing) + choice.offload + (choice.tile_mlp is not None)
    return len(overrides(setting, candidate)), simple, str(choice)


def _yaml(value: int | str | bool | None) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
