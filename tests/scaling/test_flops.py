"""The count of operations against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmp.model import LmpConfig, LmpForPretraining
from lmp.parallel.memory import apply_memory
from lmp.parallel.memory_settings import Checkpointing, MemorySettings
from lmp.scaling.flops import forward_flops, hardware_flops, peak_tflops, train_flops


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("lengths", [(24,), (12, 12), (5, 16, 3)])
def test_counts_what_torch_counts(lengths: tuple[int, ...], tokens: int) -> None:
    widths = {"video": 20, "audio": 12, "text": 16}
    modalities = {name: {"tokens": tokens if name == "video" else 1, "width": w} for name, w in widths.items()}
    config = LmpConfig(
        modalities=modalities, width=32, heads=4, contextual_layers=2, cross_layers=2, contrastive_width=24
    )
    model = LmpForPretraining(config)
    shots = sum(lengths)
    features = {name: torch.randn(shots, m["tokens"], m["width"]) for name, m in modalities.items()}
    # The counter does not know the fused kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(features, lengths=lengths)
    assert train_flops(config, [lengths]) / 3 == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_peaks_of_known_devices() -> None:
    assert peak_tflops("NVIDIA H200") == 989.0
    assert peak_tflops("some other card") is None


@pytest.mark.parametrize("tile", [None, 7])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_counts_what_is_computed_twice(checkpointing: Checkpointing, tile: int | None) -> None:
    modalities = {"video": {"tokens": 2, "width": 20}, "audio": {"tokens": 1, "width": 12}}
    config = LmpConfig(
        modalities=modalities, width=32, heads=4, contextual_layers=2, cross_layers=2, contrastive_width=24
    )
    model = LmpForPretraining(config)
    apply_memory(model, MemorySettings(checkpointing, False, tile))
    features = {name: torch.randn(24, m["tokens"], m["width"]) for name, m in modalities.items()}
    lengths = (5, 16, 3)
    # Only a fused operator can be kept, and of the CPU's the counter knows nothing.
    kernel = [SDPBackend.FLASH_ATTENTION] if checkpointing == "selective" else [SDPBackend.MATH]
    with sdpa_kernel(kernel), FlopCounterMode(display=False) as counter:
        output = model(features, lengths=lengths)
        heads = (output.predicted, output.aligned, output.target)
        torch.stack([x.sum() for part in heads for x in part.values()] + [output.reconstructed.sum()]).sum().backward()
    expected = hardware_flops(config, [lengths], checkpointing=checkpointing, tile_mlp=tile)
    if checkpointing == "selective":
        expected -= 3 * forward_flops(config, lengths).attention
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert expected > train_flops(config, [lengths]) or checkpointing != "full"
