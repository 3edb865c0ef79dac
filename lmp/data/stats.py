"""What shards hold, in numbers: lengths, shot durations, how much of each modality is there, and how films pack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmp.data.film_slice import FilmSlice, Part
from lmp.data.index import FilmIndex
from lmp.data.plan import Films, PlanSettings, plan
from lmp.errors import UserError

_BATCH = 64  # films asked for at once


def stats(
    index: FilmIndex, *, pack_shots: int | None = None, progress: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """All of it, ready for JSON; reads shots and valid bits, no features.

    Args:
        pack_shots: P; adds `packing`, how an epoch of packs of P shots is filled.
        progress: told of bytes read; `bytes_to_read` in all.
    """
    valid = dict.fromkeys(index.modalities, 0)
    spans: list[np.ndarray] = []
    for first in range(0, len(index), _BATCH):
        films = range(first, min(first + _BATCH, len(index)))
        for rows in read_times_and_valid(index, films):
            spans.append(rows.shots_N2.numpy().copy())
            for name, valid_N in rows.valid.items():
                valid[name] += int(np.count_nonzero(valid_N.numpy()))
            progress(len(rows.shots_N2) * _row_bytes(index))
    shots = int(index.shots.sum())
    shot_seconds = np.concatenate([(span[:, 1] - span[:, 0]) / 1000 for span in spans])
    cleared = {n: sum(m["cleared"].get(n, 0) for m in index.manifests) for n in index.modalities}
    found: dict[str, Any] = {
        "films": len(index),
        "shots": shots,
        "hours": sum(int(span[-1, 1]) for span in spans) / 3.6e6,
        "shards": len(index.entries),
        "bytes": sum(entry["bytes"] for entry in index.entries),
        "film_shots": _quantiles(index.shots),
        "shot_seconds": _quantiles(shot_seconds),
        "modalities": {
            name: {
                "tokens": m.tokens,
                "width": m.width,
                "dtype": m.dtype,
                "valid": valid[name] / shots,
                "cleared": cleared[name],
            }
            for name, m in index.modalities.items()
        },
        "quarantined": {key: reason for m in index.manifests for key, reason in m["quarantined"].items()},
        "digest": index.digest,
    }
    if pack_shots is not None:
        found["packing"] = _fill(index, pack_shots)
    return found


def read_times_and_valid(index: FilmIndex, films: Sequence[int]) -> list[FilmSlice]:
    """Shots and valid bits of films, in one call; the features in the slices are undefined."""
    parts = [Part(film, 0, FilmSlice.empty(index.modalities, int(index.shots[film]))) for film in films]
    index.read_parts(parts, only=_wanted(index))
    return [part.out for part in parts]


def bytes_to_read(index: FilmIndex) -> int:
    """What stats reads."""
    return int(index.shots.sum()) * _row_bytes(index)


def lines(found: dict[str, Any]) -> list[str]:
    """The findings of `stats` for reading."""
    length, span = found["film_shots"], found["shot_seconds"]
    text = [
        f"{found['films']} films, {found['shots']} shots, {found['hours']:.2f} hours",
        f"{found['shards']} shards, {found['bytes']} bytes",
        "shots per film: "
        f"min {length['min']:g}, quartiles {length['q25']:g} {length['median']:g} {length['q75']:g}, "
        f"95 % {length['q95']:g}, max {length['max']:g}",
        f"seconds per shot: quartiles {span['q25']:.2f} {span['median']:.2f} {span['q75']:.2f}, max {span['max']:.2f}",
    ]
    for name, m in found["modalities"].items():
        cleared = f", {m['cleared']} shots cleared of NaN or infinity at writing" if m["cleared"] else ""
        text.append(f"{name}: {m['tokens']} x {m['width']} {m['dtype']}, valid {m['valid']:.4f}{cleared}")
    text += [f"quarantined: {key}: {reason}" for key, reason in found["quarantined"].items()]
    if packing := found.get("packing"):
        text.append(
            f"packs of {packing['pack_shots']} shots: {packing['packs']} in an epoch, fill {packing['fill']:.4f}, "
            f"attention cost {packing['mean_cost']:.0f} on average ({packing['relative_cost']:.3f} of one film that "
            "fills the pack)"
        )
    return [*text, f"digest {found['digest']}"]


def plot(index: FilmIndex, found: dict[str, Any], path: Path) -> None:
    """Draw film lengths and valid fractions.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib", remedy="pip install 'lmp[report]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (lengths, valid) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    try:
        lengths.hist(index.shots, bins=min(50, max(5, len(index) // 4)))
        lengths.set(title=f"{found['films']} films", xlabel="shots per film", ylabel="films")
        names = list(found["modalities"])
        bars = valid.bar(names, [found["modalities"][name]["valid"] for name in names])
        valid.bar_label(bars, fmt="%.3f")
        valid.set(title=f"{found['shots']} shots", ylabel="fraction of shots that are valid", ylim=(0, 1.1))
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"plot {path} cannot be written: {error}", remedy="give a FILE.png in a folder") from error
    finally:
        pyplot.close(figure)


def _fill(index: FilmIndex, pack_shots: int) -> dict[str, Any]:
    """How the packs of an epoch are filled; every film once."""
    epoch = plan(Films(index.shots), PlanSettings(seed=0, pack_shots=pack_shots, packs_per_step=1), 0)
    packs = [epoch.pack(number) for number in range(epoch.packs)]
    cost = sum(pack.cost for pack in packs) / len(packs)
    return {
        "pack_shots": pack_shots,
        "packs": len(packs),
        "fill": sum(pack.shots for pack in packs) / (len(packs) * pack_shots),
        "mean_cost": cost,
        "relative_cost": cost / pack_shots**2,
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    names = ["min", "q25", "median", "q75", "q95", "max"]
    return dict(zip(names, np.quantile(values, [0, 0.25, 0.5, 0.75, 0.95, 1]).tolist(), strict=True))


def _wanted(index: FilmIndex) -> list[str]:
    return ["shots", *(f"{name}_valid" for name in index.modalities)]


def _row_bytes(index: FilmIndex) -> int:
    """What is read of each shot."""
    return sum(column.row_bytes for column in index.columns if column.name in _wanted(index))
