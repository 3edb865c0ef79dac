"""Run a checkpoint over film shards and write features in the layout that a project reads.

    python -m tools.export_features RUN OUT SHARDS [SHARDS ...] --format FORMAT [--tokens NAME] [--stride SECONDS]

    OUT/...                the features, as FORMAT lays them out
    OUT/shots/KEY.json     per film: shots in milliseconds, which of them have the modality, rows, stride, fps
    OUT/features.json      what the rows are: tokens, layer, pooling, windows, stride, dtype, checkpoint, data

A row is a shot, or with `--stride` a step of that many seconds: the mean of the shots in it, weighted by how long each
lies in it. A film longer than `--window` shots is read in windows that overlap by `--overlap`; where two overlap they
part in the middle. A film's files appear whole or not at all. Started again, the command goes on with the films that
are not there yet; another checkpoint, other shards or other settings are refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmp.data.imports import tracked
from lmp.data.index import FilmIndex
from lmp.errors import UserError
from tools._feature_formats import FORMATS, Packing, write_npy
from tools._film_features import POOLINGS, Extraction, Extractor, FilmRows
from tools._output import add_source_arguments, new_file, run_command, write_json
from tools._source import Source, open_source

SIDECAR = "features.json"
STAGED = ".films"


def export(
    source: Source,
    index: FilmIndex,
    out: Path,
    *,
    layout: str,
    extraction: Extraction,
    folder_by: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write the features of every film of `index`.

    Args:
        source: the checkpoint, whole.
        index: the films.
        out: folder; what is there of the same export is kept.
        layout: a name of FORMATS.
        extraction: what is taken of the model's tokens.
        folder_by: a field of the films' records that names the subfolder of a film.
        device: that the model runs on.

    Returns:
        What features.json holds.

    Raises:
        UserError: settings that the model, the films or the format do not allow; `out` holds another export.
    """
    chosen = FORMATS[layout]
    chosen.check(stride=extraction.stride, pooling=extraction.pooling)
    if folder_by is not None and not chosen.folders:
        raise UserError(f"--folder-by {folder_by}: --format {layout} has no subfolders", remedy="leave it out")
    extractor = Extractor(source, index, extraction, device=device)
    settings = {
        "format": layout,
        **asdict(extraction),
        "folder_by": folder_by,
        "data_digest": index.digest,
        **{f"model_{name}": value for name, value in asdict(source.origin).items() if name != "finished"},
    }
    found = _begun(out, settings)
    if found is None:
        out.mkdir(parents=True, exist_ok=True)
        found = {**settings, "encoders": source.preprocessing()["encoders"], "finished": False}
        write_json(out / SIDECAR, found)
    if found["finished"]:
        shutil.rmtree(out / STAGED, ignore_errors=True)
        return found
    folder = out / STAGED if chosen.write is None else out
    try:
        _write_films(extractor, out, chosen.write or write_npy, folder, folder_by)
    except UserError:
        if not (out / "shots").exists():  # not a film was written
            shutil.rmtree(out)
        raise
    name = f"lmp-{extraction.tokens}_{'shot' if extraction.stride is None else f'{extraction.stride:g}'}"
    if chosen.pack is not None:
        chosen.pack(Packing(staged=folder, shots=out / "shots", out=out, name=name, keys=index.keys))
    found["largest_difference"] = _difference(extractor, out, layout, name, folder_by)
    found |= {"finished": True, "films": len(index), "shots": int(index.shots.sum())}
    with new_file(out / SIDECAR) as path:
        write_json(path, found)
    # Last: an export that goes on needs the films that it takes for done.
    shutil.rmtree(out / STAGED, ignore_errors=True)
    return found


def _write_films(
    extractor: Extractor, out: Path, write: Callable[[FilmRows, Path], None], folder: Path, folder_by: str | None
) -> None:
    """Every film that has no sidecar yet, which is written last."""
    for number, key in tracked(list(enumerate(extractor.index.keys)), "extracting features"):
        if (out / "shots" / f"{key}.json").is_file():
            continue
        film = extractor.film(number)
        write(film, _subfolder(folder, film, folder_by))
        with new_file(out / "shots" / f"{key}.json") as path:
            path.write_text(json.dumps(_shots(film)), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    layouts = "; ".join(f"{name}: {layout.what}" for name, layout in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tools.export_features",
        description="Run a checkpoint over film shards and write features in the layout that a project reads.",
        epilog=f"formats: {layouts}",
    )
    add_source_arguments(parser, part=False)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; begun exports go on")
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="folders or URLs of shards")
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="see below")
    parser.add_argument("--tokens", default="joined", help="a modality, cross_modal, or joined (default): all of them")
    parser.add_argument("--layer", type=int, help="output of this block, from 0; default: of the last, after its norm")
    parser.add_argument("--pooling", default="mean", choices=POOLINGS, help="of the K tokens of a shot; default: mean")
    parser.add_argument("--stride", type=float, metavar="SECONDS", help="a row every SECONDS; default: a row per shot")
    parser.add_argument("--window", type=int, help="shots the model sees at once; default: as in training")
    parser.add_argument("--overlap", type=int, help="shots that two windows share; default: a quarter of the window")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"])
    parser.add_argument("--folder-by", metavar="FIELD", help="field of the film's record that names its subfolder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return run_command(_command, parser, argv)


def _command(arguments: argparse.Namespace) -> str:
    source = open_source(arguments.run, step=arguments.step, allow_unfinished=arguments.allow_unfinished)
    window = arguments.window
    if window is None:
        window = source.preprocessing()["window_shots"]
    if window is None:
        raise UserError(f"{source.trained.path}: names no window", remedy="give --window")
    extraction = Extraction(
        tokens=arguments.tokens,
        layer=arguments.layer,
        pooling=arguments.pooling,
        window=window,
        overlap=arguments.overlap if arguments.overlap is not None else window // 4,
        stride=arguments.stride,
        dtype=arguments.dtype,
    )
    found = export(
        source,
        FilmIndex.load(arguments.shards),
        arguments.out,
        layout=arguments.format,
        extraction=extraction,
        folder_by=arguments.folder_by,
        device=arguments.device,
    )
    return (
        f"{arguments.out}: {found['films']} films, {found['shots']} shots, "
        f"largest difference from the model's fp32 rows {found['largest_difference']:.3g}"
    )


def _begun(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What features.json says of the same export; None where there is nothing yet.

    Raises:
        UserError: another export, or other files, are there.
    """
    file = out / SIDECAR
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists and is no export of features", remedy="name another folder")
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    changed = [f"{key} was {found.get(key)!r}, is {value!r}" for key, value in now.items() if found.get(key) != value]
    if changed:
        raise UserError(f"{out}: holds another export: {changed[0]}", remedy="name another folder")
    return found


def _subfolder(folder: Path, film: FilmRows, folder_by: str | None) -> Path:
    if folder_by is None:
        return folder
    value = film.info.get(folder_by)
    name = str(value)
    if value is None or Path(name).name != name or name in ("shots", ".", ".."):
        raise UserError(
            f"film {film.key}: its record's {folder_by} is {value!r}, which names no folder",
            remedy="name a field that every film has",
        )
    return folder / name


def _shots(film: FilmRows) -> dict[str, Any]:
    return {
        "shots_ms": film.shots_S2.tolist(),
        "valid": film.valid_S.tolist(),
        "rows": len(film.rows),
        "stride": film.stride,
        "filled": film.filled,
        "fps": film.info.get("fps"),
    }


def _difference(extractor: Extractor, out: Path, layout: str, name: str, folder_by: str | None) -> float:
    """The largest difference of the first film's rows, read back as their users do, from the model's rows in fp32."""
    exact = extractor.film(0, dtype="float32")
    folder = _subfolder(out, exact, folder_by) if folder_by else out
    rows = FORMATS[layout].read(folder, exact.key, name)
    if rows.shape != exact.rows.shape:
        raise UserError(f"{out}: film {exact.key} reads back as {rows.shape}", remedy="check the disk, and repeat")
    return float(np.abs(rows.astype(np.float64) - exact.rows.astype(np.float64)).max())


if __name__ == "__main__":
    sys.exit(main())
