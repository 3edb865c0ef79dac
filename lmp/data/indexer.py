"""Index files and a manifest for film shards that others wrote, from the headers of their tars."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lmp.data.manifest import (
    CHECK,
    FEATURE_DTYPES,
    MANIFEST_NAME,
    SAFETENSORS_NAMES,
    Column,
    Manifest,
    Modality,
    ShardEntry,
    columns_of,
    modalities_from_json,
    read_manifest,
)
from lmp.data.publish import STAGING, IndexRows, lock_folder, make_manifest, publish
from lmp.data.record import KEY_PATTERN, NAME_PATTERN, check_same_modalities, check_shots, not_finite, shot_checks
from lmp.data.storage import is_url, normal
from lmp.data.tar import AGAIN, Member, Sample, Tar
from lmp.errors import UserError

_PIECE = 1 << 22
_MOST_HEADER = 100_000_000  # bytes of a safetensors header; the format's own limit
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
_OTHER_BYTES = {"U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "F32": 4, "U64": 8, "F64": 8}
# A dtype that is not listed is refused later for what it is; here its size is not known.
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in _DTYPES.items()} | _OTHER_BYTES
_LAYOUT = (
    "give KEY.safetensors with `shots` int32 [S, 2] and, per modality, NAME float16 or bfloat16 [S, K, D] "
    "and NAME_valid bool [S]"
)


class _Tensor(NamedTuple):
    """A tensor as a safetensors header tells it; `start` and `stop` count from the start of the tar."""

    dtype: str
    shape: list[int]
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class _Film:
    """What the headers of a film, and its KEY.json, say."""

    key: str
    where: str
    shots: int
    modalities: dict[str, Modality]
    tensors: dict[str, _Tensor]
    member: Member
    info: dict[str, Any]
    info_row: tuple[int, int, int]


def index_folder(
    folder: Path | str,
    *,
    read_all: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Write the index of each FOLDER/*.tar and the manifest; the tars stay as they are.

    Args:
        folder: local; holds tars of films, KEY.json and KEY.safetensors each.
        read_all: read every byte once for sha256, crc32, and a look at the values; otherwise only headers and
            KEY.json are read, and the index cannot show later that a bit has changed.
        overwrite: replace a manifest that is there. Its quarantined films stay quarantined.
        progress: told the bytes of each tar once it is done.

    Raises:
        UserError: a URL, no tars, a manifest is there already, or damage; names shard and member. Nothing is written.
    """
    path = _local(folder)
    tars = sorted(path.glob("*.tar"))
    if not tars:
        raise UserError(f"{path} holds no .tar", remedy="give the folder that holds the tars")
    if (path / MANIFEST_NAME).exists() and not overwrite:
        raise UserError(f"{path} already holds {MANIFEST_NAME}", remedy="ask for overwriting with --overwrite")
    try:
        lock = lock_folder(path)
        staging = path / STAGING
        try:
            shutil.rmtree(staging, ignore_errors=True)  # left by a killed writer: the lock is ours
            staging.mkdir()
            known = None
            with suppress(UserError):  # none there, or a damaged one
                known = read_manifest(path)
            build = _Build(staging, known, read_all=read_all)
            for tar in tars:
                build.add(tar)
                progress(tar.stat().st_size)
            manifest = build.manifest()
            publish(path, lock, names=[s["index"] for s in manifest["shards"]], old=[], manifest=manifest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)
    except PermissionError as error:
        raise UserError(f"{path} cannot be written to", remedy="index files lie beside the tars: allow it") from error
    return manifest


def _local(folder: Path | str) -> Path:
    location = normal(folder)
    if is_url(location):
        raise UserError(
            f"{location} is a URL: index files are written beside local tars only",
            remedy="copy the folder here, index it, then copy the .idx.npz files and manifest.json beside the tars",
        )
    if not Path(location).is_dir():
        raise UserError(f"{location} is not a folder", remedy="give the folder that holds the tars")
    return Path(location)


class _Build:
    """The indexes of a folder's tars, and what they have in common."""

    def __init__(self, staging: Path, known: Manifest | None, *, read_all: bool) -> None:
        self._staging = staging
        self._read_all = read_all
        self._quarantined = known["quarantined"] if known else {}
        # Tars keep no order of modalities. That of the manifest before is kept, so that rebuilding changes nothing.
        self._order = list(modalities_from_json(known["modalities"])) if known else []
        self._modalities: dict[str, Modality] = {}
        self._shards: list[ShardEntry] = []
        self._place: dict[str, str] = {}
        self._encoders: dict[str, Any] = {}
        self._cleared: dict[str, int] = {}

    def add(self, path: Path) -> None:
        """Index one tar."""
        with Tar(path) as tar:
            samples = list(tar.samples())  # all headers first: their damage explains what films would lack
            films = [self._film(tar, sample) for sample in samples]
            if not films:
                raise UserError(f"{path} holds no film", remedy=AGAIN)
            reading = _Reading(tar) if self._read_all else None
            rows = IndexRows(self._modalities)
            for film in films:
                spans = [film.tensors.get(c.name) for c in rows.columns]
                crc32 = None
                if reading is not None:
                    start, blob = film.member.offset, memoryview(reading.member(film.member))
                    crc32 = [zlib.crc32(blob[s.start - start : s.stop - start]) if s else 0 for s in spans]
                    if film.key not in self._quarantined:
                        _check_values(film, blob, rows.columns)
                offsets = [s.start if s else -1 for s in spans]
                rows.add(film.key, shots=film.shots, offsets=offsets, crc32=crc32, info=film.info_row)
            sha256 = reading.finish() if reading is not None else None
            self._shards.append(rows.write(self._staging, path.name, size=tar.size, sha256=sha256))

    def manifest(self) -> Manifest:
        """Of all tars added."""
        agreed = {json.dumps(e, sort_keys=True) for e in self._encoders.values()}
        encoders = next(iter(self._encoders.values())) if len(agreed) == 1 else {}
        if not isinstance(encoders, dict) or not all(isinstance(e, dict) for e in encoders.values()):
            encoders = {}
        quarantined = {k: v for k, v in self._quarantined.items() if k in self._place}
        return make_manifest(
            self._modalities, self._shards, encoders=encoders, cleared=self._cleared, quarantined=quarantined
        )

    def _film(self, tar: Tar, sample: Sample) -> _Film:
        film = _read_film(tar, sample)
        if film.key in self._place:
            raise UserError(f"{film.where}: is in {self._place[film.key]} too", remedy="give every film once")
        self._place[film.key] = Path(tar.path).name
        if not self._modalities:
            place = {name: n for n, name in enumerate(self._order)}
            names = sorted(film.modalities, key=lambda name: (place.get(name, len(place)), name))
            self._modalities = {name: film.modalities[name] for name in names}
        _located(film.where, check_same_modalities, film.key, film.modalities, self._modalities)
        self._encoders[film.key] = film.info.get("encoders", {})
        cleared = film.info.get("cleared")
        for name, count in cleared.items() if isinstance(cleared, dict) else ():
            if isinstance(count, int):
                self._cleared[name] = self._cleared.get(name, 0) + count
        return film


def _read_film(tar: Tar, sample: Sample) -> _Film:
    """Hold a film's headers against the layout of film shards."""
    named = f"{tar.path}, film {sample.key}"
    wrong = [e for e in sample.members if "." in e and e.rpartition(".")[2] in ("json", "safetensors")]
    if wrong:
        raise UserError(
            f"{tar.path}, member {sample.members[wrong[0]].name}: has a dot in its key, which webdataset cuts there",
            remedy="write the tar again with keys of letters, digits, _ and -",
        )
    for extension in ("json", "safetensors"):
        if extension not in sample.members:
            raise UserError(f"{named}: member {sample.key}.{extension} is missing", remedy=AGAIN)
    if not KEY_PATTERN.fullmatch(sample.key):
        raise UserError(
            f"{named}: its key is not of letters, digits, _ and -, or longer than 80",
            remedy="write the tar again with such keys, without folders (tar -C FOLDER .)",
        )
    member = sample.members["json"]
    text = tar.read(member.offset, member.size)
    try:
        info = json.loads(text)
    except ValueError as error:
        raise UserError(f"{tar.path}, member {member.name}: is not JSON: {error}", remedy=AGAIN) from error
    if not isinstance(info, dict):
        raise UserError(f"{tar.path}, member {member.name}: holds no JSON object", remedy="write {...}")
    where = f"{tar.path}, member {sample.members['safetensors'].name}"
    tensors = _read_header(tar, sample.members["safetensors"], where)
    shots, modalities = _layout(tensors, where)
    return _Film(
        key=sample.key,
        where=where,
        shots=shots,
        modalities=modalities,
        tensors=tensors,
        member=sample.members["safetensors"],
        info=info,
        info_row=(member.offset, member.size, zlib.crc32(text)),
    )


def _read_header(tar: Tar, member: Member, where: str) -> dict[str, _Tensor]:
    """The tensors of a safetensors member; they must fill it without gaps."""
    if member.size < 8:
        raise UserError(f"{where}: has {member.size} bytes, too few for safetensors", remedy=AGAIN)
    size = int.from_bytes(tar.read(member.offset, 8), "little")
    if size > min(member.size - 8, _MOST_HEADER):
        raise UserError(f"{where}: its safetensors header is damaged: it claims {size} bytes", remedy=AGAIN)
    try:
        header = json.loads(tar.read(member.offset + 8, size))
        header.pop("__metadata__", None)
        tensors = {}
        start = member.offset + 8 + size
        for name, entry in header.items():
            lo, hi = entry["data_offsets"]
            tensors[name] = _Tensor(entry["dtype"], [int(n) for n in entry["shape"]], start + int(lo), start + int(hi))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where}: its safetensors header is damaged: {error}", remedy=AGAIN) from error
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        item = _ITEM_BYTES.get(tensor.dtype)
        size = tensor.stop - tensor.start
        fits = min(tensor.shape, default=0) >= 0 and (item is None or size == item * math.prod(tensor.shape))
        if tensor.start != at or not fits:
            raise UserError(f"{where}: tensor {name} {tensor} does not lie at the bytes that it names", remedy=AGAIN)
        at = tensor.stop
    if at != member.offset + member.size:
        raise UserError(
            f"{where}: its tensors end at byte {at}, the member at {member.offset + member.size}", remedy=AGAIN
        )
    return tensors


def _layout(tensors: Mapping[str, _Tensor], where: str) -> tuple[int, dict[str, Modality]]:
    """Number of shots, and modalities by name."""
    shots = tensors.get("shots")
    if shots is None:
        raise UserError(f"{where}: has no tensor `shots`", remedy=_LAYOUT)
    if shots.dtype != "I32" or len(shots.shape) != 2 or shots.shape[1] != 2:
        raise UserError(f"{where}: `shots` is {shots}", remedy=_LAYOUT)
    rows = shots.shape[0]
    if rows == 0:
        raise UserError(f"{where}: the film has 0 shots", remedy="leave the film out, or give it shots")
    names = sorted(n.removesuffix("_valid") for n in tensors if n.endswith("_valid"))
    modalities = {name: _modality(tensors, name, rows, where) for name in names}
    if not modalities:
        raise UserError(f"{where}: holds no modality", remedy=_LAYOUT)
    wanted = {c.name: c for c in columns_of(modalities)}
    if unknown := sorted(set(tensors) - set(wanted)):
        raise UserError(f"{where}: tensor {unknown[0]} belongs to no modality: no {unknown[0]}_valid", remedy=_LAYOUT)
    check = tensors.get(CHECK)
    if check is not None and (check.dtype != "I64" or check.shape != [rows, *wanted[CHECK].row_shape]):
        raise UserError(
            f"{where}: `{CHECK}` is {check}, not I64 {[rows, *wanted[CHECK].row_shape]}",
            remedy=f"leave {CHECK} out, or write it as ShardWriter does",
        )
    return rows, modalities


def _modality(tensors: Mapping[str, _Tensor], name: str, rows: int, where: str) -> Modality:
    features, valid = tensors.get(name), tensors[f"{name}_valid"]
    if not NAME_PATTERN.fullmatch(name) or name in ("shots", CHECK):
        raise UserError(f"{where}: {name!r} cannot name a modality", remedy="use a letter, then letters, digits and _")
    if features is None:
        raise UserError(f"{where}: has {name}_valid but no tensor {name}", remedy=_LAYOUT)
    dtype = str(_DTYPES.get(features.dtype)).removeprefix("torch.")
    if dtype not in FEATURE_DTYPES or len(features.shape) != 3 or 0 in features.shape[1:]:
        raise UserError(f"{where}: {name} is {features}", remedy=_LAYOUT)
    for tensor, tensor_name in ((features, name), (valid, f"{name}_valid")):
        if tensor.shape[:1] != [rows]:
            raise UserError(f"{where}: {tensor_name} is {tensor}, but there are {rows} shots", remedy=AGAIN)
    if valid.dtype != "BOOL" or len(valid.shape) != 1:
        raise UserError(f"{where}: {name}_valid is {valid}", remedy=_LAYOUT)
    return Modality(name, features.shape[1], features.shape[2], dtype)


class _Reading:
    """Reads a tar once from start to end for its sha256, and hands out members on the way."""

    def __init__(self, tar: Tar) -> None:
        self._tar = tar
        self._sha256 = hashlib.sha256()
        self._at = 0

    def member(self, member: Member) -> bytearray:
        """The bytes of a member that lies behind the one before."""
        self._skip_to(member.offset)
        data = self._tar.read(member.offset, member.size)
        self._sha256.update(data)
        self._at += member.size
        return data

    def finish(self) -> str:
        """sha256 of the whole tar."""
        self._skip_to(self._tar.size)
        return self._sha256.hexdigest()

    def _skip_to(self, offset: int) -> None:
        while self._at < offset:
            piece = self._tar.read(self._at, min(_PIECE, offset - self._at))
            self._sha256.update(piece)
            self._at += len(piece)


def _check_values(film: _Film, blob: memoryview, columns: list[Column]) -> None:
    """What only the values show: times out of order, NaN, bits that are none, rows that differ from their checksum.

    Args:
        blob: the film's safetensors member.
        columns: of a film.
    """
    found: dict[str, torch.Tensor] = {}
    for column in columns:
        if (span := film.tensors.get(column.name)) is not None:
            data = torch.frombuffer(
                blob, dtype=torch.uint8, offset=span.start - film.member.offset, count=span.stop - span.start
            )
            # A copy, for rows need not lie at a multiple of their width.
            found[column.name] = data.clone().view(column.dtype).view(film.shots, *column.row_shape)
    _located(film.where, check_shots, film.key, found["shots"].numpy())
    for name in sorted(film.modalities):
        valid_S = found[f"{name}_valid"].view(torch.uint8)
        if int(valid_S.max()) > 1:
            raise UserError(f"{film.where}: {name}_valid holds bytes that are neither 0 nor 1", remedy=AGAIN)
        bad_S = not_finite(found[name])
        if bad_S.any():
            raise UserError(
                f"{film.where}: {name} holds NaN or infinity in {int(bad_S.sum())} shots, "
                f"the first is {int(bad_S.int().argmax())}",
                remedy=f"set such rows to 0 and their {name}_valid to False, and write the shard again",
            )
    if CHECK in found:
        wrong_S = (shot_checks(found, film.modalities, film.info_row[2]) != found[CHECK]).any(dim=1)
        if wrong_S.any():
            shot = int(wrong_S.int().argmax())
            raise UserError(f"{film.where}: the bytes of shot {shot} are not those written", remedy=AGAIN)


def _located(where: str, check: Callable[..., Any], *arguments: Any) -> None:
    """Run a check whose message names only the film; name the shard too."""
    try:
        check(*arguments)
    except UserError as error:
        raise UserError(f"{where}: {error.problem}", remedy=error.remedy) from error
