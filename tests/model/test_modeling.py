"""What the model sees and does not see, and what a trainer and a converter rely on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModel

from lmp.model import LmpConfig, LmpForPretraining, LmpModel, attention

from .conftest import small_config, small_input

MakeModel = Callable[..., LmpForPretraining]
MakeInput = Callable[..., dict[str, Any]]
POSITIONS = ["learned", "sinusoidal", "rope", "time_rope"]


def flat(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of an output, by path."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    return {path: x for key, value in tree.items() for path, x in flat(value, f"{prefix}/{key}").items()}


def assert_same(first: Any, second: Any, **tolerance: float) -> None:
    one, other = flat(first), flat(second)
    assert one.keys() == other.keys()
    for path in one:
        torch.testing.assert_close(
            one[path],
            other[path],
            **({"rtol": 0, "atol": 2e-5} | tolerance),
            msg=lambda m, p=path: f"{p}: {m}",
        )


def part(inputs: dict[str, Any], shots: slice) -> dict[str, Any]:
    """The same keyword arguments for some of the shots."""
    return {
        key: value[shots] if isinstance(value, Tensor) else {name: x[shots] for name, x in value.items()}
        for key, value in inputs.items()
    }


def test_shapes_and_unit_lengths(make_model: MakeModel, make_input: MakeInput) -> None:
    model = make_model()
    out = model(**make_input(model.config, 9), lengths=[4, 5])
    for name, spec in model.config.modalities.items():
        assert out.contextual[name].shape == (9, spec["tokens"], 16)
        for space in (out.predicted, out.target, out.aligned):
            assert space[name].shape == (9, spec["tokens"], 8)
            torch.testing.assert_close(space[name].norm(dim=-1), torch.ones(9, spec["tokens"]))
    assert out.cross.shape == (9, 2, 16)
    assert out.reconstructed.shape == (9, 2, 8)
    torch.testing.assert_close(out.reconstructed.norm(dim=-1), torch.ones(9, 2))
    assert sorted(out.scale) == ["alignment", "masked", "reconstruction"]
    for scale in out.scale.values():
        torch.testing.assert_close(scale, torch.tensor([1 / 0.07]))


def test_a_featureless_shot_has_a_direction(make_model: MakeModel) -> None:
    model = make_model(initializer_range=0.02)
    target = model({"audio": torch.full((3, 3, 5), 0.7)}).target["audio"]
    torch.testing.assert_close(target.norm(dim=-1), torch.ones(3, 3))
    target[..., 0].sum().backward()
    assert model.target_projections["audio"].bias.grad.abs().max() < 1e3


@pytest.mark.parametrize("positions", POSITIONS)
def test_segments_do_not_see_each_other(make_model: MakeModel, make_input: MakeInput, positions: str) -> None:
    model = make_model(positions=positions)
    inputs = make_input(model.config, 12)
    packed = model(**inputs, lengths=[5, 1, 6])
    for shots in (slice(0, 5), slice(5, 6), slice(6, 12)):
        alone = model(**part(inputs, shots))
        same = {key: value for key, value in packed.items() if key != "scale"}
        assert_same(part(same, shots), {key: value for key, value in alone.items() if key != "scale"})


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_segments_of_any_length_do_not_see_each_other(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = LmpModel(small_config(positions="rope"))
    inputs = small_input(model.config, sum(lengths), seed)
    packed = model(**inputs, lengths=lengths)
    chosen = seed % len(lengths)
    first = sum(lengths[:chosen])
    shots = slice(first, first + lengths[chosen])
    assert_same(part(dict(packed), shots), dict(model(**part(inputs, shots))))


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_dense_batch_equals_its_packed_form(make_model: MakeModel, make_input: MakeInput, positions: str) -> None:
    model = make_model(positions=positions)
    inputs = make_input(model.config, 12)
    packed = model(**inputs, lengths=[4, 4, 4])
    batch = {
        key: value.unflatten(0, (3, 4))
        if isinstance(value, Tensor)
        else {name: x.unflatten(0, (3, 4)) for name, x in value.items()}
        for key, value in inputs.items()
    }
    dense = model(**batch)
    assert dense.cross.shape == (3, 4, 2, 16)
    assert_same(
        {key: value for key, value in packed.items() if key != "scale"},
        {
            key: {name: x.flatten(0, 1) for name, x in value.items()}
            if isinstance(value, dict)
            else value.flatten(0, 1)
            for key, value in dense.items()
            if key != "scale"
        },
    )


@pytest.mark.parametrize("value", [50.0, float("nan")])
def test_hidden_features_reach_no_output_and_no_gradient(
    make_model: MakeModel, make_input: MakeInput, value: float
) -> None:
    model = make_model()
    inputs = make_input(model.config, 10)

    def run(hidden: float, *, also_masked: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        features = {}
        for name, feature in inputs["features"].items():
            unseen = ~inputs["valid"][name] | (inputs["masked"][name] & also_masked)
            features[name] = torch.where(unseen[:, None, None], hidden, feature)
        out = dict(model(**(inputs | {"features": features}), lengths=[6, 4]))
        if also_masked:  # a masked shot is still a target
            del out["target"]
        model.zero_grad()
        sum(tensor.float().square().sum() for tensor in flat(out).values()).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return flat(out), {name: grad.clone() for name, grad in grads.items()}

    for also_masked in (False, True):
        before, after = run(0.0, also_masked=also_masked), run(value, also_masked=also_masked)
        assert_same(before[0], after[0], atol=0.0)
        assert_same(before[1], after[1], atol=0.0)


def test_masked_differs_from_missing_and_from_seen(make_model: MakeModel, make_input: MakeInput) -> None:
    model = make_model().lmp
    features = make_input(model.config, 4)["features"]
    third = torch.arange(4) == 2
    seen = model(features).contextual["text"]
    masked = model(features, masked={"text": third}).contextual["text"]
    missing = model(features, {"text": ~third}).contextual["text"]
    both = model(features, {"text": ~third}, masked={"text": third}).contextual["text"]
    assert not torch.allclose(seen, masked, atol=1e-3)
    assert not torch.allclose(missing, masked, atol=1e-3)
    assert torch.equal(missing, both)


def test_a_modality_left_out_is_missing_everywhere(make_model: MakeModel, make_input: MakeInput) -> None:
    model = make_model()
    features = make_input(model.config, 5)["features"]
    without = model({name: x for name, x in features.items() if name != "audio"})
    assert_same(without, model(features, {"audio": torch.zeros(5, dtype=torch.bool)}), atol=0.0)


def test_the_cross_transformer_reads_sources_only(make_model: MakeModel, make_input: MakeInput) -> None:
    model = make_model(sources=["audio"]).lmp
    features = make_input(model.config, 5)["features"]
    cross = model(features).cross
    for name, read in (("video", False), ("text", False), ("audio", True)):
        changed = model({**features, name: features[name] + 1.0}).cross
        assert torch.equal(cross, changed) != read


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("filled", ["all", "none", "some"])
def test_every_parameter_gets_a_gradient(
    make_model: MakeModel, make_input: MakeInput, positions: str, filled: str
) -> None:
    model = make_model(positions=positions)
    inputs = make_input(model.config, 8)
    if filled != "some":
        inputs["valid"] = {name: torch.full((8,), filled == "all") for name in inputs["valid"]}
    out = model(**inputs, lengths=[3, 5])
    sum(tensor.float().square().sum() for tensor in flat(out).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.dim() > 0, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_the_gradient_through_every_weight_is_not_zero(make_model: MakeModel, make_input: MakeInput) -> None:
    model = make_model()
    draw = torch.Generator().manual_seed(1)
    out = flat(model(**make_input(model.config, 8), lengths=[3, 5]))
    sum((x * torch.randn(x.shape, generator=draw)).sum() for x in out.values()).backward()
    # Adding one vector to all keys of a softmax changes nothing, so no bias is listed.
    still = [name for name, p in model.named_parameters() if not name.endswith("bias") and not p.grad.abs().max() > 0]
    assert still == []


def test_the_target_gives_no_gradient_to_features(make_model: MakeModel, make_input: MakeInput) -> None:
    model = make_model()
    features = {name: x.requires_grad_() for name, x in make_input(model.config, 4)["features"].items()}
    sum(x.sum() for x in model(features).target.values()).backward()
    assert all(x.grad is None for x in features.values())


@pytest.mark.parametrize("missing", [False, True])
def test_modules_run_in_one_order_whatever_is_missing(
    make_model: MakeModel, make_input: MakeInput, missing: bool
) -> None:
    model = make_model()
    order: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    inputs = make_input(model.config, 6)
    model(**inputs)
    full = list(order)
    order.clear()
    model({"text": inputs["features"]["text"]}, {"text": torch.zeros(6, dtype=torch.bool)} if missing else None)
    assert order == full
    # ZeRO-3 gathers a module's parameters when it is called: one that is not called would be empty.
    holders = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert holders <= set(full)


def test_a_share_of_a_pack_with_its_positions(make_model: MakeModel, make_input: MakeInput) -> None:
    """Two shares, with an attention function that stands in for the exchange, give the pack's tokens."""
    model = make_model(positions="learned").lmp
    inputs = make_input(model.config, 8)
    lengths = [3, 5]
    whole = model(**inputs, lengths=lengths)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def recorded(q: Tensor, k: Tensor, v: Tensor, **segments: Any) -> Tensor:
        calls.append((q, k, v))
        return attention(q, k, v, **segments)

    model.set_attention(recorded)
    model(**inputs, lengths=lengths)
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])
    for rank, shots in enumerate((slice(0, 4), slice(4, 8))):
        turn = iter(calls)

        def exchanged(
            q: Tensor, k: Tensor, v: Tensor, *, rank: int = rank, turn: Any = turn, **segments: Any
        ) -> Tensor:
            q_all, k_all, v_all = next(turn)
            torch.testing.assert_close(q, q_all.chunk(2)[rank], rtol=0, atol=2e-5)
            torch.testing.assert_close(k, k_all.chunk(2)[rank], rtol=0, atol=2e-5)
            return attention(q_all, k_all, v_all, **segments).chunk(2)[rank]

        model.set_attention(exchanged)
        share = model(**part(inputs, shots), lengths=lengths, positions=positions[shots])
        assert_same(dict(share), part(dict(whole), shots))


def test_positions_past_the_table_end_share_its_last_row(make_model: MakeModel, make_input: MakeInput) -> None:
    model = make_model(max_positions=4).lmp
    inputs = make_input(model.config, 6)
    past = model(**inputs, positions=torch.tensor([0, 1, 2, 3, 4, 99]))
    assert_same(dict(past), dict(model(**inputs, positions=torch.tensor([0, 1, 2, 3, 3, 3]))), atol=0.0)


def test_time_rope_sees_differences_of_seconds_only(make_model: MakeModel, make_input: MakeInput) -> None:
    model = make_model(positions="time_rope").lmp
    inputs = make_input(model.config, 6)
    out = model(**inputs).cross
    later = model(**(inputs | {"times": inputs["times"] + 600})).cross
    slower = model(**(inputs | {"times": inputs["times"] * 3})).cross
    torch.testing.assert_close(out, later, rtol=0, atol=2e-3)
    assert not torch.allclose(out, slower, atol=1e-2)


@pytest.mark.parametrize("positions", ["learned", "time_rope"])
def test_bf16_stays_near_fp32(make_model: MakeModel, make_input: MakeInput, positions: str) -> None:
    model = make_model(positions=positions, initializer_range=0.05)
    inputs = make_input(model.config, 8)
    inputs["features"] = {name: x.half() for name, x in inputs["features"].items()}
    full = model(**inputs, lengths=[3, 5])
    half = model.to(torch.bfloat16)(**inputs, lengths=[3, 5])
    assert half.cross.dtype == torch.bfloat16
    assert half.predicted["text"].dtype == half.scale["masked"].dtype == torch.float32
    torch.testing.assert_close(half.cross.float(), full.cross, rtol=0, atol=0.15)
    torch.testing.assert_close(half.reconstructed.norm(dim=-1), torch.ones(8, 2), rtol=0, atol=1e-5)
    sum(tensor.float().sum() for tensor in flat(half).values()).backward()


def test_two_runs_are_bitwise_alike(make_model: MakeModel, make_input: MakeInput) -> None:
    first, second = make_model(), make_model()
    inputs = make_input(first.config, 9)
    assert_same(first(**inputs, lengths=[2, 7]), second(**inputs, lengths=[2, 7]), atol=0.0)


def test_temperature_never_falls_below_its_floor(make_model: MakeModel) -> None:
    temperature = make_model().temperatures["masked"]
    with torch.no_grad():
        temperature.log_excess.fill_(-50.0)
    assert temperature().item() == pytest.approx(100.0)


def test_saved_and_loaded_alike(make_model: MakeModel, make_input: MakeInput, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():  # away from what a fresh model would hold
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "heads")
    model.lmp.save_pretrained(tmp_path / "trunk")
    inputs = make_input(model.config, 6)
    out = model(**inputs)
    assert_same(out, LmpForPretraining.from_pretrained(tmp_path / "heads")(**inputs), atol=0.0)
    trunk = AutoModel.from_pretrained(tmp_path / "trunk")
    assert type(trunk) is LmpModel
    assert_same(dict(trunk(**inputs)), {"contextual": out.contextual, "cross": out.cross}, atol=0.0)


def test_biases_are_there_with_the_sigmoid_loss_only(
    make_model: MakeModel, make_input: MakeInput, tmp_path: Path
) -> None:
    without, model = make_model(), make_model(contrastive_loss="sigmoid", initial_bias=-7.0)
    added = model.state_dict().keys() - without.state_dict().keys()
    assert added == {f"biases.{name}.value" for name in ("masked", "alignment", "reconstruction")}
    assert without(**make_input(without.config, 5)).bias is None
    model.save_pretrained(tmp_path)
    for one in (model, LmpForPretraining.from_pretrained(tmp_path)):
        bias = one(**make_input(one.config, 5)).bias
        assert {name: (x.shape, x.item()) for name, x in bias.items()} == dict.fromkeys(bias, ((1,), -7.0))
        assert list(bias) == ["masked", "alignment", "reconstruction"]


def test_loading_a_trunk_initialises_the_heads(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.lmp.positions.weight.add_(1.0)
    model.lmp.save_pretrained(tmp_path)
    loaded = LmpForPretraining.from_pretrained(tmp_path)
    assert torch.equal(loaded.lmp.positions.weight, model.lmp.positions.weight)
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.temperatures["masked"](), torch.tensor([1 / 0.07]))
    assert loaded.prediction_heads["text"].fc1.weight.std().item() == pytest.approx(0.3, rel=0.3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": {}}, "features are empty"),
        ({"features": {"smell": torch.zeros(6, 1, 3)}}, r"features of unknown modalities \['smell'\]"),
        ({"features": {"text": torch.zeros(6, 7)}}, r"give \[P, K, width\]"),
        ({"features": {"text": torch.zeros(6, 1, 8)}}, r"shape \(6, 1, 8\), expected \(6, 1, 7\)"),
        ({"valid": {"text": torch.ones(6)}}, r"valid\['text'\] is torch.float32"),
        (
            {"masked": {"text": torch.ones(5, dtype=torch.bool)}},
            r"masked\['text'\] is torch.bool of shape \(5,\)",
        ),
        ({"lengths": [3, 4]}, "lengths hold 7 shots, features hold 6"),
        ({"positions": torch.zeros(5, dtype=torch.long)}, r"positions have shape \(5,\)"),
        ({"features": {"text": torch.zeros(2, 3, 1, 7)}, "lengths": [3, 3]}, "a dense batch"),
    ],
)
def test_wrong_input_is_refused(make_model: MakeModel, changes: dict[str, Any], said: str) -> None:
    model = make_model().lmp
    inputs: dict[str, Any] = {"features": {"text": torch.zeros(6, 1, 7)}}
    with pytest.raises(ValueError, match=said):
        model(**(inputs | changes))


def test_what_positions_need_is_asked_for(make_model: MakeModel) -> None:
    features = {"text": torch.zeros(6, 1, 7)}
    with pytest.raises(ValueError, match="need times"):
        make_model(positions="time_rope")(features)
    with pytest.raises(ValueError, match="a segment of 6 shots exceeds max_positions 5"):
        make_model(max_positions=5)(features)


def test_the_papers_shape_has_a_size_as_expected() -> None:
    with torch.device("meta"):
        model = LmpModel(LmpConfig())
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert 55 < millions < 60


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_order_of_shots_matters(make_model: MakeModel, make_input: MakeInput, positions: str) -> None:
    model = make_model(positions=positions).lmp
    inputs = make_input(model.config, 6)
    features = {name: x.flip(0) for name, x in inputs["features"].items()}
    forth, back = model(inputs["features"], times=inputs["times"]), model(features, times=inputs["times"])
    for name in features:
        assert not torch.allclose(forth.contextual[name], back.contextual[name].flip(0), atol=1e-2)
    assert not torch.allclose(forth.cross, back.cross.flip(0), atol=1e-2)
