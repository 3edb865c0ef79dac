"""What a run folder refuses to go on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lmp.config import Config, validate
from lmp.errors import UserError
from lmp.train.run_folder import RunFolder


def config_of(**sections: Any) -> Config:
    return validate({"data": {"train": ["shards"]}, **sections}, source="test")


@pytest.mark.parametrize("change", [{"loss": "sigmoid"}, {"scope": "step"}, {"exclude_near": 2}])
def test_a_run_keeps_what_its_loss_means(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path)
    folder.open(config_of())
    folder.check_same_run(config_of(train={"steps": 7}))
    key, value = next(iter(change.items()))
    with pytest.raises(UserError, match=rf"objectives\.{key} was .*, is {value!r}"):
        folder.check_same_run(config_of(objectives=change))


def test_a_key_that_was_not_there_yet_had_its_default(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open(config_of())
    written = yaml.safe_load(folder.config.read_text())
    del written["objectives"]["scope"], written["model"]["initial_bias"]
    folder.config.write_text(yaml.safe_dump(written))
    folder.check_same_run(config_of())
    with pytest.raises(UserError, match=r"objectives\.scope was 'pack', is 'film'"):
        folder.check_same_run(config_of(objectives={"scope": "film"}))
