"""Begin a run with the weights of a folder that transformers loads.

    python -m tools.import_huggingface FOLDER RUN --config CONFIG.yaml [a.b=c ...] [--positions interpolate|keep]
    lmp train CONFIG.yaml --run RUN [a.b=c ...]

FOLDER holds config.json and model.safetensors, as `tools.export_huggingface` writes them, also after fine-tuning. RUN
becomes a run folder with a checkpoint of step 0: the weights, no moments, the data at its beginning. `lmp train` goes
on from there with the schedule of CONFIG.yaml.

Heads of pretraining that FOLDER lacks begin anew, from the configuration's seed. Where learned positions are more or
fewer in CONFIG.yaml, `--positions keep` keeps the rows that there are and begins further ones as a new model's, and
`--positions interpolate` stretches the table. Other positions are not stored, so any length works as it is.

RUN appears only after its checkpoint was read back and gave FOLDER's outputs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lmp.config import Config, load_config
from lmp.errors import UserError
from lmp.model import LmpConfig, LmpForPretraining
from lmp.train.checkpoint import Progress, folder_of, load_trained, verify, write_manifest
from lmp.train.checkpoint_writer import Snapshot, file_name
from lmp.train.data import data_facts, load_index, plan_settings
from lmp.train.run_folder import RunFolder, code_state
from lmp.train.trainer import model_config
from lmp.train.zero_state import PARTS, Piece
from tools._isolated_load import named_tensors
from tools._output import listed, new_folder, run_command, write_json
from tools._parity import compare
from tools._source import aliases, check_tensors, fixed_input

POSITIONS = ("interpolate", "keep")
TABLE = "lmp.positions.weight"
SAME = (
    "modalities",
    "modality_order",
    "target",
    "sources",
    "width",
    "heads",
    "mlp_ratio",
    "cross_layers",
    "positions",
    "rope_base",
    "norm_eps",
)
"""What of a configuration decides what the weights mean; heads add the two of HEADS_SAME."""
HEADS_SAME = ("contrastive_width", "contrastive_loss", "minimum_temperature")


def import_folder(source: Path, run: Path, config: Config, *, positions: str | None = None) -> dict[str, Any]:
    """Write `run`.

    Args:
        source: folder of config.json and safetensors.
        run: the new run folder.
        config: of the run that is to begin.
        positions: "interpolate" or "keep", where the learned tables differ in length.

    Returns:
        What RUN/imported.json holds.

    Raises:
        UserError: `run` is there; `source` is no such folder, or of another shape than `config` and its data.
    """
    run = run.absolute()
    if run.exists():
        raise UserError(f"{run}: exists", remedy="name another folder")
    theirs = _read_config(source)
    index = load_index(config)
    mine = model_config(config, index)
    weights = _read_weights(source)
    with_heads = theirs.architectures == ["LmpForPretraining"]
    _check_same(source, theirs, mine, with_heads=with_heads)
    data = data_facts(index, plan_settings(config, index))
    _check_encoders(source, data["encoders"])
    if not with_heads:
        weights = {f"lmp.{name}": tensor for name, tensor in weights.items()}
    model, how = _model(weights, theirs, mine, config.seed, positions, source, with_heads=with_heads)
    with new_folder(run) as partial:
        folder = RunFolder(partial)
        folder.open(config)
        facts = {
            "config": config.model_dump(mode="json"),
            "model": mine.to_dict(),
            "data": data,
            "code": code_state(),
        }
        path = _write_checkpoint(folder, model, Progress(0, _first(index, config), 0, 0), facts)
        if faults := verify(path):
            raise UserError(f"{run}: was not written as it is: {listed(faults)}", remedy="check the disk, and repeat")
        stored = LmpForPretraining(mine)
        stored.load_state_dict(load_trained(partial).weights, strict=True)
        told = {
            "from": source.resolve().name,
            "config_sha256": hashlib.sha256((source / "config.json").read_bytes()).hexdigest(),
            "heads": "imported" if with_heads else "begun anew",
            "positions": how,
            "differences": _prove(source, theirs, stored, with_heads=with_heads, bounded=how != "interpolated"),
        }
        write_json(partial / "imported.json", told)
        folder.note("imported", source=told["from"], heads=told["heads"], positions=how)
    return told


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_huggingface",
        description="Begin a run with the weights of a folder that transformers loads.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="config.json and model.safetensors")
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder to make; must not exist")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="over the configuration")
    parser.add_argument("--config", type=Path, required=True, help="of the run that is to begin")
    parser.add_argument("--positions", choices=POSITIONS, help="what to do where learned positions are more or fewer")
    return run_command(_command, parser, argv)


def _command(arguments: argparse.Namespace) -> str:
    config = load_config(arguments.config, arguments.overrides)
    told = import_folder(arguments.folder, arguments.run, config, positions=arguments.positions)
    worst = max(told["differences"].values())
    return (
        f"{arguments.run}: step 0 with the weights of {told['from']}; heads {told['heads']}, positions "
        f"{told['positions']}; largest difference {worst:.3g}"
    )


def _read_config(source: Path) -> LmpConfig:
    file = source / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__})", remedy="give an exported folder") from error
    if not isinstance(found, dict) or found.get("model_type") != LmpConfig.model_type:
        kind = found.get("model_type") if isinstance(found, dict) else None
        raise UserError(
            f"{file}: holds a model of type {kind!r}",
            remedy=f"give a folder of a whole model, of type {LmpConfig.model_type!r}",
        )
    try:
        return LmpConfig.from_dict(found)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {error}", remedy="give an exported folder as it was written") from error


def _read_weights(source: Path) -> dict[str, Tensor]:
    """fp32 by name, from one file or the several that an index lists."""
    index = source / "model.safetensors.index.json"
    try:
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        weights: dict[str, Tensor] = {}
        for name in names:
            weights |= load_file(source / name)
    except Exception as error:  # damaged files raise whatever their reader stumbles over
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: its weights cannot be read: {told}", remedy="give a whole folder") from error
    if shared := aliases(weights):
        raise UserError(f"{source}: {shared[0][0]} and {shared[0][1]} share memory", remedy="save them each")
    return {name: tensor.float() for name, tensor in weights.items()}


def _check_same(source: Path, theirs: LmpConfig, mine: LmpConfig, *, with_heads: bool) -> None:
    keys = (*SAME, *HEADS_SAME) if with_heads else SAME
    pairs = {key: (getattr(theirs, key), getattr(mine, key)) for key in keys}
    for name in theirs.modalities.keys() & mine.modalities.keys():
        pairs[f"contextual_layers of {name}"] = (theirs.layers_of(name), mine.layers_of(name))
    faults = [f"{key} is {found!r}, here {wanted!r}" for key, (found, wanted) in pairs.items() if found != wanted]
    if faults:
        raise UserError(
            f"{source}: is another model than the configuration and its data: {listed(faults)}",
            remedy="set the model section, and data.train, to what the folder was trained with",
        )


def _check_encoders(source: Path, encoders: Mapping[str, Any]) -> None:
    """Features of other encoders would mean nothing to the weights."""
    file = source / "preprocessing.json"
    if not file.is_file():
        return
    recorded = json.loads(file.read_text(encoding="utf-8")).get("encoders", {})
    for name, encoder in recorded.items():
        if encoder is not None and encoders.get(name) != encoder:
            raise UserError(
                f"{file}: {name} is of {encoder}, the training shards' is of {encoders.get(name)}",
                remedy="train on shards made by the same base encoders",
            )


def _model(
    weights: dict[str, Tensor],
    theirs: LmpConfig,
    mine: LmpConfig,
    seed: int,
    positions: str | None,
    source: Path,
    *,
    with_heads: bool,
) -> tuple[LmpForPretraining, str]:
    """The model to begin with, and what was done about positions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LmpForPretraining(mine).float()
    fresh = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    how = f"{mine.positions}: none are stored, any length works as it is"
    if TABLE in weights and TABLE in fresh:
        how = "as they were"
        if len(weights[TABLE]) != mine.max_positions:
            weights[TABLE], how = _table(weights[TABLE], fresh[TABLE], positions, source)
    elif positions is not None:
        raise UserError(f"--positions {positions}: the model has {mine.positions} positions", remedy="leave it out")
    if not with_heads:
        weights |= {name: tensor for name, tensor in fresh.items() if not name.startswith("lmp.")}
    check_tensors(weights, fresh, source=str(source))
    model.load_state_dict(weights, strict=True)
    return model.eval(), how


def _table(old_MD: Tensor, fresh_ND: Tensor, positions: str | None, source: Path) -> tuple[Tensor, str]:
    """The learned table in another length."""
    old, new = len(old_MD), len(fresh_ND)
    if positions is None:
        raise UserError(
            f"{source}: numbers {old} shots, model.max_positions is {new}",
            remedy=f"pass --positions interpolate or keep, or set model.max_positions={old}",
        )
    if positions == "keep":
        kept_ND = fresh_ND.clone()
        kept_ND[: min(old, new)] = old_MD[:new]
        return kept_ND, f"the first {min(old, new)} of {old} kept" + (f", {new - old} begun anew" if new > old else "")
    stretched_ND = F.interpolate(old_MD.T[None], size=new, mode="linear", align_corners=True)[0].T
    return stretched_ND.contiguous(), "interpolated"


def _first(index: Any, config: Config) -> Any:
    from lmp.data.stream import Stream

    return Stream.of(index, plan_settings(config, index)).first()


def _write_checkpoint(
    folder: RunFolder, model: LmpForPretraining, progress: Progress, facts: Mapping[str, Any]
) -> Path:
    """A checkpoint of one process: the weights, and moments that are zero."""
    path = folder_of(folder, progress.step)
    path.mkdir(parents=True)
    parameters = dict(model.named_parameters())
    pieces = [
        Piece(name, part, 0, parameter.detach().reshape(-1) * (part == PARTS[0]), 1)
        for name, parameter in parameters.items()
        for part in PARTS
    ]
    snapshot = Snapshot(torch.device("cpu"))
    snapshot.take(pieces)
    written = snapshot.write(path / file_name(0, 1))
    state = {"shapes": {name: list(p.shape) for name, p in parameters.items()}, "trained": set(parameters)}
    topology = {"world_size": 1, "sequence": 1, "zero": 0}
    own = {"progress": asdict(progress), "optimizer_step": progress.step, "topology": topology}
    write_manifest(path, [written], state, {**own, **facts})
    return path


@torch.no_grad()
def _prove(
    source: Path, theirs: LmpConfig, model: LmpForPretraining, *, with_heads: bool, bounded: bool
) -> dict[str, float]:
    """The difference of every output of FOLDER, as transformers loads it, from the run's model.

    The folder's own code is not run, for it may come from anywhere: the classes that lmp registers load it.
    """
    shorter = LmpConfig(**{**theirs.to_dict(), "max_positions": min(theirs.max_positions, model.config.max_positions)})
    inputs = fixed_input(shorter)
    expected = dict(named_tensors((model.eval() if with_heads else model.lmp.eval())(**inputs)))
    auto_class = transformers.AutoModelForPreTraining if with_heads else transformers.AutoModel
    loaded = auto_class.from_pretrained(source, trust_remote_code=False, torch_dtype=torch.float32)
    differences, faults = compare(expected, dict(named_tensors(loaded.eval()(**inputs))))
    if faults and bounded:
        raise UserError(
            f"{source}: the imported model is not the folder's: {listed(faults)}",
            remedy="report this with both configurations; nothing was imported",
        )
    return differences


if __name__ == "__main__":
    sys.exit(main())
