"""`lmp bench step`: every part reports, its counts are right, wrong attention is found out. Times are not judged."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmp.cli import main
from lmp.model.attention import attention
from lmp.model.backends import BACKENDS
from lmp.scaling import bench_attention
from lmp.scaling.bench_length import modes
from lmp.scaling.bench_step import PARTS, settings_of
from lmp.scaling.bench_subjects import OWN, PEERS, Shape, make_subjects, step_flops
from lmp.scaling.planner import bisect

SMALL = [
    *("--quick", "--device=cpu", "--width=32", "--heads=2", "--layers=2", "--lengths=32,64", "--tokens=64"),
    *("--rounds=2", "--budget=0.5", "--loss-tokens=512,1024,2048", "--trainer-shots=16", "--trainer-steps=5"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report of a setting smaller than --quick, and what was printed."""
    out = tmp_path_factory.mktemp("bench") / "report.json"
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["bench", "step", *SMALL, "--out", str(out)]) == 0, printed.getvalue()
    return json.loads(out.read_text()), printed.getvalue()


def test_every_part_reports_finite_numbers_and_prints_a_table(report: tuple[dict[str, Any], str]) -> None:
    found, printed = report
    assert tuple(found["parts"]) == PARTS and not found["failed"]
    assert found["settings"]["shape"] == {"width": 32, "heads": 2, "layers": 2}
    titles = "ceilings: products", "ceilings: copies", "attention, against", "training step", "trainer:", "longest"
    assert all(title in printed for title in (*titles, "memory of InfoNCE"))
    numbers = list(_numbers(found["parts"]))
    assert len(numbers) > 100 and all(math.isfinite(number) for number in numbers)


def test_every_encoder_has_a_row_at_every_length_with_its_ratios(report: tuple[dict[str, Any], str]) -> None:
    found, printed = report
    rows = found["parts"]["step"]["rows"]
    assert {(row["subject"], row["length"]) for row in rows} == {(s, n) for s in (*OWN, *PEERS) for n in (32, 64)}
    for row in rows:
        assert row["sequences"] * row["length"] == 64 and row["subject"] in printed
        assert set(row["speed_to"]) == set(OWN) and row["peak_bytes"] > 0
        assert row["model_flops"] < row["hardware_flops"]


def test_available_attention_is_right_and_the_rest_is_named_with_a_reason(report: tuple[dict[str, Any], str]) -> None:
    found, printed = report
    part = found["parts"]["attention"]
    assert {row["backend"] for row in part["rows"]} == {"sdpa", "torch math"}
    assert all(row["right"] and max(row["error"].values()) < row["rounding"] for row in part["rows"])
    assert set(part["absent"]) == set(BACKENDS) - {"sdpa"}
    assert all(f"{name}: not measured, {why}" in printed for name, why in part["absent"].items())


def test_wrong_attention_is_found_out() -> None:
    settings = settings_of("cpu", quick=True, width=32, heads=2, layers=1, tokens=64)
    problem = bench_attention._Problem(settings, 16)
    bound = bench_attention.ROUNDING[torch.float32]
    assert max(problem.error(attention).values()) < bound

    def scaled(q: Tensor, k: Tensor, v: Tensor, **segments: Any) -> Tensor:
        return attention(q * 1.001, k, v, **segments)

    def leaking(q: Tensor, k: Tensor, v: Tensor, **segments: Any) -> Tensor:
        return attention(q, k, v, **segments) + 1e-3 * v.flip(0)

    for wrong in (scaled, leaking):
        assert max(problem.error(wrong).values()) > bound


def test_operations_are_those_that_torch_counts() -> None:
    shape = Shape(width=32, heads=2, layers=3)
    x_BLD = torch.randn(2, 24, 32)
    subjects = make_subjects((*OWN, *PEERS), shape, longest=24, device=torch.device("cpu"), dtype=torch.float32)
    for subject in subjects:
        # The math kernel is made of products, which the counter knows; backward of fused ones does some again.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            subject.run(x_BLD).square().mean().backward()
        counted = step_flops(subject, shape, batch=2, length=24)
        assert counted == pytest.approx(counter.get_total_flops(), rel=0.01), subject.name


def test_encoders_have_the_same_size_and_see_the_whole_sequence_both_ways() -> None:
    shape = Shape(width=48, heads=2, layers=2)
    subjects = make_subjects((*OWN, *PEERS), shape, longest=16, device=torch.device("cpu"), dtype=torch.float32)
    sizes = [subject.matmul_parameters for subject in subjects]
    assert max(sizes) <= 1.01 * min(sizes)
    for subject in subjects:
        x_BLD = torch.randn(1, 16, 48, requires_grad=True)
        (grad_BLD,) = torch.autograd.grad(subject.run(x_BLD)[0, 8].square().sum(), x_BLD)
        assert bool((grad_BLD[0].abs().amax(-1) > 0).all()), subject.name


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 63, 64, 1000])
def test_bisection_finds_the_limit(limit: int) -> None:
    most, over = bisect(lambda n: n <= limit, to=16)
    assert most <= limit < over and over - most <= max(1, limit // 16)


def test_the_longest_sequence_keeps_to_the_budget(report: tuple[dict[str, Any], str]) -> None:
    found, _ = report
    rows = {row["mode"]: row for row in found["parts"]["length"]["rows"]}
    assert list(rows) == list(modes("cpu"))
    for row in rows.values():
        assert 0 < row["bytes"] <= row["budget_bytes"] == 2**19 and 0 < row["tokens"] < row["over"]
    per_token = [rows[mode]["bytes"] / rows[mode]["tokens"] for mode in ("none", "selective")]
    assert per_token[0] > per_token[1]


def test_memory_of_the_loss_is_linear_in_tokens(report: tuple[dict[str, Any], str]) -> None:
    found, _ = report
    rows = found["parts"]["loss"]["rows"]
    slopes = [row["bytes_per_further_token"] for row in rows[1:]]
    assert slopes[1] == pytest.approx(slopes[0], rel=0.01)
    assert rows[-1]["bytes"] < rows[-1]["matrix_bytes"] / 2


@pytest.mark.parametrize(
    "words",
    [
        "--parts speed",
        "--width 30 --heads 4",
        "--layers 0",
        "--rounds 1",
        "--budget 0",
        "--lengths 0",
        "--trainer-steps 1",
    ]
    + ([] if torch.cuda.is_available() else ["--device cuda"]),
)
def test_mistakes_are_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--quick", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and " -> " in error and error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_attention_is_right_to_bf16_and_each_kernel_is_named(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    words = ["--quick", "--device=cuda", "--lengths=512,2048", "--tokens=4096", "--parts=ceilings,attention,step"]
    assert main(["bench", "step", *words, "--out", str(out)]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert all(row["right"] and row["kernel"] for row in parts["attention"]["rows"])
    assert all(row["peak_bytes"] > 0 for row in parts["step"]["rows"])


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        for part in value.values():
            yield from _numbers(part)
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value
