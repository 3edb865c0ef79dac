"""The files from which plain transformers loads a model: weights, configuration, code."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

import lmp.model
from lmp.errors import UserError
from tools._output import listed
from tools._parity import different
from tools._source import Source, digests

CODE_FILES = ("attention.py", "backends.py", "configuration_lmp.py", "layers.py", "modeling_lmp.py")
PARTS_FILE = "modeling_lmp_parts.py"


def write_model(folder: Path, source: Source, weights: Mapping[str, Tensor]) -> None:
    """Write model.safetensors, config.json and copies of the model's files: what trained is what ships.

    Args:
        folder: to write into.
        source: what is exported.
        weights: of it, by exported names.

    Raises:
        UserError: the file of weights does not hold what was to be written.
    """
    file = folder / "model.safetensors"
    save_file(dict(weights), file, metadata={"format": "pt"})
    if faults := different(digests(weights), digests(load_file(file))):
        raise UserError(f"{file.name}: was not written as it is: {listed(faults)}", remedy="check the disk, and repeat")
    config = source.config
    code = CODE_FILES if source.part is None else (*CODE_FILES, PARTS_FILE)
    module = Path(code[-1]).stem
    config.auto_map = {
        "AutoConfig": f"configuration_lmp.{type(config).__name__}",
        "AutoModel": f"{module}.{'LmpModel' if source.part is None else source.architecture}",
    }
    if source.with_heads:
        config.auto_map["AutoModelForPreTraining"] = f"{module}.LmpForPretraining"
    config.save_pretrained(folder)
    # safetensors makes its file readable by the owner alone.
    shutil.copymode(folder / "config.json", file)
    for name in code:
        shutil.copyfile(Path(lmp.model.__file__).parent / name, folder / name)
