"""One part of a run becomes a model of its own; the parts together are the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lmp.errors import UserError
from lmp.model import LmpContextualModel, LmpCrossModel, LmpForPretraining
from tests.tools.written import make_model, write_run
from tools import export_huggingface
from tools._source import aliases, open_source


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    left_out = {"files": ["lvu.txt"], "ids": 7, "digest": "1d5", "films": 2, "shots": 31}
    return write_run(tmp_path_factory.mktemp("parts") / "run", positions="learned", data={"left_out": left_out})


@pytest.mark.parametrize("part", ["audio", "cross_modal"])
def test_a_part_loads_without_lmp_and_names_its_tensors_as_the_whole_does(run: Path, tmp_path: Path, part: str) -> None:
    assert export_huggingface.main([str(run), str(tmp_path / "out"), "--part", part]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    whole = open_source(run).weights
    prefixes = (
        ("positions.", "cross.") if part == "cross_modal" else ("positions.", "embeddings.audio.", "contextual.audio.")
    )
    assert weights.keys() == {name for name in whole if name.startswith(prefixes)}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights.items())
    fingerprint = json.loads((tmp_path / "out" / "fingerprint.json").read_text())
    assert fingerprint["differences"] == {"last_hidden_state": fingerprint["largest_difference"]}
    assert fingerprint["part"] == part
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| films left out | 2 films, 31 shots, by 7 ids of lvu.txt (sha256 of the ids `1d5`) |" in card
    shown = json.loads((tmp_path / "out" / "preprocessing.json").read_text())["modalities"]
    assert list(shown) == (["text", "audio"] if part == "cross_modal" else ["audio"])
    lines = (
        card.split("```python\n")[1].split("```")[0].replace('"FOLDER", trust_remote_code=True', f'"{tmp_path}/out"')
    )
    scope: dict[str, Any] = {}
    exec(lines, scope)  # without trust_remote_code: the class that lmp registers
    assert isinstance(scope["model"], LmpCrossModel if part == "cross_modal" else LmpContextualModel)
    tokens = 2 if part == "cross_modal" else 1
    assert scope["output"].last_hidden_state.shape == (8, tokens, 16)


def test_the_parts_together_are_the_whole(run: Path) -> None:
    source = open_source(run)
    inputs = source.inputs
    layout = {key: inputs[key] for key in ("lengths", "times")}
    contextual = {}
    for name in source.trained.config.modalities:
        part = open_source(run, part=name)
        model = LmpContextualModel(part.config).eval()
        model.load_state_dict(part.weights, strict=True)
        with torch.no_grad():
            out = model(*(inputs[key][name] for key in ("features", "valid")), masked=inputs["masked"][name], **layout)
        contextual[name] = out.last_hidden_state
        assert torch.equal(contextual[name], source.expected["contextual"][name])
    part = open_source(run, part="cross_modal")
    model = LmpCrossModel(part.config).eval()
    model.load_state_dict(part.weights, strict=True)
    with torch.no_grad():
        cross = model({name: contextual[name] for name in part.config.sources}, **layout).last_hidden_state
    assert torch.equal(cross, source.expected["cross"])


def test_wrong_tokens_are_refused(run: Path) -> None:
    model = LmpCrossModel(open_source(run, part="cross_modal").config)
    tokens = torch.zeros(3, 1, 16)
    with pytest.raises(ValueError, match=r"give those of \['audio', 'text'\]"):
        model({"audio": tokens})
    with pytest.raises(ValueError, match=r"contextual\['audio'\] has shape"):
        model({"audio": tokens[:2], "text": tokens})


def test_wrong_parts_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="name one of video, text, audio, cross_modal"):
        open_source(run, part="music")
    with pytest.raises(UserError, match="heads belong to the whole model"):
        open_source(run, part="video", with_heads=True)


def test_tied_tensors_are_whole_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = LmpForPretraining.__init__

    def tied(self: Any, config: Any) -> None:
        made(self, config)
        self.lmp.contextual["text"].norm.weight = self.lmp.contextual["video"].norm.weight

    monkeypatch.setattr(LmpForPretraining, "__init__", tied)
    name, first = "contextual.text.norm.weight", "contextual.video.norm.weight"
    source = open_source(write_run(tmp_path / "run", spoil=lambda weights: weights.pop(f"lmp.{name}")))
    assert source.ties == {name: first}
    assert torch.equal(source.weights[name], source.weights[first])
    assert not aliases(source.weights)
    assert open_source(tmp_path / "run", part="text").ties == {}

    differ = write_run(tmp_path / "other", spoil=lambda weights: weights[f"lmp.{name}"].add_(1))
    with pytest.raises(UserError, match="are one tensor in the model, but differ"):
        open_source(differ)


def test_whole_models_load_by_the_registered_classes(run: Path, tmp_path: Path) -> None:
    source = open_source(run, with_heads=True)
    config = source.config
    config.save_pretrained(tmp_path)
    save_file(source.weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(model.cross.query, make_model().lmp.cross.query + 0.2)
