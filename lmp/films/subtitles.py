"""Subtitles of a film: reading them from a file and dealing them to the shots."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pysubs2
from charset_normalizer import from_bytes

from lmp.errors import UserError

SUFFIXES = (".srt", ".vtt", ".ass")

# The long marks first: that of UTF-32-LE begins with that of UTF-16-LE.
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_TAG = re.compile(r"</?[A-Za-z][^<>\n]*>|<\d[\d:.]*>|\{\\[^{}]*\}")
_REMEDY = "give an .srt, .vtt or .ass file with timed lines, or ingest the film without subtitles"


@dataclass(frozen=True)
class Line:
    """One subtitle: shown from `start_ms` until `end_ms`, plain text on one line."""

    start_ms: int
    end_ms: int
    text: str


@dataclass(frozen=True)
class Subtitles:
    """The lines of a film in order of time.

    Attributes:
        lines: what is said.
        dropped: how many were unusable.
        encoding: of the file that they were read from, "" if there was none.
        heard_by: the recogniser of speech that made them, as JSON; None where a file was read.
    """

    lines: tuple[Line, ...]
    dropped: int
    encoding: str
    heard_by: Mapping[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """For a film's record: how many lines, how many dropped, and where they come from."""
        source = {"encoding": self.encoding} if self.heard_by is None else self.heard_by
        return {"lines": len(self.lines), "dropped": self.dropped, **source}


def read_subtitles(path: Path) -> Subtitles:
    """Reads an .srt, .vtt or .ass file. Tags are stripped; empty or backward lines dropped and counted.

    Raises:
        UserError: the file cannot be read, or holds no usable line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read subtitles {path}: {error.strerror}", remedy=_REMEDY) from error
    text, encoding = _decode(raw)
    try:
        events = pysubs2.SSAFile.from_string(text)
    # Besides its own errors pysubs2 lets those of its parsers through (ValueError, IndexError, KeyError).
    except Exception as error:
        raise UserError(f"{path} is not a subtitle file: {error}", remedy=_REMEDY) from error
    lines: list[Line] = []
    dropped = 0
    for event in events:
        if event.is_comment or event.is_drawing:
            continue
        said, damaged = _plain(event.plaintext)
        dropped += damaged
        if said and 0 <= event.start <= event.end:
            lines.append(Line(int(event.start), int(event.end), said))
        else:
            dropped += 1
    if not lines:
        raise UserError(f"{path} holds no usable subtitle ({dropped} dropped)", remedy=_REMEDY)
    return Subtitles(tuple(sorted(lines, key=lambda line: (line.start_ms, line.end_ms))), dropped, encoding)


def words_of_shots(subtitles: Subtitles | None, shots_S2: np.ndarray) -> list[str]:
    """What is said in each shot.

    A line goes to the shot that holds its midpoint and to every shot of which it covers more than half.

    Args:
        subtitles: the lines of the film, or None where it has no subtitles.
        shots_S2: start and end of each shot in ms, in order of time and without overlap.

    Returns:
        One text per shot, "" where nothing is said.
    """
    said: list[list[str]] = [[] for _ in range(len(shots_S2))]
    if subtitles is not None and said:
        starts_S, ends_S = shots_S2[:, 0].astype(np.int64), shots_S2[:, 1].astype(np.int64)
        for line in subtitles.lines:
            middle = (line.start_ms + line.end_ms) // 2
            first = int(np.searchsorted(ends_S, line.start_ms, side="right"))
            last = int(np.searchsorted(starts_S, line.end_ms, side="right"))
            for shot in range(first, last):
                start, end = int(starts_S[shot]), int(ends_S[shot])
                covered = min(end, line.end_ms) - max(start, line.start_ms)
                if start <= middle < end or 2 * covered > end - start:
                    said[shot].append(line.text)
    return [" ".join(texts) for texts in said]


def find_subtitles(film: Path) -> Path | None:
    """The subtitles beside a film: FILM.srt, .vtt or .ass, or else FILM.en.srt and the like, or None."""
    if not film.parent.is_dir():
        return None
    beside = sorted(p for p in film.parent.iterdir() if p.suffix.lower() in SUFFIXES and p != film and p.is_file())
    by_suffix = sorted(beside, key=lambda p: SUFFIXES.index(p.suffix.lower()))
    for same in (lambda p: p.stem == film.stem, lambda p: Path(p.stem).stem == film.stem):
        found = next((p for p in by_suffix if same(p)), None)
        if found is not None:
            return found
    return None


def _decode(raw: bytes) -> tuple[str, str]:
    for mark, encoding in _BOMS:
        if raw.startswith(mark):
            return raw.decode(encoding, errors="replace"), encoding
    try:
        return raw.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    # A few accents are too little to guess from (cp1250 passes for cp1252), and such a text is West European.
    if sum(byte > 127 for byte in raw) > 0.02 * len(raw):
        guess = from_bytes(raw).best()
        if guess is not None:
            return str(guess), guess.encoding
    return raw.decode("cp1252", errors="replace"), "cp1252"


def _plain(text: str) -> tuple[str, int]:
    """The text on one line without tags, and the number of damaged blocks that the parser glued to it."""
    kept = _TAG.sub("", text).replace("\u200b", "").replace("\ufeff", "").splitlines()
    damaged = [i for i, line in enumerate(kept) if "-->" in line]
    if damaged:
        # The line before the time is the number of the damaged block.
        before = damaged[0] - 1
        kept = kept[: before if before >= 0 and kept[before].strip().isdigit() else damaged[0]]
    return " ".join(" ".join(kept).split()), len(damaged)
