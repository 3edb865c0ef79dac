"""`lmp data index` and `lmp data import`: shards from what others wrote."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmp.data.progress import bytes_bar
from lmp.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    import numpy as np


def register(data: Any) -> None:
    """Add the commands to the subparsers of `lmp data`."""
    index = data.add_parser("index", help="make the index files and manifest of tars that others wrote")
    index.add_argument("folder", metavar="FOLDER", help="holds tars of KEY.json and KEY.safetensors per film")
    index.add_argument(
        "--hash", action="store_true", help="read every byte once, for checksums and a look at the values"
    )
    index.add_argument("--overwrite", action="store_true", help="replace the manifest that is there")
    index.set_defaults(run=_index)

    imports = data.add_parser(
        "import", help="make shards of features stored as npy, h5, pt, or one tar sample per shot"
    )
    imports.add_argument("out", metavar="OUT", type=Path, help="folder of the new shards")
    imports.add_argument(
        "--feature",
        action="append",
        default=[],
        required=True,
        metavar="NAME=SOURCE",
        help="modality and its features: a folder of KEY.npy, or FILE.h5; with --tars the type of a member: video.npy",
    )
    imports.add_argument(
        "--shots", type=Path, metavar="FOLDER", help="a shot list per film, or KEY.npy in milliseconds"
    )
    imports.add_argument("--fps", type=float, help="turns the frames of shot lists into time")
    imports.add_argument(
        "--stride",
        action="append",
        default=[],
        metavar="NAME=STEP",
        help="rows of NAME come at a fixed rate, every 0.96 (seconds) or 16f (frames): each shot gets their mean",
    )
    imports.add_argument(
        "--suffix",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="files and data sets of NAME are called KEYTEXT, as KEY_vggish.npy",
    )
    imports.add_argument("--tars", nargs="+", type=Path, metavar="TAR", help="tars of one sample per shot, or folders")
    imports.add_argument(
        "--film-pattern",
        metavar="REGEX",
        help="finds film and shot in a sample's key (default: (?P<film>.+)_(?P<shot>\\d+))",
    )
    imports.add_argument("--first-shot", type=int, choices=[0, 1], help="number of a film's first shot in --tars")
    imports.add_argument(
        "--dtype", choices=["float16", "bfloat16"], help="to store (default: float16, bfloat16 as it is)"
    )
    imports.add_argument("--encoders", type=Path, metavar="FILE.json", help="NAME -> what made the features")
    imports.add_argument("--allow-missing", action="store_true", help="mark what is missing as invalid")
    imports.add_argument(
        "--leave-out",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="ids of films not to import, one a line",
    )
    imports.add_argument("--films-per-shard", type=int, default=64)
    imports.add_argument("--overwrite", action="store_true")
    imports.set_defaults(run=_import)


def _index(arguments: argparse.Namespace) -> int:
    from lmp.data.indexer import index_folder
    from lmp.data.storage import is_url

    folder = arguments.folder
    total = 0 if is_url(folder) else sum(p.stat().st_size for p in Path(folder).glob("*.tar"))
    with bytes_bar("index", total) as progress:
        manifest = index_folder(folder, read_all=arguments.hash, overwrite=arguments.overwrite, progress=progress)
    print(f"{manifest['films']} films, {manifest['shots']} shots in {len(manifest['shards'])} shards")
    if manifest["quarantined"]:
        print(f"{len(manifest['quarantined'])} films stay quarantined")
    print(f"digest {manifest['digest']}")
    return EXIT_DONE


def _import(arguments: argparse.Namespace) -> int:
    import torch

    from lmp.data.grids import Grid
    from lmp.data.import_tars import FILM_PATTERN, Feature, Naming, import_tars
    from lmp.data.imports import ShotLists, Target, import_films
    from lmp.data.leave_out import LeaveOut

    features = _named("--feature", arguments.feature, "SOURCE")
    suffixes, strides = _named("--suffix", arguments.suffix, "TEXT"), _named("--stride", arguments.stride, "STEP")
    if unknown := [name for name in (*suffixes, *strides) if name not in features]:
        raise UserError(f"--stride or --suffix of {unknown[0]}", remedy="name a modality that --feature names")
    if arguments.tars and (suffixes or strides):
        raise UserError("--stride and --suffix with --tars", remedy="leave them out: such tars hold a sample per shot")
    _check_local(
        [arguments.out, *(arguments.tars or []), arguments.shots, *([] if arguments.tars else features.values())]
    )
    if arguments.fps is not None and not arguments.fps > 0:
        raise UserError(f"--fps {arguments.fps}", remedy="give frames per second, more than 0")
    if arguments.shots is not None and not arguments.shots.is_dir():
        raise UserError(f"--shots {arguments.shots} is not a folder", remedy="give a folder with a list per film")
    target = Target(
        folder=arguments.out,
        encoders=_encoders(arguments.encoders),
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        allow_missing=arguments.allow_missing,
        films_per_shard=arguments.films_per_shard,
        overwrite=arguments.overwrite,
        leave_out=LeaveOut.read(arguments.leave_out),
    )
    shots = ShotLists(arguments.shots, arguments.fps, _read_list) if arguments.shots is not None else None
    if arguments.tars:
        members = {name: Feature.parse(source) for name, source in features.items()}
        naming = Naming.parse(arguments.film_pattern or FILM_PATTERN, arguments.first_shot)
        manifest = import_tars(target, arguments.tars, members, naming=naming, shots=shots)
    elif shots is None:
        raise UserError("no shots are given", remedy="give --shots FOLDER with a list per film")
    else:
        manifest = import_films(
            target,
            {name: Path(source) for name, source in features.items()},
            shots,
            grids={name: Grid.parse(word) for name, word in strides.items()},
            suffixes=suffixes,
        )
    print(f"{manifest['films']} films, {manifest['shots']} shots -> {arguments.out}")
    if target.leave_out is not None:
        print(f"{len(target.refused)} films refused, being on {', '.join(target.leave_out.files)}")
    for name, count in manifest["cleared"].items():
        if count:
            print(f"{name}: {count} shots held NaN or infinity and are marked as lacking it")
    return EXIT_DONE


def _named(option: str, words: list[str], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option} {word}: is not NAME={what}", remedy=f"write for example {option} video={what}")
        if name in found:
            raise UserError(f"{option} {name} is given twice", remedy="give every modality once")
        found[name] = value
    return found


def _check_local(locations: list[Any]) -> None:
    for location in locations:
        # Path turns s3://x into s3:/x.
        if location is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(location)):
            raise UserError(f"{location} is a URL", remedy="import works on local files: copy them here first")


def _encoders(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}", remedy="give a JSON file that is there") from error
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise UserError(f"{path} does not hold an object per modality", remedy='write {"video": {"name": "..."}}')
    return found


def _read_list(folder: Path, key: str, fps: float | None) -> np.ndarray | None:
    """The shot list of a film, None if the folder has none; see imports.ReadList."""
    from lmp.films.shots import find_shot_list, read_shot_list

    try:
        path = find_shot_list(folder, Path(key))
    except UserError:
        return None
    if fps is not None:
        return read_shot_list(path, fps)
    try:
        return read_shot_list(path, math.nan)  # which only frames would use
    except UserError:
        read_shot_list(path, 25.0)
        raise UserError(f"the shot list {path} counts frames", remedy="give --fps") from None
