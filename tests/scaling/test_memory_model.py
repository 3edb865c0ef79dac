"""Predicted bytes against counted ones: activations in every memory mode, and what DeepSpeed keeps of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmp.model import LmpConfig
from lmp.objectives import ObjectivesConfig
from lmp.scaling.live_memory import LiveMemory, saved_tensors
from lmp.scaling.memory import Choice, Job, predict_memory
from tests.scaling.memory_worker import counted_step, model_of
from tests.workers import run_ranks

CASES: list[dict[str, Any]] = [
    {},
    {"pack": 128, "width": 128, "layers": 4, "tokens": 1},
    {"pack": 1024, "width": 32, "layers": 1, "lengths": (500, 524)},
    {"lengths": (50, 50, 156)},
    {"lengths": (64,) * 4, "positions": "learned"},
    {"bf16": True, "tokens": 3},
    {"checkpointing": "full", "layers": 5},
    {"checkpointing": "full", "layers": 5, "offload": True, "bf16": True},
    {"checkpointing": "selective", "layers": 5, "lengths": (100, 156)},
    {"checkpointing": "selective", "layers": 5, "offload": True, "tile": 64},
    {"tile": 64, "layers": 3},
    {"pack": 128, "width": 256, "layers": 5, "checkpointing": "full", "tokens": 1},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(f"{k}={v}" for k, v in case.items()) or "base")
def test_activations_and_peak(case: dict[str, Any]) -> None:
    """Within 10 %: what is alive between forward and backward, and the most there is in either."""
    setup = {"pack": 256, "width": 64, "layers": 2, "tokens": 2, "positions": "rope", **case}
    kept, peak = counted_step(**setup)
    job, choice = job_of(**setup)
    memory = predict_memory(job, choice, setup.get("lengths"))
    # On the CPU what is offloaded stays in the memory that is counted.
    assert memory.kept + memory.host + memory.loss == pytest.approx(kept, rel=0.1)
    assert memory.backward - memory.states.backward - memory.features + memory.host == pytest.approx(peak, rel=0.1)


@pytest.mark.multiprocess
def test_states_and_sequence_parallelism(tmp_path: Path) -> None:
    """Two ranks: every stage in both precisions through the real engine, and activations with sp = 2."""
    found = run_ranks("tests.scaling.memory_worker", tmp_path)
    for name, (predicted, counted) in found[0]["states"].items():
        assert predicted == pytest.approx(counted, rel=0.1), name
    for name, (predicted, counted) in found[0]["activations"].items():
        assert predicted == pytest.approx(counted, rel=0.1), name


def job_of(**setup: Any) -> tuple[Job, Choice]:
    model = model_of(setup["width"], setup["layers"], setup["tokens"], setup["positions"])
    job = Job(model, ObjectivesConfig(tile=64), setup.get("bf16", False), 1, 1, feature_bytes=4)
    choice = Choice(
        zero=0,
        sequence=1,
        checkpointing=setup.get("checkpointing", "none"),
        offload=setup.get("offload", False),
        tile_mlp=setup.get("tile"),
        pack_shots=setup["pack"],
    )
    return job, choice


def test_long_packs_cost_linear_memory() -> None:
    job, _ = job_of(pack=4096, width=64, layers=2, tokens=2, positions="rope")
    sizes = [predict_memory(job, Choice(0, 1, "none", False, None, pack)).kept for pack in (4096, 8192, 16384)]
    assert sizes[1] / sizes[0] == pytest.approx(2) and sizes[2] / sizes[1] == pytest.approx(2)


def test_live_memory_counts_storages_once_and_forgets_them() -> None:
    with LiveMemory() as live:
        x = torch.zeros(100, requires_grad=True)
        assert live.now == 400
        view = x.detach().view(10, 10)
        assert live.now == 400
        y = x * 2
        assert (live.now, live.peak) == (800, 800)
        del y, view
        assert (live.now, live.peak) == (400, 800)
        live.reset_peak()
        assert live.peak == 400


def test_saved_tensors_leave_out_what_is_there_anyway() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with saved_tensors(besides=layer.parameters()) as saved:
        layer(x).relu()
    # The input of the linear map and the output of relu.
    assert saved.bytes == 2 * 4 * 8 * 4


def test_parameters_are_counted_as_the_model_has_them() -> None:
    from lmp.model import LmpForPretraining
    from lmp.scaling.memory import parameter_counts

    config: LmpConfig = model_of(64, 2, 2, "learned")
    total, largest = parameter_counts(config)
    assert total == sum(p.numel() for p in LmpForPretraining(config).parameters())
    assert total / 2 < largest < total
