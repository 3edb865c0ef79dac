"""Films with planted structure, as real shards, and models whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lmp.data.index import FilmIndex
from lmp.data.shards import FilmRecord, ShardWriter
from lmp.model import LmpConfig, LmpForPretraining, LmpPretrainingOutput

WIDTHS = {"video": 12, "audio": 10, "text": 8}
PLACES = ("attic", "beach", "cave", "den")
SHOT_MS = 1000


def write_films(folder: Path, *, films: int, shots: int, seed: int, prefix: str, labels: Path | None = None) -> Path:
    """Films whose place (runs of five shots) and own content drive every modality; text is often missing."""
    random = np.random.default_rng(seed)
    bases = np.random.default_rng(99)
    place_of = {name: bases.standard_normal((len(PLACES), width)) for name, width in WIDTHS.items()}
    own_of = {name: bases.standard_normal((3, width)) for name, width in WIDTHS.items()}
    with ShardWriter(folder, encoders={}, films_per_shard=4) as writer:
        for film in range(films):
            count = shots + film % 3
            place_N = np.repeat(random.integers(0, len(PLACES), count // 5 + 1), 5)[:count]
            own_N3 = random.standard_normal((count, 3))
            features = {
                name: 0.6 * place_of[name][place_N]
                + own_N3 @ own_of[name]
                + 0.5 * random.standard_normal((count, width))
                for name, width in WIDTHS.items()
            }
            valid = {name: torch.ones(count, dtype=torch.bool) for name in WIDTHS}
            valid["text"] = torch.from_numpy(random.random(count) < 0.7)
            edges = np.arange(count + 1) * SHOT_MS
            key = f"{prefix}{film}"
            record = FilmRecord(
                key=key,
                info={"title": key},
                shots_S2=np.stack([edges[:-1], edges[1:]], 1).astype(np.int32),
                features={n: torch.from_numpy(x).to(torch.float16)[:, None] for n, x in features.items()},
                valid=valid,
            )
            writer.write(record)
            if labels is not None:
                shots_json = [
                    {"start_ms": int(a), "end_ms": int(b), "place": PLACES[p], "people": ["x"]}
                    for a, b, p in zip(edges[:-1], edges[1:], place_N, strict=True)
                ]
                genre = "comedy" if film % 2 else "drama"
                labels.mkdir(exist_ok=True, parents=True)
                (labels / f"{key}.labels.json").write_text(json.dumps({"film": {"genre": genre}, "shots": shots_json}))
    return folder


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of held-out shards (8 films), training shards (12 films) and labels."""
    folder = tmp_path_factory.mktemp("planted")
    labels = folder / "labels"
    held = write_films(folder / "held", films=8, shots=30, seed=1, prefix="held", labels=labels)
    train = write_films(folder / "train", films=12, shots=30, seed=2, prefix="train", labels=labels)
    return held, train, labels


@pytest.fixture(scope="session")
def held(planted: tuple[Path, Path, Path]) -> FilmIndex:
    """The held-out films."""
    return FilmIndex.load(planted[0])


@pytest.fixture(scope="session")
def config() -> LmpConfig:
    """A small model of the planted modalities."""
    return LmpConfig(
        modalities={name: {"tokens": 1, "width": width} for name, width in WIDTHS.items()},
        width=32,
        heads=2,
        contextual_layers=1,
        cross_layers=1,
        contrastive_width=16,
        max_positions=64,
    )


@pytest.fixture(scope="session")
def small_model(config: LmpConfig) -> LmpForPretraining:
    """The real model, untrained."""
    torch.manual_seed(5)
    return LmpForPretraining(config).eval()


Answer = Callable[[Tensor], Tensor]


class KnownModel(nn.Module):
    """Stands for a trained model: `answer` turns the base features [P, K, I] of a modality into its guess.

    The gallery side is the base feature. It is handed the hidden features too, so that it can be perfect.
    """

    def __init__(self, config: LmpConfig, answer: Answer) -> None:
        super().__init__()
        self.config, self.answer = config, answer
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, features: dict[str, Tensor], valid: dict[str, Tensor], **_: object) -> LmpPretrainingOutput:
        truth = {name: normalize(x.float(), dim=-1) for name, x in features.items()}
        said = {name: self.answer(x) for name, x in truth.items()}
        wide = nn.functional.pad(truth["video"], (0, 4))
        return LmpPretrainingOutput(
            contextual=truth,
            cross=wide,
            predicted=said,
            target=truth,
            aligned=dict.fromkeys(truth, truth["video"]),
            reconstructed=self.answer(truth["video"]),
            scale={},
        )


@pytest.fixture
def known_model(config: LmpConfig) -> Callable[[Answer], KnownModel]:
    """Makes a model from its answer."""
    return lambda answer: KnownModel(config, answer)
