from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lmp.data.loader
import lmp.data.stream
from lmp.data.index import FilmIndex
from lmp.data.loader import PackBatch, PackLoader, StepBatch, read_pack
from lmp.data.plan import EpochPlan, Films, Pack, PlanSettings
from lmp.data.shards import FilmRecord
from lmp.data.stream import Cursor, Stream
from lmp.errors import UserError

SETTINGS = PlanSettings(seed=11, pack_shots=16, packs_per_step=4, window_shots=11)
ROWS = ("film_P", "shot_P", "position_P", "segment_P", "time_P")


@pytest.fixture(scope="session")
def index(folder: Path) -> FilmIndex:
    return FilmIndex.load(folder)


def take(index: FilmIndex, steps: int, **options: Any) -> list[StepBatch]:
    with PackLoader(index, options.pop("settings", SETTINGS), **({"threads": 0} | options)) as loader:
        return list(itertools.islice(loader, steps))


def tensors(pack: PackBatch) -> dict[str, torch.Tensor]:
    valid = {f"{name}_valid": t for name, t in pack.valid.items()}
    return pack.features | valid | {name: getattr(pack, name) for name in ROWS}


def name_of(pack: PackBatch) -> tuple[Any, ...]:
    return pack.slot, pack.epoch, pack.number, pack.lengths


def assert_same(a: list[StepBatch], b: list[StepBatch]) -> None:
    assert [s.cursor for s in a] == [s.cursor for s in b]
    for one, other in zip(a, b, strict=True):
        assert [name_of(p) for p in one.packs] == [name_of(p) for p in other.packs]
        for p, q in zip(one.packs, other.packs, strict=True):
            assert tensors(p).keys() == tensors(q).keys()
            assert all(torch.equal(t, tensors(q)[name]) for name, t in tensors(p).items())


def join(ranks: list[list[list[StepBatch]]]) -> list[StepBatch]:
    """The streams of all [dp][sp] ranks as one rank would see them, packs in order of slots."""
    whole = []
    for step in zip(*(zip(*dp, strict=True) for dp in ranks), strict=True):
        packs = []
        for slices in step:
            assert len({s.cursor for s in slices}) == 1
            for parts in zip(*(s.packs for s in slices), strict=True):
                assert len({name_of(p) for p in parts}) == 1
                joined = {n: torch.cat([tensors(p)[n] for p in parts]) for n in tensors(parts[0])}
                packs.append(
                    PackBatch(
                        **dict(zip(("slot", "epoch", "number", "lengths"), name_of(parts[0]), strict=True)),
                        features={n: joined[n] for n in parts[0].features},
                        valid={n: joined[f"{n}_valid"] for n in parts[0].valid},
                        **{n: joined[n] for n in ROWS},
                    )
                )
        whole.append(StepBatch(step[0][0].cursor, sorted(packs, key=lambda p: p.slot)))
    return whole


def by_slot(steps: list[StepBatch]) -> list[StepBatch]:
    return [StepBatch(s.cursor, sorted(s.packs, key=lambda p: p.slot)) for s in steps]


def test_packs_hold_what_the_plan_says(index: FilmIndex, films: list[FilmRecord]) -> None:
    stream = Stream.of(index, SETTINGS)
    steps = take(index, 25)
    assert steps[0].cursor == Cursor() and steps[-1].cursor.epoch >= 1
    for step in steps:
        packs = stream.packs(step.cursor)
        assert sorted(p.slot for p in step.packs) == [0, 1, 2, 3]
        for batch in step.packs:
            assert name_of(batch)[1:3] == packs[batch.slot][:2]
            assert batch.lengths == packs[batch.slot].lengths and sum(batch.lengths) == 16
            assert batch.position_P.tolist() == [i for n in batch.lengths for i in range(n)]
            assert batch.segment_P.tolist() == [s for s, n in enumerate(batch.lengths) for _ in range(n)]
            row = 0
            for film, start, stop in packs[batch.slot].windows:
                here = slice(row, row + stop - start)
                row = here.stop
                assert set(batch.film_P[here].tolist()) == {film}
                assert batch.shot_P[here].tolist() == list(range(start, stop))
                seconds = torch.from_numpy(films[film].shots_S2[start:stop, 0]) / 1000
                assert torch.equal(batch.time_P[here], seconds)
                for name, feature in films[film].features.items():
                    assert torch.equal(batch.features[name][here], feature[start:stop])
                    assert torch.equal(batch.valid[name][here], films[film].valid[name][start:stop])
            assert set(batch.film_P[row:].tolist()) <= {-1}
            for name, t in tensors(batch).items():
                if name not in ("film_P", "position_P", "segment_P"):
                    assert not t[row:].any(), f"{name} is not zero where idle"


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("sp", [1, 2, 4])
def test_all_ranks_together_see_the_stream_of_one(index: FilmIndex, dp: int, sp: int) -> None:
    ranks = [
        [take(index, 12, dp_rank=d, dp_size=dp, sp_rank=s, sp_size=sp, threads=2) for s in range(sp)] for d in range(dp)
    ]
    assert {len(step.packs) for streams in ranks for steps in streams for step in steps} == {4 // dp}
    assert {p.film_P.shape for streams in ranks for p in streams[0][0].packs} == {(16 // sp,)}
    assert_same(join(ranks), by_slot(take(index, 12)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_topology_resumes_where_another_stopped(index: FilmIndex, data: st.DataObject) -> None:
    """Stopped at a random step, resumed on other ranks and threads: the same tensors at every step."""
    options = PlanSettings(
        seed=data.draw(st.integers(0, 9)),
        pack_shots=data.draw(st.sampled_from([16, 64])),
        packs_per_step=12,
        window_shots=data.draw(st.sampled_from([None, 7, 16])),
        block_shards=data.draw(st.sampled_from([None, 2])),
    )
    total = data.draw(st.integers(1, 8))
    stop = data.draw(st.integers(0, total))

    def stream(cursor: Cursor | None, steps: int) -> list[StepBatch]:
        dp, sp = data.draw(st.sampled_from([1, 2, 3, 4, 6, 12])), data.draw(st.sampled_from([1, 2, 4]))
        place = {"cursor": cursor, "settings": options, "threads": data.draw(st.integers(0, 3))}
        return join(
            [
                [take(index, steps, **place, dp_rank=d, dp_size=dp, sp_rank=s, sp_size=sp) for s in range(sp)]
                for d in range(dp)
            ]
        )

    before = stream(None, stop)
    after = stream(Stream.of(index, options).next(before[-1].cursor) if before else None, total - stop)
    assert_same(before + after, by_slot(take(index, total, settings=options)))


def test_the_loader_walks_as_its_stream_does(index: FilmIndex) -> None:
    loader = PackLoader(index, SETTINGS, threads=0)
    steps = list(itertools.islice(loader, 60))
    assert steps[-1].cursor.epoch >= 2
    for one, following in itertools.pairwise(steps):
        assert loader.stream.next(one.cursor) == following.cursor


@pytest.mark.parametrize(("threads", "read_ahead"), [(1, 1), (3, 0), (4, 3)])
def test_threads_change_nothing(index: FilmIndex, threads: int, read_ahead: int) -> None:
    cursor = Cursor(5, 3)
    assert_same(
        take(index, 20, cursor=cursor, threads=threads, read_ahead=read_ahead),
        take(index, 20, cursor=cursor),
    )


def test_a_slice_reads_its_own_rows_only(index: FilmIndex, bytes_read: list[int]) -> None:
    for rank in range(4):
        bytes_read.clear()
        steps = take(index, 8, sp_rank=rank, sp_size=4)
        rows = sum(int((p.film_P >= 0).sum()) for s in steps for p in s.packs)
        assert sum(bytes_read) == rows * (24 + 8 + 16 + 1 + 16 + 1)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_while_reading_reaches_the_trainer_at_its_step(folder: Path, tmp_path: Path, threads: int) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = FilmIndex.load(copy)
    stream = Stream.of(index, SETTINGS)
    shards = [
        {int(index.shard_of[w.film]) for p in stream.packs(Cursor(0, step)) for w in p.windows}
        for step in range(stream.steps(Cursor()))
    ]
    shard = next(n for n in range(6) if n not in shards[0])
    first = next(step for step, used in enumerate(shards) if shard in used)
    os.truncate(index.shards[shard], 0)
    with PackLoader(index, SETTINGS, threads=threads) as loader:
        assert [next(loader).cursor.step for _ in range(first)] == list(range(first))
        where = rf"films-00000{shard}\.tar, film film-\d\d, (check|shots): the file ends before"
        with pytest.raises(UserError, match=where) as caught:
            next(loader)
        assert caught.value.remedy.startswith("restore the shard")
        assert list(loader) == [], "after an error the stream is over"


def reading_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t not in before and t.is_alive()]


def test_closing_early_stops_the_threads(index: FilmIndex) -> None:
    before = set(threading.enumerate())
    loader = PackLoader(index, SETTINGS, threads=3, read_ahead=4)
    next(loader)
    assert reading_threads(before)
    loader.close()
    assert list(loader) == []
    assert not reading_threads(before)


def test_a_process_that_ends_while_reading_ahead_keeps_its_exit_code(folder: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from lmp.data.index import FilmIndex
import torch
import lmp.data.loader as loading
from lmp.data.plan import PlanSettings
quick = loading.read_pack
def slow(*args, **options):
    torch.rand(1_000_000).sort()
    return quick(*args, **options)
loading.read_pack = slow
settings = PlanSettings(seed=0, pack_shots=16, packs_per_step=1)
loader = loading.PackLoader(FilmIndex.load(Path({str(folder)!r})), settings, threads=4, read_ahead=20)
next(loader)
raise SystemExit(3)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 3, ended.stderr


def test_reading_ahead_is_bounded(index: FilmIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counting(index: FilmIndex, pack: Pack, slot: int, **options: Any) -> PackBatch:
        read.append(slot)
        return read_pack(index, pack, slot, **options)

    monkeypatch.setattr(lmp.data.loader, "read_pack", counting)
    with PackLoader(index, SETTINGS, threads=2, read_ahead=2) as loader:
        next(loader)
        deadline = time.monotonic() + 20
        while len(read) < 4 * (1 + 2) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(read) == 4 * (1 + 2), "4 packs of the step taken and of each of 2 steps ahead"


def test_a_read_that_stalls_is_reported_with_film_and_shard_and_goes_on(
    index: FilmIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    free = threading.Event()
    preadv = os.preadv

    def stalling(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        free.wait(60)
        return preadv(descriptor, buffers, offset)

    def report(text: str) -> None:
        told.append(text)
        if len(told) == 3:
            free.set()

    monkeypatch.setattr(os, "preadv", stalling)
    with PackLoader(index, SETTINGS, threads=1, read_ahead=0, stall_seconds=0.05, report=report) as loader:
        step = next(loader)
    assert_same([step], take(index, 1))
    first = Stream.of(index, SETTINGS).packs(step.cursor)[step.packs[0].slot].windows[0]
    where = f"films-{index.shard_of[first.film]:06d}.tar, film {index.keys[first.film]}, shot {first.start} on"
    assert len(told) == 3 and all(where in text and "epoch 0, step 0" in text for text in told)
    assert [text.split("waiting ")[1].split(" s")[0] for text in told] == ["0.05", "0.1", "0.2"]


def test_the_next_epoch_is_planned_before_it_is_needed(index: FilmIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    plan = lmp.data.stream.plan

    def noting(films: Films, options: PlanSettings, epoch: int) -> EpochPlan:
        planned.append(epoch)
        return plan(films, options, epoch)

    monkeypatch.setattr(lmp.data.stream, "plan", noting)
    with PackLoader(index, SETTINGS, threads=2) as loader:
        assert next(loader).cursor == Cursor()
        deadline = time.monotonic() + 30
        while len(planned) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert planned == [0, 1]


@pytest.mark.gpu
def test_on_a_gpu_packs_are_page_locked_and_arrive_whole(index: FilmIndex) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pinned = take(index, 6, threads=2, pin=True)
    for one, other in zip(pinned, take(index, 6), strict=True):
        for pack, plain in zip(one.packs, other.packs, strict=True):
            assert all(t.is_pinned() for t in tensors(pack).values())
            moved = tensors(pack.to("cuda"))
            torch.cuda.synchronize()
            assert all(torch.equal(moved[name].cpu(), t) for name, t in tensors(plain).items())


def test_to_moves_every_tensor(index: FilmIndex) -> None:
    pack = take(index, 1)[0].packs[0]
    moved = pack.to("meta")
    assert all(t.device.type == "meta" for t in tensors(moved).values())
    assert name_of(moved) == name_of(pack)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sp_size": 3}, "packs of 16 shots do not divide among 3 sequence ranks"),
        ({"dp_size": 3}, "4 packs per step do not divide among 3 data-parallel ranks"),
        ({"cursor": Cursor(0, 500)}, "no step 500"),
        ({"cursor": Cursor(1, -1)}, "no step -1"),
        ({"cursor": Cursor(1, 0, 9)}, "with 9 packs carried"),
    ],
)
def test_topologies_and_cursors_that_do_not_fit_are_refused(
    index: FilmIndex, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PackLoader(index, SETTINGS, **options)
