"""The adapter for transformers models, with tiny random ones saved to a folder; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from lmp.errors import UserError
from lmp.films.encoders import build_encoders
from lmp.films.encoders.transformers_adapter import TransformersEncoder

SAID = [
    "Where were you last night?",
    "At the docks.",
    "No, you were not at the docks last night, and you know it.",
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(SAID * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def _words(folder: Path, family: str) -> Path:
    _save_tokenizer(folder)
    small = {"vocab_size": 300, "max_position_embeddings": 40, "pad_token_id": 1}
    if family == "bart":
        config = transformers.BartConfig(
            **small, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        )  # fmt: skip
        transformers.BartModel(config).save_pretrained(folder)
    else:
        small_bert = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        kind = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[family]
        transformers.AutoModel.from_config(kind(**small, **small_bert)).save_pretrained(folder)
    return folder


def _sound(folder: Path, family: str, *, mask: bool = True) -> Path:
    kind = {"wav2vec2": transformers.Wav2Vec2Config, "wavlm": transformers.WavLMConfig}[family]
    config = kind(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8, 8, 8), conv_kernel=(10, 3, 3), conv_stride=(20, 4, 4), num_feat_extract_layers=3,
        feat_extract_norm="layer" if mask else "group", num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=mask).save_pretrained(folder)
    return folder


def _picture(folder: Path, family: str) -> Path:
    if family == "videomae":
        config = transformers.VideoMAEConfig(
            image_size=32, patch_size=16, num_frames=4, tubelet_size=2, hidden_size=16, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=32,
        )  # fmt: skip
    else:
        config = transformers.VJEPA2Config(
            crop_size=32, patch_size=16, frames_per_clip=4, tubelet_size=2, hidden_size=24,
            num_hidden_layers=2, num_attention_heads=2, pred_hidden_size=24, pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
        )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _check_contract(encoder: TransformersEncoder, shots: list, empty: list) -> torch.Tensor:
    features, valid = encoder.encode([*shots, *empty])
    assert features.shape == (len(shots) + len(empty), 1, encoder.width)
    assert features.dtype == torch.float32 and torch.isfinite(features).all()
    assert valid.tolist() == [True] * len(shots) + [False] * len(empty)
    assert not features[len(shots) :].any()
    assert (features[0] - features[1]).abs().max() > 1e-4
    said = json.loads(json.dumps(encoder.describe()))
    assert (said["name"], said["version"], said["width"]) == (encoder.name, encoder.version, encoder.width)
    # Padding and company must not change a shot.
    for i, shot in enumerate(shots):
        torch.testing.assert_close(encoder.encode([shot])[0][0], features[i], atol=1e-4, rtol=1e-4)
    return features


@pytest.mark.parametrize("family", ["bart", "bert", "roberta"])
def test_words(tmp_path: Path, family: str) -> None:
    folder = _words(tmp_path, family)
    encoder = build_encoders({"text": str(folder)})["text"][0]
    assert encoder.kind == "words" and encoder.frames == encoder.height == 0
    long = "word " * 200
    features = _check_contract(encoder, [*SAID, long], ["", "  ", None])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if family == "bart" else model
    with torch.no_grad():
        wanted = model(**tokenizer(SAID[0], return_tensors="pt", return_token_type_ids=False)).last_hidden_state.mean(1)
    torch.testing.assert_close(features[0], wanted)


@pytest.mark.parametrize("family", ["wav2vec2", "wavlm"])
def test_sound(tmp_path: Path, family: str) -> None:
    folder = _sound(tmp_path, family)
    encoder = build_encoders({"audio": str(folder)})["audio"][0]
    rng = np.random.default_rng(0)
    shots = [rng.normal(size=n).astype(np.float32) * 0.1 for n in (16000, 5000, 9000, 30)]
    features = _check_contract(encoder, shots, [None, np.zeros(0, np.float32)])
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor(shots[0], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        wanted = transformers.AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state.mean(1)
    torch.testing.assert_close(features[0], wanted, atol=1e-4, rtol=1e-4)


def test_sound_of_a_model_without_mask_does_not_depend_on_company(tmp_path: Path) -> None:
    encoder = TransformersEncoder("sound", str(_sound(tmp_path, "wav2vec2", mask=False)))
    rng = np.random.default_rng(0)
    _check_contract(encoder, [rng.normal(size=n).astype(np.float32) for n in (16000, 5000, 9000)], [])


def test_long_sound_is_encoded_in_pieces(tmp_path: Path) -> None:
    encoder = TransformersEncoder("sound", str(_sound(tmp_path, "wav2vec2")))
    wave = np.random.default_rng(0).normal(size=16000 * 40).astype(np.float32)
    whole = encoder.encode([wave])[0]
    halves = encoder.encode([wave[: 16000 * 20], wave[16000 * 20 :]])[0]
    torch.testing.assert_close(whole[0], halves.mean(0), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("family", ["videomae", "vjepa2"])
def test_pictures(tmp_path: Path, family: str) -> None:
    folder = _picture(tmp_path, family)
    encoder = build_encoders({"video": str(folder)})["video"][0]
    assert (encoder.kind, encoder.frames, encoder.height) == ("picture", 4, 32)
    rng = np.random.default_rng(0)
    sizes = ((4, 32, 32), (4, 32, 56), (1, 48, 40), (9, 20, 20))
    shots = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    features = _check_contract(encoder, shots, [None, np.zeros((0, 32, 56, 3), np.uint8)])
    pixels = (torch.from_numpy(shots[0]).permute(0, 3, 1, 2)[None] / 255 - 0.5) / 0.25
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        if family == "vjepa2":
            wanted = model(pixel_values_videos=pixels, skip_predictor=True).last_hidden_state.mean(1)
        else:
            wanted = model(pixel_values=pixels).last_hidden_state.mean(1)
    torch.testing.assert_close(features[0], wanted, atol=1e-5, rtol=1e-4)


def test_the_version_follows_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = TransformersEncoder("words", str(_words(tmp_path / "a", "bert"))).version
    monkeypatch.setattr(transformers.configuration_utils, "__version__", "99.0")
    assert TransformersEncoder("words", str(tmp_path / "a")).version == first
    torch.manual_seed(1)
    assert TransformersEncoder("words", str(_words(tmp_path / "b", "bert"))).version != first


def test_the_users_mistakes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = _words(tmp_path / "words", "bert")
    untold = _words(tmp_path / "untold", "bert")
    for path in untold.glob("tokenizer*"):
        path.unlink()
    spectrogram = tmp_path / "spectrogram"
    transformers.ASTModel(
        transformers.ASTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_length=32
        )
    ).save_pretrained(spectrogram)
    for modality, source in [
        ("audio", str(spectrogram)),
        ("text", str(tmp_path / "missing")),
        ("text", str(tmp_path / "empty")),
        ("text", "no-such-owner/no-such-model"),
        ("text", str(untold)),
        ("audio", str(words)),
        ("video", str(words)),
    ]:
        with pytest.raises(UserError) as caught:
            build_encoders({modality: source})
        assert source in caught.value.problem
        assert caught.value.remedy
