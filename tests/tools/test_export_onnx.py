"""Graphs that give the model's tokens in another runtime, for any batch and length."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from lmp.errors import UserError
from tests.tools.written import write_run
from tools import export_onnx
from tools._source import open_source


def run_graph(path: Path, **inputs: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path)).run(None, inputs)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and its export."""
    folder = tmp_path_factory.mktemp("onnx")
    run, out = write_run(folder / "run", positions="time_rope"), folder / "out"
    assert export_onnx.main([str(run), str(out), "--part", "video", "--part", "cross_modal"]) == 0
    return run, out


def test_both_kinds_of_graph(made: tuple[Path, Path]) -> None:
    run, out = made
    assert sorted(p.name for p in out.iterdir()) == [
        "cross_modal.onnx",
        "fingerprint.json",
        "preprocessing.json",
        "video.onnx",
    ]
    facts = json.loads((out / "fingerprint.json").read_text())
    assert facts["files"]["video.onnx"] == hashlib.sha256((out / "video.onnx").read_bytes()).hexdigest()
    assert sorted(facts["differences"]) == ["cross_modal", "video"]
    assert facts["largest_difference"] <= export_onnx.TOLERANCE
    graph = onnx.load(str(out / "video.onnx")).graph
    shape = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert shape == {
        "features": ["batch", "shots", 2, 12],
        "valid": ["batch", "shots"],
        "lengths": ["batch"],
        "times": ["batch", "shots"],
    }
    stored = {tensor.name.removeprefix("part."): numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, tensor in open_source(run, part="video").weights.items():
        np.testing.assert_array_equal(stored[name], tensor.numpy())

    # A batch and a length that the export never saw; the second film is shorter, and padded with rubbish.
    draw = np.random.default_rng(0)
    features = draw.standard_normal((2, 29, 2, 12), dtype=np.float32)
    valid = draw.random((2, 29)) < 0.7
    times = draw.random((2, 29), dtype=np.float32).cumsum(1)
    lengths = np.array([29, 10])
    features[1, 10:] = 1e4
    tokens = run_graph(out / "video.onnx", features=features, valid=valid, lengths=lengths, times=times)
    trunk = open_source(run).model.lmp
    for film, length in enumerate(lengths):
        cut = [torch.from_numpy(x[film, :length]) for x in (features, valid, times)]
        with torch.no_grad():
            expected = trunk({"video": cut[0]}, {"video": cut[1]}, times=cut[2]).contextual["video"]
        np.testing.assert_allclose(tokens[film, :length], expected.numpy(), atol=1e-4)

    given = {name: draw.standard_normal((3, 4, 1, 16), dtype=np.float32) for name in ("text", "audio")}
    same = run_graph(out / "cross_modal.onnx", **given, lengths=np.array([4, 4, 2]), times=times[:1, :4].repeat(3, 0))
    alone = {name: rows[:1] for name, rows in given.items()}
    first = run_graph(out / "cross_modal.onnx", **alone, lengths=np.array([4]), times=times[:1, :4])
    np.testing.assert_allclose(same[:1], first, atol=1e-5)
    assert same.shape == (3, 4, 2, 16)


def test_misuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert export_onnx.main([str(run), str(tmp_path / "out"), "--part", "music"]) == 2
    assert "name one of video, text, audio, cross_modal" in capsys.readouterr().err
    assert export_onnx.main([str(run), str(run)]) == 2
    assert "exists" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    assert export_onnx.main([str(run), str(tmp_path / "out")]) == 2
    assert "pip install 'lmp[onnx]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_graph_that_differs_is_refused(made: tuple[Path, Path]) -> None:
    graph = made[1] / "video.onnx"
    source = open_source(made[0], part="video")
    export_onnx._check_weights(graph, source)
    assert export_onnx._compare(graph, source) <= export_onnx.TOLERANCE
    with torch.no_grad():
        source.model.lmp.contextual["video"].layers[0].mlp.fc2.bias[0] += 0.01
    with pytest.raises(UserError, match="onnxruntime is not the training model: output tokens differs by"):
        export_onnx._compare(graph, source)
    changed = open_source(made[0], part="video")
    changed.weights["contextual.video.norm.bias"] += 1
    with pytest.raises(UserError, match=r"does not hold the model's weights: tensor contextual\.video\.norm\.bias"):
        export_onnx._check_weights(graph, changed)
