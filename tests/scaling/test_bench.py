"""`lmp bench`: every reader reads everything, the counters are exact, absent packages are named."""

from __future__ import annotations

import importlib.util
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmp.cli import main
from lmp.data.index import FilmIndex
from lmp.errors import UserError
from lmp.scaling.bench_data import counter_ratios, lognormal_shots, make_corpus
from lmp.scaling.bench_readers import Counters, Places, readers
from tests.runs import run

INSTALLED = [r.name for r in readers().values() if all(importlib.util.find_spec(p) for p in r.needs)]
ABSENT = sorted(set(readers()) - set(INSTALLED))
OWN = [name for name in readers() if name.startswith("lmp-")]

needs_counting = pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="the system does not count bytes read")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films of 0.4 MB in all."""
    folder = tmp_path_factory.mktemp("bench") / "shards"
    make_corpus(folder, 0.0004)
    return folder


@pytest.fixture(scope="module")
def report(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The report of all readers, and what was printed."""
    out = tmp_path_factory.mktemp("out") / "report.json"
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["bench", "data", str(corpus), "--reps", "1", "--out", str(out)]) == 0
    return json.loads(out.read_text()), printed.getvalue()


def test_every_installed_reader_reads_every_byte_once(report: tuple[dict[str, Any], str], corpus: Path) -> None:
    found, printed = report
    index = FilmIndex.load(corpus)
    payload = int(index.shots.sum()) * sum(column.row_bytes for column in index.columns)
    sizes = {result["name"]: result["bytes"] for result in found["results"]}
    assert list(sizes) == INSTALLED
    for name, size in sizes.items():
        tar = sum(entry["bytes"] for entry in index.entries)
        assert size == (tar if name.startswith("raw") else payload), name
        assert name in printed
    counts = {result["name"]: result["count"] for result in found["results"]}
    assert counts["lmp-films"] == counts["webdataset"] == len(index)


def test_absent_packages_are_named_with_their_extra(report: tuple[dict[str, Any], str]) -> None:
    found, printed = report
    assert sorted(found["skipped"]) == ABSENT
    for name in ABSENT:
        assert f"{name}: skipped, {readers()[name].needs[0]} is not installed: pip install 'lmp[bench]'" in printed


def test_a_package_that_is_not_there_is_skipped(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "data", str(corpus), "--reps", "1", "--readers", "litdata"]) == 0
    printed = capsys.readouterr().out
    assert "litdata-w0: skipped, litdata is not installed: pip install 'lmp[bench]'" in printed
    assert "| raw " in printed
    assert "lmp-films" not in printed


@needs_counting
def test_a_window_costs_its_own_bytes_and_a_quarter_of_a_pack_a_quarter(
    report: tuple[dict[str, Any], str],
) -> None:
    counters = report[0]["counters"]
    assert 1 <= counters["window_ratio"] <= 1.1
    assert counters["rank_ratios"] == [0.25] * 4
    assert counters["pack_read"] >= counters["window_payload"] * 20


def test_counter_ratios_tell_when_too_much_is_read() -> None:
    ratios = counter_ratios(Counters(window_read=300, window_payload=200, pack_read=1000, rank_read=(250, 1000)))
    assert ratios == {"window_ratio": 1.5, "rank_ratios": [0.25, 1.0]}


def test_the_report_names_machine_and_commit(report: tuple[dict[str, Any], str]) -> None:
    found, printed = report
    assert found["machine"]["cores"] >= 1
    assert len(found["machine"]["load_average"]) == 3
    assert found["cache"] == "warm"
    assert found["corpus"]["films"] == 8
    assert str(found["machine"]["commit"]) in printed
    raw = found["results"][0]
    assert raw["name"] == "raw"
    assert raw["speed_to_raw"] == raw["cpu_to_raw"] == [1.0]


def _copy_damaged(corpus: Path, to: Path) -> None:
    """With one bit changed in the text of the first film's first shot."""
    index = FilmIndex.load(corpus)
    for path in corpus.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    offset = {name: offset for name, offset, _, _ in index.stored(0)}["text"]
    shard = to / Path(index.shards[0]).name
    data = bytearray(shard.read_bytes())
    data[offset] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("name", OWN)
def test_own_readers_see_damage(name: str, corpus: Path, tmp_path: Path) -> None:
    """They check what they read, so a changed byte ends them."""
    _copy_damaged(corpus, tmp_path)
    with pytest.raises(UserError, match="the bytes of shot 0 are not those written"):
        list(readers()[name].open(Places(tmp_path, tmp_path / "none")))


def test_damage_met_in_a_reading_is_one_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _copy_damaged(corpus, tmp_path)
    assert main(["bench", "data", str(tmp_path), "--reps", "1", "--readers", "lmp-films"]) == 2
    assert "text: the bytes of shot 0 are not those written -> " in capsys.readouterr().err


def test_made_films_have_the_asked_size_and_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["bench", "data", "--make", "0.001", "--reps", "1", "--readers", "lmp-films", "--cold"]) == 0
    printed = capsys.readouterr().out
    assert "made here; page cache cold" in printed
    assert list(tmp_path.iterdir()) == []


def test_films_are_as_long_as_said() -> None:
    shots = lognormal_shots(20_000, np.random.default_rng(0))
    assert abs(shots.mean() / 1220 - 1) < 0.02
    assert abs(np.log(shots).std() - 0.5) < 0.02
    assert lognormal_shots(100, np.random.default_rng(0), mean=0.5).min() == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["data", "--readers", "tape"], "there is no reader 'tape'"),
        (["data", "--reps", "0"], "reps is 0"),
        (["data", "--make", "0"], "--make 0.0"),
        (["data", "s3://bucket/films"], "s3://bucket/films is not a local folder"),
        (["data", "{tmp}"], "holds no manifest.json"),
        (["data", "--out", "{tmp}/none/report.json"], "is not a folder"),
        (["plan", "--films", "0"], "--films 0"),
        (["plan", "--packs-per-step", "12"], "--packs-per-step 12"),
        (["plan", "--films", "2"], "fewer than 8 ranks"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_bench_plan_reports_fill_and_evenness(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    arguments = ["--films", "2000", "--pack-shots", "2048", "--packs-per-step", "16", "--out", str(out)]
    assert main(["bench", "plan", *arguments]) == 0
    found = json.loads(out.read_text())
    shots = lognormal_shots(2000, np.random.default_rng(0)).sum()
    assert found["fill"] == pytest.approx(shots / (found["packs"] * 2048))
    assert 0.9 < found["fill"] <= 1
    assert found["steps"] == found["packs"] // 16
    assert 0 <= found["imbalance_mean"] <= found["imbalance_p95"] <= found["imbalance_max"] < 1
    assert f"{found['packs']} packs" in capsys.readouterr().out


def test_saving_is_measured_in_both_ways(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    arguments = ["--width", "32", "--layers", "1", "--rounds", "2", "--folder", str(tmp_path), "--out", str(out)]
    ended = run("bench", "checkpoint", *arguments, module="lmp.cli")
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["bytes"] == 12 * report["parameters"]
    assert [len(report[name]) for name in ("blocking", "stall", "ratios", "written")] == [2] * 4
    assert report["ratios"] == [a / b for a, b in zip(report["stall"], report["blocking"], strict=True)]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
