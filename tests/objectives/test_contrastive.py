"""The tiled core against the full matrix in float64: value, gradients, memory, edges."""

from __future__ import annotations

import math
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lmp.objectives.contrastive import Restriction, info_nce, sigmoid, top1_hits


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


def draw_restriction(draw: st.DrawFn, rows: int, candidates: int, positive_R: Tensor) -> Restriction:
    """Any mixture of spans, of candidates to skip and of near ones."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    span_R2 = skip_R2 = key_G = near_R2 = None
    if draw(st.booleans()):
        reach = draw(st.integers(0, candidates))
        first_R = (positive_R - numbers(0, reach + 1, rows)).clamp(min=0)
        last_R = (positive_R + 1 + numbers(0, reach + 1, rows)).clamp(max=candidates)
        span_R2 = torch.stack([first_R, last_R], dim=1)
    if draw(st.booleans()):
        first_R = numbers(-3, candidates + 1, rows)
        skip_R2 = torch.stack([first_R, first_R + draw(st.integers(0, 4))], dim=1)
    if draw(st.booleans()):
        key_G = numbers(0, 6, candidates)
        low_R = numbers(-2, 7, rows)
        # Also empty ranges, whose end lies before their beginning.
        near_R2 = torch.stack([low_R, low_R + numbers(-2, 3, rows)], dim=1)
    return Restriction(span_R2=span_R2, skip_R2=skip_R2, key_G=key_G, near_R2=near_R2)


def allowed(only: Restriction, rows: int, candidates: int, positive_R: Tensor) -> Tensor:
    """[R, G] bool, pair by pair."""
    table = torch.ones(rows, candidates, dtype=torch.bool)
    for r in range(rows):
        for g in range(candidates):
            if only.span_R2 is not None and not only.span_R2[r, 0] <= g < only.span_R2[r, 1]:
                table[r, g] = False
            if only.skip_R2 is not None and only.skip_R2[r, 0] <= g < only.skip_R2[r, 1]:
                table[r, g] = False
            if only.near_R2 is not None and only.near_R2[r, 0] <= only.key_G[g] <= only.near_R2[r, 1]:
                table[r, g] = False
            if g == positive_R[r]:
                table[r, g] = True
    return table


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_value_gradients_and_hits_are_those_of_the_full_matrix(loss: str, data: st.DataObject) -> None:
    rows, candidates = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 11))
    width, tile = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    query_RE, candidate_GE, positive_R, scale = draw(rows, candidates, width, data.draw(st.integers(0, 1000)))
    only = draw_restriction(data.draw, rows, candidates, positive_R)
    bias = torch.tensor([data.draw(st.floats(-12, 3))], dtype=torch.float64, requires_grad=True)
    weight_R = torch.linspace(0.5, 2.0, rows, dtype=torch.float64)
    table = allowed(only, rows, candidates, positive_R)
    logits = scale * query_RE @ candidate_GE.T
    if loss == "info_nce":
        inputs: tuple[Tensor, ...] = (query_RE, candidate_GE, scale)
        want_R = F.cross_entropy(logits.masked_fill(~table, -math.inf), positive_R, reduction="none")
        loss_R, hit_R = info_nce(query_RE, candidate_GE, positive_R, scale, only=only, tile=tile)
    else:
        inputs = (query_RE, candidate_GE, scale, bias)
        sign = 2 * F.one_hot(positive_R, candidates) - 1
        want_R = torch.where(table, -F.logsigmoid(sign * (logits + bias)), 0).sum(1)
        loss_R, hit_R = sigmoid(query_RE, candidate_GE, positive_R, scale, bias, only=only, tile=tile)
    want = torch.autograd.grad((want_R * weight_R).sum(), inputs)
    got = torch.autograd.grad((loss_R * weight_R).sum(), inputs)
    torch.testing.assert_close(loss_R, want_R, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    best_R = logits.masked_fill(~table, -math.inf).argmax(1) if rows else positive_R
    assert torch.equal(hit_R, best_R == positive_R)
    assert torch.equal(top1_hits(query_RE.detach(), candidate_GE.detach(), positive_R, only=only, tile=tile), hit_R)


@pytest.mark.parametrize("tile", [1, 3, 5, 64])
def test_gradcheck(tile: int) -> None:
    query_RE, candidate_GE, positive_R, scale = draw(7, 8, 3)

    def loss(query_RE: Tensor, candidate_GE: Tensor, scale: Tensor) -> Tensor:
        return info_nce(query_RE, candidate_GE, positive_R, scale, tile=tile)[0]

    def pairwise(query_RE: Tensor, candidate_GE: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid(query_RE, candidate_GE, positive_R, scale, bias, tile=tile)[0]

    assert torch.autograd.gradcheck(loss, (query_RE, candidate_GE, scale))
    bias = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pairwise, (query_RE, candidate_GE, scale, bias))


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


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("candidates", [0, 4])
def test_no_rows_stay_in_the_graph(loss: str, candidates: int) -> None:
    query_RE, candidate_GE, positive_R, scale = draw(0, candidates, 3)
    inputs = [query_RE, candidate_GE, scale]
    if loss == "info_nce":
        loss_R, hit_R = info_nce(query_RE, candidate_GE, positive_R, scale)
    else:
        inputs.append(torch.zeros(1, dtype=torch.float64, requires_grad=True))
        loss_R, hit_R = sigmoid(query_RE, candidate_GE, positive_R, scale, inputs[3])
    assert loss_R.shape == hit_R.shape == (0,)
    loss_R.sum().backward()
    for x in inputs:
        assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any()


def test_collapsed_embeddings_lose_by_chance_and_hit_nothing() -> None:
    same = torch.ones(6, 4)
    loss_R, hit_R = info_nce(same, same, torch.arange(6), torch.tensor([14.0]), tile=4)
    torch.testing.assert_close(loss_R, torch.full((6,), math.log(6)))
    assert not hit_R.any()
    # With the bias that suits them best they say 1 / 6 to every pair.
    bias = torch.tensor([math.log(1 / 5) - 14.0 * 4])
    loss_R, hit_R = sigmoid(same, same, torch.arange(6), torch.tensor([14.0]), bias, tile=4)
    torch.testing.assert_close(loss_R, torch.full((6,), math.log(6) + 5 * math.log(6 / 5)))
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
    bias = torch.tensor([-1e4])
    loss_R, _ = sigmoid(query_RE.float(), candidate_GE.float(), positive_R, torch.tensor([1e4]), bias, tile=2)
    assert loss_R.isfinite().all()


@pytest.mark.parametrize("tile", [1, 2, 3, 50])
def test_top1_leaves_out_what_must_not_be_chosen(tile: int) -> None:
    # Candidates 0 and 1 score above the positive, 2; leaving them out makes it a hit.
    candidate_GE = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    query_RE, positive_R = torch.ones(3, 1), torch.tensor([2, 2, 2])
    only = Restriction(skip_R2=torch.tensor([[0, 2], [-2, 0], [3, 5]]))
    hit_R = top1_hits(query_RE, candidate_GE, positive_R, only=only, tile=tile)
    assert hit_R.tolist() == [True, False, False]
    assert not top1_hits(query_RE, candidate_GE, positive_R, tile=tile).any()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside make, while they live; `inputs` are not counted."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {x.untyped_storage()._cdata: 0 for x in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)


def peak_bytes(loss: str, tokens: int, width: int, *, tile: int, fake: bool) -> int:
    """The most that a loss and its gradients hold at once, inputs not counted.

    With `fake` nothing is calculated, only allocated in name, so that lengths can be true ones.
    """
    with FakeTensorMode() if fake else nullcontext():
        query_RE, candidate_GE = (torch.zeros(tokens, width, requires_grad=True) for _ in range(2))
        positive_R = torch.arange(tokens)
        scale, bias = (torch.ones(1, requires_grad=True) for _ in range(2))
        near_R2 = torch.stack([positive_R - 2, positive_R + 2], dim=1)
        only = Restriction(key_G=positive_R, near_R2=near_R2)
        with LiveBytes(query_RE, candidate_GE, positive_R, near_R2) as live:
            if loss == "dense":
                dense(query_RE, candidate_GE, positive_R, scale).sum().backward()
            elif loss == "info_nce":
                info_nce(query_RE, candidate_GE, positive_R, scale, only=only, tile=tile)[0].sum().backward()
            else:
                sigmoid(query_RE, candidate_GE, positive_R, scale, bias, only=only, tile=tile)[0].sum().backward()
    return live.peak


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_memory_grows_linearly_from_4k_to_64k_tokens(loss: str) -> None:
    tile, width, lengths = 8192, 256, [4096, 32768, 49152, 65536]
    peaks = [peak_bytes(loss, tokens, width, tile=tile, fake=True) for tokens in lengths]
    # A fixed part, some tiles, and a part per token: its two embeddings' gradients and little more.
    per_token = (peaks[3] - peaks[1]) / (lengths[3] - lengths[1])
    fixed = peaks[3] - per_token * lengths[3]
    assert peaks[2] == pytest.approx(fixed + per_token * lengths[2], rel=1e-3)
    assert peaks[0] <= fixed + per_token * lengths[0]
    assert per_token < 2 * 4 * width + 64
    assert fixed < 4 * 4 * tile**2
    # The measure itself: it does see full matrices, and what it counts without calculating is what is there.
    assert peak_bytes("dense", 8192, width, tile=tile, fake=True) > 8192 * 8192 * 4 * 2
    assert peak_bytes(loss, 300, width, tile=64, fake=False) == peak_bytes(loss, 300, width, tile=64, fake=True)
