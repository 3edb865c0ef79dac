"""Features of films in the layouts of others, read back with their libraries."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import lmdb
import msgpack
import msgpack_numpy
import numpy as np
import pyarrow.dataset
import pytest
import torch
import webdataset

from lmp.data.index import FilmIndex
from lmp.data.record import FilmRecord
from lmp.data.shards import ShardWriter
from tests.tools.written import MODALITIES, write_run
from tools import _feature_formats, export_features
from tools._film_features import resample, windows
from tools._source import open_source

ENCODERS = {"video": {"name": "signal-video", "version": "1", "frames": 4}}
KEYS = ["-qW_x7yz0AB", "tt0032138", "tt0036775"]
LENGTHS = [5, 23, 12]


def write_shards(folder: Path, encoders: dict[str, Any] | None = None) -> Path:
    draw = torch.Generator().manual_seed(5)
    with ShardWriter(folder, encoders=ENCODERS if encoders is None else encoders, films_per_shard=2) as writer:
        for key, shots in zip(KEYS, LENGTHS, strict=True):
            lengths = torch.randint(300, 5000, (shots,), generator=draw).cumsum(0).numpy()
            shots_S2 = np.stack([np.concatenate([[0], lengths[:-1]]), lengths], 1).astype(np.int32)
            shots_S2[2:] += 2500  # a gap
            features = {
                name: torch.randn(shots, spec["tokens"], spec["width"], generator=draw).half()
                for name, spec in MODALITIES.items()
            }
            valid = {name: torch.rand(shots, generator=draw) < 0.8 for name in MODALITIES}
            writer.write(FilmRecord(key, {"upload_year": "2012", "fps": 24.0}, shots_S2, features, valid))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and shards."""
    folder = tmp_path_factory.mktemp("features")
    return write_run(folder / "run", positions="learned"), write_shards(folder / "shards")


@pytest.fixture
def export(made: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    def run(layout: str, *arguments: str, code: int = 0) -> Path:
        out = tmp_path / layout
        command = [str(made[0]), str(out), str(made[1]), "--format", layout, "--window", "8", *arguments]
        assert export_features.main(command) == code
        return out

    return run


def model_rows(made: tuple[Path, Path], number: int, tokens: str = "video") -> np.ndarray:
    """[S, K, D] of a film that fits one window, from the training model itself."""
    index, model = FilmIndex.load(made[1]), open_source(made[0]).model.lmp
    read = index.read(number, 0, LENGTHS[number])
    with torch.no_grad():
        out = model({name: f.float() for name, f in read.features.items()}, dict(read.valid))
    return (out.cross if tokens == "cross_modal" else out.contextual[tokens]).numpy()


def test_npy_is_what_the_model_gives(made: tuple[Path, Path], export: Callable[..., Path]) -> None:
    out = export("npy", "--tokens", "video", "--pooling", "none")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["features.json", "shots", *(f"{key}.npy" for key in KEYS)]
    )
    rows = np.load(out / f"{KEYS[0]}.npy")
    np.testing.assert_allclose(rows, model_rows(made, 0), atol=1e-6)
    assert [len(np.load(out / f"{key}.npy")) for key in KEYS] == LENGTHS
    told = json.loads((out / "features.json").read_text())
    assert told["finished"] is True
    assert told["largest_difference"] == 0
    assert {name: told[name] for name in ("tokens", "layer", "pooling", "window", "overlap", "stride", "dtype")} == {
        "tokens": "video",
        "layer": None,
        "pooling": "none",
        "window": 8,
        "overlap": 2,
        "stride": None,
        "dtype": "float32",
    }
    assert len(told["model_checkpoint_sha256"]) == 64
    assert told["encoders"]["video"]["frames"] == 4
    shots = json.loads((out / "shots" / f"{KEYS[1]}.json").read_text())
    index = FilmIndex.load(made[1])
    assert shots["shots_ms"] == index.read(1, 0, 23).shots_N2.tolist()
    assert shots["valid"] == index.read(1, 0, 23).valid["video"].tolist()
    assert shots["fps"] == 24.0


def test_pooling_layers_and_joined_tokens(made: tuple[Path, Path], export: Callable[..., Path], tmp_path: Path) -> None:
    mean = np.load(export("npy", "--tokens", "cross_modal") / f"{KEYS[0]}.npy")
    np.testing.assert_allclose(mean, model_rows(made, 0, "cross_modal").mean(1), atol=1e-6)
    (tmp_path / "npy").rename(tmp_path / "mean")
    joined = np.load(export("npy", "--pooling", "concat", "--dtype", "float16") / f"{KEYS[0]}.npy")
    assert joined.shape == (5, 16 * (2 + 1 + 1 + 2))
    assert joined.dtype == np.float16
    np.testing.assert_allclose(joined[:, :32], model_rows(made, 0).reshape(5, 32), atol=2e-3)
    (tmp_path / "npy").rename(tmp_path / "joined")
    block = np.load(export("npy", "--tokens", "video", "--layer", "0", "--pooling", "none") / f"{KEYS[0]}.npy")
    norm = open_source(made[0]).model.lmp.contextual["video"].norm
    with torch.no_grad():
        after = norm(torch.from_numpy(block)).numpy()
    np.testing.assert_allclose(after, model_rows(made, 0), atol=1e-6)


def test_each_layout_holds_the_same_rows(export: Callable[..., Path]) -> None:
    npy = export("npy", "--tokens", "audio")
    expected = {key: np.load(npy / f"{key}.npy") for key in KEYS}

    cmd = export("cmd", "--tokens", "audio", "--folder-by", "upload_year")
    for key in KEYS:
        found = np.load(cmd / "2012" / f"{key}.npy", allow_pickle=True).item()["raw_feats"]
        np.testing.assert_array_equal(found, expected[key])

    movienet = export("movienet", "--tokens", "audio")
    assert len(list((movienet / KEYS[1]).iterdir())) == 23
    np.testing.assert_array_equal(np.load(movienet / KEYS[1] / "shot_0022.npy"), expected[KEYS[1]][22])

    table = pyarrow.dataset.dataset(str(export("parquet", "--tokens", "audio")), exclude_invalid_files=True).to_table()
    assert table.num_rows == sum(LENGTHS)
    film = table.filter(pyarrow.compute.equal(table["key"], KEYS[1])).sort_by("row")
    np.testing.assert_array_equal(np.array(film["feature"].to_pylist(), dtype=np.float32), expected[KEYS[1]])
    assert film["start_ms"][3].as_py() < film["end_ms"][3].as_py()

    with h5py.File(export("h5", "--tokens", "audio") / "features.h5") as file:
        assert sorted(file) == sorted(KEYS)
        np.testing.assert_array_equal(file[KEYS[1]][()], expected[KEYS[1]])
        assert file[KEYS[1]].attrs["stride"] == "shot"
        assert file[KEYS[1]].attrs["fps"] == 24.0
        assert file[KEYS[1]].attrs["shots"].shape == (23, 2)

    folder = export("lmdb", "--tokens", "audio")
    assert json.loads((folder / "id2nframe.json").read_text()) == dict(zip(KEYS, LENGTHS, strict=True))
    # As HERO opens and decodes it.
    with lmdb.open(str(folder / "lmp-audio_shot"), readonly=True, create=False, readahead=False) as environment:
        dump = environment.begin(buffers=True).get(KEYS[1].encode("utf-8"))
        found = msgpack.loads(bytes(dump), object_hook=msgpack_numpy.decode, raw=False)["features"]
    np.testing.assert_array_equal(found, expected[KEYS[1]])

    web = export("webdataset", "--tokens", "audio")
    samples = {
        s["__key__"]: s for s in webdataset.WebDataset(str(web / "features-000000.tar"), shardshuffle=False).decode()
    }
    assert list(samples) == KEYS
    np.testing.assert_array_equal(samples[KEYS[0]]["npy"], expected[KEYS[0]])
    assert samples[KEYS[0]]["json"]["rows"] == 5
    with tarfile.open(web / "features-000000.tar") as tar:
        assert {member.mtime for member in tar} == {0}
    for out in (cmd, movienet, folder, web):
        assert not [path for path in out.rglob("*") if path.name in (".films",) or path.suffix == ".tmp"]


def test_a_fixed_stride(export: Callable[..., Path]) -> None:
    rows = export("npy", "--tokens", "text")
    out = export("lvu", "--tokens", "text", "--stride", "1")
    shots = json.loads((out / "shots" / f"{KEYS[1]}.json").read_text())
    found = np.load(out / f"{KEYS[1]}.npz", allow_pickle=True)["a"].item()
    assert list(found) == list(range(shots["rows"]))
    assert shots["stride"] == 1.0
    by_shot, shots_S2 = np.load(rows / f"{KEYS[1]}.npy"), np.array(shots["shots_ms"])
    for second in range(shots["rows"]):
        share_S = np.minimum(shots_S2[:, 1], (second + 1) * 1000) - np.maximum(shots_S2[:, 0], second * 1000)
        share_S = share_S.clip(min=0)
        if share_S.sum():
            wanted = (share_S[:, None] * by_shot).sum(0) / share_S.sum()
            np.testing.assert_allclose(found[second]["0,0,1,1"], wanted, atol=1e-5)
    assert shots["filled"] == 2


def test_resampling_by_hand() -> None:
    shots_S2 = np.array([[0, 1500], [1500, 2000], [4000, 4100]], dtype=np.int32)
    rows, filled = resample(np.array([[0.0], [6.0], [9.0]]), shots_S2, 1.0)
    assert rows[:, 0].tolist() == [0.0, 3.0, 6.0, 9.0, 9.0]
    assert filled == 2
    rows, filled = resample(np.ones((1, 2, 3)), np.array([[0, 960]], dtype=np.int32), 0.96)
    assert rows.shape == (1, 2, 3)
    assert filled == 0


@pytest.mark.parametrize(("shots", "window", "overlap"), [(1, 8, 2), (8, 8, 2), (9, 8, 2), (100, 8, 0), (101, 16, 5)])
def test_windows_cover_a_film_once(shots: int, window: int, overlap: int) -> None:
    spans = windows(shots, window, overlap)
    kept = [shot for span in spans for shot in range(span.keep_start, span.keep_stop)]
    assert kept == list(range(shots))
    assert all(span.start <= span.keep_start < span.keep_stop <= span.stop for span in spans)
    assert all(span.stop - span.start == min(window, shots) for span in spans)
    inner = [span.keep_start - span.start for span in spans[1:]] + [span.stop - span.keep_stop for span in spans[:-1]]
    assert all(margin >= overlap // 2 for margin in inner)


def test_a_long_film_is_read_in_windows(made: tuple[Path, Path], export: Callable[..., Path]) -> None:
    rows = np.load(export("npy", "--tokens", "video", "--overlap", "4", "--pooling", "none") / f"{KEYS[1]}.npy")
    index, model = FilmIndex.load(made[1]), open_source(made[0]).model.lmp
    read = index.read(1, 4, 12)  # the second window; shots 6..9 are taken from it
    with torch.no_grad():
        out = model({name: f.float() for name, f in read.features.items()}, dict(read.valid))
    np.testing.assert_allclose(rows[6:10], out.contextual["video"].numpy()[2:6], atol=1e-6)


def test_it_goes_on_where_it_was_stopped(export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    write, done = _feature_formats.write_npy, []

    def stopped(film: Any, folder: Path) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(film.key)
        write(film, folder)

    monkeypatch.setattr(export_features, "write_npy", stopped)
    with pytest.raises(KeyboardInterrupt):
        export("h5", "--tokens", "video")
    again: list[str] = []
    monkeypatch.setattr(
        export_features, "write_npy", lambda film, folder: again.append(film.key) or write(film, folder)
    )
    out = export("h5", "--tokens", "video")
    assert done + again == KEYS
    assert sorted(path.name for path in out.iterdir()) == ["features.h5", "features.json", "shots"]
    export("h5", "--tokens", "video")
    assert done + again == KEYS
    export("h5", "--tokens", "audio", code=2)


def test_many_shots_fit_an_h5(tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    (tmp_path / "shots").mkdir()
    np.save(tmp_path / "staged" / "long.npy", np.zeros((20000, 2), np.float32))
    sidecar = {"shots_ms": [[n, n + 1] for n in range(20000)], "valid": [True] * 20000, "stride": None, "fps": None}
    (tmp_path / "shots" / "long.json").write_text(json.dumps(sidecar))
    packing = _feature_formats.Packing(tmp_path / "staged", tmp_path / "shots", tmp_path, "x", ["long"])
    _feature_formats.FORMATS["h5"].pack(packing)
    with h5py.File(tmp_path / "features.h5") as file:
        assert file["long"].attrs["shots"].shape == (20000, 2)


@pytest.mark.parametrize(
    ("layout", "arguments", "said"),
    [
        ("npy", ["--tokens", "music"], "name one of video, text, audio, cross_modal, joined"),
        ("npy", ["--tokens", "video", "--layer", "3"], "video has blocks 0 to 0"),
        ("npy", ["--layer", "0"], "which transformer?"),
        ("npy", ["--pooling", "none"], "K differs"),
        ("npy", ["--stride", "0"], "more than 0"),
        ("npy", ["--device", "toaster"], "--device toaster: cannot be used"),
        ("npy", ["--overlap", "8"], "an overlap of 0 or more below it"),
        ("npy", ["--window", "99"], "the model numbers 16 shots"),
        ("npy", ["--folder-by", "genre"], "which names no folder"),
        ("h5", ["--folder-by", "upload_year"], "has no subfolders"),
        ("movienet", ["--stride", "1"], "has a file per shot"),
        ("lvu", [], "give --stride 1"),
        ("lmdb", ["--tokens", "video", "--pooling", "none"], "holds a vector per row"),
    ],
)
def test_misuse_is_one_line(
    export: Callable[..., Path], capsys: pytest.CaptureFixture[str], layout: str, arguments: list[str], said: str
) -> None:
    out = export(layout, *arguments, code=2)
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_other_films_and_other_folders_are_refused(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path / "shards", {"video": {"name": "other"}})
    command = [str(made[0]), str(tmp_path / "out"), str(shards), "--format", "npy"]
    assert export_features.main([*command, "--window", "8"]) == 2
    assert "was trained on features of" in capsys.readouterr().err
    assert export_features.main(command) == 2
    assert "names no window -> give --window" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    command[1:3] = [str(shards), str(made[1])]
    assert export_features.main([*command, "--window", "8"]) == 2
    assert "is no export of features" in capsys.readouterr().err
