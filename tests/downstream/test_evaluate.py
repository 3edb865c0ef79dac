"""The whole evaluation, its report and its verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmp.data.index import FilmIndex
from lmp.downstream.evaluate import EvaluationSettings, evaluate, evaluate_model
from lmp.downstream.plots import read_metrics
from lmp.downstream.report import write_report
from lmp.downstream.results import EvaluationResult, ProbeTable, RetrievalTable, Score, verdicts
from lmp.downstream.retrieval import RetrievalSettings
from lmp.errors import UserError
from lmp.model import LmpConfig, LmpForPretraining

SETTINGS = EvaluationSettings(seeds=2, retrieval=RetrievalSettings(mask_ratio=0.3, max_shots=32))


@pytest.fixture(scope="session")
def result(planted: tuple[Path, Path, Path], small_model: LmpForPretraining) -> EvaluationResult:
    held, train, labels = planted
    return evaluate_model(
        small_model,
        FilmIndex.load(held),
        labels=labels,
        train_index=FilmIndex.load(train),
        settings=SETTINGS,
        run="tiny",
        step=7,
    )


def test_every_table_is_there_with_every_contender(result: EvaluationResult) -> None:
    assert set(result.masked_shot) == {"video", "audio", "text"}
    for table in result.masked_shot.values():
        assert set(table.rows) == {"model", "untrained", "copy", "mean", "near", "chance"}
        assert table.rows["untrained"]["mrr"].std > 0
    assert result.cross_modal is not None
    wanted = {"model", "model_moved", "untrained", "copy", "mean", "near", "ridge", "position", "chance"}
    assert set(result.cross_modal.rows) == wanted
    assert len(result.alignment) == 6
    assert set(result.probes) == {"place", "genre"}
    assert set(result.probes["place"].rows) == {"model", "raw", "untrained", "majority"}
    assert result.probes["place"].test_items == result.data["shots"]
    assert result.probes["genre"].test_items == 8


def test_raw_features_tell_the_planted_place(result: EvaluationResult) -> None:
    rows = result.probes["place"].rows
    assert rows["raw"].mean > rows["majority"].mean + 0.2


def test_an_untrained_model_fails_its_verdicts(result: EvaluationResult) -> None:
    found = {one.name: one.passed for one in verdicts(result)}
    assert not found["masked-shot retrieval beats copy"]
    assert not found["cross-modal retrieval beats ridge"]
    assert not found["place probe beats raw"]


def test_the_report_holds_the_figures(result: EvaluationResult, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"step": s, "epoch": 0, "loss": 9.0 - s, "loss/masked_shot": 3.0, "chance/masked_shot": 4.0} for s in range(4)
    ]
    metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')
    out = tmp_path / "report"
    path = write_report(result, out, metrics=metrics)
    assert {p.name for p in out.iterdir()} == {
        "report.md",
        "results.json",
        "losses.png",
        "retrieval.png",
        "probes.png",
    }
    assert all(
        (out / name).read_bytes().startswith(b"\x89PNG") for name in ("losses.png", "retrieval.png", "probes.png")
    )
    text = path.read_text()
    for name, table in result.masked_shot.items():
        assert f"**{name}**, {table.queries} queries" in text
        assert f"{100 * table.rows['copy']['mrr'].mean:.2f}" in text
    place = result.probes["place"]
    counts = f"| place | shot | 4 | {place.fit_items} | {place.test_items} |"
    assert f"{counts} {100 * place.rows['model'].mean:.2f} ±" in text
    assert "**FAILED**" in text
    stored = json.loads((out / "results.json").read_text())
    assert stored["step"] == 7
    assert (
        stored["masked_shot"]["video"]["rows"]["copy"]["R@1"]["mean"]
        == result.masked_shot["video"].rows["copy"]["R@1"].mean
    )
    assert [one["name"] for one in stored["verdicts"]] == [one.name for one in verdicts(result)]


def test_a_report_without_labels_or_metrics(held: FilmIndex, small_model: LmpForPretraining, tmp_path: Path) -> None:
    found = evaluate_model(small_model, held, settings=replace(SETTINGS, seeds=1))
    assert not found.probes
    assert found.cross_modal is not None
    assert "ridge" not in found.cross_modal.rows
    path = write_report(found, tmp_path, metrics=tmp_path / "none.jsonl")
    assert not (tmp_path / "losses.png").exists()
    assert not (tmp_path / "probes.png").exists()
    assert "No labels were given" in path.read_text()


def test_probes_split_the_held_out_films_where_training_films_have_no_labels(
    planted: tuple[Path, Path, Path], small_model: LmpForPretraining, tmp_path: Path
) -> None:
    for path in planted[2].glob("held*.labels.json"):
        (tmp_path / path.name).write_text(path.read_text())
    found = evaluate_model(
        small_model,
        FilmIndex.load(planted[0]),
        labels=tmp_path,
        train_index=FilmIndex.load(planted[1]),
        settings=replace(SETTINGS, seeds=1),
    )
    place = found.probes["place"]
    assert place.fit_items + place.test_items == found.data["shots"]
    assert any("12 of 20 films" in note for note in found.notes)


def test_the_same_evaluation_gives_the_same_figures(held: FilmIndex, small_model: LmpForPretraining) -> None:
    one, two = (evaluate_model(small_model, held, settings=replace(SETTINGS, seeds=1)) for _ in range(2))
    assert one.as_dict() == two.as_dict()


def test_mistakes_are_told_with_a_remedy(
    planted: tuple[Path, Path, Path],
    held: FilmIndex,
    small_model: LmpForPretraining,
    config: LmpConfig,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="both held out and in the training") as both:
        evaluate_model(small_model, held, train_index=held)
    assert both.value.remedy
    with pytest.raises(UserError, match="no such folder of labels"):
        evaluate_model(small_model, held, labels=tmp_path / "nowhere")
    shapes = config.modalities | {"video": {"tokens": 1, "width": 5}}
    other = LmpForPretraining(LmpConfig(modalities=shapes, width=8, heads=1, contextual_layers=0, cross_layers=1))
    with pytest.raises(UserError, match=r"video \[1, 5\].*\[1, 12\]"):
        evaluate_model(other, held)


def test_a_run_is_evaluated_as_it_was_trained(
    planted: tuple[Path, Path, Path],
    small_model: LmpForPretraining,
    config: LmpConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, train, labels = planted
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        f"data: {{train: ['{train}'], pack_shots: 64, window_shots: 16}}\n"
        "objectives: {masked_shot: {ratio: 0.3, span: 2}}\n"
    )
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    weights = {name: tensor.clone() for name, tensor in small_model.state_dict().items()}
    trained = SimpleNamespace(config=config, weights=weights, step=40)
    monkeypatch.setattr("lmp.train.checkpoint.load_trained", lambda run, step=None: trained)
    found = evaluate(run, [held], labels=labels, train_shards=[train], out=tmp_path / "out", seeds=1)
    assert (found.run, found.step) == ("run", 40)
    assert found.settings["retrieval"] == {"mask_ratio": 0.3, "mask_span": 2, "max_shots": 16, "ties": "mean"}
    assert (tmp_path / "out" / "losses.png").is_file()
    asked = replace(SETTINGS, seeds=1, retrieval=RetrievalSettings(mask_ratio=0.3, mask_span=2, max_shots=16))
    assert found.masked_shot == evaluate_model(small_model, FilmIndex.load(held), settings=asked).masked_shot


def row(value: float) -> dict[str, Score]:
    return {"R@1": Score(value), "mrr": Score(value)}


def made_up(model: float, **better: float) -> EvaluationResult:
    """Rivals score 0.2, except those named."""
    names = ("untrained", "copy", "mean", "near", "chance", "position", "ridge")
    rows = {"model": row(model)} | {name: row(better.get(name, 0.2)) for name in names}
    probe_rows = {name: Score(better.get(name, 0.2)) for name in ("raw", "untrained", "majority")} | {
        "model": Score(model)
    }
    return EvaluationResult(
        run="r",
        step=1,
        data={},
        settings={},
        masked_shot={"video": RetrievalTable(9, 9, rows)},
        cross_modal=RetrievalTable(9, 9, rows),
        probes={"place": ProbeTable("shot", ["a", "b"], 9, 9, probe_rows)},
    )


def test_verdicts_both_ways() -> None:
    assert len(verdicts(made_up(0.5))) == 4 + 6 + 3
    assert all(one.passed for one in verdicts(made_up(0.5)))
    failed = {one.name for one in verdicts(made_up(0.5, copy=0.5, raw=0.6)) if not one.passed}
    assert failed == {
        "masked-shot retrieval beats copy",
        "cross-modal retrieval beats copy",
        "place probe beats raw",
    }
    detail = next(one.detail for one in verdicts(made_up(0.5)) if one.name == "place probe beats raw")
    assert detail == "accuracy 50.0 against 20.0 (+30.0)"


def test_one_metric_alone_does_not_win() -> None:
    result = made_up(0.5)
    result.masked_shot["video"].rows["copy"]["R@1"] = Score(0.6)
    assert not {one.name: one.passed for one in verdicts(result)}["masked-shot retrieval beats copy"]


def test_masked_shots_are_judged_on_the_mean_over_modalities() -> None:
    result = made_up(0.5, copy=0.4)
    result.masked_shot["text"] = made_up(0.5, copy=0.55).masked_shot["video"]
    found = {one.name: one for one in verdicts(result)}
    assert found["masked-shot retrieval beats copy"].passed
    assert "50.0 against 47.5" in found["masked-shot retrieval beats copy"].detail


def test_a_model_that_matches_positions_alone_fails() -> None:
    result = made_up(0.5)
    assert result.cross_modal is not None
    for moved, passed in ((0.3, True), (0.1, False)):
        result.cross_modal.rows["model_moved"] = row(moved)
        found = {one.name: one.passed for one in verdicts(result)}
        assert found["cross-modal retrieval with moved positions beats chance"] is passed
        assert found["cross-modal retrieval beats copy"]


def test_nothing_measured_is_no_success() -> None:
    assert not all(one.passed for one in verdicts(EvaluationResult("r", 1, {}, {})))


def test_curves_keep_the_last_line_of_a_step_that_ran_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 5}\n{"step": 1, "loss": 6}\n{"step": 2, "loss": 4, "note": "x"}\n{"st')
    assert read_metrics(path) == {1: {"step": 1.0, "loss": 6.0}, 2: {"step": 2.0, "loss": 4.0}}


def test_a_learned_model_beats_what_it_should(planted: tuple[Path, Path, Path], known_model: Callable) -> None:
    found = evaluate_model(known_model(lambda x: x), FilmIndex.load(planted[0]), settings=replace(SETTINGS, seeds=1))
    assert all(one.passed for one in verdicts(found))
    assert torch.tensor([t.rows["model"]["R@1"].mean for t in found.masked_shot.values()]).eq(1).all()
