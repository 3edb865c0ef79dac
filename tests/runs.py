"""Small runs for tests: shards with learnable structure, a configuration, and real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lmp.data.record import FilmRecord
from lmp.data.shards import ShardWriter

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = {"video": 12, "audio": 8, "text": 10}


def make_shards(folder: Path, *, films: int = 6, shots: int = 20, seed: int = 0) -> Path:
    """Films whose modalities share a slowly changing hidden state; some audio and text is missing."""
    generator = torch.Generator().manual_seed(seed)
    maps = {name: torch.randn(4, width, generator=torch.Generator().manual_seed(7)) for name, width in WIDTHS.items()}
    encoders = {name: {"name": "test", "version": "1"} for name in WIDTHS}
    with ShardWriter(folder, encoders=encoders, films_per_shard=4) as writer:
        for film in range(films):
            length = shots + film % 3
            hidden = torch.randn(length, 4, generator=generator).cumsum(0) / 2
            features, valid = {}, {}
            for name, width in WIDTHS.items():
                noise = torch.randn(length, width, generator=generator)
                features[name] = (hidden @ maps[name] + 0.3 * noise)[:, None, :].half()
                kept = torch.rand(length, generator=generator) > (0.0 if name == "video" else 0.3)
                valid[name] = kept
            edges = np.arange(length + 1, dtype=np.int32) * 1500
            writer.write(
                FilmRecord(
                    key=f"film-{seed}-{film:03d}",
                    info={"title": f"film {film}"},
                    shots_S2=np.stack([edges[:-1], edges[1:]], 1),
                    features=features,
                    valid=valid,
                )
            )
    return folder


def config_of(shards: Path, **sections: Any) -> dict[str, Any]:
    """A tiny configuration; `sections` are laid over it."""
    base: dict[str, Any] = {
        "name": "test",
        "seed": 3,
        "data": {"train": [str(shards)], "pack_shots": 32, "packs_per_step": 4, "threads": 1},
        "model": {"width": 32, "heads": 4, "contextual_layers": 1, "cross_layers": 1, "contrastive_width": 16},
        "optimizer": {"lr": 3e-3},
        "train": {"steps": 20, "log_every": 5},
        "checkpoint": {"every_steps": 5, "keep": 3},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    return base


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(*arguments: str, module: str = "launch.local") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, module: str = "launch.local", timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a module of the checkout to its end."""
    process = start(*arguments, module=module)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]
