"""Ingest: films in, shards out; the broken ones reported."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.data.index import FilmIndex
from lmp.data.leave_out import LeaveOut
from lmp.data.verify import verify
from lmp.errors import UserError
from lmp.films import ingest as room
from lmp.films.detectors import build_finder
from lmp.films.film import FilmJob, FilmResult
from lmp.films.ingest import ingest
from lmp.films.synthetic import FilmSettings, make_films

SIGNAL = {"video": "signal", "audio": "signal", "text": "signal"}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    make_films(folder, films=3, seed=2, settings=FilmSettings(shots=12), workers=1, progress=False)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_any_number_of_workers_gives_the_same_shards(films: Path, tmp_path: Path) -> None:
    report = ingest([films], tmp_path / "one", encoders=SIGNAL, films_per_shard=2, progress=False)
    ingest([films], tmp_path / "two", encoders=SIGNAL, films_per_shard=2, workers=2, progress=False)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    index = FilmIndex.load(tmp_path / "one")
    assert (report.films, report.shots, report.failures) == (3, int(index.shots.sum()), [])
    assert index.keys == ["film-0000", "film-0001", "film-0002"]
    assert list(verify(index)) == []
    assert set(index.modalities) == set(SIGNAL)
    info = index.info(0)
    assert (info["source"], info["fps"]) == ("film-0000.mp4", 12.0)
    assert info["shots_from"] == build_finder().describe()
    assert info["subtitles"]["lines"] > 0
    film = index.read(0, 0, int(index.shots[0]))
    assert film.valid["video"].all() and film.valid["audio"].all()
    assert 0 < int(film.valid["text"].sum()) < len(film.valid["text"])


def test_given_lists_are_followed(films: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "film-0000.txt").write_text("0 12\n12 40\n")
    report = ingest([films], tmp_path / "out", encoders=SIGNAL, shot_lists=lists, progress=False)
    index = FilmIndex.load(tmp_path / "out")
    assert index.keys == ["film-0000"]
    assert index.info(0)["shots_from"] == {"list": "film-0000.txt"}
    assert index.read(0, 0, 2).shots_N2.tolist() == [[0, 1000], [1000, 3333]]
    assert [Path(film).name for film, _, _ in report.failures] == ["film-0001.mp4", "film-0002.mp4"]


def test_films_on_the_list_are_refused(films: Path, tmp_path: Path) -> None:
    leave_out = LeaveOut(frozenset({"film-0000", "film-0002"}), ("test.txt",))
    report = ingest([films], tmp_path / "out", encoders=SIGNAL, leave_out=leave_out, progress=False)
    assert [Path(film).stem for film in report.refused] == ["film-0000", "film-0002"]
    assert FilmIndex.load(tmp_path / "out").keys == ["film-0001"]


def test_broken_films_and_subtitles_are_reported(films: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(films / "film-0000.mp4", mixed / name)
    (mixed / "b.srt").write_text("nothing that has a time\n")
    (mixed / "c.mp4").write_text("text\n" * 100)
    report = ingest([mixed], tmp_path / "out", encoders=SIGNAL, workers=2, progress=False)
    assert report.films == 1
    assert [Path(film).name for film, _, _ in report.failures] == ["b.mp4", "c.mp4"]
    assert all(Path(film).stem in problem and remedy for film, problem, remedy in report.failures)
    index = FilmIndex.load(tmp_path / "out")
    assert index.keys == ["a"]
    assert index.info(0)["subtitles"] is None
    assert not index.read(0, 0, int(index.shots[0])).valid["text"].any()


def test_a_film_cut_short_is_refused(films: Path, tmp_path: Path) -> None:
    """A Matroska file states its length first and plays as far as it goes."""
    import av

    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    with av.open(str(films / "film-0000.mp4")) as source, av.open(str(whole), "w") as target:
        streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    report = ingest([cut, whole], tmp_path / "out", encoders=SIGNAL, progress=False)
    assert [Path(film).name for film, _, _ in report.failures] == ["cut.mkv"]
    assert "breaks off" in report.failures[0][1]
    assert FilmIndex.load(tmp_path / "out").keys == ["whole"]


def dies_on_b(job: FilmJob) -> FilmResult:
    """Stands in for `_work`; the spawned process has the real one under its own name."""
    if job.film.key == "b":
        os._exit(1)
    return room._work(job)


def test_a_film_that_ends_its_process_costs_no_other(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_work", dies_on_b)
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        shutil.copy(films / "film-0000.mp4", tmp_path / name)
    report = ingest([tmp_path], tmp_path / "out", encoders={"video": "signal"}, workers=2, progress=False)
    assert [Path(film).name for film, _, _ in report.failures] == ["b.mp4"]
    assert FilmIndex.load(tmp_path / "out").keys == ["a", "c"]


def test_nothing_good_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.mp4").write_text("text\n" * 100)
    report = ingest([tmp_path / "c.mp4"], tmp_path / "out", encoders=SIGNAL, progress=False)
    assert (report.films, len(report.failures)) == (0, 1)
    assert not (tmp_path / "out").exists()


def test_what_can_be_known_before_is_said_before(films: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(films / "film-0000.mp4", other / "film-0000.mp4")
    with pytest.raises(UserError, match="film-0000"):
        ingest([films, other], tmp_path / "out", encoders=SIGNAL, progress=False)
    with pytest.raises(UserError, match="sginal"):
        ingest([films], tmp_path / "out", encoders={"video": "sginal"}, progress=False)
    assert not (tmp_path / "out").exists()
