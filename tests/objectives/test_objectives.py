"""The three objectives on the real model: known sums, slices of a pack, missing modalities, metrics."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from lmp.model import LmpForPretraining
from lmp.objectives import ObjectivesConfig, build_objectives
from lmp.objectives.base import Objective, ObjectiveBatch, PackView, Term
from lmp.objectives.masking import draw_masks
from tests.objectives.reference import SHAPES, make_model

LENGTHS = (7, 5, 4)
NAMES = ("masked_shot", "alignment", "reconstruction")


def make_batch(seed: int = 0, missing: tuple[str, ...] = (), ratio: float = 0.4) -> ObjectiveBatch:
    """One pack of two films and an idle segment, some shots missing in some modalities."""
    draw = torch.Generator().manual_seed(seed)
    shots = sum(LENGTHS)
    segment_P = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    position_P = torch.cat([torch.arange(length) for length in LENGTHS])
    film_P = torch.tensor([3, 8, -1])[segment_P]
    shot_P = torch.where(film_P >= 0, position_P + 2, 0)
    features, valid = {}, {}
    for name, spec in SHAPES.items():
        valid[name] = (torch.rand(shots, generator=draw) < 0.85) & (film_P >= 0) & (name not in missing)
        x_PKD = torch.randn(shots, spec["tokens"], spec["width"], generator=draw)
        features[name] = (x_PKD * valid[name][:, None, None]).half()
    masked = draw_masks(valid, film_P, shot_P, seed=seed, epoch=0, pack=1, ratio=ratio)
    return ObjectiveBatch(features, valid, masked, segment_P, film_P, shot_P, position_P)


def run_model(model: LmpForPretraining, batch: ObjectiveBatch) -> Any:
    return model(batch.features, batch.valid, lengths=LENGTHS, masked=batch.masked)


def alone(x: Tensor) -> Tensor:
    """The gather of a single rank."""
    return x


def objectives(tile: int = 3) -> list[Objective]:
    return build_objectives(ObjectivesConfig(tile=tile))


def objective(name: str) -> Objective:
    return next(one for one in objectives() if one.name == name)


def cut(thing: Any, part: slice) -> Any:
    """Rows `part` of a batch or of a model's output; the scales stay whole."""
    fields = {}
    for key, value in vars(thing).items():
        if key in ("scale", "bias"):
            fields[key] = value
        elif isinstance(value, dict):
            fields[key] = {name: x[part] for name, x in value.items()}
        else:
            fields[key] = value[part]
    return SimpleNamespace(**fields)


def on_ranks(ranks: int, work: Callable[[int, Callable[[Tensor], Tensor]], Term]) -> list[Term]:
    """Runs `work(rank, gather)`, a thread per rank, in one autograd graph: the gather is exact."""
    barrier = threading.Barrier(ranks, timeout=20)
    box: list[Tensor | None] = [None] * ranks
    terms: list[Term | None] = [None] * ranks
    calls = [0] * ranks

    def one(rank: int) -> None:
        def gather(x: Tensor) -> Tensor:
            calls[rank] += 1
            box[rank] = x
            barrier.wait()
            whole = torch.cat([part for part in box if part is not None])
            barrier.wait()
            return whole

        terms[rank] = work(rank, gather)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(calls)) == 1, f"ranks gathered {calls} times"
    return [term for term in terms if term is not None]


def gradients(model: LmpForPretraining, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_slices_add_up_to_the_whole(name: str, ranks: int) -> None:
    model, batch = make_model(), make_batch()
    whole = objective(name)(run_model(model, batch), batch, alone, rivals=True)
    want = gradients(model, whole.total)
    assert whole.count > 0

    output = run_model(model, batch)
    size = sum(LENGTHS) // ranks
    parts = [slice(rank * size, (rank + 1) * size) for rank in range(ranks)]

    def work(rank: int, gather: Callable[[Tensor], Tensor]) -> Term:
        part = parts[rank]
        return objective(name)(cut(output, part), cut(batch, part), gather, rivals=True)

    terms = on_ranks(ranks, work)
    assert len(terms) == ranks
    total = torch.stack([term.total for term in terms]).sum()
    torch.testing.assert_close(total, whole.total)
    assert sum(term.count for term in terms) == whole.count
    got = gradients(model, total)
    assert got.keys() == want.keys()
    for parameter, gradient in want.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)
    for term in terms:
        assert term.metrics.keys() == whole.metrics.keys()
    for metric, (metric_sum, metric_count) in whole.metrics.items():
        sums = torch.stack([term.metrics[metric][0] for term in terms]).sum()
        counts = torch.stack([term.metrics[metric][1] for term in terms]).sum()
        torch.testing.assert_close(sums, metric_sum, rtol=1e-5, atol=1e-5)
        assert counts == metric_count


def dense_sum(query: Tensor, candidate: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * query @ candidate.T, positive, reduction="sum")


def assert_same_loss(model: LmpForPretraining, got: Tensor, want: Tensor) -> None:
    """Equal in value and in every parameter's gradient."""
    torch.testing.assert_close(got, want)
    names, parameters = zip(*model.named_parameters(), strict=True)
    pairs = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in (got, want)]
    for name, one, other in zip(names, *pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def tokens(x_PKE: Tensor, chosen_P: Tensor) -> Tensor:
    return x_PKE[chosen_P].flatten(0, 1)


def positives(rows_P: Tensor, chosen_P: Tensor, count: int) -> Tensor:
    """Counted shot by shot, token by token."""
    places = [(p, k) for p in chosen_P.nonzero()[:, 0].tolist() for k in range(count)]
    return torch.tensor([places.index((p, k)) for p in rows_P.nonzero()[:, 0].tolist() for k in range(count)])


def test_masked_shot_is_the_written_sum() -> None:
    model, batch = make_model(), make_batch()
    output = run_model(model, batch)
    want = torch.zeros(())
    for name, spec in SHAPES.items():
        rows_P, chosen_P = batch.masked[name], batch.valid[name]
        want = want + dense_sum(
            tokens(output.predicted[name], rows_P),
            tokens(output.target[name], chosen_P),
            positives(rows_P, chosen_P, spec["tokens"]),
            output.scale["masked"],
        )
    term = objective("masked_shot")(output, batch, alone)
    assert_same_loss(model, term.total, want)
    assert term.count == sum(int(batch.masked[name].sum()) * SHAPES[name]["tokens"] for name in SHAPES)


def test_alignment_is_the_written_sum() -> None:
    model, batch = make_model(), make_batch()
    output = run_model(model, batch)
    want, rows = torch.zeros(()), 0
    for one, other in (("video", "audio"), ("video", "text"), ("audio", "text")):
        both_P = batch.valid[one] & batch.valid[other] & ~batch.masked[one] & ~batch.masked[other]
        x, y = (F.normalize(output.aligned[name].mean(1), dim=-1)[both_P] for name in (one, other))
        same = torch.arange(len(x))
        scale = output.scale["alignment"]
        want = want + 0.5 * (dense_sum(x, y, same, scale) + dense_sum(y, x, same, scale))
        rows += len(x)
    term = objective("alignment")(output, batch, alone)
    assert_same_loss(model, term.total, want)
    assert rows > 0 and term.count == rows


def test_reconstruction_is_the_written_sum() -> None:
    model, batch = make_model(), make_batch()
    output = run_model(model, batch)
    seen = {name: batch.valid[name] & ~batch.masked[name] for name in SHAPES}
    rows_P, chosen_P = seen["video"] & (seen["audio"] | seen["text"]), seen["video"]
    assert (rows_P != chosen_P).any()
    want = dense_sum(
        tokens(output.reconstructed, rows_P),
        tokens(output.aligned["video"].detach(), chosen_P),
        positives(rows_P, chosen_P, 2),
        output.scale["reconstruction"],
    )
    term = objective("reconstruction")(output, batch, alone)
    assert_same_loss(model, term.total, want)
    assert term.count == 2 * int(rows_P.sum())


def test_reconstruction_gives_its_target_no_gradient() -> None:
    model, batch = make_model(), make_batch()
    got = gradients(model, objective("reconstruction")(run_model(model, batch), batch, alone).total)
    touched = {name for name, gradient in got.items() if gradient.any()}
    assert not [name for name in touched if name.startswith(("alignment_heads", "lmp.contextual.video"))]
    assert [name for name in touched if name.startswith("lmp.contextual.text")]


@pytest.mark.parametrize("missing", [(), ("text",), ("video",), ("video", "audio", "text")])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_counts_are_known_before_the_model_runs_and_every_parameter_gets_a_gradient(
    missing: tuple[str, ...], ratio: float
) -> None:
    model, batch = make_model(), make_batch(missing=missing, ratio=ratio)
    output = run_model(model, batch)
    terms = [(one, one(output, batch, alone, rivals=True)) for one in objectives()]
    for one, term in terms:
        count = one.count(batch, alone)
        assert count.dtype == torch.float64 and count.shape == () and not count.requires_grad
        assert count == term.count
        assert term.total.shape == () and term.total.isfinite() and term.total.requires_grad
        if count == 0:
            assert term.total == 0
        for total, rows in term.metrics.values():
            assert total.isfinite() and total.dtype == rows.dtype == torch.float64
            assert not total.requires_grad
    got = gradients(model, torch.stack([term.total for _, term in terms]).sum())
    assert got.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in got.values())


def test_a_pack_without_the_target_reconstructs_nothing() -> None:
    model, batch = make_model(), make_batch(missing=("video",))
    term = objective("reconstruction")(run_model(model, batch), batch, alone)
    assert term.total == 0 and term.count == 0 and term.total.requires_grad


def test_an_idle_pack_is_all_zeros() -> None:
    model, batch = make_model(), make_batch(missing=tuple(SHAPES))
    for one in objectives():
        term = one(run_model(model, batch), batch, alone, rivals=True)
        assert term.total == 0 and term.count == 0 == one.count(batch, alone)
        assert all(total == 0 and count == 0 for total, count in term.metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_or_idle_does_not_matter(name: str) -> None:
    model, batch, other = make_model(), make_batch(), make_batch()
    for modality, x_PKD in other.features.items():
        x_PKD[~other.valid[modality]] = 7.0
    one, two = (objective(name)(run_model(model, b), b, alone, rivals=True) for b in (batch, other))
    torch.testing.assert_close(one.total, two.total)
    assert one.metrics == two.metrics


def test_chance_is_ln_of_the_candidates_and_the_rivals_are_there() -> None:
    model, batch = make_model(), make_batch()
    output = run_model(model, batch)
    metrics = objective("masked_shot")(output, batch, alone, rivals=True).metrics
    candidates, rows = {}, {}
    for name, spec in SHAPES.items():
        candidates[name] = int(batch.valid[name].sum()) * spec["tokens"]
        rows[name] = int(batch.masked[name].sum()) * spec["tokens"]
        total, count = metrics[f"{name}/chance"]
        assert count == rows[name]
        assert total.item() == pytest.approx(rows[name] * math.log(candidates[name]))
        for metric in ("loss", "top1", "copy_top1", "mean_top1"):
            assert metrics[f"{name}/{metric}"][1] == rows[name]
    want = sum(rows[name] * math.log(candidates[name]) for name in SHAPES)
    assert metrics["chance"][0].item() == pytest.approx(want)
    assert metrics["chance"][1] == metrics["copy_top1"][1] == sum(rows.values())
    assert "copy_top1" not in objective("masked_shot")(output, batch, alone).metrics


def test_a_perfect_prediction_hits_every_time_and_a_collapsed_one_never() -> None:
    model, batch = make_model(), make_batch()
    output = run_model(model, batch)
    output.predicted = output.target
    top1, count = objective("masked_shot")(output, batch, alone).metrics["top1"]
    assert count > 0 and top1 == count
    output.predicted = {name: torch.ones_like(x) / 8**0.5 for name, x in output.target.items()}
    output.target = output.predicted
    term = objective("masked_shot")(output, batch, alone)
    assert term.metrics["top1"][0] == 0
    assert term.total.item() == pytest.approx(term.metrics["chance"][0].item(), rel=1e-5)


def test_places_come_from_segments_and_positions() -> None:
    batch = make_batch()
    for start in range(0, sum(LENGTHS), 4):
        part = slice(start, start + 4)
        flags = [*batch.valid.values(), *batch.masked.values()]
        whole = torch.stack([batch.segment_P, batch.film_P, batch.shot_P, *(flag.long() for flag in flags)], dim=1)
        view = PackView.of(cut(batch, part), lambda _, whole=whole: whole)
        assert view.place_P.tolist() == list(range(start, start + 4))
        assert all(torch.equal(view.masked[name], batch.masked[name]) for name in SHAPES)


def test_build_leaves_out_weight_0_and_keeps_the_order() -> None:
    assert [one.name for one in objectives()] == list(NAMES)
    section = ObjectivesConfig.model_validate({"alignment": {"weight": 0}, "masked_shot": {"weight": 2.5}})
    built = build_objectives(section, target="text", sources=["audio"])
    assert [(one.name, one.weight) for one in built] == [("masked_shot", 2.5), ("reconstruction", 1.0)]
    # Shots without audio are no rows now.
    batch = make_batch()
    seen = {name: batch.valid[name] & ~batch.masked[name] for name in SHAPES}
    assert built[1].count(batch, alone) == 3 * int((seen["text"] & seen["audio"]).sum())


@pytest.mark.parametrize(
    "section",
    [
        {name: {"weight": 0} for name in NAMES},
        {"alignment": {"weight": -1}},
        {"masked_shot": {"ratio": 0.0}},
        {"masked_shot": {"ratio": 1.0}},
        {"masked_shot": {"span": 0}},
        {"tile": 0},
        {"alignement": {}},
    ],
)
def test_impossible_sections_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ObjectivesConfig.model_validate(section)


def test_without_masked_shots_nothing_is_masked() -> None:
    assert ObjectivesConfig.model_validate({"masked_shot": {"weight": 0}}).mask_ratio == 0
    assert ObjectivesConfig().mask_ratio == 0.15
