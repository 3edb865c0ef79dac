"""`lmp doctor parity` tells how far several processes are from one, and judges it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import config_of, make_shards, run, write_config


@pytest.mark.multiprocess
def test_topologies_differ_by_rounding_and_no_more(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    config = write_config(tmp_path / "config.yaml", config_of(shards, model={"width": 128}))
    strict = ["--run", str(tmp_path / "run"), "--tolerance", "1e-12"]
    ended = run("doctor", "parity", str(config), *strict, module="lmp.cli")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "shrunk: model.width 128 -> 64" in ended.stdout
    report = json.loads((tmp_path / "run/parity.json").read_text())
    assert report["alike"] is False and "NOT ALIKE within 1e-12" in ended.stdout
    assert [difference["topology"] for difference in report["differences"]] == [
        "2 data x 1 sequence ranks, ZeRO 1",
        "2 data x 1 sequence ranks, ZeRO 3",
        "1 data x 2 sequence ranks, ZeRO 1",
    ]
    for difference in report["differences"]:
        assert len(difference["loss"]) == len(difference["weights"]) == 5
        assert 1e-12 < max(difference["loss"] + difference["weights"]) < 1e-4
    assert not (tmp_path / "run/checkpoints").exists(), "the compared runs are not the run"


def test_a_mistake_in_the_configuration_is_one_line(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", config_of(tmp_path / "nowhere"))
    ended = run("doctor", "parity", str(config), "--run", str(tmp_path / "run"), module="lmp.cli")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and "nowhere" in ended.stderr and len(ended.stderr.splitlines()) == 1
