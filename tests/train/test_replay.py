"""Steps of a run made again, and runs that go on with other data."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmp.cli import main
from lmp.config import load_config
from lmp.data.index import FilmIndex
from lmp.data.loader import PackLoader
from lmp.data.quarantine import quarantine
from lmp.errors import UserError
from lmp.train.data import plan_settings
from lmp.train.replay import replay
from tests.runs import config_of, make_shards, metrics, run, write_config


def trained(config: Path, folder: Path, *options: str, code: int = 0) -> str:
    ended = run("train", str(config), "--run", str(folder), *options, module="lmp.cli")
    assert ended.returncode == code, ended.stderr[-3000:]
    return ended.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Shards, a configuration, and its run of 4 steps over several epochs, stopped and continued to 9."""
    folder = tmp_path_factory.mktemp("replay")
    shards = make_shards(folder / "shards", films=9)
    config = write_config(folder / "config.yaml", config_of(shards, train={"steps": 9}, checkpoint={"every_steps": 4}))
    trained(config, folder / "run", "train.steps=4")
    trained(config, folder / "run")
    return shards, config, folder / "run"


def test_every_step_is_made_again_as_it_was(world: tuple[Path, Path, Path]) -> None:
    shards, config_file, folder = world
    config = load_config(config_file)
    index = FilmIndex.load(shards)
    with PackLoader(index, plan_settings(config, index)) as loader:
        steps = list(itertools.islice(loader, 9))
    assert steps[-1].cursor.epoch >= 2
    for line, batch in zip(metrics(folder), steps, strict=True):
        found = replay(folder, line["step"])
        assert found.cursor == batch.cursor
        assert found.logged == found.fingerprint == line["data"]
        for pack in batch.packs:
            tensors = found.tensors(pack.slot)
            assert torch.equal(tensors["film_P"], pack.film_P) and torch.equal(tensors["shot_P"], pack.shot_P)
            assert all(torch.equal(tensors[name], pack.features[name]) for name in pack.features)
            masked = tensors["video_masked"]
            assert not (masked & ~pack.valid["video"]).any()


def test_the_command_names_films_and_writes_tensors(
    world: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step.safetensors"
    assert main(["data", "replay", str(world[2]), "--step", "6", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    found = replay(world[2], 6)
    assert said[0] == (
        f"step 6: epoch {found.cursor.epoch}, step {found.cursor.step}, 4 packs, "
        f"data {found.fingerprint} (as the run logged)"
    )
    first = found.packs[0].windows[0]
    assert said[1].startswith(f"slot 0, pack {found.packs[0].epoch}/{found.packs[0].number}: ")
    assert f"{found.index.keys[first.film]} {first.start}:{first.stop}" in said[1]
    tensors = load_file(out)
    assert torch.equal(tensors["3/audio"], found.tensors(3)["audio"])
    assert {name.split("/")[0] for name in tensors} == {"0", "1", "2", "3"}


def test_a_step_to_come(world: tuple[Path, Path, Path]) -> None:
    found = replay(world[2], 500)
    assert found.logged is None and found.lines()[0].endswith("(not made yet)")


def test_what_cannot_be_replayed(world: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        replay(tmp_path, 1)
    with pytest.raises(UserError, match="numbered from 1"):
        replay(world[2], 0)
    other = make_shards(tmp_path / "other", films=9, seed=5)
    with pytest.raises(UserError, match="step 3 was made from other data"):
        replay(world[2], 3, [f"data.train=[{other}]"])


def test_a_plan_that_is_not_what_was_logged_is_refused(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder / "config.yaml", config_of(shards))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "data": "00000000"}) + "\n")
    with pytest.raises(UserError, match="the run logged 00000000"):
        replay(folder, 2)


def test_a_run_goes_on_with_other_data_only_when_told_to(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards", films=9)
    folder = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", config_of(shards, train={"steps": 3}))
    trained(config, folder)
    before = replay(folder, 3)
    quarantine(str(shards), {"film-0-004": "test"})
    assert "or go on with --new-data" in trained(config, folder, "train.steps=6", code=2)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    mixed = f"data.train=[{{shards: {shards}, passes: 2}}]"
    trained(config, folder, "train.steps=6", "--new-data", mixed)
    assert [line["step"] for line in metrics(folder)] == list(range(1, 7))
    after = replay(folder, 4)
    assert after.logged == after.fingerprint
    assert (after.cursor.epoch, after.cursor.step, after.cursor.carried) == (before.cursor.epoch + 1, 0, 0)
    assert "film-0-004" not in after.index.keys
    with pytest.raises(UserError, match="step 3 was made from other data"):
        replay(folder, 3)
    # The mixture is part of what a run cannot change unnoticed.
    assert "passes was [2.0], is [1.0]" in trained(config, folder, "train.steps=7", code=2)
