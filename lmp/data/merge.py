"""The shards of several folders in one, as they are: links and a manifest, no feature is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from lmp.data.index import FilmIndex
from lmp.data.manifest import Manifest, ShardEntry
from lmp.data.publish import STAGING, lock_folder, make_manifest, publish
from lmp.data.rewrite import encoders_of
from lmp.data.shards import held_files
from lmp.errors import UserError


def merge(folders: Sequence[Path], out: Path, *, prefix: str = "films", overwrite: bool = False) -> Manifest:
    """Put the shards of several folders into one: their films in order of the folders, in the same tars.

    The folders stay as they are; where the file system has hard links no byte is copied.

    Args:
        folders: local, written by one kind of encoders; their films all have different keys.
        out: made if absent.
        prefix: start of the shards' new names, PREFIX-000000.tar and so on.
        overwrite: replace shards that `out` holds.

    Raises:
        UserError: folders that do not fit together, or with quarantined films; a shard that is missing or cut; `out`
            holds shards already, or another process is writing there. Nothing is written.
    """
    index = FilmIndex.load(folders)
    for folder, manifest in zip(index.folders, index.manifests, strict=True):
        if manifest["quarantined"]:
            raise UserError(
                f"{folder} has quarantined films, such as {min(manifest['quarantined'])}",
                remedy="write it anew without them with `lmp data split` or `reshard`",
            )
    encoders = encoders_of(index)
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    staging = out / STAGING
    try:
        old = held_files(out, prefix)
        if old and not overwrite:
            raise UserError(f"{out} already holds {old[0].name}", remedy="give an empty folder, or ask for overwriting")
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed process: the lock is ours
        staging.mkdir()
        entries: list[ShardEntry] = []
        for folder, manifest in zip(index.folders, index.manifests, strict=True):
            for entry in manifest["shards"]:
                stem = f"{prefix}-{len(entries):06d}"
                renamed: ShardEntry = {**entry, "name": f"{stem}.tar", "index": f"{stem}.idx.npz"}
                _link(Path(folder) / entry["name"], staging / renamed["name"])
                _link(Path(folder) / entry["index"], staging / renamed["index"])
                entries.append(renamed)
        cleared = {name: sum(m["cleared"].get(name, 0) for m in index.manifests) for name in index.modalities}
        merged = make_manifest(index.modalities, entries, encoders=encoders, cleared=cleared)
        names = [name for entry in entries for name in (entry["name"], entry["index"])]
        publish(out, lock, names=names, old=old, manifest=merged)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)
    return merged


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links, or another one
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())
