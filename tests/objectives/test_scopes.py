"""Loss, scope and near neighbours of all objectives, through `accumulate`, against the full matrix over the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lmp.config import Config
from lmp.data.loader import PackBatch
from lmp.model import LmpForPretraining
from lmp.objectives.base import ObjectiveBatch
from lmp.train.step import Losses, Sums, accumulate, objective_batch, pack_by_pack, whole_step
from tests.objectives.reference import (
    PACKS,
    Dense,
    PlainEngine,
    make_config,
    make_model,
    make_pack,
    objectives_of,
    run_packs,
    step_of,
)


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    """This process as the only one of a run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WEIGHTS = {"alignment": {"weight": 0.5}, "reconstruction": {"weight": 2.0}}
PACK_SHOTS = 16


def accumulated(
    model: LmpForPretraining, packs: Sequence[PackBatch], config: Config
) -> tuple[Losses, dict[str, Tensor], PlainEngine]:
    model.zero_grad(set_to_none=True)
    engine = PlainEngine(model)
    losses = accumulate(engine, objectives_of(config), step_of(packs), config, rivals=True)  # type: ignore[arg-type]
    return losses, {name: x.clone() for name, x in engine.gradients().items()}, engine


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], *, rtol: float = 1e-4) -> None:
    """Each parameter's gradient, relative to its own size (to all gradients' where it is but rounding)."""
    largest = max(x.abs().max() for x in want.values())
    for name, gradient in want.items():
        off = (got[name] - gradient).abs().max()
        assert off <= rtol * max(float(gradient.abs().max()), 1e-3 * float(largest)), name


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("scope", ["pack", "film", "step"])
@pytest.mark.parametrize("exclude_near", [0, 1, 3])
def test_value_gradients_and_metrics_are_those_of_the_full_matrix(loss: str, scope: str, exclude_near: int) -> None:
    config = make_config(loss=loss, scope=scope, exclude_near=exclude_near, **WEIGHTS)
    model = make_model(loss)
    packs = [make_pack(number) for number in range(len(PACKS))]
    views = [objective_batch(pack, config) for pack in packs]
    dense = Dense(run_packs(model, packs, views), views, config)
    dense.loss().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    losses, got, _ = accumulated(model, packs, config)
    assert losses.loss == pytest.approx(dense.loss().item(), rel=1e-5)
    assert got.keys() == want.keys()
    assert_same(got, want)
    for name, found in dense.all().items():
        assert found.count > 0
        for metric in ("top1", "chance"):
            mean = losses.means[f"{name}/{metric}"]
            assert mean == pytest.approx(getattr(found, metric) / found.count, rel=1e-9), (name, metric)
    assert {"masked_shot/copy_top1", "masked_shot/mean_top1"} <= losses.means.keys()


def test_near_neighbours_in_other_packs_count_in_the_step_only() -> None:
    model = make_model()
    # Two windows of one film: the same shots in two packs. In a pack nobody has a copy, in the step everybody has.
    packs = [make_pack(number, [(7, 3, PACK_SHOTS)]) for number in range(2)]
    off = {"masked_shot": {"weight": 0}, "reconstruction": {"weight": 0}}
    chance = {}
    for scope in ("pack", "step"):
        for near in (0, 1):
            config = make_config(scope=scope, exclude_near=near, **off)
            packs_full = [_complete(pack) for pack in packs]
            chance[scope, near] = accumulated(model, packs_full, config)[0].means["alignment/video-audio/chance"]
    n = PACK_SHOTS
    # In the middle two neighbours go, at the ends one.
    pack_near = ((n - 2) * math.log(n - 2) + 2 * math.log(n - 1)) / n
    # Of the other pack's copy the shot itself goes too.
    step_near = ((n - 2) * math.log(2 * n - 5) + 2 * math.log(2 * n - 3)) / n
    assert chance["pack", 0] == pytest.approx(math.log(n))
    assert chance["step", 0] == pytest.approx(math.log(2 * n))
    assert chance["pack", 1] == pytest.approx(pack_near)
    assert chance["step", 1] == pytest.approx(step_near)


def _complete(pack: PackBatch) -> PackBatch:
    for name, valid in pack.valid.items():
        pack.valid[name] = torch.ones_like(valid)
    return pack


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_with_one_pack_the_step_is_the_pack(loss: str) -> None:
    model, pack = make_model(loss), make_pack(0)
    found = {}
    for scope in ("pack", "step"):
        config = make_config(loss=loss, scope=scope, exclude_near=2)
        found[scope] = accumulated(model, [pack], config)
    assert found["step"][0] == found["pack"][0]
    assert found["step"][2].with_graph == [True]
    assert_same(found["step"][1], found["pack"][1], rtol=1e-6)


def test_packs_run_without_a_graph_first_and_only_the_last_just_once() -> None:
    config = make_config(scope="step")
    *_, engine = accumulated(make_model(), [make_pack(number) for number in range(3)], config)
    assert engine.with_graph == [False, False, True, True, True]


def together(packs: Sequence[PackBatch]) -> PackBatch:
    """The same packs as one long one."""
    segments = [len(pack.lengths) for pack in packs]
    joined: dict[str, Any] = {
        key: torch.cat([getattr(pack, key) for pack in packs]) for key in ("film_P", "shot_P", "position_P", "time_P")
    }
    for key in ("features", "valid"):
        joined[key] = {name: torch.cat([getattr(pack, key)[name] for pack in packs]) for name in packs[0].features}
    return PackBatch(
        slot=packs[0].slot,
        epoch=0,
        number=packs[0].number,
        lengths=sum((pack.lengths for pack in packs), ()),
        segment_P=torch.cat([pack.segment_P + sum(segments[:n]) for n, pack in enumerate(packs)]),
        **joined,
    )


def joined_view(views: Sequence[ObjectiveBatch], pack: PackBatch) -> ObjectiveBatch:
    masked = {name: torch.cat([view.masked[name] for view in views]) for name in pack.features}
    places = (pack.segment_P, pack.film_P, pack.shot_P, pack.position_P)
    return ObjectiveBatch(pack.features, pack.valid, masked, *places)


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_one_two_and_four_micro_batches_are_the_same_step(loss: str) -> None:
    config = make_config(loss=loss, scope="step", exclude_near=2, tile=17, **WEIGHTS)
    model, packs = make_model(loss), [make_pack(number) for number in range(4)]
    views = [objective_batch(pack, config) for pack in packs]

    def work(way: Any, size: int) -> tuple[Sums, dict[str, Tensor]]:
        groups = [slice(first, first + size) for first in range(0, 4, size)]
        long = [together(packs[group]) for group in groups]
        long_views = [joined_view(views[group], pack) for group, pack in zip(groups, long, strict=True)]
        model.zero_grad(set_to_none=True)
        engine = PlainEngine(model)
        sums = way(engine, objectives_of(config), long, long_views, rivals=True)
        return sums, {name: x.clone() for name, x in engine.gradients().items()}

    # All in one pack: nothing is gathered, cached or run twice.
    sums, gradients = work(pack_by_pack, 4)
    for size in (1, 2, 4):
        got_sums, got = work(whole_step, size)
        assert got_sums.parts.keys() == sums.parts.keys()
        for name, (total, count) in sums.parts.items():
            torch.testing.assert_close(got_sums.parts[name][0], total, rtol=1e-5, atol=1e-6, msg=name)
            assert got_sums.parts[name][1] == count
        assert_same(got, gradients)


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("scope", ["film", "step"])
def test_a_step_without_rows_costs_nothing_and_reaches_every_parameter(loss: str, scope: str) -> None:
    config = make_config(loss=loss, scope=scope, exclude_near=1)
    losses, gradients, _ = accumulated(make_model(loss), [make_pack(n, empty=True) for n in range(2)], config)
    assert losses.loss == 0
    assert gradients.keys() == {name for name, _ in make_model(loss).named_parameters()}
    assert not any(gradient.any() for gradient in gradients.values())


def test_an_objective_of_weight_0_is_left_out() -> None:
    config = make_config(scope="step", alignment={"weight": 0})
    packs = [make_pack(number) for number in range(2)]
    losses, gradients, _ = accumulated(make_model(), packs, config)
    assert set(losses.by_objective()) == {"loss/masked_shot", "loss/reconstruction"}
    # Its temperature has no gradient, as in the other scopes.
    other = accumulated(make_model(), packs, make_config(scope="pack", alignment={"weight": 0}))[1]
    assert gradients.keys() == other.keys() and "temperatures.alignment.log_excess" not in gradients


@pytest.mark.parametrize("scope", ["pack", "film", "step"])
def test_a_collapsed_model_loses_by_chance_and_hits_nothing(scope: str) -> None:
    model = make_model()
    with torch.no_grad():
        for head in [*model.prediction_heads.values(), *model.alignment_heads.values(), model.reconstruction_head]:
            head.fc2.weight.zero_()
            head.fc2.bias.fill_(1.0)
        for projection in model.target_projections.values():
            projection.weight.zero_()
            projection.bias.fill_(1.0)
    # Long windows, all there: a row left with one candidate would hit.
    packs = [_complete(make_pack(number, [(number, 0, PACK_SHOTS)])) for number in range(2)]
    means = accumulated(model, packs, make_config(scope=scope, exclude_near=1))[0].means
    for name in ("masked_shot", "alignment", "reconstruction"):
        assert means[f"loss/{name}"] == pytest.approx(means[f"{name}/chance"], rel=1e-5)
    assert means["masked_shot/top1"] == means["alignment/top1"] == means["reconstruction/top1"] == 0


def test_the_chance_of_sigmoid_is_the_best_that_a_collapsed_model_can_do() -> None:
    model = make_model("sigmoid")
    with torch.no_grad():
        for head in model.alignment_heads.values():
            head.fc2.weight.zero_()
            head.fc2.bias.fill_(1.0)
    pack = _complete(make_pack(2))
    off = {"masked_shot": {"weight": 0}, "reconstruction": {"weight": 0}}
    config = make_config(loss="sigmoid", **off)
    # The bias that says 1 / G to every pair.
    with torch.no_grad():
        scale = 1 / (model.config.minimum_temperature + model.temperatures["alignment"].log_excess.exp())
        model.biases["alignment"].value.copy_(-math.log(PACK_SHOTS - 1) - scale)
    losses, gradients, _ = accumulated(model, [pack], config)
    assert losses.loss == pytest.approx(losses.means["alignment/chance"], rel=1e-5)
    assert gradients["biases.alignment.value"].abs().max() < 1e-5
