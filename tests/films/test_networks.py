"""R(2+1)D and VGGish against numbers of their reference implementations (see make_golden.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.signal import stft
from torch import nn

from lmp.errors import UserError
from lmp.films.encoders import Encoder, build_encoders, describe
from lmp.films.encoders.r2plus1d import R2Plus1D
from lmp.films.encoders.vggish import VGGish, log_mel
from tests.films.recipes import chirp, film_frames, seeded_weights

GOLDEN: dict[str, list[float]] = json.loads(Path(__file__).with_name("golden_encoders.json").read_text())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as they are published: with a classifier, bare or wrapped, in each format."""
    folder = tmp_path_factory.mktemp("weights")
    eighteen = seeded_weights(R2Plus1D(18))
    torch.save({**eighteen, **seeded_weights(nn.ModuleDict({"fc": nn.Linear(512, 400)}))}, folder / "r18.pth")
    save_file(seeded_weights(R2Plus1D(34)), folder / "r34.safetensors")
    torch.save({"state_dict": {f"module.{n}": w for n, w in seeded_weights(VGGish()).items()}}, folder / "vggish.pt")
    rng = np.random.default_rng(3)
    matrix, means = (rng.normal(0, 0.1, shape).astype(np.float32) for shape in ((128, 128), (128, 1)))
    torch.save({"pca_eigen_vectors": matrix, "pca_means": means[:, 0]}, folder / "pca.pth")
    np.savez(folder / "pca.npz", pca_eigen_vectors=matrix, pca_means=means)
    return folder


def _one(modality: str, spec: str) -> Encoder:
    (encoder,) = build_encoders({modality: spec})[modality]
    return encoder


@pytest.mark.parametrize(
    ("depth", "spec", "frames"), [(18, "r18.pth,frames=4", 4), (34, "r34.safetensors,frames=2", 2)]
)
def test_r2plus1d_is_torchvisions(weights: Path, depth: int, spec: str, frames: int) -> None:
    encoder = _one("video", f"r2plus1d:{weights}/{spec}")
    assert (encoder.name, encoder.width, encoder.height, encoder.frames) == (f"r2plus1d-{depth}", 512, 128, frames)
    features, valid = encoder.encode([film_frames(frames, 128, 228), None])
    assert features.shape == (2, 1, 512) and valid.tolist() == [True, False] and not features[1].any()
    np.testing.assert_allclose(features[0, 0, ::32], GOLDEN[encoder.name], rtol=1e-4, atol=1e-4)


def test_several_clips_of_a_shot(weights: Path) -> None:
    encoder = _one("video", f"r2plus1d:{weights}/r18.pth,tokens=2,frames=2")
    assert (encoder.tokens, encoder.frames) == (2, 4)
    shot = film_frames(4, 64, 96)
    whole = encoder.encode([shot])[0][0]
    halves = _one("video", f"r2plus1d:{weights}/r18.pth,frames=2").encode([shot[:2], shot[2:]])[0][:, 0]
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-4)
    assert _one("video", f"r2plus1d:{weights}/r18.pth").frames == 16


def _log_mel_by_definition(wave: np.ndarray) -> np.ndarray:
    """AudioSet's description, by SciPy and loops: STFT of 25 ms by 10 ms, 64 mel bands of 125 to 7500 Hz."""
    _, _, spectrum = stft(wave, 16000, "hann", 400, 240, 512, boundary=None, padded=False)
    # SciPy divides by the sum of the window, and its Hann window is periodic.
    magnitude = np.abs(spectrum) * 200
    mel = [_mel(hertz) for hertz in np.arange(257) * 8000 / 256]
    edges = [_mel(125) + step * (_mel(7500) - _mel(125)) / 65 for step in range(66)]
    bands = np.zeros((64, magnitude.shape[1]))
    for band in range(64):
        low, centre, high = edges[band : band + 3]
        for place in range(1, 257):
            weight = min((mel[place] - low) / (centre - low), (high - mel[place]) / (high - centre))
            bands[band] += max(weight, 0) * magnitude[place]
    frames = np.log(bands + 0.01).T
    return frames[: len(frames) // 96 * 96].reshape(-1, 96, 64)


def _mel(hertz: float) -> float:
    return float(1127 * np.log(1 + hertz / 700))


def test_the_log_mel_is_audiosets() -> None:
    wave = chirp(2.5)
    patches = log_mel(wave)
    assert patches.shape == (2, 96, 64) and patches.dtype == np.float32
    np.testing.assert_allclose(patches.reshape(-1, 64)[::24, ::8].ravel(), GOLDEN["log_mel"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(patches, _log_mel_by_definition(wave), rtol=1e-4, atol=1e-4)


def test_vggish_is_torchvggishs(weights: Path) -> None:
    encoder = _one("audio", f"vggish:{weights}/vggish.pt")
    assert (encoder.name, encoder.width, encoder.tokens, encoder.frames) == ("vggish", 128, 1, 0)
    wave = chirp(2.5)
    features, valid = encoder.encode([wave, None, wave[:100], np.zeros(0, np.float32)])
    assert valid.tolist() == [True, False, True, False]
    np.testing.assert_allclose(features[0, 0, ::8], GOLDEN["vggish"], rtol=1e-4, atol=1e-5)
    # A shot too short for a patch is filled up with silence.
    filled = np.pad(wave[:100], (0, 15600 - 100))
    torch.testing.assert_close(features[2], encoder.encode([filled])[0][0], rtol=1e-4, atol=1e-5)


def test_several_parts_of_the_sound_of_a_shot(weights: Path) -> None:
    shots = [chirp(3.0), chirp(1.2)]
    features, valid = _one("audio", f"vggish:{weights}/vggish.pt,tokens=3").encode([*shots, None])
    assert features.shape == (3, 3, 128) and valid.tolist() == [True, True, False]
    whole = _one("audio", f"vggish:{weights}/vggish.pt")
    for shot, vectors in zip(shots, features, strict=False):
        parts = whole.encode(np.array_split(shot, 3))[0][:, 0]
        torch.testing.assert_close(vectors, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pca.pth", "pca.npz"])
def test_vggish_with_the_published_whitening(weights: Path, name: str) -> None:
    encoder = _one("audio", f"vggish:{weights}/vggish.pt,pca={weights}/{name}")
    features, _ = encoder.encode([chirp(1.0)])
    np.testing.assert_allclose((features[0, 0, ::8] + 2) * 255 / 4, GOLDEN["pca"], atol=1e-3)
    assert encoder.version != _one("audio", f"vggish:{weights}/vggish.pt").version


def test_encoders_of_one_modality_are_joined(weights: Path) -> None:
    parts = build_encoders({"audio": f"vggish:{weights}/vggish.pt,tokens=2+signal,tokens=2"})["audio"]
    assert [part.name for part in parts] == ["vggish", "signal-sound"]
    said = json.loads(json.dumps(describe(parts)))
    assert (said["name"], said["width"], said["tokens"]) == ("vggish+signal-sound", 128 + 192, 2)
    assert [part["version"] for part in said["parts"]] == said["version"].split("+")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("vggish:{0}/none.pt", "no weights file"),
        ("vggish:{0}/r18.pth", "is missing"),
        ("vggish:{0}/cut.pt", "cut.pt"),
        ("vggish:{0}/list.pt", "not tensors by name"),
        ("vggish:{0}/vggish.pt,pca={0}/r34.safetensors", "no PCA"),
        ("vggish:{0}/vggish.pt,tokens=0", "1 or more"),
        ("vggish:{0}/vggish.pt,frames=3", "no option frames"),
        ("signal,tokens=2+vggish:{0}/vggish.pt", "tokens are 2 and 1"),
        ("signal+signal-words", "kind are sound and words"),
    ],
)
def test_the_users_mistakes(weights: Path, spec: str, says: str) -> None:
    (weights / "cut.pt").write_bytes((weights / "pca.pth").read_bytes()[:1000])
    torch.save([torch.zeros(1)], weights / "list.pt")
    with pytest.raises(UserError, match=says) as caught:
        build_encoders({"audio": spec.format(weights)})
    assert caught.value.remedy
