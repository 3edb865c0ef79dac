"""Memory modes change what is kept and what is run again, never the losses; memory is linear in tokens."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmp.errors import UserError
from lmp.model import LmpForPretraining
from lmp.model.attention import Segments, attention, rotary_of, rotation_angles
from lmp.model.layers import ContextualBlock, CrossBlock
from lmp.parallel.memory import apply_memory, blocks
from lmp.parallel.memory_settings import MemorySettings
from lmp.parallel.offload import HostStore
from tests.model.conftest import small_config, small_input
from tests.parallel.memory_cases import (
    COMPILED,
    EXACT,
    NEAR,
    REFERENCE,
    SAME,
    TILED,
    CountOperators,
    peak_bytes,
    saved_bytes,
)
from tests.runs import make_shards
from tests.workers import run_ranks

SHOTS = 24
PACKS = [(24,), (5, 9, 9, 1), (12, 12), (1,) * 24, (3, 21), (8, 8, 8), (2, 22), (4, 4, 16), (23, 1), (10, 14)]
"""Segment lengths of ten packs."""


def small_model(settings: MemorySettings, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LmpForPretraining:
    torch.manual_seed(0)
    model = LmpForPretraining(small_config()).to(device, dtype)
    apply_memory(model, settings)
    return model


def loss_of(model: LmpForPretraining, lengths: tuple[int, ...], device: str = "cpu") -> Tensor:
    given = small_input(model.config, SHOTS)
    tensors = {
        key: {name: part.to(device) for name, part in value.items()} if isinstance(value, dict) else value.to(device)
        for key, value in given.items()
    }
    out = model(**tensors, lengths=lengths)
    compared = [*out.predicted.values(), *out.aligned.values(), out.reconstructed]
    return sum((x * torch.linspace(-1, 1, x.shape[-1], device=device)).sum() for x in compared)


def gradients(model: LmpForPretraining) -> dict[str, Tensor]:
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def run(
    settings: MemorySettings, lengths: tuple[int, ...] = PACKS[1]
) -> tuple[float, dict[str, Tensor], list[Counter]]:
    """The loss, the gradients, and the operators that forward and backward ran."""
    model = small_model(settings)
    with CountOperators() as operators:
        loss = loss_of(model, lengths)
        calls = [operators.take()]
        loss.backward()
        calls.append(operators.take())
    return loss.item(), gradients(model), calls


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-9)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("mode", [*EXACT, *TILED])
@pytest.mark.parametrize("lengths", [PACKS[0], PACKS[1]], ids=["one-segment", "ragged"])
def test_losses_and_gradients_do_not_change(mode: str, lengths: tuple[int, ...]) -> None:
    expected_loss, expected, plain = run(MemorySettings(), lengths)
    loss, found, calls = run({**EXACT, **TILED}[mode], lengths)
    if mode in EXACT:
        assert loss == expected_loss
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
    else:
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_near(found, expected, 1e-5)
    attentions = plain[0]["attention"]
    assert attentions > 0
    assert calls[0]["attention"] == attentions
    runs_again = "full" in mode
    assert calls[1]["attention"] == (attentions if runs_again else 0)


def test_the_model_keeps_its_state_and_parameters() -> None:
    plain = small_model(MemorySettings())
    wrapped = small_model(MemorySettings("selective", offload=True, tile_mlp=3, compile=True, backend="eager"))
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_without_gradients_nothing_is_kept_and_nothing_changes() -> None:
    with torch.no_grad():
        expected = loss_of(small_model(MemorySettings()), PACKS[1])
        for settings in (*EXACT.values(), *TILED.values()):
            assert torch.allclose(loss_of(small_model(settings), PACKS[1]), expected, rtol=1e-6)


def test_selective_says_when_there_is_no_operator_to_keep() -> None:
    with sdpa_kernel(SDPBackend.MATH), pytest.warns(UserWarning, match="no fused attention operator"):
        loss_of(small_model(EXACT["selective"]), PACKS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(small_model(EXACT["selective"]), PACKS[0])


def test_a_tile_sums_weight_gradients_in_fp32() -> None:
    """With hundreds of tiles in bf16, sums in bf16 would be off by percents."""
    torch.manual_seed(0)
    whole = ContextualBlock(small_config()).mlp.double()
    x, out_grad = torch.randn(2048, 16), torch.rand(2048, 16)
    whole(x.double()).backward(out_grad.double())
    model = small_model(MemorySettings(tile_mlp=8), dtype=torch.bfloat16)
    tiled = next(blocks(model)).mlp
    tiled.load_state_dict(whole.state_dict())
    tiled(x.bfloat16()).backward(out_grad.bfloat16())
    for name, parameter in tiled.named_parameters():
        expected = whole.get_parameter(name).grad
        assert (parameter.grad - expected).abs().max() < 0.01 * expected.abs().max(), name


class Layer:
    """One block of each type with inputs of any length, kept by nobody but the graph."""

    def __init__(self, kind: type[ContextualBlock | CrossBlock], settings: MemorySettings) -> None:
        self.kind = kind
        torch.manual_seed(0)
        config = small_config(width=64, heads=2, contextual_layers=1, cross_layers=1)
        model = LmpForPretraining(config)
        apply_memory(model, settings)
        self.block = next(block for block in blocks(model) if isinstance(block, kind))
        store = getattr(self.block.forward, "store", None)
        self.waiting: Callable[[], int] = (lambda: 0) if store is None else (lambda: store.bytes)

    def layout(self, tokens: int) -> tuple[Segments, tuple[Tensor, Tensor]]:
        rotary = rotary_of(rotation_angles(torch.arange(tokens), 32, base=10000.0), 1)
        assert rotary is not None
        return Segments.from_lengths([tokens // 2, tokens // 2]), rotary

    def forward(self, tokens: int, segments: Segments, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Inputs are the result of an operation, as in a model: a leaf would be kept by the graph."""
        zero = torch.zeros(1, requires_grad=True)
        if self.kind is ContextualBlock:
            return self.block(torch.randn(tokens, 64) + zero, segments, rotary, attention)
        inputs = torch.randn(tokens, 64) + zero, torch.randn(tokens, 64) + zero
        return self.block(*inputs, (segments, segments), (rotary, rotary), attention)

    def saved(self, tokens: int) -> int:
        segments, rotary = self.layout(tokens)
        besides = [*self.block.parameters(), *rotary]
        return saved_bytes(lambda: self.forward(tokens, segments, rotary), besides=besides, elsewhere=self.waiting)

    def peak(self, tokens: int) -> int:
        segments, rotary = self.layout(tokens)
        return peak_bytes(lambda: self.forward(tokens, segments, rotary))


@pytest.mark.parametrize("kind", [ContextualBlock, CrossBlock])
def test_memory_of_a_layer_is_linear_in_tokens_and_falls_from_mode_to_mode(kind: Any) -> None:
    modes = [
        MemorySettings(),
        MemorySettings(tile_mlp=64),
        EXACT["selective"],
        EXACT["full"],
        EXACT["selective-offload"],
        EXACT["full-offload"],
    ]
    input_bytes = 64 * 4 * (1 if kind is ContextualBlock else 2)
    per_token = []
    for settings in modes:
        layer = Layer(kind, settings)
        found = {tokens: layer.saved(tokens) for tokens in (256, 512, 1024, 2048)}
        slope = (found[2048] - found[256]) / (2048 - 256)
        for tokens, size in found.items():
            # What does not grow with tokens is a few numbers per call.
            assert size == pytest.approx(slope * tokens, rel=0.01, abs=4096), settings
        per_token.append(slope)
    none, tiled, selective, full, selective_offload, full_offload = per_token
    assert none > tiled > selective > full > full_offload
    assert full == pytest.approx(input_bytes, rel=0.01)
    # Nothing of the inputs stays on the device.
    assert full_offload == pytest.approx(0, abs=0.01 * input_bytes)
    assert selective_offload == pytest.approx(selective - input_bytes, rel=0.01)
    # Attention's output, and one log-sum-exp for each of the two heads.
    attentions = 1 if kind is ContextualBlock else 2
    assert selective - full == pytest.approx(attentions * (64 * 4 + 2 * 4), rel=0.01)


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_tiling_lowers_the_peak(checkpointing: Any) -> None:
    whole = Layer(ContextualBlock, MemorySettings(checkpointing)).peak(2048)
    tiled = Layer(ContextualBlock, MemorySettings(checkpointing, tile_mlp=64)).peak(2048)
    # The hidden layer, before and after its activation, is 4 widths of fp32 each.
    assert whole - tiled >= 2 * 2048 * 64 * 4 * 4 * 0.9


def test_offloaded_inputs_wait_on_the_host_until_their_backward() -> None:
    store = HostStore()
    first, second = (torch.randn(10, 4, requires_grad=True) for _ in range(2))
    parked = [store.put(first), store.put(second), store.put(second)]
    assert store.bytes == 2 * 160
    for part, tensor in zip(parked, (first, second, second), strict=True):
        assert part.take() is tensor
    again = [part.take() for part in reversed(parked)]
    for copy, tensor in zip(again, (second, second, first), strict=True):
        assert torch.equal(copy, tensor)
        assert copy.requires_grad
        assert copy.data_ptr() != tensor.data_ptr()
    assert store.bytes == 0
    with pytest.raises(RuntimeError, match="backward runs once"):
        parked[0].take()


def test_a_forward_without_backward_leaves_nothing_on_the_host() -> None:
    model = small_model(EXACT["full-offload"])
    store = next(blocks(model)).forward.store
    loss = loss_of(model, PACKS[1])
    assert store.bytes > 0
    del loss
    assert store.bytes == 0


def test_compiled_blocks_equal_eager_ones_and_are_compiled_a_bounded_number_of_times() -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled, eager = small_model(COMPILED["compiled-selective-offload-tiled"]), small_model(MemorySettings())
    graphs = []
    for lengths in PACKS:
        for model in (compiled, eager):
            model.zero_grad()
            model.loss = loss_of(model, lengths)
            model.loss.backward()
        assert compiled.loss.item() == pytest.approx(eager.loss.item(), rel=1e-5)
        assert_near(gradients(compiled), gradients(eager), 1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    # One segment, or several, is all that compiled code can tell packs apart by.
    assert graphs[1:] == [graphs[1]] * 9
    # A contextual block is cut in two by one attention, a cross block in three by two; and so is each attention.
    assert graphs[-1] <= 4 * (2 + 3 + 2 + 2)


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler on this machine"
)


@needs_compiler
def test_kernels_of_a_compiled_block_equal_eager_ones() -> None:
    torch._dynamo.reset()
    found = []
    for settings in (MemorySettings(), MemorySettings("full", compile=True)):
        layer = Layer(ContextualBlock, settings)
        torch.manual_seed(1)
        out = layer.forward(48, *layer.layout(48))
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in layer.block.parameters())])
    for eager, compiled in zip(*found, strict=True):
        assert (compiled - eager).abs().max() <= 1e-5 * eager.abs().max()


def test_without_a_compiler_compile_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"no C(\+\+)? compiler on this machine") as caught:
        small_model(MemorySettings(compile=True))
    assert "train.compile=false" in caught.value.remedy


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("memory")
    make_shards(folder / "shards")
    return run_ranks("tests.parallel.memory_worker", folder, timeout=240)


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", SAME, ids=lambda case: case.name)
def test_sharing_a_pack_under_zero_3_changes_nothing(ranks, case) -> None:
    for found in ranks:
        plain, own = found[REFERENCE.name], found[case.name]
        assert (own["losses"], own["norms"]) == (plain["losses"], plain["norms"])
        for name, parts in plain["state"].items():
            assert all(map(torch.equal, own["state"][name], parts)), name
        # Three exchanges for each attention of forward are run again, and three are their backward.
        assert own["calls"]["all_to_all"] * 2 == plain["calls"]["all_to_all"] * 3
        runs = 2 if case.mode == "full" else 1
        assert own["calls"]["attention"] == plain["calls"]["attention"] * runs > 0


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", NEAR, ids=lambda case: case.name)
def test_every_zero_stage_trains_the_same_in_other_modes(ranks, case) -> None:
    for found in ranks:
        plain, own = found[REFERENCE.name], found[case.name]
        assert own["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        assert own["norms"] == pytest.approx(plain["norms"], rel=1e-5)
        for name, (_, *moments) in plain["state"].items():
            for moment, expected in zip(own["state"][name][1:], moments, strict=True):
                assert (moment - expected).abs().max() <= 1e-3 * expected.abs().max(), name


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", [case for case in NEAR if case.host], ids=lambda case: case.name)
def test_state_in_host_memory_leaves_and_enters_an_engine_unchanged(ranks, case) -> None:
    for found in ranks:
        before, moved = found[case.name]["state"], found[case.name]["moved"]
        assert before.keys() == moved.keys()
        for name, parts in before.items():
            assert all(map(torch.equal, moved[name], parts)), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", EXACT)
def test_modes_on_a_gpu_change_nothing_but_memory(mode: str) -> None:
    found, peaks = [], []
    for settings in (MemorySettings(), EXACT[mode]):
        torch.manual_seed(0)
        config = small_config(width=256, heads=2, contextual_layers=6, cross_layers=2)
        model = LmpForPretraining(config).to("cuda", torch.bfloat16)
        apply_memory(model, settings)
        features = {
            name: torch.randn(4096, spec["tokens"], spec["width"], device="cuda")
            for name, spec in config.modalities.items()
        }
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        for _ in range(2):  # the second run meets memory that the first gave back
            model.zero_grad()
            out = model(features, lengths=(1024,) * 4)
            kept = torch.cuda.memory_allocated() - base
            out.cross.float().square().mean().backward()
        found.append(gradients(model))
        peaks.append(kept)
    # The backward of attention adds in any order on a GPU.
    assert_near(found[1], found[0], 0.02)
    assert peaks[1] < peaks[0] / 2
