"""The tiled core against the full matrix: value, gradients, memory, edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lmp.objectives.contrastive import info_nce, top1_hits


def draw(rows: int, candidates: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, candidate, positive and scale in float64; the first and last want gradients."""
    generator = torch.Generator().manual_seed(seed)
    query_RE = torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    candidate_GE = torch.randn(candidates, width, generator=generator, dtype=torch.float64, requires_grad=True)
    positive_R = torch.randint(max(candidates, 1), (rows,), generator=generator)
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    return query_RE, candidate_GE, positive_R, scale


def dense(query_RE: Tensor, candidate_GE: Tensor, positive_R: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * query_RE @ candidate_GE.T, positive_R, reduction="none")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    candidates=st.integers(1, 11),
    width=st.integers(1, 5),
    tile=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_those_of_the_full_matrix(
    rows: int, candidates: int, width: int, tile: int, seed: int
) -> None:
    query_RE, candidate_GE, positive_R, scale = draw(rows, candidates, width, seed)
    weight_R = torch.linspace(0.5, 2.0, rows, dtype=torch.float64)
    inputs = (query_RE, candidate_GE, scale)
    want_R = dense(query_RE, candidate_GE, positive_R, scale)
    want = torch.autograd.grad((want_R * weight_R).sum(), inputs)
    loss_R, hit_R = info_nce(query_RE, candidate_GE, positive_R, scale, tile=tile)
    got = torch.autograd.grad((loss_R * weight_R).sum(), inputs)
    torch.testing.assert_close(loss_R, want_R)
    torch.testing.assert_close(got, want)
    best_R = (query_RE @ candidate_GE.T).argmax(1) if rows else positive_R
    assert torch.equal(hit_R, best_R == positive_R)


@pytest.mark.parametrize("tile", [1, 3, 5, 64])
def test_gradcheck(tile: int) -> None:
    query_RE, candidate_GE, positive_R, scale = draw(7, 8, 3)

    def loss(query_RE: Tensor, candidate_GE: Tensor, scale: Tensor) -> Tensor:
        return info_nce(query_RE, candidate_GE, positive_R, scale, tile=tile)[0]

    assert torch.autograd.gradcheck(loss, (query_RE, candidate_GE, scale))


def test_detached_candidates_get_no_gradient() -> None:
    query_RE, candidate_GE, positive_R, scale = draw(4, 6, 3)
    info_nce(query_RE, candidate_GE.detach(), positive_R, scale, tile=2)[0].sum().backward()
    assert query_RE.grad is not None and scale.grad is not None and candidate_GE.grad is None


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation put out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("loss", [info_nce, dense])
def test_no_tensor_exceeds_a_tile_or_an_input(loss: object) -> None:
    rows, tile, width = 300, 16, 4
    query_RE, candidate_GE, positive_R, scale = draw(rows, rows, width)
    with LargestTensor() as largest:
        if loss is info_nce:
            loss_R = info_nce(query_RE, candidate_GE, positive_R, scale, tile=tile)[0]
            loss_R.sum().backward()
        else:
            # The measure itself: it does see a full matrix.
            dense(query_RE, candidate_GE, positive_R, scale).sum().backward()
    linear = max(tile * tile, rows * width)
    assert largest.elements == (linear if loss is info_nce else rows * rows)


def test_nothing_larger_than_the_inputs_is_kept_for_backward() -> None:
    query_RE, candidate_GE, positive_R, scale = draw(40, 40, 2)
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        info_nce(query_RE, candidate_GE, positive_R, scale, tile=8)[0].sum()
    assert saved and max(saved) == 80


def test_one_candidate_costs_nothing_and_is_hit() -> None:
    query_RE, candidate_GE, _, scale = draw(3, 1, 4)
    loss_R, hit_R = info_nce(query_RE, candidate_GE, torch.zeros(3, dtype=torch.long), scale)
    loss_R.sum().backward()
    assert loss_R.abs().max() == 0 and hit_R.all()
    assert query_RE.grad is not None and query_RE.grad.abs().max() < 1e-12


@pytest.mark.parametrize("candidates", [0, 4])
def test_no_rows_stay_in_the_graph(candidates: int) -> None:
    query_RE, candidate_GE, positive_R, scale = draw(0, candidates, 3)
    loss_R, hit_R = info_nce(query_RE, candidate_GE, positive_R, scale)
    assert loss_R.shape == hit_R.shape == (0,)
    loss_R.sum().backward()
    for x in (query_RE, candidate_GE, scale):
        assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any()


def test_collapsed_embeddings_lose_by_chance_and_hit_nothing() -> None:
    same = torch.ones(6, 4)
    loss_R, hit_R = info_nce(same, same, torch.arange(6), torch.tensor([14.0]), tile=4)
    torch.testing.assert_close(loss_R, torch.full((6,), math.log(6)))
    assert not hit_R.any()


def test_half_precision_is_worked_on_in_fp32_even_under_autocast() -> None:
    query_RE, candidate_GE, positive_R, scale = draw(5, 9, 8)
    half = query_RE.detach().bfloat16(), candidate_GE.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_R, _ = info_nce(*half, positive_R, scale.detach().float(), tile=4)
    want_R = dense(half[0].double(), half[1].double(), positive_R, scale.detach())
    assert loss_R.dtype == torch.float32
    torch.testing.assert_close(loss_R.double(), want_R, rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite() -> None:
    query_RE, candidate_GE, positive_R, _ = draw(5, 9, 4)
    loss_R, _ = info_nce(query_RE.float(), candidate_GE.float(), positive_R, torch.tensor([1e4]), tile=2)
    assert loss_R.isfinite().all()


@pytest.mark.parametrize("tile", [1, 2, 3, 50])
def test_top1_leaves_out_what_must_not_be_chosen(tile: int) -> None:
    # Candidates 0 and 1 score above the positive, 2; leaving them out makes it a hit.
    candidate_GE = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    query_RE, positive_R = torch.ones(3, 1), torch.tensor([2, 2, 2])
    skip_R = torch.tensor([0, -2, 3])
    hit_R = top1_hits(query_RE, candidate_GE, positive_R, skip_R=skip_R, skip_width=2, tile=tile)
    assert hit_R.tolist() == [True, False, False]
    assert not top1_hits(query_RE, candidate_GE, positive_R, tile=tile).any()
