"""Features at a fixed rate become a row per shot."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from lmp.data.grids import Grid, to_shots
from lmp.data.index import FilmIndex
from lmp.errors import UserError
from tools import import_features

SHOTS = {"-qW_x7yz0AB": [[0, 1920], [1920, 5000], [5000, 5100]], "tt0032138": [[0, 4000], [4500, 9600]]}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Output of video_features for two films: vggish on its 0.96 s grid, and r21d every 16 frames at 25 a second."""
    draw = np.random.default_rng(2)
    for name in ("features", "shots"):
        (tmp_path / name).mkdir()
    for key, shots in SHOTS.items():
        seconds = shots[-1][1] / 1000
        np.save(tmp_path / "shots" / f"{key}.npy", np.array(shots, dtype=np.int64))
        for name, step, width in (("vggish", 0.96, 128), ("r21d", 0.64, 512)):
            rows = draw.standard_normal((int(seconds / step), width)).astype(np.float32)
            np.save(tmp_path / "features" / f"{key}_{name}.npy", rows)
        np.save(tmp_path / "features" / f"{key}_fps.npy", np.array(25.0))
    return tmp_path


def by_hand(rows: np.ndarray, shot: list[int], step: float) -> np.ndarray:
    """The mean of a shot, millisecond by millisecond."""
    numbers = ((np.arange(*shot) + 0.5) // (1000 * step)).astype(int)
    return rows[numbers[numbers < len(rows)]].mean(0)


def test_what_video_features_writes(made: Path) -> None:
    out, folder = made / "shards", made / "features"
    arguments = [f"--video-features=audio={folder}:vggish", f"--video-features=video={folder}:r21d:16f", "--fps", "25"]
    assert import_features.main([str(out), *arguments, "--shots", str(made / "shots")]) == 0
    index = FilmIndex.load(out)
    assert index.keys == sorted(SHOTS)
    assert {name: (m.tokens, m.width) for name, m in index.modalities.items()} == {"audio": (1, 128), "video": (1, 512)}
    for film, key in enumerate(index.keys):
        read = index.read(film, 0, len(SHOTS[key]))
        assert read.shots_N2.tolist() == SHOTS[key]
        for name, source, step in (("audio", "vggish", 0.96), ("video", "r21d", 0.64)):
            rows = np.load(folder / f"{key}_{source}.npy")
            for shot, span in enumerate(SHOTS[key]):
                if span[0] >= 1000 * step * len(rows):
                    assert not read.valid[name][shot]
                    continue
                assert read.valid[name][shot]
                np.testing.assert_allclose(read.features[name][shot, 0], by_hand(rows, span, step), atol=2e-3)
    assert not index.read(0, 0, 3).valid["audio"][2]  # vggish ends at 4.8 s


def test_one_h5_for_all_films(made: Path) -> None:
    with h5py.File(made / "audio.h5", "w") as file:
        for key in SHOTS:
            file[key] = np.load(made / "features" / f"{key}_vggish.npy")
    arguments = ["--feature", f"audio={made / 'audio.h5'}", "--stride", "audio=0.96", "--shots", str(made / "shots")]
    assert import_features.main([str(made / "shards"), *arguments]) == 0
    read = FilmIndex.load(made / "shards").read(1, 0, 2)
    rows = np.load(made / "features" / "tt0032138_vggish.npy")
    np.testing.assert_allclose(read.features["audio"][1, 0], by_hand(rows, [4500, 9600], 0.96), atol=2e-3)


def test_a_wrong_stride_is_refused_where_it_shows() -> None:
    shots_S2 = np.array([[0, 60_000], [60_000, 600_000]], dtype=np.int32)
    rows = torch.ones(600, 1, 2)
    out, met_S = to_shots(rows, shots_S2, 1000.0, where="x", strict=True)
    assert out.shape == (2, 1, 2)
    assert met_S.all()
    with pytest.raises(UserError, match=r"600 rows of 0\.5 s are 300\.0 s, but the shots end at 600\.0 s"):
        to_shots(rows, shots_S2, 500.0, where="x", strict=True)
    out, met_S = to_shots(rows[:50], shots_S2, 1000.0, where="x", strict=False)
    assert met_S.tolist() == [True, False]
    assert out[1].abs().max() == 0


@pytest.mark.parametrize("word", ["0", "-1", "x", "1.2.3", "f", "16 f"])
def test_strides_that_are_none(word: str) -> None:
    with pytest.raises(UserError, match="is no stride"):
        Grid.parse(word)


def test_misuse_is_one_line_and_leaves_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, shots = made / "features", ["--shots", str(made / "shots")]

    def refused(*arguments: str) -> str:
        assert import_features.main([str(made / "shards"), *arguments, *shots]) == 2
        assert not (made / "shards" / "manifest.json").exists()
        return capsys.readouterr().err

    assert "the step of i3d is not known" in refused(f"--video-features=video={folder}:i3d")
    assert "is not NAME=FOLDER:FEATURE" in refused("--video-features=video")
    assert "the stride counts frames -> give --fps" in refused(f"--video-features=video={folder}:r21d:16f")
    assert "holds no features of music" in refused(f"--video-features=music={folder}:clap:1")
    feature = ["--feature", f"audio={folder}", "--suffix", "audio=_vggish"]
    assert "or tell their rate with --stride" in refused(*feature)
    assert "name a modality that --feature names" in refused(*feature, "--stride", "video=1")
    assert "is no stride" in refused(*feature, "--stride", "audio=often")
