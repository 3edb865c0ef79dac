"""Configurations: every fault at once, each naming its key; extends, overrides, and what the commands show."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.study.config import load_study
from lmp.cli import main
from lmp.config import Config, check_run, config_help, load_config, validate
from lmp.errors import UserError
from tests.runs import ROOT, config_of, write_config

MODALITIES = {"video": None, "audio": None, "text": None}


def built(**sections: Any) -> Config:
    return validate(config_of(Path("shards"), **sections), source="test")


def problem_of(**sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        built(**sections)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    return caught.value.problem


def zero_offload(stage: int, kind: str, **keys: Any) -> dict[str, Any]:
    return {"zero": stage, "deepspeed": {"zero_optimization": {kind: {"device": "cpu", **keys}}}}


@pytest.mark.parametrize(
    ("sections", "key", "meant"),
    [
        ({"trian": {}}, "trian", "train"),
        ({"model": {"widht": 8}}, "model.widht", "width"),
        ({"objectives": {"masked_shot": {"ration": 0.2}}}, "objectives.masked_shot.ration", "ratio"),
        ({"data": {"train": ["a", {"shards": "b", "wieght": 2}]}}, "data.train.1.wieght", "weight"),
        ({"data": {"cache": {"foldr": "x"}}}, "data.cache.foldr", "folder"),
        (
            {"parallel": {"deepspeed": {"zero_optimisation": {}}}},
            "parallel.deepspeed.zero_optimisation",
            "zero_optimization",
        ),
    ],
)
def test_unknown_key_names_the_nearest(sections: dict[str, Any], key: str, meant: str) -> None:
    problem = problem_of(**sections)
    assert f"{key}: " in problem
    assert f"did you mean {meant}?" in problem
    assert "1 fault:" in problem


def test_unknown_key_like_no_other_lists_what_there_is() -> None:
    assert "there are every_steps, every_minutes, keep" in problem_of(checkpoint={"zzz": 1})


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"train": {"steps": "many"}}, "train.steps"),
        ({"train": {"steps": 0}}, "train.steps"),
        ({"train": {"precision": "fp8"}}, "train.precision"),
        ({"data": {"train": "shards"}}, "data.train"),
        ({"data": {"train": []}}, "data.train"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"model": 5}, "model"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_wrong_value_names_its_key(sections: dict[str, Any], key: str) -> None:
    assert f"1 fault: {key}" in problem_of(**sections)


def test_all_faults_at_once() -> None:
    problem = problem_of(
        model={"width": 30, "heads": 4, "widht": 3},
        train={"steps": "many"},
        parallel={"deepspeed": {"bfl16": {}}},
    )
    assert "4 faults" in problem
    for part in ("model.widht", "train.steps", "model.width=30", "parallel.deepspeed.bfl16"):
        assert part in problem


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"width": 30}}, "model.width=30 is not a multiple of model.heads=4"),
        ({"parallel": {"sequence": 8}}, "model.heads=4 is not a multiple of parallel.sequence=8"),
        ({"data": {"pack_shots": 33}, "parallel": {"sequence": 2}}, "data.pack_shots=33 is not a multiple"),
        ({"parallel": {"zero": 0}, "train": {"precision": "bf16"}}, "parallel.zero=0 with train.precision=bf16"),
        ({"model": {"positions": "learned", "max_positions": 31}}, "model.max_positions=31"),
        ({"model": {"sources": ["video", "text"]}}, "model.sources holds model.target=video"),
        ({"checkpoint": {"every_steps": None}}, "nothing would be saved"),
        ({"data": {"train": ["a", {"shards": "b", "weight": 1}]}}, "data.train.0: has no weight, others have"),
        ({"data": {"train": [{"shards": "b", "weight": 1, "passes": 2}]}}, "data.train.0: has weight and passes"),
        ({"data": {"train": [{"shards": "b", "passes": 0.5}]}}, "data.train: passes are all below 1"),
        (
            {"parallel": {"deepspeed": {"zero_optimization": {"stage": 3}}}},
            "parallel.deepspeed.zero_optimization.stage=3 clashes with 1",
        ),
        ({"cluster": {"time": 2, "signal_seconds": 90}}, "cluster.time=2 with cluster.signal_seconds=90"),
        ({"cluster": {"gpus_per_node": 2, "tasks_per_node": 4}}, "processes cannot share a GPU"),
        ({"cluster": {"sbatch": {"--requeue": True}}}, "cluster.sbatch.--requeue: use nothing: lmp sets it"),
        ({"memory": {"offload": True}}, "memory.offload=true with memory.checkpointing=none"),
        ({"train": {"compile": True}, "parallel": {"zero": 3}}, "train.compile=true with parallel.zero=3"),
        ({"parallel": zero_offload(0, "offload_optimizer")}, "ignores it with parallel.zero=0"),
        ({"parallel": zero_offload(2, "offload_param")}, "ignores it with parallel.zero=2 (use parallel.zero=3)"),
        ({"parallel": zero_offload(3, "offload_param", device="nvme")}, "offload_param.device=nvme: lmp's checkpoints"),
        ({"parallel": zero_offload(3, "offload_optimizer", super_offload=True)}, "offload_optimizer.super_offload"),
        ({"parallel": {"deepspeed": {"gradient_accumulation_steps": 4}}}, "gradient_accumulation_steps=4 clashes"),
        ({"parallel": {"deepspeed": {"bf16": {"enabled": True}}}}, "parallel.deepspeed.bf16.enabled=True clashes"),
    ],
)
def test_contradictions(sections: dict[str, Any], words: str) -> None:
    problem = problem_of(**sections)
    assert "1 fault:" in problem
    assert words in problem


def test_harmless_deepspeed_keys_pass() -> None:
    more = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    assert built(parallel={"deepspeed": more}).parallel.deepspeed == more


def test_extends_is_relative_to_its_file_and_later_bases_win(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write_config(tmp_path / "base/first.yaml", config_of(Path("shards"), train={"steps": 7}))
    write_config(tmp_path / "base/second.yaml", {"extends": "third.yaml", "train": {"log_every": 2}})
    write_config(tmp_path / "base/third.yaml", {"train": {"steps": 8, "log_every": 3}})
    own = {"extends": ["base/first.yaml", "base/second.yaml"], "model": {"heads": 2}}
    config = load_config(write_config(tmp_path / "own.yaml", own))
    assert (config.train.steps, config.train.log_every) == (8, 2)
    assert (config.model.heads, config.model.width, config.data.pack_shots) == (2, 32, 32)


@pytest.mark.parametrize("bases", ["own.yaml", "other.yaml"])
def test_extends_in_a_circle(tmp_path: Path, bases: str) -> None:
    write_config(tmp_path / "other.yaml", {"extends": "own.yaml"})
    with pytest.raises(UserError, match="extends itself"):
        load_config(write_config(tmp_path / "own.yaml", {"extends": bases}))


def test_one_base_by_two_ways_is_no_circle(tmp_path: Path) -> None:
    write_config(tmp_path / "root.yaml", config_of(Path("shards")))
    for name in ("a", "b"):
        write_config(tmp_path / f"{name}.yaml", {"extends": "root.yaml"})
    assert load_config(write_config(tmp_path / "own.yaml", {"extends": ["a.yaml", "b.yaml"]})).name == "test"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: nowhere.yaml", "nowhere.yaml: no such configuration file"),
        ("extends: 5", "own.yaml: extends is not"),
        ("extends: [5]", "own.yaml: extends is not"),
        ("extends: {a: b}", "own.yaml: extends is not"),
        ("- a", "own.yaml: holds a list"),
        ("a: b\nc: [", "own.yaml, line 2: not valid YAML"),
        ("1: 2", "own.yaml: "),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "own.yaml")
    assert words in caught.value.problem


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write_config(tmp_path / "small.yaml", {})
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "smal.yaml")
    assert "small.yaml?" in caught.value.remedy


def test_overrides(tmp_path: Path) -> None:
    path = write_config(tmp_path / "own.yaml", config_of(Path("shards")))
    overrides = [
        "train.steps=9",
        "data.train=[a, b]",
        "model.sources=null",
        "optimizer.lr=1.0e-2",
        "parallel.deepspeed.zero_optimization.reduce_bucket_size=5",
        "name=other",
        "train.steps=11",
    ]
    config = load_config(path, overrides)
    assert (config.train.steps, config.train.log_every, config.name) == (11, 5, "other")
    assert ([entry.shards for entry in config.data.train], config.data.pack_shots) == (["a", "b"], 32)
    assert (config.model.sources, config.optimizer.lr) == (None, 0.01)
    assert config.parallel.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5}}


@pytest.mark.parametrize(
    ("written", "minutes"),
    [("90", 90), ("1:30", 2), ("12:00:00", 720), ("1-00:00:00", 1440), ("1-12", 2160), ("'00:05:00'", 5)],
)
def test_a_time_limit_is_read_as_slurm_reads_it(tmp_path: Path, written: str, minutes: int) -> None:
    path = write_config(tmp_path / "own.yaml", config_of(Path("shards"), cluster={"signal_seconds": 10}))
    assert load_config(path, [f"cluster.time={written}"]).cluster.minutes == minutes
    path.write_text(path.read_text().replace("signal_seconds", f"time: {written}\n  signal_seconds"))
    assert load_config(path).cluster.minutes == minutes


@pytest.mark.parametrize("written", ["0", "soon", "1:99", "-5", "true"])
def test_a_time_limit_that_is_none(tmp_path: Path, written: str) -> None:
    path = write_config(tmp_path / "own.yaml", config_of(Path("shards")))
    with pytest.raises(UserError, match=r"1 fault: cluster\.time: "):
        load_config(path, [f"cluster.time={written}"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.steps"], "'train.steps' is not of the form"),
        (["=5"], "is not of the form"),
        (["data.train=[a"], "the value is not valid YAML"),
        (["train.stesp=5"], "train.stesp: no such key, did you mean steps?"),
        (["train.steps.more=5"], "train.steps"),
        (["train..steps=5"], "train."),
    ],
)
def test_overrides_that_cannot_be(tmp_path: Path, overrides: Sequence[str], words: str) -> None:
    path = write_config(tmp_path / "own.yaml", config_of(Path("shards")))
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert words in caught.value.problem


@pytest.mark.parametrize(
    ("sections", "world_size", "words"),
    [
        ({"data": {"packs_per_step": 4}}, 3, "data.packs_per_step=4 cannot be dealt evenly to 3"),
        ({"parallel": {"sequence": 2}}, 3, "parallel.sequence=2 does not divide the 3 processes"),
        ({"model": {"target": "vidio"}}, 1, "model.target: no such modality of the data set, did you mean video?"),
        ({"model": {"sources": ["smell"]}}, 1, "there are video, audio, text"),
    ],
)
def test_a_run_is_held_against_ranks_and_data(sections: dict[str, Any], world_size: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_run(built(**sections), world_size=world_size, modalities=MODALITIES)
    assert words in caught.value.problem


def test_a_run_that_fits() -> None:
    check_run(built(parallel={"sequence": 2}), world_size=8, modalities=MODALITIES)


def test_a_run_needs_two_modalities() -> None:
    with pytest.raises(UserError, match="at least one source"):
        check_run(built(), world_size=1, modalities={"video": None})


def test_shown_configuration_loads_as_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "own.yaml", config_of(Path("shards"), parallel={"zero": 2}))
    assert main(["config", "show", str(path), "train.steps=9", "optimizer.lr=1e-4"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    shown = load_config(tmp_path / "shown.yaml")
    assert shown == load_config(path, ["train.steps=9", "optimizer.lr=1e-4"])
    assert (shown.train.steps, shown.optimizer.lr, shown.parallel.zero) == (9, 1e-4, 2)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    if path.parent.name == "studies":
        load_study(path)
        return
    # Those in subfolders are parts to extend from and name no data.
    part = path.parent != ROOT / "configs"
    load_config(path, ["data.train=[shards]"] if part else [])


def test_keys_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
        found = []
        for name, value in tree.items():
            found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name]
        return found

    assert main(["config", "keys"]) == 0
    printed = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == leaves(yaml.safe_load(built().dump()))
    assert printed == [key for key, _, _ in config_help()]


def test_output_that_nobody_reads_to_the_end_is_no_fault() -> None:
    command = [sys.executable, "-m", "lmp.cli", "config", "keys"]
    told = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert told.stdout is not None and told.stderr is not None
    told.stdout.close()
    assert told.stderr.read() == b""
    assert told.wait() == 128 + signal.SIGPIPE
    assert subprocess.run(command, capture_output=True, cwd=ROOT, check=True).stderr == b""
