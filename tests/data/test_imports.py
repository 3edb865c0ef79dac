"""`lmp data import`: what it writes reads back equal, and every mistake is one line that leaves nothing behind."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.numpy
import torch
import webdataset

from lmp.cli import main
from lmp.data.film_slice import FilmSlice
from lmp.data.index import FilmIndex
from lmp.data.verify import verify

LENGTHS = {"alpha": 5, "beta": 9, "gamma": 3}
Refused = Callable[..., str]
Samples = Sequence[dict[str, Any]]


def video_of(key: str) -> np.ndarray:
    return np.random.default_rng(len(key)).standard_normal((LENGTHS[key], 6)).astype(np.float32)


def audio_of(key: str) -> np.ndarray:
    return np.random.default_rng(len(key) + 9).standard_normal((LENGTHS[key], 2, 4))


def shots_of(key: str) -> np.ndarray:
    start = np.arange(LENGTHS[key]) * 1000
    return np.stack([start, start + 960], axis=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """video/KEY.npy [S, 6] float32, audio.h5 with KEY [S, 2, 4] float64, shots/KEY.npy in milliseconds."""
    for name in ("video", "shots"):
        (tmp_path / name).mkdir()
    with h5py.File(tmp_path / "audio.h5", "w") as file:
        for key in LENGTHS:
            np.save(tmp_path / "video" / f"{key}.npy", video_of(key))
            np.save(tmp_path / "shots" / f"{key}.npy", shots_of(key))
            file[key] = audio_of(key)
    return tmp_path


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs an import that must be refused; gives its one line."""

    def check(*words: object) -> str:
        capsys.readouterr()
        assert main(["data", "import", str(tmp_path / "out"), *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and " -> " in line
        assert not (tmp_path / "out").exists()
        return line

    return check


def per_film(root: Path, *more: object) -> list[object]:
    return [f"--feature=video={root}/video", f"--feature=audio={root}/audio.h5", f"--shots={root}/shots", *more]


def imported(root: Path, *words: object, out: str = "out") -> FilmIndex:
    assert main(["data", "import", str(root / out), *map(str, words)]) == 0
    index = FilmIndex.load(root / out)
    assert list(verify(index)) == []
    return index


def whole(index: FilmIndex, key: str) -> FilmSlice:
    number = index.keys.index(key)
    return index.read(number, 0, int(index.shots[number]))


def assert_equal(index: FilmIndex, dtype: torch.dtype = torch.float16) -> None:
    assert index.keys == sorted(LENGTHS)
    for key in LENGTHS:
        rows = whole(index, key)
        np.testing.assert_array_equal(rows.shots_N2.numpy(), shots_of(key))
        assert torch.equal(rows.features["video"], torch.from_numpy(video_of(key)).to(dtype)[:, None])
        assert torch.equal(rows.features["audio"], torch.from_numpy(audio_of(key)).to(dtype))
        assert rows.valid["video"].all() and rows.valid["audio"].all()


# A file or data set per film.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_npy_and_h5_read_back_equal(root: Path, dtype: str) -> None:
    encoders = root / "encoders.json"
    encoders.write_text('{"video": {"name": "r3d"}}')
    index = imported(root, *per_film(root, "--dtype", dtype, "--encoders", encoders, "--films-per-shard", 2))
    assert_equal(index, getattr(torch, dtype))
    assert len(index.shards) == 2 and index.manifests[0]["encoders"] == {"video": {"name": "r3d"}}


def save_h5(path: Path, name: str, array: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file[name] = array


@pytest.mark.parametrize(
    ("suffix", "save"),
    [
        ("h5", lambda path, array: save_h5(path, "deep/features", array)),
        ("hdf5", lambda path, array: save_h5(path, "video", array)),
        ("npz", lambda path, array: np.savez(path, arr=array)),
        ("safetensors", lambda path, array: safetensors.numpy.save_file({"x": array}, path)),
        ("pt", lambda path, array: torch.save(torch.from_numpy(array), path)),
        ("pth", lambda path, array: torch.save({"video": torch.from_numpy(array), "n": torch.zeros(1)}, path)),
        ("npy", lambda path, array: np.save(path, np.asfortranarray(array.astype(">f4")))),
    ],
)
def test_a_folder_may_hold_other_kinds(root: Path, suffix: str, save: Callable[[Path, np.ndarray], None]) -> None:
    shutil.rmtree(root / "video")
    (root / "video").mkdir()
    for key in LENGTHS:
        save(root / "video" / f"{key}.{suffix}", video_of(key))
    assert_equal(imported(root, *per_film(root)))


def test_h5_may_hold_a_group_per_film(root: Path) -> None:
    with h5py.File(root / "audio.h5", "w") as file:
        for key in LENGTHS:
            file[f"{key}/audio"] = audio_of(key)
            file[f"{key}/times"] = shots_of(key)
    assert_equal(imported(root, *per_film(root)))


def test_shot_lists_of_films_are_read(root: Path) -> None:
    for key in LENGTHS:
        (root / "shots" / f"{key}.npy").unlink()
    (root / "shots/alpha.txt").write_text("".join(f"{n}.0 {n}.96\n" for n in range(5)))
    (root / "shots/beta.scenes.txt").write_text("".join(f"{25 * n} {25 * n + 23}\n" for n in range(9)))
    clips = "".join(f"{25 * n},{25 * n + 23}\n" for n in range(3))
    (root / "shots/gamma.shots.csv").write_text("clip_start,clip_end\n" + clips)
    index = imported(root, *per_film(root, "--fps", 25))
    assert_equal(index)
    assert index.info(0)["fps"] == 25


def test_frames_need_a_rate_and_seconds_do_not(root: Path, refused: Refused) -> None:
    (root / "shots/beta.txt").write_text("".join(f"{25 * n} {25 * n + 24}\n" for n in range(9)))
    assert "beta.txt counts frames -> give --fps" in refused(*per_film(root))
    (root / "shots/beta.txt").write_text("".join(f"{n}.0 {n}.96\n" for n in range(9)))
    assert_equal(imported(root, *per_film(root)))


def test_a_film_may_lack_a_modality_if_allowed(root: Path, refused: Refused) -> None:
    (root / "video/alpha.npy").unlink()
    (root / "video/gamma.npy").unlink()
    assert "film alpha has no features of modality video, nor have 1 more" in refused(*per_film(root))
    index = imported(root, *per_film(root, "--allow-missing"))
    rows = whole(index, "alpha")
    assert rows.features["video"].shape == (5, 1, 6) and rows.features["video"].count_nonzero() == 0
    assert not rows.valid["video"].any() and rows.valid["audio"].all()
    assert torch.equal(rows.features["audio"], torch.from_numpy(audio_of("alpha")).half())


def test_rows_of_nan_are_marked_and_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = video_of("beta")
    video[3:5] = np.nan
    np.save(root / "video/beta.npy", video)
    index = imported(root, *per_film(root))
    assert "video: 2 shots held NaN" in capsys.readouterr().out
    assert whole(index, "beta").valid["video"].tolist() == [n not in (3, 4) for n in range(9)]


def test_dtypes_of_half_width_are_kept(root: Path) -> None:
    for key in LENGTHS:
        (root / f"video/{key}.npy").unlink()
        torch.save(torch.from_numpy(video_of(key)).bfloat16(), root / f"video/{key}.pt")
    index = imported(root, *per_film(root))
    assert index.modalities["video"].dtype == "bfloat16" and index.modalities["audio"].dtype == "float16"


def spoil(path: str, array: Any) -> Callable[[Path], None]:
    return lambda root: np.save(root / path, array)


def cut(path: str) -> Callable[[Path], Any]:
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil("video/beta.npy", np.zeros((8, 6))), "film beta, modality video: "),
        (spoil("video/beta.npy", np.zeros((8, 6))), "beta.npy has 8 rows, but "),
        (spoil("video/beta.npy", np.zeros((8, 6))), "lists 9 shots"),
        (spoil("video/beta.npy", np.zeros((9, 7), np.float32)), "film beta, modality video: float16 [S, 1, 7], but"),
        (spoil("video/beta.npy", np.zeros(9)), "film beta, modality video: "),
        (spoil("video/beta.npy", np.zeros((9, 0))), "has shape [9, 1, 0]"),
        (spoil("video/beta.npy", np.zeros((9, 6), np.int64)), "beta.npy: holds int64"),
        (spoil("video/beta.npy", np.array([{}, {}])), "beta.npy: cannot be read as npy"),
        (spoil("video/beta.npy", np.full((9, 6), 7e4)), "film beta, modality video: 70000 is too large for float16"),
        (cut("video/beta.npy"), "beta.npy: cannot be read as npy"),
        (cut("audio.h5"), "audio.h5"),
        (spoil("video/be.ta.npy", np.zeros((9, 6))), "'be.ta' cannot be a film's key"),
        (lambda root: np.savez(root / "video/beta.npz", x=np.zeros(1)), "holds beta.npy and beta.npz"),
        (lambda root: shutil.rmtree(root / "video"), "video, is not there"),
        (lambda root: [p.unlink() for p in (root / "video").iterdir()], "holds no features of video"),
        (lambda root: (root / "shots/beta.npy").unlink(), "has no shot list for film beta"),
        (spoil("shots/beta.npy", np.zeros((9, 2))), "shots/beta.npy holds float64 [9, 2]"),
        (spoil("shots/beta.npy", np.zeros((9, 3), int)), "shots/beta.npy holds int64 [9, 3]"),
        (spoil("shots/beta.npy", shots_of("beta")[::-1]), "film beta: shot 1 spans"),
        (spoil("shots/beta.npy", shots_of("beta") * 10**6), "beta.npy holds times up to"),
        (cut("shots/beta.npy"), "shots/beta.npy cannot be read"),
        (lambda root: (root / "shots/beta.txt").write_text("1.0 2.0 3.0\n"), "beta.txt cannot be understood"),
    ],
)
def test_what_does_not_fit_is_refused(
    root: Path, refused: Refused, damage: Callable[[Path], Any], message: str
) -> None:
    damage(root)
    assert message in refused(*per_film(root))


def test_files_of_several_arrays_must_name_one(root: Path, refused: Refused) -> None:
    (root / "video/beta.npy").unlink()
    np.savez(root / "video/beta.npz", x=np.zeros((9, 6)), y=np.zeros((9, 6)))
    assert "holds x, y: which are the features?" in refused(*per_film(root))


def test_pickled_code_is_not_run(root: Path, refused: Refused) -> None:
    (root / "video/beta.npy").unlink()
    torch.save({"video": Path("x")}, root / "video/beta.pt")
    assert "beta.pt: cannot be read as pt" in refused(*per_film(root))


def test_h5_without_its_package_names_the_extra(root: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "audio.h5: h5py is not installed -> pip install 'lmp[import]'" in refused(*per_film(root))


def test_arguments_that_do_not_fit_are_refused(root: Path, refused: Refused) -> None:
    video, shots = f"--feature=video={root}/video", f"--shots={root}/shots"
    assert "is not NAME=SOURCE" in refused("--feature=video", shots)
    assert "given twice" in refused(video, video, shots)
    assert "no shots are given" in refused(video)
    assert "is not a folder" in refused(video, f"--shots={root}/shots/alpha.npy")
    assert "is a URL" in refused("--feature=video=s3://bucket/video", shots)
    assert "--fps 0.0" in refused(video, shots, "--fps", 0)
    assert "neither a folder nor a .h5" in refused(f"--feature=video={root}/video/alpha.npy", shots)
    assert "cannot be read as JSON" in refused(video, shots, f"--encoders={root}/none.json")
    (root / "encoders.json").write_text('["r3d"]')
    assert "does not hold an object per modality" in refused(video, shots, f"--encoders={root}/encoders.json")
    (root / "encoders.json").write_text('{"vdeo": {}}')
    assert "encoders name ['vdeo']" in refused(video, shots, f"--encoders={root}/encoders.json")


def test_a_folder_that_holds_shards_is_overwritten_only_when_asked(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "import", f"{root}/out", *map(str, per_film(root))]
    assert main(words) == 0
    first = FilmIndex.load(root / "out").digest
    words += ["--dtype", "bfloat16"]
    assert main(words) == 2 and "already holds manifest.json" in capsys.readouterr().err
    assert FilmIndex.load(root / "out").digest == first
    assert main([*words, "--overwrite"]) == 0
    assert FilmIndex.load(root / "out").modalities["video"].dtype == "bfloat16"


# Tars of a shot per sample.


def samples(first: int = 0) -> list[dict[str, Any]]:
    """A sample per shot of all films, numbered from `first` on."""
    found: list[dict[str, Any]] = []
    for key in LENGTHS:
        for n, (video, audio, (start, end)) in enumerate(
            zip(video_of(key), audio_of(key), shots_of(key).tolist(), strict=True)
        ):
            times = {"start_ms": start, "end_ms": end, "title": key, "line": n}
            found.append({"__key__": f"{key}_{n + first:03d}", "json": times, "video.npy": video, "audio.npy": audio})
    return found


def write_tars(root: Path, found: Samples, *, per_tar: int = 7) -> Path:
    folder = root / "tars"
    folder.mkdir(exist_ok=True)
    for n in range(0, len(found), per_tar):
        with webdataset.TarWriter(str(folder / f"{n:03d}.tar")) as writer:
            for sample in found[n : n + per_tar]:
                writer.write(sample)
    return folder


def per_shot(root: Path, *more: object) -> list[object]:
    return ["--tars", f"{root}/tars", "--feature=video=video.npy", "--feature=audio=audio.npy", *more]


def test_tars_read_back_equal(tmp_path: Path) -> None:
    write_tars(tmp_path, samples())
    index = imported(tmp_path, *per_shot(tmp_path))
    assert_equal(index)
    info = index.info(1)
    assert info["title"] == "beta" and "line" not in info and "start_ms" not in info


def test_times_may_be_seconds_and_shots_come_in_any_order_within_a_film(tmp_path: Path) -> None:
    found = samples(first=1)
    for sample in found:
        times = sample["json"]
        sample["json"] = {"start": times["start_ms"] / 1000, "end": times["end_ms"] / 1000}
    found[5:14] = found[13:4:-1]
    write_tars(tmp_path, found)
    assert_equal(imported(tmp_path, *per_shot(tmp_path)))


@pytest.mark.parametrize("first", [0, 1])
def test_times_may_come_from_shot_lists(root: Path, first: int) -> None:
    found = [{k: v for k, v in s.items() if k != "json"} for s in samples(first=first)]
    write_tars(root, found)
    assert_equal(imported(root, *per_shot(root, f"--shots={root}/shots")))


def encoded(kind: str, array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez(buffer, only=array)
    elif kind == "safetensors":
        return safetensors.numpy.save({"feat": array, "other": array * 0})
    else:
        torch.save({"feat": torch.from_numpy(array), "other": torch.zeros(3)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("source", ["npz", "x.safetensors:feat", "pt:feat", "pth:feat"])
def test_members_of_other_types_are_read(tmp_path: Path, source: str) -> None:
    extension = source.partition(":")[0]
    found = samples()
    with webdataset.TarWriter(str(tmp_path / "all.tar"), encoder=False) as writer:
        for sample in found:
            video = encoded(extension.rpartition(".")[2], sample["video.npy"])
            audio = io.BytesIO()
            np.save(audio, sample["audio.npy"])
            info = json.dumps(sample["json"]).encode()
            key = sample["__key__"]
            writer.write({"__key__": key, "json": info, extension: video, "audio.npy": audio.getvalue()})
    words = ["--tars", f"{tmp_path}/all.tar", f"--feature=video={source}", "--feature=audio=audio.npy"]
    assert_equal(imported(tmp_path, *words))


def test_names_of_films_follow_the_pattern(tmp_path: Path) -> None:
    found = samples()
    for sample in found:
        film, _, shot = sample["__key__"].rpartition("_")
        sample["__key__"] = f"data/{film}/shot{shot}"
    write_tars(tmp_path, found)
    assert_equal(imported(tmp_path, *per_shot(tmp_path, "--film-pattern", r"data/(?P<film>[a-z]+)/shot(?P<shot>\d+)")))


def test_a_missing_member_is_a_missing_modality(tmp_path: Path) -> None:
    found = samples()
    for number in (0, 1, 2, 3, 4, 7):  # all of alpha, shot 2 of beta
        del found[number]["audio.npy"]
    write_tars(tmp_path, found)
    index = imported(tmp_path, *per_shot(tmp_path))
    assert not whole(index, "alpha").valid["audio"].any() and whole(index, "alpha").valid["video"].all()
    beta = whole(index, "beta")
    assert beta.valid["audio"].tolist() == [n != 2 for n in range(9)]
    wanted = torch.from_numpy(audio_of("beta")).half()
    wanted[2] = 0
    assert torch.equal(beta.features["audio"], wanted)


def test_holes_are_left_out_or_marked_if_allowed(root: Path, refused: Refused) -> None:
    found = samples()
    del found[7]  # beta, shot 2
    write_tars(root, found)
    shots = f"--shots={root}/shots"
    assert "film beta: shot 2 is missing, 1 of 9 in all" in refused(*per_shot(root))
    assert "film beta: shot 2 is missing, 1 of 9 in all" in refused(*per_shot(root, shots))
    listed = whole(imported(root, *per_shot(root, shots, "--allow-missing")), "beta")
    assert listed.valid["video"].tolist() == [n != 2 for n in range(9)]
    np.testing.assert_array_equal(listed.shots_N2.numpy(), shots_of("beta"))
    shorter = whole(imported(root, *per_shot(root, "--allow-missing"), out="shorter"), "beta")
    np.testing.assert_array_equal(shorter.shots_N2.numpy(), np.delete(shots_of("beta"), 2, axis=0))
    assert torch.equal(shorter.features["video"][2], torch.from_numpy(video_of("beta")[3]).half()[None])


def test_numbers_that_fit_from_0_and_from_1_must_be_told_apart(root: Path, refused: Refused) -> None:
    found = samples()
    del found[5]  # beta: 1 to 8 of 9 shots
    write_tars(root, found)
    words = per_shot(root, f"--shots={root}/shots", "--allow-missing")
    assert "film beta: 9 shots are listed, and samples 1 to 8 fit both from 0 and 1" in refused(*words)
    assert not whole(imported(root, *words, "--first-shot", 0), "beta").valid["video"][0]


def change(number: int, **values: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda found: found[number].update({k.replace("__dot__", "."): v for k, v in values.items()})


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (lambda f: f.append(f.pop(6)), [], "film beta: shot 1 is missing, 1 of 9 in all -> put it next to the other"),
        (
            lambda f: f.append(f.pop(6)),
            ["--allow-missing"],
            "sample beta_001: film beta goes on after samples of other",
        ),
        (lambda f: f.insert(14, {**f[6]}), [], "sample beta_001: is shot 1 of film beta, as "),
        (change(6, __key__="beta"), [], "sample beta: the film pattern"),
        (change(6, __key__="be ta_1"), [], "'be ta' cannot be a film's key"),
        (lambda f: f.pop(15), [], "film gamma: shot 1 is missing"),
        (lambda f: (f.pop(14), f.pop(14)), [], "film gamma: shot 1 is missing"),
        (lambda _: None, ["--first-shot", "1"], "film alpha has a shot 0"),
        (lambda f: f[6].pop("json"), [], "sample beta_001: has no json, so no times"),
        (change(6, json={}), [], "sample beta_001: its json has neither start_ms and end_ms nor start and end"),
        (change(6, json={"start": "1", "end": 2}), [], "sample beta_001: start and end are ['1', 2]"),
        (change(6, json=[]), [], "sample beta_001: its json is no object"),
        (change(6, json={"start": 1, "end": 1}), [], "film beta: shot 1 spans [1000, 1000] ms"),
        (
            change(6, video__dot__npy=np.zeros(7, np.float32)),
            [],
            "sample beta_001, modality video: float32 [1, 7], but",
        ),
        (
            change(6, video__dot__npy=np.zeros(6)),
            [],
            "modality video: float64 [1, 6], but the shots before have float32",
        ),
        (change(6, video__dot__npy=np.zeros((1, 1, 6))), [], "member beta_001.video.npy: has shape [1, 1, 6]"),
        (change(6, video__dot__npy=np.full(6, 1e6, np.float32)), [], "modality video: 1e+06 is too large for float16"),
        (lambda _: None, ["--feature=text=text.npy"], "no sample has a member of type text.npy for modality text; the"),
        (lambda _: None, ["--feature=text=text.xyz"], "text.xyz is no type of a member"),
        (lambda _: None, ["--feature=text=video.npy:x"], "an npy holds one array without a name"),
        (lambda _: None, ["--film-pattern", "(?P<film>.+)"], "has no group named shot"),
        (lambda _: None, ["--film-pattern", "(?P<film"], "is no regular expression"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    tmp_path: Path, refused: Refused, spoil: Callable[[list[dict[str, Any]]], Any], more: list[str], message: str
) -> None:
    found = samples()
    spoil(found)
    write_tars(tmp_path, found)
    assert message in refused(*per_shot(tmp_path, *more))


def test_lists_of_another_length_are_refused(root: Path, refused: Refused) -> None:
    write_tars(root, samples())
    np.save(root / "shots/beta.npy", shots_of("beta")[:8])
    message = refused(*per_shot(root, f"--shots={root}/shots"))
    assert "film beta: its samples are numbered 0 to 8, but its list has 8 shots" in message


def test_a_cut_tar_is_refused(tmp_path: Path, refused: Refused) -> None:
    path = write_tars(tmp_path, samples(), per_tar=17) / "000.tar"
    data = path.read_bytes()
    at = data.index(b"gamma_001.json") // 512 * 512  # webdataset reads this as a shorter tar
    path.write_bytes(data[:at])
    assert "000.tar is cut off after member gamma_001." in refused(*per_shot(tmp_path))


def test_tars_that_are_not_there_or_twice_are_refused(tmp_path: Path, refused: Refused) -> None:
    write_tars(tmp_path, samples())
    features = ["--feature=video=video.npy"]
    assert "cannot be opened" in refused("--tars", tmp_path / "none.tar", *features)
    assert "holds no .tar" in refused("--tars", tmp_path, *features)
    assert "is given twice" in refused("--tars", tmp_path / "tars", tmp_path / "tars/000.tar", *features)


def test_real_features_import(real_data: Path, tmp_path: Path) -> None:
    for name in ("vgg", "shots"):
        (tmp_path / name).mkdir()
    wanted = {}
    for path in sorted((real_data / "ovsd").glob("0[1-5]_*/film.npz")):
        with np.load(path) as arrays:
            wanted[path.parent.name] = arrays["shots"], arrays["features_vgg19"]
        np.save(tmp_path / "vgg" / f"{path.parent.name}.npy", wanted[path.parent.name][1])
        shutil.copy(path.parent / "shots.txt", tmp_path / "shots" / f"{path.parent.name}.scenes.txt")
    words = [f"--feature=vgg={tmp_path}/vgg", f"--shots={tmp_path}/shots", "--fps", "24"]
    index = imported(tmp_path, *words)
    assert index.keys == sorted(wanted)
    for key, (frames_S2, features) in wanted.items():
        rows = whole(index, key)
        assert torch.equal(rows.features["vgg"][:, 0], torch.from_numpy(features).half())
        np.testing.assert_allclose(rows.shots_N2.numpy(), (frames_S2 + np.array([0, 1])) / 24 * 1000, atol=0.5)
