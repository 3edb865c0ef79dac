from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmp.data import cache as cache_module
from lmp.data import storage
from lmp.data.cache import CachedShard, ShardCache, cached_shard
from lmp.data.index import FilmIndex
from lmp.data.shards import FilmRecord
from lmp.data.storage import LocalFiles, Range, ReadError, files_at
from lmp.errors import UserError
from tests.data.servers import Server, folder_app

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install 'lmp[dev]'")

MANY = 1 << 30


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, films: list[FilmRecord], write: Callable[..., Path]) -> Path:
    return write(tmp_path_factory.mktemp("cached") / "films", films, films_per_shard=2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_REMOTE", {})


@pytest.fixture
def server(corpus: Path) -> Iterator[Server]:
    with Server(folder_app(corpus.parent)) as server:
        yield server


def read_all(index: FilmIndex, wanted: list[FilmRecord]) -> None:
    for number, film in enumerate(wanted):
        rows = index.read(number, 0, len(film.shots_S2))
        for name in film.features:
            assert torch.equal(rows.features[name], film.features[name])


def fetched(server: Server) -> int:
    return sum(1 for a in server.asked if a.range and a.path.endswith(".tar"))


def held(folder: Path, suffix: str = ".tar") -> set[str]:
    return {p.stem for p in folder.iterdir() if p.suffix == suffix}


def open_files(folder: Path) -> list[str]:
    """What this process has open below a folder; other tests of the process may have open what they like."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found.append(str(descriptor.readlink()))
    return [path for path in found if path.startswith(str(folder))]


def test_a_shard_is_fetched_once_and_read_from_the_disk(
    server: Server, films: list[FilmRecord], tmp_path: Path
) -> None:
    index = FilmIndex.load(f"{server.url}/films", cache=ShardCache(tmp_path / "a/cache", MANY))
    assert fetched(server) == 0
    read_all(index, films)
    assert fetched(server) == 12 == len(held(tmp_path / "a/cache"))
    read_all(index, films)
    again = FilmIndex.load(f"{server.url}/films", cache=ShardCache(tmp_path / "a/cache", MANY))
    read_all(again, films)
    assert index.info(3) == again.info(3) and index.info(3)["key"] == "film-03"
    assert fetched(server) == 12
    assert len(open_files(tmp_path)) <= 2


def test_a_local_folder_is_cached_too(corpus: Path, films: list[FilmRecord], tmp_path: Path) -> None:
    source = tmp_path / "slow"
    source.mkdir()
    for path in corpus.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    index = FilmIndex.load(source, cache=ShardCache(tmp_path / "cache", MANY))
    read_all(index, films)
    for path in source.glob("*.tar"):
        path.unlink()
    read_all(index, films)
    with index.files_of(0).open(index.shards[0]) as file:
        assert hashlib.sha256(file.read()).hexdigest() == index.entries[0]["sha256"]


def test_what_is_fetched_ahead_is_there_when_read(server: Server, films: list[FilmRecord], tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", MANY)
    index = FilmIndex.load(f"{server.url}/films", cache=cache)
    index.fetch([0, 1, 2, 3, 22, 0])
    index.fetch([0, 22])
    deadline = time.monotonic() + 30
    while len(held(cache.folder)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fetched(server) == 3
    read_all(index, films[:4])
    assert fetched(server) == 3
    cache.close()
    index.fetch([10])
    read_all(index, films)  # reading needs nobody ahead of it
    assert fetched(server) == 12
    FilmIndex.load(f"{server.url}/films").fetch([0])  # nothing to do without a cache


# --- several processes ------------------------------------------------------------------------------------------------

# The shards of a web server come by urllib here: fsspec would take each process half a second to import.
PRELUDE = """
import hashlib, os, random, sys
from pathlib import Path
from urllib.request import Request, urlopen
from lmp.data.cache import CachedShard, ShardCache
from lmp.data.storage import files_at
class Web:
    def sizes(self, paths):
        return [int(urlopen(Request(p, method="HEAD")).headers["Content-Length"]) for p in paths]
    def read(self, ranges):
        for r in ranges:
            asked = Request(r.path, headers={"Range": f"bytes={r.offset}-{r.offset + len(r.buffer) - 1}"})
            r.buffer[:] = urlopen(asked).read()
folder, max_bytes, *listed = sys.argv[1:]
cache = ShardCache(Path(folder), int(max_bytes))
def shard_of(item):
    location, size, sha256 = item.rsplit(",", 2)
    files = Web() if location.startswith("http") else files_at(location)
    return CachedShard(location, files, int(size), sha256, sha256)
shards = [shard_of(item) for item in listed]
def read(shard):
    with os.fdopen(cache.open(shard), "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == shard.sha256
print("ready", flush=True)
"""


def start(script: str, cache: ShardCache, shards: list[CachedShard]) -> subprocess.Popen[str]:
    listed = [f"{s.location},{s.bytes},{s.sha256}" for s in shards]
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script, str(cache.folder), str(cache.max_bytes), *listed],
        stdout=subprocess.PIPE,
        text=True,
    )


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout and process.stdout.readline() == "ready\n"


def waited_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def remote_shards(server: Server, corpus: Path) -> list[CachedShard]:
    index = FilmIndex.load(corpus)
    places = [f"{server.url}/films/{e['name']}" for e in index.entries]
    return [cached_shard(p, files_at(p), e) for p, e in zip(places, index.entries, strict=True)]


def test_of_eight_processes_one_fetches(server: Server, corpus: Path, tmp_path: Path) -> None:
    shards = remote_shards(server, corpus)[:1]
    cache = ShardCache(tmp_path, MANY)
    server.held.clear()
    processes = [start("read(shards[0])", cache, shards) for _ in range(8)]
    for process in processes:
        ready(process)
    assert waited_for(lambda: fetched(server) > 0)
    assert held(tmp_path, ".part") == {shards[0].key} and not held(tmp_path)
    server.held.set()
    assert [p.wait(60) for p in processes] == [0] * 8
    assert fetched(server) == 1 and held(tmp_path) == {shards[0].key} and not held(tmp_path, ".part")


def test_what_a_killed_process_leaves_is_taken_over(server: Server, corpus: Path, tmp_path: Path) -> None:
    shards = remote_shards(server, corpus)[:2]
    cache = ShardCache(tmp_path, max(s.bytes for s in shards))
    server.held.clear()
    process = start("read(shards[0])", cache, shards[:1])
    ready(process)
    assert waited_for(lambda: fetched(server) == 1)
    process.kill()
    process.wait()
    server.held.set()
    left = tmp_path / f"{shards[0].key}.part"
    assert left.stat().st_size == shards[0].bytes
    os.close(cache.open(shards[1]))  # needs its room
    assert not left.exists() and held(tmp_path) == {shards[1].key}
    os.close(cache.open(shards[0]))
    assert held(tmp_path) == {shards[0].key}


def local_shards(folder: Path, count: int, size: int) -> list[CachedShard]:
    folder.mkdir()
    shards = []
    for number in range(count):
        data = np.random.default_rng(number).bytes(size)
        path = folder / f"{number}.tar"
        path.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        shards.append(CachedShard(str(path), files_at(str(path)), size, sha256, sha256))
    return shards


def test_the_bound_holds_while_processes_crowd_one_another_out(tmp_path: Path) -> None:
    size, room = 300_000, 3
    shards = local_shards(tmp_path / "source", 9, size)
    cache = ShardCache(tmp_path / "cache", room * size + 1000)
    script = "random.seed(os.getpid())\nfor _ in range(60): read(random.choice(shards))"
    processes = [start(script, cache, shards) for _ in range(4)]
    most, samples = 0, 0
    lock = os.open(cache.folder / "cache.lock", os.O_RDWR)
    while any(p.poll() is None for p in processes):
        fcntl.flock(lock, fcntl.LOCK_EX)  # or one shard could be seen going and another coming
        used = sum(p.stat().st_size for p in cache.folder.iterdir())
        fcntl.flock(lock, fcntl.LOCK_UN)
        most, samples = max(most, used), samples + 1
        time.sleep(0.001)
    os.close(lock)
    assert [p.returncode for p in processes] == [0] * 4
    assert samples > 10 and most == room * size
    assert not held(cache.folder, ".part")


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    shards = local_shards(tmp_path / "source", 5, 1000)
    cache = ShardCache(tmp_path / "cache", 3000)
    for age, shard in enumerate(shards[:3]):
        os.close(cache.open(shard))
        os.utime(cache.folder / f"{shard.key}.tar", (1000 + age, 1000 + age))
    os.close(cache.open(shards[0]))
    os.close(cache.open(shards[3]))
    assert held(cache.folder) == {shards[n].key for n in (0, 2, 3)}
    open_still = cache.open(shards[2])
    os.utime(cache.folder / f"{shards[2].key}.tar", (1000, 1000))
    os.close(cache.open(shards[4]))
    assert held(cache.folder) == {shards[n].key for n in (0, 3, 4)}
    assert os.pread(open_still, 2000, 0) == Path(shards[2].location).read_bytes()
    os.close(open_still)


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_a_damaged_source_is_refused_after_a_second_try(corpus: Path, tmp_path: Path) -> None:
    source = tmp_path / "source" / "films"
    source.mkdir(parents=True)
    for path in corpus.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    shard = source / "films-000001.tar"
    data = bytearray(shard.read_bytes())
    data[-2000] ^= 1
    with Server(folder_app(source.parent)) as server:
        index = FilmIndex.load(f"{server.url}/films", cache=ShardCache(tmp_path / "cache", MANY))
        shard.write_bytes(data)
        with pytest.raises(UserError, match=r"films-000001.tar, film film-03, .*damaged: its sha256 is not that of"):
            index.read(3, 0, 1)
        assert fetched(server) == 2
        for found, problem in [(bytes(data[:-512]), r"has \d+ bytes, its manifest says"), (None, "is missing")]:
            shard.write_bytes(found) if found else shard.unlink()
            with pytest.raises(UserError, match=rf"films-000001.tar, film film-03, .*the file {problem}"):
                index.read(3, 0, 1)
        assert fetched(server) <= 3  # of a file of another size nothing is fetched
        index.read(5, 0, 1)
    assert len(held(tmp_path / "cache")) == 1 and not held(tmp_path / "cache", ".part")


class _Garbling(LocalFiles):
    """Bytes changed on their way, as often as said."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def read(self, ranges: Any) -> None:
        super().read(ranges)
        if self.times:
            self.times -= 1
            ranges[0].buffer[7] ^= 1


def test_bytes_changed_on_their_way_are_fetched_again(tmp_path: Path) -> None:
    (shard,) = local_shards(tmp_path / "source", 1, 5000)
    cache = ShardCache(tmp_path / "cache", 5000)
    descriptor = cache.open(shard._replace(files=_Garbling(1)))
    assert os.read(descriptor, 9999) == Path(shard.location).read_bytes()
    os.close(descriptor)
    cache.forget(shard)
    with pytest.raises(ReadError, match="the shard is damaged"):
        cache.open(shard._replace(files=_Garbling(2)))
    assert not held(cache.folder) and not held(cache.folder, ".part")


def test_a_large_shard_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_PIECE", 1000)
    (shard,) = local_shards(tmp_path / "source", 1, 12_345)
    calls: list[list[int]] = []

    class Counting(LocalFiles):
        def read(self, ranges: Any) -> None:
            calls.append([len(r.buffer) for r in ranges])
            super().read(ranges)

    descriptor = ShardCache(tmp_path / "cache", MANY).open(shard._replace(files=Counting()))
    assert os.read(descriptor, 99_999) == Path(shard.location).read_bytes()
    os.close(descriptor)
    assert calls == [[1000] * 4] * 3 + [[345]]


def _changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(1024, len(data)):
        data[at] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [_changed, _cut, Path.unlink])
def test_a_copy_that_was_damaged_or_removed_is_fetched_again(
    damage: Callable[[Path], None], server: Server, corpus: Path, films: list[FilmRecord], tmp_path: Path
) -> None:
    index = FilmIndex.load(f"{server.url}/films", cache=ShardCache(tmp_path, MANY))
    index.read(0, 0, 1)
    damage(tmp_path / f"{index.entries[0]['sha256']}.tar")
    read_all(index, films[:2])
    assert fetched(server) == 2


def test_a_shard_without_a_known_sha256_is_named_by_where_it_lies(tmp_path: Path) -> None:
    entry: Any = {"name": "x", "bytes": 9, "sha256": None, "films": 1, "shots": 1, "index": "x", "index_sha256": "i"}
    other = {**entry, "index_sha256": "j"}
    files = LocalFiles()
    keys = {cached_shard("/a", files, entry).key, cached_shard("/b", files, entry).key}
    keys |= {cached_shard("/a", files, other).key, cached_shard("/a", files, {**entry, "bytes": 8}).key}
    assert len(keys) == 4
    (tmp_path / "a").write_bytes(b"123456789")
    cache = ShardCache(tmp_path / "cache", 9)
    shard = cached_shard(str(tmp_path / "a"), files, entry)
    descriptor = cache.open(shard)
    assert os.read(descriptor, 99) == b"123456789" and held(cache.folder) == {shard.key}
    os.close(descriptor)


def test_a_cache_smaller_than_a_shard_is_refused(corpus: Path, tmp_path: Path) -> None:
    index = FilmIndex.load(corpus)
    largest = max(e["bytes"] for e in index.entries)
    FilmIndex.load(corpus, cache=ShardCache(tmp_path, largest))
    with pytest.raises(UserError, match=rf"has {largest} bytes .* may hold {largest - 1} .*-> give data.cache.gib"):
        FilmIndex.load(corpus, cache=ShardCache(tmp_path, largest - 1))


def test_a_full_disk_is_told(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = FilmIndex.load(corpus, cache=ShardCache(tmp_path, MANY))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=rf"^the disk of the cache {tmp_path} is full: .*-> free space"):
        index.read(0, 0, 1)
    assert not held(tmp_path) and not held(tmp_path, ".part")


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"has no file locks: .*-> give data.cache.folder on a local disk"):
        ShardCache(tmp_path, MANY)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made: .* -> give data.cache.folder"):
        ShardCache(tmp_path / "file/cache", MANY)


def test_ranges_of_several_shards_in_one_call(server: Server, films: list[FilmRecord], tmp_path: Path) -> None:
    index = FilmIndex.load(f"{server.url}/films", cache=ShardCache(tmp_path, MANY))
    buffers = [bytearray(100) for _ in range(12)]
    ranges = [Range(path, 0, memoryview(b)) for path, b in zip(index.shards, buffers, strict=True)]
    index.files_of(0).read(ranges)
    assert len(set(map(bytes, buffers))) == 12 and fetched(server) == 12
    sources = [bytearray(100) for _ in range(12)]
    files_at(server.url).read([Range(r.path, 0, memoryview(b)) for r, b in zip(ranges, sources, strict=True)])
    assert buffers == sources
