"""The proof of conversion: trained by ZeRO-3 on two processes with a tied weight, exported, loaded without lmp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmp.data.index import FilmIndex
from lmp.model import LmpForPretraining
from lmp.train.checkpoint import load_trained
from tests.runs import config_of, make_shards, write_config
from tests.tools.tied_worker import FIRST, TIED, tie
from tests.workers import run_ranks
from tools import export_features, export_huggingface, export_state_dict
from tools._source import digests


@pytest.mark.multiprocess
def test_from_zero3_to_a_process_without_lmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(tmp_path / "shards")
    train = {"steps": 3, "log_every": 1}
    config = config_of(shards, train=train, parallel={"zero": 3}, model={"positions": "learned", "max_positions": 32})
    write_config(tmp_path / "config.yaml", config)
    assert [rank["finished"] for rank in run_ranks("tests.tools.tied_worker", tmp_path)] == [True, True]
    run = tmp_path / "run"

    monkeypatch.setattr(LmpForPretraining, "__init__", tie(LmpForPretraining.__init__))
    trained = load_trained(run)
    assert trained.manifest["topology"] == {"world_size": 2, "sequence": 1, "zero": 3}
    assert f"lmp.{FIRST}" in trained.weights
    assert f"lmp.{TIED}" not in trained.weights

    # The export itself loads the folder in a process without lmp and compares tensors and outputs.
    assert export_huggingface.main([str(run), str(tmp_path / "model")]) == 0
    facts = json.loads((tmp_path / "model" / "fingerprint.json").read_text())
    assert facts["ties"] == {TIED: FIRST}
    assert facts["largest_difference"] <= 1e-5
    exported = load_file(tmp_path / "model" / "model.safetensors")
    wanted = {name.removeprefix("lmp."): t for name, t in trained.weights.items() if name.startswith("lmp.")}
    wanted[TIED] = wanted[FIRST]
    assert digests(exported) == digests(wanted)
    assert {name: (t["numel"], t["sha256"]) for name, t in facts["tensors"].items()} == digests(wanted)

    out = tmp_path / "text.pt"
    assert export_state_dict.main([str(run), str(out), "--part", "text", "--prefix", "backbone."]) == 0
    assert torch.equal(torch.load(out, weights_only=True)[f"backbone.{TIED}"], wanted[TIED])

    assert export_features.main([str(run), str(tmp_path / "features"), str(shards), "--format", "h5"]) == 0
    told = json.loads((tmp_path / "features" / "features.json").read_text())
    assert (told["films"], told["window"], told["overlap"]) == (len(FilmIndex.load(shards)), 32, 8)
