"""Films through an array on a real SLURM, parts and launcher killed: the same as by one `lmp ingest`."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.data.index import FilmIndex
from lmp.data.verify import verify
from lmp.films.ingest import ingest
from lmp.films.synthetic import FilmSettings, make_films
from tests.cluster.conftest import Slurm
from tests.runs import start

pytestmark = pytest.mark.slurm

ENCODERS = {"video": "signal", "audio": "signal", "text": "signal"}


def test_an_array_gives_what_one_process_gives(slurm: Slurm, tmp_path: Path) -> None:
    films, out = tmp_path / "films", tmp_path / "out"
    make_films(films, films=6, seed=5, settings=FilmSettings(shots=24), workers=1, progress=False)
    (films / "broken.mp4").write_text("text\n" * 100)  # the first by name
    words = ["ingest", str(films), "--out", str(out), "--parts", "2", "--time", "5", "--poll", "0.2"]
    parts = out / ".lmp-parts"
    launcher = start(*words, module="launch.slurm")
    try:
        slurm.until("both parts to begin", lambda: len(list(parts.glob("*.starts"))) == 2)
        launcher.kill()
        first, _ = launcher.communicate()
        launcher = start(*words, module="launch.slurm")
        elements = elements_of()
        run("scancel", "--signal=USR2", elements["0"][0])  # as before the time limit
        slurm.until("a film of part 1 to be read", lambda: any(parts.glob("part-0001/.lmp-films/*.safetensors")))
        os.kill(slurm.ranks_of(elements["1"][1])[0].pid, signal.SIGKILL)
        assert not (parts / "part-0001.report.json").exists()
        told, errors = launcher.communicate(timeout=400)
    finally:
        launcher.kill()
    assert "2 parts, 2 at a time" in first and "at a time" not in told, "jobs that go on are not submitted again"
    assert launcher.returncode == 2, told + errors
    assert [slurm.field(elements[index][0], "Restarts") for index in ("0", "1")] == ["1", "1"]
    assert "2 of 2 parts done, " in told and f"6 films, 144 shots -> {out}" in told
    assert errors.count("error: skipped") == 1 and f"skipped {films / 'broken.mp4'}: " in errors
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".npz", ".npz", ".tar", ".tar"]

    report = ingest([films], tmp_path / "one", encoders=ENCODERS, progress=False)
    index, one = FilmIndex.load(out), FilmIndex.load(tmp_path / "one")
    assert (report.films, report.shots, len(report.failures)) == (6, 144, 1)
    assert list(verify(index)) == []
    assert index.keys == one.keys and index.manifests[0]["encoders"] == one.manifests[0]["encoders"]
    for film, shots in enumerate(one.shots.tolist()):
        assert index.info(film) == one.info(film)
        found, wanted = index.read(film, 0, shots), one.read(film, 0, shots)
        assert all(torch.equal(found.column(column.name), wanted.column(column.name)) for column in one.columns)


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def elements_of() -> dict[str, tuple[str, str]]:
    """Index of each element of the only array -> its name ARRAY_INDEX, and its id as a job."""
    lines = [line.split() for line in run("squeue", "-h", "-r", "-o", "%K %F_%K %A %j").splitlines()]
    return {index: (name, job) for index, name, job, called in lines if called.startswith("lmp-ingest-")}
