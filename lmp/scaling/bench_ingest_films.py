"""Films that `lmp bench ingest` makes: a few like those of the demo, and cheap long ones."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

SHOT_S = 4
_FPS, _RATE = 24, 16_000
_WIDTH, _HEIGHT = 128, 64


def make_like_films(folder: Path, films: int, *, shots: int) -> list[Path]:
    """Films of 640 x 352 at 24 frames a second, with sound and subtitles; see `lmp.films.synthetic`."""
    from lmp.films.synthetic import FilmSettings, make_films

    settings = FilmSettings(width=640, height=352, fps=_FPS, shots=shots)
    return make_films(folder, films=films, seed=1, settings=settings, progress=False)


def make_long_film(path: Path, seconds: int) -> Path:
    """A film of any length, at little cost: shots of 4 s, each of its own colours, tone and line of text.

    Args:
        path: the film, .mkv (H.264 of 128 x 64 at 24 frames a second, FLAC); NAME.srt comes beside it.
        seconds: a multiple of 4.
    """
    import av

    random = np.random.default_rng(0)
    frames, samples = SHOT_S * _FPS, SHOT_S * _RATE
    lines = []
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=_FPS, options={"preset": "ultrafast", "threads": "1"})
        video.width, video.height, video.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        audio = container.add_stream("flac", rate=_RATE, layout="mono")
        audio.format = "s16"
        for shot in range(seconds // SHOT_S):
            # Two thirds of the rows are brightness, the others colour, at half the width and height.
            blocks = random.integers(0, 256, (_HEIGHT * 3 // 2 // 16, _WIDTH // 16), dtype=np.uint8)
            planes = np.kron(blocks, np.ones((16, 16), np.uint8))
            for number in range(frames):
                picture = av.VideoFrame.from_ndarray(np.roll(planes, number, axis=1), format="yuv420p")
                picture.pts, picture.time_base = shot * frames + number, Fraction(1, _FPS)
                container.mux(video.encode(picture))
            tone = np.sin(np.arange(samples) * random.uniform(0.05, 1.0)) * 8000
            sound = av.AudioFrame.from_ndarray(tone.astype(np.int16)[None], format="s16", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = _RATE, shot * samples, Fraction(1, _RATE)
            container.mux(audio.encode(sound))
            start, end = (_timestamp(shot * SHOT_S + second) for second in (1, 3))
            lines.append(f"{shot + 1}\n{start} --> {end}\nThis is line {shot}, and it says {random.integers(1000)}.\n")
        container.mux(video.encode())
        container.mux(audio.encode())
    path.with_suffix(".srt").write_text("\n".join(lines), encoding="utf-8")
    return path


def _timestamp(second: int) -> str:
    return f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d},000"
