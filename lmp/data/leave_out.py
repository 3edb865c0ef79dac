"""Films that must not be trained on, by id: the guard against evaluating on what was seen.

A list is a text file with one id a line (blank lines and lines that begin with `# ` are skipped). An id names a film
by the film's key, or by one of the fields of its record (KEY.json) in `ID_FIELDS`, each an id or a list of ids, or by
the `videoid` of one of the record's `clips`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmp.errors import UserError

ID_FIELDS = ("imdbid", "imdb_id", "title_id", "videoid", "video_id", "youtube_id", "videoids")
"""Fields of a film's record that hold ids of the film, or of clips in it."""


@dataclass(frozen=True)
class LeaveOut:
    """The ids of some lists.

    Attributes:
        ids: of films that are to be left out.
        files: names of the lists, without their folders.
    """

    ids: frozenset[str]
    files: tuple[str, ...]

    @classmethod
    def read(cls, paths: Sequence[str | Path]) -> LeaveOut | None:
        """The ids of all files together; None where no file is given.

        Raises:
            UserError: a file that is not there or is not text, a line of several words, or no id at all.
        """
        if not paths:
            return None
        ids: set[str] = set()
        for path in map(Path, paths):
            ids |= _read(path)
        return cls(frozenset(ids), tuple(path.name for path in map(Path, paths)))

    @property
    def digest(self) -> str:
        """sha256 over the sorted ids."""
        return hashlib.sha256("\n".join(sorted(self.ids)).encode()).hexdigest()

    def names(self, key: str, info: Mapping[str, Any] | None = None) -> bool:
        """Whether a film with this key and record is to be left out."""
        return key in self.ids or (info is not None and not self.ids.isdisjoint(record_ids(info)))


def record_ids(info: Mapping[str, Any]) -> Iterable[str]:
    """The ids in a film's record."""
    for field in ID_FIELDS:
        value = info.get(field)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (one for one in value if isinstance(one, str))
    yield from (str(clip["videoid"]) for clip in info.get("clips", ()) if "videoid" in clip)


def _read(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of ids ({error})", remedy="give a text file") from error
    found = set()
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word or line.startswith("# "):
            continue
        if len(word.split()) > 1 or "," in word:
            raise UserError(
                f"{path}, line {number}: is not one id",
                remedy="write one id a line, as `lmp tasks ids` does for a benchmark's films",
            )
        found.add(word)
    if not found:
        raise UserError(f"{path}: holds no id", remedy="write one id a line, or leave the file out")
    return found
