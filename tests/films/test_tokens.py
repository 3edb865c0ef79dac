"""K vectors of a shot, of every kind of encoder; and checkpoints as they are published, with heads and decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lmp.errors import UserError
from lmp.films.encoders import Encoder, build_encoders
from tests.films.recipes import chirp, film_frames
from tests.films.test_sentences import SAID, save_bert

TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WAVES = {
    **TOWER, "conv_dim": (8, 8, 8), "conv_kernel": (10, 3, 3), "conv_stride": (20, 4, 4), "vocab_size": 32,
    "num_feat_extract_layers": 3, "feat_extract_norm": "layer", "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
WHISPER = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 60, "num_mel_bins": 8,
    "max_source_positions": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
BART = {
    "vocab_size": 300, "max_position_embeddings": 40, "pad_token_id": 1, "d_model": 16, "encoder_layers": 2,
    "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}  # fmt: skip
VIDEOMAE = {**TOWER, "image_size": 32, "patch_size": 16, "num_frames": 4, "tubelet_size": 2}
JEPA = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": 32, "patch_size": 16,
    "frames_per_clip": 4, "tubelet_size": 2, "pred_hidden_size": 24, "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1, "num_pooler_layers": 1,
}  # fmt: skip
SPECTRA = {**TOWER, "max_length": 100, "num_mel_bins": 16, "patch_size": 8}
FAMILIES: dict[str, tuple[str, Any]] = {
    "wav2vec2": ("audio", lambda: transformers.Wav2Vec2Config(**WAVES)),
    "hubert": ("audio", lambda: transformers.HubertConfig(**WAVES)),
    "wavlm": ("audio", lambda: transformers.WavLMConfig(**WAVES)),
    "whisper": ("audio", lambda: transformers.WhisperConfig(**WHISPER)),
    "ast": ("audio", lambda: transformers.ASTConfig(**SPECTRA)),
    "videomae": ("video", lambda: transformers.VideoMAEConfig(**VIDEOMAE)),
    "vjepa2": ("video", lambda: transformers.VJEPA2Config(**JEPA)),
    "bart": ("text", lambda: transformers.BartConfig(**BART)),
    "bert": ("text", lambda: transformers.BertConfig(**TOWER, vocab_size=300, pad_token_id=1)),
    "roberta": (
        "text",
        lambda: transformers.RobertaConfig(**TOWER, vocab_size=300, pad_token_id=1, max_position_embeddings=64),
    ),
}
SHOTS: dict[str, list[Any]] = {
    "audio": [chirp(0.7), chirp(0.3)],
    "video": [film_frames(4, 32, 32), film_frames(9, 40, 56)],
    "text": SAID,
}


def processor(folder: Path, family: str) -> None:
    """The file beside the weights that tells how the model takes its input."""
    if family == "whisper":
        transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    elif family == "ast":
        transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=100).save_pretrained(folder)
    elif FAMILIES[family][0] == "audio":
        transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False).save_pretrained(folder)
    elif FAMILIES[family][0] == "video":
        settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def save(folder: Path, family: str, *, head: str = "AutoModel") -> Any:
    if FAMILIES[family][0] == "text":
        save_bert(folder)  # its tokenizer
    torch.manual_seed(0)
    kind, config = getattr(transformers, head), FAMILIES[family][1]()
    model = kind.from_config(config) if head == "AutoModel" else kind(config)
    model.save_pretrained(folder)
    processor(folder, family)
    return model.eval()


def one(modality: str, spec: str) -> Encoder:
    (encoder,) = build_encoders({modality: spec})[modality]
    return encoder


def close(made: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm", "whisper", "ast", "signal"])
def test_sound_is_cut_into_parts_of_equal_length(tmp_path: Path, family: str) -> None:
    spec = "signal"
    if family != "signal":
        save(tmp_path, family)
        spec = f"{family}:{tmp_path}"
    shots = [chirp(0.9), chirp(0.6)]
    features, valid = one("audio", f"{spec},tokens=3").encode([*shots, None])
    assert features.shape[:2] == (3, 3) and valid.tolist() == [True, True, False]
    whole = one("audio", spec)
    for shot, vectors in zip(shots, features, strict=False):
        close(vectors, whole.encode(np.array_split(shot, 3))[0][:, 0])
    assert (features[0, 0] - features[0, 1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["videomae", "vjepa2"])
@torch.no_grad()
def test_vectors_of_a_clip_are_dealt_to_its_parts(tmp_path: Path, family: str) -> None:
    model = save(tmp_path, family)
    (shot,) = SHOTS["video"][:1]
    features = one("video", f"{family}:{tmp_path},tokens=2").encode([shot])[0]
    pixels = (torch.from_numpy(shot).permute(0, 3, 1, 2)[None] / 255 - 0.5) / 0.25
    inputs = {"pixel_values_videos": pixels, "skip_predictor": True} if family == "vjepa2" else {"pixel_values": pixels}
    hidden_TD = model(**inputs).last_hidden_state[0]  # in order of time: two tubelets of four patches
    close(features[0], hidden_TD.unflatten(0, (2, 4)).mean(1))


def test_frames_are_dealt_to_the_parts_of_a_shot() -> None:
    shot = film_frames(8, 64, 96)
    features = one("video", "signal,tokens=2").encode([shot])[0][0]
    close(features, one("video", "signal").encode(np.split(shot, 2))[0][:, 0])


@pytest.mark.parametrize("family", ["bart", "bert", "roberta"])
@torch.no_grad()
def test_tokens_are_dealt_to_the_parts_of_a_text(tmp_path: Path, family: str) -> None:
    model = save(tmp_path, family)
    model = model.get_encoder() if family == "bart" else model
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(SAID[2], return_tensors="pt")["input_ids"]
    hidden_TD = model(input_ids=tokens).last_hidden_state[0]
    features, valid = one("text", f"{family}:{tmp_path},tokens=2").encode([SAID[2], ""])
    half, odd = divmod(len(hidden_TD), 2)
    close(features[0], torch.stack([hidden_TD[: half + odd].mean(0), hidden_TD[half:].mean(0)]))
    assert valid.tolist() == [True, False]


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("wav2vec2", "Wav2Vec2ForCTC"),
        ("hubert", "HubertForCTC"),
        ("wavlm", "WavLMForCTC"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("ast", "ASTForAudioClassification"),
        ("videomae", "VideoMAEForPreTraining"),
        ("videomae", "VideoMAEForVideoClassification"),
        ("vjepa2", "VJEPA2ForVideoClassification"),
        ("bart", "BartForConditionalGeneration"),
        ("bert", "BertForMaskedLM"),
        ("roberta", "RobertaForMaskedLM"),
    ],
)
def test_a_published_checkpoint_gives_what_its_trunk_gives(tmp_path: Path, family: str, head: str) -> None:
    modality = FAMILIES[family][0]
    model = save(tmp_path / "published", family, head=head)
    save(tmp_path / "trunk", family)
    model.base_model.save_pretrained(tmp_path / "trunk")
    published, trunk = (one(modality, f"{family}:{tmp_path / name}") for name in ("published", "trunk"))
    features = published.encode(SHOTS[modality])[0]
    assert torch.equal(features, trunk.encode(SHOTS[modality])[0]) and features.abs().max() > 1e-3
    assert published.version == one(modality, f"{family}:{tmp_path / 'published'}").version


def test_weights_as_wav2vec2_was_published(tmp_path: Path) -> None:
    """A pickled state_dict, the weight norm of its convolution under the names of older torch, no training mask."""
    save(tmp_path, "wav2vec2", head="Wav2Vec2ForCTC")
    wanted = one("audio", f"wav2vec2:{tmp_path}").encode(SHOTS["audio"])[0]
    weights = load_file(tmp_path / "model.safetensors")
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for new, old in older.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    assert sum(name.endswith(("weight_g", "weight_v")) for name in weights) == 2
    weights.pop("wav2vec2.masked_spec_embed", None)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    encoder = one("audio", f"wav2vec2:{tmp_path}")
    assert torch.equal(encoder.encode(SHOTS["audio"])[0], wanted)
    assert encoder.version == one("audio", f"wav2vec2:{tmp_path}").version


def test_a_model_that_transformers_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of_tomorrow"}), encoding="utf-8")
    with pytest.raises(UserError, match="of_tomorrow") as caught:
        one("video", str(tmp_path))
    assert "-U transformers" in caught.value.remedy
