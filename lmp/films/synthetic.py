"""Makes small synthetic films: real mp4 files (h264 and aac), with subtitles and known labels beside them.

Hidden variables drive picture, sound and words at once. A film has a genre, three acts and a few places that
come back, each with its own two people; a scene stays in one place for 4 to 9 shots and alternates between
two cameras, so that the shot two away looks most alike and the neighbour does not. A shot adds what is its
own: the thing shown, the speed of the action, the light of the moment. Each modality shows these only now
and then (close-ups hide the place, music hides the ambience, many shots have no words), and each film has
its own colours, levels and voices. So a model must read context, and across modalities.

The same seed, settings and libraries give the same bytes.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.progress import track

from lmp.errors import UserError
from lmp.films.synthetic_picture import Painter
from lmp.films.synthetic_script import FilmSettings, FilmTruth, ShotTruth, line_span, write_script
from lmp.films.synthetic_sound import Mixer
from lmp.films.synthetic_world import GENRES

__all__ = ["FilmSettings", "FilmTruth", "ShotTruth", "make_film", "make_films"]


def make_film(path: Path, *, seed: int, settings: FilmSettings | None = None) -> FilmTruth:
    """Write a film as `path` (KEY.mp4), with KEY.srt and KEY.labels.json beside it.

    The labels are for probes only, never an input. The film itself appears last, and whole.

    Args:
        path: the film; its name ends in .mp4, and its folder is made.
        seed: 0 or more; with the settings it fixes every byte.
        settings: None for the defaults.

    Returns:
        The hidden variables of the film.

    Raises:
        UserError: a name that is no film's, or a folder that cannot be written.
    """
    settings = settings or FilmSettings()
    if path.suffix != ".mp4" or not re.fullmatch(r"[A-Za-z0-9_-]+", path.stem):
        raise UserError(f"{path.name} is no name for a film", remedy="use letters, digits, _ and -, ending in .mp4")
    rngs = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)]
    truth = write_script(rngs[0], path.stem, settings)
    mixer = Mixer(rngs[2], settings)
    texts = {".srt": _subtitles(truth), ".labels.json": json.dumps(truth.labels(), indent=1) + "\n"}
    partial = path.with_suffix(".mp4.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _encode(partial, truth, settings, Painter(rngs[1], settings), mixer)
        for suffix, text in texts.items():
            path.with_suffix(suffix).write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}", remedy="give a folder that can be written") from error
    finally:
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)
    return truth


def make_films(
    folder: Path,
    *,
    films: int,
    seed: int,
    settings: FilmSettings | None = None,
    workers: int = 2,
    prefix: str = "film",
    progress: bool = True,
) -> list[Path]:
    """Write films PREFIX-0000.mp4, PREFIX-0001.mp4, ... into a folder, each as `make_film` does.

    Film i depends on (seed, i, settings) alone, not on the number of films or workers. Where the settings
    name no genre, the films take the genres in turn.

    Returns:
        The paths of the films, in order.

    Raises:
        UserError: as `make_film`, or no films asked for.
    """
    settings = settings or FilmSettings()
    if films < 1 or workers < 1 or seed < 0:
        raise UserError(
            f"cannot make {films} films with {workers} workers and seed {seed}",
            remedy="ask for at least one film and one worker, and a seed of 0 or more",
        )
    paths = [folder / f"{prefix}-{number:04d}.mp4" for number in range(films)]
    seeds = [int(np.random.SeedSequence((seed, number)).generate_state(1)[0]) for number in range(films)]
    genres = [settings.genre or list(GENRES)[number % len(GENRES)] for number in range(films)]
    # Spawned, for the caller may have threads and a forked child would inherit their locks.
    with ProcessPoolExecutor(min(workers, films), mp_context=get_context("spawn")) as pool:
        tasks = [
            pool.submit(make_film, path, seed=film_seed, settings=replace(settings, genre=genre))
            for path, film_seed, genre in zip(paths, seeds, genres, strict=True)
        ]
        try:
            for task in track(as_completed(tasks), "making films", total=films, disable=not progress):
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return paths


def _encode(path: Path, truth: FilmTruth, settings: FilmSettings, painter: Painter, mixer: Mixer) -> None:
    """Draw, mix and write shot after shot."""
    import av

    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=settings.fps)
        video.width, video.height, video.pix_fmt = settings.width, settings.height, "yuv420p"
        # One thread: the same bytes on any machine, and films are made side by side.
        video.options = {
            "crf": str(settings.crf),
            "preset": "ultrafast",
            "threads": "1",
            "g": str(settings.fps * 4),
        }
        audio = container.add_stream("aac", rate=settings.sample_rate, layout="mono")
        audio.bit_rate, audio.options = 48000, {"aac_coder": "fast"}
        for shot in truth.shots:
            for number, planes in enumerate(painter.shot(shot), start=shot.start_frame):
                picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
                picture.pts, picture.time_base = number, Fraction(1, settings.fps)
                container.mux(video.encode(picture))
            first, last = (
                round(frame * settings.sample_rate / settings.fps) for frame in (shot.start_frame, shot.end_frame)
            )
            sound = av.AudioFrame.from_ndarray(mixer.shot(shot, last - first)[None], format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = (
                settings.sample_rate,
                first,
                Fraction(1, settings.sample_rate),
            )
            container.mux(audio.encode(sound))
        container.mux(video.encode())
        container.mux(audio.encode())


def _subtitles(truth: FilmTruth) -> str:
    blocks: list[str] = []
    for shot in truth.shots:
        if shot.speaker:
            begin, end = (_timestamp(shot.start_frame / truth.fps + s) for s in line_span(shot, truth.fps))
            blocks.append(f"{len(blocks) + 1}\n{begin} --> {end}\n{shot.line}\n")
    return "\n".join(blocks)


def _timestamp(seconds: float) -> str:
    whole_s, ms = divmod(round(seconds * 1000), 1000)
    return f"{whole_s // 3600:02d}:{whole_s // 60 % 60:02d}:{whole_s % 60:02d},{ms:03d}"
