"""Predicts the memory that one rank needs for a training step, from shapes alone.

Three things are added up: what ZeRO keeps of the model (`model_states`), what autograd keeps for backward
(`activations`, block by block and kind by kind under each memory mode), and what the losses need. The peak is the
larger of two moments: the first backward through a block, when everything is saved and gradients begin to appear, and
the update, when the activations are gone but the optimizer needs room.

All formulas are counts of tensors that the code makes, with their dtypes; tests hold them against counted bytes.
Shape letters: P shots, T tokens, D width, M hidden width of the MLP, H heads, E contrastive width, I feature width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from lmp.model import LmpConfig
from lmp.objectives.settings import ObjectivesConfig
from lmp.parallel.deepspeed_config import DEFAULT_BUCKET
from lmp.parallel.memory_settings import Checkpointing

GIB = 2**30
FP32 = 4
MAX_LIVE = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: as many gathered parameters stay between forward and backward."""


@dataclass(frozen=True)
class Job:
    """What all choices of a plan have in common.

    Attributes:
        model: shape of the network.
        objectives: their section of the configuration.
        bf16: whether parameters and activations are bfloat16 (else float32).
        world_size: ranks.
        packs_per_step: packs in one optimizer step, over all ranks.
        feature_bytes: of one stored feature number.
        bucket: elements of DeepSpeed's reduce bucket; None: as many as the model has, 5e8 at most.
        offload_optimizer: whether DeepSpeed keeps master weights and moments in host memory.
        packed_kernels: attention takes contiguous tensors (CUDA kernels) instead of views of the packed qkv (CPU).
    """

    model: LmpConfig
    objectives: ObjectivesConfig
    bf16: bool
    world_size: int
    packs_per_step: int
    feature_bytes: int = 2
    bucket: int | None = None
    offload_optimizer: bool = False
    packed_kernels: bool = False

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Parameters in all, and in the larger of the optimizer's two groups."""
        return parameter_counts(self.model)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the model."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class Choice:
    """What a plan chooses.

    Attributes:
        zero: ZeRO stage.
        sequence: ranks that share a pack.
        checkpointing, offload, tile_mlp: as in the `memory` section of the configuration.
        pack_shots: P.
    """

    zero: int
    sequence: int
    checkpointing: Checkpointing
    offload: bool
    tile_mlp: int | None
    pack_shots: int


@dataclass(frozen=True)
class States:
    """Bytes that ZeRO keeps on one rank. All but the last two are there in every backward, from the second step on.

    Attributes:
        parameters: what the forward uses, gathered ones of stage 3 included.
        gradients: as they wait between backward and update.
        optimizer: fp32 master weights and both moments.
        buffers: reduction buckets, and the copies made of them while activations are there.
        update: everything at the peak of the update, when the activations are gone.
        host: of these kinds, kept in host memory.
    """

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    update: float
    host: float

    @property
    def backward(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak.

    Attributes:
        states: of the model.
        features: inputs of all this rank's packs of a step.
        activations: what autograd keeps, by kind.
        working: what exists for a moment besides: a block that runs again, gradients on their way, tiles of logits.
        loss: rows and candidates of the losses, gathered ones included.
        host: what waits in host memory, states included.
    """

    states: States
    features: float
    activations: dict[str, float] = field(default_factory=dict)
    working: float = 0.0
    loss: float = 0.0
    communication: float = 0.0
    host: float = 0.0

    @property
    def kept(self) -> float:
        """All activations."""
        return sum(self.activations.values())

    @property
    def backward(self) -> float:
        """At the first backward through a block."""
        return self.states.backward + self.features + self.kept + self.loss + self.working + self.communication

    @property
    def update(self) -> float:
        """At the optimizer's update."""
        return self.states.update + self.features

    @property
    def peak(self) -> float:
        return max(self.backward, self.update)


def predict_memory(job: Job, choice: Choice, lengths: Sequence[int] | None = None) -> Memory:
    """The memory of one rank.

    Args:
        job: what is trained, and on how many ranks.
        choice: how.
        lengths: shots of each segment of the worst pack; None: one segment.
    """
    shapes = _Shapes(job, choice, lengths or (choice.pack_shots,))
    total, largest = job.parameters
    states = model_states(
        total,
        largest,
        zero=choice.zero,
        bf16=job.bf16,
        world_size=job.world_size,
        accumulates=shapes.packs > 1,
        bucket=job.bucket,
        offload=job.offload_optimizer,
    )
    kept, host = activations(shapes)
    loss, loss_working = _loss(shapes)
    block = max((_block_working(shapes, kind) for kind in shapes.kinds), default=0.0)
    # The heads' backward comes first and frees what they kept, so its moment and that of the blocks do not add up.
    freed = kept["heads"] + loss - _outputs(shapes)
    return Memory(
        states=states,
        features=_features(shapes),
        activations=kept,
        working=max(loss_working, block - freed),
        loss=loss,
        communication=_communication(shapes),
        host=host + states.host,
    )


@lru_cache(maxsize=64)
def _counts(key: str) -> tuple[int, int]:
    import json

    import torch

    from lmp.model import LmpForPretraining
    from lmp.train.engine import parameter_groups

    with torch.device("meta"):
        model = LmpForPretraining(LmpConfig.from_dict(json.loads(key)))
    groups = [sum(p.numel() for p in group["params"]) for group in parameter_groups(model, 0.0)]
    return sum(groups), max(groups)


def parameter_counts(config: LmpConfig) -> tuple[int, int]:
    """Parameters in all, and in the larger of the optimizer's two groups; counted on a model without memory."""
    return _counts(config.to_json_string(use_diff=False))


def model_states(
    total: int,
    largest: int,
    *,
    zero: int,
    bf16: bool,
    world_size: int,
    accumulates: bool,
    bucket: int | None = None,
    offload: bool = False,
) -> States:
    """What DeepSpeed 0.19.8 keeps of the model on one rank, as counted in its engine with two parameter groups.

    Args:
        total: parameters.
        largest: those of the larger optimizer group, which the update takes at once.
        zero: stage 0 to 3.
        bf16: parameters are bfloat16, gradients are accumulated in float32.
        world_size: ranks that share the states.
        accumulates: whether a rank has several packs in a step.
        bucket: elements of the reduction bucket, as in Job.
        offload: master weights, moments and the owned gradients are in host memory.
    """
    n, b = float(total), 2 if bf16 else 4
    share, group = n / world_size, largest / world_size
    bucket = min(DEFAULT_BUCKET, total) if bucket is None else bucket
    small = min(float(bucket), n)
    # A bucket that holds every gradient is emptied at the end of backward, when the activations are gone.
    during = small if bucket < n else 0.0
    parameters, optimizer = b * n, 12 * share
    if zero == 0:
        gradients, buffers, optimizer = 4 * n, 0.0, 8 * n
        update = parameters + gradients + optimizer + 4 * min(n, DEFAULT_BUCKET)
    elif zero == 1 and bf16:
        # BF16_Optimizer: bf16 gradients, and whole fp32 ones to add them to; these travel as a bf16 copy of a flat one.
        gradients, buffers = 2 * n + 4 * n, 0.0
        travel = 6 * min(n, DEFAULT_BUCKET) if world_size > 1 else 0.0
        update = parameters + gradients + optimizer + travel
    elif zero == 1:
        gradients, buffers = 4 * n, 4.0 * bucket
        reduced = gradients + buffers + 4 * share
        update = parameters + optimizer + max(reduced, 8 * group)
    elif zero == 2:
        owned = 4 * share * (2 if accumulates and not bf16 else 1)
        gradients, buffers = owned, b * float(bucket) + 4 * during
        reduced = gradients + b * float(bucket) + 4 * small
        update = parameters + optimizer + max(reduced, 4 * share + (0 if bf16 else 4 * group))
    else:
        gathered = b * min(n, MAX_LIVE) if world_size > 1 else 0.0
        parameters = b * share + gathered
        copies = (6 if bf16 else 8) * small
        gradients, buffers = 4 * share, b * float(bucket) + (copies if during else 0.0)
        rest = b * share + gradients + optimizer + b * float(bucket)
        update = rest + max(gathered + copies, 4 * group)
    if not (offload and zero):
        return States(parameters, gradients, optimizer, buffers, update, host=0.0)
    host = optimizer + 4 * share + (4 * share if zero == 3 else 0.0)
    kept = {0: 0.0, 1: gradients, 2: 0.0, 3: 0.0}[zero]
    update = parameters + kept + b * float(bucket)
    return States(parameters, kept, 0.0, buffers, update, host=host)


class _Shapes:
    """Token counts of one rank and bytes of the tensors that a block makes of them."""

    def __init__(self, job: Job, choice: Choice, lengths: Sequence[int]) -> None:
        model = job.model
        self.job, self.choice, self.model = job, choice, model
        self.b = job.itemsize
        self.sequence = choice.sequence
        self.shots = choice.pack_shots / choice.sequence
        self.packs = max(1, job.packs_per_step * choice.sequence // job.world_size)
        self.tokens = {name: self.shots * spec["tokens"] for name, spec in model.modalities.items()}
        self.queries = self.tokens[model.target]
        self.memory = sum(self.tokens[name] for name in model.sources)
        self.hidden = int(model.mlp_ratio * model.width)
        self.rope = model.positions in ("rope", "time_rope")
        self.ragged = len(set(lengths)) > 1
        # Several segments of one length are stacked into a batch, which copies them.
        alike = sum(length * times for length, times in Counter(lengths).items() if times > 1)
        self.stacked = alike / sum(lengths) if self.ragged else 0.0
        self.kinds = [*model.modalities, "cross"]

    def layers(self, kind: str) -> int:
        return self.model.cross_layers if kind == "cross" else self.model.layers_of(kind)

    def rows(self, kind: str) -> float:
        """Tokens that a block of this kind works on."""
        return self.queries if kind == "cross" else self.tokens[kind]

    def wide(self, tokens: float) -> float:
        """Bytes of [T, D]."""
        return tokens * self.model.width * self.b

    def input(self, kind: str) -> float:
        return self.wide(self.rows(kind))

    def attended(self, kind: str) -> float:
        """Attention output and log-sum-exp of all the attention calls of a block."""
        calls = 2 if kind == "cross" else 1
        return calls * (self.input(kind) + self.rows(kind) * self.model.heads * FP32)

    def inside(self, kind: str) -> float:
        """What autograd keeps of a whole block besides its input."""
        t = self.rows(kind)
        norms = 3 if kind == "cross" else 2
        # Each norm keeps its statistics and its output; all but the first also an input of their own.
        total = norms * (self.wide(t) + 2 * t * self.b) + (norms - 1) * self.wide(t)
        total += self._attention(t, t, packed=3) + t * self.model.heads * FP32
        if kind == "cross":
            total += self._attention(t, self.memory, packed=2) + t * self.model.heads * FP32
        return total + self.mlp(t)

    def mlp(self, t: float) -> float:
        """Its hidden layer before and after the GELU; in tiles nothing is kept."""
        return 0.0 if self.choice.tile_mlp is not None else 2 * t * self.hidden * self.b

    def _attention(self, tq: float, tk: float, *, packed: int) -> float:
        """Queries, keys, values and output as they are kept; one linear map makes `packed` of the first three."""
        q, k, out = self.wide(tq), self.wide(tk), self.wide(tq)
        if self.job.packed_kernels:
            return q + 2 * k + (2 if self.sequence > 1 else 1) * out
        # Values are a view of what the linear map made, which therefore stays beside turned queries and keys.
        views = q + k + packed * k if self.rope and self.sequence == 1 else q + 2 * k
        kept = (views if self.stacked < 1 else 0.0) + self.stacked * (q + 2 * k)
        # Also kept: the output before segments are laid end to end, or before the exchange.
        return kept + (2 if self.ragged or self.sequence > 1 else 1) * out


def activations(shapes: _Shapes) -> tuple[dict[str, float], float]:
    """What autograd keeps from forward to backward, by kind; and what of it waits in host memory."""
    mode, offload = shapes.choice.checkpointing, shapes.choice.offload and shapes.choice.checkpointing != "none"
    kept: dict[str, float] = {}
    host = 0.0
    for kind in shapes.kinds:
        layers = shapes.layers(kind)
        inputs = layers * shapes.input(kind)
        if mode == "none":
            rest = layers * shapes.inside(kind)
        elif mode == "selective":
            rest = layers * shapes.attended(kind)
        else:
            rest = 0.0
        host += inputs if offload else 0.0
        kept[f"blocks of {kind}"] = rest + (0.0 if offload else inputs)
    source = shapes.wide(shapes.memory)
    if offload:
        host += source
    kept["sources"] = 0.0 if offload else source
    kept["embeddings"] = _embeddings(shapes)
    kept["heads"] = _heads(shapes)
    return kept, host


def _embeddings(shapes: _Shapes) -> float:
    """Projections, norms and positions before the blocks, and the norms after them."""
    model, b = shapes.model, shapes.b
    total = 0.0
    for name, spec in model.modalities.items():
        t = shapes.tokens[name]
        total += t * spec["width"] * b + shapes.wide(t) + 2 * t * b
    for kind in shapes.kinds:
        t = shapes.rows(kind)
        total += 2 * shapes.wide(t) + 2 * t * b  # input and output of the last norm
    if shapes.rope:
        distinct = {spec["tokens"] for spec in model.modalities.values()}
        distinct |= {sum(model.modalities[name]["tokens"] for name in model.sources)}
        total += sum(distinct) * shapes.shots * (model.width // model.heads) * FP32
        total += shapes.shots * (model.width // model.heads) / 2 * FP32
    else:
        total += shapes.wide(shapes.shots)
    return total


def _heads(shapes: _Shapes) -> float:
    """Prediction, alignment and reconstruction heads, projected targets, and their unit vectors in fp32."""
    model, b = shapes.model, shapes.b
    space = model.contrastive_width * FP32
    total = 0.0
    for name, spec in model.modalities.items():
        t = shapes.tokens[name]
        total += 2 * (2 * shapes.wide(t)) + t * spec["width"] * b + 3 * t * (2 * space + 3 * FP32)
    t = shapes.queries
    return total + 2 * shapes.wide(t) + t * (2 * space + 3 * FP32)


def _features(shapes: _Shapes) -> float:
    """Base features, flags and numbers of all packs of the step, which are on the device together."""
    numbers = sum(spec["tokens"] * spec["width"] for spec in shapes.model.modalities.values())
    return shapes.packs * shapes.shots * (numbers * shapes.job.feature_bytes + 36 + 2 * len(shapes.model.modalities))


def contrasts(job: Job, choice: Choice) -> list[tuple[float, float]]:
    """Rows of one rank and candidates of every contrastive comparison of a pack (of a step in the scope `step`).

    Every shot is taken to have every modality: the worst case.
    """
    model, objectives = job.model, job.objectives
    own = choice.pack_shots / choice.sequence
    whole = float(choice.pack_shots)
    if objectives.scope == "step":
        own *= max(1, job.packs_per_step * choice.sequence // job.world_size)
        whole *= job.packs_per_step
    seen = 1 - objectives.mask_ratio
    found: list[tuple[float, float]] = []
    if objectives.masked_shot.weight > 0:
        tokens = [spec["tokens"] for spec in model.modalities.values()]
        found += [(objectives.mask_ratio * own * k, whole * k) for k in tokens]
    if objectives.alignment.weight > 0:
        pairs = len(model.modalities) * (len(model.modalities) - 1)
        found += [(seen**2 * own, seen**2 * whole)] * pairs
    if objectives.reconstruction.weight > 0:
        k = model.modalities[model.target]["tokens"]
        found.append((seen * own * k, seen * whole * k))
    return found


def _loss(shapes: _Shapes) -> tuple[float, float]:
    """What the losses keep for backward, and what they need besides for a moment."""
    job, objectives, space = shapes.job, shapes.job.objectives, shapes.model.contrastive_width * FP32
    pairs = contrasts(job, shapes.choice)
    kept = sum((rows + candidates) * space + rows * 12 + (rows + candidates) * 8 for rows, candidates in pairs)
    if objectives.alignment.weight > 0:
        kept += len(shapes.model.modalities) * shapes.shots * (space + 8)
    embeddings = _outputs(shapes)
    if objectives.scope == "step":
        kept += shapes.packs * embeddings * 2  # of all packs, and their gradients
    elif shapes.packs > 1:
        # The output of the pack before lives until the next one is there.
        kept += embeddings + shapes.wide(sum(shapes.tokens.values()) + shapes.queries)
    # `logsumexp` makes another tile inside itself.
    tiles = max((min(rows, objectives.tile) * min(c, objectives.tile) for rows, c in pairs), default=0.0) * FP32
    gradients = max(((rows + candidates) * space for rows, candidates in pairs), default=0.0) + embeddings / 2
    return kept, max(2 * tiles, tiles + gradients, _rivals(shapes))


def _rivals(shapes: _Shapes) -> float:
    """The cheap rivals of masked shot modelling work on the base features of the whole pack, one modality at a time."""
    objectives, choice = shapes.job.objectives, shapes.choice
    if objectives.masked_shot.weight == 0:
        return 0.0
    packs = shapes.job.packs_per_step if objectives.scope == "step" else 1
    needs = []
    for spec in shapes.model.modalities.values():
        listed = choice.pack_shots * packs * spec["tokens"]
        rows = objectives.mask_ratio * listed / choice.sequence
        copies = (3 * FP32 + (shapes.job.feature_bytes if choice.sequence > 1 else 0)) * listed + 2 * FP32 * rows
        needs.append(copies * spec["width"] + min(rows, objectives.tile) * min(listed, objectives.tile) * FP32)
    return max(needs)


def _outputs(shapes: _Shapes) -> float:
    """Bytes of all embeddings that the model returns."""
    return (3 * sum(shapes.tokens.values()) + shapes.queries) * shapes.model.contrastive_width * FP32


def _block_working(shapes: _Shapes, kind: str) -> float:
    """The block that runs again, and the gradients inside a block on their way back."""
    if not shapes.layers(kind):
        return 0.0
    choice, t = shapes.choice, shapes.rows(kind)
    again = 0.0
    if choice.checkpointing != "none":
        again = shapes.inside(kind)
        if choice.checkpointing == "selective":
            again -= shapes.attended(kind)
        if choice.offload:
            again += 2 * shapes.input(kind) + (shapes.wide(shapes.memory) if kind == "cross" else 0.0)
    gradient = shapes.wide(t)
    # What the heads sent back to the contextual tokens waits for their blocks; the sources' gradient is summed up.
    again += shapes.wide(sum(shapes.tokens.values())) + (2 * shapes.wide(shapes.memory) if kind == "cross" else 0.0)
    weight = shapes.model.width * shapes.hidden * shapes.b
    if choice.tile_mlp is None:
        return again + gradient + t * shapes.hidden * shapes.b + weight
    tile = min(choice.tile_mlp, t)
    inside = tile * (4 * shapes.hidden + 2 * shapes.model.width) * shapes.b
    sums = 2 * shapes.model.width * shapes.hidden * FP32 + 2 * weight
    return again + max(2 * gradient + inside + sums, 4 * gradient)


def _communication(shapes: _Shapes) -> float:
    """What an exchange of heads for sequence needs beyond the MLP of its block, which is not there at that moment.

    Keys and values travel together, from a send buffer into a receive buffer.
    """
    if shapes.sequence == 1:
        return 0.0
    needs = [(shapes.rows(kind), shapes.memory if kind == "cross" else shapes.rows(kind)) for kind in shapes.kinds]
    return max(max(0.0, 4 * shapes.wide(tk) - shapes.mlp(tq)) for tq, tk in needs)
