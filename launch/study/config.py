"""The study file: a run configuration, a grid of changes to it, and what is held equal between them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from lmp.config import Section, build, config_help, raise_faults, read_raw, unknown
from lmp.errors import UserError
from lmp.parallel.deepspeed_config import merge

PLACES = ("nodes", "processes")
"""Grid keys that belong to the study itself: how many processes a cell has."""
DERIVED = {
    "seed": "give `seeds`",
    "name": "cells are named after the grid",
    "train.steps": "give `budget`",
    "cluster": "give `nodes`, `processes`, or `config.cluster`, which is the same for all cells",
}
"""Grid keys that cannot be, with all below them, and what to do instead."""
MAY_CHANGE = ("concurrency", "retries", "config.cluster")
"""Keys that decide no result, so that a study that goes on may have others."""


class Budget(Section):
    """What is equal between cells; a cell's steps follow from it. Exactly one is given."""

    steps: int | None = Field(None, ge=1, description="optimizer steps")
    shots: float | None = Field(None, gt=0, description="shots seen")
    flops: float | None = Field(None, gt=0, description="operations of forward and backward, nothing counted twice")

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if sum(value is not None for value in (self.steps, self.shots, self.flops)) != 1:
            raise ValueError("give exactly one of steps, shots and flops")
        return self

    @property
    def kind(self) -> Literal["steps", "shots", "flops"]:
        return "steps" if self.steps is not None else "shots" if self.shots is not None else "flops"

    @property
    def amount(self) -> float:
        return float(getattr(self, self.kind))


class Benchmark(Section):
    """A benchmark, as by `lmp evaluate --task`."""

    task: str
    labels: str
    shards: list[str] = Field(min_length=1)


class Evaluation(Section):
    """Held-out films and benchmarks on which each finished cell is measured, as by `lmp evaluate`."""

    shards: list[str] = Field(default_factory=list)
    train_shards: list[str] = Field(default_factory=list, description="to fit probes and the linear rival on")
    labels: str | None = Field(None, description="folder of KEY.labels.json, for the probes")
    seeds: int = Field(3, ge=1, description="draws of hidden shots and splits, in each evaluation")
    tasks: list[Benchmark] = Field(default_factory=list, description="linear heads on the frozen model, no rivals")

    @model_validator(mode="after")
    def _something(self) -> Evaluation:
        if not self.shards and not self.tasks:
            raise ValueError("give shards, tasks, or both")
        return self


class Study(Section):
    """A grid of runs."""

    name: str = Field("study", pattern=r"^[A-Za-z0-9._-]+$")
    base: str | None = Field(None, description="a run configuration, looked for beside the study file")
    config: dict[str, Any] = Field(default_factory=dict, description="keys of a run configuration, laid over the base")
    grid: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="configuration key -> values; or any name -> mappings {name: ..., key: value, ...} of keys that "
        "vary together; `nodes` and `processes` are keys too",
    )
    exclude: list[dict[str, Any]] = Field(
        default_factory=list, description="cells in which all keys of an entry have its value, or one of its values"
    )
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    budget: Budget
    nodes: int = Field(1, ge=1, description="of each cell")
    processes: int = Field(1, ge=1, description="on each node: one for each GPU")
    evaluate: Evaluation | None = None
    concurrency: int = Field(4, ge=1, description="cells at a time, as a SLURM array; locally it is one")
    retries: int = Field(
        2, ge=0, description="how often a cell that failed is started again, in one start of the study"
    )
    gpu: str | None = Field(None, description="for the planner, as `lmp plan --gpu`; null: what this machine has")
    modalities: str | None = Field(None, description="as `lmp plan --modalities`, where the shards are not here")

    def dump(self) -> str:
        """As YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Point:
    """A place of the grid.

    Attributes:
        name: of the cell's folder.
        values: of each axis, as tables show it.
        settings: dotted key -> value, of all keys that the axes set.
        seed: of the run.
    """

    name: str
    values: dict[str, Any]
    settings: dict[str, Any]
    seed: int


def load_study(path: Path | str, overrides: Sequence[str] = ()) -> Study:
    """Read a study file, what it extends, its base and `a.b=c` overrides of the study's keys; validate.

    The base is laid under `config`, so that what is returned needs no other file.

    Raises:
        UserError: naming every fault at once.
    """
    raw = read_raw(path, overrides)
    base = raw.get("base")
    if isinstance(base, str):
        own = raw.get("config")
        raw = {**raw, "base": None, "config": merge(read_raw(Path(path).parent / base), nested(own or {}))}
    return validate_study(raw, source=str(path))


def validate_study(raw: Mapping[str, Any], *, source: str) -> Study:
    """Turn a mapping into a Study, or report all its faults."""
    raw = dict(raw)
    if isinstance(raw.get("grid"), Mapping):
        raw["grid"] = _flat(raw["grid"])
    if isinstance(raw.get("config"), Mapping):
        raw["config"] = nested(raw["config"])
    study, faults = build(Study, raw)
    if study is not None:
        faults += _grid_faults(study)
    raise_faults(faults, source, remedy="mend the study file or the override (docs/studies.md lists every key)")
    assert study is not None
    return study


def points(study: Study) -> list[Point]:
    """Every place of the grid, the seeds innermost; what `exclude` names is among them."""
    axes = {key: list(_axis(key, values)) for key, values in study.grid.items()}
    short = _short_names(list(axes))
    found = []
    for combination in itertools.product(*axes.values()):
        for seed in study.seeds:
            values = {key: label for key, (label, _) in zip(axes, combination, strict=True)}
            settings = {key: value for _, changed in combination for key, value in changed.items()}
            parts = [f"{short[key]}-{_slug(label)}" for key, label in values.items()]
            found.append(Point("_".join([*parts, f"seed-{seed}"]), values, settings, seed))
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} becomes {"a": {"b": 1}}; what is nested already stays."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        below: Any = nested(value) if isinstance(value, Mapping) else value
        for part in reversed(str(key).split(".")):
            below = {part: below}
        tree = merge(tree, below)
    return tree


def at(tree: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def check_same_study(before: Mapping[str, Any], now: Study, *, folder: Path) -> None:
    """Refuse to let one folder hold two studies.

    Raises:
        UserError: naming the keys that differ.
    """
    old, new = _leaves(before), _leaves(now.model_dump(mode="json"))
    changed = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    if changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"{folder}: holds another study: {'; '.join(changed[:5])}{more}",
            remedy="restore those keys, or name another folder with --out",
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and not prefix.startswith("grid."):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _flat(grid: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys, so that `grid.data.window_shots=[16]` replaces what the file has under "data.window_shots"."""
    found: dict[str, Any] = {}
    for key, value in grid.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _axis(key: str, values: list[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(what tables show, the keys it sets) for each value of an axis."""
    for value in values:
        if _is_key(key):
            yield value, {key: value}
        else:
            changed = {k: v for k, v in value.items() if k != "name"}
            yield value.get("name", "-".join(str(v) for v in changed.values())), changed


def _is_key(key: str) -> bool:
    """Whether a run's configuration has this key, as a value or as a section; or the study has it."""
    known = any(key == name or name.startswith(f"{key}.") for name in _known_keys())
    return known or key.startswith("parallel.deepspeed.")


@cache
def _known_keys() -> list[str]:
    return [*PLACES, *(name for name, _, _ in config_help())]


def _grid_faults(study: Study) -> list[str]:
    faults = []

    def check(key: str, where: str) -> None:
        if derived := DERIVED.get("cluster" if key.startswith("cluster.") else key):
            faults.append(f"{where}: {key} cannot be in the grid: {derived}")
        elif not _is_key(key):
            near = unknown(key, _known_keys(), "key")
            faults.append(f"{where}: {near if 'did you mean' in near else 'no such key'}")

    for key, values in study.grid.items():
        where = f"grid.{key}"
        if not values:
            faults.append(f"{where}: has no values")
        elif _is_key(key) or key in DERIVED or not all(isinstance(value, Mapping) for value in values):
            check(key, where)
        else:
            for number, value in enumerate(values):
                for inner in value:
                    if inner != "name":
                        check(str(inner), f"{where}.{number}.{inner}")
    for number, rule in enumerate(study.exclude):
        known = [*study.grid, "seed"]
        faults += [
            f"exclude.{number}.{key}: no such key or axis" for key in rule if key not in known and not _is_key(key)
        ]
    if faults:
        return faults
    names = [point.name for point in points(study)]
    return [f"grid: two cells would be called {name}" for name in sorted({n for n in names if names.count(n) > 1})]


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: _slug(name if last.count(name) == 1 else key) for key, name in zip(keys, last, strict=True)}


def _slug(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", str(value)).strip("-.") or "x"
