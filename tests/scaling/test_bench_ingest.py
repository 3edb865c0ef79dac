"""`lmp bench ingest`: all subjects work on the same films, the encoders on what ingest gives them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.cli import main
from lmp.data.index import FilmIndex
from lmp.errors import UserError
from lmp.films.media import probe
from lmp.films.synthetic import FilmSettings, make_films
from lmp.scaling.bench_ingest import FFMPEG, SUBJECTS, Work, _ingest, _recorded, bench_ingest
from lmp.scaling.bench_ingest_films import make_long_film

SIGNAL = {"video": "signal", "audio": "signal", "text": "signal"}


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    (film,) = make_films(folder, films=1, seed=2, settings=FilmSettings(shots=12), workers=1, progress=False)
    return film


def test_the_report_holds_every_subject(film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    assert (
        main(["bench", "ingest", str(film), "--reps", "1", "--memory", "8", "--batches", "4", "--out", str(out)]) == 0
    )
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert {*found["turns"], *found["skipped"]} == set(SUBJECTS)
    assert (FFMPEG in found["skipped"]) == (shutil.which("ffmpeg") is None)
    assert found["film_seconds"] == pytest.approx(probe(film).duration_s)
    assert found["turns"]["decode"]["of_decode"]["median"] == 1
    for subject, row in found["turns"].items():
        assert len(row["cpu_seconds"]) == 1 and row["cpu_seconds"][0] > 0
        assert row["films_per_cpu_second"]["median"] == pytest.approx(1 / row["cpu_seconds"][0])
        assert f"| {subject} |" in printed
    assert [(row["encoder"], row["batch"]) for row in found["batches"]] == [
        (f"signal-{kind}", size) for kind in ("picture", "sound", "words") for size in (1, 4)
    ]
    assert all(row["difference"] == 0 and row["cpu_seconds"] > 0 for row in found["batches"])  # nothing learned
    peak, before = found["peaks"]["8"]
    assert peak > before > 0


def test_the_encoders_are_given_what_ingest_gives_them(film: Path, tmp_path: Path) -> None:
    work = Work((film,), SIGNAL, tmp_path)
    _ingest(work)
    index = FilmIndex.load(tmp_path / "shards")
    made = index.read(0, 0, int(index.shots[0]))
    for name, standin in zip(SIGNAL, _recorded(work), strict=True):
        features, valid = zip(*(standin.encoder.encode(batch) for batch in standin.given), strict=True)
        assert torch.cat(valid).tolist() == made.valid[name].tolist()
        assert torch.equal(torch.cat(features).half(), made.features[name])


def test_a_long_film_has_shots_sound_and_words(tmp_path: Path) -> None:
    film = make_long_film(tmp_path / "long.mkv", 40)
    _ingest(Work((film,), SIGNAL, tmp_path))
    index = FilmIndex.load(tmp_path / "shards")
    read = index.read(0, 0, int(index.shots[0]))
    assert read.shots_N2.tolist() == [[start, start + 4000] for start in range(0, 40000, 4000)]
    assert all(read.valid[name].all() for name in SIGNAL)


def test_nothing_to_measure_is_refused(film: Path) -> None:
    with pytest.raises(UserError, match="nothing to measure"):
        bench_ingest([film], encoders=SIGNAL, reps=0)
