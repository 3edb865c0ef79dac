"""What a rank reads and holds under sequence parallelism is its own slice of each pack, and no byte more."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmp.data.index import FilmIndex
from lmp.data.loader import PackBatch, PackLoader
from lmp.data.plan import PlanSettings
from tests.runs import WIDTHS, make_shards

PACKS_PER_STEP = 4
ROW_BYTES = sum(2 * width + 1 for width in WIDTHS.values()) + 2 * 4 + 8 * (1 + len(WIDTHS))
"""Of a shot: float16 features and a valid byte per modality, two int32 times, int64 checksums of both."""
ALIGNMENT = 64 * (3 + 2 * len(WIDTHS))
"""Each column of a slice, and the slice, begin at a multiple of 64 bytes."""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FilmIndex:
    return FilmIndex.load([make_shards(tmp_path_factory.mktemp("slices") / "shards", films=9)])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sp=st.sampled_from([1, 2, 4, 8]),
    dp=st.sampled_from([1, 2, 4]),
    pack_shots=st.sampled_from([16, 24, 64]),
    window_shots=st.sampled_from([None, 5, 11]),
    seed=st.integers(0, 99),
)
def test_each_rank_reads_and_holds_its_slice(
    index: FilmIndex, bytes_read: list[int], sp: int, dp: int, pack_shots: int, window_shots: int | None, seed: int
) -> None:
    plan = PlanSettings(seed=seed, pack_shots=pack_shots, packs_per_step=PACKS_PER_STEP, window_shots=window_shots)

    def read(**place: int) -> list[tuple[list[PackBatch], int]]:
        """For some steps this rank's packs, and the bytes that it read for them."""
        found = []
        bytes_read.clear()
        with PackLoader(index, plan, threads=0, **place) as loader:
            for step in itertools.islice(loader, 3):
                found.append((step.packs, sum(bytes_read)))
                bytes_read.clear()
        return found

    whole = read()
    ranks = [read(dp_rank=d, dp_size=dp, sp_rank=s, sp_size=sp) for d in range(dp) for s in range(sp)]
    rows = pack_shots // sp
    for number, (packs_of_all, total) in enumerate(whole):
        full = all((pack.film_P >= 0).all() for pack in packs_of_all)
        assert sum(rank[number][1] for rank in ranks) == total
        for packs, taken in (rank[number] for rank in ranks):
            assert len(packs) == PACKS_PER_STEP // dp
            assert taken == ROW_BYTES * sum(int((pack.film_P >= 0).sum()) for pack in packs)
            assert not full or taken * dp * sp == total
            assert max(held(pack) for pack in packs) <= rows * ROW_BYTES + ALIGNMENT


def held(pack: PackBatch) -> int:
    """Bytes of memory that the features and flags of a pack keep."""
    storages = [x.untyped_storage() for x in (*pack.features.values(), *pack.valid.values())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
