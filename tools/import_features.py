"""Features made elsewhere, and a shot list per film, become shards.

    python -m tools.import_features SHARDS --feature NAME=SOURCE [--stride NAME=STEP] --shots FOLDER [...]
    python -m tools.import_features SHARDS --video-features NAME=FOLDER:FEATURE[:STEP] --shots FOLDER [...]

This is `lmp data import`, whose options it takes, for features that do not come one row per shot: npy per film and
modality, or one HDF5 file with a data set per film, at a fixed rate. Each shot gets the mean of the rows that meet it,
weighted by how long they do; a shot that none meets lacks the modality.

`--video-features` reads what video_features writes, FOLDER/KEY_FEATURE.npy. The step of vggish is 0.96 s. That of
others is their step size over the rate that frames were taken at: give it as seconds, or as frames (16f) with --fps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lmp import cli
from lmp.errors import EXIT_USER, UserError

KNOWN_STEPS = {"vggish": "0.96"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    # It knows one option of its own; all others, and the rest of the help, are those of `lmp data import`.
    parser = argparse.ArgumentParser(prog="python -m tools.import_features", add_help=False, allow_abbrev=False)
    parser.add_argument("--video-features", action="append", default=[])
    arguments, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(__doc__)
    try:
        for word in arguments.video_features:
            rest += expand(word)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    return cli.main(["data", "import", *rest])


def expand(word: str) -> list[str]:
    """NAME=FOLDER:FEATURE[:STEP] in the options of `lmp data import`.

    Raises:
        UserError: it is not of that form, or the step is not known.
    """
    name, _, source = word.partition("=")
    folder, *rest = source.split(":")
    if not (name and folder and len(rest) in (1, 2) and all(rest)):
        raise UserError(
            f"--video-features {word}: is not NAME=FOLDER:FEATURE or NAME=FOLDER:FEATURE:STEP",
            remedy="write for example --video-features audio=FOLDER:vggish",
        )
    feature = rest[0]
    step = rest[1] if len(rest) == 2 else KNOWN_STEPS.get(feature)
    if step is None:
        raise UserError(
            f"--video-features {word}: the step of {feature} is not known",
            remedy=f"give it, as {name}={folder}:{feature}:16f or in seconds",
        )
    return ["--feature", f"{name}={folder}", "--suffix", f"{name}=_{feature}", "--stride", f"{name}={step}"]


if __name__ == "__main__":
    sys.exit(main())
