"""Reads `{"train": [ids], "val": [ids], "test": [ids]}`."""

from __future__ import annotations

import json
from pathlib import Path

from lmp.downstream.tasks.base import SPLITS
from lmp.errors import UserError


def read_json_split(path: Path) -> dict[str, list[str]]:
    """Split -> ids; a split that is not named is empty.

    Raises:
        UserError: not such a file, or an id in two splits.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        split = {name: [str(one) for one in content.get(name, [])] for name in SPLITS}
        unknown = sorted(set(content) - set(SPLITS))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: is not a split", remedy='write {"train": [ids], "val": [], "test": [ids]}') from error
    if unknown:
        raise UserError(f"{path}: names the split {unknown[0]}", remedy=f"name the splits {', '.join(SPLITS)}")
    every = [one for names in split.values() for one in names]
    if twice := {one for one in every if every.count(one) > 1} if len(set(every)) < len(every) else set():
        raise UserError(f"{path}: {min(twice)} is listed twice", remedy="list every id once")
    return split
