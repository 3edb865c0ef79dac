"""Export a run as a folder that plain transformers loads.

    python -m tools.export_huggingface RUN OUT [--step N] [--with-heads] [--allow-unfinished] [--overwrite]

    OUT/model.safetensors      fp32 weights
    OUT/config.json            configuration; `auto_map` names the remote code
    OUT/*.py                   copies of the model's files: what trained is what ships
    OUT/preprocessing.json     how the base features were made
    OUT/fingerprint.json       where the weights come from, sha256 of every tensor
    OUT/README.md              model card, with the difference that was measured

OUT appears whole or not at all, and only after it was loaded in a process without lmp and gave the training
model's outputs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import lmp.model
from lmp.errors import EXIT_DONE, EXIT_USER, UserError
from lmp.model import LmpForPretraining
from lmp.train.checkpoint import TrainedModel, load_trained
from tools._card import Origin, card
from tools._parity import Proof, check_tensors, digests, prove

CODE_FILES = ("attention.py", "backends.py", "configuration_lmp.py", "modeling_lmp.py")
AUTO_MAP = {"AutoConfig": "configuration_lmp.LmpConfig", "AutoModel": "modeling_lmp.LmpModel"}
HEADS_AUTO_MAP = {**AUTO_MAP, "AutoModelForPreTraining": "modeling_lmp.LmpForPretraining"}


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
    with_heads: bool = False,
    allow_unfinished: bool = False,
    overwrite: bool = False,
    license_name: str = "unknown",
) -> Exported:
    """Write `out` from the newest checkpoint of `run` (or that of `step`).

    Args:
        with_heads: export LmpForPretraining instead of LmpModel.
        allow_unfinished: take a run without its DONE mark too.
        overwrite: replace `out` if it is an earlier export.
        license_name: license of the weights, for the card.

    Raises:
        UserError: no such run or step, not finished, `out` exists, damaged weights, or the folder is not the
            training model. `out` is then as it was before.
    """
    out = out.absolute()
    _check_out(out, overwrite=overwrite)
    trained = load_trained(run, step=step, require_finished=not allow_unfinished)
    model = _training_model(trained)
    origin = _origin(run, trained, license_name)
    partial = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made ({error.strerror})", remedy="name another folder") from error
    try:
        parameters, proof = _write(partial, model, trained, origin, with_heads=with_heads)
        _publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Exported(out, trained.step, parameters, proof)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.export_huggingface", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest")
    parser.add_argument("--with-heads", action="store_true", help="keep the heads of pretraining")
    parser.add_argument("--allow-unfinished", action="store_true", help="take a run without its DONE mark")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at OUT")
    parser.add_argument("--license", default="unknown", help="license of the weights, for the card")
    args = parser.parse_args(argv)
    try:
        exported = export(
            args.run,
            args.out,
            step=args.step,
            with_heads=args.with_heads,
            allow_unfinished=args.allow_unfinished,
            overwrite=args.overwrite,
            license_name=args.license,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    print(
        f"{exported.path}: step {exported.step}, {exported.parameters:,} parameters, "
        f"largest difference from the training model {exported.proof.difference:.3g}"
    )
    return EXIT_DONE


def _check_out(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out}: exists", remedy="name another folder, or pass --overwrite")
    if not (out / "fingerprint.json").is_file():
        raise UserError(f"{out}: exists and is not an export", remedy="name another folder")


def _training_model(trained: TrainedModel) -> LmpForPretraining:
    """The model as it was trained, with its tensors held against the checkpoint's."""
    model = LmpForPretraining(trained.config).float()
    check_tensors(trained.weights, model.state_dict(), source=str(trained.path))
    model.load_state_dict(trained.weights, strict=True)
    return model.requires_grad_(False)


def _write(
    folder: Path, model: LmpForPretraining, trained: TrainedModel, origin: Origin, *, with_heads: bool
) -> tuple[int, Proof]:
    """Write and prove all files; returns the number of parameters and the proof."""
    prefix = "" if with_heads else "lmp."
    weights = {
        name.removeprefix(prefix): tensor.contiguous()
        for name, tensor in trained.weights.items()
        if name.startswith(prefix)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    before, after = digests(weights), digests(load_file(folder / "model.safetensors"))
    if before != after:
        names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        raise UserError(f"model.safetensors: {names[0]} was not written as it is", remedy="check the disk, and repeat")
    _write_config(folder, trained, with_heads=with_heads)
    # safetensors makes its file readable by the owner alone.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    _copy_code(folder)
    auto_class = "AutoModelForPreTraining" if with_heads else "AutoModel"
    proof = prove(folder, model=model, prefix=prefix, auto_class=auto_class)
    parameters = sum(numel for numel, _ in before.values())
    preprocessing = _preprocessing(trained)
    _write_json(folder / "preprocessing.json", preprocessing)
    _write_json(
        folder / "fingerprint.json",
        {
            **asdict(origin),
            "largest_difference": proof.difference,
            "differences": proof.per_output,
            "versions": {"torch": torch.__version__, "transformers": proof.transformers},
            "tensors": {name: {"numel": numel, "sha256": digest} for name, (numel, digest) in before.items()},
        },
    )
    text = card(trained.config, origin, proof, encoders=preprocessing["encoders"], parameters=parameters)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return parameters, proof


def _write_config(folder: Path, trained: TrainedModel, *, with_heads: bool) -> None:
    config = type(trained.config).from_dict(trained.config.to_dict())
    config.architectures = ["LmpForPretraining" if with_heads else "LmpModel"]
    config.auto_map = HEADS_AUTO_MAP if with_heads else AUTO_MAP
    config.save_pretrained(folder)


def _copy_code(folder: Path) -> None:
    source = Path(lmp.model.__file__).parent
    for name in CODE_FILES:
        shutil.copyfile(source / name, folder / name)


def _preprocessing(trained: TrainedModel) -> dict[str, Any]:
    """How the features that the model expects are made, as the training shards recorded it."""
    data = trained.manifest["data"]
    return {
        "modalities": {name: data["modalities"][name] for name in trained.config.modalities},
        "encoders": {name: data["encoders"].get(name) for name in trained.config.modalities},
        "shape": "features[NAME]: [shots, tokens, width]; one row per shot, in film order",
        "missing": "valid[NAME] is False where the shot lacks the modality; its row may hold anything",
        "times": "seconds from the start of the film to the start of the shot",
    }


def _origin(run: Path, trained: TrainedModel, license_name: str) -> Origin:
    data = trained.manifest.get("data", {})
    lacking = [key for key in ("digest", "encoders", "modalities") if key not in data]
    lacking += [f"modalities.{m}" for m in trained.config.modalities if m not in data.get("modalities", {})]
    if lacking:
        raise UserError(
            f"{trained.path / 'manifest.json'}: lacks data.{lacking[0]}, so the features cannot be described",
            remedy="export a checkpoint that `lmp train` wrote",
        )
    code_file = run / "code.json"
    code = json.loads(code_file.read_text(encoding="utf-8")) if code_file.is_file() else {}
    return Origin(
        run=run.resolve().name,
        step=trained.step,
        finished=trained.finished,
        shots_seen=trained.manifest.get("progress", {}).get("shots_seen"),
        data_digest=data["digest"],
        config_sha256=hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest(),
        commit=code.get("commit"),
        changed=bool(code.get("changed")),
        lmp=code.get("lmp"),
        license=license_name,
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _publish(partial: Path, out: Path) -> None:
    """Sync the files and rename the folder; an earlier export goes when the new one is in place."""
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if not out.exists():
        partial.replace(out)
        return
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    out.replace(old)
    partial.replace(out)
    shutil.rmtree(old)


if __name__ == "__main__":
    sys.exit(main())
