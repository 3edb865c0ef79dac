"""Taking films out of a folder of shards, and back in, by a new manifest; the tars stay as they are."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmp.data.index import FilmIndex
from lmp.data.manifest import MANIFEST_NAME, Manifest, manifest_bytes, manifest_digest, read_manifest
from lmp.data.members import walk
from lmp.data.publish import lock_folder
from lmp.data.storage import is_url, normal
from lmp.data.verify import Fault, films_of, verify, verify_shard
from lmp.errors import UserError

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Change:
    """What became of a manifest.

    Attributes:
        taken: films quarantined.
        released: films taken in again.
        renewed: shards, by name, whose size and sha256 in the manifest are now those of the file as it is.
        before: digest of the old manifest.
        digest: digest of the new one; the same where nothing was to be done.
        backup: file name of the old manifest, None where nothing was to be done.
    """

    taken: list[str]
    released: list[str]
    renewed: list[str]
    before: str
    digest: str
    backup: str | None


def quarantine(folder: Path | str, reasons: Mapping[str, str], *, progress: Progress = lambda _: None) -> Change:
    """Take films out.

    Args:
        folder: local folder of shards.
        reasons: KEY -> why.
        progress: told of bytes read.

    Raises:
        UserError: a key that the folder does not hold or that is quarantined already; other films of the same
            shards that are damaged, too; no film would be left.
    """
    with _Folder(folder) as held:
        for key in reasons:
            held.require(key, quarantined=False)
        return held.change({**held.manifest["quarantined"], **reasons}, held.shards_of(reasons), progress=progress)


def quarantine_damaged(
    folder: Path | str, *, reason: str | None = None, progress: Progress = lambda _: None
) -> tuple[Change, list[Fault]]:
    """Take out exactly the films that verify finds damaged; of a missing shard, all.

    A shard whose fault lies in no film (in the padding, say) keeps its films, and gets its size and sha256 renewed.

    Args:
        reason: for all of them; None stands for the first fault of each.

    Returns:
        the change, and what verify found.
    """
    with _Folder(folder) as held:
        index = FilmIndex.load(held.path, check_sizes=False)
        faults = list(verify(index, progress=progress))
        reasons: dict[str, str] = {}
        for fault in faults:
            _require_readable(Path(index.shards[fault.shard]))
            missing = fault.film is None and not Path(index.shards[fault.shard]).is_file()
            films = films_of(index, fault.shard) if missing else [] if fault.film is None else [fault.film]
            for film in films:
                reasons.setdefault(index.keys[film], reason or str(fault).removeprefix(f"{held.path}/"))
        if not faults:
            return held.unchanged(), []
        shards = {fault.shard for fault in faults}
        return held.change({**held.manifest["quarantined"], **reasons}, shards, progress=progress), faults


def release(folder: Path | str, keys: Sequence[str], *, progress: Progress = lambda _: None) -> Change:
    """Take films in again, after their shard was restored.

    Raises:
        UserError: a key that is not quarantined; a film of its shard that does not verify now.
    """
    with _Folder(folder) as held:
        for key in keys:
            held.require(key, quarantined=True)
        left = {key: reason for key, reason in held.manifest["quarantined"].items() if key not in keys}
        return held.change(left, held.shards_of(keys), progress=progress)


class _Folder:
    """A folder of shards, locked against other writers."""

    def __init__(self, folder: Path | str) -> None:
        if is_url(normal(folder)):
            raise UserError(
                f"{folder} is not a local folder",
                remedy=f"copy its {MANIFEST_NAME}, indexes and shards here, and put the new {MANIFEST_NAME} there",
            )
        self.path = Path(normal(folder))

    def __enter__(self) -> _Folder:
        self.manifest: Manifest = read_manifest(self.path)
        self._lock = lock_folder(self.path)
        try:
            self.manifest = read_manifest(self.path)
            everything: Manifest = {**self.manifest, "quarantined": {}}
            whole = FilmIndex([str(self.path)], [everything])
            self._shard_of = dict(zip(whole.keys, whole.shard_of.tolist(), strict=True))
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def require(self, key: str, *, quarantined: bool) -> None:
        if key not in self._shard_of:
            close = difflib.get_close_matches(key, self._shard_of, n=1)
            remedy = f"did you mean {close[0]}?" if close else "`lmp data head` shows the keys"
            raise UserError(f"{self.path} holds no film {key}", remedy=remedy)
        if (key in self.manifest["quarantined"]) != quarantined:
            state = "is quarantined already" if not quarantined else "is not quarantined"
            raise UserError(f"film {key} of {self.path} {state}", remedy="leave it out")

    def shards_of(self, keys: Mapping[str, str] | Sequence[str]) -> set[int]:
        return {self._shard_of[key] for key in keys}

    def unchanged(self) -> Change:
        digest = self.manifest["digest"]
        return Change([], [], [], digest, digest, None)

    def change(self, quarantined: Mapping[str, str], shards: set[int], *, progress: Progress) -> Change:
        """Write the manifest with these films quarantined, and `shards` as they are now, once these verify."""
        manifest = copy.deepcopy(self.manifest)
        manifest["quarantined"] = dict(sorted(quarantined.items()))
        index = FilmIndex([str(self.path)], [manifest])
        if not len(index):
            raise UserError(f"no film of {self.path} would be left", remedy="restore the shards, or write them again")
        renewed: list[str] = []
        faults: list[Fault] = []
        for shard in sorted(shards):
            # A shard that is not read any more keeps its line: a copy that is put back is held against it.
            if films_of(index, shard):
                changed, found = _renew(index, shard, progress)
                renewed += [index.entries[shard]["name"]] if changed else []
                faults += found
        if faults:
            named = "; ".join(map(str, faults[:5])) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
            raise UserError(named, remedy="restore the shard from a copy, or quarantine those films, too (--damaged)")
        manifest["digest"] = manifest_digest(manifest)
        before = self.manifest["quarantined"]
        return Change(
            taken=sorted(set(quarantined) - set(before)),
            released=sorted(set(before) - set(quarantined)),
            renewed=renewed,
            before=self.manifest["digest"],
            digest=manifest["digest"],
            backup=self._write(manifest),
        )

    def _write(self, manifest: Manifest) -> str:
        path = self.path / MANIFEST_NAME
        backup = self.path / f"{MANIFEST_NAME}.bak-{self.manifest['digest'][:8]}"
        try:
            if not backup.exists():
                self._put(backup, path.read_bytes())
            self._put(path, manifest_bytes(manifest))
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror or error}", remedy="check its permissions and space"
            ) from error
        return backup.name

    def _put(self, path: Path, data: bytes) -> None:
        """Write a file so that it is there whole or not at all."""
        staged = path.with_name(f".{path.name}.new")
        try:
            with staged.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
        os.fsync(self._lock)


def _require_readable(shard: Path) -> None:
    """A shard that this user must not read is not damaged."""
    if shard.exists() and not os.access(shard, os.R_OK):
        raise UserError(f"{shard} may not be read by this user", remedy="correct its permissions and try again")


def _renew(index: FilmIndex, shard: int, progress: Progress) -> tuple[bool, list[Fault]]:
    """Set a shard's size and sha256 to those of the file; whether they differed, and the faults of its films."""
    path, entry = index.shards[shard], index.entries[shard]
    try:
        with Path(path).open("rb") as file:
            found = walk(file, progress=progress)
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
        return False, [Fault(shard, None, None, what, path)]
    changed = (entry["bytes"], entry["sha256"]) != (found.bytes, found.sha256)
    entry["bytes"], entry["sha256"] = found.bytes, found.sha256
    return changed, list(verify_shard(index, shard, found=found, progress=progress))
