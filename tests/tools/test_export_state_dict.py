"""Weights in one file, under other names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tools.written import make_model, write_run
from tools import export_state_dict


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_mmlab_style(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "video.pth"
    names = ["--part", "video", "--strip", "contextual.video.", "--prefix", "backbone.", "--wrap", "state_dict"]
    assert export_state_dict.main([str(run), str(out), *names]) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["video.pth", "video.pth.json"]
    found = torch.load(out, weights_only=True)
    assert sorted(found) == ["meta", "state_dict"]
    assert found["meta"]["step"] == 20
    assert found["meta"]["config"]["modality"] == "video"
    expected = make_model().lmp.contextual["video"].state_dict()
    inner = {name.removeprefix("backbone."): t for name, t in found["state_dict"].items()}
    assert expected.keys() <= inner.keys()
    assert all(torch.equal(inner[name], tensor + 0.2) for name, tensor in expected.items())
    assert "backbone.embeddings.video.projection.weight" in found["state_dict"]
    facts = json.loads((tmp_path / "new" / "video.pth.json").read_text())
    entry = facts["tensors"]["backbone.norm.weight"]
    tensor = found["state_dict"]["backbone.norm.weight"]
    assert entry["name"] == "contextual.video.norm.weight"
    assert entry["sha256"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert facts["largest_difference"] <= 1e-5


def test_a_bare_safetensors_with_heads(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.safetensors"
    assert export_state_dict.main([str(run), str(out), "--with-heads"]) == 0
    weights, expected = load_file(out), make_model().state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor + 0.2) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("out.npz", [], "suffix '.npz' names no format"),
        ("out.safetensors", ["--wrap", "state_dict"], "safetensors has no nesting"),
        ("out.pt", ["--wrap", "meta"], "--wrap 'meta' cannot be the key"),
        ("out.pt", ["--strip", "module."], "--strip module.: no tensor's name begins so"),
        ("out.pt", ["--strip", "cross.query"], "two tensors would have one name"),
        ("out.pt", ["--part", "music"], "name one of video, text, audio, cross_modal"),
        ("there.pt", [], "there.pt: exists"),
    ],
)
def test_misuse_is_one_line_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, arguments: list[str], said: str
) -> None:
    (tmp_path / "there.pt").write_text("precious")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert export_state_dict.main([str(run), str(tmp_path / name), *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert " -> " in captured.err
    assert captured.out == ""
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "there.pt").read_text() == "precious"
