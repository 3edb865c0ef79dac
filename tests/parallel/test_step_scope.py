"""Scopes, losses and near neighbours on two real ranks, data and sequence parallel, against the full matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmp.train.step import objective_batch
from tests.objectives.reference import Dense, make_config, make_model, make_pack, run_packs
from tests.parallel.step_scope_worker import CASES, DEEP, PACKS, TOPOLOGIES
from tests.workers import run_ranks

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("tests.parallel.step_scope_worker", tmp_path_factory.mktemp("step-scope"), timeout=240)


def reference(name: str) -> tuple[Dense, float, dict[str, torch.Tensor]]:
    config = make_config(**CASES[name])
    model, packs = make_model(config.objectives.loss), [make_pack(number) for number in range(PACKS)]
    views = [objective_batch(pack, config) for pack in packs]
    dense = Dense(run_packs(model, packs, views), views, config)
    loss = dense.loss()
    loss.backward()
    return dense, loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_have_the_loss_gradients_and_metrics_of_the_full_matrix(ranks, topology, name) -> None:
    dense, loss, gradients = reference(name)
    largest = max(float(x.abs().max()) for x in gradients.values())
    for found in (rank[f"{topology}-{name}"] for rank in ranks):
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["gradients"].keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            off = float((found["gradients"][parameter] - gradient).abs().max())
            assert off <= 1e-4 * max(float(gradient.abs().max()), 1e-3 * largest), parameter
        for objective, sums in dense.all().items():
            assert found["means"][f"{objective}/top1"] == pytest.approx(sums.top1 / sums.count)
            assert found["means"][f"{objective}/chance"] == pytest.approx(sums.chance / sums.count)


def test_rivals_do_not_depend_on_who_holds_what(ranks) -> None:
    for name in CASES:
        found = [rank[f"{topology}-{name}"]["means"] for rank in ranks for topology in TOPOLOGIES]
        for rival in ("copy_top1", "mean_top1"):
            assert len({means[f"masked_shot/{rival}"] for means in found}) == 1


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_zero_has_them_too(ranks, topology) -> None:
    _, loss, gradients = reference(DEEP)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    for found in (rank[f"{topology}-zero"] for rank in ranks):
        assert found["loss"] == pytest.approx([loss] * 2, rel=1e-5)
        assert found["norm"] == pytest.approx([norm] * 2, rel=1e-4)
