"""Killed ingests, and any number of workers: the same bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.films import kept
from lmp.films.ingest import ingest
from lmp.films.synthetic import FilmSettings, make_films

SIGNAL = {"video": "signal", "audio": "signal", "text": "signal"}
FILMS = 5


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    make_films(folder, films=FILMS, seed=5, settings=FilmSettings(shots=12), workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def undisturbed(films: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the files that one worker makes."""
    out = tmp_path_factory.mktemp("one") / "shards"
    assert ingest([films], out, encoders=SIGNAL, progress=False).films == FILMS
    return digests(out)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def wait_for(what: str, seen: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_killed_ingest_of_two_workers_goes_on_where_it_was(
    films: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    waiting = out / kept.FOLDER
    command = [sys.executable, "-m", "lmp.cli", "ingest", str(films), "--out", str(out), "--workers", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for("no film was read", lambda: list(waiting.glob("*.safetensors")) or process.poll() is not None)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    # The workers do not outlive it: they would hold their networks, and write into the next ingest's folder.
    wait_for("workers are left", lambda: not any(w.is_running() and w.status() != "zombie" for w in workers))
    read = list(waiting.glob("*.safetensors"))
    assert 0 < len(read) < FILMS
    assert not [path for path in out.iterdir() if not path.name.startswith(".")]

    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
    assert f"{FILMS} films" in again.stdout
    assert digests(out) == undisturbed


def test_four_workers_give_the_bytes_of_one(films: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    ingest([films], tmp_path / "out", encoders=SIGNAL, workers=4, progress=False)
    assert digests(tmp_path / "out") == undisturbed
