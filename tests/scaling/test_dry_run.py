"""`lmp train --dry-run`: the worst step measured beside its prediction, and what it says when memory is short."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lmp.train.dry_run import worst_pack
from tests.runs import config_of, make_shards, run, write_config


def test_worst_pack_is_full_of_the_longest_windows() -> None:
    shots = np.array([3, 100, 40], dtype=np.int32)
    assert worst_pack(shots, 150, None).lengths == (100, 40, 3, 7)
    assert worst_pack(shots, 64, None).lengths == (64,)
    assert worst_pack(shots, 64, 30).lengths == (30, 30, 3, 1)


def test_measures_predicts_and_leaves_no_trace(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", films=3, shots=120)
    sections = {
        "data": {"pack_shots": 256, "packs_per_step": 2},
        "model": {"width": 64, "contextual_layers": 2, "cross_layers": 2},
        "memory": {"checkpointing": "selective"},
        "parallel": {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 100000}}},
    }
    write_config(tmp_path / "run.yaml", config_of(shards, **sections))
    done = run(str(tmp_path), module="tests.scaling.dry_run_worker")
    assert json.loads((tmp_path / "codes.json").read_text()) == [0, 0, 2, 2], done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fits"] and report["seconds"] > 0
    assert report["predicted"]["memory_gib"] == pytest.approx(report["memory_gib"], rel=0.1)
    assert "worst step: 2 packs of 256 shots" in done.stdout and "calibrated by" in done.stdout
    too_large, out_of_memory = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "host memory" in too_large or "GiB of" in too_large
    assert "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. -> add what" in out_of_memory
    assert "memory.checkpointing=" in out_of_memory or "memory.tile_mlp=" in out_of_memory
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "run.yaml", "report.json", "codes.json"}
