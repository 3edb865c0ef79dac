"""Makes golden_encoders.json with the reference implementations, in an environment that has them.

    pip install torch torchvision torchvggish soundfile resampy
    PYTHONPATH=. python tests/films/make_golden.py

The tests rebuild weights and inputs by `recipes`, and need neither package. torchvision gives R(2+1)D
(34 layers: with the changes that the publishers of the IG-65M weights state) and its preprocessing.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvggish import vggish_input
from torchvggish.torchvggish import VGG, Postprocessor, make_layers
from torchvision.models.video import resnet
from torchvision.transforms._presets import VideoClassification

from tests.films.recipes import chirp, film_frames, seeded_weights


def r2plus1d(depth: int) -> nn.Module:
    if depth == 18:
        return resnet.r2plus1d_18(weights=None)
    factored = resnet.Conv2Plus1D
    network = resnet.VideoResNet(resnet.BasicBlock, [factored] * 4, [3, 4, 6, 3], resnet.R2Plus1dStem)
    for layer, wide, between in ((network.layer2, 128, 288), (network.layer3, 256, 576), (network.layer4, 512, 1152)):
        layer[0].conv2[0] = factored(wide, wide, between)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps = 1e-3
    return network


@torch.no_grad()
def picture_numbers(depth: int, frames: int) -> list[float]:
    network = r2plus1d(depth).eval()
    network.load_state_dict(seeded_weights(network))
    network.fc = nn.Identity()
    prepared = VideoClassification(crop_size=(112, 112), resize_size=(128, 171))
    clip = prepared(torch.from_numpy(film_frames(frames, 128, 228)).permute(0, 3, 1, 2))
    return network(clip[None])[0, ::32].tolist()


@torch.no_grad()
def sound_numbers() -> dict[str, list[float]]:
    network = VGG(make_layers(), False).eval()
    network.load_state_dict(seeded_weights(network))
    patches = torch.as_tensor(vggish_input.waveform_to_examples(chirp(2.5), 16000)).float()
    raw = network(patches.reshape(-1, 1, 96, 64))
    rng = np.random.default_rng(3)
    pca = Postprocessor.__new__(Postprocessor)  # its own start would download
    pca._pca_matrix = torch.from_numpy(rng.normal(0, 0.1, (128, 128)).astype(np.float32))
    pca._pca_means = torch.from_numpy(rng.normal(0, 0.1, (128, 1)).astype(np.float32))
    return {
        "log_mel": patches.reshape(-1, 64)[::24, ::8].flatten().tolist(),
        "vggish": raw.mean(0)[::8].tolist(),
        "pca": pca.postprocess(raw)[0, ::8].tolist(),
    }


if __name__ == "__main__":
    golden = {"r2plus1d-18": picture_numbers(18, 4), "r2plus1d-34": picture_numbers(34, 2), **sound_numbers()}
    Path(__file__).with_name("golden_encoders.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
