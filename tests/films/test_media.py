"""Pictures and sound of shots, and files that are no films."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")
pytest.importorskip("scenedetect")

from lmp.errors import UserError  # noqa: E402
from lmp.films.detectors import build_finder  # noqa: E402
from lmp.films.media import SAMPLE_RATE, Sampling, probe, read_pictures, read_sound  # noqa: E402

FPS = 10
LEVELS = (40, 200, 90)  # one grey per second
TONES = (0.0, 0.5, 0.1)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("films") / "grey.mkv"
    write_film(path, range(30), sound=True)
    return path


def write_film(path: Path, pts: range | list[int], *, sound: bool, start_s: int = 0) -> None:
    """Frame k, shown at start_s + pts[k] / FPS, has the grey of its second; the sound has its level."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
        video.codec_context.time_base = Fraction(1, FPS)
        codec = "pcm_s16le" if path.suffix == ".mkv" else "mp2"
        audio = container.add_stream(codec, rate=44100, layout="stereo") if sound else None
        for stamp in pts:
            grey = np.full((32, 64, 3), LEVELS[stamp // FPS], np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = start_s * FPS + stamp, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            for second, level in enumerate(TONES):
                wave = np.full((1, 2 * 44100), round(level * 32767), np.int16)
                frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="stereo")
                frame.sample_rate, frame.pts = 44100, (start_s + second) * 44100
                frame.time_base = Fraction(1, 44100)
                container.mux(audio.encode(frame))
            container.mux(audio.encode())


def greys(samples: np.ndarray) -> list[float]:
    return samples.mean(axis=(1, 2, 3)).tolist()


def test_shots_and_pictures(film: Path) -> None:
    facts = probe(film)
    assert (facts.fps, facts.width, facts.height, facts.sound) == (FPS, 64, 32, True)
    few, many = Sampling(2, 16), Sampling(12, 32)
    shots = list(read_pictures(film, [few, many], shots=build_finder()))
    assert [(s.start_ms, s.end_ms) for s in shots] == [(0, 1000), (1000, 2000), (2000, 3000)]
    for shot, level in zip(shots, LEVELS, strict=True):
        assert shot.samples[few].shape == (2, 16, 32, 3)
        assert shot.samples[many].shape == (12, 32, 64, 3)  # more than the shot has frames
        assert greys(shot.samples[many]) == pytest.approx([level] * 12, abs=6)


def test_samples_are_spread_over_a_long_shot(film: Path) -> None:
    (shot,) = read_pictures(film, [Sampling(3, 16)], shots=np.array([[0, 3000]], np.int32))
    assert greys(shot.samples[Sampling(3, 16)]) == pytest.approx(list(LEVELS), abs=6)


def test_given_shots_may_leave_gaps(film: Path) -> None:
    given = np.array([[1000, 1500], [2500, 3000]], np.int32)
    shots = list(read_pictures(film, [Sampling(1, 16)], shots=given))
    assert [[s.start_ms, s.end_ms] for s in shots] == given.tolist()
    assert [greys(s.samples[Sampling(1, 16)])[0] for s in shots] == pytest.approx([200, 90], abs=6)


def test_a_list_beyond_the_film_is_refused(film: Path) -> None:
    with pytest.raises(UserError, match="shot 1 of its list"):
        list(read_pictures(film, [], shots=np.array([[0, 3000], [9000, 9500]], np.int32)))


def test_variable_frame_rate_goes_by_time(tmp_path: Path) -> None:
    path = tmp_path / "vfr.mkv"
    write_film(path, [0, 5, *range(10, 20), 20, 27], sound=False)
    assert [s.start_ms for s in read_pictures(path, [], shots=build_finder())] == [0, 1000, 2000]


def test_the_clock_of_a_film_starts_at_zero(tmp_path: Path) -> None:
    late = tmp_path / "late.mkv"
    write_film(late, range(30), sound=True, start_s=20)
    facts = probe(late)
    assert facts.first_s == 0
    assert facts.duration_s == pytest.approx(3.0, abs=0.1)
    assert [(s.start_ms, s.end_ms) for s in read_pictures(late, [], shots=build_finder())] == [
        (0, 1000),
        (1000, 2000),
        (2000, 3000),
    ]
    (sound,) = read_sound(late, np.array([[1000, 2000]], np.int32))
    assert float(np.median(sound)) == pytest.approx(0.5, abs=0.01)


def test_the_length_is_that_of_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "short.mp4"
    write_film(path, range(10), sound=True)
    assert probe(path).duration_s == pytest.approx(1.0, abs=0.05)  # the sound is 3 s long


def test_sound_is_cut_by_shot(film: Path) -> None:
    shots_S2 = np.array([[0, 500], [1000, 2000], [2000, 3000], [8000, 9000]], np.int32)
    sounds = list(read_sound(film, shots_S2))
    assert [sound.dtype for sound in sounds] == [np.float32] * 4
    assert [len(sound) / SAMPLE_RATE for sound in sounds] == pytest.approx([0.5, 1, 1, 0], abs=0.01)
    assert [float(np.median(sound)) for sound in sounds[1:3]] == pytest.approx([0.5, 0.1], abs=0.01)


def test_no_sound_is_normal(tmp_path: Path) -> None:
    path = tmp_path / "mute.mp4"
    write_film(path, range(10), sound=False)
    assert not probe(path).sound
    assert [len(sound) for sound in read_sound(path, np.array([[0, 500], [500, 1000]], np.int32))] == [0, 0]


def test_what_is_no_film_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("This is a text, not a film.\n" * 50)
    (tmp_path / "empty.mp4").write_bytes(b"")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(audio.encode(frame))
    for name in ("text.mp4", "empty.mp4", "sound.wav", "absent.mp4"):
        with pytest.raises(UserError, match=name) as caught:
            probe(tmp_path / name)
        assert caught.value.remedy


def test_clips_have_their_own_rate(tmp_path: Path) -> None:
    """Frames of 30 a second, whose grey tells when they are shown, and clips of 4 pictures at 15 a second."""
    path = tmp_path / "rising.mkv"
    shades = [4 * number if number < 60 else 255 - 4 * (number - 60) for number in range(120)]
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=30, options={"crf": "0"})
        video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
        for shade in shades:
            picture = np.full((32, 64, 3), shade, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    clips = Sampling(8, 16, rate=15, clips=2)
    rising, short = read_pictures(path, [clips], shots=np.array([[0, 2000], [2000, 2100]], np.int32))
    # Clips follow one another every 8 frames; those nearest to the middles of both halves.
    assert greys(rising.samples[clips]) == pytest.approx([*shades[8:16:2], *shades[40:48:2]], abs=3)
    assert greys(short.samples[clips]) == pytest.approx([255, 247, 247, 247] * 2, abs=3)
    # Of a shot of 60 places the pool has room for half: every second clip.
    (whole,) = read_pictures(path, [clips], shots=build_finder(min_shot_s=9.0))
    assert greys(whole.samples[clips]) == pytest.approx([*shades[32:40:2], *shades[80:88:2]], abs=3)
