"""Models of single pictures and of spectrograms, and K > 1, with tiny random ones saved to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lmp.errors import UserError
from lmp.films.encoders import Encoder, build_encoders
from lmp.films.encoders.transformers_pictures import Picture
from tests.films.recipes import chirp, film_frames

TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**TOWER, "image_size": 32, "patch_size": 16}


def _one(modality: str, spec: str) -> Encoder:
    (encoder,) = build_encoders({modality: spec})[modality]
    return encoder


def _saved(folder: Path, config: Any, processor: Any = None) -> Any:
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    if isinstance(processor, dict):
        (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    elif processor is not None:
        processor.save_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder).eval()


def _clip(folder: Path) -> Any:
    config = transformers.CLIPConfig(
        text_config={**TOWER, "vocab_size": 50}, vision_config={**VISION, "projection_dim": 12}, projection_dim=12
    )
    settings = {"size": {"shortest_edge": 32}, "crop_size": 32, "do_center_crop": True, "resample": 3}
    return _saved(folder, config, {**settings, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})


def _siglip(folder: Path) -> Any:
    config = transformers.SiglipConfig(text_config={**TOWER, "vocab_size": 50}, vision_config=VISION)
    return _saved(
        folder, config, {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    )


@torch.no_grad()
def _pooled(told: Any) -> torch.Tensor:
    return told if isinstance(told, torch.Tensor) else told.pooler_output


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_frames_are_pooled(tmp_path: Path, family: str) -> None:
    model = {"clip": _clip, "siglip": _siglip}[family](tmp_path)
    encoder = _one("video", f"{family}:{tmp_path},tokens=2,frames=3")
    assert (encoder.frames, encoder.height, encoder.tokens) == (6, 32, 2)
    shot = film_frames(6, 32, 32)
    features, valid = encoder.encode([shot, None, shot[:1]])
    assert features.shape == (3, 2, 12 if family == "clip" else 16) and valid.tolist() == [True, False, True]
    pixels = (torch.from_numpy(shot).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        wanted = _pooled(model.get_image_features(pixel_values=pixels)).unflatten(0, (2, 3)).mean(1)
    torch.testing.assert_close(features[0], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("resample", [2, 3])
def test_pictures_are_resized_as_processors_do(tmp_path: Path, resample: int) -> None:
    image = pytest.importorskip("PIL.Image")
    settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    norm = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, **norm, "resample": resample}))
    (frame,) = film_frames(1, 80, 142)
    made = Picture.read(str(tmp_path), transformers.CLIPVisionConfig(image_size=32))(frame[None])[0]
    wanted = np.asarray(image.fromarray(frame).resize((71, 40), resample=resample))[4:36, 19:51]
    away = np.abs(made.permute(1, 2, 0).numpy() * 255 - wanted)
    assert made.shape == (3, 32, 32)
    assert away.max() <= 1.01  # a level: PIL rounds between its two passes


def _spectra(folder: Path, family: str) -> tuple[Any, Any]:
    if family == "whisper":
        config = transformers.WhisperConfig(
            d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=60, num_mel_bins=8, max_source_positions=50,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    elif family == "ast":
        config = transformers.ASTConfig(**TOWER, max_length=100, num_mel_bins=16, patch_size=8)
        extractor = transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=100)
    else:
        audio = {
            "patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2],
            "num_mel_bins": 64, "spec_size": 256, "projection_dim": 12, "enable_fusion": True,
        }  # fmt: skip
        config = transformers.ClapConfig(
            audio_config=audio, text_config={**TOWER, "vocab_size": 60, "projection_dim": 12}, projection_dim=12
        )
        extractor = transformers.ClapFeatureExtractor(max_length_s=10)
    return _saved(folder, config, extractor), extractor


@pytest.mark.parametrize("family", ["whisper", "ast", "clap"])
def test_spectrograms(tmp_path: Path, family: str) -> None:
    model, extractor = _spectra(tmp_path, family)
    encoder = _one("audio", f"{family}:{tmp_path}")
    waves = [chirp(0.7), chirp(0.3), chirp(2.5), chirp(0.01)]
    features, valid = encoder.encode([*waves, None])
    assert features.shape == (5, 1, encoder.width) and valid.tolist() == [True] * 4 + [False]
    assert torch.isfinite(features).all()
    for i, wave in enumerate(waves):  # company changes nothing
        torch.testing.assert_close(encoder.encode([wave])[0][0], features[i], atol=1e-4, rtol=1e-4)
    if family == "clap":  # its rate is another one
        return
    inputs = extractor(waves[0], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        if family == "whisper":
            wanted = model.get_encoder()(**inputs).last_hidden_state[0, :35].mean(0)  # 0.7 s by 20 ms
        else:
            wanted = model(**inputs).pooler_output[0]
    torch.testing.assert_close(features[0, 0], wanted, atol=1e-4, rtol=1e-4)


def test_clap_hears_the_same_tone_at_its_own_rate(tmp_path: Path) -> None:
    model, extractor = _spectra(tmp_path, "clap")
    tone = [np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32) for rate in (16000, 48000)]
    inputs = extractor(tone[1], sampling_rate=48000, return_tensors="pt")
    with torch.no_grad():
        wanted = _pooled(model.get_audio_features(inputs["input_features"], is_longer=torch.zeros(1, 1).bool()))
    heard = _one("audio", f"clap:{tmp_path}").encode(tone[:1])[0][0]
    torch.testing.assert_close(heard, wanted, atol=0.02, rtol=0.02)


def test_parts_of_sound_and_words(tmp_path: Path) -> None:
    _spectra(tmp_path / "ast", "ast")
    wave = chirp(0.6)
    whole = _one("audio", f"ast:{tmp_path / 'ast'},tokens=2").encode([wave])[0][0]
    halves = _one("audio", f"ast:{tmp_path / 'ast'}").encode([wave[:4800], wave[4800:]])[0][:, 0]
    torch.testing.assert_close(whole, halves, atol=1e-5, rtol=1e-4)
    signal = _one("text", "signal,tokens=2")
    features, valid = signal.encode(["where were you", "", "no"])
    assert features.shape == (3, 2, 256) and valid.tolist() == [True, False, True]
    assert torch.equal(features[2, 0], features[2, 1]) and not torch.equal(features[0, 0], features[0, 1])


def test_the_users_mistakes(tmp_path: Path) -> None:
    _clip(tmp_path / "clip")
    config = transformers.Siglip2Config(
        text_config={**TOWER, "vocab_size": 50}, vision_config={**TOWER, "num_patches": 4, "patch_size": 16}
    )
    _saved(tmp_path / "flexible", config)
    for modality, spec, says in [
        ("video", f"siglip:{tmp_path / 'clip'}", "is a clip model, not siglip"),
        ("video", f"{tmp_path / 'flexible'}", "siglip2"),
        ("text", f"{tmp_path / 'clip'}", "does not encode words"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            build_encoders({modality: spec})
        assert caught.value.remedy
