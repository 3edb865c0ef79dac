"""Shards on storage that fsspec reaches: an S3 server (moto), http, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmp.data import remote, storage
from lmp.data.film_slice import FilmSlice, Part
from lmp.data.index import FilmIndex
from lmp.data.loader import PackLoader
from lmp.data.plan import PlanSettings
from lmp.data.shards import FilmRecord
from lmp.errors import UserError
from tests.data.servers import Server, folder_app, s3_app

fsspec = pytest.importorskip("fsspec")
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'lmp[dev]'")
pytest.importorskip("moto", reason="moto is not installed: pip install 'lmp[dev]'")

ODD = "c d+e%20f/sh=1"  # what has to be quoted in a URL
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, films: list[FilmRecord], write: Callable[..., Path]) -> Path:
    """The films in 12 shards: more than are asked for one by one."""
    return write(tmp_path_factory.mktemp("remote") / "films", films, films_per_shard=2)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    with Server(s3_app()) as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file system of another test, short waits, and the waiting is ours, not that of the layers below."""
    monkeypatch.setattr(storage, "_REMOTE", {})
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def use(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What FSSPEC_S3_ENDPOINT_URL does when it is set before fsspec is imported."""
    options = {"endpoint_url": server.url, "config_kwargs": {"retries": {"max_attempts": 0}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    use(s3_server, monkeypatch)
    s3_server.clear()
    s3_server.failures, s3_server.gather = 0, None
    return s3_server


@pytest.fixture
def http(corpus: Path) -> Iterator[Server]:
    with Server(folder_app(corpus.parent)) as server:
        yield server


def upload(folder: Path, url: str) -> str:
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root.partition("/")[0], exist_ok=True)
    fs.pipe({f"{root}/{p.name}": p.read_bytes() for p in folder.iterdir()})
    return url


def assert_same(found: FilmSlice, wanted: FilmSlice) -> None:
    for name in ("shots", "check", "video", "video_valid", "audio", "audio_valid"):
        assert torch.equal(found.column(name), wanted.column(name)), name


@pytest.mark.parametrize("kind", ["s3", "http", "memory", "file"])
def test_every_film_reads_as_it_does_locally(kind: str, corpus: Path, s3: Server, tmp_path: Path) -> None:
    local = FilmIndex.load(corpus)
    odd = tmp_path / ODD
    odd.parent.mkdir(parents=True)
    odd.symlink_to(corpus)
    with Server(folder_app(tmp_path)) as http:
        url = {
            "s3": f"s3://odd-{os.getpid()}/{ODD}",
            "http": f"{http.url}/c d+e%2520f/sh=1",
            "memory": f"memory://{ODD}",
            "file": f"file://{odd}",
        }[kind]
        index = FilmIndex.load((upload(corpus, url) if kind in ("s3", "memory") else url) + "//")
        assert index.keys == local.keys and index.digest == local.digest
        rng = np.random.default_rng(0)
        for film, shots in enumerate(local.shots.tolist()):
            start = int(rng.integers(0, shots))
            stop = int(rng.integers(start, shots)) + 1
            assert_same(index.read(film, 0, shots), local.read(film, 0, shots))
            assert_same(index.read(film, start, stop), local.read(film, start, stop))
            assert index.info(film) == local.info(film)
        with index.files_of(3).open(index.shards[3]) as file:
            data = (corpus / "films-000003.tar").read_bytes()
            assert file.read(700) == data[:700] and file.seek(1000) == 1000 and file.read() == data[1000:]


@pytest.fixture
def on_s3(corpus: Path, s3: Server) -> str:
    upload(corpus, "s3://films/train")
    s3.clear()
    return "s3://films/train"


def test_the_index_costs_a_request_a_file_and_one_listing(on_s3: str, s3: Server) -> None:
    s3.gather = (".npz", 12)  # the index files are asked for side by side
    index = FilmIndex.load(on_s3)
    listings = [a for a in s3.asked if "list-type" in a.query]
    assert len(listings) == 1 and len(s3.asked) == 1 + 1 + len(index.shards)
    assert s3.gather is None


def test_windows_cost_few_requests_and_those_of_a_pack_go_together(
    on_s3: str, s3: Server, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, local = FilmIndex.load(on_s3), FilmIndex.load(corpus)
    s3.clear()
    assert_same(index.read(21, 10, 50), local.read(21, 10, 50))
    assert len(s3.asked) == 1  # all columns of a short film lie close together
    monkeypatch.setattr(remote, "_MERGE_GAP", 16)
    s3.clear()
    assert_same(index.read(21, 10, 50), local.read(21, 10, 50))
    assert 1 < len(s3.asked) <= len(index.columns)
    monkeypatch.setattr(remote, "_MERGE_GAP", 1 << 16)
    s3.clear()
    films = [0, 5, 9, 14, 20]
    s3.gather = (".tar", len(films))
    outs = [FilmSlice.empty(index.modalities, int(index.shots[f])) for f in films]
    index.read_parts([Part(f, 0, out) for f, out in zip(films, outs, strict=True)])
    assert len(s3.asked) == len(films) and s3.gather is None
    for film, out in zip(films, outs, strict=True):
        assert_same(out, local.read(film, 0, int(local.shots[film])))


def test_the_loader_gives_the_same_packs(on_s3: str, corpus: Path) -> None:
    settings = PlanSettings(seed=3, pack_shots=32, packs_per_step=2)
    with (
        PackLoader(FilmIndex.load(on_s3), settings, threads=2) as far,
        PackLoader(FilmIndex.load(corpus), settings, threads=2) as near,
    ):
        for _ in range(15):
            a, b = next(far), next(near)
            assert a.cursor == b.cursor
            for one, other in zip(a.packs, b.packs, strict=True):
                assert one.slot == other.slot and torch.equal(one.film_P, other.film_P)
                assert torch.equal(one.shot_P, other.shot_P)
                for name in ("video", "audio"):
                    assert torch.equal(one.features[name], other.features[name])
                    assert torch.equal(one.valid[name], other.valid[name])


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _cut_early(data: bytes) -> bytes:
    return data[:1000]


def _flip(data: bytes) -> bytes:
    changed = bytearray(data)
    at = data.index(b"film-03.safetensors")
    start = data.index(b"{", at)
    end = start + int.from_bytes(data[start - 8 : start], "little")
    changed[end + 100 :] = bytes(b ^ 4 for b in data[end + 100 :])
    return bytes(changed)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_cut, "film film-03, .*: the file ends before byte"),
        (_cut_early, "film film-03, .*: the file ends before byte"),
        (None, "film film-03, .*: the file is missing"),
        (_flip, "film film-03, (shots|video|audio): the bytes of shot .* are not those written"),
    ],
)
@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_a_shard_damaged_under_the_run_is_named(
    kind: str, damage: Callable[[bytes], bytes] | None, problem: str, corpus: Path, s3: Server
) -> None:
    folder = upload(corpus, f"{kind}://damaged/films")
    index = FilmIndex.load(folder)
    fs, path = fsspec.core.url_to_fs(index.shards[1])
    if damage:
        fs.pipe(path, damage(fs.cat(path)))
    else:
        fs.rm(path)
    s3.clear()
    with pytest.raises(UserError, match=rf"^{kind}://damaged/films/films-000001.tar, {problem}"):
        index.read(3, 0, int(index.shots[3]))
    assert len(s3.asked) == (kind == "s3")  # asking again would not help
    index.read(0, 0, 1)
    if not damage or damage is _cut:
        with pytest.raises(UserError, match=r"films-000001.tar (is missing|has \d+ bytes, its manifest says)"):
            FilmIndex.load(folder)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_waited_out(status: int, http: Server, corpus: Path) -> None:
    http.fail, http.failures = status, 2
    index = FilmIndex.load(f"{http.url}/films")
    http.failures = 2
    http.clear()
    assert_same(index.read(5, 0, 2), FilmIndex.load(corpus).read(5, 0, 2))
    assert len(http.gets()) == 3


def test_s3_failing_for_a_while_is_waited_out(on_s3: str, s3: Server, corpus: Path) -> None:
    index = FilmIndex.load(on_s3)
    s3.failures = 2
    assert_same(index.read(5, 0, 2), FilmIndex.load(corpus).read(5, 0, 2))


@pytest.mark.parametrize("status", [400, 401, 403, 405])
def test_refusals_are_not_asked_again(status: int, http: Server) -> None:
    index = FilmIndex.load(f"{http.url}/films")
    http.clear()
    http.fail, http.failures = status, 9
    with pytest.raises(UserError, match=rf"films-000002.tar, film film-05, .*{status}") as caught:
        index.read(5, 0, 2)
    assert len(http.asked) == 1 and "quarantine" not in caught.value.remedy
    with pytest.raises(UserError, match=rf"^{http.url}/films/manifest.json cannot be read: .*{status}"):
        FilmIndex.load(f"{http.url}/films")
    assert len(http.asked) == 2


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_a_server_that_is_down_is_named(kind: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(s3_app() if kind == "s3" else folder_app(corpus.parent)) as server:
        use(server, monkeypatch)
        folder = upload(corpus, "s3://down/films") if kind == "s3" else f"{server.url}/films"
        index = FilmIndex.load(folder)
    monkeypatch.setattr(remote, "READ_PATIENCE_S", 0.1)
    monkeypatch.setattr(remote, "ASK_PATIENCE_S", 0.1)
    with pytest.raises(UserError, match=r"films-000002.tar, film film-05, .*onnect") as caught:
        index.read(5, 0, 2)
    assert "check that the server is up" in caught.value.remedy
    with pytest.raises(UserError, match=rf"^{folder}/manifest.json cannot be read: .*onnect") as caught:
        FilmIndex.load(folder)
    assert ("FSSPEC_S3_ENDPOINT_URL" in caught.value.remedy) == (kind == "s3")
    with pytest.raises(UserError, match=r"films-000000.tar cannot be read"):
        index.size_faults()


def test_a_server_without_ranges_is_refused(corpus: Path) -> None:
    with Server(folder_app(corpus.parent, ranges=False)) as server:
        index = FilmIndex.load(f"{server.url}/films")
        with pytest.raises(UserError, match=r"sends the whole file when asked for a range .* -> serve the folder by"):
            index.read(0, 0, 1)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://no-such-bucket/films", "no-such-bucket/films/manifest.json .*bucket does not exist -> give a bucket"),
        ("s3://films/nothing", "s3://films/nothing holds no manifest.json"),
        ("memory://nothing", "memory://nothing holds no manifest.json"),
        ("s3://No_Bucket!/x", "s3://No_Bucket!/x/manifest.json cannot be read: .*Invalid bucket name"),
        ("nosuch://x/y", "nosuch://x/y is no address that fsspec understands: .*nosuch"),
    ],
)
def test_addresses_without_films(url: str, problem: str, on_s3: str) -> None:
    with pytest.raises(UserError, match=problem):
        FilmIndex.load(url)


def test_no_credentials(on_s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"films/train/manifest.json .*credentials -> .*AWS_PROFILE.*FSSPEC_S3_ANON"):
        FilmIndex.load(on_s3)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("http", "aiohttp")])
def test_a_package_that_is_not_installed_is_named(protocol: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(fsspec.core, "filesystem", lambda protocol, **_: missing(protocol))
    extra = {"gs": "gcs"}.get(protocol, protocol)
    with pytest.raises(UserError, match=rf"^{protocol}://b/f: .* is not installed -> pip install 'lmp\[{extra}\]'"):
        FilmIndex.load(f"{protocol}://b/f")


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError("Forbidden: https://storage/b/f"), False),  # gcsfs
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (TimeoutError(), True),
        (OSError(22, "Invalid argument"), False),
        (FileNotFoundError(2, "no such file"), False),
        (ValueError("no URL"), False),
        (RuntimeError("something new"), True),
    ],
)
def test_what_a_further_try_could_mend(error: Exception, passes: bool) -> None:
    assert remote.may_pass(error) is passes


def test_threads_read_side_by_side(on_s3: str, corpus: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    index, local = FilmIndex.load(on_s3), FilmIndex.load(corpus)
    numbers: Sequence[int] = np.random.default_rng(0).integers(0, len(index), 60).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: index.read(n, 0, int(index.shots[n])), numbers))
    for number, rows in zip(numbers, found, strict=True):
        assert_same(rows, local.read(number, 0, int(local.shots[number])))


def test_the_endpoint_comes_from_the_environment(on_s3: str, s3: Server) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "lmp.cli", "data", "stats", on_s3],
        env={**os.environ, "FSSPEC_S3_ENDPOINT_URL": s3.url},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "23 films" in run.stdout


@pytest.mark.parametrize("kind", ["s3", "http", "memory"])
def test_a_file_written_anew_has_another_version(kind: str, s3: Server, tmp_path: Path) -> None:
    """Of as many bytes, and a second later: http tells whole seconds."""
    folder = tmp_path / "files"
    folder.mkdir()
    with Server(folder_app(tmp_path)) as http:
        root = {"s3": f"s3://versions-{os.getpid()}", "http": http.url, "memory": "memory://versions"}[kind] + "/files"
        versions = []
        for time, text in ((1, "one"), (2, "two"), (2, "two")):
            (folder / "a").write_text(text)
            (folder / "b").write_text(text)
            os.utime(folder / "a", (time, time))
            if kind != "http" and (text == "one" or len(versions) == 1):
                upload(folder, root)
            files = storage.files_at(root)
            assert isinstance(files, remote.RemoteFiles)
            versions.append(files.version(f"{root}/a"))
            assert files.version(f"{root}/c") is None
            assert kind == "http" or files.names(root) == ["a", "b"]
        assert versions[0] != versions[1] == versions[2]
        assert kind == "http" or files.names(f"{root}/none") == []
