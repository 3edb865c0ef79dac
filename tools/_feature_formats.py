"""How features of films are laid out on disk, each as the projects that read it expect.

A format either has its own files per film, or packs the films' .npy into one container when all are there. Files
appear whole or not at all.
"""

from __future__ import annotations

import importlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmp.errors import UserError
from tools._film_features import FilmRows
from tools._output import new_file

WHOLE_FRAME = "0,0,1,1"
"""The one box that a row is of, where a format has boxes."""
FILMS_PER_TAR = 256


@dataclass(frozen=True)
class Packing:
    """What a container is made of.

    Attributes:
        staged: a folder of KEY.npy.
        shots: a folder of KEY.json, the shots sidecar.
        out: where the container goes.
        name: of the features: what they are, and their grid.
        keys: of the films, in order.
    """

    staged: Path
    shots: Path
    out: Path
    name: str
    keys: list[str]

    def films(self) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        """(key, rows, sidecar) of every film."""
        for key in self.keys:
            rows = np.load(self.staged / f"{key}.npy", allow_pickle=False)
            yield key, rows, json.loads((self.shots / f"{key}.json").read_text(encoding="utf-8"))

    @property
    def bytes(self) -> int:
        return sum((self.staged / f"{key}.npy").stat().st_size for key in self.keys)


@dataclass(frozen=True)
class Format:
    """A layout.

    Attributes:
        what: one line for --help.
        read: (folder, key, name of the features) gives a film's rows, as the format's own readers do.
        write: (film, folder) writes a film's own files; None for containers.
        pack: writes the container.
        packages: that it needs beside numpy.
        grid: "any", "shot" (a row per shot only) or seconds (that stride only).
        pooled: whether rows must be vectors.
        folders: whether films may lie in subfolders named by their record.
    """

    what: str
    read: Callable[[Path, str, str], np.ndarray]
    write: Callable[[FilmRows, Path], None] | None = None
    pack: Callable[[Packing], None] | None = None
    packages: tuple[str, ...] = ()
    grid: str | float = "any"
    pooled: bool = False
    folders: bool = False

    def check(self, *, stride: float | None, pooling: str) -> None:
        """Raises UserError if the format cannot hold such features, or a package is missing."""
        if self.grid == "shot" and stride is not None:
            raise UserError(f"--stride {stride}: this format has a file per shot", remedy="leave --stride out")
        if isinstance(self.grid, float) and stride != self.grid:
            raise UserError(f"this format has a row every {self.grid:g} s", remedy=f"give --stride {self.grid:g}")
        if self.pooled and pooling == "none":
            raise UserError("--pooling none: this format holds a vector per row", remedy="take mean or concat")
        for package in self.packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise UserError(f"{package} is not installed", remedy="pip install 'lmp[features]'") from error


def write_npy(film: FilmRows, folder: Path) -> None:
    """KEY.npy, [T, D] or [T, K, D]."""
    with new_file(folder / f"{film.key}.npy") as path, path.open("wb") as file:
        np.save(file, film.rows, allow_pickle=False)


def _write_cmd(film: FilmRows, folder: Path) -> None:
    """KEY.npy, a pickled {"raw_feats": [T, D]}: its readers load it so, there is no way around the pickle."""
    with new_file(folder / f"{film.key}.npy") as path, path.open("wb") as file:
        np.save(file, np.array({"raw_feats": film.rows}, dtype=object), allow_pickle=True)


def _write_lvu(film: FilmRows, folder: Path) -> None:
    """KEY.npz, `a` a pickled {second: {box: [D]}}."""
    seconds = {second: {WHOLE_FRAME: row} for second, row in enumerate(film.rows)}
    with new_file(folder / f"{film.key}.npz") as path, path.open("wb") as file:
        np.savez(file, a=np.array(seconds, dtype=object))


def _write_movienet(film: FilmRows, folder: Path) -> None:
    """KEY/shot_0000.npy, [D] each."""
    partial = folder / f"{film.key}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, row in enumerate(film.rows):
        np.save(partial / f"shot_{number:04d}.npy", row, allow_pickle=False)
    shutil.rmtree(folder / film.key, ignore_errors=True)
    partial.replace(folder / film.key)


def _write_parquet(film: FilmRows, folder: Path) -> None:
    """KEY.parquet: key, row, start_ms, end_ms, feature."""
    import pyarrow
    import pyarrow.parquet

    count, width = film.rows.shape
    if film.stride is None:
        edges_T2 = film.shots_S2
    else:
        starts = np.arange(count + 1) * film.stride * 1000
        edges_T2 = np.stack([starts[:-1], starts[1:]], 1).round().astype(np.int32)
    values = pyarrow.array(film.rows.ravel())
    table = pyarrow.table(
        {
            "key": [film.key] * count,
            "row": np.arange(count, dtype=np.int32),
            "start_ms": edges_T2[:, 0].astype(np.int32),
            "end_ms": edges_T2[:, 1].astype(np.int32),
            "feature": pyarrow.FixedSizeListArray.from_arrays(values, width),
        }
    )
    with new_file(folder / f"{film.key}.parquet") as path:
        pyarrow.parquet.write_table(table, path)


def _pack_h5(packing: Packing) -> None:
    """features.h5: a data set per film with attributes stride, fps, shots (milliseconds) and valid."""
    import h5py

    # The format of HDF5 1.8 and later, for in the oldest an attribute holds 64 KiB: 8,192 shots.
    with new_file(packing.out / "features.h5") as path, h5py.File(path, "w", libver=("v108", "v108")) as file:
        for key, rows, sidecar in packing.films():
            data = file.create_dataset(key, data=rows)
            data.attrs["stride"] = sidecar["stride"] if sidecar["stride"] is not None else "shot"
            if sidecar["fps"] is not None:
                data.attrs["fps"] = sidecar["fps"]
            data.attrs["shots"] = np.array(sidecar["shots_ms"], dtype=np.int32)
            data.attrs["valid"] = np.array(sidecar["valid"], dtype=bool)


def _pack_lmdb(packing: Packing) -> None:
    """NAME_STRIDE/ with msgpack of {"features": [T, D]} by film, and id2nframe.json, as HERO reads them."""
    import lmdb
    import msgpack_numpy

    folder = packing.out / packing.name
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    frames = {}
    # Values lie in whole pages of 4 KiB.
    environment = lmdb.open(str(partial), map_size=2 * packing.bytes + (len(packing.keys) << 14) + (1 << 24))
    with environment, environment.begin(write=True) as transaction:
        for key, rows, _ in packing.films():
            transaction.put(key.encode(), msgpack_numpy.packb({"features": rows}, use_bin_type=True))
            frames[key] = len(rows)
    (partial / "lock.mdb").unlink(missing_ok=True)
    with new_file(packing.out / "id2nframe.json") as path:
        path.write_text(json.dumps(frames), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _pack_webdataset(packing: Packing) -> None:
    """features-000000.tar ...: KEY.npy and KEY.json, the shots sidecar."""
    from webdataset import TarWriter

    films = packing.films()
    for first in range(0, len(packing.keys), FILMS_PER_TAR):
        name = f"features-{first // FILMS_PER_TAR:06d}.tar"
        with new_file(packing.out / name) as path, TarWriter(str(path), mtime=0) as tar:
            for key, rows, sidecar in (next(films) for _ in packing.keys[first : first + FILMS_PER_TAR]):
                buffer = io.BytesIO()
                np.save(buffer, rows, allow_pickle=False)
                tar.write({"__key__": key, "npy": buffer.getvalue(), "json": json.dumps(sidecar).encode()})


def _read_npy(folder: Path, key: str, name: str) -> np.ndarray:
    return np.load(folder / f"{key}.npy", allow_pickle=False)


def _read_cmd(folder: Path, key: str, name: str) -> np.ndarray:
    return np.load(folder / f"{key}.npy", allow_pickle=True).item()["raw_feats"]


def _read_lvu(folder: Path, key: str, name: str) -> np.ndarray:
    seconds = np.load(folder / f"{key}.npz", allow_pickle=True)["a"].item()
    return np.stack([seconds[second][WHOLE_FRAME] for second in range(len(seconds))])


def _read_movienet(folder: Path, key: str, name: str) -> np.ndarray:
    return np.stack([np.load(path) for path in sorted((folder / key).iterdir(), key=lambda path: int(path.stem[5:]))])


def _read_parquet(folder: Path, key: str, name: str) -> np.ndarray:
    import pyarrow.parquet

    column = pyarrow.parquet.read_table(folder / f"{key}.parquet")["feature"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def _read_h5(folder: Path, key: str, name: str) -> np.ndarray:
    import h5py

    with h5py.File(folder / "features.h5", "r") as file:
        return file[key][()]


def _read_lmdb(folder: Path, key: str, name: str) -> np.ndarray:
    import lmdb
    import msgpack_numpy

    with lmdb.open(str(folder / name), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return msgpack_numpy.unpackb(transaction.get(key.encode()), raw=False)["features"]


def _read_webdataset(folder: Path, key: str, name: str) -> np.ndarray:
    from webdataset import WebDataset

    tars = sorted(str(path) for path in folder.glob("features-*.tar"))
    samples = WebDataset(tars, shardshuffle=False).decode()
    return next(sample["npy"] for sample in samples if sample["__key__"] == key)


FORMATS = {
    "npy": Format("KEY.npy, [T, D]", _read_npy, write=write_npy, folders=True),
    "cmd": Format(
        "KEY.npy of a pickled {'raw_feats': [T, D]} (Condensed Movies challenge)",
        _read_cmd,
        write=_write_cmd,
        pooled=True,
        folders=True,
    ),
    "lvu": Format(
        "KEY.npz of a pickled {second: {box: [D]}} (LVU)", _read_lvu, write=_write_lvu, grid=1.0, pooled=True
    ),
    "movienet": Format("KEY/shot_0000.npy (MovieNet)", _read_movienet, write=_write_movienet, grid="shot", pooled=True),
    "parquet": Format(
        "KEY.parquet, a row per row", _read_parquet, write=_write_parquet, packages=("pyarrow",), pooled=True
    ),
    "h5": Format("features.h5, a data set per film", _read_h5, pack=_pack_h5, packages=("h5py",)),
    "lmdb": Format(
        "LMDB of msgpack (HERO)", _read_lmdb, pack=_pack_lmdb, packages=("lmdb", "msgpack_numpy"), pooled=True
    ),
    "webdataset": Format(
        "tars of KEY.npy and KEY.json", _read_webdataset, pack=_pack_webdataset, packages=("webdataset",)
    ),
}
