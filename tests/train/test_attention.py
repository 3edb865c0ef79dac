"""`train.attention`: checked at the start, used by every process, and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lmp.cli import main
from lmp.config import validate
from lmp.errors import UserError
from lmp.model import Segments, attention
from lmp.parallel.ulysses import UlyssesAttention
from lmp.train.trainer import attention_of
from tests.runs import config_of, make_shards, write_config


@pytest.mark.parametrize("name", ["varlen", "flash2", "flash3", "flash4"])
def test_what_cannot_be_used_is_a_users_error(name: str) -> None:
    config = validate(config_of(Path("shards"), train={"attention": name}), source="test")
    with pytest.raises(UserError, match=f"attention={name}: .* runs on CUDA devices only, not on cpu -> take"):
        attention_of(config, torch.device("cpu"))


def test_unknown_names_are_a_fault_of_the_configuration() -> None:
    with pytest.raises(UserError, match=r"train\.attention: input should be 'auto', 'sdpa', 'varlen', 'flash2'"):
        validate(config_of(Path("shards"), train={"attention": "flash"}), source="test")


def test_a_run_tells_its_choice_or_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = make_shards(tmp_path / "shards")
    config = write_config(tmp_path / "config.yaml", config_of(shards, train={"steps": 1}))
    assert main(["train", str(config), "train.attention=flash4", "--run", str(tmp_path / "refused")]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: train.attention=flash4: ")
    assert told.endswith("take auto, or one that `lmp doctor` calls available")
    assert not (tmp_path / "refused" / "config.yaml").exists()
    assert main(["train", str(config), "--run", str(tmp_path / "run")]) == 0
    assert "ZeRO 1, attention by sdpa" in " ".join(capsys.readouterr().err.split())
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert next(line for line in ledger if line["event"] == "start")["attention"] == "sdpa"


def test_sequence_parallelism_uses_the_chosen_function() -> None:
    calls: list[tuple[int, ...]] = []

    def chosen(q_THC: Tensor, *args: Tensor, **segments: Any) -> Tensor:
        calls.append(tuple(q_THC.shape))
        return attention(q_THC, *args, **segments)

    segments = Segments.from_lengths([3, 4])
    x = torch.randn(7, 2, 4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        attend = UlyssesAttention(dist.group.WORLD, chosen)
        out = attend(x, x, x, q_segments=segments, k_segments=segments)
    finally:
        dist.destroy_process_group()
    assert calls == [(7, 2, 4)]
    torch.testing.assert_close(out, attention(x, x, x, q_segments=segments, k_segments=segments))
