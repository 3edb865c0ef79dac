"""Export a run's weights as one file, named as other code bases want them.

    python -m tools.export_state_dict RUN OUT.safetensors [--part NAME | --with-heads] [--strip TEXT] [--prefix TEXT]
    python -m tools.export_state_dict RUN OUT.pt [the same] [--wrap KEY]

    OUT          the tensors, fp32; a .pt holds only tensors and plain values, so weights_only=True loads it
    OUT.json     where they come from; numel, sha256 and the model's own name of every tensor; ties

`--strip` and `--prefix` change the beginning of names, as in `backbone.` of mmlab's code. `--wrap state_dict` gives
{"state_dict": ..., "meta": ...} instead of the bare dict that LVU's code loads.

OUT appears only after it was read back, and the model made of what was read, in a process without lmp, gave the
training model's outputs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmp.errors import UserError
from tools._folder import write_model
from tools._output import add_source_arguments, listed, new_file, run_command, write_json
from tools._parity import Proof, different, fingerprint, prove
from tools._source import Source, digests, open_source

SAFETENSORS = ".safetensors"
PICKLED = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Naming:
    """How tensors are named in the file.

    Attributes:
        strip: taken off the beginning of the names that have it.
        prefix: put before every name, after that.
        wrap: key under which the dict lies, beside "meta"; None for the bare dict.
    """

    strip: str = ""
    prefix: str = ""
    wrap: str | None = None

    def rename(self, names: Sequence[str]) -> dict[str, str]:
        """Name -> its name in the file.

        Raises:
            UserError: no name begins with `strip`, or two names become one.
        """
        if self.strip and not any(name.startswith(self.strip) for name in names):
            raise UserError(
                f"--strip {self.strip}: no tensor's name begins so",
                remedy=f"give the beginning of a name such as {names[0]}",
            )
        renamed = {name: self.prefix + name.removeprefix(self.strip) for name in names}
        if "" in renamed.values() or len(set(renamed.values())) < len(names):
            raise UserError(f"--strip {self.strip}: two tensors would have one name", remedy="strip less")
        return renamed


def export(run: Path, out: Path, *, naming: Naming | None = None, overwrite: bool = False, **which: Any) -> Proof:
    """Write `out` and `out`.json from a checkpoint of `run`.

    Args:
        run: a run folder.
        out: the file; its suffix decides the format.
        naming: of the tensors in the file; None keeps the model's names.
        overwrite: replace `out` if it is there.
        which: step, part, with_heads, allow_unfinished; see `open_source`.

    Raises:
        UserError: as `open_source`; another suffix, `out` is there, names that do not fit, or the file is not the
            training model.
    """
    naming = naming or Naming()
    _check_out(out, naming, overwrite=overwrite)
    source = open_source(run, **which)
    names = naming.rename(list(source.weights))
    described = out.with_name(out.name + ".json")
    with new_file(described) as sidecar, new_file(out) as file:
        _save(file, out.suffix, {names[name]: tensor for name, tensor in source.weights.items()}, source, naming)
        found = _load(file, out.suffix, naming.wrap)
        back = {given: name for name, given in names.items()}
        found = {back.get(given, given): tensor for given, tensor in found.items()}
        if faults := different(source.digests, digests(found)):
            raise UserError(f"{out}: was not written as it is: {listed(faults)}", remedy="check the disk, and repeat")
        with tempfile.TemporaryDirectory() as scratch:
            # What was read back, as a folder that a process without lmp can load.
            write_model(Path(scratch), source, found)
            proof = prove(Path(scratch), source)
        facts = fingerprint(source, proof.per_output)
        for name, tensor in facts["tensors"].items():
            tensor["name"] = name
        facts["tensors"] = {names[name]: tensor for name, tensor in facts["tensors"].items()}
        facts["ties"] = {names[name]: names[first] for name, first in facts["ties"].items()}
        write_json(sidecar, facts | {"naming": asdict(naming)})
        # Both are private or public together.
        file.chmod(sidecar.stat().st_mode)
    return proof


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export_state_dict", description="Export a run's weights as one file."
    )
    add_source_arguments(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help=f"file to write: {SAFETENSORS} or {', '.join(PICKLED)}")
    parser.add_argument("--strip", default="", metavar="TEXT", help="take TEXT off the beginning of names")
    parser.add_argument("--prefix", default="", metavar="TEXT", help="put TEXT before every name, as in backbone.")
    parser.add_argument("--wrap", metavar="KEY", help='write {KEY: ..., "meta": ...}; .pt only')
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    return run_command(_command, parser, argv)


def _command(arguments: argparse.Namespace) -> str:
    proof = export(
        arguments.run,
        arguments.out,
        naming=Naming(arguments.strip, arguments.prefix, arguments.wrap),
        overwrite=arguments.overwrite,
        step=arguments.step,
        part=arguments.part,
        with_heads=arguments.with_heads,
        allow_unfinished=arguments.allow_unfinished,
    )
    return f"{arguments.out}: largest difference from the training model {proof.difference:.3g}"


def _check_out(out: Path, naming: Naming, *, overwrite: bool) -> None:
    if out.suffix not in (SAFETENSORS, *PICKLED):
        raise UserError(f"{out}: suffix {out.suffix!r} names no format", remedy=f"end it in {SAFETENSORS} or .pt")
    if naming.wrap is not None and out.suffix == SAFETENSORS:
        raise UserError(f"--wrap {naming.wrap}: safetensors has no nesting", remedy="write a .pt, or leave it out")
    if naming.wrap in ("", "meta"):
        raise UserError(f"--wrap {naming.wrap!r} cannot be the key", remedy="give another, such as state_dict")
    if out.is_dir():
        raise UserError(f"{out}: is a folder", remedy="name a file")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists", remedy="name another file, or pass --overwrite")


def _save(file: Path, suffix: str, tensors: dict[str, Tensor], source: Source, naming: Naming) -> None:
    if suffix == SAFETENSORS:
        save_file(tensors, file, metadata={"format": "pt"})
    elif naming.wrap is None:
        torch.save(tensors, file)
    else:
        meta = {**asdict(source.origin), "part": source.part, "config": source.config.to_dict()}
        torch.save({naming.wrap: tensors, "meta": meta}, file)


def _load(file: Path, suffix: str, wrap: str | None) -> Mapping[str, Tensor]:
    if suffix == SAFETENSORS:
        return load_file(file)
    found = torch.load(file, map_location="cpu", weights_only=True)
    return found if wrap is None else found[wrap]


if __name__ == "__main__":
    sys.exit(main())
