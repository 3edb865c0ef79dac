"""Reading films: pictures and sound of each shot, each stream decoded once, with bounded memory."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmp.errors import UserError
from lmp.films.cuts import Look, ShotFinder
from lmp.films.encoders.base import SAMPLE_RATE

_POOL = 4  # frames kept for each frame wanted
_HELD = 256  # frames kept besides, as long as it is open which shot they belong to
_ROUNDING = 0.02  # of a place of a clip: containers round the times of frames to milliseconds
_SOUND_SLACK = SAMPLE_RATE // 10  # time stamps may stray this much before they count as a gap


@dataclass(frozen=True)
class FilmFacts:
    """What the container says.

    Attributes:
        duration_s: length of the picture, 0 if unknown.
        first_s: when the first frame is shown.
        fps: frames per second.
        width, height: pixels.
        sound: whether there is any.
    """

    duration_s: float
    first_s: float
    fps: float
    width: int
    height: int
    sound: bool


class Sampling(NamedTuple):
    """Which pictures of a shot are taken.

    Attributes:
        frames: how many.
        height: pixels.
        rate: 0 spreads them evenly over the shot's time. Otherwise they are `clips` clips of so many pictures a
            second, one near the middle of each of so many equal parts of the shot; what a shot lacks for a whole clip
            is its last picture again.
        clips: see rate.
    """

    frames: int
    height: int
    rate: float = 0.0
    clips: int = 1


@dataclass(frozen=True)
class ShotPictures:
    """A shot and its pictures.

    Attributes:
        start_ms, end_ms: [start, end).
        samples: per sampling, uint8 [frames, height, width, 3], red first. A short shot repeats frames.
    """

    start_ms: int
    end_ms: int
    samples: dict[Sampling, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Of the pictures."""
        return sum(pictures.nbytes for pictures in self.samples.values())


def probe(path: Path) -> FilmFacts:
    """What a film holds, without decoding it.

    Raises:
        UserError: no such file, empty, not a film, or no picture in it.
    """
    with _opened(path) as container:
        video = _picture_stream(container, path)
        first_ms = float((video.start_time or 0) * video.time_base) * 1000 - _start_ms(container)
        return FilmFacts(
            duration_s=_length_s(container, video),
            first_s=max(first_ms, 0.0) / 1000,
            fps=_rate(video),
            width=video.width,
            height=video.height,
            sound=bool(container.streams.audio),
        )


def read_pictures(
    path: Path, samplings: Sequence[Sampling], *, shots: np.ndarray | ShotFinder, threads: int = 0
) -> Generator[ShotPictures]:
    """The shots of a film in order, in one decoding pass.

    Args:
        path: the film.
        samplings: which pictures to take of every shot.
        shots: int32 [S, 2] milliseconds, in order, not overlapping; or what finds them.
        threads: of the decoder; 0 leaves it to FFmpeg.

    Raises:
        UserError: as `probe`; a film that cannot be decoded; a given shot in which the film has no frame.
    """
    frames = _frames(path, threads)
    if isinstance(shots, np.ndarray):
        yield from _given_shots(path, frames, samplings, shots)
    else:
        yield from _found_shots(frames, samplings, shots)


def read_sound(path: Path, shots_S2: np.ndarray) -> Generator[np.ndarray]:
    """The sound of each shot: float32 [samples], mono, 16 kHz; empty where the film has none.

    Holds about one shot at a time.

    Args:
        path: the film.
        shots_S2: int32 [S, 2] milliseconds, in order, not overlapping.

    Raises:
        UserError: as `probe`, or sound that cannot be decoded.
    """
    chunks = _sound_chunks(path)
    held = np.zeros(0, dtype=np.float32)
    held_from = 0
    for start, end in (shots_S2.astype(np.int64) * SAMPLE_RATE // 1000).tolist():
        parts, held_to = [held], held_from + len(held)
        while held_to < end and (chunk := next(chunks, None)) is not None:
            held_to += len(chunk)
            if held_to <= start:
                parts, held_from = [], held_to
            else:
                parts.append(chunk)
        held = np.concatenate(parts) if parts else held[:0]
        first = max(start - held_from, 0)
        last = max(end - held_from, 0)
        yield held[first:last].copy()
        held_from += min(last, len(held))
        held = held[last:]


class _Scaler:
    """Scales the frames of one film; every picture of one height gets the same width."""

    def __init__(self, width: int, height: int) -> None:
        self._width, self._height = width, height
        # One each: it is setting a scaler up that costs, and it is set up anew when the size changes.
        self._scalers: dict[Look, Any] = {}

    def scale(self, frame: Any, look: Look) -> np.ndarray:
        """uint8 [height, width, 3], turned as the film is to be shown."""
        from av.video.reformatter import VideoReformatter

        scaler = self._scalers.setdefault(look, VideoReformatter())
        turns = round(frame.rotation / 90) % 4  # quarters, against the clock
        wide, high = (self._height, self._width) if turns % 2 else (self._width, self._height)
        width = look.width or max(2, round(wide * look.height / high / 2) * 2)
        stored = (look.height, width) if turns % 2 else (width, look.height)
        scaled = scaler.reformat(
            frame, width=stored[0], height=stored[1], format=look.pixels, interpolation=look.scaling, threads=1
        ).to_ndarray()
        return np.ascontiguousarray(np.rot90(scaled, turns)) if turns else scaled


class _Frame:
    """A decoded frame, scaled when asked, once per size."""

    def __init__(self, frame: Any, time_ms: float, end_ms: float, scaler: _Scaler) -> None:
        self.time_ms, self.end_ms = time_ms, end_ms
        self._frame, self._scaler = frame, scaler
        self._scaled: dict[Look, np.ndarray] = {}

    def scaled(self, look: Look) -> np.ndarray:
        """uint8 [height, width, 3]."""
        if look not in self._scaled:
            self._scaled[look] = self._scaler.scale(self._frame, look) if look.pixels == "rgb24" else self._bgr(look)
        return self._scaled[look]

    def _bgr(self, look: Look) -> np.ndarray:
        """From red first: an encoder may well look at the very size in which cuts are found."""
        import cv2

        return cv2.cvtColor(self.scaled(look._replace(pixels="rgb24")), cv2.COLOR_RGB2BGR)


class _Kept(NamedTuple):
    """A frame of a pool: its place in the shot (see `_Pool`), when it is shown, the picture."""

    number: int
    time_ms: float
    picture: np.ndarray


class _Pool:
    """A few frames of a growing shot, for one sampling: every frame, every second, every fourth, as it grows.

    With a rate it is every clip, every second, every fourth. These follow one another from the start of the shot, and
    a frame's place is the picture of a clip that it may be: the first in that place is. All frames are kept from the
    time on at which another shot may turn out to have begun, up to a number.
    """

    def __init__(self, sampling: Sampling, start_ms: float) -> None:
        self._sampling, self._look = sampling, Look(sampling.height)
        self._unit = sampling.frames // sampling.clips if sampling.rate else 1  # places that are kept together
        self._start_ms = start_ms
        self._kept: list[_Kept] = []
        self._stride, self._count = 1, 0

    def add(self, frame: _Frame, open_ms: float) -> None:
        number = self._place(frame.time_ms)
        if number // self._unit % self._stride == 0 or frame.time_ms >= open_ms:
            self._kept.append(_Kept(number, frame.time_ms, frame.scaled(self._look)))
        self._count += 1
        room = _POOL * self._sampling.frames
        if len(self._kept) > room:
            self._thin(room, open_ms)

    def split(self, at_ms: float) -> _Pool:
        """Give the frames from this time on to a pool of their own."""
        later = _Pool(self._sampling, at_ms)
        first = bisect_left(self._kept, at_ms, key=lambda kept: kept.time_ms)
        # A shot always has a picture; one that was told very late may get that of a neighbour.
        moved = self._kept[first:] or self._kept[-1:]
        if self._sampling.rate:
            later._kept = [kept._replace(number=later._place(kept.time_ms)) for kept in moved]
        else:
            later._kept = [kept._replace(number=kept.number - moved[0].number) for kept in moved]
            later._count = self._count - moved[0].number
        self._kept = self._kept[:first] or self._kept[:1]
        return later

    def sample(self, start_ms: float, end_ms: float) -> np.ndarray:
        """uint8 [frames, height, width, 3]: what is seen in the middle of each of `frames` equal parts, or clips."""
        frames = self._sampling.frames
        if self._sampling.rate:
            first = {kept.number: kept.picture for kept in reversed(self._kept)}
            places = sorted(first)
            wanted = self._clips((end_ms - start_ms) * self._sampling.rate / 1000)
            return np.stack([first[places[max(bisect_right(places, place) - 1, 0)]] for place in wanted])
        times = [kept.time_ms for kept in self._kept]
        moments = [start_ms + (i + 0.5) / frames * (end_ms - start_ms) for i in range(frames)]
        return np.stack([self._kept[max(bisect_right(times, t) - 1, 0)].picture for t in moments])

    def _place(self, time_ms: float) -> int:
        """Of the next frame: how many came before it, or with a rate the time since the start of the shot."""
        if not self._sampling.rate:
            return self._count
        return max(math.floor((time_ms - self._start_ms) * self._sampling.rate / 1000 + _ROUNDING), 0)

    def _clips(self, length: float) -> list[int]:
        """The places of `clips` clips, of a shot that has so many places."""
        held = sorted({kept.number // self._unit for kept in self._kept})
        whole = [clip for clip in held if (clip + 1) * self._unit <= length + 1] or held[:1]
        middles = [(part + 0.5) / self._sampling.clips * length for part in range(self._sampling.clips)]
        chosen = [min(whole, key=lambda clip: abs((clip + 0.5) * self._unit - middle)) for middle in middles]
        return [clip * self._unit + place for clip in chosen for place in range(self._unit)]

    def _thin(self, room: int, open_ms: float) -> None:
        if len(self._kept) > room + _HELD:
            open_ms = math.inf
        certain = [kept for kept in self._kept if kept.time_ms < open_ms]
        still_open = self._kept[len(certain) :]
        certain = [kept for i, kept in enumerate(certain) if i == 0 or kept.number > certain[i - 1].number]
        while sum(kept.number // self._unit % self._stride == 0 for kept in certain) > room:
            self._stride *= 2
        self._kept = [kept for kept in certain if kept.number // self._unit % self._stride == 0] + still_open


class _Shot:
    """A shot being read."""

    def __init__(self, samplings: Sequence[Sampling], start_ms: float) -> None:
        self.start_ms = start_ms
        self.frames = 0
        self._pools = [_Pool(sampling, start_ms) for sampling in samplings]
        self._samplings = samplings

    def add(self, frame: _Frame, *, open_ms: float = math.inf) -> None:
        """One more frame; from `open_ms` on another shot may turn out to have begun."""
        self.frames += 1
        for pool in self._pools:
            pool.add(frame, open_ms)

    def split(self, at_ms: float) -> _Shot:
        """The shot that began at this time."""
        later = _Shot(self._samplings, at_ms)
        later._pools = [pool.split(at_ms) for pool in self._pools]
        return later

    def finish(self, end_ms: float) -> ShotPictures:
        pairs = zip(self._samplings, self._pools, strict=True)
        samples = {sampling: pool.sample(self.start_ms, end_ms) for sampling, pool in pairs}
        start = max(round(self.start_ms), 0)
        return ShotPictures(start, max(round(end_ms), start + 1), samples)


def _found_shots(frames: Iterator[_Frame], samplings: Sequence[Sampling], finder: ShotFinder) -> Iterator[ShotPictures]:
    starts = finder.start()
    shot: _Shot | None = None
    end_ms = 0.0
    for frame in frames:
        begun = starts.feed(frame.time_ms, frame.scaled(finder.detector.look))
        shot = shot or _Shot(samplings, frame.time_ms)
        shot.add(frame, open_ms=min([starts.undecided_ms, *begun]))
        for start_ms in begun:
            later = shot.split(start_ms)
            yield shot.finish(start_ms)
            shot = later
        end_ms = frame.end_ms
    if shot is None:
        return
    for start_ms in starts.finish(end_ms):
        later = shot.split(start_ms)
        yield shot.finish(start_ms)
        shot = later
    yield shot.finish(end_ms)


def _given_shots(
    path: Path, frames: Iterator[_Frame], samplings: Sequence[Sampling], shots_S2: np.ndarray
) -> Iterator[ShotPictures]:
    spans = iter(enumerate(shots_S2.tolist()))
    number, (start, end) = next(spans)
    shot, last_ms, done = _Shot(samplings, start), 0.0, False
    for frame in frames:
        last_ms = frame.end_ms
        # Lists made from frame numbers are rounded to milliseconds; so must be the frames.
        now = round(frame.time_ms)
        while not done and now >= end:
            yield _whole(path, shot, number, (start, end), last_ms)
            following = next(spans, None)
            if following is None:
                done = True
            else:
                number, (start, end) = following
                shot = _Shot(samplings, start)
        if not done and now >= start:
            shot.add(frame)
    while not done:
        yield _whole(path, shot, number, (start, end), last_ms)
        following = next(spans, None)
        if following is None:
            break
        number, (start, end) = following
        shot = _Shot(samplings, start)


def _whole(path: Path, shot: _Shot, number: int, span: tuple[int, int], last_ms: float) -> ShotPictures:
    if shot.frames == 0:
        raise UserError(
            f"{path} shows nothing in shot {number} of its list, {span[0]} to {span[1]} ms "
            f"(read up to {round(last_ms)} ms)",
            remedy="give a shot list made for this very file, with its frame rate",
        )
    return shot.finish(span[1])


def _frames(path: Path, threads: int) -> Iterator[_Frame]:
    with _opened(path) as container:
        video = _picture_stream(container, path)
        video.codec_context.thread_count = threads
        video.thread_type = "AUTO"
        step_ms, start_ms = 1000 / _rate(video), _start_ms(container)
        scaler = _Scaler(video.width, video.height)
        last_ms, end_ms, count = 0.0, 0.0, 0
        for frame in container.decode(video):
            # No frame may come before the one shown before it, nor without a time.
            stamp = end_ms if frame.time is None else frame.time * 1000 - start_ms
            time_ms = max(stamp, last_ms) if count else stamp
            last_ms, end_ms = time_ms, time_ms + step_ms
            count += 1
            yield _Frame(frame, time_ms, end_ms, scaler)
    if not count:
        raise UserError(f"{path} has a video stream without a single frame", remedy="give a whole film")


def _sound_chunks(path: Path) -> Iterator[np.ndarray]:
    """Mono 16 kHz float32 from time 0 on, gaps filled with silence."""
    import av

    with _opened(path) as container:
        if not container.streams.audio:
            return
        # FFmpeg's own mix to mono would make equal channels louder than a mono film: the mean does not.
        resampler = av.AudioResampler(format="fltp", rate=SAMPLE_RATE)
        written, drop, start_ms = 0, 0, _start_ms(container)
        for frame in container.decode(container.streams.audio[0]):
            if frame.time is not None:
                ahead = round((frame.time - start_ms / 1000) * SAMPLE_RATE) - written
                if ahead > _SOUND_SLACK or (written == 0 and ahead > 0):
                    yield from _silence(ahead)
                    written += ahead
                elif ahead < -_SOUND_SLACK or (written == 0 and ahead < 0):
                    drop = -ahead
            for resampled in resampler.resample(frame):
                sound = resampled.to_ndarray().mean(0)
                kept = sound[drop:]
                drop = max(drop - len(sound), 0)
                written += len(kept)
                yield kept
        for resampled in resampler.resample(None):
            yield resampled.to_ndarray().mean(0)


def _silence(samples: int) -> Iterator[np.ndarray]:
    """In pieces, for a wrong time stamp may ask for hours."""
    for start in range(0, samples, 60 * SAMPLE_RATE):
        yield np.zeros(min(60 * SAMPLE_RATE, samples - start), dtype=np.float32)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A PyAV container; whatever FFmpeg finds wrong with it becomes a UserError."""
    try:
        import av
    except ImportError as error:
        raise UserError("PyAV is not installed", remedy="pip install 'lmp[films]'") from error
    if not path.is_file():
        raise UserError(f"there is no film {path}", remedy="check the path")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is an empty file", remedy="copy or download it again")
    try:
        container = av.open(str(path), metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is no film that FFmpeg can read: {_reason(error)}",
            remedy="give a whole video file, such as mp4, mkv or webm",
        ) from error
    with container:
        try:
            yield container
        except (av.FFmpegError, ValueError) as error:  # ValueError: sound whose layout changes midway
            raise UserError(
                f"{path} cannot be decoded: {_reason(error)}",
                remedy="copy or download it again, or repair it by converting it with ffmpeg",
            ) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _picture_stream(container: Any, path: Path) -> Any:
    from av.stream import Disposition

    for stream in container.streams.video:
        # An album's cover is a video stream too.
        if not stream.disposition & Disposition.attached_pic and stream.width and stream.height:
            return stream
    raise UserError(f"{path} has no picture", remedy="give a file with a video stream")


def _start_ms(container: Any) -> float:
    """Where the clock of the film starts: recordings of broadcasts begin at any time of day, subtitles at 0."""
    return max(container.start_time or 0, 0) / 1000


def _length_s(container: Any, video: Any) -> float:
    """How long the container says that the picture is; 0 where it does not. Sound may well go on after it."""
    if video.duration:
        return float(video.duration * video.time_base)
    # Matroska states one length for all, and counts it from 0 whatever time the film starts at.
    return max(float(container.duration or 0) / 1_000_000 - _start_ms(container) / 1000, 0.0)


def _rate(video: Any) -> float:
    rate = video.average_rate or video.guessed_rate or video.base_rate
    return float(rate) if rate else 25.0
