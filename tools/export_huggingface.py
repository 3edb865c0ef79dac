"""Export a run as a folder that plain transformers loads.

    python -m tools.export_huggingface RUN OUT [--part NAME | --with-heads] [--step N] [--overwrite]

    OUT/model.safetensors      fp32 weights
    OUT/config.json            configuration; `auto_map` names the remote code
    OUT/*.py                   copies of the model's files: what trained is what ships
    OUT/preprocessing.json     how the base features were made
    OUT/fingerprint.json       where the weights come from, numel and sha256 of every tensor, which ones are tied
    OUT/README.md              model card, with the difference that was measured

OUT appears whole or not at all, and only after it was loaded in a process without lmp and gave the training
model's outputs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools._card import card
from tools._folder import write_model
from tools._output import MARK, add_source_arguments, check_folder, new_folder, run_command, write_json
from tools._parity import Proof, fingerprint, prove
from tools._source import Source, open_source


@dataclass(frozen=True)
class Exported:
    """The folder that was written, and how near it is to the training model."""

    path: Path
    step: int
    parameters: int
    proof: Proof


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    part: str | None = None,
    with_heads: bool = False,
    allow_unfinished: bool = False,
    overwrite: bool = False,
    license_name: str = "unknown",
) -> Exported:
    """Write `out` from the newest checkpoint of `run` (or that of `step`).

    Args:
        part: export one modality's contextual transformer (its name), or "cross_modal", instead of the whole trunk.
        with_heads: export LmpForPretraining instead of LmpModel.
        allow_unfinished: take a run without its DONE mark too.
        overwrite: replace `out` if it is an earlier export.
        license_name: license of the weights, for the card.

    Raises:
        UserError: no such run, step or part, not finished, `out` exists, damaged weights, or the folder is not the
            training model. `out` is then as it was before.
    """
    out = out.absolute()
    check_folder(out, overwrite=overwrite)
    source = open_source(
        run,
        step=step,
        part=part,
        with_heads=with_heads,
        allow_unfinished=allow_unfinished,
        license_name=license_name,
    )
    with new_folder(out) as folder:
        write_model(folder, source, source.weights)
        proof = prove(folder, source)
        _describe(folder, source, proof)
    return Exported(out, source.trained.step, _parameters(source), proof)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export_huggingface", description="Export a run as a folder that plain transformers loads."
    )
    add_source_arguments(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at OUT")
    parser.add_argument("--license", default="unknown", help="license of the weights, for the card")
    return run_command(_command, parser, argv)


def _command(arguments: argparse.Namespace) -> str:
    exported = export(
        arguments.run,
        arguments.out,
        step=arguments.step,
        part=arguments.part,
        with_heads=arguments.with_heads,
        allow_unfinished=arguments.allow_unfinished,
        overwrite=arguments.overwrite,
        license_name=arguments.license,
    )
    return (
        f"{exported.path}: step {exported.step}, {exported.parameters:,} parameters, "
        f"largest difference from the training model {exported.proof.difference:.3g}"
    )


def _describe(folder: Path, source: Source, proof: Proof) -> None:
    """Write preprocessing.json, fingerprint.json and the card."""
    write_json(folder / "preprocessing.json", source.preprocessing())
    write_json(folder / MARK, fingerprint(source, proof.per_output) | {"transformers": proof.transformers})
    text = card(source, proof, parameters=_parameters(source))
    (folder / "README.md").write_text(text, encoding="utf-8")


def _parameters(source: Source) -> int:
    """Parameters, tied ones counted once."""
    return sum(numel for name, (numel, _) in source.digests.items() if name not in source.ties)


if __name__ == "__main__":
    sys.exit(main())
