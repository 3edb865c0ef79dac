"""Cross-rank operations on two real ranks against one process that holds everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmp.model.attention import Segments, attention
from tests.parallel.cases import COUNTS, RANKS, WEIGHTS, Whole, own, totals_of
from tests.workers import run_ranks

pytestmark = pytest.mark.multiprocess
same = torch.testing.assert_close


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("tests.parallel.collectives_worker", tmp_path_factory.mktemp("collectives"))


def test_gather_rows_has_its_true_adjoint(ranks) -> None:
    whole = Whole.make()
    for rank, found in enumerate(ranks):
        assert torch.equal(found["rows"], whole.rows)
        assert torch.equal(found["bits"], whole.rows > 0)
        same(found["rows_grad"], own(whole.weights.sum(0), rank))


def test_heads_for_sequence_and_back(ranks) -> None:
    whole = Whole.make()
    for rank, found in enumerate(ranks):
        assert torch.equal(found["heads"], whole.q.chunk(RANKS, dim=1)[rank])
        assert torch.equal(found["back"], own(whole.q, rank))
        # An exchange is a permutation: its adjoint is its inverse.
        assert torch.equal(found["heads_grad"], whole.out_grad.chunk(RANKS, dim=1)[rank])
        assert torch.equal(found["back_grad"], own(whole.out_grad, rank))


def test_ulysses_equals_plain_attention(ranks) -> None:
    whole = Whole.make()
    inputs = [x.clone().requires_grad_() for x in (whole.q, whole.k, whole.v)]
    q_segments = Segments.from_lengths(whole.lengths)
    k_segments = Segments.from_lengths(whole.lengths, tokens_per_shot=2)
    expected = attention(*inputs, q_segments=q_segments, k_segments=k_segments)
    (expected * whole.out_grad).sum().backward()
    for rank, found in enumerate(ranks):
        same(found["attended"], own(expected.detach(), rank))
        for name, gradient, whole_input in zip("qkv", found["attended_grads"], inputs, strict=True):
            same(gradient, own(whole_input.grad, rank), msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_averaged_gradient_is_that_of_the_mean_over_all_rows(ranks) -> None:
    counts = torch.tensor(COUNTS).sum((0, 1))
    parameter = torch.ones(3, requires_grad=True)
    for rank in range(RANKS):
        for micro in range(len(COUNTS[rank])):
            for weight, total, count in zip(WEIGHTS, totals_of(parameter, rank, micro), counts, strict=True):
                (weight * total / count.clamp(min=1)).backward()
    for found in ranks:
        assert torch.equal(found["counts"], counts.double())
    same(torch.stack([found["gradient"] for found in ranks]).mean(0), parameter.grad)


def test_metrics_are_means_over_all_ranks(ranks) -> None:
    for found in ranks:
        assert found["means"] == {"both": pytest.approx(7 / 5), "one": pytest.approx(6 / 4)}
