"""Dry runs in a process of their own: one that fits, one that runs out of memory, one too large to begin."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lmp.cli import main
from lmp.train import dry_run


def no_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


def run(folder: Path) -> None:
    config = str(folder / "run.yaml")
    codes = [main(["train", config, "--dry-run", "--json", str(folder / "report.json")])]
    codes.append(main(["plan", config, "--gpu", "cpu", "--calibrate", str(folder / "report.json"), "--rows", "3"]))
    codes.append(main(["train", config, "--dry-run", "data.pack_shots=4194304", "data.packs_per_step=1"]))
    # DeepSpeed builds one engine in a process.
    dry_run._measure = no_memory  # type: ignore[assignment]
    codes.append(main(["train", config, "--dry-run"]))
    (folder / "codes.json").write_text(json.dumps(codes), encoding="utf-8")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
