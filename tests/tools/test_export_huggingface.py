"""A run becomes a folder that plain transformers loads, or nothing at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmp.errors import UserError
from tests.tools.written import MODALITIES, make_model, write_run
from tools import _folder, _parity, export_huggingface
from tools._parity import largest_difference
from tools._source import aliases, check_tensors, fixed_input

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return lambda **arguments: write_run(tmp_path / "run", **arguments)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk, exported from step 20 of a finished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("exported")
    run = write_run(folder / "run", steps=(10, 20), positions="time_rope")
    assert export_huggingface.main([str(run), str(folder / "new" / "trunk")]) == 0
    return folder / "new" / "trunk"


def test_the_folder_is_whole(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "attention.py",
        "backends.py",
        "config.json",
        "configuration_lmp.py",
        "fingerprint.json",
        "layers.py",
        "model.safetensors",
        "modeling_lmp.py",
        "preprocessing.json",
    ]
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1


def test_weights_are_those_of_the_newest_checkpoint_without_heads(exported: Path) -> None:
    expected = {name: tensor + 0.2 for name, tensor in make_model(positions="time_rope").lmp.state_dict().items()}
    weights = load_file(exported / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name
    recorded = json.loads((exported / "fingerprint.json").read_text())["tensors"]
    name = "cross.query"
    assert recorded[name]["sha256"] == hashlib.sha256(weights[name].numpy().tobytes()).hexdigest()
    assert recorded[name]["numel"] == 16


def test_what_is_said_about_it(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    fingerprint = json.loads((exported / "fingerprint.json").read_text())
    for said in ("| step | 20 (the run was finished) |", "12,345", "`d1e5`", "`c0ffee`", "license: unknown"):
        assert said in card
    assert f"**{fingerprint['largest_difference']:.3g}**" in card
    assert "| video | 2 | 12 | name signal-video, version 1, frames 4 |" in card
    assert "| text | 1 | 7 | not recorded |" in card
    assert fingerprint["largest_difference"] <= 1e-5
    assert sorted(fingerprint["differences"]) == [
        "contextual/audio",
        "contextual/text",
        "contextual/video",
        "cross",
    ]
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LmpModel"]
    assert config["auto_map"]["AutoModel"] == "modeling_lmp.LmpModel"
    preprocessing = json.loads((exported / "preprocessing.json").read_text())
    assert preprocessing["encoders"]["video"]["frames"] == 4
    assert preprocessing["modalities"]["video"] == {"tokens": 2, "width": 12, "dtype": "float16"}


def test_the_cards_own_lines_run_without_lmp(exported: Path, tmp_path: Path) -> None:
    lines = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len([line for line in lines.splitlines() if line and not line.startswith("#")]) <= 6
    block = "import sys; sys.modules['lmp'] = None\n"
    check = "print(tuple(output.cross.shape), type(model).__module__)"
    done = subprocess.run(
        [sys.executable, "-c", block + lines.replace("FOLDER", str(exported)) + check],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("(8, 2, 16) transformers_modules.")


def test_with_heads_an_earlier_step_over_an_earlier_export(make_run: MakeRun, tmp_path: Path) -> None:
    run, out = make_run(steps=(10, 20), done=False), tmp_path / "out"
    out.mkdir()
    (out / "fingerprint.json").write_text("{}")
    (out / "stale.bin").write_text("old")
    arguments = [str(run), str(out), "--with-heads", "--step", "10", "--allow-unfinished", "--overwrite"]
    assert export_huggingface.main([*arguments, "--license", "cc-by-4.0"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert not (out / "stale.bin").exists()
    weights = load_file(out / "model.safetensors")
    assert torch.equal(weights["temperatures.masked.log_excess"], make_model().temperatures.masked.log_excess + 0.1)
    card = (out / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "| step | 10 (the run was NOT finished) |" in card
    assert "AutoModelForPreTraining.from_pretrained" in card
    assert "scale/masked" in json.loads((out / "fingerprint.json").read_text())["differences"]


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    """The one line that a refused export prints; nothing may be left at or beside OUT."""
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert export_huggingface.main([str(tmp_path / "run"), str(tmp_path / "out"), *arguments]) == 2
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert " -> " in lines[0]
    return lines[0]


def test_an_unfinished_run_is_refused(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(done=False)
    assert "--allow-unfinished" in refused(capsys, tmp_path)


def test_an_existing_folder_is_kept(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert "out: exists -> name another folder, or pass --overwrite" in refused(capsys, tmp_path)
    assert "exists and is not an export" in refused(capsys, tmp_path, "--overwrite")


def test_no_run_and_no_such_step(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a run folder (no config.yaml)" in refused(capsys, tmp_path)
    make_run()
    assert "step 99" in refused(capsys, tmp_path, "--step", "99")


def test_a_folder_that_cannot_be_made(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        export_huggingface.export(tmp_path / "run", tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda w: w.pop("lmp.cross.query"), "lmp.cross.query is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra is unexpected"),
        (lambda w: w.update({"lmp.cross.query": torch.zeros(15)}), r"has shape (15,), the model's is (16,)"),
    ],
)
def test_wrong_tensors_are_refused(
    make_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[dict[str, Tensor]], None],
    said: str,
) -> None:
    make_run(spoil=spoil)
    assert said in refused(capsys, tmp_path)


def test_a_damaged_checkpoint_is_refused(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next(make_run().rglob("state-00001*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "state-00001" in refused(capsys, tmp_path)


def test_a_checkpoint_that_does_not_describe_its_features_is_refused(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(drop="encoders")
    assert "lacks data.encoders" in refused(capsys, tmp_path)


def test_aliased_tensors_are_found() -> None:
    whole = torch.zeros(10)
    assert aliases({"a": whole[:5], "b": whole[5:]}) == []
    assert aliases({"a": whole[:6], "b": whole[5:]}) == [("a", "b")]
    with pytest.raises(UserError, match="a and b share memory"):
        check_tensors({"a": whole, "b": whole}, {"a": whole, "b": whole}, source="test")


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("layers.py", "F.gelu(", "F.relu(", "differs by"),
        ("modeling_lmp.py", "from .attention import", "import lmp\nfrom .attention import", "lmp is not to be had"),
    ],
)
def test_remote_code_that_is_not_the_training_code_is_refused(
    make_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    before: str,
    after: str,
    said: str,
) -> None:
    def copy(source: Path, target: Path) -> None:
        text = source.read_text()
        if source.name == file:
            assert before in text
            text = text.replace(before, after, 1)
        target.write_text(text)

    make_run()
    monkeypatch.setattr(_folder.shutil, "copyfile", copy)
    assert said in refused(capsys, tmp_path)


def test_weights_that_are_not_written_as_they_are(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(weights: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file({name: tensor.half().float() for name, tensor in weights.items()}, file, metadata=metadata)

    make_run()
    monkeypatch.setattr(_folder, "save_file", save)
    assert "was not written as it is" in refused(capsys, tmp_path)


def test_an_interrupted_export_leaves_nothing(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    make_run()
    monkeypatch.setattr(export_huggingface, "prove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_huggingface.main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_differences_that_are_no_numbers_are_no_match() -> None:
    one = torch.zeros(3)
    assert largest_difference(one, one + 0.5) == 0.5
    assert largest_difference(one, torch.zeros(4)) == float("inf")
    assert not largest_difference(one, torch.tensor([0.0, float("nan"), 0.0])) <= _parity.TOLERANCE


@pytest.mark.parametrize("longest", [1, 3, 512])
def test_the_fixed_input_has_every_case(longest: int) -> None:
    model = make_model(max_positions=longest)
    inputs = fixed_input(model.config)
    assert len(inputs["lengths"]) == 2
    model(**inputs)
    if longest > 11:
        for name in MODALITIES:
            valid, masked = inputs["valid"][name], inputs["masked"][name]
            assert (~valid).any(), name
            assert masked.any(), name
            assert (valid & ~masked).any(), name
        assert not inputs["valid"]["audio"][: inputs["lengths"][0]].any()
