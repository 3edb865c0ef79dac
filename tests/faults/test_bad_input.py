"""A user's mistake: one clear line with its remedy, exit code 2, and nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmp.cli import main
from lmp.data.index import FilmIndex
from lmp.films.synthetic import FilmSettings, make_films
from tests.runs import config_of, make_shards, run, write_config
from tools.export_huggingface import main as export

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; gives its one error line."""

    def check(*argv: object, command: Callable[[list[str]], int] = main) -> str:
        capsys.readouterr()
        code = command([str(word) for word in argv])
        return one_error(code, capsys.readouterr().err)

    return check


def one_error(code: int, stderr: str) -> str:
    assert code == 2
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    problem, arrow, remedy = line.partition(" -> ")
    assert arrow and remedy.strip() and problem != "error: "
    return line


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    settings = FilmSettings(width=64, height=48, shots=12)
    make_films(folder, films=2, seed=5, settings=settings, workers=1, progress=False)
    return folder


@pytest.fixture
def own_films(films: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(films, tmp_path / "films"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.yaml and its finished run of two steps, run/."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder / "config.yaml", config_of(shards, train={"steps": 2}))
    done = run("train", str(config), "--run", str(folder / "run"), module="lmp.cli")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def own_run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def damage(path: Path, *, at: int) -> None:
    with path.open("rb+") as file:
        file.seek(at)
        old = file.read(4)
        file.seek(at)
        file.write(bytes(byte ^ 0xFF for byte in old))


def test_missing_film(refused: Refused, own_films: Path, tmp_path: Path) -> None:
    line = refused("ingest", own_films / "film-0000.mp4", own_films / "nowhere.mp4", "--out", tmp_path / "out")
    assert "nowhere.mp4" in line
    assert not (tmp_path / "out").exists()


def test_text_named_as_a_film(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "prose.mp4").write_text("It was a dark and stormy night.\n" * 50)
    assert "prose.mp4" in refused("ingest", tmp_path / "prose.mp4", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_film_without_sound_is_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import av

    path = tmp_path / "silent.mp4"
    generator = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            picture = np.kron(generator.integers(0, 255, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            for _ in range(24):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    assert main(["ingest", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "error" not in capsys.readouterr().err
    index = FilmIndex.load(tmp_path / "out")
    read = index.read(0, 0, int(index.shots[0]))
    assert read.valid["video"].all()
    assert not read.valid["audio"].any()


def test_broken_subtitle_skips_its_film_alone(refused: Refused, own_films: Path, tmp_path: Path) -> None:
    (own_films / "film-0000.srt").write_bytes(bytes(range(256)) * 8)
    line = refused("ingest", own_films, "--out", tmp_path / "out")
    assert "film-0000.srt" in line
    assert FilmIndex.load(tmp_path / "out").keys == ["film-0001"]
    assert main(["data", "verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"widht": 8}}, "model.widht: no such key, did you mean width?"),
        ({"train": {"steps": "many"}}, "train.steps: "),
    ],
)
def test_faulty_configuration(
    refused: Refused, shards: Path, tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    from launch.local import main as launch

    config = write_config(tmp_path / "config.yaml", config_of(shards, **sections))
    for command in (main, launch):
        argv = ["train"] if command is main else []
        assert words in refused(*argv, config, "--run", tmp_path / "run", command=command)
    assert not (tmp_path / "run").exists()


def test_missing_configuration(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused("train", tmp_path / "nowhere.yaml", "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_damaged_member(refused: Refused, own_shards: Path) -> None:
    shard = sorted(own_shards.glob("*.tar"))[0]
    index = FilmIndex.load(own_shards)
    damage(shard, at=int(index._offset_FC[1, 0]) + 8)
    line = refused("data", "verify", own_shards)
    assert shard.name in line
    assert index.keys[1] in line
    assert index.keys[0] not in line


def test_truncated_shard(refused: Refused, own_shards: Path, tmp_path: Path) -> None:
    shard = sorted(own_shards.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-2048])
    config = write_config(tmp_path / "config.yaml", config_of(own_shards))
    assert shard.name in refused("train", config, "--run", tmp_path / "run")
    assert shard.name in refused("data", "verify", own_shards)
    assert not (tmp_path / "run").exists()


def test_training_on_what_is_no_shards(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    config = write_config(tmp_path / "config.yaml", config_of(tmp_path / "photos"))
    assert "photos" in refused("train", config, "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_export_of_an_unfinished_run(refused: Refused, own_run: Path, tmp_path: Path) -> None:
    (own_run / "DONE").unlink()
    assert "not finished" in refused(own_run, tmp_path / "out", command=export)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


def test_resume_on_other_data(refused: Refused, finished: Path, own_run: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", seed=1)
    config = write_config(tmp_path / "config.yaml", config_of(other, train={"steps": 4}))
    before = content(own_run / "checkpoints")
    done = run("train", str(config), "--run", str(own_run), module="lmp.cli")
    assert "other data" in one_error(done.returncode, done.stderr)
    assert content(own_run / "checkpoints") == before


def test_resume_with_another_model(refused: Refused, finished: Path, own_run: Path) -> None:
    before = content(own_run)
    line = refused("train", finished / "config.yaml", "model.width=64", "--run", own_run)
    assert "model" in line and "64" in line
    assert content(own_run) == before


def test_resume_never(refused: Refused, finished: Path, own_run: Path) -> None:
    before = content(own_run)
    line = refused("train", finished / "config.yaml", "--run", own_run, "--resume", "never")
    assert "holds a run already" in line
    assert content(own_run) == before


def test_evaluation_of_what_is_no_run(refused: Refused, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert "photos" in refused("evaluate", tmp_path / "photos", shards)
    assert content(tmp_path / "photos") == {}
    assert "nowhere" in refused("evaluate", tmp_path / "nowhere", shards)
    assert not (tmp_path / "nowhere").exists()
