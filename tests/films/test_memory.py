"""What is held while a film is read does not grow with its length."""

from __future__ import annotations

import tracemalloc
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.films import film as room
from lmp.films import outputs
from lmp.films.ahead import read_ahead
from lmp.films.detectors import build_finder
from lmp.films.encoders import build_encoders
from lmp.films.film import FilmJob, FilmResult, Tools, encode_film
from lmp.films.sources import Film, Source
from lmp.scaling.bench_ingest_films import make_long_film

# Bytes: what waits at the peak differs by a few shots from run to run. The pictures that 15 shots give to the encoder
# are 1.9 MB, their sound is 3.8 MB.
GROWTH = 1_200_000


def encode(path: Path, modality: str) -> FilmResult:
    tools = Tools(build_encoders({modality: "signal"}), build_finder(), None)
    job = FilmJob(Film("long", Source.of(path)), None, None, 1, path, {})
    return encode_film(job, tools, path)


def peak_of(path: Path, modality: str) -> int:
    tracemalloc.start()
    try:
        encode(path, modality)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_a_film_four_times_as_long_takes_no_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modality: str
) -> None:
    """Buffers are made small, so that the short film fills them too."""
    monkeypatch.setattr(outputs, "_BATCH", 2)
    monkeypatch.setattr(room, "read_ahead", partial(read_ahead, limit=500_000))
    short, long = (make_long_film(tmp_path / f"{seconds}.mkv", seconds) for seconds in (20, 80))
    assert len(encode(short, modality).features[modality]) == 5  # imports, and tables that are made once, are over
    peaks = peak_of(short, modality), peak_of(long, modality)
    assert peaks[1] - peaks[0] < GROWTH, peaks
