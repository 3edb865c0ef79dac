"""The run folder, the unit of truth of a run.

config.yaml     the resolved configuration of the newest start
code.json       version and commit of the code, versions of what it stands on
ledger.jsonl    one line for each start, stop and failure
metrics.jsonl   one line for each step
tensorboard/    the same as events
logs/           one file for each rank
code/           the code that a SLURM job runs, job.json: which job that is
checkpoints/    step-00000120/ ...
DONE            appears when the run is finished
STOP            put there by a user: save and stop
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import lmp
from lmp.config import Config, merge
from lmp.errors import UserError

FIXED = (
    "seed",
    "data.pack_shots",
    "data.packs_per_step",
    "data.window_shots",
    "data.block_shards",
    "model",
    "objectives.masked_shot",
    "objectives.loss",
    "objectives.scope",
    "objectives.exclude_near",
)
"""What a resumed run may not change: it decides which shots and masks a step has, the shape of the weights, or what
the loss means."""


SNAPSHOT = "snapshot.json"
"""In a copy of the code: the commit it was taken from, and whether that was changed."""


class RunFolder:
    """Paths and small files of a run; writes are atomic."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.ledger = path / "ledger.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.done = path / "DONE"
        self.stop = path / "STOP"

    def open(self, config: Config) -> None:
        """Prepare the folder for a start of this configuration (main process only)."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        self.stop.unlink(missing_ok=True)
        write_atomic(self.config, config.dump())
        write_atomic(self.path / "code.json", json.dumps(code_state(), indent=2) + "\n")

    def check_same_run(self, config: Config) -> None:
        """Refuse a configuration that would make this folder hold two different runs.

        Raises:
            UserError: naming every key that differs.
        """
        if not self.config.is_file():
            return
        now = config.model_dump(mode="json")
        # A key that an older lmp did not have had the value that is its default today.
        defaults = Config.model_validate({"data": now["data"]}).model_dump(mode="json")
        before = merge(defaults, yaml.safe_load(self.config.read_text(encoding="utf-8")) or {})
        changed = [
            f"{key} was {_at(before, key)!r}, is {_at(now, key)!r}"
            for key in FIXED
            if _at(before, key) != _at(now, key)
        ]
        if changed:
            raise UserError(
                f"{self.path}: holds a run of another configuration: " + "; ".join(changed),
                remedy="restore those keys, or name another folder with --run",
            )

    def finished_step(self) -> int | None:
        """The step at which the run was finished, if it was."""
        if not self.done.is_file():
            return None
        return int(json.loads(self.done.read_text(encoding="utf-8"))["step"])

    def note(self, event: str, **facts: Any) -> None:
        """Append a line to the ledger."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "event": event,
            "host": platform.node(),
            **facts,
        }
        with self.ledger.open("ab+") as file:
            # A kill may have cut off the line before.
            cut = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
            file.write((b"\n" if cut else b"") + json.dumps(line).encode() + b"\n")

    def drop_metrics_after(self, step: int) -> None:
        """Forget the metrics of steps that will be made again (and a line cut off by a kill)."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue
        write_atomic(self.metrics, "".join(line + "\n" for line in kept))


def write_atomic(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def commit_of(checkout: Path) -> tuple[str | None, bool]:
    """The commit of a checkout, or of one that a snapshot was taken of, and whether its files differ from it."""
    snapshot = checkout / SNAPSHOT
    if snapshot.is_file():
        taken = json.loads(snapshot.read_text(encoding="utf-8"))
        return taken["commit"], taken["changed"]
    commit = git(checkout, "rev-parse", "HEAD")
    return commit and commit.strip(), bool(git(checkout, "status", "--porcelain", "--untracked-files=no"))


@cache
def code_state() -> dict[str, Any]:
    """Version and commit of lmp and versions of what it stands on."""
    commit, changed = commit_of(Path(lmp.__file__).parents[1])
    return {
        "lmp": lmp.__version__,
        "commit": commit,
        "changed": changed,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "deepspeed", "transformers", "webdataset")},
    }


def git(checkout: Path, *arguments: str) -> str | None:
    """What a git command prints; None: there is no git, or the folder is no repository of its own."""
    if not (checkout / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
