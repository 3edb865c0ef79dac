"""Films of every odd kind through one ingest: each is in the shards with what it has, or has one line of its own."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.data.index import FilmIndex  # noqa: E402
from lmp.films.ingest import IngestReport, ingest  # noqa: E402

FPS, SECONDS = 10, 4
ENCODERS = {"video": "signal", "audio": "signal", "text": "signal"}


def write(
    path: Path, *, stamps: list[int] | None = None, layout: str | None = "stereo", codec: str = "pcm_s16le"
) -> Path:
    """Two shots of 2 s; frame k is shown at stamps[k] / FPS."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        video.codec_context.time_base = Fraction(1, FPS)
        audio = None if layout is None else container.add_stream(codec, rate=16000, layout=layout)
        random = np.random.default_rng(0)
        shots = np.kron(random.integers(0, 255, (2, 8, 12, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), np.uint8))
        for stamp in range(FPS * SECONDS) if stamps is None else stamps:
            frame = av.VideoFrame.from_ndarray(np.roll(shots[stamp // (2 * FPS)], stamp // 8, axis=1), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            channels = len(av.AudioLayout(layout).channels)
            shape = (channels, 16000 * SECONDS) if audio.format.is_planar else (1, 16000 * SECONDS * channels)
            noise = random.normal(0, 0.1, shape)
            wave = noise.astype(np.float32) if audio.format.is_planar else (noise * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(wave, format=audio.format.name, layout=layout)
            frame.sample_rate, frame.pts = 16000, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def turn(path: Path) -> None:
    """Let the track's header say that the picture is shown turned by a quarter."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def spoil(path: Path, kind: str) -> None:
    """Overwrite what is in the packets of one kind from the middle on; the container stays whole."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(**{kind: 0}) if packet.size]
    for packet in packets[len(packets) // 2 :]:
        at = data.index(packet)
        data[at : at + len(packet)] = np.random.default_rng(1).bytes(len(packet))
    path.write_bytes(data)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[IngestReport, FilmIndex]:
    folder = tmp_path_factory.mktemp("films")
    write(folder / "plain.mkv")
    write(folder / "variable.mkv", stamps=[*range(0, 20, 3), *range(20, 30), 33, 39])
    write(folder / "mute.mkv", layout=None)
    write(folder / "surround.mkv", layout="5.1")
    turn(write(folder / "turned.mp4", codec="aac"))
    spoil(write(folder / "bad-picture.mkv"), "video")
    spoil(write(folder / "bad-sound.mkv", codec="aac"), "audio")
    for name, text in {
        "latin": "1\n00:00:00,200 --> 00:00:01,500\nDéjà vu, garçon ! Où êtes-vous donc passé hier ?\n",
        "overlapping": "1\n00:00:00,200 --> 00:00:03,900\nboth\n\n2\n00:00:00,500 --> 00:00:01,500\nfirst only\n",
    }.items():
        write(folder / f"{name}.mkv")
        (folder / f"{name}.srt").write_bytes(text.encode("cp1252"))
    out = tmp_path_factory.mktemp("out") / "shards"
    report = ingest([folder], out, encoders=ENCODERS, progress=False)
    return report, FilmIndex.load(out)


def valid(index: FilmIndex, key: str) -> dict[str, list[bool]]:
    film = index.keys.index(key)
    return {name: flags.tolist() for name, flags in index.read(film, 0, int(index.shots[film])).valid.items()}


@pytest.mark.parametrize(
    ("key", "sound", "text"),
    [
        ("plain", [True, True], [False, False]),
        ("variable", [True, True], [False, False]),
        ("mute", [False, False], [False, False]),
        ("surround", [True, True], [False, False]),
        ("turned", [True, True], [False, False]),
        ("latin", [True, True], [True, False]),
        ("overlapping", [True, True], [True, True]),
    ],
)
def test_odd_films_are_read(
    outcome: tuple[IngestReport, FilmIndex], key: str, sound: list[bool], text: list[bool]
) -> None:
    _, index = outcome
    film = index.keys.index(key)
    spans = index.read(film, 0, int(index.shots[film])).shots_N2.tolist()
    assert [start for start, _ in spans] == [0, 2000]
    assert valid(index, key) == {"video": [True, True], "audio": sound, "text": text}
    assert index.info(film)["sound"] == (key != "mute")


def test_what_is_damaged_has_one_line_of_its_own_or_is_read(outcome: tuple[IngestReport, FilmIndex]) -> None:
    """Which of the two is up to FFmpeg's decoders."""
    report, index = outcome
    failed = {Path(film).stem: problem for film, problem, _ in report.failures}
    read = set(index.keys) & {"bad-picture", "bad-sound"}
    assert set(failed) | read == {"bad-picture", "bad-sound"} and not set(failed) & read
    for key, problem in failed.items():
        assert f"{key}.mkv cannot be decoded" in problem and "\n" not in problem
