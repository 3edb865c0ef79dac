"""The one schema of a run, and how a YAML file with `extends` and `a.b=c` overrides becomes it.

Every fault of a configuration is reported at once, each naming its key: unknown keys with the nearest known
one, wrong types, and what contradicts something else (heads against sequence degree, packs against ranks,
names and dims against the data set).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmp.cluster import ClusterConfig, cluster_faults
from lmp.errors import UserError
from lmp.objectives.settings import ObjectivesConfig
from lmp.parallel.deepspeed_config import DeepSpeedSettings, deepspeed_faults, merge
from lmp.parallel.memory_settings import Checkpointing, MemorySettings

S = TypeVar("S", bound=BaseModel)


class Section(BaseModel):
    """A part of the schema: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class DataSet(Section):
    """A folder of shards, and how much of the stream is to come from it. A bare path stands for one shown once."""

    shards: str = Field(min_length=1)
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    passes: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"shards": value} if isinstance(value, str) else value


class CacheConfig(Section):
    """Whole shards kept on the node's own disk."""

    folder: str | None = Field(None, description="folder on a local disk, shared by the node's processes; null: none")
    gib: float = Field(100.0, gt=0, description="how much it may hold")


class DataConfig(Section):
    """What is read and how it is packed. What decides the plan cannot change within a run."""

    train: list[DataSet] = Field(
        min_length=1,
        description="folders or URLs of shards; instead of a path also {shards: PATH, weight: W}, its share of the "
        "shots, or {shards: PATH, passes: N}, how often an epoch shows each film",
    )
    leave_out: list[str] = Field(
        default_factory=list,
        description="files of ids, one a line: films with such a key or id in their record are never shown",
    )
    pack_shots: int = Field(256, ge=1, description="P: shots in one packed row")
    packs_per_step: int = Field(8, ge=1, description="packs in one optimizer step, whatever the number of processes")
    window_shots: int | None = Field(None, ge=1, description="longest window; null: a whole film up to pack_shots")
    block_shards: int | None = Field(
        None, ge=1, description="shuffle within blocks of this many shards, for slow storage; null: over everything"
    )
    read_ahead: int = Field(2, ge=1, description="steps read ahead")
    threads: int = Field(2, ge=1, description="reading threads per process")
    stall_seconds: float = Field(60.0, gt=0, description="a read that takes longer is reported")
    cache: CacheConfig = Field(default_factory=CacheConfig)


class ModelSection(Section):
    """The shape of the network; modalities and their dims come from the data set."""

    target: str = Field("video", description="the modality that the cross-modal transformer reconstructs")
    sources: list[str] | None = Field(None, description="what it reads; null: every other modality")
    width: int = Field(512, ge=1)
    heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    contextual_layers: int = Field(4, ge=0)
    cross_layers: int = Field(4, ge=1)
    contrastive_width: int = Field(256, ge=1)
    positions: Literal["learned", "sinusoidal", "rope", "time_rope"] = "rope"
    max_positions: int = Field(512, ge=1, description="longest window that learned positions can number")
    initial_temperature: float = Field(0.07, gt=0)
    minimum_temperature: float = Field(0.01, gt=0)
    initial_bias: float = Field(-10.0, allow_inf_nan=False, description="of the sigmoid loss")


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0, description="not on norms, biases, embeddings and temperatures")
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    final_lr_fraction: float = Field(0.01, ge=0, le=1)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class TrainConfig(Section):
    """How long and in which precision."""

    steps: int = Field(1000, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    attention: Literal["auto", "sdpa", "varlen", "flash2", "flash3", "flash4"] = Field(
        "auto", description="attention backend; `lmp doctor` tells which there are here"
    )
    log_every: int = Field(
        10, ge=1, description="steps between full metrics (rivals, accuracy); losses are logged each step"
    )
    peak_tflops: float | None = Field(None, gt=0, description="of one device, for the MFU; null: known devices only")
    compile: bool = Field(
        False, description="torch.compile each block, attention aside; ZeRO 0-2; needs a compiler where the run starts"
    )


class ParallelConfig(Section):
    """How the work is spread over processes."""

    zero: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    sequence: int = Field(1, ge=1, description="processes that share one pack (Ulysses)")
    timeout_minutes: float = Field(30.0, gt=0, description="after which a silent peer is taken for dead")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="further DeepSpeed keys, passed through")


class MemoryConfig(Section):
    """How activations are kept for backward. Changes memory and speed, not the losses."""

    checkpointing: Checkpointing = Field(
        "none",
        description="none; full: each block keeps its inputs and runs again in backward; selective: attention's output "
        "is kept too and attention never runs twice, for long sequences",
    )
    offload: bool = Field(False, description="the kept block inputs wait in host memory")
    tile_mlp: int | None = Field(
        None, ge=1, description="run each block's MLP in tiles of this many tokens; null: all at once"
    )


class CheckpointConfig(Section):
    """When the state is saved and how much is kept."""

    every_steps: int | None = Field(200, ge=1)
    every_minutes: float | None = Field(None, gt=0)
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_every_steps: int | None = Field(
        None, ge=1, description="checkpoints at multiples of this are made, too, and kept for good"
    )
    asynchronous: bool = Field(
        True, description="copy the state to host memory and write it beside the training; needs its size there"
    )


class SpikeConfig(Section):
    """When a loss or a gradient is far above what it was lately, and what is done then."""

    action: Literal["none", "skip", "roll_back", "stop"] = Field(
        "skip", description="none: count it only; else as health.non_finite"
    )
    window: int = Field(128, ge=8, description="steps remembered; nothing is judged before half of them are made")
    sigmas: float = Field(10.0, gt=0, description="robust standard deviations above the median")
    factor: float = Field(1.5, gt=1, description="and at least this many times the median")


class HealthConfig(Section):
    """What is done about steps that are not sound, ranks that are slow, and runs that do not move."""

    non_finite: Literal["skip", "roll_back", "stop"] = Field(
        "skip",
        description="skip: leave out the update; roll_back: to the newest checkpoint and past the data since; stop",
    )
    spike: SpikeConfig = Field(default_factory=SpikeConfig)
    max_skips_in_a_row: int = Field(10, ge=0, description="more updates left out one after another: roll back")
    max_skips: int = Field(1000, ge=0, description="more updates left out in the whole run: roll back")
    max_rollbacks: int = Field(3, ge=0, description="after more the run stops")
    hang_seconds: float | None = Field(
        600.0,
        gt=0,
        description="a rank that does not move for so long has hung; never more than 0.8 of parallel.timeout_minutes; "
        "null: no watchdog",
    )
    straggler_percent: float = Field(
        20.0, gt=0, description="ranks whose own time is so much above the median's are named"
    )


class Config(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0, lt=2**31)
    data: DataConfig
    model: ModelSection = Field(default_factory=ModelSection)
    objectives: ObjectivesConfig = Field(default_factory=ObjectivesConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @property
    def memory_settings(self) -> MemorySettings:
        """How the blocks are wrapped."""
        return MemorySettings(
            checkpointing=self.memory.checkpointing,
            offload=self.memory.offload,
            tile_mlp=self.memory.tile_mlp,
            compile=self.train.compile,
        )

    @property
    def deepspeed(self) -> DeepSpeedSettings:
        """What of this reaches DeepSpeed."""
        return DeepSpeedSettings(
            zero=self.parallel.zero,
            bf16=self.train.precision == "bf16",
            clip=self.optimizer.clip,
            extra=self.parallel.deepspeed,
        )

    def dump(self) -> str:
        """The resolved configuration as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply what it extends and the `a.b=c` overrides, and validate.

    Raises:
        UserError: naming every fault at once.
    """
    return validate(read_raw(path, overrides), source=str(path))


def read_raw(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file with what it extends, and the `a.b=c` overrides laid over it; nothing is validated.

    Raises:
        UserError: no such file, no YAML, an override of another form.
    """
    return merge(_read(Path(path), seen=()), _parse_overrides(overrides))


def validate(raw: Mapping[str, Any], *, source: str) -> Config:
    """Turn a mapping into a Config, or report all its faults."""
    config, faults = build(Config, raw)
    if config is not None:
        faults += contradictions(config)
    raise_faults(faults, source)
    assert config is not None
    return config


def check_run(
    config: Config, *, world_size: int, modalities: Mapping[str, Any], source: str = "the configuration"
) -> None:
    """Hold a configuration against the processes and the data set that it meets.

    Args:
        config: the validated configuration.
        world_size: number of processes.
        modalities: the modalities of the data set, by name.
        source: named in the message.

    Raises:
        UserError: naming every fault at once.
    """
    faults = []
    sequence = config.parallel.sequence
    if world_size % sequence:
        faults.append(f"parallel.sequence={sequence} does not divide the {world_size} processes")
    elif config.data.packs_per_step % (world_size // sequence):
        faults.append(
            f"data.packs_per_step={config.data.packs_per_step} cannot be dealt evenly to "
            f"{world_size // sequence} data-parallel ranks"
        )
    known = list(modalities)
    wanted = {"model.target": [config.model.target], "model.sources": config.model.sources or []}
    for key, names in wanted.items():
        faults += [f"{key}: {unknown(name, known, 'modality of the data set')}" for name in names if name not in known]
    if len(known) < 2:
        faults.append(f"the data set has only {known}: reconstruction needs a target and at least one source")
    raise_faults(faults, source)


def contradictions(config: Config) -> list[str]:
    """What in a configuration contradicts something else in it."""
    model, parallel, data = config.model, config.parallel, config.data
    faults = []
    if model.width % model.heads:
        faults.append(f"model.width={model.width} is not a multiple of model.heads={model.heads}")
    if model.heads % parallel.sequence:
        faults.append(f"model.heads={model.heads} is not a multiple of parallel.sequence={parallel.sequence}")
    if data.pack_shots % parallel.sequence:
        faults.append(f"data.pack_shots={data.pack_shots} is not a multiple of parallel.sequence={parallel.sequence}")
    window = data.window_shots or data.pack_shots
    if model.positions == "learned" and model.max_positions < window:
        faults.append(f"model.max_positions={model.max_positions} cannot number the {window} places of a window")
    if model.sources is not None and model.target in model.sources:
        faults.append(f"model.sources holds model.target={model.target}: the target cannot be its own source")
    saving = config.checkpoint
    if saving.every_steps is None and saving.every_minutes is None and saving.keep_every_steps is None:
        faults.append("checkpoint.every_steps, every_minutes and keep_every_steps are all null: nothing would be saved")
    if config.memory.offload and config.memory.checkpointing == "none":
        faults.append("memory.offload=true with memory.checkpointing=none: there are no checkpoints to offload")
    if config.train.compile and parallel.zero == 3:
        faults.append(
            "train.compile=true with parallel.zero=3: ZeRO 3 gathers weights between the operations of a block "
            "(use parallel.zero=2)"
        )
    return faults + _mixing_faults(data.train) + deepspeed_faults(config.deepspeed) + cluster_faults(config.cluster)


def _mixing_faults(sets: Sequence[DataSet]) -> list[str]:
    faults = [
        f"data.train.{n}: has weight and passes: give one of them"
        for n, entry in enumerate(sets)
        if entry.weight is not None and entry.passes is not None
    ]
    weighted = [entry.weight is not None for entry in sets]
    if any(weighted) and not all(weighted):
        faults.append(f"data.train.{weighted.index(False)}: has no weight, others have: give all of them one")
    if not any(weighted) and max((1.0 if e.passes is None else e.passes) for e in sets) < 1:
        faults.append("data.train: passes are all below 1: an epoch shows at least one data set whole")
    return faults


def config_help() -> Iterable[tuple[str, str, str]]:
    """Every key of the schema with its default and its meaning, in order."""

    def walk(section: type[BaseModel], prefix: str) -> Iterable[tuple[str, str, str]]:
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from walk(inner, f"{prefix}{name}.")
            else:
                default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
                yield f"{prefix}{name}", default, field.description or ""

    return walk(Config, "")


class _Loader(yaml.SafeLoader):
    """YAML without the numbers to base 60 of YAML 1.1, to which 12:00:00 is 43200."""

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        if ":" in node.value:
            return node.value
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        )
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a YAML file"
        raise UserError(f"{path}: no such configuration file", remedy=hint)
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"{path}: extends itself through {seen[-1]}", remedy="remove one `extends`")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        place = f", line {where.line + 1}" if where else ""
        raise UserError(f"{path}{place}: not valid YAML", remedy="mend the file") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a {type(raw).__name__}, not keys and values", remedy="write `key: value` lines")
    bases = raw.pop("extends", [])
    merged: dict[str, Any] = {}
    listed = [bases] if isinstance(bases, str) else bases
    if not isinstance(listed, list) or not all(isinstance(base, str) for base in listed):
        raise UserError(
            f"{path}: extends is not a file name or a list of them", remedy="write for example `extends: base.yaml`"
        )
    for base in listed:
        merged = merge(merged, _read(path.parent / base, (*seen, resolved)))
    return merge(merged, raw)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise UserError(
                f"override {override!r} is not of the form a.b=c", remedy="write for example train.steps=100"
            )
        try:
            tree = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: the value is not valid YAML", remedy="quote it") from error
        for name in reversed(key.strip().split(".")):
            tree = {name: tree}
        merged = merge(merged, tree)
    return merged


def build(schema: type[S], raw: Mapping[str, Any]) -> tuple[S | None, list[str]]:
    """Validate; keys at fault are set aside, so that contradictions among the rest can be seen too.

    Returns:
        what could be built (None: nothing), and every fault with its key.
    """
    try:
        return schema.model_validate(raw), []
    except ValidationError as error:
        problems = error.errors()
    faults = [_describe(schema, problem["loc"], problem["type"], problem["msg"]) for problem in problems]
    rest = merge({}, raw)
    for problem in problems:
        _drop(rest, problem["loc"])
    try:
        return schema.model_validate(rest), faults
    except ValidationError:
        return None, faults


def _describe(schema: type[BaseModel], location: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(str(part) for part in location)
    if kind != "extra_forbidden":
        return f"{key}: {message[0].lower()}{message[1:]}"
    section = _section_at(schema, location[:-1])
    return f"{key}: {unknown(str(location[-1]), list(section.model_fields), 'key')}"


def unknown(name: str, known: Sequence[str], what: str) -> str:
    """Says that a name is not known, and the nearest that is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"no such {what}" + (f", did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")


def _section_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    section = schema
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        candidates = (annotation, *get_args(annotation))
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return section


def _drop(raw: dict[str, Any], location: tuple[int | str, ...]) -> None:
    """Remove the faulty key: the deepest mapping entry on the way to it."""
    holder, name = raw, str(location[0])
    for part in location[1:]:
        below = holder.get(name)
        if not isinstance(below, dict) or not isinstance(part, str):
            break
        holder[name] = holder = dict(below)
        name = part
    holder.pop(name, None)


def raise_faults(
    faults: Sequence[str],
    source: str,
    *,
    remedy: str = "mend the file or the override (`lmp config keys` lists every key)",
) -> None:
    """Raise one UserError that tells them all, if there are any."""
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(
            f"{source}: {count}: " + "; ".join(faults),
            remedy=remedy,
        )
