from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmp.cli import main
from lmp.data.head import films_table, shots_table
from lmp.data.index import FilmIndex
from lmp.data.quarantine import quarantine
from lmp.data.shards import FilmRecord
from lmp.data.stats import bytes_to_read, stats
from lmp.errors import UserError

Make = Callable[..., Any]


def test_numbers_are_those_of_the_films(folder: Path, films: list[FilmRecord]) -> None:
    found = stats(FilmIndex.load(folder))
    lengths = np.array([len(f.shots_S2) for f in films])
    assert found["films"] == 23 and found["shots"] == lengths.sum() and found["shards"] == 6
    assert found["hours"] == pytest.approx(sum(f.shots_S2[-1, 1] for f in films) / 3.6e6)
    assert found["bytes"] == sum(p.stat().st_size for p in folder.glob("*.tar"))
    quartiles = [found["film_shots"][name] for name in ("min", "q25", "median", "q75", "q95", "max")]
    assert quartiles == np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 1]).tolist()
    assert found["shot_seconds"]["median"] == 0.9
    audio = found["modalities"]["audio"]
    assert (audio["tokens"], audio["width"], audio["dtype"]) == (2, 4, "bfloat16")
    assert audio["valid"] == pytest.approx(torch.cat([f.valid["audio"] for f in films]).float().mean().item())
    assert found["modalities"]["video"]["valid"] == 1.0
    assert found["quarantined"] == {} and "packing" not in found


def test_only_times_and_valid_bits_are_read(folder: Path, bytes_read: list[int]) -> None:
    index = FilmIndex.load(folder)
    done: list[int] = []
    stats(index, progress=done.append)
    assert sum(bytes_read) == int(index.shots.sum()) * (8 + 1 + 1) == sum(done) == bytes_to_read(index)


def test_packing_says_what_an_epoch_costs(folder: Path) -> None:
    index = FilmIndex.load(folder)
    packing = stats(index, pack_shots=64)["packing"]
    assert packing["fill"] * packing["packs"] * 64 == pytest.approx(index.shots.sum())
    assert 0 < packing["relative_cost"] <= 1
    assert packing["mean_cost"] == pytest.approx(packing["relative_cost"] * 64**2)
    # Packs of one shot are full, and each shot attends to itself alone.
    single = stats(index, pack_shots=1)["packing"]
    assert (single["packs"], single["fill"], single["mean_cost"]) == (index.shots.sum(), 1.0, 1.0)


def test_cleared_shots_and_quarantined_films_are_told(tmp_path: Path, film: Make, write: Make) -> None:
    bad = film("bad", 5)
    bad.features["video"][[1, 3]] = float("nan")
    folder = write(tmp_path / "s", [bad, film("good", 3), film("odd", 4)])
    quarantine(folder, {"odd": "a trailer"})
    found = stats(FilmIndex.load(folder))
    assert found["modalities"]["video"]["cleared"] == 2
    assert found["modalities"]["video"]["valid"] == 6 / 8
    assert found["quarantined"] == {"odd": "a trailer"} and found["films"] == 2


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    assert main(["data", "stats", str(folder), "--pack-shots", "32", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "23 films" in out and "audio: 2 x 4 bfloat16, valid 0.7" in out and "packs of 32 shots" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["data", "stats", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == stats(FilmIndex.load(folder))
    assert main(["data", "stats", str(folder), "--pack-shots", "0"]) == 2
    assert main(["data", "stats", str(folder), "--plot", str(tmp_path / "nowhere" / "plot.png")]) == 2
    assert "plot.png cannot be written" in capsys.readouterr().err


def test_head_lists_films(folder: Path, films: list[FilmRecord]) -> None:
    table = films_table(FilmIndex.load(folder), 3)
    assert table.names == ["key", "shots", "duration", "title", "video valid", "audio valid"]
    assert len(table.rows) == 3
    fraction = films[1].valid["audio"].float().mean().item()
    seconds = int(films[1].shots_S2[-1, 1]) // 1000
    assert table.rows[1] == [
        "film-01",
        str(len(films[1].shots_S2)),
        f"0:00:{seconds:02}.900",
        "Der Füm film-01",
        "1.000",
        f"{fraction:.3f}",
    ]
    assert len(films_table(FilmIndex.load(folder), 99).rows) == 23


def test_head_lists_shots_of_a_film(folder: Path, films: list[FilmRecord]) -> None:
    index = FilmIndex.load(folder)
    table = shots_table(index, "film-21")
    assert table.names == ["shot", "start", "end", "valid", "video norm", "audio norm"] and len(table.rows) == 60
    film = films[21]
    for shot in (0, 59):
        number, start, end, valid, video, audio = table.rows[shot]
        assert (number, start, end) == (str(shot), f"0:00:{shot:02}.000", f"0:00:{shot:02}.900")
        assert valid == ("video audio" if film.valid["audio"][shot] else "video")
        assert float(video) == pytest.approx(film.features["video"][shot].float().norm().item(), rel=1e-3)
        assert float(audio) == pytest.approx(film.features["audio"][shot].float().norm().item(), rel=1e-3)
    assert len(shots_table(index, "film-21", 7).rows) == 7
    with pytest.raises(UserError, match="has no film film-99 -> did you mean film-"):
        shots_table(index, "film-99")


def test_head_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["data", "head", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[1].split("\t")[3] == "Der Füm film-00"
    assert main(["data", "head", str(folder), "--film", "film-02", "-n", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["data", "head", str(folder), "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert "│" in out and "Der Füm film-00" in out
    assert main(["data", "head", str(folder), "-n", "0"]) == 2
