"""The kernels on a GPU in bf16 against fp32, and beyond 65,536 tokens; which kernel runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lmp.model import attention
from lmp.model.backends import BACKENDS, reasons, resolve
from tests.model.kernels import KERNELS, segments_of, softmax_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
UNIT = 2.0**-8
"""Of rounding to bf16. Rounding probabilities, outputs and their gradients gives 0.6 to 0.8 of it, as a norm."""


def skip_without(name: str, head_dim: int) -> None:
    reason = reasons(device="cuda", dtype=torch.bfloat16, head_dim=head_dim).get(name)
    if reason:
        pytest.skip(reason)


def check_norm(found: Tensor, expected: Tensor) -> None:
    assert float((found.float() - expected).norm() / expected.norm()) < 2 * UNIT


@pytest.mark.parametrize("name", [*KERNELS, "sdpa", "auto"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "pairs", [[(1000, 500), (2, 77), (333, 1024)], [(512, 512)] * 4, [(1, 3)] * 300, [(2048, 64)]], ids=str
)
def test_bf16_against_fp32(name: str, head_dim: int, pairs: list[tuple[int, int]]) -> None:
    """Output and gradients: as a whole, and of every segment that is long enough for a norm to mean something."""
    skip_without(name, head_dim)
    attend = resolve(name, device="cuda", dtype=torch.bfloat16, head_dim=head_dim)
    segments = segments_of(pairs, "cuda")
    bounds = [s.cu_seqlens.tolist() for s in segments.values()]
    draw = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(b[-1], 4, head_dim, generator=draw, device="cuda").bfloat16().requires_grad_()
        for b in (bounds[0], bounds[1], bounds[1])
    ]
    out = attend(*inputs, **segments)
    weight = torch.randn(out.shape, generator=draw, device="cuda").bfloat16()
    grads = torch.autograd.grad(out, inputs, weight)
    exact_inputs = [x.detach().float().requires_grad_() for x in inputs]
    exact = softmax_attention(*exact_inputs, *bounds)
    exact_grads = torch.autograd.grad(exact, exact_inputs, weight.float())
    cuts = (bounds[0], bounds[0], bounds[1], bounds[1])
    for found, expected, cut in zip((out, *grads), (exact, *exact_grads), cuts, strict=True):
        check_norm(found, expected)
        for first, last in itertools.pairwise(cut):
            if last - first >= 64:
                check_norm(found[first:last], expected[first:last])


@pytest.mark.parametrize("name", [*KERNELS, "sdpa"])
@pytest.mark.parametrize("lengths", [(70_016,), (66_003, 5_000)], ids=str)
def test_rows_beyond_65536_tokens(name: str, lengths: tuple[int, ...]) -> None:
    """Output and the gradient of the queries at sampled rows, for which fp32 needs no whole matrix."""
    skip_without(name, 128)
    segments = segments_of([(n, n) for n in lengths], "cuda")
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v, weight = (torch.randn(sum(lengths), 2, 128, generator=draw, device="cuda").bfloat16() for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = BACKENDS[name].attend(*inputs, **segments)
    (grad,) = torch.autograd.grad(out, inputs[:1], weight)
    last = lengths[0] - 1
    rows = torch.tensor([0, last, *range(37, last, last // 62)], device="cuda")
    q_rows = q.detach()[rows].float().requires_grad_()
    k_first, v_first = (x.detach()[: lengths[0]].float() for x in (k, v))
    exact = softmax_attention(q_rows, k_first, v_first, [0, len(rows)], [0, lengths[0]])
    (exact_grad,) = torch.autograd.grad(exact, q_rows, weight[rows].float())
    check_norm(out[rows], exact)
    check_norm(grad[rows], exact_grad)


def test_the_dense_kernel_on_hopper_is_cudnn() -> None:
    """Another cuDNN on the library path would silently bring a slower kernel."""
    if torch.cuda.get_device_capability() != (9, 0) or (torch.backends.cudnn.version() or 0) <= 91500:
        pytest.skip("torch prefers cuDNN on Hopper with cuDNN above 9.15")
    x = torch.randn(4096, 4, 128, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        attention(x, x, x, **segments_of([(2048, 2048)] * 2, "cuda"))
        torch.cuda.synchronize()
    assert any("cudnn" in event.key.lower() for event in profile.key_averages())
