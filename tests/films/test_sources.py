"""Where films come from: lists, tars of video2dataset, URLs; what cannot be used is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import fsspec
import pytest
import webdataset

pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.data import remote, storage
from lmp.data.index import FilmIndex
from lmp.data.leave_out import LeaveOut
from lmp.errors import UserError
from lmp.films.ingest import ingest
from lmp.films.sources import Film, Source, brought, expand, key_of
from lmp.films.synthetic import FilmSettings, make_films
from tests.data.servers import Server, folder_app

SIGNAL = {"video": "signal", "text": "signal"}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    make_films(folder, films=2, seed=2, settings=FilmSettings(shots=12), workers=1, progress=False)
    return folder


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A storage that is reached through fsspec; empty."""
    monkeypatch.setattr(storage, "_REMOTE", {})
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies of films lie."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def write_tar(path: Path, *samples: dict[str, Any]) -> Path:
    """As video2dataset writes it."""
    with webdataset.TarWriter(str(path)) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def test_folders_expand_in_order(films: Path, tmp_path: Path) -> None:
    assert [film.key for film in expand([films]).films] == ["film-0000", "film-0001"]
    assert [str(film) for film in expand([films]).films] == [str(films / f"film-000{n}.mp4") for n in range(2)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no film"):
        expand([tmp_path / "empty"])
    with pytest.raises(UserError, match="nowhere"):
        expand([tmp_path / "nowhere.mp4"])


def test_keys_are_safe() -> None:
    assert key_of(Path("x/Amélie (2001).mkv")) == "Amelie-2001-"
    assert key_of(Path("-abc_9.mp4")) == "-abc_9"
    japanese, long = key_of(Path("映画.mp4")), key_of(Path("a" * 200 + ".mp4"))
    assert japanese.startswith("film-") and japanese != key_of(Path("東京.mp4"))
    assert len(long) <= 80


def test_a_csv_names_films_keys_subtitles_shots_and_facts(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(
        "\ufeffpath,key,subtitles,shots,title,year,key_actor\n"
        'a/one.mp4,tt1,subs/one.srt,,"One, two",1999,\n'
        f"{tmp_path}/b.mkv,b 2,,lists/b.csv,,2001,X\n"
        "https://host/c.mp4?sign=1/2.3,,,,,,\n",
        encoding="utf-8",
    )
    one, b, c = expand([tmp_path / "list.csv"]).films
    assert one == Film(
        "tt1",
        Source.of(tmp_path / "a/one.mp4"),
        {"title": "One, two", "year": "1999"},
        subtitles=Source.of(tmp_path / "subs/one.srt"),
        alone=True,
    )
    assert (b.key, b.shots, b.subtitles) == ("b-2", Source.of(tmp_path / "lists/b.csv"), None)
    assert b.info == {"year": "2001", "key_actor": "X"}
    assert (c.key, c.file.name, str(c)) == ("c", "c.mp4", "https://host/c.mp4?sign=1/2.3")
    assert [Film.from_json(json.loads(json.dumps(dataclasses.asdict(film)))) for film in (one, b)] == [one, b]


def test_a_parquet_keeps_the_types_of_its_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    columns = {
        "url": ["s3://b/x.mp4", "s3://b/y.mp4"],
        "id": [7, 8],
        "score": [0.5, float("nan")],
        "tags": [["a", "b"], []],
        "made": [date(1999, 1, 2), None],
        "shots": [None, "s3://b/y.csv"],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    x, y = expand([tmp_path / "list.parquet"]).films
    assert (x.key, x.info) == ("7", {"score": 0.5, "tags": ["a", "b"], "made": "1999-01-02"})
    assert (y.key, y.info, str(y.shots)) == ("8", {"tags": []}, "s3://b/y.csv")
    assert not x.alone
    (tmp_path / "broken.parquet").write_text("no such thing")
    with pytest.raises(UserError, match="is no parquet file"):
        expand([tmp_path / "broken.parquet"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("film,year\na.mp4,1\n", "no column path or url; it has film, year"),
        ("path,key\na.mp4,1\n,2\n", "row 2: path is empty"),
        ("path,title\na.mp4,One, two\n", "row 1 has more cells"),
        ("path\n", "names no film"),
        ("", "no column path or url"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        expand([tmp_path / "list.csv"])


def test_a_text_list_names_one_a_line(films: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", {"__key__": "k", "mp4": b"film", "json": {"year": 1}})
    (tmp_path / "all.txt").write_text(f"# mine\n{films}\n\n00000.tar\nmissing #1.mp4\n")
    found = expand([tmp_path / "all.txt"])
    assert [film.key for film in found.films] == ["film-0000", "film-0001", "k", "missing-1"]
    (tmp_path / "lists.txt").write_text("all.txt\n")
    with pytest.raises(UserError, match="names another list"):
        expand([tmp_path / "lists.txt"])


def test_a_tar_of_video2dataset(tmp_path: Path) -> None:
    spoken = {"en": [{"start": "00:00:00.000", "end": "00:00:01.500", "lines": ["hello", "you"]}], "de": []}
    facts = {"url": "https://x/1", "caption": "a film", "key": "0", "status": "success", "videoid": "v1"}
    path = write_tar(
        tmp_path / "00000.tar",
        {"__key__": "000", "mp4": b"one", "txt": "a film", "json": facts},
        {"__key__": "001", "mp4": b"four", "json": {"yt_meta_dict": {"info": {"id": "x"}, "subtitles": spoken}}},
        {"__key__": "002", "webm": b"three", "srt": b"1\n", "txt": "only text"},
        {"__key__": "003", "json": {"status": "failed_to_download", "error_message": "gone"}},
        {"__key__": "004", "mp4": b"five", "json": b"{"},
        {"__key__": "005", "mp4": b"six", "json": {"clips": [[5, 9]], "yt_meta_dict": {"subtitles": spoken}}},
    )
    found = expand([tmp_path])
    assert [film.key for film in found.films] == ["000", "001", "002", "005"]
    one, spoken_film, three, clip = found.films
    assert one.info == {name: value for name, value in facts.items() if name != "key"}
    assert str(one) == f"{path}, member 000.mp4"
    assert three.info == {"caption": "only text"}
    assert clip.subtitles is None
    assert spoken_film.info == {"yt_meta_dict": {"info": {"id": "x"}}}
    with brought(spoken_film.file, subtitles=spoken_film.subtitles) as (film, nothing, subtitles):
        assert film.read_bytes() == b"four" and nothing is None
        assert subtitles is not None and subtitles.name == "001.vtt"
        assert "00:00:00.000 --> 00:00:01.500\nhello\nyou\n" in subtitles.read_text()
    assert not film.exists()
    assert [(place, "gone" in problem or "not JSON" in problem) for place, problem, _ in found.failures] == [
        (f"{path}, sample 003", True),
        (f"{path}, sample 004", True),
    ]


def test_a_tar_cut_short_loses_only_what_is_cut(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", *({"__key__": f"{n}", "mp4": bytes(5000)} for n in range(3)))
    path.write_bytes(path.read_bytes()[:15000])
    found = expand([path])
    assert [film.key for film in found.films] == ["0"]  # of 1 it cannot be known whether it is whole
    ((place, problem, _),) = found.failures
    assert place == str(path) and "cut inside of member 2.mp4" in problem and "taken is 0" in problem


def test_films_of_tars_and_urls_are_read_as_local_ones(
    films: Path, tmp_path: Path, memory: Any, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Subtitles beside them too. Each is copied to scratch, once at a time, and goes."""
    local, subtitles = films / "film-0000.mp4", films / "film-0000.srt"
    for name in ("tarred", "packed"):
        members = {"mp4": local.read_bytes(), "srt": subtitles.read_bytes(), "txt": "?"}
        write_tar(tmp_path / f"{name}.tar", {"__key__": name, **members})
    memory.pipe({"/b/far.mp4": local.read_bytes(), "/b/far.srt": subtitles.read_bytes(), "/b/notes.md": b"no film"})
    memory.pipe("/t/0.tar", (tmp_path / "packed.tar").read_bytes())
    held: list[int] = []
    copy = Source.copy_into

    def counting(source: Source, folder: Path) -> Path:
        path = copy(source, folder)
        held.append(len(list(scratch.glob("*/*.mp4"))))
        return path

    monkeypatch.setattr(Source, "copy_into", counting)
    monkeypatch.setattr("lmp.films.sources._PIECE", 1000)  # films are many times as long as what is read at once
    sources = [local, tmp_path / "tarred.tar", "memory://b", "memory://t/0.tar"]
    report = ingest(sources, tmp_path / "out", encoders=SIGNAL, progress=False)
    assert (report.films, report.failures) == (4, [])
    index = FilmIndex.load(tmp_path / "out")
    assert index.keys == ["film-0000", "tarred", "far", "packed"]
    wanted = index.read(0, 0, int(index.shots[0]))
    for film in range(1, 4):
        found = index.read(film, 0, int(index.shots[film]))
        for name in ("shots", "video", "text", "text_valid"):
            assert (found.column(name) == wanted.column(name)).all()
    assert bool(wanted.valid["text"].any())
    assert (index.info(1)["caption"], index.info(2)["source"]) == ("?", "far.mp4")
    assert max(held) == 1 and list(scratch.iterdir()) == []


def test_facts_of_a_list_reach_the_record_and_the_list_of_films_to_leave_out(films: Path, tmp_path: Path) -> None:
    rows = [f"{films}/film-0000.mp4,a,tt1,The one,x,99", f"{films}/film-0001.mp4,b,tt2,The other,x,99"]
    (tmp_path / "list.csv").write_text("\n".join(["path,key,imdbid,title,encoders,fps", *rows]))
    leave_out = LeaveOut(frozenset({"tt2"}), ("ids.txt",))
    out = tmp_path / "out"
    report = ingest([tmp_path / "list.csv"], out, encoders=SIGNAL, leave_out=leave_out, progress=False)
    assert report.refused == [f"{films}/film-0001.mp4"]
    index = FilmIndex.load(out)
    info = index.info(0)
    assert index.keys == ["a"]
    assert (info["imdbid"], info["title"], info["source"], info["fps"]) == ("tt1", "The one", "film-0000.mp4", 12.0)


def test_shots_and_subtitles_of_a_list_are_followed(films: Path, tmp_path: Path, memory: Any, scratch: Path) -> None:
    memory.pipe({"/b/one.txt": b"0 12\n12 40\n", "/b/one.srt": b"1\n00:00:01,500 --> 00:00:02,000\nhello\n"})
    rows = [f"{films}/film-0000.mp4,memory://b/one.txt,memory://b/one.srt", f"{films}/film-0001.mp4,,"]
    (tmp_path / "list.csv").write_text("\n".join(["path,shots,subtitles", *rows]))
    report = ingest([tmp_path / "list.csv"], tmp_path / "out", encoders=SIGNAL, progress=False)
    assert (report.films, report.failures) == (2, [])
    index = FilmIndex.load(tmp_path / "out")
    given = index.read(0, 0, 2)
    assert given.shots_N2.tolist() == [[0, 1000], [1000, 3333]] and given.valid["text"].tolist() == [False, True]
    assert index.info(0)["shots_from"] == {"list": "one.txt"}
    assert int(index.shots[1]) > 2 and index.info(1)["subtitles"] is None, "those beside it are not taken"
    assert list(scratch.iterdir()) == []


def test_an_error_names_the_source_and_not_its_copy(films: Path, tmp_path: Path, memory: Any, scratch: Path) -> None:
    memory.pipe({"/b/cut.mp4": (films / "film-0000.mp4").read_bytes()[:2000], "/b/text.mp4": b"text\n" * 100})
    sources = ["memory://b/cut.mp4", "memory://b/text.mp4", "memory://b/none.mp4", films / "film-0001.mp4"]
    report = ingest(sources, tmp_path / "out", encoders=SIGNAL, progress=False)
    assert [place for place, _, _ in report.failures] == sources[:3]
    assert all(place in problem and str(scratch) not in problem for place, problem, _ in report.failures)
    assert FilmIndex.load(tmp_path / "out").keys == ["film-0001"]
    assert list(scratch.iterdir()) == []


def test_an_interrupted_ingest_fetches_again_only_what_has_changed(
    films: Path, tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe({f"/b/{name}.mp4": (films / "film-0000.mp4").read_bytes() for name in ("a", "b")})
    fetched: list[str] = []
    copy = Source.copy_into

    def counting(source: Source, folder: Path) -> Path:
        fetched.append(source.name)
        return copy(source, folder)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Source, "copy_into", counting)
    with monkeypatch.context() as patch:
        patch.setattr("lmp.films.ingest.ShardWriter.close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ingest(["memory://b"], tmp_path / "out", encoders=SIGNAL, progress=False)
    assert fetched == ["a.mp4", "b.mp4"]
    memory.pipe("/b/b.mp4", (films / "film-0001.mp4").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr("lmp.films.ingest.ShardWriter.close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ingest(["memory://b"], tmp_path / "out", encoders=SIGNAL, progress=False)
    assert fetched == ["a.mp4", "b.mp4", "b.mp4"]
    (tmp_path / "list.csv").write_text("path,year\nmemory://b/a.mp4,1999\nmemory://b/b.mp4,\n")  # a fact is new
    ingest([tmp_path / "list.csv"], tmp_path / "out", encoders=SIGNAL, progress=False)
    assert fetched == ["a.mp4", "b.mp4", "b.mp4", "a.mp4"]
    assert FilmIndex.load(tmp_path / "out").info(0)["year"] == "1999"
    ingest([films / "film-0001.mp4"], tmp_path / "one", encoders=SIGNAL, progress=False)
    index, one = FilmIndex.load(tmp_path / "out"), FilmIndex.load(tmp_path / "one")
    assert index.shots[1] == one.shots[0]


def test_films_over_http(films: Path, tmp_path: Path, memory: Any, scratch: Path) -> None:
    """By a list with an address that is signed, from a server that fails at first."""
    with Server(folder_app(films.parent)) as server:
        address = f"{server.url}/{films.name}/film-0000.mp4"
        (tmp_path / "list.csv").write_text(f"url,subtitles\n{address}?sign=a/b.c,{address[:-3]}srt\n{address},\n")
        (tmp_path / "other.csv").write_text(f"url,id\n{address},plain\n")
        (signed, bare) = expand([tmp_path / "list.csv"]).films
        server.failures = 2
        with brought(signed.file, subtitles=signed.subtitles) as (film, _, subtitles):
            assert film.read_bytes() == (films / "film-0000.mp4").read_bytes()
            assert subtitles is not None and subtitles.read_bytes() == (films / "film-0000.srt").read_bytes()
        assert bare.subtitles_in(None) is None
        (plain,) = expand([tmp_path / "other.csv"]).films
        assert plain.subtitles_in(None) == Source.of(f"{address[:-3]}srt")
        assert signed.file.state() == signed.file.state()
