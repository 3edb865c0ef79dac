"""Ways to damage a folder of shards, and where things lie in a tar."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np

from lmp.data.manifest import manifest_digest


def place(folder: Path, shard: int, film: int, column: str) -> int:
    """Where row 0 of a column lies in the shard's tar; `film` counts within the shard."""
    with np.load(folder / f"films-{shard:06d}.idx.npz", allow_pickle=False) as arrays:
        return int(arrays["offset"][film, arrays["columns"].tolist().index(column)])


def header_of(tar: Path, name: str) -> int:
    """Where the header of a member lies."""
    with tarfile.open(tar) as opened:
        return opened.getmember(name).offset


def flip(path: Path, offset: int, *, bits: int = 0x10) -> None:
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ bits]))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def without_member(path: Path, name: str) -> None:
    """Write the tar anew without one member."""
    out = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for member in old.getmembers():
            if member.name != name:
                new.addfile(member, old.extractfile(member))
    path.write_bytes(out.getvalue())


def edit_manifest(folder: Path, **changes: object) -> None:
    """Set fields of every shard's line, with a digest that fits."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["shards"]:
        entry.update(changes)
    manifest["digest"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
