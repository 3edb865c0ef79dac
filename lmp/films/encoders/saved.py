"""Models and settings as `save_pretrained` leaves them, in a local folder or on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmp.errors import UserError
from lmp.films.encoders.weights import digest

_WHAT = {"AutoTokenizer": "tokenizer", "AutoFeatureExtractor": "feature extractor"}


def find(source: str, *, role: str) -> tuple[str, str]:
    """Where `transformers` finds the model, and its name: of the folder, or on the hub.

    Raises:
        UserError: a path to no folder.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder), folder.name
    if source.startswith(("/", "~", ".")):
        raise UserError(f"no folder {source} with a {role}", remedy="give the folder of a saved model")
    return source, source


def load(auto: Any, source: str, *, role: str, **options: Any) -> Any:
    """What a class of transformers makes of a folder or name.

    Raises:
        UserError: files that are missing or broken, or a package that the model needs and that is not installed.
    """
    try:
        return auto.from_pretrained(source, **options)
    # Loaders raise OSError for missing files, and ValueError, KeyError and more for bad ones.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        remedy = "give a hub name or a folder saved with save_pretrained (model and processor)"
        if isinstance(error, ImportError) and "timm" in str(error):
            lines, remedy = ["it needs the package timm"], "pip install timm, which brings torchvision, on a CUDA torch"
        elif "does not recognize this architecture" in str(error):
            remedy = "pip install -U transformers, if a newer one has it"
        raise UserError(
            f"cannot load the {_WHAT.get(auto.__name__, 'model')} of {role} {source}: "
            f"{lines[0] if lines else type(error).__name__}",
            remedy=remedy,
        ) from error


def load_model(
    auto: Any, source: str, *, role: str, part: Callable[[Any], Any] = lambda model: model, **options: Any
) -> Any:
    """A model, or the part of it that is wanted, with every weight from its files.

    Files of a masked language model or a classifier have no pooler: it is taken out, for transformers would fill it
    with random numbers. The mask of wav2vec 2.0's training may be missing too; nothing is masked here.

    Raises:
        UserError: as `load`, or other weights are missing.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the weights of other parts, and those that are missing are told below
    try:
        model, told = load(auto, source, role=role, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    lost = {id(model.state_dict(keep_vars=True).get(name)) for name in told["missing_keys"]}
    wanted = part(model)
    names = [name for name, tensor in wanted.state_dict(keep_vars=True).items() if id(tensor) in lost]
    if any(name.startswith("pooler.") for name in names):
        wanted.pooler = None
    for name in names:
        if name.endswith("masked_spec_embed"):
            wanted.get_parameter(name).data.zero_()
        elif not name.startswith("pooler."):
            raise UserError(
                f"the {role} {source} lacks weights of a {wanted.config.model_type} model: {name}",
                remedy="give the files that were published with the model",
            )
    return wanted


def read_json(source: str, name: str) -> Any:
    """A JSON file that was saved with a model, or None where there is none."""
    text = read_text(source, name)
    return None if text is None else json.loads(text)


def read_text(source: str, name: str) -> str | None:
    """A text file that was saved with a model, or None where there is none."""
    from transformers.utils import cached_file

    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found).read_text(encoding="utf-8")


def version(model: Any, source: str, *names: str) -> str:
    """The revision on the hub, or else a digest of the weights and of these files: equal versions, equal results."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return str(commit)
    # As it was saved: the configuration in memory also tells the version of transformers that has read it.
    return digest(model, *(read_text(source, name) or "" for name in ("config.json", *names)))
