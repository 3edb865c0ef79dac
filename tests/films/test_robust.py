"""Films as they come: turned, in surround sound, cut, damaged, with frames at any time; and interrupted ingests."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.data.index import FilmIndex  # noqa: E402
from lmp.films import film as room  # noqa: E402
from lmp.films import kept  # noqa: E402
from lmp.films.encoders.r2plus1d import R2Plus1D  # noqa: E402
from lmp.films.encoders.vggish import VGGish  # noqa: E402
from lmp.films.ingest import ingest  # noqa: E402
from lmp.films.media import Sampling, read_pictures, read_sound  # noqa: E402
from lmp.films.sources import Source  # noqa: E402
from tests.films.recipes import seeded_weights  # noqa: E402

SIGNAL = {"video": "signal", "audio": "signal", "text": "signal"}
WHOLE = np.array([[0, 2000]], np.int32)


def write(path: Path, *, levels: tuple[float, ...] = (0.1,) * 2, layout: str = "stereo", black: bool = False) -> Path:
    """A second for each level: the upper half white, a moving column; sound of one level in each channel."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        audio = container.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=16000, layout=layout)
        for number in range(10 * len(levels)):
            picture = np.zeros((64, 96, 3), np.uint8)
            if not black:
                picture[:32] = 230
                picture[40:, number * 4 % 90 :][:, :5] = 120 + 100 * (number // 10 % 2)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        channels = len(av.AudioLayout(layout).channels)
        dtype, pack = ("s16", np.int16) if path.suffix == ".mkv" else ("fltp", np.float32)
        for second, level in enumerate(levels):
            scale = 32767 if dtype == "s16" else 1
            shape = (1, 16000 * channels) if dtype == "s16" else (channels, 16000)
            frame = av.AudioFrame.from_ndarray(np.full(shape, level * scale, pack), format=dtype, layout=layout)
            frame.sample_rate, frame.pts = 16000, second * 16000
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return path


def bytes_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("matrix", "bright"), [((0, 1, -1, 0), "right"), ((-1, 0, 0, -1), "bottom"), ((0, -1, 1, 0), "left")]
)
def test_a_turned_film_is_turned_back(tmp_path: Path, matrix: tuple[int, ...], bright: str) -> None:
    """The matrix of a track's header says how the picture is shown; the upper half goes to `bright`."""
    path = write(tmp_path / "turned.mp4")
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version 0: flags, times, layer and volume
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    (shot,) = read_pictures(path, [Sampling(1, 48)], shots=WHOLE)
    (picture,) = shot.samples[Sampling(1, 48)]
    assert picture.shape == ((48, 72, 3) if bright == "bottom" else (48, 32, 3))
    parts = {
        "right": picture[:, -8:], "left": picture[:, :8], "bottom": picture[-8:], "top": picture[:8],
    }  # fmt: skip
    means = {side: part.mean() for side, part in parts.items()}
    assert max(means, key=lambda side: means[side]) == bright and means[bright] > 200


def test_surround_sound_is_mixed_evenly(tmp_path: Path) -> None:
    path = write(tmp_path / "surround.mkv", layout="5.1", levels=(0.3, 0.1))
    (sound,) = read_sound(path, WHOLE)
    assert len(sound) == pytest.approx(32000, abs=100)
    assert float(np.median(sound[:15000])) == pytest.approx(0.3, abs=0.01)


def test_what_is_silent_black_or_repeated_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "quiet.mkv", levels=(0.0, 0.0), black=True)
    (tmp_path / "shots").mkdir()
    (tmp_path / "shots" / "quiet.txt").write_text("0 10\n10 20\n")
    report = ingest(
        [tmp_path / "quiet.mkv"], tmp_path / "out", encoders=SIGNAL, shot_lists=tmp_path / "shots", progress=False
    )
    assert report.quality["video"] == {"black": 2, "repeated": 1}
    assert report.quality["audio"]["silent"] == 2
    assert FilmIndex.load(tmp_path / "out").info(0)["quality"]["video"] == {"black": 2, "repeated": 1}


def test_sound_that_ends_early_and_overlapping_lines(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4", levels=(0.1,) * 4)
    cut = tmp_path / "cut.mkv"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None and (packet.stream.type == "video" or packet.pts * packet.time_base < 1.9):
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    (tmp_path / "cut.txt").write_text("0 20\n20 40\n")
    cues = "1\n00:00:00,000 --> 00:00:01,500\ncaf\xe9\n\n2\n00:00:00,500 --> 00:00:01,900\nnoir\n"
    cut.with_suffix(".srt").write_bytes(cues.encode("cp1252"))
    report = ingest([cut], tmp_path / "out", encoders=SIGNAL, shot_lists=tmp_path / "cut.txt", progress=False)
    assert not report.failures
    index = FilmIndex.load(tmp_path / "out")
    film = index.read(0, 0, 2)
    assert film.valid["audio"].tolist() == [True, False]
    assert film.valid["text"].tolist() == [True, False]
    assert index.info(0)["subtitles"] == {"lines": 2, "dropped": 0, "encoding": "cp1252"}


def test_damage_in_the_middle_costs_the_film_or_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "damaged.mkv", levels=(0.1,) * 4)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    path.write_bytes(data)
    good = write(tmp_path / "good.mkv", levels=(0.1,) * 4)
    report = ingest([path, good], tmp_path / "out", encoders=SIGNAL, progress=False)
    failed = {Path(film).stem for film, _, _ in report.failures}
    assert {*FilmIndex.load(tmp_path / "out").keys, *failed} == {"damaged", "good"} and "good" not in failed
    assert all("damaged.mkv" in problem and "\n" not in problem for _, problem, _ in report.failures)


def test_joined_networks_go_into_the_shards(tmp_path: Path) -> None:
    torch.save(seeded_weights(VGGish()), tmp_path / "vggish.pt")
    film = write(tmp_path / "film.mkv", levels=(0.1,) * 3)
    spec = f"vggish:{tmp_path}/vggish.pt,tokens=2+signal,tokens=2"
    ingest([film], tmp_path / "out", encoders={"audio": spec}, progress=False)
    index = FilmIndex.load(tmp_path / "out")
    made = index.read(0, 0, int(index.shots[0]))
    assert made.features["audio"].shape[1:] == (2, 128 + 192) and made.valid["audio"].all()
    said = index.info(0)["encoders"]["audio"]
    assert [part["name"] for part in said["parts"]] == ["vggish", "signal-sound"]
    assert all(part["version"] for part in said["parts"])


def test_an_interrupted_ingest_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    films = [write(tmp_path / f"{name}.mkv", levels=levels) for name, levels in (("a", (0.1,) * 2), ("b", (0.2,) * 3))]
    ingest(films, tmp_path / "whole", encoders=SIGNAL, progress=False)
    read: list[str] = []
    honest = room.encode_film

    def watched(job, *rest):
        if job.film.key == "b" and not read[1:]:
            read.append(job.film.key)
            raise KeyboardInterrupt
        read.append(job.film.key)
        return honest(job, *rest)

    monkeypatch.setattr(room, "encode_film", watched)
    with pytest.raises(KeyboardInterrupt):
        ingest(films, tmp_path / "out", encoders=SIGNAL, progress=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [kept.FOLDER]
    ingest(films, tmp_path / "out", encoders=SIGNAL, progress=False)
    assert read == ["a", "b", "b"]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_no_name_of_a_modality_hides_that_its_encoder_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = write(tmp_path / "a.mkv")
    for name in ("speech", "device"):
        with monkeypatch.context() as patch:
            patch.setattr("lmp.films.ingest._write", interrupt)
            with pytest.raises(KeyboardInterrupt):
                ingest([film], tmp_path / name, encoders={name: "signal-sound"}, progress=False)
        assert [path.name for path in (tmp_path / name / kept.FOLDER).iterdir()] == ["a.safetensors"]
        ingest([film], tmp_path / name, encoders={name: "signal-sound,tokens=2"}, progress=False)
        assert FilmIndex.load(tmp_path / name).read(0, 0, 1).features[name].shape[1] == 2


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_film_that_changed_is_read_again(tmp_path: Path) -> None:
    path, film = tmp_path / "kept" / "a.safetensors", Source.of(tmp_path / "film")
    (tmp_path / "film").write_bytes(b"1")
    sign = kept.signature({"video": 1}, [film.state(), None])
    kept.save(path, sign, {"title": "a"}, {"shots": np.arange(4).reshape(2, 2)})
    found = kept.load(path, sign)
    assert found is not None and found[0] == {"title": "a"} and found[1]["shots"].tolist() == [[0, 1], [2, 3]]
    (tmp_path / "film").write_bytes(b"22")
    assert kept.load(path, kept.signature({"video": 1}, [film.state(), None])) is None
    assert kept.load(path, kept.signature({"video": 2}, [film.state(), None])) is None
    path.write_bytes(path.read_bytes()[:-3])
    assert kept.load(path, sign) is None


def test_clips_at_the_publishers_rate_go_into_the_shards(tmp_path: Path) -> None:
    torch.save(seeded_weights(R2Plus1D(18)), tmp_path / "r18.pth")
    film = write(tmp_path / "film.mkv", levels=(0.1,) * 2)
    (tmp_path / "film.txt").write_text("0 20\n")
    made = {}
    for spec in ("frames=2", "frames=2,rate=15"):
        out = tmp_path / spec
        video = f"r2plus1d:{tmp_path}/r18.pth,{spec}"
        ingest([film], out, encoders={"video": video}, shot_lists=tmp_path / "film.txt", progress=False)
        index = FilmIndex.load(out)
        made[spec] = index.read(0, 0, 1).features["video"]
        assert index.info(0)["encoders"]["video"]["sampling"].get("rate", 0) == (15 if "rate" in spec else 0)
    assert not torch.equal(*made.values())
