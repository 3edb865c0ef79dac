"""The kernels behind the one attention function, why one cannot be used here, and the choice among them.

    sdpa     torch's scaled_dot_product_attention: every device and dtype; ragged segments go in groups
    varlen   torch.nn.attention.varlen, torch's own FlashAttention-2 (CUDA, torch >= 2.10)
    flash2   the package flash-attn (Dao, "FlashAttention-2", 2023)
    flash3   flash_attn_interface, built from that package's `hopper` folder (Shah et al., "FlashAttention-3", 2024)
    flash4   the package flash-attn-4 (`flash_attn.cute`): Hopper and Blackwell
    auto     sdpa for equal segments (cuDNN's kernel on Hopper), the best packed kernel for ragged ones; where that
             is FlashAttention-2 on Hopper or later, sdpa for long ragged ones too

All are bidirectional, take no mask tensor, and scale by C ** -0.5. The kernels take fp16 and bf16 only, so `auto`
gives fp32 to sdpa. They get contiguous tensors, for the views of a packed qkv are strided three times as far.
Packages are imported where used: copies of this file load without them.

Shape letters: T tokens, H heads, C head dimension, S segments, L tokens of one of several equal segments.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import MAX_SPAN, Attend, Segments, attention, check_segments, equal_segments

HALF = (torch.float16, torch.bfloat16)
Kernel = Callable[[Tensor, Tensor, Tensor, Segments | None, Segments | None], Tensor]
"""Packed [T, H, C] with the segments of queries and keys, or dense [S, L, H, C] with None for both."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: what `resolve` calls it.
        attend: the function, with the signature of `attention`.
        reason: why it cannot be used for (device, dtype, head_dim), or None if it can.
    """

    name: str
    attend: Attend
    reason: Callable[[torch.device, torch.dtype, int], str | None]


LONG_TOKENS = 32_768
"""Tokens in a group of like segments from which a faster dense kernel outweighs its launches and cuDNN's plan for
each new length. From published rates of both kernels (FlashAttention-3 paper, figures 5 and 6)."""


@dataclass(frozen=True)
class ChosenAttention:
    """What `resolve` returns: an attention function that can say which kernels it runs.

    Attributes:
        name: as it was asked for.
        equal: takes segments of equal lengths.
        ragged: takes others.
        long: takes ragged ones of LONG_TOKENS tokens for each pair of lengths, on average.
    """

    name: str
    equal: Backend
    ragged: Backend
    long: Backend

    def __call__(
        self, q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, *, q_segments: Segments, k_segments: Segments
    ) -> Tensor:
        backend = self.backend_for(q_segments, k_segments)
        if self.name == "auto" and not (q_THC.is_cuda and q_THC.dtype in HALF):
            backend = BACKENDS["sdpa"]
        return backend.attend(q_THC, k_THC, v_THC, q_segments=q_segments, k_segments=k_segments)

    def backend_for(self, q_segments: Segments, k_segments: Segments) -> Backend:
        """Which of the three takes these segments."""
        if equal_segments(q_segments, k_segments):
            return self.equal
        groups = len(set(zip(q_segments.lengths, k_segments.lengths, strict=False)))
        return self.long if min(q_segments.total, k_segments.total) >= LONG_TOKENS * groups else self.ragged

    def __str__(self) -> str:
        if self.equal is self.ragged:
            return self.equal.name
        also = " and long" if self.long is self.equal else ""
        return f"{self.equal.name} for equal{also} segments, {self.ragged.name} for ragged ones"


def resolve(name: str, *, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> ChosenAttention:
    """The attention function called `name`, for tensors of this device, dtype and head dimension.

    Args:
        name: "auto" or a backend's name.

    Raises:
        ValueError: no such backend, or it cannot be used here; the message says why.
    """
    device = torch.device(device)
    if name == "auto":
        dense = BACKENDS["sdpa"]
        ragged = next(b for b in map(BACKENDS.__getitem__, _BEST) if not b.reason(device, dtype, head_dim))
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        older = hopper and ragged.name in ("varlen", "flash2")
        return ChosenAttention(name, dense, ragged, dense if older else ragged)
    if name not in BACKENDS:
        raise ValueError(f"no such attention backend as {name!r}; there are auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    if reason := backend.reason(device, dtype, head_dim):
        raise ValueError(f"attention backend {name}: {reason}")
    return ChosenAttention(name, backend, backend, backend)


def reasons(*, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> dict[str, str | None]:
    """For every backend, why it cannot be used here, or None if it can."""
    return {name: b.reason(torch.device(device), dtype, head_dim) for name, b in BACKENDS.items()}


def attention_ops() -> list[torch._ops.OpOverload]:
    """The forward ops of the dispatcher that a call of any backend may run, as far as they exist by now.

    Each returns the output first and its log-sum-exp among the rest, so that a policy of selective checkpointing
    that keeps their results never runs attention twice. The ops of a package appear when it is imported, which
    `resolve` does: call this after it.
    """
    found = []
    for name in _FORWARD_OPS:
        namespace, _, op = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        if packet is not None:
            found.append(packet.default)
    return found


_FORWARD_OPS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",
    "lmp::flash4",
)
_BEST = ("flash3", "flash4", "varlen", "flash2", "sdpa")


def _always(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


def _packed(kernel: Kernel, *, dense: bool) -> Attend:
    """`kernel` as an attention function; `dense`: equal segments go to it as a batch."""

    def attend(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, *, q_segments: Segments, k_segments: Segments) -> Tensor:
        check_segments(q_THC, k_THC, q_segments, k_segments)
        if q_THC.dtype not in HALF:
            raise ValueError(f"flash attention kernels take float16 and bfloat16, not {q_THC.dtype}: use sdpa or auto")
        q, k, v = (x.contiguous() for x in (q_THC, k_THC, v_THC))
        if dense and equal_segments(q_segments, k_segments):
            q, k, v = (x.unflatten(0, (len(q_segments.lengths), -1)) for x in (q, k, v))
            return kernel(q, k, v, None, None).flatten(0, 1)
        return kernel(q, k, v, q_segments, k_segments)

    return attend


def _varlen(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments | None, k_segments: Segments | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert q_segments is not None and k_segments is not None
    out = varlen_attn(q, k, v, *_cu(q_segments, k_segments))
    assert isinstance(out, Tensor)
    return out


def _flash2(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments | None, k_segments: Segments | None) -> Tensor:
    return _public("flash_attn", q, k, v, q_segments, k_segments)


def _flash3(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments | None, k_segments: Segments | None) -> Tensor:
    return _public("flash_attn_interface", q, k, v, q_segments, k_segments)


def _public(
    module: str, q: Tensor, k: Tensor, v: Tensor, q_segments: Segments | None, k_segments: Segments | None
) -> Tensor:
    """The functions that flash-attn 2 and 3 share by name; early builds of 3 return the log-sum-exp too."""
    package = importlib.import_module(module)
    if q_segments is None or k_segments is None:
        out = package.flash_attn_func(q, k, v)
    else:
        out = package.flash_attn_varlen_func(q, k, v, *_cu(q_segments, k_segments))
    return out[0] if isinstance(out, tuple) else out


def _cu(q_segments: Segments, k_segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    """The bounds of the segments as every packed kernel takes them."""
    return q_segments.cu_seqlens, k_segments.cu_seqlens, q_segments.max_length, k_segments.max_length


def _flash4(q: Tensor, k: Tensor, v: Tensor, q_segments: Segments | None, k_segments: Segments | None) -> Tensor:
    """Its kernels count elements in int32, so tensors beyond that go by groups of heads, which are independent."""
    if q_segments is None or k_segments is None:
        bounds = (None, None, q.shape[-3], k.shape[-3])
    else:
        bounds = _cu(q_segments, k_segments)  # type: ignore[assignment]
    heads = heads_at_once(q, k)
    if heads >= q.shape[-2]:
        return torch.ops.lmp.flash4(q, k, v, *bounds)[0]
    groups = zip(*(x.split(heads, dim=-2) for x in (q, k, v)), strict=True)
    return torch.cat([torch.ops.lmp.flash4(*(x.contiguous() for x in group), *bounds)[0] for group in groups], dim=-2)


def heads_at_once(q: Tensor, k: Tensor) -> int:
    """How many heads of q and k [..., H, C] hold fewer than 2**31 elements; at least 1."""
    per_head = max(q.numel() // q.shape[-2], k.numel() // k.shape[-2])
    return max(1, (MAX_SPAN - 1) // per_head)


def _flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
) -> tuple[Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.cute.interface")
    # Some versions return more after the output and the log-sum-exp.
    out, lse, *_ = interface._flash_attn_fwd(q, k, v, return_lse=True, **_flash4_bounds(cu_q, cu_k, max_q, max_k))
    return out, lse


def _flash4_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.cute.interface")
    bounds = _flash4_bounds(cu_q, cu_k, max_q, max_k)
    dq, dk, dv, *_ = interface._flash_attn_bwd(q, k, v, out, grad.contiguous(), lse, **bounds)
    return dq, dk, dv


def _flash4_bounds(cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int) -> dict[str, Any]:
    if cu_q is None:
        return {}
    return {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}


def _define_ops() -> None:
    """flash-attn 4 as ops `lmp::flash4` and `lmp::flash4_backward`, for torch.compile and selective checkpointing.

    A copy of this file, loaded beside it as remote code, uses the ops that are there.
    """
    if hasattr(torch.ops.lmp, "flash4"):
        return
    bounds = "Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k"
    forward = torch.library.custom_op(
        "lmp::flash4",
        _flash4_forward,
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, {bounds}) -> (Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        "lmp::flash4_backward",
        _flash4_backward,
        mutates_args=(),
        schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {bounds}) "
        "-> (Tensor, Tensor, Tensor)",
    )

    def fake(q: Tensor, k: Tensor, v: Tensor, *bounds: Any) -> tuple[Tensor, Tensor]:
        *batch, tokens, heads, _ = q.shape
        return torch.empty_like(q), q.new_empty((*batch, heads, tokens), dtype=torch.float32)

    def fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, cu_q, cu_k, ctx.max_q, ctx.max_k = inputs
        ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)

    def gradient(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, cu_q, cu_k = ctx.saved_tensors
        dq, dk, dv = torch.ops.lmp.flash4_backward(grad, *tensors, cu_q, cu_k, ctx.max_q, ctx.max_k)
        return dq, dk, dv, None, None, None, None

    forward.register_fake(fake)
    backward.register_fake(fake_backward)
    forward.register_autograd(gradient, setup_context=keep)


_define_ops()


def _reason(
    *, load: Callable[[], str | None], capabilities: tuple[int, ...], largest: Callable[[int], int]
) -> Callable[[torch.device, torch.dtype, int], str | None]:
    """A reason for kernels of CUDA.

    Args:
        load: imports what is needed, and says what is lacking.
        capabilities: majors of the compute capabilities that the kernels are written for.
        largest: the largest head dimension, by the major.
    """

    def reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return f"runs on CUDA devices only, not on {device.type}"
        if torch.version.hip or not torch.cuda.is_available():
            return "this torch finds no CUDA device"
        major, minor = torch.cuda.get_device_capability(device)
        if major not in capabilities:
            wanted = ", ".join(f"{m}.x" for m in capabilities)
            return f"the device has compute capability {major}.{minor}; its kernels are for {wanted}"
        if dtype not in HALF:
            return f"takes float16 and bfloat16, not {dtype}"
        if head_dim % 8 or head_dim > largest(major):
            return f"takes head dimensions that are multiples of 8 up to {largest(major)}, not {head_dim}"
        return load()

    return reason


def _lacks(module: str, attributes: tuple[str, ...], package: str) -> str | None:
    """What hinders the use of `attributes` of `module`, imported now."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return f"{package} is not installed"
        return f"{package} lacks the module {error.name}"
    except Exception as error:  # a wheel for another torch or CUDA fails in many ways
        return f"{package} cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    missing = [name for name in attributes if not hasattr(loaded, name)]
    return f"{package}: {module} has no {missing[0]}" if missing else None


def _lacks_varlen() -> str | None:
    return _lacks("torch.nn.attention.varlen", ("varlen_attn",), "torch >= 2.10")


def _lacks_flash2() -> str | None:
    return _lacks("flash_attn", ("flash_attn_func", "flash_attn_varlen_func"), "the package flash-attn 2")


def _lacks_flash3() -> str | None:
    wanted = ("flash_attn_func", "flash_attn_varlen_func")
    return _lacks("flash_attn_interface", wanted, "flash-attn 3 (flash_attn_interface)")


def _lacks_flash4() -> str | None:
    module, package = "flash_attn.cute.interface", "the package flash-attn-4"
    if lack := _lacks(module, ("_flash_attn_fwd", "_flash_attn_bwd"), package):
        return lack
    interface = importlib.import_module(module)
    for function in (interface._flash_attn_fwd, interface._flash_attn_bwd):
        # The wheel of flash-attn 2 brings an early copy of the same module.
        if "max_seqlen_q" not in inspect.signature(function).parameters:
            return f"{module} is an early copy without max_seqlen_q: install {package.removeprefix('the package ')}"
    return None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("sdpa", attention, _always),
        Backend(
            "varlen",
            _packed(_varlen, dense=False),
            _reason(load=_lacks_varlen, capabilities=(8, 9, 10, 11, 12), largest=lambda major: 256),
        ),
        Backend(
            "flash2",
            _packed(_flash2, dense=True),
            _reason(load=_lacks_flash2, capabilities=(8, 9, 10, 11, 12), largest=lambda major: 256),
        ),
        Backend(
            "flash3",
            _packed(_flash3, dense=True),
            _reason(load=_lacks_flash3, capabilities=(9,), largest=lambda major: 256),
        ),
        Backend(
            "flash4",
            _packed(_flash4, dense=True),
            _reason(load=_lacks_flash4, capabilities=(9, 10, 11), largest=lambda major: 256 if major == 9 else 128),
        ),
    )
}
"""All backends by name; `auto` is none of them but the choice among them."""
