"""Small films with features that name their film and shot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lmp.data.shards import FilmRecord, ShardWriter

ENCODERS = {"video": {"name": "toy", "version": "1"}}


def make_film(key: str, shots: int, *, seed: int = 0) -> FilmRecord:
    """video float16 [S, 1, 8], audio bfloat16 [S, 2, 4]; about a quarter of audio is missing."""
    generator = torch.Generator().manual_seed(seed)
    start_S = np.arange(shots, dtype=np.int32) * 1000
    return FilmRecord(
        key=key,
        info={"title": f"Der Füm {key}", "fps": 24.0, "split": "train"},
        shots_S2=np.stack([start_S, start_S + 900], axis=1),
        features={
            "video": torch.randn(shots, 1, 8, generator=generator).half(),
            "audio": torch.randn(shots, 2, 4, generator=generator).bfloat16(),
        },
        valid={
            "video": torch.ones(shots, dtype=torch.bool),
            "audio": torch.rand(shots, generator=generator) > 0.25,
        },
    )


def write_films(folder: Path, films: Sequence[FilmRecord], *, films_per_shard: int = 4) -> Path:
    with ShardWriter(folder, encoders=ENCODERS, films_per_shard=films_per_shard) as writer:
        for film in films:
            writer.write(film)
    return folder


@pytest.fixture(scope="session")
def film() -> Callable[..., FilmRecord]:
    return make_film


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    return write_films


@pytest.fixture(scope="session")
def films() -> list[FilmRecord]:
    """23 films of 1..60 shots; two of them far longer than the packs of the tests."""
    lengths = np.random.default_rng(0).integers(1, 30, 21).tolist()
    return [make_film(f"film-{i:02d}", n, seed=i) for i, n in enumerate([*lengths, 60, 47])]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, films: list[FilmRecord]) -> Path:
    """Shards of `films`; read only."""
    return write_films(tmp_path_factory.mktemp("corpus") / "shards", films)
