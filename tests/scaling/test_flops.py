"""The count of operations against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmp.model import LmpConfig, LmpForPretraining
from lmp.scaling.flops import peak_tflops, train_flops


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
