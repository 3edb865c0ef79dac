"""Detectors of cuts by name: our own, PySceneDetect's, TransNet V2."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from lmp.errors import UserError
from lmp.films.cuts import MIN_SHOT_S, Cut, Detector, Look, ShotFinder

DEFAULT = "layout"
_PYSCENEDETECT = {
    "adaptive": "AdaptiveDetector",
    "content": "ContentDetector",
    "hash": "HashDetector",
    "hist": "HistogramDetector",
    "threshold": "ThresholdDetector",
}
NAMES = (DEFAULT, *_PYSCENEDETECT, "transnetv2")
# Not options: what --min-shot does, and what is out of use.
_LEFT_OUT = frozenset({"self", "min_scene_len", "filter_mode", "block_size"})
_LOOK = Look(72, pixels="bgr24")
"""Smaller pictures are faster, and hide the noise of single pixels from the detector."""
_COARSE = (12, 8)
_FLAT = 8.0  # contrast below which pictures have no layout to compare
_OPTION = re.compile(r",([a-z_]+)=([^,]*)$")


def build_finder(spec: str = DEFAULT, *, min_shot_s: float = MIN_SHOT_S, device: str = "cpu") -> ShotFinder:
    """What finds shots with the detector that a line names.

    Args:
        spec: NAME or NAME:OPTION=VALUE,OPTION=VALUE for `layout` (options `change` and `jump`) and PySceneDetect's
            `adaptive`, `content`, `hash`, `hist` and `threshold` (their own options);
            transnetv2:WEIGHTS or transnetv2:WEIGHTS,threshold=0.5.
        min_shot_s: seconds that a shot lasts at least.
        device: where networks run.

    Raises:
        UserError: no such detector or option, an option of another kind, weights that do not fit, a time that is
            none, or PySceneDetect is not installed.
    """
    if not 0 <= min_shot_s < float("inf"):
        raise UserError(f"a shot cannot last at least {min_shot_s} s", remedy="give seconds, 0 or more")
    return ShotFinder(_build(spec, device), min_shot_s)


def _build(spec: str, device: str) -> Detector:
    name, _, rest = spec.partition(":")
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise UserError(
            f"there is no detector {name!r}",
            remedy=f"{f'did you mean {near[0]}? ' if near else ''}There are {', '.join(NAMES)}",
        )
    if name == "transnetv2":
        return _transnet(rest, device)
    written = _written(name, rest)
    if name == DEFAULT:
        return LayoutDetector(**_options(name, LayoutDetector.__init__, written))
    kind = getattr(_pyscenedetect(), _PYSCENEDETECT[name])
    return PySceneDetector(name, kind, _options(name, kind.__init__, written))


class LayoutDetector:
    """PySceneDetect's content score, times how much the layout changes.

    The layout is the correlation of coarse grey pictures. A cut between two cameras of one place changes it
    while the colours stay; a flash changes colours while it stays.
    """

    look = _LOOK

    def __init__(self, change: float = 8.0, jump: float = 2.5) -> None:
        """A cut changes the picture by `change` at least, and `jump` times as much as the two frames before it."""
        try:
            import cv2  # noqa: F401
        except ImportError as error:
            raise UserError("OpenCV is not installed", remedy="pip install 'lmp[films]'") from error
        self._change, self._jump = change, jump

    def describe(self) -> dict[str, Any]:
        options = {"change": self._change, "jump": self._jump}
        return {"name": DEFAULT, "version": "1", "options": options}

    def start(self) -> _LayoutReading:
        return _LayoutReading(self._change, self._jump)


class _LayoutReading:
    def __init__(self, change: float, jump: float) -> None:
        self._change, self._jump = change, jump
        self._hsv: np.ndarray | None = None
        self._layout: np.ndarray | None = None
        self._before = (0.0, 0.0)
        self.undecided = 0

    def feed(self, picture_HWC: np.ndarray) -> list[Cut]:
        score = self._score(picture_HWC)
        cut = score >= max(self._change, self._jump * sum(self._before) / 2)
        self._before = (self._before[1], score)
        self.undecided += 1
        return [Cut(self.undecided - 1, score)] if cut else []

    def finish(self) -> list[Cut]:
        return []

    def _score(self, picture_HWC: np.ndarray) -> float:
        import cv2

        content = self._content_score(cv2.cvtColor(picture_HWC, cv2.COLOR_BGR2HSV))
        coarse = cv2.resize(picture_HWC, _COARSE, interpolation=cv2.INTER_AREA)
        layout = cv2.cvtColor(coarse, cv2.COLOR_BGR2GRAY).astype(np.float64).ravel()
        layout -= layout.mean()
        layout /= np.linalg.norm(layout) + _FLAT
        likeness = 0.0 if self._layout is None else float(layout @ self._layout)
        self._layout = layout
        return content * (1 - likeness)

    def _content_score(self, hsv_HWC: np.ndarray) -> float:
        """As ContentDetector's with its weights as they come: mean change of hue, saturation and brightness."""
        import cv2

        before, self._hsv = self._hsv, hsv_HWC
        if before is None:
            return 0.0
        changes = cv2.sumElems(cv2.absdiff(hsv_HWC, before))[:3]
        return sum(change / (hsv_HWC.size // 3) for change in changes) / 3


class PySceneDetector:
    """One of PySceneDetect's detectors, told to find every cut: what is too short is merged afterwards."""

    look = _LOOK

    def __init__(self, name: str, kind: Callable[..., Any], options: dict[str, Any]) -> None:
        """`kind` is the class, called anew for every film."""
        self._name, self._kind, self._options = name, kind, options
        try:
            trial = self.start()
            with np.errstate(divide="raise", invalid="raise"):
                for grey in (0, 100):
                    trial.feed(np.full((72, 128, 3), grey, np.uint8))
        # Whatever an option is that nobody has tried: ValueError, FloatingPointError, cv2.error.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"detector {name} cannot work with {options}: {reason}", remedy="give others") from error

    def describe(self) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for name, value in self._options.items():
            told[name] = value.name.lower() if isinstance(value, Enum) else value
            if isinstance(value, tuple):
                told[name] = list(value)
        return {"name": self._name, "version": version_of_pyscenedetect(), "options": told}

    def start(self) -> _PyReading:
        return _PyReading(self._name, self._kind(**self._options, min_scene_len=0))


class _PyReading:
    def __init__(self, name: str, detector: Any) -> None:
        self._name, self._detector = name, detector
        self._late = detector.window_width if name == "adaptive" else 0
        self._scores = _Scores()
        if name in ("hash", "hist"):
            detector.stats_manager = self._scores
        self._frames = 0
        self.undecided = 0

    def feed(self, picture_HWC: np.ndarray) -> list[Cut]:
        cuts = self._detector.process_frame(_timecode(self._frames), picture_HWC)
        self._frames += 1
        told = [Cut(cut.frame_num, self._score()) for cut in cuts]
        self.undecided = max(self._frames - self._late, 0)
        if self._name == "threshold" and self._detector.last_fade["type"] == "out":
            self.undecided = self._detector.last_fade["frame"].frame_num
        return told

    def finish(self) -> list[Cut]:
        return [Cut(cut.frame_num, 0.0) for cut in self._detector.post_process(_timecode(self._frames - 1))]

    def _score(self) -> float:
        """Of the cut that was just told. Fades have none: each is as good as the other."""
        if self._name == "content":
            return float(self._detector._frame_score)
        if self._name == "adaptive":
            return float(self._detector._buffer[self._late][1])
        # A high correlation of histograms means no cut, a high distance of hashes means one.
        return -self._scores.last if self._name == "hist" else self._scores.last


class _Scores:
    """Stands where PySceneDetect has its statistics of all frames, and keeps those of the last."""

    last = 0.0

    def set_metrics(self, timecode: Any, metrics: dict[str, float]) -> None:
        (self.last,) = metrics.values()


def _timecode(frame: int) -> Any:
    from scenedetect.common import FrameTimecode

    return FrameTimecode(frame, fps=25.0)  # handed back as it is, so the rate does not matter


def _pyscenedetect() -> Any:
    try:
        import scenedetect.detectors
    except ImportError as error:
        raise UserError("PySceneDetect is not installed", remedy="pip install 'lmp[films]'") from error
    return scenedetect.detectors


def version_of_pyscenedetect() -> str:
    """Of the package, under either of its names."""
    import scenedetect

    return f"PySceneDetect {scenedetect.__version__}"


def _written(name: str, text: str) -> dict[str, str]:
    """OPTION=VALUE,OPTION=VALUE as a dict."""
    written: dict[str, str] = {}
    for part in text.split(",") if text else []:
        option, equals, value = part.partition("=")
        if not (equals and option and value) or option in written:
            raise UserError(
                f"detector {name}: {part!r} is not OPTION=VALUE with an option of its own",
                remedy=f"write for example {name}:OPTION=VALUE,OPTION=VALUE",
            )
        written[option] = value
    return written


def _options(name: str, start: Callable[..., Any], written: dict[str, str]) -> dict[str, Any]:
    """Options as the detector's own signature has them, by their defaults' types."""
    known = {
        option: parameter.default
        for option, parameter in inspect.signature(start).parameters.items()
        if option not in _LEFT_OUT
    }
    options = {}
    for option, text in written.items():
        if option == "min_scene_len":
            raise UserError(f"detector {name} leaves min_scene_len to lmp", remedy="give --min-shot SECONDS instead")
        if option not in known:
            raise UserError(f"detector {name} has no option {option}", remedy=f"it has {', '.join(known)}")
        options[option] = _value(f"detector {name}: {option}", text, known[option])
    if not -1 <= options.get("fade_bias", 0) <= 1:
        raise UserError(f"detector {name}: fade_bias {options['fade_bias']:g}", remedy="give -1 to 1")
    return options


def _value(what: str, text: str, default: Any) -> Any:
    """Text as a value of the kind of the default."""
    if isinstance(default, Enum):
        kinds = {kind.name.lower(): kind for kind in type(default)}
        if text in kinds:
            return kinds[text]
        raise UserError(f"{what} is {text!r}", remedy=f"give {' or '.join(kinds)}")
    if isinstance(default, bool):
        if text in ("true", "false"):
            return text == "true"
        raise UserError(f"{what} is {text!r}", remedy="give true or false")
    try:
        if hasattr(default, "_make"):  # the weights of a content score
            return default._make(float(part) for part in text.split("/"))
        number = float(text) if isinstance(default, float) else int(text)
        if not abs(number) < float("inf"):
            raise ValueError(text)
        return number
    except (ValueError, TypeError) as error:
        kind = "numbers with slashes between, as 1/1/1/0"
        if not isinstance(default, tuple):
            kind = "a number" if isinstance(default, float) else "a whole number"
        raise UserError(f"{what} is {text!r}", remedy=f"give {kind}") from error


def _transnet(rest: str, device: str) -> Detector:
    from lmp.films.transnet import TransNetDetector

    written: dict[str, str] = {}
    while (found := _OPTION.search(rest)) is not None:  # a path may have a comma in it
        rest = rest[: found.start()]
        written[found[1]] = found[2]
    if not rest:
        raise UserError("detector transnetv2 needs its weights", remedy="write transnetv2:FILE")
    known = {"threshold": 0.5}
    for option in written:
        if option not in known:
            raise UserError(f"detector transnetv2 has no option {option}", remedy=f"it has {', '.join(known)}")
    values = {option: _value(f"detector transnetv2: {option}", text, known[option]) for option, text in written.items()}
    return TransNetDetector(Path(rest), **values, device=device)
