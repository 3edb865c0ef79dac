"""Shards as tables: the first films, or one film's shots."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np

from lmp.data.index import FilmIndex
from lmp.data.stats import read_times_and_valid
from lmp.errors import UserError

_WHOLE = 11  # characters of a field that a narrow terminal still shows: those of a time


@dataclass
class Table:
    """Rows of text under names."""

    names: list[str]
    rows: list[list[str]]


def films_table(index: FilmIndex, count: int) -> Table:
    """Key, shots, duration, title and the valid fraction of each modality of the first films."""
    films = range(min(count, len(index)))
    rows = []
    for film, found in zip(films, read_times_and_valid(index, films), strict=True):
        valid = [f"{found.valid[name].numpy().mean():.3f}" for name in index.modalities]
        end_ms = int(found.shots_N2[-1, 1])
        title = " ".join(str(index.info(film).get("title", "")).split())
        rows.append([index.keys[film], str(int(index.shots[film])), clock(end_ms), title, *valid])
    return Table(["key", "shots", "duration", "title", *(f"{name} valid" for name in index.modalities)], rows)


def film_of(index: FilmIndex, key: str) -> int:
    """The number of a film.

    Raises:
        UserError: there is none with this key, or it is quarantined.
    """
    if key not in index.keys:
        out = {k: reason for m in index.manifests for k, reason in m["quarantined"].items()}
        if key in out:
            raise UserError(f"film {key} is quarantined: {out[key]}", remedy="take it in again with --release first")
        close = difflib.get_close_matches(key, index.keys, n=1)
        remedy = f"did you mean {close[0]}?" if close else "`lmp data head` without --film shows keys"
        raise UserError(f"{', '.join(index.folders)} has no film {key}", remedy=remedy)
    return index.keys.index(key)


def shots_table(index: FilmIndex, key: str, count: int | None = None) -> Table:
    """Number, start, end, valid modalities and the norm of each feature of a film's shots.

    Raises:
        UserError: there is no such film.
    """
    film = film_of(index, key)
    shots = int(index.shots[film])
    found = index.read(film, 0, min(count or shots, shots))
    norms = {
        name: np.linalg.norm(features_NKD.float().flatten(1).numpy(), axis=1)
        for name, features_NKD in found.features.items()
    }
    rows = []
    for shot, (start, end) in enumerate(found.shots_N2.tolist()):
        valid = [name for name in index.modalities if found.valid[name][shot]]
        rows.append([str(shot), clock(start), clock(end), " ".join(valid), *(f"{n[shot]:.4g}" for n in norms.values())])
    return Table(["shot", "start", "end", "valid", *(f"{name} norm" for name in norms)], rows)


def show(table: Table) -> None:
    """Print to stdout: a drawn table on a terminal, else lines with tabs between the fields."""
    from rich.console import Console
    from rich.table import Column
    from rich.table import Table as Drawn
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        print("\n".join("\t".join(row) for row in [table.names, *table.rows]))
        return
    longest = [max(map(len, column)) for column in zip(table.names, *table.rows, strict=True)]
    # Numbers and times are never cut; texts give way.
    drawn = Drawn(*(Column(name, min_width=min(n, _WHOLE)) for name, n in zip(table.names, longest, strict=True)))
    for row in table.rows:
        drawn.add_row(*(Text(field) for field in row))
    console.print(drawn)


def clock(milliseconds: int) -> str:
    """H:MM:SS.mmm."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}.{rest:03}"
