"""A study file becomes cells with equal budgets; what was measured becomes a report. No run is started here."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.study.__main__ import main
from launch.study.cells import Cell, make_cells
from launch.study.collect import collect, groups
from launch.study.config import Study, load_study, nested, points, validate_study
from launch.study.figures import slope, speed_ups
from launch.study.folder import StudyFolder
from launch.study.report import write_report
from launch.study.slurm import cluster_of
from lmp.config import validate
from lmp.data.index import FilmIndex
from lmp.data.stream import Stream
from lmp.errors import UserError
from lmp.scaling.flops import train_flops
from lmp.train.data import model_shape, plan_settings
from tests.launch.studies import Page, study_of, write_study

AXES = {
    "data.window_shots": st.lists(st.integers(1, 4096), min_size=1, max_size=3, unique=True),
    "parallel.zero": st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True),
    "memory.checkpointing": st.lists(st.sampled_from(["none", "full", "selective"]), min_size=1, unique=True),
    "optimizer.lr": st.lists(st.floats(1e-6, 1, allow_nan=False), min_size=1, max_size=3, unique=True),
    "processes": st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3, unique=True),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    study_of(tmp_path)  # makes base and shards
    return tmp_path


def cells_of(folder: Path, **keys: Any) -> list[Cell]:
    return make_cells(load_study(write_study(folder, **keys)))


@settings(max_examples=60, deadline=None)
@given(
    grid=st.lists(st.sampled_from(sorted(AXES)), unique=True, max_size=4).flatmap(
        lambda keys: st.fixed_dictionaries({key: AXES[key] for key in keys})
    ),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
)
def test_the_grid_is_every_combination_once(grid: dict[str, list[Any]], seeds: list[int]) -> None:
    study = validate_study({"grid": grid, "seeds": seeds, "budget": {"steps": 1}}, source="test")
    found = points(study)
    size = len(seeds)
    for values in grid.values():
        size *= len(values)
    assert len({point.name for point in found}) == len(found) == size
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", point.name) for point in found)
    assert len({(str(point.settings), point.seed) for point in found}) == size
    for key, values in grid.items():
        assert {str(point.settings[key]) for point in found} == {str(value) for value in values}


def test_keys_of_a_group_vary_together(folder: Path) -> None:
    size = [
        {"name": "small", "model.width": 32, "model.heads": 4},
        {"name": "large", "model.width": 64, "model.heads": 8, "processes": 2},
    ]
    cells = cells_of(folder, grid={"size": size}, seeds=[5])
    assert [cell.name for cell in cells] == ["size-small_seed-5", "size-large_seed-5"]
    assert [(c.config["model"]["width"], c.config["model"]["heads"], c.processes, c.seed) for c in cells] == [
        (32, 4, 1, 5),
        (64, 8, 2, 5),
    ]
    assert cells[1].config["seed"] == 5


def test_overrides_of_grid_and_base(folder: Path) -> None:
    path = write_study(folder)
    study = load_study(path, ["grid.data.window_shots=[4]", "config.optimizer.lr=0.5", "concurrency=9"])
    assert study.grid == {"data.window_shots": [4]}
    assert (study.config["optimizer"]["lr"], study.config["train"]["steps"], study.concurrency) == (0.5, 20, 9)
    assert study.base is None, "a frozen study needs no other file"


def test_every_fault_is_told_at_once(folder: Path) -> None:
    grid = {"data.windw_shots": [8], "train.steps": [3], "size": [{"model.widht": 3}], "parallel.zero": []}
    wrong = study_of(folder, grid=grid, budget={"steps": 3, "flops": 1e9}, seeds=[], colour="red")
    with pytest.raises(UserError) as error:
        validate_study(wrong, source="s.yaml")
    told = str(error.value)
    assert "colour: no such key" in told
    assert "seeds: list should have at least 1 item" in told
    assert "exactly one of steps, shots and flops" in told
    with pytest.raises(UserError) as error:
        validate_study(study_of(folder, grid=grid, exclude=[{"nothing": 1}]), source="s.yaml")
    told = str(error.value)
    assert told.startswith("s.yaml: 5 faults")
    assert "did you mean data.window_shots?" in told
    assert "grid.size.0.model.widht: no such key, did you mean model.width?" in told
    assert "train.steps cannot be in the grid: give `budget`" in told
    assert "grid.parallel.zero: has no values" in told
    assert "exclude.0.nothing: no such key or axis" in told


def step_cost(folder: Path, cell: Cell) -> tuple[float, float]:
    """Shots and operations of an average step of the first epoch, from the plan itself."""
    config = validate(cell.config or {}, source=cell.name)
    index = FilmIndex.load([folder / "train"])
    stream = Stream.of(index, plan_settings(config, index))
    model = model_shape(config, {name: {"tokens": m.tokens, "width": m.width} for name, m in index.modalities.items()})
    cursor = stream.first()
    steps = stream.steps(cursor)
    shots = flops = 0.0
    for _ in range(steps):
        shots += stream.shots(cursor)
        flops += train_flops(model, [pack.lengths for pack in stream.packs(cursor)])
        cursor = stream.next(cursor)
    return shots / steps, flops / steps


@pytest.mark.parametrize(("kind", "amount"), [("flops", 4e9), ("shots", 5000.0)])
def test_the_budget_is_the_same_for_every_cell(folder: Path, kind: str, amount: float) -> None:
    sizes = [{"name": "w", "model.width": 64, "model.mlp_ratio": 2.0}, {"name": "n", "model.width": 32}]
    grid = {"data.window_shots": [2, 16], "size": sizes}
    cells = cells_of(folder, grid=grid, seeds=[0, 1], budget={kind: amount})
    assert len(cells) == 8
    for cell in cells[::2]:
        shots, flops = step_cost(folder, cell)
        each = flops if kind == "flops" else shots
        assert cell.steps == round(amount / each) == cell.config["train"]["steps"]
        assert cell.flops == pytest.approx(cell.steps * flops)
        assert cell.shots == pytest.approx(cell.steps * shots)
    assert [cell.steps for cell in cells[::2]] == [cell.steps for cell in cells[1::2]], "seeds make as many steps"
    if kind == "flops":
        assert len({cell.steps for cell in cells}) == 4


def test_a_budget_below_one_step_leaves_out(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no cell can run: one step takes .* flops, the budget is 10"):
        cells_of(folder, budget={"flops": 10.0})


def test_what_cannot_run_is_left_out_with_its_reason(folder: Path) -> None:
    grid = {"parallel.sequence": [1, 3, 4], "data.window_shots": [8, "x"], "processes": [1, 4]}
    cells = cells_of(folder, grid=grid, seeds=[0], exclude=[{"processes": 4, "parallel.sequence": [1]}])
    left = {tuple(cell.values.values()): cell.left_out for cell in cells}
    assert left[1, 8, 1] is None and left[4, 8, 4] is None
    assert "excluded by" in left[1, 8, 4]
    assert "model.heads=4 is not a multiple of parallel.sequence=3" in left[3, 8, 4]
    assert "parallel.sequence=4 does not divide the 1 processes" in left[4, 8, 1]
    assert "data.window_shots: input should be a valid integer" in left[1, "x", 1]


def test_what_does_not_fit_the_device_is_left_out(folder: Path) -> None:
    grid = {"size": [{"name": "fits", "model.width": 32}, {"name": "not", "model.width": 4096}]}
    fits, not_ = cells_of(folder, grid=grid, seeds=[0], gpu="small:1:100:10", budget={"steps": 3})
    assert fits.left_out is None and fits.prediction.memory_gib < fits.prediction.limit_gib
    assert re.match(r"needs \d+\.\d GiB of 0\.\d, .* for model states", not_.left_out)
    assert not_.prediction.memory_gib > not_.prediction.limit_gib


def test_cells_can_be_planned_without_the_data(folder: Path) -> None:
    study = study_of(folder, modalities="video=1x12,audio=1x8", config={"data": {"train": ["nowhere"]}})
    (folder / "s.yaml").write_text(yaml.safe_dump(study))
    cells = make_cells(load_study(folder / "s.yaml"))
    assert all(cell.left_out is None and cell.flops for cell in cells)


def test_list_shows_cells_and_starts_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(folder, grid={"parallel.sequence": [1, 3]}, seeds=[0])
    assert main([str(path), "--list", "--out", str(folder / "out")]) == 0
    told = capsys.readouterr().out
    assert "1 of 2 cells run" in told and "| sequence-1_seed-0" in told
    assert "left out: sequence-3_seed-0: model.heads=4 is not a multiple" in told
    assert not (folder / "out").exists()


def test_a_folder_holds_one_study(folder: Path) -> None:
    out = StudyFolder(folder / "out")
    cells = out.open(load_study(write_study(folder)))
    assert out.open(load_study(write_study(folder, concurrency=7))) == cells
    with pytest.raises(UserError, match=r"budget.steps was 8, is 9 -> .*name another folder with --out"):
        out.open(load_study(write_study(folder, budget={"steps": 9})))
    with pytest.raises(UserError, match=r"config.optimizer.lr was 0.003, is 1"):
        out.open(load_study(folder / "study.yaml", ["budget.steps=8", "config.optimizer.lr=1"]))
    changed = out.open(load_study(write_study(folder), ["config.cluster.partition=low"]))
    assert {cell.config["cluster"]["partition"] for cell in changed} == {"low"}
    assert yaml.safe_load(out.config_of(cells[0].name).read_text())["cluster"]["partition"] == "low"


def test_one_launcher_at_a_time(folder: Path) -> None:
    first, second = StudyFolder(folder / "out"), StudyFolder(folder / "out")
    assert not first.is_run()
    with first.locked():
        assert second.is_run()
        with pytest.raises(UserError, match=r"is being run by process \d+"), second.locked():
            pass
    with second.locked():
        pass


def test_a_cell_asks_for_its_own_nodes(folder: Path) -> None:
    grid = {"place": [{"name": "a", "nodes": 2, "processes": 4}]}
    own = {"cluster": {"partition": "p", "gpus_per_node": 8}}
    (cell,) = cells_of(folder, grid=grid, seeds=[0], config={**own, "data": {"packs_per_step": 8}})
    cluster = cluster_of(cell)
    assert (cluster.nodes, cluster.tasks, cluster.gpus_per_node, cluster.partition) == (2, 4, 4, "p")
    on_cpu = replace(cell, config={**cell.config, "cluster": {}})
    assert cluster_of(on_cpu).gpus_per_node is None


# ---------------------------------------------------------------- collecting and reporting


def write_run(
    run: Path, *, steps: int, seconds: float, loss: float, score: float | None = None, world: int = 1
) -> None:
    """The files that a run leaves, as far as the report reads them."""
    run.mkdir(parents=True)
    lines = [
        {
            "step": n,
            "loss": loss + 1 / n,
            "seconds": 100.0 if n <= 3 else seconds,
            "shots_per_second": 32 / seconds,
            "tokens_per_second": 96 / seconds,
            "memory_gib": 0.5,
        }
        for n in range(1, steps + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"step": 99, "lo')  # cut by a kill
    (run / "ledger.jsonl").write_text(
        json.dumps({"event": "start", "step": 0, "world_size": world, "device": "d"}) + "\n"
    )
    (run / "code.json").write_text(json.dumps({"commit": "0123456789abcdef", "changed": False}))
    if score is None:
        return
    (run / "DONE").write_text(json.dumps({"step": steps}))
    table = {"queries": 40, "gallery": 40, "rows": {"model": {"mrr": {"mean": score, "std": 0.01}}}}
    probe = {"test_items": 7, "rows": {"model": {"mean": score / 2, "std": 0.0}}}
    results = {"masked_shot": {"video": table, "audio": table}, "cross_modal": None, "probes": {"place": probe}}
    (run / "evaluation" / f"step-{steps:08d}").mkdir(parents=True)
    (run / "evaluation" / f"step-{steps:08d}" / "results.json").write_text(json.dumps(results))


@pytest.fixture
def measured(folder: Path) -> Path:
    """A study of windows 8 and 16 on 1 and 2 processes, two seeds; one cell half-way, one left out, one not begun."""
    out = folder / "out"
    grid = {"data.window_shots": [8, 16], "processes": [1, 2]}
    exclude = [{"data.window_shots": 16, "processes": 2, "seed": 1}]
    study = load_study(write_study(folder, grid=grid, exclude=exclude, evaluate={"shards": ["held-out"]}))
    for cell in StudyFolder(out).open(study):
        window, world = cell.values["data.window_shots"], cell.processes
        half = (window, world, cell.seed) == (16, 2, 0)
        if cell.left_out or (window, world, cell.seed) == (8, 2, 1):
            continue
        write_run(
            out / "cells" / cell.name,
            steps=5 if half else 8,
            seconds=(window / 8) ** 2 * 0.01 / (1.5 if world == 2 else 1),
            loss=2.0 + cell.seed,
            score=None if half else 0.2 + 0.1 * cell.seed,
            world=world,
        )
    return out


def test_rows_are_what_the_files_tell(measured: Path) -> None:
    rows = {(*r.cell.values.values(), r.cell.seed): r for r in collect(measured)}
    first = rows[8, 1, 0]
    assert (first.status, first.step, first.device, first.commit) == ("done", 8, "d", "0123456789ab")
    assert first.seconds == pytest.approx(0.01), "warm-up is left out of the median"
    assert first.loss == pytest.approx(2 + 1 / 8)
    assert first.scores["masked-shot MRR"].mean == pytest.approx(0.2) and first.scores["masked-shot MRR"].n == 80
    assert first.scores["place accuracy"].n == 7 and "cross-modal MRR" not in first.scores
    half, none, left = rows[16, 2, 0], rows[8, 2, 1], rows[16, 2, 1]
    assert (half.status, half.step, half.scores, half.mfu) == ("waiting", 5, {}, None)
    assert (none.status, none.step, none.seconds, none.loss) == ("waiting", None, None, None)
    assert left.status == "left out" and "excluded by" in left.reason


def test_means_are_over_seeds(measured: Path) -> None:
    by_point = {group.rows[0].series: group for group in groups(collect(measured))}
    mean, deviation, seeds = by_point[("data.window_shots", "8"), ("processes", "1")].spread("masked-shot MRR")
    assert (mean, deviation, seeds) == (pytest.approx(0.25), pytest.approx(0.1 / 2**0.5), 2)
    assert by_point[("data.window_shots", "16"), ("processes", "2")].spread("masked-shot MRR") is None
    of_window = [group for key, group in by_point.items() if key[0] == ("data.window_shots", "8")]
    assert [(n, pytest.approx(s)) for n, s, _ in speed_ups(of_window)] == [(1, 1.0), (2, 1.5)]


def test_slope_is_the_exponent() -> None:
    assert slope([16, 64, 256], [3 * n**1.7 for n in (16, 64, 256)]) == pytest.approx(1.7)
    assert slope([16, 16], [1, 2]) is None


def test_the_report_holds_what_was_measured_and_nothing_else(measured: Path) -> None:
    page = write_report(measured)
    with (measured / "report" / "results.csv").open() as file:
        lines = {line["cell"]: line for line in csv.DictReader(file)}
    assert len(lines) == 8
    done, none = lines["window-shots-8_processes-1_seed-1"], lines["window-shots-8_processes-2_seed-1"]
    assert (done["status"], float(done["masked-shot MRR"]), done["masked-shot MRR n"]) == (
        "done",
        pytest.approx(0.3),
        "80",
    )
    assert done["mfu"] == "" and done["predicted_seconds"] != ""
    assert {none[key] for key in ("seconds", "loss", "masked-shot MRR", "device", "commit")} == {""}
    html = Page(page.read_text(encoding="utf-8"))
    assert html.external == [] and html.dangling == []
    assert len(html.ids) == len(set(html.ids))
    assert html.tags.count("svg") == html.tags.count("figure") == 4
    cells = {row[0]: row for row in html.rows if row and row[0] in lines}
    assert set(cells) == {name for name, line in lines.items() if line["status"] != "left out"}
    figures = [f"#cell-{name}" for name, line in lines.items() if line["seconds"]]
    assert set(figures) <= set(html.links), "points of figures lead to the cells"
    text = (measured / "report" / "report.md").read_text(encoding="utf-8")
    assert all(f"({name}.png)" in text for name in ("cost", "speedup", "quality", "predicted"))
    assert "slope 2.00" in page.read_text(encoding="utf-8")
    assert "8 cells: 5 done, 2 waiting, 1 left out; 5 evaluated" in text
    assert {png.stem for png in (measured / "report").glob("*.png")} == {"cost", "speedup", "quality", "predicted"}


def test_a_report_of_nothing_is_still_a_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StudyFolder(folder / "out").open(load_study(write_study(folder)))
    assert main(["report", str(folder / "out")]) == 0
    assert "4 cells: 4 waiting" in capsys.readouterr().out
    Page((folder / "out" / "report" / "report.html").read_text(encoding="utf-8"))
    assert main(["report", str(folder / "nothing")]) == 2
    assert "holds no study" in capsys.readouterr().err


def test_dotted_and_nested_keys_are_the_same() -> None:
    assert nested({"a.b": 1, "a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert isinstance(validate_study({"budget": {"steps": 1}}, source="x"), Study)
