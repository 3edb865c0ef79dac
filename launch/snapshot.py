"""A copy of the code in the run folder: what a queued or requeued job runs cannot change by edits to the checkout."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmp.errors import UserError
from lmp.train.run_folder import SNAPSHOT, commit_of, git

FOLDERS = ("lmp", "launch", "tools", "configs", "slurm")
UNTRACKED = {".py", ".yaml", ".sh", ".sbatch"}
"""Kinds of new files that are taken although git does not follow them yet: a run may import them."""


@dataclass(frozen=True)
class Snapshot:
    """The code of a checkout as it is in the work tree, and where its copy is or will be.

    Args:
        checkout: what is copied.
        files: paths relative to it.
        digest: of paths and contents.
        folder: of the copy.
    """

    checkout: Path
    files: tuple[Path, ...]
    digest: str
    folder: Path

    @classmethod
    def of(cls, checkout: Path, run: Path) -> Snapshot:
        """Look at the checkout; nothing is written. A copy of the same code that the run has already is used again.

        Raises:
            UserError: there is no code in it.
        """
        files = tuple(sorted(_files(checkout)))
        if Path("lmp/__init__.py") not in files:
            raise UserError(f"{checkout}: holds no lmp to take a snapshot of", remedy="submit from a checkout of lmp")
        digest = hashlib.sha256()
        for file in files:
            digest.update(str(file).encode() + b"\0" + hashlib.sha256((checkout / file).read_bytes()).digest())
        number, folder = 1, run / "code"
        while folder.exists() and _facts(folder).get("digest") != digest.hexdigest():
            number += 1
            folder = run / f"code-{number}"
        return cls(checkout=checkout, files=files, digest=digest.hexdigest(), folder=folder)

    def take(self) -> bool:
        """Copy; the folder appears whole or not at all. Returns False where the same copy was there already."""
        if self.folder.exists():
            return False
        temporary = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.tmp")
        for file in self.files:
            target = temporary / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.checkout / file, target)
        commit, changed = commit_of(self.checkout)
        facts = {
            "commit": commit,
            "changed": changed,
            "digest": self.digest,
            "checkout": str(self.checkout),
            "taken": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        (temporary / "changes.patch").write_text(git(self.checkout, "diff", "HEAD", "--", *FOLDERS) or "")
        (temporary / SNAPSHOT).write_text(json.dumps(facts, indent=2) + "\n")
        temporary.rename(self.folder)
        return True


def _files(checkout: Path) -> Iterator[Path]:
    listed = git(checkout, "ls-files", "-z", "--", *FOLDERS)
    if listed:
        new = git(checkout, "ls-files", "-z", "--others", "--exclude-standard", "--", *FOLDERS) or ""
        tracked = (Path(name) for name in listed.split("\0") if name)
        untracked = (Path(name) for name in new.split("\0") if Path(name).suffix in UNTRACKED)
        yield from (file for file in (*tracked, *untracked) if (checkout / file).is_file())
        return
    for folder in FOLDERS:
        for path in (checkout / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(checkout)


def _facts(folder: Path) -> dict[str, Any]:
    file = folder / SNAPSHOT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
