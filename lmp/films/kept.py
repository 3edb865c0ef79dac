"""Films that were read and wait for their shard, so that an interrupted ingest does not read them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

import lmp

FOLDER = ".lmp-films"
"""Hidden folder beside the shards to be; gone when they are published."""


def signature(settings: Mapping[str, Any], seen: list[Any]) -> str:
    """Changes with the settings, with the version of lmp, and with what was seen of the film and its files."""
    told = json.dumps([lmp.__version__, settings, seen], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def save(path: Path, sign: str, info: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Keep a film: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    fresh.write_bytes(safetensors.numpy.save(plain, {"sign": sign, "info": json.dumps(info)}))
    fresh.replace(path)


def load(path: Path, sign: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """A film that was kept under this signature, or None."""
    try:
        with safe_open(path, "np") as file:
            told = file.metadata() or {}
            if told.get("sign") != sign:
                return None
            return json.loads(told["info"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):  # none, or cut by a crash of the machine
        return None
