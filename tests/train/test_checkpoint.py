"""Checkpoints of a real run: what is found wrong with damaged ones, and how weights are loaded."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmp.errors import UserError
from lmp.model import LmpForPretraining
from lmp.train.checkpoint import found, load_trained, newest_valid, read_manifest, verify
from lmp.train.run_folder import RunFolder
from tests.runs import config_of, make_shards, run, write_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    shards = make_shards(folder / "shards")
    sections = {"train": {"steps": 4}, "checkpoint": {"every_steps": 2}}
    config = write_config(folder / "run.yaml", config_of(shards, **sections))
    ended = run(str(config), "-n", "2", "--run", str(folder / "run"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder / "run"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def newest(run_folder: Path) -> Path:
    return found(RunFolder(run_folder))[0]


def state_file(checkpoint: Path) -> Path:
    return min(checkpoint.glob("*.safetensors"))


def flip(checkpoint: Path) -> None:
    content = bytearray(state_file(checkpoint).read_bytes())
    content[-5] ^= 1
    state_file(checkpoint).write_bytes(content)


def truncate(checkpoint: Path) -> None:
    state_file(checkpoint).write_bytes(state_file(checkpoint).read_bytes()[:-1])


def remove(checkpoint: Path) -> None:
    state_file(checkpoint).unlink()


def spoil_manifest(checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8")[:-20], encoding="utf-8")


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def other_format(checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}), encoding="utf-8")


DAMAGES = [
    (flip, "sha256"),
    (truncate, "bytes instead of"),
    (remove, "is missing"),
    (spoil_manifest, "manifest.json cannot be read"),
    (remove_manifest, "manifest.json cannot be read"),
    (other_format, "format 99"),
]


def test_good_checkpoints_have_no_fault(trained: Path) -> None:
    checkpoints = found(RunFolder(trained))
    assert [path.name for path in checkpoints] == ["step-00000004", "step-00000002"]
    assert [verify(path) for path in checkpoints] == [[], []]


@pytest.mark.parametrize(("damage", "told"), DAMAGES, ids=lambda x: getattr(x, "__name__", ""))
def test_damage_is_found_and_passed_over(copy: Path, damage, told: str) -> None:
    checkpoint = newest(copy)
    damage(checkpoint)
    (fault,) = verify(checkpoint)
    assert told in fault
    assert checkpoint.name in fault
    path, passed_over = newest_valid(RunFolder(copy))
    assert path is not None
    assert path.name == "step-00000002"
    assert passed_over == [fault]


def test_any_damage_of_any_file_is_told_in_one_line(copy: Path) -> None:
    folder, checkpoint, draw = RunFolder(copy), newest(copy), random.Random(5)
    files = sorted(checkpoint.iterdir())
    assert len(files) == 3, "two ranks and a manifest"
    for file in files:
        content = file.read_bytes()
        damaged = [content[: draw.randrange(len(content))], content + b" ", b"", None]
        for _ in range(40):
            place = draw.randrange(len(content))
            damaged.append(content[:place] + bytes([content[place] ^ draw.randint(1, 255)]) + content[place + 1 :])
        for number, spoilt in enumerate(damaged):
            if spoilt is None:
                file.unlink()
            else:
                file.write_bytes(spoilt)
            path, passed_over = newest_valid(folder)
            assert path is not None, (file.name, number)
            assert path.name == "step-00000002"
            assert len(passed_over) == 1, passed_over
            assert "\n" not in passed_over[0]
        file.write_bytes(content)
    assert newest_valid(folder) == (checkpoint, [])


def test_the_files_are_safetensors_of_the_whole_state(trained: Path) -> None:
    shapes = {name: torch.Size(t["shape"]) for name, t in read_manifest(newest(trained))["tensors"].items()}
    values: Counter[tuple[str, str]] = Counter()
    for file in newest(trained).glob("*.safetensors"):
        for key, fragment in load_file(file).items():
            name, part = key.split("@")[0].rsplit("/", 1)
            values[name, part] += fragment.numel()
    parts = ("weight", "exp_avg", "exp_avg_sq")
    assert values == {(name, part): shape.numel() for name, shape in shapes.items() for part in parts}


def test_the_older_format_is_told_by_its_number(copy: Path) -> None:
    (newest(copy) / "manifest.json").write_text(json.dumps({"format": 2, "files": {}, "tensors": {"w": [1]}}))
    assert verify(newest(copy)) == ["step-00000004: is of format 2, this lmp reads format 3"]


def test_an_unfinished_checkpoint_is_never_seen(copy: Path) -> None:
    (copy / "checkpoints" / "step-00000009.tmp").mkdir()
    assert newest(copy).name == "step-00000004"


def test_load_trained_gives_a_whole_model(trained: Path) -> None:
    loaded = load_trained(trained, require_finished=True)
    assert (loaded.step, loaded.finished) == (4, True)
    assert all(weight.dtype == torch.float32 for weight in loaded.weights.values())
    model = LmpForPretraining(loaded.config)
    assert loaded.weights.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(loaded.weights, strict=False)
    assert load_trained(trained, step=2).step == 2


def test_load_trained_falls_back(copy: Path) -> None:
    flip(newest(copy))
    assert load_trained(copy).step == 2


def test_load_trained_refuses_what_it_cannot_give(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        load_trained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"of step 3 \(there are: 4, 2\)"):
        load_trained(copy, step=3)
    (copy / "DONE").unlink()
    with pytest.raises(UserError, match="not finished"):
        load_trained(copy, require_finished=True)
    assert not load_trained(copy).finished
    for checkpoint in found(RunFolder(copy)):
        flip(checkpoint)
    with pytest.raises(UserError, match=r"no valid checkpoint.*sha256"):
        load_trained(copy)


def test_metrics_of_steps_to_be_made_again_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 9)]
    folder.metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder.drop_metrics_after(5)
    assert folder.metrics.read_text(encoding="utf-8").splitlines() == lines[:5]


def test_a_metrics_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo', encoding="utf-8")
    folder.drop_metrics_after(10)
    assert folder.metrics.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'
