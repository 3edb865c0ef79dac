"""Retrieval: a perfect and a blind model, and rivals whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lmp.data.index import FilmIndex
from lmp.data.shards import FilmRecord, ShardWriter
from lmp.downstream.features import Scaling, films, fresh_model, run_film, run_lengths
from lmp.downstream.retrieval import (
    RetrievalSettings,
    blind_rivals,
    cross_modal,
    cross_modal_rivals,
    hidden_shots,
    masked_shot,
)
from lmp.downstream.rivals import Ridge, guess
from lmp.errors import UserError
from lmp.model import LmpForPretraining

MODALITIES = ("video", "audio", "text")
SETTINGS = RetrievalSettings(mask_ratio=0.3)


def masked(model: object, index: FilmIndex, seed: int = 0, settings: RetrievalSettings = SETTINGS):  # type: ignore[no-untyped-def]
    scaling = Scaling.of(index, MODALITIES)
    return masked_shot({"model": model}, index, scaling=scaling, seed=seed, settings=settings)  # type: ignore[dict-item]


def test_a_perfect_model_ranks_first_and_a_blind_one_at_chance(held: FilmIndex, known_model: Callable) -> None:
    random = torch.Generator().manual_seed(0)
    perfect = masked(known_model(lambda x: x), held)
    blind = masked(known_model(lambda x: torch.randn(x.shape, generator=random)), held)
    for name in MODALITIES:
        assert perfect[name]["model"].recall[1] == 1.0
        assert perfect[name]["model"].mrr == 1.0
        assert blind[name]["model"].mrr == pytest.approx(blind[name]["chance"].mrr, abs=0.06)
        assert perfect[name]["copy"].mrr < 1.0


def test_the_gallery_is_the_hidden_shots_alone(held: FilmIndex, known_model: Callable) -> None:
    found = masked(known_model(lambda x: x), held)
    for name in MODALITIES:
        hidden = sum(int(hidden_shots(film, seed=0, settings=SETTINGS)[name].sum()) for film in films(held, MODALITIES))
        assert {row.gallery for row in found[name].values()} == {hidden}
        assert {row.queries for row in found[name].values()} == {hidden}
        valid = sum(int(film.valid[name].sum()) for film in films(held, MODALITIES))
        assert 0.2 * valid < hidden < 0.4 * valid


def test_draws_differ_by_seed_and_never_hide_what_is_missing(held: FilmIndex) -> None:
    film = next(films(held, MODALITIES))
    one, two = (hidden_shots(film, seed=seed, settings=SETTINGS) for seed in (0, 1))
    assert not torch.equal(one["video"], two["video"])
    assert not (one["text"] & ~film.valid["text"]).any()


def test_the_real_model_does_not_see_what_is_hidden(held: FilmIndex, small_model: LmpForPretraining) -> None:
    film = next(films(held, MODALITIES))
    hidden = hidden_shots(film, seed=0, settings=SETTINGS)
    before = run_film(small_model, film, max_shots=None, masked=hidden)
    for name in MODALITIES:
        film.features[name][hidden[name]] = 7.0
    after = run_film(small_model, film, max_shots=None, masked=hidden)
    for name in MODALITIES:
        assert torch.equal(before.predicted[name], after.predicted[name])
        assert not torch.equal(before.target[name], after.target[name])


def test_reconstruction_does_not_see_the_target(held: FilmIndex, small_model: LmpForPretraining) -> None:
    film = next(films(held, MODALITIES))
    before = run_film(small_model, film, max_shots=None).reconstructed
    film.features["video"][:] = 7.0
    assert torch.equal(before, run_film(small_model, film, max_shots=None).reconstructed)
    film.features["audio"][:] = 7.0
    assert not torch.equal(before, run_film(small_model, film, max_shots=None).reconstructed)


def test_long_films_are_cut_into_runs_that_do_not_see_each_other(
    held: FilmIndex, small_model: LmpForPretraining
) -> None:
    assert run_lengths(10, None) == (10,)
    assert run_lengths(10, 4) == (4, 3, 3)
    assert run_lengths(8, 4) == (4, 4)
    film = next(films(held, MODALITIES))
    first = run_lengths(len(film.shots_N2), 16)[0]
    before = run_film(small_model, film, max_shots=16).contextual["video"]
    film.features["video"][first:] = 7.0
    after = run_film(small_model, film, max_shots=16).contextual["video"]
    assert torch.equal(before[:first], after[:first])
    assert not torch.equal(before[first:], after[first:])


def test_guesses_of_a_known_sequence() -> None:
    base_ND = torch.eye(8)
    seen_N = torch.tensor([1, 0, 1, 0, 0, 1, 0, 0]).bool()
    found = guess(base_ND, seen_N, torch.tensor([1, 4, 6, 2]), [6, 2])
    # Shot 1 lies between 0 and 2: the earlier. In the run of shot 6 nothing is seen. Shot 2 is not its own.
    assert found.nearest_A.tolist() == [0, 5, -1, 0]
    assert torch.equal(found.rows["copy"][:2], base_ND[[0, 5]])
    assert not any(rows[2].any() for rows in found.rows.values())
    assert found.rows["mean"][0].tolist() == [1, 0, 1, 0, 0, 1, 0, 0]
    assert found.rows["mean"][3].tolist() == [1, 0, 0, 0, 0, 1, 0, 0]
    near = found.rows["near"][1]
    assert near[5] > near[2] > near[0] > 0
    assert near[2] / near[5] == pytest.approx(np.exp(-0.1))
    in_chunks = guess(base_ND, seen_N, torch.tensor([1, 4, 6, 2]), [6, 2], chunk=1)
    assert all(torch.equal(in_chunks.rows[name], rows) for name, rows in found.rows.items())


@pytest.fixture
def twins(tmp_path: Path) -> FilmIndex:
    """Six films in which shots 2i and 2i + 1 look the same and no other two do."""
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path / "twins", encoders={}) as writer:
        for film in range(6):
            video = np.repeat(random.standard_normal((20, 1, 16)), 2, axis=0)
            audio = np.broadcast_to(random.standard_normal((1, 1, 4)), (40, 1, 4)).copy()
            edges = np.arange(41, dtype=np.int32) * 500
            writer.write(
                FilmRecord(
                    key=f"twin{film}",
                    info={},
                    shots_S2=np.stack([edges[:-1], edges[1:]], 1),
                    features={
                        "video": torch.from_numpy(video).half(),
                        "audio": torch.from_numpy(audio).half(),
                    },
                    valid={name: torch.ones(40, dtype=torch.bool) for name in ("video", "audio")},
                )
            )
    return FilmIndex.load(tmp_path / "twins")


def test_copying_finds_twins_across_modalities(twins: FilmIndex) -> None:
    scaling = Scaling.of(twins, ("video", "audio"))
    found = cross_modal_rivals(
        twins, target="video", sources=["audio"], scaling=scaling, ridge=None, settings=RetrievalSettings()
    )["reconstruction"]
    # Odd shots copy the twin before them, which is no candidate; even shots copy the shot before, which is no
    # twin of theirs (and shot 0 copies its twin). Half and 1/40 of the shots are found.
    assert found["copy"].recall[1] == pytest.approx(0.5 + 1 / 40, abs=0.01)
    assert found["chance"].recall[1] == 1 / 240
    # At each of the 40 places lie 6 candidates.
    assert found["position"].recall[1] == pytest.approx(1 / 6)
    assert "ridge" not in found


def test_copying_and_averaging_on_masked_shots(twins: FilmIndex) -> None:
    scaling = Scaling.of(twins, ("video",))
    found = masked_shot({}, twins, scaling=scaling, seed=0, settings=RetrievalSettings(mask_ratio=0.1))["video"]
    # Nearest is the earlier neighbour: a seen twin for odd shots, a stranger for even ones.
    assert 0.35 < found["copy"].recall[1] < 0.65
    assert found["near"].recall[1] > found["chance"].recall[1]
    assert set(found) == {"copy", "mean", "near", "chance"}


def test_ridge_finds_a_linear_relation_and_beats_chance_by_far(
    planted: tuple[Path, Path, Path], held: FilmIndex
) -> None:
    ridge = Ridge(FilmIndex.load(planted[1]), target="video", sources=["audio", "text"])
    scaling = Scaling.of(held, MODALITIES)
    found = cross_modal_rivals(
        held,
        target="video",
        sources=["audio", "text"],
        scaling=scaling,
        ridge=ridge,
        settings=RetrievalSettings(),
    )["reconstruction"]
    assert found["ridge"].mrr > 10 * found["chance"].mrr
    assert found["ridge"].mrr > found["copy"].mrr


def test_ridge_is_the_closed_form(planted: tuple[Path, Path, Path]) -> None:
    index = FilmIndex.load(planted[1])
    ridge = Ridge(index, target="video", sources=["audio"])
    shown = list(films(index, ("audio", "video")))
    x = torch.cat([ridge.scaling.apply(film, "audio") for film in shown]).double()
    x = torch.cat([x, torch.ones(len(x), 2).double()], 1)
    y = torch.cat([ridge.scaling.apply(film, "video") for film in shown]).double()
    weight = torch.linalg.lstsq(
        torch.cat([x, ridge.alpha**0.5 * torch.eye(x.shape[1]).double()]),
        torch.cat([y, torch.zeros(x.shape[1], y.shape[1]).double()]),
    ).solution
    got = torch.cat([ridge.predict(film) for film in shown])
    assert torch.allclose(got.double(), x @ weight, atol=1e-5)


def test_cross_modal_of_a_perfect_model(held: FilmIndex, known_model: Callable) -> None:
    for moved in (False, True):
        found = cross_modal(known_model(lambda x: x), held, settings=RetrievalSettings(), moved=moved)
        assert set(found) == {
            "reconstruction",
            *(f"{a}->{b}" for a in MODALITIES for b in MODALITIES if a != b),
        }
        assert all(metrics.recall[1] == 1.0 for metrics in found.values())
        assert found["reconstruction"].gallery == int(held.shots.sum())
    assert found["reconstruction"].queries < int(held.shots.sum())


def test_cross_modal_rivals_ask_the_same_queries(held: FilmIndex, known_model: Callable) -> None:
    model = cross_modal(known_model(lambda x: x), held, settings=RetrievalSettings())
    rivals = cross_modal_rivals(
        held,
        target="video",
        sources=["audio", "text"],
        scaling=Scaling.of(held, MODALITIES),
        ridge=None,
        settings=RetrievalSettings(),
    )
    for task, metrics in model.items():
        for row in rivals[task].values():
            assert (row.queries, row.gallery) == (metrics.queries, metrics.gallery)


def test_a_model_that_knows_only_the_position_is_unmasked(held: FilmIndex, small_model: LmpForPretraining) -> None:
    class Positional(torch.nn.Module):
        """Answers with the position alone, which both sides share."""

        def __init__(self) -> None:
            super().__init__()
            self.config, self.weight = small_model.config, torch.nn.Parameter(torch.zeros(1))

        def forward(self, features, valid, *, positions, **_):  # type: ignore[no-untyped-def]
            said = torch.nn.functional.one_hot(positions, 64).float()[:, None]
            every = dict.fromkeys(MODALITIES, said)
            return type(small_model(features, valid, lengths=(len(positions),)))(
                contextual=every, cross=said, predicted=every, target=every, aligned=every, reconstructed=said
            )

    model = Positional()
    as_trained = cross_modal(model, held, settings=RetrievalSettings())["reconstruction"]  # type: ignore[arg-type]
    moved = cross_modal(model, held, settings=RetrievalSettings(), moved=True)["reconstruction"]  # type: ignore[arg-type]
    rival = blind_rivals(torch.arange(3), torch.tensor([0, 0, 1, 2, 2, 2]))["position"]
    assert rival.recall[1] == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)
    assert as_trained.mrr > 5 * chance_mrr(int(held.shots.sum()))
    assert moved.mrr < chance_mrr(int(held.shots.sum()))


def chance_mrr(gallery: int) -> float:
    return float((1 / torch.arange(1, gallery + 1)).sum() / gallery)


def test_fresh_models_differ_by_seed_and_leave_the_random_state_alone(config) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    one, again, other = (fresh_model(config, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), want)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_model_that_is_not_finite_is_refused(held: FilmIndex, config) -> None:  # type: ignore[no-untyped-def]
    model = fresh_model(config, 0)
    with torch.no_grad():
        model.lmp.cross.query.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        run_film(model, next(films(held, MODALITIES)), max_shots=None)
