"""Run folders as training leaves them, without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmp.model import LmpConfig, LmpForPretraining
from tests.train.states import write_weights

MODALITIES = {
    "video": {"tokens": 2, "width": 12},
    "text": {"tokens": 1, "width": 7},
    "audio": {"tokens": 1, "width": 5},
}


def make_model(**changes: Any) -> LmpForPretraining:
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "modalities": MODALITIES,
        "width": 16,
        "heads": 2,
        "contextual_layers": 1,
        "cross_layers": 1,
        "contrastive_width": 8,
        "max_positions": 16,
        "initializer_range": 0.3,
    }
    return LmpForPretraining(LmpConfig(**(settings | changes)))


def write_run(
    run: Path,
    *,
    done: bool = True,
    steps: tuple[int, ...] = (20,),
    spoil: Callable[[dict[str, Tensor]], None] | None = None,
    drop: str | None = None,
    data: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A run folder as training leaves it: two files of weights per checkpoint, manifest, config, DONE."""
    run.mkdir()
    (run / "config.yaml").write_text("name: test\n")
    (run / "code.json").write_text(json.dumps({"lmp": "0.1.0", "commit": "c0ffee", "changed": False}))
    model = make_model(**changes)
    for step in steps:
        weights = {name: tensor + 0.01 * step for name, tensor in model.state_dict().items()}
        if spoil:
            spoil(weights)
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        facts = {
            "digest": "d1e5",
            "encoders": {"video": {"name": "signal-video", "version": "1", "frames": 4}},
            "modalities": {name: {**spec, "dtype": "float16"} for name, spec in MODALITIES.items()},
            **(data or {}),
        }
        manifest = {
            "progress": {
                "step": step,
                "cursor": {"epoch": 1, "step": 0, "carried": 0},
                "shots_seen": 12345,
                "tokens_seen": 49380,
            },
            "model": json.loads(json.dumps(model.config.to_dict(), default=str)),
            "data": {key: value for key, value in facts.items() if key != drop},
        }
        write_weights(folder, weights, manifest)
    if done:
        (run / "DONE").write_text(json.dumps({"step": steps[-1]}))
    return run
