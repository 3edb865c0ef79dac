"""A film of the shards as a table and as pictures: what is odd is seen, and where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
pytest.importorskip("scenedetect")
pytest.importorskip("matplotlib")

from matplotlib import colormaps  # noqa: E402
from PIL import Image  # noqa: E402

from lmp.cli import main  # noqa: E402
from lmp.data.index import FilmIndex  # noqa: E402
from lmp.data.inspect_film import inspect_film  # noqa: E402
from lmp.data.inspect_sheet import COLUMNS, ROWS  # noqa: E402
from lmp.data.shards import FilmRecord  # noqa: E402
from lmp.films.ingest import ingest  # noqa: E402

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (0, 0, 0), (200, 200, 30)]
LEVELS = [0.1, 0.5, 0.0, 0.1, 0.2]  # a second of each colour, with a sound of this level


def write_film(path: Path, seconds: int = len(COLOURS)) -> Path:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 192, 108, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for second in range(seconds):
            picture = np.full((108, 192, 3), COLOURS[second % len(COLOURS)], np.uint8)
            for _ in range(10):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        for second in range(seconds):
            wave = np.full((1, 16000), round(LEVELS[second % len(LEVELS)] * 32767), np.int16)
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, second * 16000
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return path


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with films/a.mkv, its subtitles and list, and its shards."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "films").mkdir()
    write_film(folder / "films" / "a.mkv")
    (folder / "films" / "a.srt").write_text("1\n00:00:01,200 --> 00:00:01,800\nWho goes there?\n")
    (folder / "a.txt").write_text("".join(f"{second * 10} {second * 10 + 10}\n" for second in range(len(COLOURS))))
    encoders = {"video": "signal", "audio": "signal", "text": "signal"}
    ingest([folder / "films"], folder / "shards", encoders=encoders, shot_lists=folder / "a.txt", progress=False)
    return folder


def rows_of(text: str) -> list[dict[str, str]]:
    lines = [line.split("\t") for line in text.splitlines() if "\t" in line]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_odd_features_are_marked_where_they_are(
    film: Callable[..., FilmRecord], write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = film("odd", 12)
    record.features["video"][4] = record.features["video"][3]
    record.features["video"][7] = 0.5
    record.features["video"][8] = float("nan")
    record.valid["audio"][:] = True
    record.features["audio"][10] = -record.features["audio"][9]
    record.shots_S2[5, 1] = record.shots_S2[6, 0]
    shards = write(tmp_path / "shards", [record])
    assert main(["data", "inspect", str(shards)]) == 0
    told = capsys.readouterr().out
    assert "1 cleared" in next(line for line in told.splitlines() if line.startswith("video: 1 x 8"))
    rows = rows_of(told)
    assert [row["shot"] for row in rows] == [str(n) for n in range(12)]
    assert rows[0]["start"] == "0:00:00.000" and rows[0]["end"] == "0:00:00.900" and rows[0]["s"] == "0.9"
    gap = "gap 0.1 s"
    assert [row["marks"] for row in rows[3:9]] == [
        gap,
        f"{gap}, video repeated",
        gap,
        "",
        f"{gap}, video constant",
        gap,
    ]
    norm, like = rows[4]["video"].split()
    assert float(norm) == pytest.approx(float(record.features["video"][4].float().norm()), rel=1e-2)
    assert like == "1.00"
    assert rows[8]["video"] == "none" and len(rows[9]["video"].split()) == 1
    assert rows[10]["audio"].endswith(" -1.00")
    assert main(["data", "inspect", str(shards), "--first", "4", "-n", "2"]) == 0
    assert rows_of(capsys.readouterr().out) == rows[4:6]


def test_the_film_at_hand_shows_its_words_loudness_and_pictures(
    ingested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    ask = ["data", "inspect", str(ingested / "shards"), "--film", "a", "--out", str(out)]
    assert main([*ask, "--films", str(ingested / "films")]) == 0
    told = capsys.readouterr().out
    rows = rows_of(told)
    assert [row["dB"] for row in rows] == ["-20", "-6", "-inf", "-20", "-14"]
    assert [row["words"] for row in rows] == ["", "Who goes there?", "", "", ""]
    assert [row["marks"] for row in rows] == ["", "", "silent", "black", ""]
    assert [row["text"] != "none" for row in rows] == [False, True, False, False, False]
    assert "shots from a.txt" in told and told.endswith(f"drawn: {out}\n")
    sheet = np.asarray(Image.open(out).convert("RGB")).astype(int)
    # Where the colours lie: one beside the other, in order.
    centres = []
    for colour in (COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[4]):
        y, x = np.nonzero((np.abs(sheet - colour) < 25).all(axis=2))
        assert len(x) > 100 * 200
        centres.append((np.median(x), np.median(y)))
    assert [round((x - centres[0][0]) / 240) for x, _ in centres] == [0, 1, 2, 4]
    assert np.ptp([y for _, y in centres]) < 10


def test_long_films_take_several_pages(ingested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = COLUMNS * ROWS + 3
    path = write_film(tmp_path / "long.mkv", seconds)
    (tmp_path / "long.txt").write_text("".join(f"{n * 10} {n * 10 + 10}\n" for n in range(seconds)))
    ingest([path], tmp_path / "shards", encoders={"video": "signal"}, shot_lists=tmp_path / "long.txt", progress=False)
    ask = ["data", "inspect", str(tmp_path / "shards"), "--films", str(path), "--out", str(tmp_path / "sheet.png")]
    assert main(ask) == 0
    pages = [line.removeprefix("drawn: ") for line in capsys.readouterr().out.splitlines() if line.startswith("drawn")]
    assert pages == [str(tmp_path / f"sheet-{n}.png") for n in (1, 2)]
    full, rest = (Image.open(page).size for page in pages)
    assert full[0] == rest[0] and full[1] - rest[1] == (ROWS - 1) * 240
    assert main([*ask, "--first", "2", "-n", "4"]) == 0
    assert capsys.readouterr().out.endswith(f"drawn: {tmp_path / 'sheet.png'}\n")


def test_without_the_film_the_features_are_drawn(
    film: Callable[..., FilmRecord], write: Callable[..., Path], tmp_path: Path
) -> None:
    """Two scenes of the same features each: two bright squares, and dark between them; a missing shot is grey."""
    record = film("scenes", 20)
    one = torch.randn(8, generator=torch.Generator().manual_seed(0)).half()
    record.features["video"][:10], record.features["video"][10:] = one, -one
    record.valid["video"][19] = False
    shards = write(tmp_path / "shards", [record])
    out = tmp_path / "features.png"
    assert main(["data", "inspect", str(shards), "--out", str(out)]) == 0
    sheet = np.asarray(Image.open(out).convert("RGB"))
    low, high = ((np.array(colormaps["viridis"](value)[:3]) * 255).astype(np.uint8) for value in (0.0, 1.0))
    bright, dark = (((sheet == colour).all(axis=2)) for colour in (high, low))
    rows = np.flatnonzero(dark.sum(axis=1) > 200)  # of the matrix of video: in half of each row scenes differ
    rows = rows[: np.append(np.flatnonzero(np.diff(rows) > 1) + 1, len(rows))[0]]  # not those of the strips below
    columns = np.flatnonzero(dark[rows[0] : rows[-1]].sum(axis=0) > 200)
    matrix = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    assert abs((rows[-1] - rows[0]) - (columns[-1] - columns[0])) < 3
    side = (columns[-1] - columns[0] + 1) / 19  # the last shot is missing
    for shot, other in ((0, 9), (10, 18), (3, 3)):
        assert bright[matrix][int((shot + 0.5) * side), int((other + 0.5) * side)]
    for shot, other in ((0, 10), (18, 9)):
        assert dark[matrix][int((shot + 0.5) * side), int((other + 0.5) * side)]
    beyond = sheet[matrix[0].start + 5, columns[-1] + int(side / 2)]
    assert beyond.tolist() == [229, 231, 235]


def test_likeness_of_a_first_shot_looks_back(
    film: Callable[..., FilmRecord], write: Callable[..., Path], tmp_path: Path
) -> None:
    index = FilmIndex.load(write(tmp_path / "shards", [film("a", 9), film("b", 5, seed=1)]))
    whole, part = inspect_film(index, 0), inspect_film(index, 0, first=4, count=3)
    assert np.isnan(whole.like["video"][0]) and not np.isnan(part.like["video"][0])
    assert part.like["video"].tolist() == whole.like["video"][4:7].tolist()
    assert part.marks == whole.marks[4:7]
    assert part.shots_S2.tolist() == whole.shots_S2[4:7].tolist()


def test_all_films_are_listed_with_what_is_odd(ingested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_film(ingested / "films" / "b.mkv", 3)
    out = ingested / "both"
    ingest([ingested / "films"], out, encoders={"video": "signal", "audio": "signal"}, min_shot_s=0.75, progress=False)
    assert main(["data", "inspect", str(out)]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [(row["film"], row["length"]) for row in rows] == [("a", "0:00:05.000"), ("b", "0:00:03.000")]
    assert "min_shot_s 0.75" in rows[0]["shots from"]
    assert "silent" in rows[0]["odd shots"] and "black" in rows[0]["odd shots"]
    assert "black" not in rows[1]["odd shots"]


def test_another_film_of_the_same_name_is_noticed(
    ingested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_film(tmp_path / "a.mkv", 8)
    assert main(["data", "inspect", str(ingested / "shards"), "--films", str(other)]) == 0
    assert "a.mkv is 8.0 s long, the film of the shards 5.0 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--film", "aa"], "did you mean a?"),
        (["--first", "5"], "shots 0 to 4"),
        (["-n", "0"], "at least 1"),
        (["--out", "sheet.jpg"], "FILE.png"),
        (["--out", "nowhere/sheet.png"], "folder"),
        (["--subtitles", "films"], "--films"),
        (["--films", "nowhere"], "nowhere"),
        (["--films", "films/c.mkv"], "no film a"),
    ],
)
def test_what_cannot_be_shown_is_said(
    ingested: Path,
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ingested)
    if not Path("films/c.mkv").exists():
        Path("films/c.mkv").write_bytes(Path("films/a.mkv").read_bytes())
    assert main(["data", "inspect", "shards", *options]) == 2
    told = capsys.readouterr()
    assert said in told.err and len(told.err.splitlines()) == 1 and not told.out
