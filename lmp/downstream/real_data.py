"""Shards of the public data that the real-data study reads; nothing of the data becomes part of the project.

    python -m lmp.downstream.real_data movies DATA OUT --leave-out IDS.txt
    python -m lmp.downstream.real_data open-films DATA OUT

`movies`: OUT/pretrain holds the films of Condensed Movies' train split without the clips of the lists, OUT/tasks every
film with every clip. A film's shots are those that MovieCLIP labels, clips in the order of the film. `video` is the
multi-hot vector of a shot's 150 labels; `text`, the same for each shot of a clip, is its description as TF-IDF (stems
of words in at least 3 descriptions, sublinear) reduced to 2,048 numbers by a truncated SVD, both fitted here on the
descriptions of the train split without the clips of the lists. The labels carry no times: a shot's number counts as
4 s, the mean length of a shot in MovieCuts' list.

`open-films`: the films of Open Video Scene Detection that have VGG19 features. `video` is the VGG19 row of a shot at
unit length, `hue` its hue histogram at unit length after a square root. All films count as 24 frames per second.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lmp.data.leave_out import LeaveOut
from lmp.data.manifest import Manifest
from lmp.data.record import FilmRecord
from lmp.data.shards import ShardWriter
from lmp.downstream.tasks.condensed_movies import read_csv, read_split
from lmp.downstream.tasks.movieclip import CLASSES, Labels, read_shot_labels
from lmp.errors import EXIT_DONE, EXIT_USER, UserError

SHOT_MS = 4000
TEXT_WIDTH = 2048
FPS = 24


@dataclass(frozen=True)
class Movies:
    """What is known of the films.

    Attributes:
        shots: clip -> labelled shots.
        clips: film -> its clips in order.
        titles: film -> title.
        split: film -> train, val or test.
        text: clip -> features of its description.
    """

    shots: Labels
    clips: dict[str, list[str]]
    titles: dict[str, str]
    split: dict[str, str]
    text: dict[str, np.ndarray]


def read_movies(data: Path, leave_out: LeaveOut | None) -> Movies:
    """Everything that `movies` writes.

    Raises:
        UserError: a file is not there.
    """
    folder = data / "condensed_movies"
    shots, split = read_shot_labels(data / "movieclip_labels"), read_split(folder)
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    titles = {}
    for row in read_csv(folder, "clips.csv"):
        if row["imdbid"] in split and row["videoid"] in shots:
            found[row["imdbid"]].append((int(row["clip_idx"]), row["videoid"]))
            titles[row["imdbid"]] = row["title"]
    clips = {film: [clip for _, clip in sorted(listed)] for film, listed in found.items()}
    return Movies(shots, clips, titles, split, embed(folder, split, leave_out))


def embed(folder: Path, split: dict[str, str], leave_out: LeaveOut | None) -> dict[str, np.ndarray]:
    """Clip -> float32 [TEXT_WIDTH] of its description (see the module)."""
    try:
        import snowballstemmer
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise UserError(
            "descriptions need scikit-learn and snowballstemmer", remedy="pip install 'lmp[report]'"
        ) from error
    rows = [row for row in read_csv(folder, "descriptions.csv") if row["imdbid"] in split]
    fitted = [
        row["description"]
        for row in rows
        if split[row["imdbid"]] == "train" and not (leave_out and leave_out.names(row["videoid"]))
    ]
    stems = snowballstemmer.stemmer("english").stemWords
    plain = TfidfVectorizer().build_analyzer()
    words = TfidfVectorizer(analyzer=lambda text: stems(plain(text)), min_df=3, sublinear_tf=True)
    reduce = TruncatedSVD(TEXT_WIDTH, random_state=0).fit(words.fit_transform(fitted))
    text_ND = reduce.transform(words.transform([row["description"] for row in rows])).astype(np.float32)
    # A mean square of about 1, which float16 holds well.
    text_ND *= np.sqrt(TEXT_WIDTH) / np.maximum(np.linalg.norm(text_ND, axis=1, keepdims=True), 1e-6)
    return {row["videoid"]: text_D for row, text_D in zip(rows, text_ND, strict=True)}


def write_movies(
    movies: Movies, out: Path, *, splits: Sequence[str], leave_out: LeaveOut | None, overwrite: bool
) -> tuple[Manifest, int]:
    """Write films of some splits without the clips of the lists.

    Returns:
        The manifest, and how many clips were refused.
    """
    encoders = {
        "video": {"name": "MovieCLIP labels, multi-hot", "version": "150"},
        "text": {"name": f"TF-IDF of the description's stems, SVD to {TEXT_WIDTH}", "version": "1"},
    }
    refused = 0
    with ShardWriter(out, encoders=encoders, overwrite=overwrite) as writer:
        for film in sorted(movies.clips):
            if movies.split[film] not in splits:
                continue
            kept = [clip for clip in movies.clips[film] if not (leave_out and leave_out.names(clip))]
            refused += len(movies.clips[film]) - len(kept)
            if kept:
                writer.write(_film(movies, film, kept))
        return writer.close(), refused


def _film(movies: Movies, film: str, clips: list[str]) -> FilmRecord:
    spans: list[tuple[int, int]] = []
    parts: list[dict[str, object]] = []
    labels: list[tuple[int, ...]] = []
    clip_of: list[str] = []
    begin = 0
    for clip in clips:
        first = len(spans)
        for number, of_shot in movies.shots[clip]:
            spans.append((begin + (number - 1) * SHOT_MS, begin + number * SHOT_MS))
            labels.append(of_shot)
            clip_of.append(clip)
        begin = spans[-1][1]
        parts.append({"videoid": clip, "start": first, "stop": len(spans)})
    video_SD = torch.zeros(len(spans), CLASSES, dtype=torch.float16)
    for row, of_shot in enumerate(labels):
        video_SD[row, list(of_shot)] = 1.0
    nothing = np.zeros(TEXT_WIDTH, np.float32)
    text_SD = torch.from_numpy(np.stack([movies.text.get(clip, nothing) for clip in clip_of])).half()
    return FilmRecord(
        key=film,
        info={"title": movies.titles[film], "imdbid": film, "split": movies.split[film], "clips": parts},
        shots_S2=np.array(spans, dtype=np.int32),
        features={"video": video_SD[:, None], "text": text_SD[:, None]},
        valid={
            "video": torch.ones(len(spans), dtype=torch.bool),
            "text": torch.tensor([clip in movies.text for clip in clip_of]),
        },
    )


def write_open_films(data: Path, out: Path, *, overwrite: bool) -> Manifest:
    """The open films that have VGG19 features.

    Raises:
        UserError: there is none.
    """
    paths = sorted((data / "ovsd").glob("*/film.npz"))
    if not paths:
        raise UserError(f"{data / 'ovsd'}: holds no film.npz", remedy="give the folder of the data")
    encoders = {
        "video": {"name": "VGG19, one frame a shot, unit length", "version": "1"},
        "hue": {"name": "hue histogram, square root, unit length", "version": "1"},
    }
    with ShardWriter(out, encoders=encoders, overwrite=overwrite) as writer:
        for path in paths:
            with np.load(path, allow_pickle=False) as film:
                if "features_vgg19" not in film:
                    continue
                frames_S2 = film["shots"] + np.array([0, 1])
                rows = {"video": film["features_vgg19"], "hue": np.sqrt(film["features_hsv"])}
            shots_S2 = np.round(frames_S2 * 1000 / FPS).astype(np.int32)
            unit = {n: x * np.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1, keepdims=True) for n, x in rows.items()}
            features = {name: torch.from_numpy(x.astype(np.float32)).half()[:, None] for name, x in unit.items()}
            valid = {name: torch.ones(len(shots_S2), dtype=torch.bool) for name in unit}
            writer.write(
                FilmRecord(path.parent.name, {"title": path.parent.name, "fps": FPS}, shots_S2, features, valid)
            )
        return writer.close()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lmp.downstream.real_data", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["movies", "open-films"])
    parser.add_argument("data", type=Path, metavar="DATA", help="holds condensed_movies, movieclip_labels, ovsd, lvu")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument(
        "--leave-out", action="append", default=[], type=Path, metavar="FILE", help="see `lmp tasks ids`"
    )
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        if arguments.what == "open-films":
            _say(write_open_films(arguments.data, arguments.out, overwrite=arguments.overwrite), arguments.out)
            return EXIT_DONE
        leave_out = LeaveOut.read(arguments.leave_out)
        movies = read_movies(arguments.data, leave_out)
        for name, splits, without in (("pretrain", ["train"], leave_out), ("tasks", ["train", "val", "test"], None)):
            folder = arguments.out / name
            manifest, refused = write_movies(
                movies, folder, splits=splits, leave_out=without, overwrite=arguments.overwrite
            )
            _say(manifest, folder, f", {refused} clips refused")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    return EXIT_DONE


def _say(manifest: Manifest, folder: Path, more: str = "") -> None:
    print(f"{manifest['films']} films, {manifest['shots']} shots{more} -> {folder}")


if __name__ == "__main__":
    sys.exit(main())
