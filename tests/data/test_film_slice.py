from __future__ import annotations

import gc
import itertools
from pathlib import Path

import torch

from lmp.data.film_slice import Blocks, FilmSlice
from lmp.data.index import FilmIndex
from lmp.data.loader import PackLoader
from lmp.data.manifest import Modality
from lmp.data.plan import PlanSettings

MODALITIES = {"video": Modality("video", 1, 24, "float16"), "audio": Modality("audio", 2, 5, "bfloat16")}


def test_columns_lie_apart_and_aligned() -> None:
    rows = FilmSlice.empty(MODALITIES, 7)
    tensors = [rows.check, rows.shots_N2, *rows.valid.values(), *rows.features.values()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    assert all(start % 64 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    rows.clear()
    rows.rows(2, 5).features["audio"].fill_(3)
    assert rows.features["audio"].flatten(1).sum(1).tolist() == [0, 0, 30, 30, 30, 0, 0]
    assert not rows.features["video"].any()


def test_memory_is_used_again_once_no_tensor_refers_to_it() -> None:
    blocks = Blocks()
    rows = FilmSlice.empty(MODALITIES, 7, blocks=blocks)
    place = rows.features["video"].data_ptr()
    kept = rows.features["video"][3:].view(torch.int16)  # a view of a part keeps the whole
    kept.fill_(5)
    del rows
    gc.collect()
    other = FilmSlice.empty(MODALITIES, 7, blocks=blocks)
    assert other.features["video"].data_ptr() != place
    other.clear()
    assert (kept == 5).all()
    del kept
    gc.collect()
    assert FilmSlice.empty(MODALITIES, 7, blocks=blocks).features["video"].data_ptr() == place


def test_a_graph_keeps_its_memory_until_its_backward() -> None:
    blocks = Blocks()
    rows = FilmSlice.empty(MODALITIES, 4, blocks=blocks)
    rows.clear()
    rows.features["video"].fill_(2)
    weight = torch.ones(24, dtype=torch.float16, requires_grad=True)
    loss = (rows.features["video"] * weight).sum()
    del rows
    FilmSlice.empty(MODALITIES, 4, blocks=blocks).features["video"].fill_(9)
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [8.0] * 24


def test_a_loader_holds_no_more_memory_than_is_in_use_at_once(folder: Path) -> None:
    places = set()
    with PackLoader(FilmIndex.load(folder), PlanSettings(0, 64, 2), threads=2, read_ahead=1) as loader:
        for _ in range(40):
            places |= {pack.features["video"].data_ptr() for pack in next(loader).packs}
    assert len(places) <= 2 * (1 + 1 + 1) + 2, "the step taken, those ahead, and what is not collected yet"


def test_batches_that_are_kept_stay_what_they_are(folder: Path) -> None:
    index = FilmIndex.load(folder)
    with PackLoader(index, PlanSettings(0, 64, 2), threads=2) as loader:
        kept = [next(loader) for _ in range(12)]
    for step in kept:
        for pack in step.packs:
            for row in (pack.film_P >= 0).nonzero()[:, 0].tolist():
                film, shot = int(pack.film_P[row]), int(pack.shot_P[row])
                assert torch.equal(pack.features["audio"][row], index.read(film, shot, shot + 1).features["audio"][0])
