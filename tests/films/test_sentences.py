"""Texts as one vector: the pooling that sentence-transformers saved with a model, or options, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from lmp.errors import UserError
from lmp.films.encoders import Encoder, build_encoders

SAID = ["Where were you last night?", "At the docks.", "No, you were not at the docks last night, and you know it."]
MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


def save_bert(folder: Path, *, side: str = "right") -> Path:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(SAID * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side=side,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def save_sentences(folder: Path, *, settings: dict[str, Any], last: str = "Normalize", longest: int = 12) -> None:
    """What sentence-transformers writes beside the model."""
    names = ["Transformer", "Pooling", *([last] if last else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if not i else f"{i}_{name}",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]
    write(folder / "modules.json", modules)
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16, **settings})
    write(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def text(spec: str) -> Encoder:
    (encoder,) = build_encoders({"text": spec})["text"]
    return encoder


@torch.no_grad()
def by_hand(folder: Path, said: str, mode: str, *, longest: int = 64, skipped: int = 0) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = tokenizer(said, return_tensors="pt", truncation=True, max_length=longest, return_token_type_ids=False)
    hidden_TD = model(**tokens).last_hidden_state[0]
    return {"mean": hidden_TD[skipped:].mean(0), "cls": hidden_TD[0], "last": hidden_TD[-1]}[mode]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_the_pooling_that_was_saved(tmp_path: Path, mode: str, side: str) -> None:
    save_bert(tmp_path, side=side)
    save_sentences(tmp_path, settings={name: name == MODES[mode] for name in MODES.values()})
    encoder = text(f"{tmp_path}")
    features, valid = encoder.encode([*SAID, "", None])
    assert valid.tolist() == [True] * 3 + [False] * 2 and not features[3:].any()
    for said, vector in zip(SAID, features[:, 0], strict=False):
        wanted = F.normalize(by_hand(tmp_path, said, mode, longest=12), dim=0)
        torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=1e-4)
    described = encoder.describe()
    assert (described["pooling"], described["sampling"]) == (mode, {"longest": 12, "normalize": True})


@pytest.mark.parametrize("mode", MODES)
def test_pooling_prefix_and_length_by_options(tmp_path: Path, mode: str) -> None:
    save_bert(tmp_path)
    encoder = text(f"bert:{tmp_path},pooling={mode},normalize=true,prefix=passage: ")
    features = encoder.encode(SAID)[0][:, 0]
    for said, vector in zip(SAID, features, strict=True):
        wanted = F.normalize(by_hand(tmp_path, f"passage: {said}", mode), dim=0)
        torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=1e-4)
    assert encoder.describe()["sampling"]["prefix"] == "passage: "
    assert encoder.describe() != text(f"{tmp_path},pooling={mode},normalize=true").describe()


def test_prompts_that_were_saved(tmp_path: Path) -> None:
    save_bert(tmp_path)
    save_sentences(tmp_path, settings={"pooling_mode": "mean", "include_prompt": False}, last="", longest=50)
    write(
        tmp_path / "config_sentence_transformers.json",
        {"prompts": {"query": "ask: ", "document": "tell: "}, "default_prompt_name": "document"},
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for spec, prefix in ((f"{tmp_path}", "tell: "), (f"{tmp_path},prompt=query", "ask: ")):
        skipped = len(tokenizer(prefix)["input_ids"]) - 1
        wanted = by_hand(tmp_path, prefix + SAID[0], "mean", skipped=skipped)
        torch.testing.assert_close(text(spec).encode(SAID[:1])[0][0, 0], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
def test_several_vectors_of_a_text(tmp_path: Path, mode: str) -> None:
    save_bert(tmp_path)
    encoder = text(f"{tmp_path},tokens=2,pooling={mode},normalize=true,prefix=say: ")
    features, valid = encoder.encode(["one two three four", "one", ""])
    assert features.shape == (3, 2, 16) and valid.tolist() == [True, True, False]
    for part, vector in zip(("one two", "three four"), features[0], strict=True):
        wanted = F.normalize(by_hand(tmp_path, f"say: {part}", mode), dim=0)
        torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(features[1, 0], features[1, 1])


def test_weights_that_the_files_lack_are_not_made_up(tmp_path: Path) -> None:
    """Files of a masked language model have no pooler, and transformers would draw one anew each time."""
    first, second = (text(f"{save_bert(tmp_path / name)}").version for name in "ab")
    assert first == second == text(f"{tmp_path / 'a'}").version
    weights = load_file(tmp_path / "a" / "model.safetensors")
    lost = next(name for name in weights if "layer.1" in name)
    del weights[lost]
    save_file(weights, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks weights of a bert model: {lost}"):
        text(f"{tmp_path / 'a'}")


def test_the_users_mistakes(tmp_path: Path) -> None:
    for name, settings, last in [
        ("max", {"pooling_mode_max_tokens": True}, ""),
        ("two", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ""),
        ("dense", {"pooling_mode_mean_tokens": True}, "Dense"),
        ("good", {"pooling_mode_mean_tokens": True}, ""),
    ]:
        save_sentences(save_bert(tmp_path / name), settings=settings, last=last)
    for spec, says in [
        ("{0}/max", "pooling_mode_max_tokens"),
        ("{0}/two", "not done here"),
        ("{0}/dense", "ends in Dense"),
        ("{0}/good,prompt=query", "no prompt 'query'"),
        ("{0}/good,pooling=max", "pooling of"),
        ("{0}/good,normalize=yes", "normalize of"),
        ("signal,pooling=mean", "no option pooling"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            text(spec.format(tmp_path))
        assert caught.value.remedy
    assert text(f"{tmp_path}/dense,pooling=mean").width == 16
