"""Packed attention against a plain softmax in fp64 with the whole block-diagonal matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmp.model.attention import Segments, attention, rotate, rotation_angles

PAIRS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=6)


def naive(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, q_lengths: list[int], k_lengths: list[int]) -> Tensor:
    q_segment = torch.repeat_interleave(torch.arange(len(q_lengths)), torch.tensor(q_lengths))
    k_segment = torch.repeat_interleave(torch.arange(len(k_lengths)), torch.tensor(k_lengths))
    logits_HQK = torch.einsum("qhc,khc->hqk", q_THC, k_THC) / q_THC.shape[-1] ** 0.5
    logits_HQK = logits_HQK.masked_fill(q_segment[:, None] != k_segment, float("-inf"))
    return torch.einsum("hqk,khc->qhc", logits_HQK.softmax(-1), v_THC)


@settings(max_examples=40, deadline=None)
@given(pairs=PAIRS, seed=st.integers(0, 999))
def test_equals_block_diagonal_softmax(pairs: list[tuple[int, int]], seed: int) -> None:
    q_lengths, k_lengths = [q for q, _ in pairs], [k for _, k in pairs]
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(sum(lengths), 2, 4, generator=draw, dtype=torch.float64, requires_grad=True)
        for lengths in (q_lengths, k_lengths, k_lengths)
    )
    expected = naive(q, k, v, q_lengths, k_lengths)
    weight = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    out = attention(
        q.float(),
        k.float(),
        v.float(),
        q_segments=Segments.from_lengths(q_lengths),
        k_segments=Segments.from_lengths(k_lengths),
    )
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_segments_count_tokens() -> None:
    segments = Segments.from_lengths([3, 1], tokens_per_shot=2)
    assert segments.lengths == (6, 2)
    assert segments.cu_seqlens.tolist() == [0, 6, 8]
    assert segments.cu_seqlens.dtype == torch.int32
    assert (segments.max_length, segments.total) == (6, 8)


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_segments_of_no_shots_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="segment lengths"):
        Segments.from_lengths(lengths)


def test_wrong_token_counts_are_refused() -> None:
    x = torch.zeros(5, 1, 2)
    five, four = Segments.from_lengths([5]), Segments.from_lengths([4])
    with pytest.raises(ValueError, match="queries: 5 tokens, but their segments hold 4"):
        attention(x, x, x, q_segments=four, k_segments=five)
    with pytest.raises(ValueError, match="keys: 5 tokens, but their segments hold 4"):
        attention(x, x, x, q_segments=five, k_segments=four)
    with pytest.raises(ValueError, match="1 segments, but keys have 2"):
        attention(x, x, x, q_segments=five, k_segments=Segments.from_lengths([2, 3]))


def test_rotation_makes_products_depend_on_differences_only() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 3, 8, generator=draw)

    def product(at_x: float, at_y: float) -> Tensor:
        turned = []
        for vector, at in ((x, at_x), (y, at_y)):
            angle = rotation_angles(torch.tensor([at]), 8, base=100.0)
            turned.append(rotate(vector, (angle.cos(), angle.sin())))
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(product(5.0, 2.0), product(103.0, 100.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(product(5.0, 2.0), product(2.0, 5.0), atol=1e-2)
    torch.testing.assert_close(product(7.0, 7.0), (x * y).sum(-1), rtol=1e-5, atol=1e-5)
