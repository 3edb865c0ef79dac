"""Encoders: from the picture, sound and words of shots to features."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from lmp.errors import UserError
from lmp.films.encoders.base import Encoder, Kind
from lmp.films.encoders.signal import SignalPicture, SignalSound, SignalWords

__all__ = ["Encoder", "Kind", "build_encoders"]

KINDS: tuple[Kind, ...] = get_args(Kind)
KIND_OF_MODALITY: dict[str, Kind] = {"video": "picture", "audio": "sound", "text": "words"}
_SIGNAL: dict[Kind, Callable[[], Encoder]] = {"picture": SignalPicture, "sound": SignalSound, "words": SignalWords}


def build_encoders(specs: Mapping[str, str]) -> dict[str, Encoder]:
    """The encoder of each modality.

    Args:
        specs: modality name -> "signal", the folder or hub name (OWNER/MODEL) of a transformers model, or
            either of them with its kind: "signal-picture", "words:FOLDER". Without a kind the name of the
            modality tells it: video is picture, audio is sound, text is words.

    Raises:
        UserError: an unknown encoder, a kind that cannot be told, or a model that cannot be loaded.
    """
    return {modality: _build(modality, spec) for modality, spec in specs.items()}


def _build(modality: str, spec: str) -> Encoder:
    kind = next((k for k in KINDS if modality == k), KIND_OF_MODALITY.get(modality))
    for explicit in KINDS:
        if spec == f"signal-{explicit}":
            return _SIGNAL[explicit]()
        if spec.startswith(f"{explicit}:"):
            return _build_as(explicit, modality, spec.removeprefix(f"{explicit}:"), explicit=True)
    if kind is not None:
        return _build_as(kind, modality, spec, explicit=False)
    if spec != "signal" and not _is_model(spec):
        raise _unknown(modality, spec)
    kinds = [f"signal-{k}" if spec == "signal" else f"{k}:{spec}" for k in KINDS]
    raise UserError(
        f"modality {modality}: its name does not tell whether encoder {spec} is for picture, sound or words",
        remedy=f"write one of {', '.join(kinds)}, or name the modality {', '.join(KIND_OF_MODALITY)}",
    )


def _build_as(kind: Kind, modality: str, spec: str, *, explicit: bool) -> Encoder:
    if spec == "signal":
        return _SIGNAL[kind]()
    # With a kind before it, a hub name needs no owner: "words:roberta-base".
    if not spec or not (explicit or _is_model(spec)):
        raise _unknown(modality, spec)
    # transformers takes seconds to import and only these encoders need it.
    from lmp.films.encoders.transformers_adapter import TransformersEncoder

    return TransformersEncoder(kind, spec)


def _is_model(spec: str) -> bool:
    return "/" in spec or spec.startswith(("~", ".")) or Path(spec).is_dir()


def _unknown(modality: str, spec: str) -> UserError:
    known = ["signal", *(f"signal-{kind}" for kind in KINDS)]
    near = difflib.get_close_matches(spec, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    return UserError(
        f"modality {modality}: no encoder {spec!r}",
        remedy=f"{hint}Give signal, the folder of a transformers model, or its hub name OWNER/MODEL",
    )
