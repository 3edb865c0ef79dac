"""A folder that transformers loads becomes a run that trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmp.config import load_config
from lmp.model import LmpConfig, LmpForPretraining
from lmp.train.checkpoint import load_trained
from lmp.train.trainer import train
from tests.runs import WIDTHS, config_of, make_shards, write_config
from tools import export_huggingface, import_huggingface

ENCODERS = {name: {"name": "test", "version": "1"} for name in WIDTHS}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("import") / "shards")


def write_folder(folder: Path, *, with_heads: bool, encoders: dict[str, Any] = ENCODERS, **changes: Any) -> Path:
    """A folder of a trained model, as the export leaves it but for the code."""
    torch.manual_seed(1)
    model = LmpForPretraining(
        LmpConfig(modalities={n: {"tokens": 1, "width": w} for n, w in WIDTHS.items()}, **changes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (model if with_heads else model.lmp).save_pretrained(folder)
    (folder / "preprocessing.json").write_text(json.dumps({"encoders": encoders}))
    return folder


def shape(**changes: Any) -> dict[str, Any]:
    base = config_of(Path())["model"]
    return {**base, "positions": "learned", "max_positions": 32, **changes}


def configured(folder: Path, shards: Path, **model: Any) -> Path:
    train = {"steps": 2, "log_every": 1}
    return write_config(folder / "config.yaml", config_of(shards, model=shape(**model), train=train))


def test_there_and_back_and_on(tmp_path: Path, shards: Path) -> None:
    folder = write_folder(tmp_path / "folder", with_heads=True, **shape())
    config, run = configured(tmp_path, shards), tmp_path / "run"
    assert import_huggingface.main([str(folder), str(run), "--config", str(config)]) == 0
    weights = load_file(folder / "model.safetensors")
    trained = load_trained(run)
    assert trained.step == 0
    assert trained.weights.keys() == weights.keys()
    assert all(torch.equal(trained.weights[name], tensor) for name, tensor in weights.items())
    told = json.loads((run / "imported.json").read_text())
    assert told["heads"] == "imported"
    assert max(told["differences"].values()) <= 1e-5
    assert "reconstructed" in told["differences"]

    out = tmp_path / "out"
    assert export_huggingface.main([str(run), str(out), "--with-heads", "--allow-unfinished"]) == 0
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())

    outcome = train(load_config(config), run)
    assert outcome.finished
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    started = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in started if line["event"] == "restored"] == [0]
    moved = load_trained(run).weights
    name = "lmp.contextual.video.layers.0.mlp.fc1.weight"
    assert 0 < (moved[name] - weights[name]).abs().max() < 0.02


def test_longer_positions_and_new_heads(tmp_path: Path, shards: Path) -> None:
    folder = write_folder(tmp_path / "folder", with_heads=False, **shape(max_positions=16))
    config = configured(tmp_path, shards)
    old = load_file(folder / "model.safetensors")["positions.weight"]
    for positions in ("keep", "interpolate"):
        run = tmp_path / positions
        command = [str(folder), str(run), "--config", str(config), "--positions", positions]
        assert import_huggingface.main(command) == 0
        table = load_trained(run).weights["lmp.positions.weight"]
        told = json.loads((run / "imported.json").read_text())
        assert told["heads"] == "begun anew"
        assert table.shape == (32, 32)
        if positions == "keep":
            assert torch.equal(table[:16], old)
            fresh = LmpForPretraining(LmpConfig(**load_trained(run).config.to_dict()))
            assert torch.equal(table[16:], fresh.lmp.positions.weight[16:])
            assert told["positions"] == "the first 16 of 16 kept, 16 begun anew"
            assert max(told["differences"].values()) <= 1e-5
        else:
            assert torch.allclose(table[[0, -1]], old[[0, -1]], atol=1e-6)
            between = old[0] + (old[1] - old[0]) * (15 / 31)
            assert torch.allclose(table[1], between, atol=1e-5)
            assert told["positions"] == "interpolated"
    heads = [
        load_trained(tmp_path / name).weights["reconstruction_head.fc1.weight"] for name in ("keep", "interpolate")
    ]
    assert torch.equal(*heads)


def test_half_precision_and_several_files(tmp_path: Path, shards: Path) -> None:
    folder = write_folder(tmp_path / "folder", with_heads=True, **shape(positions="rope"))
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    files = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in (0, 1)}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    run = tmp_path / "run"
    config = configured(tmp_path, shards, positions="rope")
    assert import_huggingface.main([str(folder), str(run), "--config", str(config)]) == 0
    stored = load_trained(run).weights
    assert all(torch.equal(stored[name], tensor.float()) for name, tensor in weights.items())
    assert json.loads((run / "imported.json").read_text())["positions"].startswith("rope: none are stored")


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        (
            {"max_positions": 64},
            [],
            "numbers 32 shots, model.max_positions is 64 -> pass --positions interpolate or keep",
        ),
        ({"width": 64}, [], "width is 32, here 64"),
        ({"contextual_layers": 2}, [], "contextual_layers of"),
        ({"positions": "rope"}, [], "positions is 'learned', here 'rope'"),
        ({}, ["model.nonsense=1"], "model.nonsense"),
    ],
)
def test_misuse_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    shards: Path,
    capsys: pytest.CaptureFixture[str],
    model: dict[str, Any],
    arguments: list[str],
    said: str,
) -> None:
    folder = write_folder(tmp_path / "folder", with_heads=False, **shape())
    config = configured(tmp_path, shards, **model)
    command = [str(folder), str(tmp_path / "run"), "--config", str(config), *arguments]
    assert import_huggingface.main(command) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "folder"]


def test_wrong_folders(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path, shards)

    def refused(folder: Path) -> str:
        assert import_huggingface.main([str(folder), str(tmp_path / "run"), "--config", str(config)]) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert "config.json: cannot be read" in refused(tmp_path)
    folder = write_folder(tmp_path / "folder", with_heads=False, encoders={"video": {"name": "other"}}, **shape())
    assert "train on shards made by the same base encoders" in refused(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "preprocessing.json").unlink()
    save_file({name: tensor for name, tensor in weights.items() if name != "cross.query"}, folder / "model.safetensors")
    assert "lmp.cross.query is missing" in refused(folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    assert "its weights cannot be read" in refused(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert "holds a model of type 'bert'" in refused(folder)
    (tmp_path / "run").mkdir()
    assert import_huggingface.main([str(folder), str(tmp_path / "run"), "--config", str(config)]) == 2
