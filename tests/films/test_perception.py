"""VideoPrism and Perception Encoder, and any other model of sound, with random weights in a folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lmp.errors import UserError
from lmp.films.encoders import Encoder, build_encoders
from lmp.films.encoders.transformers_pictures import WholeClips
from tests.films.recipes import chirp, film_frames

pytest.importorskip("av")

TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PERCEIVER = {**TOWER, "head_dim": 8}
RAW = {"size": {"height": 32, "width": 32}, "do_normalize": False, "resample": 3}


def one(modality: str, spec: str) -> Encoder:
    (encoder,) = build_encoders({modality: spec})[modality]
    return encoder


def saved(folder: Path, config: Any, *, kind: Any = transformers.AutoModel) -> Any:
    """A saved model whose norms and heads are not at their start, where they would hide a mistake."""
    torch.manual_seed(0)
    model = kind.from_config(config) if kind is transformers.AutoModel else kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return kind.from_pretrained(folder).eval()


def videoprism(folder: Path, *, text: bool) -> Any:
    vision = {
        "image_size": 32, "num_frames": 4, "tubelet_size": [1, 16, 16], "hidden_size": 16, "num_attention_heads": 2,
        "intermediate_size": 32, "num_spatial_layers": 1, "num_temporal_layers": 1, "num_auxiliary_layers": 1,
    }  # fmt: skip
    config = transformers.VideoPrismVisionConfig(**vision)
    if text:
        words = {**TOWER, "num_hidden_layers": 1, "vocab_size": 40}
        config = transformers.VideoPrismConfig(vision_config=vision, text_config=words)
    model = saved(folder, config)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(RAW), encoding="utf-8")
    return model


def pixels(shot: np.ndarray) -> torch.Tensor:
    """Of pictures that already have the model's size, in [0, 1]: its processor does not normalise."""
    return torch.from_numpy(shot).permute(0, 3, 1, 2)[None] / 255


@torch.no_grad()
def test_videoprism_gives_the_vectors_of_its_patches(tmp_path: Path) -> None:
    model = videoprism(tmp_path, text=False)
    shots = [film_frames(4, 32, 32), film_frames(9, 40, 56), None]
    encoder = one("video", f"videoprism:{tmp_path}")
    assert (encoder.frames, encoder.height, encoder.width) == (4, 32, 16)
    features, valid = encoder.encode(shots)
    assert valid.tolist() == [True, True, False]
    hidden_1TD = model(pixel_values_videos=pixels(shots[0])).last_hidden_state
    torch.testing.assert_close(features[0, 0], hidden_1TD[0].mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.encode(shots[:1])[0][0], features[0], atol=1e-5, rtol=1e-4)
    halves = one("video", f"{tmp_path},tokens=2").encode(shots[:1])[0][0]
    torch.testing.assert_close(halves, hidden_1TD[0].unflatten(0, (2, -1)).mean(1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_videoprism_with_text_gives_a_clip_of_each_part(tmp_path: Path) -> None:
    model = videoprism(tmp_path, text=True)
    shots = [film_frames(8, 32, 32), film_frames(2, 32, 32)]
    encoder = one("video", f"videoprism:{tmp_path},tokens=2")
    assert (encoder.frames, encoder.tokens, encoder.width) == (8, 2, 16)
    features, valid = encoder.encode([*shots, None])
    assert valid.tolist() == [True, True, False]
    for half, part in enumerate(np.split(shots[0], 2)):
        wanted = model.get_video_features(pixel_values_videos=pixels(part)).pooler_output.flatten()
        torch.testing.assert_close(features[0, half], wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="its own number of frames"):
        one("video", f"{tmp_path},frames=7")


def perception_sound() -> transformers.PeAudioConfig:
    dac = transformers.DacConfig(
        encoder_hidden_size=4, downsampling_ratios=[2, 4, 4, 4], hidden_size=64, codebook_dim=4
    )
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    words = transformers.ModernBertConfig(**{**TOWER, "hidden_size": 12, "num_hidden_layers": 1}, vocab_size=60, **ends)
    heard = transformers.PeAudioEncoderConfig(**PERCEIVER, dac_config=dac)
    return transformers.PeAudioConfig(text_config=words, audio_config=heard)


@pytest.mark.parametrize("kind", ["PeAudioModel", "PeAudioFrameLevelModel"])
@torch.no_grad()
def test_perception_encoder_of_sound(tmp_path: Path, kind: str) -> None:
    model = saved(tmp_path, perception_sound(), kind=getattr(transformers, kind))
    extractor = transformers.PeAudioFeatureExtractor(hop_length=128, sampling_rate=16000)
    extractor.save_pretrained(tmp_path)
    encoder = one("audio", f"pe_audio:{tmp_path}")
    waves = [chirp(0.7), chirp(0.31), chirp(0.31)[::-1].copy(), chirp(0.001)]
    features, valid = encoder.encode([*waves, None])
    assert features.shape == (5, 1, 12) and valid.tolist() == [True] * 4 + [False]
    for wave, vector in zip(waves[:3], features[:, 0], strict=False):
        told = model.get_audio_embeds(**extractor([wave], sampling_rate=16000, return_tensors="pt"))
        wanted = told[0].mean(0) if kind == "PeAudioFrameLevelModel" else told[0]
        torch.testing.assert_close(vector, wanted, atol=1e-4, rtol=1e-4)
    halves = one("audio", f"{tmp_path},tokens=2").encode(waves[:1])[0][0]
    parts = encoder.encode(np.split(waves[0], 2))[0][:, 0]
    torch.testing.assert_close(halves, parts, atol=1e-5, rtol=1e-4)


def test_perception_encoder_hears_at_its_own_rate(tmp_path: Path) -> None:
    model = saved(tmp_path, perception_sound())
    extractor = transformers.PeAudioFeatureExtractor(hop_length=128, sampling_rate=48000)
    extractor.save_pretrained(tmp_path)
    tone = [np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32) for rate in (16000, 48000)]
    with torch.no_grad():
        wanted = model.get_audio_embeds(**extractor(tone[1:], sampling_rate=48000, return_tensors="pt"))
    heard = one("audio", f"pe_audio:{tmp_path}").encode(tone[:1])[0][0]
    torch.testing.assert_close(heard, wanted, atol=0.05, rtol=0.05)


def perception_film() -> Any:
    """Both towers. The frames' tower is a ViT, for the published one is timm's, which needs torchvision."""
    frames = transformers.ViTConfig(**TOWER, image_size=32, patch_size=16, num_labels=8)
    seen = transformers.PeVideoEncoderConfig(**PERCEIVER, vision_config=frames)
    sound = perception_sound()
    both = transformers.PeAudioVideoEncoderConfig(**PERCEIVER, audio_config=sound.audio_config, video_config=seen)
    config = transformers.PeAudioVideoConfig(text_config=sound.text_config, audio_video_config=both)
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config).eval()


@torch.no_grad()
def test_perception_encoder_of_pictures(tmp_path: Path) -> None:
    model = perception_film().video_model
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": RAW}), encoding="utf-8")
    clips = WholeClips(model, str(tmp_path), tokens=2, frames=3)
    assert (clips.frames, clips.height, clips.width) == (6, 32, 12)
    shot = film_frames(6, 32, 32)
    pieces = clips.pieces(shot, 2)
    assert [token for token, _ in pieces] == [0, 1]
    hidden_B1D, weight_B1 = clips([piece for _, piece in pieces])
    for half, part in enumerate(np.split(shot, 2)):
        wanted = model.video_head(model.video_encoder(pixel_values_videos=pixels(part)).pooler_output)
        torch.testing.assert_close(hidden_B1D[half], wanted, atol=1e-5, rtol=1e-4)
    assert weight_B1.tolist() == [[1], [1]]


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_perception_encoder_of_pictures_says_what_it_needs(tmp_path: Path) -> None:
    perception_film().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="needs the package timm") as caught:
        one("video", f"pe_video:{tmp_path}")
    assert "torchvision" in caught.value.remedy


@torch.no_grad()
def test_perception_encoder_of_sound_out_of_the_model_of_both(tmp_path: Path) -> None:
    """The tower of sound alone is loaded, so timm is not needed."""
    model = perception_film()
    model.save_pretrained(tmp_path)
    extractor = transformers.PeAudioFeatureExtractor(hop_length=128, sampling_rate=16000)
    extractor.save_pretrained(tmp_path)
    wave = chirp(0.4)
    wanted = model.audio_model.get_audio_embeds(**extractor([wave], sampling_rate=16000, return_tensors="pt"))
    encoder = one("audio", f"pe_audio:{tmp_path}")
    torch.testing.assert_close(encoder.encode([wave])[0][0], wanted, atol=1e-5, rtol=1e-4)
    assert encoder.describe()["model_type"] == "pe_audio_video"


@torch.no_grad()
def test_any_other_model_of_sound(tmp_path: Path) -> None:
    config = transformers.Wav2Vec2BertConfig(
        **TOWER, feature_projection_input_dim=16, conv_depthwise_kernel_size=3, output_hidden_size=16
    )
    model = saved(tmp_path, config)
    extractor = transformers.SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8)
    extractor.save_pretrained(tmp_path)
    waves = [chirp(0.7), chirp(0.2), chirp(0.001)]
    features, valid = one("audio", str(tmp_path)).encode([*waves, None])
    assert features.shape == (4, 1, 16) and valid.tolist() == [True] * 3 + [False]
    for wave, vector in zip(waves[:2], features[:, 0], strict=False):
        wanted = model(**extractor(wave, sampling_rate=16000, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_picture_without_its_pooler_is_its_first_token(tmp_path: Path) -> None:
    """As classifiers are published; transformers would fill the pooler with random numbers."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TOWER, image_size=32, patch_size=16)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RAW), encoding="utf-8")
    shot = film_frames(3, 32, 32)
    encoder = one("video", f"{tmp_path},frames=3")
    hidden_NTD = model.vit(pixels(shot)[0]).last_hidden_state
    torch.testing.assert_close(encoder.encode([shot])[0][0, 0], hidden_NTD[:, 0].mean(0), atol=1e-5, rtol=1e-4)
    assert encoder.version == one("video", str(tmp_path)).version
