"""`lmp data ...`: looking at shards, mending them, and making them from what others wrote."""

from __future__ import annotations

import argparse
from typing import Any

from lmp.errors import EXIT_DONE, UserError

_NAMED = 5


def register(data: Any) -> None:
    """Add the commands to the subparsers of `lmp data`."""
    _verify_command(data)
    _stats_command(data)


def _verify_command(data: Any) -> None:
    verify = data.add_parser("verify", help="read everything and name what is damaged")
    verify.add_argument("shards", nargs="+")
    verify.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from lmp.data.index import FilmIndex
    from lmp.data.verify import verify

    index = FilmIndex.load(arguments.shards, check_sizes=False)
    faults = list(verify(index))
    for fault in faults:
        print(fault)
    if faults:
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise UserError(
            "; ".join(map(str, faults[:_NAMED])) + more,
            remedy="copy the shard again from its source, or take those films out with `lmp data quarantine`",
        )
    print(f"{len(index)} films, {int(index.shots.sum())} shots: no damage, digest {index.digest}")
    return EXIT_DONE


def _stats_command(data: Any) -> None:
    stats = data.add_parser("stats", help="films, shots, modalities")
    stats.add_argument("shards", nargs="+")
    stats.set_defaults(run=_stats)


def _stats(arguments: argparse.Namespace) -> int:
    from lmp.data.index import FilmIndex

    index = FilmIndex.load(arguments.shards)
    shots = index.shots
    print(f"{len(index)} films, {int(shots.sum())} shots, {shots.min()} to {shots.max()} per film")
    for name, modality in index.modalities.items():
        print(f"{name}: {modality.tokens} x {modality.width} {modality.dtype}")
    print(f"digest {index.digest}")
    return EXIT_DONE
