"""Loops: what a speech recogniser says over and over when it has lost the sound."""

from __future__ import annotations

import re
import zlib
from collections.abc import Hashable, Sequence

COMPRESSION = 2.4
"""Text that deflate makes shorter by more than this is a loop (Whisper, section 4.5)."""
_PHRASE, _PHRASES = 16, 4  # words of a phrase, and how often in a row make it a loop
_LINES, _SAME = 4, 3  # lines of a verse, and how often in a row make it one


def without_repeats(items: Sequence[Hashable], *, longest: int, times: int) -> list[int]:
    """The places that stay when every run of equal stretches is cut down to its first stretch.

    Args:
        items: anything that can be compared.
        longest: items of a stretch at most.
        times: how often in a row a stretch must come to be a run, 2 or more.

    Returns:
        Ascending places in `items`. Applied to what they hold, it drops nothing more.
    """
    places = list(range(len(items)))
    while True:
        kept = _pass([items[place] for place in places], longest, times)
        if len(kept) == len(places):
            return places
        places = [places[place] for place in kept]


def plain(text: str) -> str:
    """What counts of a line or word when it is compared: its letters and digits, in lower case."""
    return "".join(re.findall(r"\w+", text.casefold()))


def without_loops(text: str) -> str:
    """A line with its repeated phrases said once. Scripts without spaces are taken letter by letter."""
    words = text.split()
    letters = len(words) < len(text) / 20
    units = [c for c in text if not c.isspace()] if letters else words
    kept = without_repeats([plain(unit) or unit for unit in units], longest=_PHRASE, times=_PHRASES)
    if len(kept) == len(units):
        return " ".join(words)
    return ("" if letters else " ").join(units[place] for place in kept)


def looped_lines(texts: Sequence[str]) -> set[int]:
    """The lines of a film, by place, that only say again what was said: verses of up to 4 lines, 3 times or more."""
    kept = without_repeats([plain(text) for text in texts], longest=_LINES, times=_SAME)
    return set(range(len(texts))) - set(kept)


def compression(text: str) -> float:
    """How many times shorter deflate makes a text."""
    raw = text.encode(errors="replace")
    return len(raw) / len(zlib.compress(raw)) if raw else 0.0


def _pass(items: list[Hashable], longest: int, times: int) -> list[int]:
    kept: list[int] = []
    at = 0
    while at < len(items):
        stretch, end = _run(items, at, longest, times)
        kept += range(at, at + stretch)
        at = end
    return kept


def _run(items: list[Hashable], at: int, longest: int, times: int) -> tuple[int, int]:
    """Length of the stretch that is repeated from here on, and the end of the run; (1, at + 1) where none is."""
    for stretch in range(1, min(longest, (len(items) - at) // times) + 1):
        first = items[at : at + stretch]
        end = at + stretch
        while items[end : end + stretch] == first:
            end += stretch
        if end - at >= times * stretch:
            cut_off = items[end:]  # amid a stretch, where the recogniser had to stop
            return stretch, len(items) if len(cut_off) < stretch and cut_off == first[: len(cut_off)] else end
    return 1, at + 1
