"""What the planner promises: what fits fits, more costs more, and one clear error for what it does not know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmp.cli import main
from lmp.config import validate
from lmp.errors import UserError
from lmp.scaling.devices import DEVICES, GIB, find_device
from lmp.scaling.memory import Choice, predict_memory
from lmp.scaling.plan_inputs import Inputs, parse_modalities, setting_of
from lmp.scaling.planner import (
    Calibration,
    Setting,
    choices,
    config_choice,
    estimate,
    longest_pack,
    overrides,
    plan,
    recommended,
)

MODALITIES = {"video": {"tokens": 1, "width": 512}, "audio": {"tokens": 2, "width": 896}}


def setting(*, gib: float = 80.0, nodes: int = 1, per_node: int = 8, shots: Any = None, **sections: Any) -> Setting:
    raw: dict[str, Any] = {
        "data": {"train": ["nowhere"], "pack_shots": 4096, "packs_per_step": 16},
        "model": {"width": 512, "heads": 4, "contextual_layers": 2, "cross_layers": 2},
        "train": {"precision": "bf16"},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    device = find_device(f"some:{gib}:300:100", per_node=per_node)
    inputs = Inputs(MODALITIES, feature_bytes=2, shots_F=shots)
    return setting_of(validate(raw, source="test"), inputs, device, nodes=nodes, per_node=per_node)


CHOICES = st.builds(
    Choice,
    zero=st.integers(1, 3),
    sequence=st.sampled_from([1, 2, 4]),
    checkpointing=st.sampled_from(["none", "selective", "full"]),
    offload=st.booleans(),
    tile_mlp=st.sampled_from([None, 512, 4096]),
    pack_shots=st.integers(1, 2000).map(lambda n: 16 * n),
)


@settings(max_examples=60, deadline=None)
@given(CHOICES, st.sampled_from([1, 8, 64]), st.integers(1, 1000))
def test_more_costs_more(choice: Choice, world: int, more: int) -> None:
    job = replace(setting().job(world), world_size=world)
    here = predict_memory(job, choice)
    longer = predict_memory(job, replace(choice, pack_shots=choice.pack_shots + 16 * more))
    assert longer.peak >= here.peak and longer.kept > here.kept
    kept = [predict_memory(job, replace(choice, checkpointing=mode)).kept for mode in ("full", "selective", "none")]
    if not choice.offload:
        assert kept[0] <= kept[1] <= kept[2]
    tiled = predict_memory(job, replace(choice, tile_mlp=512))
    assert tiled.kept <= predict_memory(job, replace(choice, tile_mlp=None)).kept


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 8, 64]), st.booleans(), st.integers(10_000, 10**9))
def test_a_higher_stage_keeps_no_more_of_the_model(world: int, bf16: bool, parameters: int) -> None:
    """Parameters, gradients and optimizer; what stage 3 gathers for a moment and buckets are left out.

    One rank is no example: with nothing to share, the fp32 copies of stages 1-3 come on top.
    """
    from lmp.scaling.memory import MAX_LIVE, model_states

    kept = []
    for zero in range(4):
        states = model_states(parameters, parameters, zero=zero, bf16=bf16, world_size=world, accumulates=False)
        gathered = (2 if bf16 else 4) * min(parameters, MAX_LIVE) if zero == 3 and world > 1 else 0
        kept.append(states.parameters - gathered + states.gradients + states.optimizer)
    stages = kept[1:] if bf16 else kept
    assert stages == sorted(stages, reverse=True)


@settings(max_examples=12, deadline=None)
@given(st.floats(4.0, 100.0), st.sampled_from([(1, 1), (1, 8), (2, 8)]))
def test_what_fits_is_below_the_limit(gib: float, shape: tuple[int, int]) -> None:
    here = setting(gib=gib, nodes=shape[0], per_node=shape[1])
    for choice in list(choices(here, 4096))[::11]:
        found = estimate(here, choice)
        assert here.model.heads % choice.sequence == 0 and here.world_size % choice.sequence == 0
        if found.fits:
            assert found.memory.peak <= here.device.limit and found.memory.host <= here.device.host_gib * GIB
        if found.longest:
            job = here.job(here.world_size // choice.sequence)
            at_limit = predict_memory(job, replace(choice, pack_shots=found.longest))
            assert at_limit.peak <= here.device.limit and found.longest % choice.sequence == 0


def test_sorts_what_fits_before_what_does_not_and_recommends_the_fastest() -> None:
    here = setting(data={"pack_shots": 2**20, "packs_per_step": 8})
    found = plan(here)
    fits = [e.fits for e in found]
    assert any(fits) and not all(fits) and fits == sorted(fits, reverse=True)
    assert all("GiB" in (e.problem or "") for e in found if not e.fits)
    best = recommended(here, found)
    assert best is not None and best.seconds <= 1.01 * min(e.seconds for e in found if e.fits)
    # The overrides are what makes the configuration say the choice.
    words = dict(word.split("=") for word in overrides(here, best))
    assert words.get("memory.checkpointing", config_choice(here.config).checkpointing) == best.choice.checkpointing


def test_keeps_the_configuration_where_nothing_is_faster() -> None:
    here = setting(per_node=1, data={"pack_shots": 1024, "packs_per_step": 8})
    best = recommended(here, plan(here))
    assert best is not None and overrides(here, best) == []


def test_says_why_packs_cannot_be_dealt() -> None:
    here = setting(data={"packs_per_step": 4})
    found = estimate(here, Choice(1, 1, "none", False, None, 4096))
    assert not found.fits and "cannot be dealt evenly to 8" in (found.problem or "")


def test_checkpoints_make_longer_packs_possible() -> None:
    here = setting()
    longest = [
        longest_pack(here, Choice(1, 1, mode, False, None, 4096))  # type: ignore[arg-type]
        for mode in ("none", "selective", "full")
    ]
    assert 0 < longest[0] < longest[1] <= longest[2]


def test_calibration_replaces_what_is_assumed() -> None:
    here, choice = setting(), Choice(1, 1, "none", False, None, 4096)
    plain = estimate(here, choice, longest=False)
    slower = replace(here, calibration=Calibration(time=2.0, extra=100 * GIB, source="run"))
    slow = estimate(slower, choice, longest=False)
    assert slow.seconds == pytest.approx(2 * plain.seconds) and slow.mfu == pytest.approx(plain.mfu / 2)
    assert plain.fits and not slow.fits


@pytest.mark.parametrize("spec", ["b100", "x:1:2", "x:a:b:c", "x:80:-1:5", ":80:300:50"])
def test_an_unknown_device_is_one_clear_error(spec: str) -> None:
    with pytest.raises(UserError, match="no such device") as error:
        find_device(spec, per_node=8)
    assert all(name in str(error.value) for name in DEVICES)


@pytest.mark.parametrize("spec", ["video", "video=512", "video=1x", "=1x5", "video=0x5", "video=1x512,"])
def test_modalities_that_cannot_be_read(spec: str) -> None:
    with pytest.raises(UserError, match="NAME=TOKENSxWIDTH"):
        parse_modalities(spec)


CONFIG = "data: {train: [nowhere], pack_shots: 1024, packs_per_step: 16}\nmodel: {width: 64, heads: 4}\n"


def test_command_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    assert main(["plan", str(path), "train.precision=bf16"]) == 2
    assert "--modalities" in capsys.readouterr().err
    words = ["plan", str(path), "--modalities", "video=1x512,text=2x768", "--gpu", "a100", "--nodes", "2"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "assumed: peak 19.5" in told and "recommended:" in told and "longest pack:" in told
    assert main([*words, "--json", "--packs", "1024,2048"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["world_size"] == 16 and {c["pack_shots"] for c in report["choices"]} == {1024, 2048}
    assert report["recommended"]["fits"] and report["assumptions"]["name"] == "a100"
    # Nothing fits: said, and not a success.
    assert main(["plan", str(path), "--modalities", "video=1x512,text=1x8", "--gpu", "tiny:0.01:10:10"]) == 2
    assert "nothing fits" in capsys.readouterr().out
