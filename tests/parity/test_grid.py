"""Loss and gradients are those of one plain process for every ZeRO stage, topology, objective and accumulation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.cases import (
    CASES,
    CLIP,
    CONTROL,
    HALF,
    HALF_CASES,
    HALF_POSITIONS,
    HALF_STAGES,
    LR,
    POSITIONS,
    SHOTS,
    SIGMOID_CASES,
    SIGMOID_STAGES,
    STAGES,
    TOKENS,
    TOPOLOGIES,
    Case,
    config_of,
    masks_of,
    model_config,
    model_of,
    packs_of,
    positions_of,
)
from tests.parity.reference import Expected, reference_step
from tests.runs import run

pytestmark = pytest.mark.multiprocess
Ranks = dict[str, list[dict[str, Any]]]
LOSS, GRADIENT, UPDATE = 1e-5, 1e-4, 1e-5
"""Relative tolerances in fp32."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """For each topology what its ranks saved."""
    folder = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        # With gloo, on a machine with a GPU too.
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("DS_ACCELERATOR", "cpu")
        ended = run(str(folder), module="tests.parity.grid_worker", timeout=600)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return {
        topology: [torch.load(folder / f"{topology}-rank-{rank}.pt") for rank in range(dp * sp)]
        for topology, (dp, sp) in TOPOLOGIES.items()
    }


@functools.cache
def expected(case: Case, positions: str, packs: int) -> Expected:
    """The step in one plain process; neither ranks nor stage nor micro-batches come into it."""
    config = config_of(case, positions=positions, stage=1, topology="1x1")
    whole = packs_of(case, positions=positions, count=packs)
    masks = [masks_of(pack, config) for pack in whole]
    return reference_step(start(positions, case.loss), model_config(config), whole, masks, config.objectives)


@functools.cache
def start(positions: str, loss: str = CONTROL.loss) -> dict[str, Tensor]:
    """The weights that every engine begins with."""
    model = model_of(model_config(config_of(CONTROL._replace(loss=loss), positions=positions, stage=1, topology="1x1")))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def expected_in(topology: str, case: Case, positions: str) -> Expected:
    return expected(case, positions, case.accumulation * TOPOLOGIES[topology][0])


def deviations(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """For each parameter the largest error of its gradient over its largest entry; one that is 0 must be exactly so."""
    assert found.keys() == wanted.keys()
    result = {}
    for name, gradient in wanted.items():
        error, size = float((found[name] - gradient).abs().max()), float(gradient.abs().max())
        result[name] = error / size if size else (0.0 if error == 0 else torch.inf)
    return result


def above(tolerance: float, by_name: dict[str, float]) -> dict[str, float]:
    return {name: deviation for name, deviation in by_name.items() if not deviation <= tolerance}


GRID = [
    pytest.param(topology, stage, case, id=f"{topology}-zero{stage}-{case.name}")
    for topology in TOPOLOGIES
    for stage in STAGES
    for case in (*CASES, *(SIGMOID_CASES if stage in SIGMOID_STAGES else ()))
]


@pytest.mark.parametrize(("topology", "stage", "case"), GRID)
def test_loss_and_gradients_are_those_of_one_process(ranks: Ranks, topology: str, stage: int, case: Case) -> None:
    wanted = expected_in(topology, case, positions_of(topology, stage))
    norm = float(torch.stack([gradient.norm() for gradient in wanted.gradients.values()]).norm())
    for saved in ranks[topology]:
        found = saved["fp32"][stage]["cases"][case.name]
        assert found["loss"] == pytest.approx(wanted.loss, rel=LOSS)
        losses = {name.removeprefix("loss/"): value for name, value in found["losses"].items()}
        assert losses == pytest.approx(wanted.losses, rel=LOSS)
        assert found["norm"] == pytest.approx(norm, rel=GRADIENT)
    gradients = ranks[topology][0]["fp32"][stage]["cases"][case.name]["gradients"]
    assert not above(GRADIENT, deviations(gradients, wanted.gradients))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"zero{stage}")
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_update_is_that_of_plain_adamw(ranks: Ranks, topology: str, stage: int) -> None:
    """The gradients found, clipped and stepped with in fp64: all but the last step have the rate 0."""
    before = start(positions_of(topology, stage))
    wanted = plain_adamw(before, ranks[topology][0]["fp32"][stage]["history"])
    for saved in ranks[topology]:
        for name, old in before.items():
            update = wanted[name] - old
            error = saved["fp32"][stage]["after"][name] - old - update
            assert error.abs().max() <= UPDATE * update.abs().max(), name


def plain_adamw(before: dict[str, Tensor], history: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    weights = {name: w.double().requires_grad_() for name, w in before.items()}
    embeddings = ("tokens.weight", "positions.weight")
    decaying = [name for name, w in weights.items() if w.dim() == 2 and not name.endswith(embeddings)]
    groups = [
        {"params": [w for name, w in weights.items() if (name in decaying) == decays], "weight_decay": decay}
        for decays, decay in ((True, 0.05), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8)
    for number, gradients in enumerate(history, 1):
        for name, w in weights.items():
            w.grad = gradients[name].double()
        assert torch.nn.utils.clip_grad_norm_(weights.values(), CLIP) > CLIP
        for group in optimizer.param_groups:
            group["lr"] = LR if number == len(history) else 0.0
        optimizer.step()
    return {name: w.detach() for name, w in weights.items()}


@pytest.mark.parametrize("topology", [name for name, (dp, sp) in TOPOLOGIES.items() if dp * sp > 1])
def test_a_loss_without_the_world_size_is_found_out(ranks: Ranks, topology: str) -> None:
    size = len(ranks[topology])
    wanted = expected_in(topology, CONTROL, positions_of(topology, 1)).gradients
    found = ranks[topology][0]["fp32"][1]["controls"]["factor"]["gradients"]
    assert deviations(found, wanted) == pytest.approx(dict.fromkeys(wanted, 1 - 1 / size), rel=GRADIENT)


@pytest.mark.parametrize("topology", [name for name, (_, sp) in TOPOLOGIES.items() if sp > 1])
def test_a_gather_without_its_adjoint_is_found_out(ranks: Ranks, topology: str) -> None:
    """Candidates of other ranks then get no gradient, while a target that never has one stays right."""
    wanted = expected_in(topology, CONTROL, positions_of(topology, 1)).gradients
    found = above(GRADIENT, deviations(ranks[topology][0]["fp32"][1]["controls"]["gather"]["gradients"], wanted))
    assert {f"target_projections.{name}.weight" for name in ("video", "audio", "text")} <= found.keys()
    assert min(found.values()) > 100 * GRADIENT
    assert not [name for name in found if name.startswith(("reconstruction_head.", "lmp.cross."))]


@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("topology", HALF)
def test_bf16_agrees_with_fp32_to_its_rounding(ranks: Ranks, topology: str, case: Case) -> None:
    wanted = expected_in(topology, case, HALF_POSITIONS)
    for stage in HALF_STAGES:
        found = ranks[topology][0]["bf16"][stage][case.name]
        assert found["loss"] == pytest.approx(wanted.loss, rel=0.01)
        assert distance(found["gradients"], wanted.gradients) < 0.1


@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("topology", HALF)
def test_stages_agree_with_each_other_in_bf16(ranks: Ranks, topology: str, case: Case) -> None:
    one, two, three = (ranks[topology][0]["bf16"][stage][case.name] for stage in HALF_STAGES)
    assert one["loss"] == two["loss"] == three["loss"]
    assert distance(three["gradients"], two["gradients"]) == 0
    # Stage 1 adds micro-batches before it reduces them, the others after.
    assert distance(one["gradients"], two["gradients"]) <= (0 if case.accumulation == 1 else 0.01)


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_grid_holds_what_it_is_for(positions: str) -> None:
    """Several windows, uneven tails, idle slices, missing modalities; and no check that looks at nothing."""
    packs = packs_of(CONTROL, positions=positions, count=4)
    assert {len(pack.lengths) for pack in packs} == {1, 3, 5, 6}
    halves, quarters = SHOTS // 2, SHOTS // 4
    assert (packs[1].film_P[halves:] < 0).all(), "a slice of two, and two of four, are idle"
    assert [int((pack.film_P[-quarters:] >= 0).sum()) for pack in packs] == [1, 0, quarters, 2]
    assert not packs[0].valid["text"][halves:].any() and packs[0].valid["text"][:halves].any()
    assert not packs[1].valid["audio"].any()
    assert not packs[3].valid["video"][:quarters].any()
    assert max(TOKENS[positions].values()) > 1
    for case in (*CASES, *SIGMOID_CASES):
        for dp in (1, 2):
            rows = expected(case, positions, case.accumulation * dp).rows
            none = {"reconstruction"} if case.data == "no-video" else set()
            assert {name for name, count in rows.items() if count == 0} == none
    gradients = expected(CONTROL, positions, 2).gradients
    assert all(gradient.any() for gradient in gradients.values())
    assert {f"temperatures.{name}.log_excess" for name in ("masked", "alignment", "reconstruction")} < gradients.keys()


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, relative."""
    one, other = (torch.cat([x[name].flatten().double() for name in wanted]) for x in (found, wanted))
    return float((one - other).norm() / other.norm())
