"""Every attention backend against a plain softmax in fp64, why one cannot be used, and how packages are called."""

from __future__ import annotations

import importlib
import inspect
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lmp.model import LmpForPretraining, attention, backends
from lmp.model.attention import within_int32
from lmp.model.backends import BACKENDS, LONG_TOKENS, attention_ops, heads_at_once, reasons, resolve
from tests.model.kernels import KERNELS, Calls, functions, interface4, kernel, module, segments_of, softmax_attention

HEADS, HEAD_DIM = 2, 16
PAIRS = {
    "ragged": [(5, 3), (1, 7), (4, 4), (5, 3)],
    "equal": [(6, 4)] * 3,
    "single shots": [(1, 1)] * 5,
    "one": [(9, 2)],
    "self": [(7, 7), (2, 2), (1, 1)],
}


def compare(attend: Callable[..., Tensor], pairs: list[tuple[int, int]], dtype: torch.dtype, tolerance: float) -> None:
    """Output and gradients of `attend`, given views of a packed qkv, against fp64."""
    segments = segments_of(pairs)
    bounds = [s.cu_seqlens.tolist() for s in segments.values()]
    draw = torch.Generator().manual_seed(sum(q for q, _ in pairs))
    packed_q, packed_kv = (torch.randn(b[-1], 2, HEADS, HEAD_DIM, generator=draw).to(dtype) for b in bounds)
    inputs = [x.detach().requires_grad_() for x in (packed_q[:, 0], packed_kv[:, 0], packed_kv[:, 1])]
    out = attend(*inputs, **segments)
    weight = torch.randn(out.shape, generator=draw).to(dtype)
    grads = torch.autograd.grad(out, inputs, weight)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = softmax_attention(*exact_inputs, *bounds)
    exact_grads = torch.autograd.grad(exact, exact_inputs, weight.double())
    assert out.dtype == dtype
    for found, expected in zip((out, *grads), (exact, *exact_grads), strict=True):
        scale = max(1.0, float(expected.detach().abs().max()))  # queries get no gradient from a lone key
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_what_is_available_here_equals_fp64(pairs: list[tuple[int, int]], dtype: torch.dtype, tolerance: float) -> None:
    names = [name for name, reason in reasons(device="cpu", dtype=dtype, head_dim=HEAD_DIM).items() if reason is None]
    assert "sdpa" in names
    for name in [*names, "auto"]:
        compare(resolve(name, device="cpu", dtype=dtype, head_dim=HEAD_DIM), pairs, dtype, tolerance)


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7))
def test_any_segments(pairs: list[tuple[int, int]]) -> None:
    compare(attention, pairs, torch.float32, 1e-5)


def test_no_call_passes_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks make the kernels wrong beyond 65,536 tokens, or NaN, or quadratic in memory."""
    calls: list[tuple[int, dict[str, Any]]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spied(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((len(args), kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    for pairs in PAIRS.values():
        compare(attention, pairs, torch.float32, 1e-5)
    assert calls
    assert all((positional, kwargs) == (3, {}) for positional, kwargs in calls)


def test_views_that_32_bit_offsets_cannot_reach_across_are_copied() -> None:
    qkv = torch.empty(2**20, 3, 8, 128, device="meta")
    view = qkv.unbind(1)[2]
    assert not view.is_contiguous()
    assert within_int32(view).is_contiguous()
    short = qkv[: 2**19].unbind(1)[2]
    assert within_int32(short) is short


def test_heads_go_in_groups_below_32_bits() -> None:
    q, k = torch.empty(2**21, 16, 128, device="meta"), torch.empty(4, 16, 128, device="meta")
    assert heads_at_once(q, k) == heads_at_once(k, q) == 7
    assert heads_at_once(k, k) > 16


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no such attention backend as 'flash9'; there are auto, sdpa, varlen, flash2"):
        resolve("flash9", device="cpu", dtype=torch.float32, head_dim=64)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_refused_on_the_cpu(name: str) -> None:
    with pytest.raises(ValueError, match=f"attention backend {name}: runs on CUDA devices only, not on cpu"):
        resolve(name, device="cpu", dtype=torch.bfloat16, head_dim=64)


def test_auto_on_the_cpu_is_sdpa() -> None:
    assert str(resolve("auto", device="cpu", dtype=torch.float32, head_dim=64)) == "sdpa"


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """All packages, as if they were installed, and what their kernels are called with."""
    calls = Calls()

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        calls.note(query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k))
        return kernel(query, key, value, cu_seq_q, cu_seq_k)

    for made in (
        module("torch.nn.attention.varlen", varlen_attn=varlen_attn),
        module("flash_attn", **functions(calls, with_lse=False)),
        module("flash_attn.cute"),
        module("flash_attn.cute.interface", **interface4(calls)),
        module("flash_attn_interface", **functions(calls, with_lse=True)),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return calls


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of capability 9.0, as far as it is asked about."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("name", KERNELS)
def test_packages_are_called_as_they_ask(name: str, pairs: list[tuple[int, int]], packages: Calls) -> None:
    compare(BACKENDS[name].attend, pairs, torch.bfloat16, 2e-2)
    assert packages
    dense = len(set(pairs)) == 1 and name != "varlen"
    assert all(call.dense == dense for call in packages)
    if dense:
        assert tuple(packages[0].q.shape) == (len(pairs), pairs[0][0], HEADS, HEAD_DIM)


def test_flash3_that_returns_the_output_alone(packages: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    later = module("flash_attn_interface", **functions(packages, with_lse=False))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", later)
    compare(BACKENDS["flash3"].attend, PAIRS["ragged"], torch.bfloat16, 2e-2)


def test_flash4_beyond_32_bits_goes_by_heads(packages: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MAX_SPAN", 15 * HEAD_DIM + 1)
    compare(BACKENDS["flash4"].attend, PAIRS["ragged"], torch.bfloat16, 2e-2)
    assert [call.q.shape[1] for call in packages] == [1] * 4
    packages.clear()
    compare(BACKENDS["flash4"].attend, PAIRS["equal"], torch.bfloat16, 2e-2)
    assert {call.q.shape[2] for call in packages} == {1}


@pytest.mark.parametrize("pairs", [PAIRS["ragged"], PAIRS["equal"]])
def test_flash4_is_an_op_with_fake_and_gradient(pairs: list[tuple[int, int]], packages: Calls) -> None:
    segments = segments_of(pairs)
    tokens = [s.total for s in segments.values()]
    q, k, v = (torch.randn(n, HEADS, HEAD_DIM, dtype=torch.bfloat16) for n in (*tokens, tokens[1]))
    bounds = (
        segments["q_segments"].cu_seqlens,
        segments["k_segments"].cu_seqlens,
        *(s.max_length for s in segments.values()),
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    if len(set(pairs)) == 1:
        inputs = [x.detach().unflatten(0, (len(pairs), -1)).requires_grad_() for x in inputs]
        bounds = (None, None, *bounds[2:])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.lmp.flash4.default, (*inputs, *bounds), test_utils=checks)


@pytest.mark.parametrize("name", ["sdpa", "flash4"])
def test_kept_results_of_attention_ops_spare_the_second_run(name: str, packages: Calls) -> None:
    """Checkpointing that keeps what `attention_ops` return."""
    ran: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func)
            return func(*args, **(kwargs or {}))

    kept = attention_ops()

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    segments = segments_of([(3, 3), (2, 2)])
    x = torch.randn(5, 2, 16, dtype=torch.bfloat16, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return BACKENDS[name].attend(x * 2, x * 3, x + 1, **segments)

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    with Watch():
        out = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        before = sum(op in kept for op in ran)
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert before == (2 if name == "sdpa" else 1)
    assert sum(op in kept for op in ran) == before
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    torch.testing.assert_close(grad, expected)


def test_fp32_is_refused_by_kernels_and_goes_to_sdpa_by_auto(packages: Calls, hopper: None) -> None:
    x = torch.randn(5, 2, 16)
    for name in KERNELS:
        with pytest.raises(ValueError, match="take float16 and bfloat16, not torch"):
            BACKENDS[name].attend(x, x, x, **segments_of([(2, 2), (3, 3)]))
        with pytest.raises(ValueError, match=f"{name}: takes float16 and bfloat16, not torch"):
            resolve(name, device="cuda", dtype=torch.float32, head_dim=64)
    chosen = resolve("auto", device="cuda", dtype=torch.bfloat16, head_dim=64)
    assert not packages
    torch.testing.assert_close(
        chosen(x, x, x, **segments_of([(2, 2), (3, 3)])), attention(x, x, x, **segments_of([(2, 2), (3, 3)]))
    )


def test_auto_takes_the_best_that_is_there(packages: Calls, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def auto(head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> str:
        return str(resolve("auto", device="cuda", dtype=dtype, head_dim=head_dim))

    assert auto() == "sdpa for equal segments, flash3 for ragged ones"
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert auto() == "sdpa for equal segments, flash4 for ragged ones"
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    assert auto() == "sdpa for equal and long segments, varlen for ragged ones"
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert auto() == "sdpa for equal and long segments, flash2 for ragged ones"
    assert auto(head_dim=100) == auto(dtype=torch.float32) == "sdpa"


def test_auto_by_the_segments(packages: Calls, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    long, film = LONG_TOKENS, (3000, 3000)
    cases = {
        "equal": [film] * 3,
        "ragged": [film, (200, 200), (7, 7)],
        "long": [(2 * long - 900, 2 * long - 900), (900, 900)],
        "few keys": [(2 * long, long), (900, 900)],
        "long and many": [(2 * long, 2 * long), *((n, n) for n in range(1, 9))],
    }

    def auto() -> dict[str, str]:
        chosen = resolve("auto", device="cuda", dtype=torch.bfloat16, head_dim=128)
        return {name: chosen.backend_for(*segments_of(pairs).values()).name for name, pairs in cases.items()}

    with_flash3 = dict.fromkeys(cases, "flash3") | {"equal": "sdpa"}
    assert auto() == with_flash3
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    on_hopper = dict.fromkeys(cases, "varlen") | {"equal": "sdpa", "long": "sdpa"}
    assert auto() == on_hopper
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert auto() == on_hopper | {"long": "varlen"}


def test_a_copy_of_the_code_uses_the_same_ops(packages: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when an exported model is loaded beside lmp."""
    for name in ("attention.py", "backends.py"):
        shutil.copy(Path(backends.__file__).parent / name, tmp_path / name)
    (tmp_path / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path.parent))
    copy = importlib.import_module(f"{tmp_path.name}.backends")
    assert copy is not backends
    for attend in (copy.BACKENDS["flash4"].attend, BACKENDS["flash4"].attend):
        compare(attend, PAIRS["ragged"], torch.bfloat16, 2e-2)
    assert set(copy.attention_ops()) == set(attention_ops())


def test_why_a_kernel_cannot_be_used(packages: Calls, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def why(name: str, head_dim: int = 64, dtype: torch.dtype = torch.float16) -> str | None:
        return reasons(device="cuda", dtype=dtype, head_dim=head_dim)[name]

    assert all(why(name) is None for name in BACKENDS)
    assert why("flash2", head_dim=12) == "takes head dimensions that are multiples of 8 up to 256, not 12"
    assert why("varlen", head_dim=264) == "takes head dimensions that are multiples of 8 up to 256, not 264"
    monkeypatch.setitem(sys.modules, "flash_attn", module("flash_attn"))
    assert why("flash2") == "the package flash-attn 2: flash_attn has no flash_attn_func"

    def early(q: Tensor, k: Tensor, v: Tensor) -> None: ...

    copy = module("flash_attn.cute.interface", _flash_attn_fwd=early, _flash_attn_bwd=early)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", copy)
    assert "early copy without max_seqlen_q: install flash-attn-4" in (why("flash4") or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert why("flash3") == "the device has compute capability 8.0; its kernels are for 9.x"
    assert why("varlen") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert "up to 128, not 192" in (why("flash4", head_dim=192) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why("varlen") == "this torch finds no CUDA device"


def test_packages_that_are_missing_or_broken(hopper: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def why(name: str) -> str | None:
        return reasons(device="cuda", dtype=torch.bfloat16, head_dim=64)[name]

    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so.99: undefined symbol\\nmore')")
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("import flash_attn_2_gpu_that_is_missing")
    assert why("flash3") == "flash-attn 3 (flash_attn_interface) cannot be imported: libcudart.so.99: undefined symbol"
    assert why("flash2") == "the package flash-attn 2 lacks the module flash_attn_2_gpu_that_is_missing"
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    assert why("flash4") == "the package flash-attn-4 is not installed"


def test_a_model_takes_a_backend_by_name(make_model: Callable[..., LmpForPretraining]) -> None:
    model = make_model()
    model.set_attention("auto")
    assert str(model.lmp.attention) == "sdpa"
    with pytest.raises(ValueError, match="attention backend flash4: runs on CUDA devices only"):
        model.set_attention("flash4")


def test_the_fake_packages_have_the_real_signature() -> None:
    """That of torch, which is here; the others are read from their sources."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
