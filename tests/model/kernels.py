"""Plain attention in place of the kernels of packages that are not installed here, strict about how it is called."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lmp.model.attention import Segments

KERNELS = ("varlen", "flash2", "flash3", "flash4")


def softmax_attention(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, cu_q: Sequence[int], cu_k: Sequence[int]) -> Tensor:
    """Segment after segment."""
    parts = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        logits_HQK = torch.einsum("qhc,khc->hqk", q_THC[q0:q1], k_THC[k0:k1]) / q_THC.shape[-1] ** 0.5
        parts.append(torch.einsum("hqk,khc->qhc", logits_HQK.softmax(-1), v_THC[k0:k1]))
    return torch.cat(parts)


def softmax_gradient(
    q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, grad_THC: Tensor, cu_q: Sequence[int], cu_k: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """By hand, since ops run below autograd (Dao et al., "FlashAttention", 2022, appendix B.2)."""
    found = []
    scale = q_THC.shape[-1] ** -0.5
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        q, k, v, grad = q_THC[q0:q1], k_THC[k0:k1], v_THC[k0:k1], grad_THC[q0:q1]
        weight = (torch.einsum("qhc,khc->hqk", q, k) * scale).softmax(-1)
        inner = torch.einsum("qhc,khc->hqk", grad, v)
        logit = weight * (inner - (weight * inner).sum(-1, keepdim=True)) * scale
        found.append(
            (
                torch.einsum("hqk,khc->qhc", logit, k),
                torch.einsum("hqk,qhc->khc", logit, q),
                torch.einsum("hqk,qhc->khc", weight, grad),
            )
        )
    dq, dk, dv = (torch.cat(parts) for parts in zip(*found, strict=True))
    return dq, dk, dv


def segments_of(pairs: list[tuple[int, int]], device: str = "cpu") -> dict[str, Segments]:
    """Segments as keyword arguments of an attention function."""
    q_lengths, k_lengths = zip(*pairs, strict=True)
    return {
        "q_segments": Segments.from_lengths(q_lengths, device=device),
        "k_segments": Segments.from_lengths(k_lengths, device=device),
    }


class Calls(list[SimpleNamespace]):
    """What a kernel was called with, after a look at what all kernels ask for."""

    def note(self, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Any, ...]) -> None:
        """`bounds`: cu_seqlens of queries and keys, and their longest; all None for a dense batch."""
        assert all(x.is_contiguous() and x.dtype in (torch.float16, torch.bfloat16) for x in (q, k, v))
        assert q.shape[-2:] == k.shape[-2:] == v.shape[-2:]
        if bounds[0] is None:
            assert q.dim() == k.dim() == v.dim() == 4
            assert bounds == (None, None, None, None)
        else:
            assert q.dim() == k.dim() == v.dim() == 3
            for cu, longest, x in ((bounds[0], bounds[2], q), (bounds[1], bounds[3], k)):
                assert (cu.dtype, cu.dim(), cu.device) == (torch.int32, 1, x.device)
                assert type(longest) is int
                assert (int(cu[-1]), int(cu.diff().max())) == (x.shape[0], longest)
        self.append(SimpleNamespace(dense=bounds[0] is None, q=q, k=k))


def packed(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> tuple[list[int], list[int]]:
    """The bounds of the segments; of a dense batch, those that it has once it is flattened."""
    if cu_q is not None and cu_k is not None:
        return cu_q.tolist(), cu_k.tolist()
    at_q, at_k = ([n * x.shape[1] for n in range(x.shape[0] + 1)] for x in (q, k))
    return at_q, at_k


def flat(*tensors: Tensor) -> list[Tensor]:
    return [x.double().flatten(0, -3) if x.dim() == 4 else x.double() for x in tensors]


def kernel(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Tensor:
    """What the real kernels compute, differentiable, in fp64."""
    return softmax_attention(*flat(q, k, v), *packed(q, k, cu_q, cu_k)).view(q.shape).to(q.dtype)


def functions(calls: Calls, *, with_lse: bool) -> dict[str, Callable[..., Any]]:
    """The public functions of flash-attn 2 and 3, as far as they may be used."""

    def result(out: Tensor) -> Any:
        return (out, torch.zeros(())) if with_lse else out

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Any:
        calls.note(q, k, v, (None,) * 4)
        return result(kernel(q, k, v, None, None))

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> Any:
        calls.note(q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        return result(kernel(q, k, v, cu_seqlens_q, cu_seqlens_k))

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def interface4(calls: Calls) -> dict[str, Callable[..., Any]]:
    """Forward and backward of flash-attn 4, with the names of their arguments (version 4.0.0b36)."""

    def _flash_attn_fwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        return_lse: bool = False,
    ) -> tuple[Any, ...]:
        assert return_lse
        calls.note(q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        *batch, tokens, heads, _ = q.shape
        return kernel(q, k, v, cu_seqlens_q, cu_seqlens_k), torch.full((*batch, heads, tokens), 0.5), None, None, None

    def _flash_attn_bwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> tuple[Tensor, ...]:
        calls.note(q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        assert dout.is_contiguous()
        assert torch.equal(out, kernel(q, k, v, cu_seqlens_q, cu_seqlens_k))
        assert bool((lse == 0.5).all())
        found = softmax_gradient(*flat(q, k, v, dout), *packed(q, k, cu_seqlens_q, cu_seqlens_k))
        return tuple(x.view(like.shape).to(q.dtype) for x, like in zip(found, (q, k, v), strict=True))

    return {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}


def module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(attributes)
    return made
