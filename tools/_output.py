"""How converters write: files and folders that appear whole or not at all, and one line for what went wrong."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmp.errors import EXIT_DONE, EXIT_USER, UserError

MARK = "fingerprint.json"
"""The file that every exported folder has."""


def add_source_arguments(parser: argparse.ArgumentParser, *, part: bool = True) -> None:
    """What every exporter of a run takes."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest")
    parser.add_argument("--allow-unfinished", action="store_true", help="take a run without its DONE mark")
    if part:
        parser.add_argument("--part", metavar="NAME", help="one modality's contextual transformer, or cross_modal")
        parser.add_argument("--with-heads", action="store_true", help="keep the heads of pretraining")


def run_command(command: Callable[[argparse.Namespace], str], parser: argparse.ArgumentParser, argv: Any) -> int:
    """Parse, run, print the one line that the command gives; returns the exit code."""
    arguments = parser.parse_intermixed_args(argv)
    try:
        said = command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    print(said)
    return EXIT_DONE


def check_folder(out: Path, *, overwrite: bool) -> None:
    """Raises UserError if `out` is there and may not be replaced."""
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out}: exists", remedy="name another folder, or pass --overwrite")
    if not (out / MARK).is_file():
        raise UserError(f"{out}: exists and is not an export", remedy="name another folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends it is synced and becomes `out`, and if it fails it is gone.

    Raises:
        UserError: it cannot be made.
    """
    out = out.absolute()
    partial = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made ({error.strerror})", remedy="name another folder") from error
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                sync(file)
        if out.exists():
            old = out.with_name(out.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            out.replace(old)
            partial.replace(out)
            shutil.rmtree(old)
        else:
            partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """The path of a file to write; when the block ends it is synced and becomes `out`, and if it fails it is gone.

    Raises:
        UserError: its folder cannot be made.
    """
    partial = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise UserError(f"{partial}: cannot be made ({error.strerror})", remedy="name another file") from error
    try:
        yield partial
        sync(partial)
        partial.replace(out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Indented, in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(file: Path) -> None:
    """Have a file's bytes on the disk."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def listed(faults: Sequence[str], most: int = 3) -> str:
    """The first of many, and how many more."""
    more = f" and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more
