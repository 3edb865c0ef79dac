"""Whether a start of a job may go on: not after too many restarts, and not in a crash loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lmp.cluster import ClusterConfig
from lmp.train.run_folder import RunFolder


def ledger(folder: RunFolder) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a line that a crash cut off is left out."""
    if not folder.ledger.is_file():
        return []
    events = []
    for line in folder.ledger.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def newest_checkpoint(folder: RunFolder) -> str:
    """Names the newest checkpoint and when it was made; "none" without one. Whether it is valid is not looked at."""
    found = [path for path in folder.checkpoints.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    if not found:
        return "none"
    newest = max(found, key=lambda path: path.name)
    return f"{newest.name} of {newest.stat().st_mtime_ns}"


def refused(
    events: Sequence[dict[str, Any]], *, job: str, restart: int, checkpoint: str, cluster: ClusterConfig
) -> str | None:
    """Why this start of a job is refused; None: it may go on.

    Args:
        events: the ledger before this start.
        job: the job's id; another submission counts from the beginning.
        restart: how often the job was restarted.
        checkpoint: newest_checkpoint of now.
        cluster: the bounds.
    """
    if restart > cluster.max_restarts:
        return f"restarted {restart} times, cluster.max_restarts={cluster.max_restarts} allows no more"
    fruitless = 0
    for event in reversed(events):
        if event.get("event") != "launch" or event.get("job") != job:
            continue
        if event.get("checkpoint") != checkpoint:
            break
        fruitless += 1
    if fruitless < cluster.max_fruitless_starts:
        return None
    whence = "without a checkpoint" if checkpoint == "none" else f"from checkpoint {checkpoint.split()[0]}"
    return (
        f"crash loop: the last {fruitless} starts began {whence} and saved no newer one "
        f"(cluster.max_fruitless_starts={cluster.max_fruitless_starts})"
    )
