"""An ingest over an array, seen from the login node: how it is split, gone on with, put together and reported."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av")
pytest.importorskip("scenedetect")

from launch.ingest import parts_of
from launch.ingest_part import Part, read_part
from launch.slurm import main
from lmp.errors import UserError
from lmp.films.ingest import ingest
from lmp.films.synthetic import FilmSettings, make_films
from tests.launch.fake_slurm import FakeSlurm

ENCODERS = {"video": "signal", "audio": "signal", "text": "signal"}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    make_films(folder, films=4, seed=2, settings=FilmSettings(shots=12), workers=1, progress=False)
    return folder


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A cluster that takes jobs and never shows them: they are over at once."""
    fake = FakeSlurm(tmp_path / "slurm")
    for name, value in fake.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("launch.ingest.RESTART_SECONDS", 0)
    return fake


def words(films: Path, out: Path, *more: str) -> list[str]:
    return ["ingest", str(films), "--out", str(out), "--poll", "0", "--time", "10", *more]


def arrays(slurm: FakeSlurm) -> list[str]:
    """The last submission's script asks for these elements."""
    lines = (slurm.folder / "script").read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith("#SBATCH --array=")]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def run_part(out: Path, number: int, *, retries: int = 3) -> None:
    read_part(str(out / ".lmp-parts"), number, retries, 1)


def test_only_what_is_missing_is_submitted_and_all_is_put_together(
    films: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    films = Path(shutil.copytree(films, tmp_path / "films"))
    (films / "film-0002a.mp4").write_text("text\n" * 100)
    slurm.job_is("CANCELLED")
    assert main(words(films, out, "--parts", "3", "--concurrency", "2")) == 3
    assert arrays(slurm) == ["0-2%2"]
    told = capsys.readouterr()
    assert "array 41: 3 parts, 2 at a time" in told.out and "part 2 is not done: CANCELLED: it left no log" in told.err
    assert not (out / "manifest.json").exists()

    run_part(out, 1)
    assert main(words(films, out)) == 3
    assert arrays(slurm) == ["0-1%2"]
    with pytest.raises(UserError, match="other films, or with other settings"):
        raise_of(words(films, out, "--encoder", "video=signal"))
    with pytest.raises(UserError, match="has 3 parts, and --parts 2"):
        raise_of(words(films, out, "--parts", "2"))

    for number in (2, 0):
        run_part(out, number)
    asked = len(slurm.asked)
    capsys.readouterr()
    assert main(words(films, out)) == 2
    assert len(slurm.asked) == asked, "SLURM is not needed any more"
    shown = capsys.readouterr()
    assert f"4 films, 48 shots -> {out}" in shown.out and "skipped" in shown.err and "film-0002a.mp4" in shown.err
    assert not (out / ".lmp-parts").exists()
    assert len(list(out.glob("*.tar"))) == 3
    with pytest.raises(UserError, match="already holds"):
        raise_of(words(films, out))


def raise_of(command: list[str]) -> None:
    from launch.ingest import main as ingest_main

    ingest_main(command[1:])


def test_parts_of_whole_shards_give_the_bytes_of_one_ingest(
    films: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    slurm.job_is("CANCELLED")
    monkeypatch.chdir(films.parent)  # paths are found from elsewhere, too
    assert main(words(Path(films.name), out, "--parts", "2")) == 3
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        run_part(out, number)
    monkeypatch.chdir(films.parent)
    assert main(words(Path(films.name), out)) == 0
    ingest([films], tmp_path / "one", encoders=ENCODERS, films_per_shard=2, progress=False)
    assert digests(out) == digests(tmp_path / "one")


def test_a_part_whose_job_fails_is_submitted_again_within_bounds(
    films: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.job_is("FAILED", "NonZeroExitCode ExitCode=1:0")
    assert main(words(films, tmp_path / "out", "--parts", "1", "--retries", "2")) == 3
    told = capsys.readouterr().out
    assert told.count("array 41: 1 parts") == 3
    assert told.count("part 0 is tried again: FAILED, exit code 1") == 2
    capsys.readouterr()
    slurm.job_is("FAILED", "NonZeroExitCode ExitCode=2:0")
    assert main(words(films, tmp_path / "out", "--retries", "2")) == 3
    assert capsys.readouterr().out.count("array 41: 1 parts") == 1, "the user's mistake is not tried again"


def test_starts_that_read_no_film_are_given_up(
    films: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the second on, films are read in processes of their own."""
    out, workers = tmp_path / "out", []
    slurm.job_is("CANCELLED")
    main(words(films, out, "--parts", "1"))

    def killed(*_: Any, **settings: Any) -> None:
        workers.append(settings["workers"])
        raise KeyboardInterrupt

    monkeypatch.setattr("lmp.films.ingest.ingest", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_part(out, 0, retries=2)
    with pytest.raises(SystemExit) as left:
        run_part(out, 0, retries=2)
    assert left.value.code == 3 and "crash loop: the last 3 starts of part 0" in capsys.readouterr().out
    assert workers == [1, 2, 2]
    part = Part(out / ".lmp-parts", 0)
    (part.shards / ".lmp-films").mkdir(parents=True)
    (part.shards / ".lmp-films" / "film-0000.safetensors").touch()
    with pytest.raises(KeyboardInterrupt):
        run_part(out, 0, retries=2)
    assert workers == [1, 2, 2, 1], "one more film was read"


def test_settings_reach_the_parts(
    films: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out", []
    lists = tmp_path / "lists"
    lists.mkdir()
    for film in films.glob("*.mp4"):
        (lists / f"{film.stem}.txt").write_text("0.0 1.0\n")
    slurm.job_is("CANCELLED")
    site = tmp_path / "site.yaml"
    site.write_text("cluster: {partition: low, sbatch: {mail-user: me}, cpus_per_task: 2}\nname: x\n")
    more = ["--shots", str(lists), "--encoder", "video=signal,tokens=2", "--cluster", str(site), "--partition", "high"]
    main(words(films, out, "--parts", "2", *more))
    script = (slurm.folder / "script").read_text()
    assert "--partition=high" in script and "--mail-user=me" in script and "--cpus-per-task=2" in script

    def watched(films: Any, folder: Path, **settings: Any) -> None:
        seen.append((len(films), folder, settings))
        raise KeyboardInterrupt

    monkeypatch.setattr("lmp.films.ingest.ingest", watched)
    with pytest.raises(KeyboardInterrupt):
        run_part(out, 1)
    ((count, folder, settings),) = seen
    assert (count, folder, settings["shot_lists"]) == (2, out / ".lmp-parts/part-0001", lists)
    assert settings["encoders"] == {"video": "signal,tokens=2"} and settings["subtitles"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--encoder", "video=sginal"], "sginal"),
        (["--shots", "one.txt"], "no folder of shot lists"),
        (["--parts", "0"], "--parts 0"),
        (["--time", "2"], "cluster.time=2"),
        (["--partition", "nowhere"], "nowhere"),
    ],
)
def test_what_can_be_known_before_is_said_before(
    more: list[str], message: str, films: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(films, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_prints_the_script_and_writes_nothing(
    films: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(films, tmp_path / "out", "--dry-run")) == 0
    assert "#SBATCH --time=10" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() and slurm.asked == []


def test_how_many_parts(tmp_path: Path) -> None:
    assert parts_of(1000, asked=None, concurrency=16, folder=tmp_path) == 64
    assert parts_of(5, asked=None, concurrency=16, folder=tmp_path) == 5
    assert parts_of(5000, asked=None, concurrency=400, folder=tmp_path) == 1000
    assert parts_of(5000, asked=7, concurrency=400, folder=tmp_path) == 7
    (tmp_path / "plan.json").write_text('{"parts": 9}')
    assert parts_of(5000, asked=None, concurrency=400, folder=tmp_path) == 9
    assert parts_of(5000, asked=9, concurrency=400, folder=tmp_path) == 9
