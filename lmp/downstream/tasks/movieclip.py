"""Scene labels of hidden shots, on MovieCLIP's shot labels (Bose et al., WACV 2023): what context alone tells.

LABELS holds Condensed Movies' split.csv and clips.csv (or .gz) and MovieCLIP's *_150_labels.txt (or .gz) in one folder
or in the folders condensed_movies and movieclip_labels. Lines are `ID/ID-Scene-NUMBER.mp4 label ...`; all files are
taken together and split by Condensed Movies' split of films. Clips have at least five labelled shots.

Each labelled shot is hidden in turn, and the model sees the others of its clip. One label is predicted, and right if
it is in the hidden shot's set. `alone` shows the hidden shot with no other: what then is left is the prior. `film`
shows the shots of all clips of the film, but for every eighth, which are hidden together, eight times over; the same
shots are scored. `description` finds a clip by its description, ties by the mean.
"""

from __future__ import annotations

import gzip
import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from lmp.downstream.tasks.base import SPLITS, Clip, Coverage, ItemRows, Items, Loss, RetrievalTask, Task, Videos
from lmp.downstream.tasks.condensed_movies import CondensedMovies, read_csv, read_split
from lmp.downstream.trunk import Window
from lmp.errors import UserError

CLASSES = 150
LEAST_SHOTS = 5
TOGETHER = 8
"""One in so many shots of a film is hidden at a time."""
LINE = re.compile(r"^([\w-]{11})/\1-Scene-(\d+)\.mp4 ([\d ]+)$")

Labels = dict[str, list[tuple[int, tuple[int, ...]]]]
"""Clip -> (number of the shot in the clip, its labels), in order."""


def read_shot_labels(folder: Path) -> Labels:
    """The labels of all files in the folder.

    Raises:
        UserError: no such file, or a line that is not a label.
    """
    found: Labels = {}
    paths = sorted(folder.glob("*_150_labels.txt*"))
    for path in paths:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for number, line in enumerate(data.decode().splitlines(), 1):
            match = LINE.match(line.strip())
            if match is None:
                raise UserError(f"{path}, line {number}: is not a shot's labels", remedy="give the published file")
            labels = tuple(int(word) for word in match[3].split())
            found.setdefault(match[1], []).append((int(match[2]), labels))
    if not paths:
        raise UserError(f"{folder}: holds no *_150_labels.txt", remedy="give the folder of MovieCLIP's label files")
    return {clip: sorted(shots) for clip, shots in found.items()}


def sub_folder(labels: Path, name: str) -> Path:
    """LABELS/NAME where there is one, else LABELS."""
    return labels / name if (labels / name).is_dir() else labels


def split_of_clips(labels: Path) -> dict[str, str]:
    """Clip -> split of its film in Condensed Movies."""
    folder = sub_folder(labels, "condensed_movies")
    of_film = read_split(folder)
    return {row["videoid"]: of_film[row["imdbid"]] for row in read_csv(folder, "clips.csv") if row["imdbid"] in of_film}


def hidden_together(film: Clip) -> list[Window]:
    """The shots of a film, up to `TOGETHER` times over, each time with another share of them hidden."""
    return [
        replace(film.window(), hidden=tuple(range(first, film.stop, TOGETHER)))
        for first in range(min(TOGETHER, film.stop))
    ]


class HiddenShot(Task):
    """The labels of a hidden shot, from the other labelled shots of its clip, of its film, or from none."""

    needs: ClassVar[str] = (
        "LABELS/condensed_movies/{split,clips}.csv, LABELS/movieclip_labels/*_150_labels.txt, and shards whose clips "
        "bear the YouTube ids and hold just the labelled shots (configs/real)"
    )
    metric: ClassVar[str] = "top1"
    loss: ClassVar[Loss] = "multilabel_one"

    def __init__(self, shown: Literal["clip", "film", "alone"]) -> None:
        self.shown = shown
        self.name = "movieclip/" + {"clip": "hidden"}.get(shown, shown)

    def ids(self, labels: Path) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {name: [] for name in SPLITS}
        split = split_of_clips(Path(labels))
        for clip, shots in read_shot_labels(sub_folder(Path(labels), "movieclip_labels")).items():
            if clip in split and len(shots) >= LEAST_SHOTS:
                found[split[clip]].append(clip)
        return found

    def items(self, labels: Path, videos: Videos) -> tuple[Items, Coverage]:
        every = read_shot_labels(sub_folder(Path(labels), "movieclip_labels"))
        rows, coverage, item = ItemRows(), Coverage(), 0
        in_film: dict[int, list[int]] = {}  # film -> its windows
        for split, names in self.ids(Path(labels)).items():
            for name in names:
                clip = coverage.look(videos, name, split)
                if clip is None:
                    continue
                shots = every[name]
                if len(shots) != clip.stop - clip.start:
                    raise UserError(
                        f"clip {name} has {clip.stop - clip.start} shots in the shards and {len(shots)} labelled ones",
                        remedy="make the shards of the labelled shots",
                    )
                if self.shown == "film" and clip.film not in in_film:
                    of_film = videos.whole(clip.film)
                    in_film[clip.film] = [rows.window(window) for window in hidden_together(of_film)]
                for shot, (_, found) in enumerate(shots, clip.start):
                    target_C = np.zeros(CLASSES, np.float32)
                    target_C[list(found)] = 1.0
                    if self.shown == "film":
                        window, place = in_film[clip.film][shot % TOGETHER], shot
                    elif self.shown == "clip":
                        place = shot - clip.start
                        window = rows.window(replace(clip.window(), hidden=(place,)))
                    else:
                        place = 0
                        window = rows.window(Window(clip.film, np.array([shot]), hidden=(0,)))
                    rows.add(window, [(place, place + 1)], target_C, group=item, split=split)
                    item += 1
        return rows.items(np.float32), coverage

    def outputs(self, items: Items) -> int:
        return CLASSES

    def scores(self, items: Items, chosen: np.ndarray, output_IC: np.ndarray) -> dict[str, float]:
        right_I = items.target_I[chosen][np.arange(len(chosen)), output_IC.argmax(1)] > 0.5
        return {"top1": float(right_I.mean())}


class Description(CondensedMovies):
    """Description to clip among the clips of `HiddenShot` that have a description which occurs once."""

    def __init__(self) -> None:
        super().__init__("2020")
        self.name = "movieclip/description"
        self._clips: set[str] = set()

    def ids(self, labels: Path) -> dict[str, list[str]]:
        return HiddenShot("clip").ids(labels)

    def pairs(self, labels: Path, videos: Videos) -> tuple[list[Window], np.ndarray, Coverage]:
        self._clips = {clip for clips in self.ids(labels).values() for clip in clips}
        return super().pairs(sub_folder(Path(labels), "condensed_movies"), videos)

    def takes(self, video: str) -> bool:
        return video in self._clips


TASKS: tuple[Task | RetrievalTask, ...] = (
    HiddenShot("clip"),
    HiddenShot("film"),
    HiddenShot("alone"),
    Description(),
)
