"""Masks as a pure function of seed, epoch, pack, modality, film and shot."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmp.objectives.masking import draw_masks


def draw(shots: int = 4000, *, film: int = 0, names: tuple[str, ...] = ("video",), **changes: Any) -> dict[str, Tensor]:
    """Masks of the first shots of a film, all valid."""
    keys: dict[str, Any] = {"seed": 1, "epoch": 0, "pack": 0, "ratio": 0.3, "span": 1}
    shot_P = torch.arange(shots)
    valid = {name: torch.ones(shots, dtype=torch.bool) for name in names}
    return draw_masks(valid, torch.full_like(shot_P, film), shot_P, **(keys | changes))


def runs_of(mask_P: Tensor) -> list[tuple[int, int]]:
    """(first place, length) of each run of masked shots."""
    edge = torch.diff(mask_P.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, ends = (edge == 1).nonzero()[:, 0].tolist(), (edge == -1).nonzero()[:, 0].tolist()
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("span", [1, 3])
def test_the_ratio_is_met(ratio: float, span: int) -> None:
    share = draw(30_000, ratio=ratio, span=span)["video"].double().mean().item()
    # Five standard deviations of the mean of independent runs.
    assert abs(share - ratio) < 5 * (ratio * (1 - ratio) * span / 30_000) ** 0.5


def test_the_ratio_is_met_over_many_short_films() -> None:
    film_P = torch.arange(3000).repeat_interleave(5)
    shot_P = torch.arange(5).repeat(3000)
    valid = {"video": torch.ones(15_000, dtype=torch.bool)}
    masks = draw_masks(valid, film_P, shot_P, seed=3, epoch=1, pack=9, ratio=0.2, span=4)
    assert abs(masks["video"].double().mean().item() - 0.2) < 0.03
    # Each place of a film has the same chance: runs begin at a different phase in each film.
    by_place = masks["video"].view(3000, 5).double().mean(0)
    assert (by_place - 0.2).abs().max() < 0.05


def test_ratio_0_masks_nothing_and_1_all_valid() -> None:
    assert not draw(ratio=0.0)["video"].any()
    assert draw(ratio=1.0)["video"].all()


@pytest.mark.parametrize("span", [2, 5])
def test_masked_shots_come_in_whole_spans(span: int) -> None:
    shots = 2000
    phases = set()
    for film in range(20):
        runs = runs_of(draw(shots, film=film, span=span)["video"])
        inner = [(start, length) for start, length in runs if start > 0 and start + length < shots]
        assert len(inner) > 50
        assert all(length % span == 0 for _, length in inner)
        assert len({start % span for start, _ in inner}) == 1
        phases.add(inner[0][0] % span)
    assert phases == set(range(span))


def test_only_valid_shots_are_masked_and_validity_changes_no_other_shot() -> None:
    shot_P = torch.arange(500)
    valid_P = shot_P % 3 != 0
    keys: dict[str, Any] = {"seed": 1, "epoch": 0, "pack": 0, "ratio": 0.3, "span": 1}
    mask_P = draw_masks({"video": valid_P}, torch.zeros_like(shot_P), shot_P, **keys)["video"]
    assert torch.equal(mask_P, draw(500)["video"] & valid_P)


OTHER_KEYS = [{"seed": 2}, {"epoch": 1}, {"pack": 1}, {"film": 1}, {"seed": 2**63 - 1}, {"seed": -5}]


@pytest.mark.parametrize("change", OTHER_KEYS)
@pytest.mark.parametrize("span", [1, 3])
def test_every_key_gives_an_independent_mask(change: dict[str, int], span: int) -> None:
    one, other = draw(30_000, span=span)["video"], draw(30_000, span=span, **change)["video"]
    assert abs((one & other).double().mean().item() - 0.09) < 0.02


def test_modalities_are_independent_and_do_not_depend_on_each_other() -> None:
    masks = draw(30_000, names=("video", "audio", "text"))
    assert abs((masks["video"] & masks["audio"]).double().mean().item() - 0.09) < 0.01
    alone = draw(30_000, names=("audio",))["audio"]
    assert torch.equal(masks["audio"], alone)


def test_neighbouring_shots_are_independent() -> None:
    mask_P = draw(30_000)["video"].double()
    for lag in (1, 2, 7):
        assert abs((mask_P[lag:] * mask_P[:-lag]).mean().item() - 0.09) < 0.01


def test_epoch_and_pack_are_not_mixed_up() -> None:
    one, other = draw(epoch=1, pack=11)["video"], draw(epoch=11, pack=1)["video"]
    assert not torch.equal(one, other)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seed=st.integers(0, 2**40),
    span=st.integers(1, 4),
    data=st.data(),
)
def test_slices_and_packs_do_not_matter(lengths: list[int], seed: int, span: int, data: st.DataObject) -> None:
    film_P = torch.repeat_interleave(torch.arange(len(lengths)) * 7, torch.tensor(lengths))
    shot_P = torch.cat([torch.arange(5, 5 + length) for length in lengths])
    valid_P = torch.rand(len(film_P), generator=torch.Generator().manual_seed(seed % 2**31)) < 0.8
    keys: dict[str, Any] = {"seed": seed, "epoch": 2, "pack": 5, "ratio": 0.4, "span": span}
    whole_P = draw_masks({"text": valid_P}, film_P, shot_P, **keys)["text"]
    order = torch.tensor(data.draw(st.permutations(range(len(film_P)))))
    some = order[: data.draw(st.integers(0, len(order)))]
    part_P = draw_masks({"text": valid_P[some]}, film_P[some], shot_P[some], **keys)["text"]
    assert torch.equal(part_P, whole_P[some])


def splitmix(x: int) -> int:
    """splitmix64 in Python integers."""
    word = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


def test_the_masks_follow_the_written_rule() -> None:
    # A resumed run must draw as the one that began did, so the rule stays.
    film, span = 3, 2
    key = int.from_bytes(hashlib.blake2b(b"17/1/4/video", digest_size=8).digest(), "little")
    film_hash = splitmix(film ^ key)
    runs = [(shot + (film_hash >> 11) % span) // span for shot in range(40)]
    draws = [splitmix((splitmix(film_hash) + run) % 2**64) >> 11 for run in runs]
    want = [number < 0.3 * 2**53 for number in draws]
    assert any(want)
    assert draw(40, film=film, span=span, seed=17, epoch=1, pack=4)["video"].tolist() == want


@pytest.mark.parametrize("wrong", [{"ratio": -0.1}, {"ratio": 1.1}, {"span": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ratio .* span"):
        draw(10, **wrong)
