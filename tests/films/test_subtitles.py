"""Subtitles: reading files of every encoding and damage, and dealing their lines to shots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmp.errors import UserError
from lmp.films.subtitles import Line, Subtitles, find_subtitles, read_subtitles, words_of_shots

SRT = "1\n00:00:01,000 --> 00:00:02,500\n<i>Où est</i>\nle café ?\n\n2\n00:00:04,000 --> 00:00:05,000\nIci.\n"
WANTED = (Line(1000, 2500, "Où est le café ?"), Line(4000, 5000, "Ici."))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_every_encoding_gives_the_same_lines(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "film.srt"
    many = SRT + "".join(f"\n{i}\n00:01:{i:02},000 --> 00:01:{i:02},500\nNothing else.\n" for i in range(3, 60))
    path.write_bytes(many.encode(encoding))
    subtitles = read_subtitles(path)
    assert subtitles.lines[:2] == WANTED
    assert subtitles.dropped == 0
    assert subtitles.encoding == encoding


def test_a_cyrillic_file_is_guessed(tmp_path: Path) -> None:
    said = "Здравствуйте, товарищ. Сегодня прекрасная погода, не правда ли?"
    path = tmp_path / "film.srt"
    path.write_bytes(
        "".join(f"{i}\n00:00:{i:02},0 --> 00:00:{i:02},900\n{said}\n\n" for i in range(1, 40)).encode("cp1251")
    )
    assert read_subtitles(path).lines[0].text == said


def test_vtt_and_ass_lose_their_tags(tmp_path: Path) -> None:
    vtt = tmp_path / "a.vtt"
    said = "<v Anna><c.yellow>Où est</c>\nle café ?</v>"
    vtt.write_text(f"WEBVTT\n\n00:01.000 --> 00:02.500\n{said}\n", encoding="utf-8")
    ass = tmp_path / "a.ass"
    ass.write_text(
        "[Script Info]\nScriptType: v4.00+\n\n[V4+ Styles]\n\n[Events]\n"
        "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
        "Comment: 0,0:00:00.00,0:00:09.00,Default,,0,0,0,,not said\n"
        "Dialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,{\\an8}Où est\\Nle {\\i1}café{\\i0} ?\n",
        encoding="utf-8",
    )
    for path in (vtt, ass):
        assert read_subtitles(path).lines == WANTED[:1]
        assert read_subtitles(path).dropped == 0


def test_damage_is_dropped_and_counted_and_lines_are_sorted(tmp_path: Path) -> None:
    path = tmp_path / "film.srt"
    path.write_text(
        "1\n00:00:09,000 --> 00:00:10,000\nlast\n\n"
        "2\n00:00:08,000 --> 00:00:07,000\nbackward\n\n"
        "3\n00:00:05,000 --> 00:00:06,000\n<i> </i>\n\n"
        "4\n00:00:01,000 --> 00:00:02,000\nfirst\n\n"
        "5\n00:00:xx,000 --> 00:00:03,000\nbroken time\n\n",
        encoding="utf-8",
    )
    subtitles = read_subtitles(path)
    assert [line.text for line in subtitles.lines] == ["first", "last"]
    assert subtitles.dropped == 3


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02\xff" * 50, b"just prose\n", b"WEBVTT\n\n"])
def test_nothing_usable_is_the_users_mistake(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "film.srt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"film\.srt") as caught:
        read_subtitles(path)
    assert caught.value.remedy


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        read_subtitles(tmp_path / "missing.srt")


def test_lines_go_to_the_shot_of_their_midpoint_and_to_shots_mostly_covered() -> None:
    shots = np.array([[0, 1000], [1000, 2000], [2000, 2400], [2400, 6000], [7000, 8000]], np.int32)
    lines = (
        Line(100, 900, "inside"),
        Line(900, 1900, "mostly second"),
        Line(1800, 3200, "middle in fourth, covers third"),
        Line(6200, 6800, "in a gap"),
        Line(7999, 9000, "outside"),
        Line(7500, 7500, "an instant"),
    )
    assert words_of_shots(Subtitles(lines, 0, "utf-8"), shots) == [
        "inside",
        "mostly second",
        "middle in fourth, covers third",
        "middle in fourth, covers third",
        "an instant",
    ]


def test_no_subtitles_and_no_shots() -> None:
    assert words_of_shots(None, np.array([[0, 10], [10, 20]])) == ["", ""]
    assert words_of_shots(Subtitles(WANTED, 0, "utf-8"), np.zeros((0, 2), np.int32)) == []


def test_the_subtitles_beside_a_film_are_found(tmp_path: Path) -> None:
    film = tmp_path / "A film [1950].mp4"
    film.touch()
    (tmp_path / "A film.srt").touch()
    assert find_subtitles(film) is None
    (tmp_path / "A film [1950].en.srt").touch()
    assert find_subtitles(film) == tmp_path / "A film [1950].en.srt"
    for suffix in (".ass", ".VTT", ".srt"):
        (tmp_path / f"A film [1950]{suffix}").touch()
        assert find_subtitles(film) == tmp_path / f"A film [1950]{suffix}"
    assert find_subtitles(tmp_path / "nowhere" / "film.mp4") is None


def test_every_real_file_parses(real_data: Path) -> None:
    paths = sorted((real_data / "subtitles" / "srt").rglob("*.srt"))
    assert len(paths) == 115
    for path in paths:
        subtitles = read_subtitles(path)
        starts = [line.start_ms for line in subtitles.lines]
        assert starts == sorted(starts)
        assert subtitles.dropped <= 0.01 * len(starts), path.name
        assert all(line.text and "-->" not in line.text for line in subtitles.lines)
        if "\ufffd".encode() not in path.read_bytes():
            assert not any("\ufffd" in line.text for line in subtitles.lines), path.name
        end = max(line.end_ms for line in subtitles.lines)
        cuts = np.arange(0, end + 4000, 4000)
        said = words_of_shots(subtitles, np.stack([cuts[:-1], cuts[1:]], axis=1))
        # Shots tile the film, so every line is in one of them at least.
        assert sum(map(len, said)) >= sum(len(line.text) for line in subtitles.lines)
