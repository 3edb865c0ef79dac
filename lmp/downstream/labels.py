"""Known labels of films, for probes only: KEY.labels.json beside the films or in a folder of their own.

A file holds `{"film": {"genre": ...}, "shots": [{"start_ms": ..., "end_ms": ..., "place": ..., ...}, ...]}`.
Names are free; a label is a string, a whole number or true/false, and lists are not labels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmp.errors import UserError


@dataclass
class FilmLabels:
    """Labels of one film by name; those of shots are one per shot of the shards, None where unknown."""

    film: dict[str, str]
    shots: dict[str, list[str | None]]


def read_labels(folder: Path, key: str, shots_N2: np.ndarray) -> FilmLabels | None:
    """Labels of a film, or None where the folder has none for it.

    Args:
        folder: holds KEY.labels.json files, itself or in the folders just below.
        key: of the film.
        shots_N2: detected shots in ms; each gets the labels of the true shot that it overlaps most.

    Raises:
        UserError: the file is not what this module describes.
    """
    name = f"{key}.labels.json"
    path = next((p for p in (folder / name, *sorted(folder.glob(f"*/{name}"))) if p.is_file()), None)
    if path is None:
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        true_shots = raw["shots"]
        spans_M2 = np.array([(shot["start_ms"], shot["end_ms"]) for shot in true_shots], dtype=np.int64).reshape(-1, 2)
        film = {name: str(value) for name, value in raw.get("film", {}).items() if _is_label(value)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a file of labels ({type(error).__name__}: {error})",
            remedy='write {"film": {...}, "shots": [{"start_ms": 0, "end_ms": 1, ...}, ...]}',
        ) from error
    names = {name for shot in true_shots for name, value in shot.items() if _is_label(value)} - {
        "start_ms",
        "end_ms",
    }
    best_N = overlapped_most(np.asarray(shots_N2, dtype=np.int64), spans_M2)
    shots: dict[str, list[str | None]] = {
        name: [_label(true_shots[best].get(name)) if best >= 0 else None for best in best_N.tolist()]
        for name in sorted(names)
    }
    return FilmLabels(film, shots)


def overlapped_most(shots_N2: np.ndarray, spans_M2: np.ndarray) -> np.ndarray:
    """For each [start, end) the number of the span that it shares most time with, the first of equals.

    -1 where it shares none.
    """
    if not len(spans_M2):
        return np.full(len(shots_N2), -1)
    start_NM = np.maximum(shots_N2[:, None, 0], spans_M2[None, :, 0])
    shared_NM = np.minimum(shots_N2[:, None, 1], spans_M2[None, :, 1]) - start_NM
    best_N = shared_NM.argmax(1)
    return np.where(shared_NM.max(1) > 0, best_N, -1)


def check_labels(folder: Path, found: int) -> None:
    """Refuse a folder without a label for any film.

    Raises:
        UserError: the folder is not there, or `found` is 0.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder of labels", remedy="give the folder that holds KEY.labels.json files"
        )
    if not found:
        raise UserError(
            f"{folder}: no KEY.labels.json for any film of the shards",
            remedy="give the folder whose label files are named by the films' keys, or leave labels out",
        )


def _is_label(value: Any) -> bool:
    return isinstance(value, (str, bool, int))


def _label(value: Any) -> str | None:
    return str(value) if _is_label(value) else None
