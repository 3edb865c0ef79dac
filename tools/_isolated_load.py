"""Run as a file in a process of its own: load an exported folder as its users will, and run a given input.

    python -I _isolated_load.py FOLDER AUTO_CLASS INPUT OUTPUT REPORT [IMPORT_PATH...]

INPUT and OUTPUT are safetensors files, REPORT is JSON. Imports nothing of lmp, and makes sure that nothing
else does. Writes the outputs, and the names, numels and sha256 of the weights as they were loaded.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class NoLmp(MetaPathFinder):
    """Refuses to find lmp, wherever it may be installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "lmp":
            raise ModuleNotFoundError(f"{name} is not to be had in this process", name=name)


def named_tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All tensors of nested mappings, by their joined keys."""
    if hasattr(tree, "items"):
        for key, value in tree.items():
            yield from named_tensors(value, f"{path}/{key}" if path else str(key))
    else:
        yield path, tree


def main(argv: Sequence[str]) -> None:
    folder, auto_class, source, sink, report, *import_paths = argv
    sys.meta_path.insert(0, NoLmp())
    sys.path[:0] = import_paths

    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    model, info = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    inputs: dict[str, Any] = {}
    for path, tensor in load_file(source).items():
        key, _, name = path.partition("/")
        if name:
            inputs.setdefault(key, {})[name] = tensor
        else:
            inputs[key] = tensor.tolist() if key == "lengths" else tensor
    with torch.no_grad():
        output = model.eval()(**inputs)
    save_file({path: tensor.contiguous() for path, tensor in named_tensors(output)}, sink)
    tensors = {
        name: [tensor.numel(), hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()]
        for name, tensor in model.state_dict().items()
    }
    faults = {key: sorted(map(str, value)) for key, value in info.items() if value}
    facts = {"tensors": tensors, "faults": faults, "transformers": transformers.__version__}
    Path(report).write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
