"""From the line that names an encoder to the encoder, or to several whose features are joined."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from lmp.errors import UserError
from lmp.films.encoders.base import Encoder, Kind
from lmp.films.encoders.sentences import POOLINGS
from lmp.films.encoders.signal import SignalPicture, SignalSound, SignalWords

KINDS: tuple[Kind, ...] = get_args(Kind)
KIND_OF_MODALITY: dict[str, Kind] = {"video": "picture", "audio": "sound", "text": "words"}
NETWORKS: dict[str, Kind] = {"r2plus1d": "picture", "vggish": "sound"}
FAMILIES: dict[str, Kind] = {  # model types of transformers that may stand for the kind
    **dict.fromkeys(("videomae", "vjepa2", "videoprism", "pe_video", "siglip", "clip"), "picture"),
    **dict.fromkeys(("wav2vec2", "wavlm", "hubert", "whisper", "ast", "clap", "pe_audio"), "sound"),
    **dict.fromkeys(("bart", "bert", "roberta", "modernbert"), "words"),
}
_SIGNAL: dict[Kind, Callable[..., Encoder]] = {"picture": SignalPicture, "sound": SignalSound, "words": SignalWords}
_PREFIXES = "|".join((*KINDS, *NETWORKS, *FAMILIES))
# A folder may have a plus or a comma in its name: only what begins another part, or is an option, counts.
_PLUS = re.compile(rf"\+(?=(?:{_PREFIXES}):|signal(?:[-,+]|$))")
_OPTION = re.compile(r",([a-z_]+)=([^,]*)$")
_COUNTS = ("tokens", "frames", "rate")
_CHOICES: dict[str, dict[str, Any]] = {
    "pooling": {pooling: pooling for pooling in POOLINGS},
    "normalize": {"true": True, "false": False},
}
_OF_KIND: dict[Kind, tuple[str, ...]] = {  # options of transformers models
    "picture": ("tokens", "frames"),
    "sound": ("tokens",),
    "words": ("tokens", "pooling", "normalize", "prompt", "prefix"),
}


def build_encoders(specs: Mapping[str, str], *, device: str = "cpu") -> dict[str, tuple[Encoder, ...]]:
    """The encoders of each modality: one, or several whose features are joined in this order.

    Args:
        specs: modality name -> PART or PART+PART. A part is
            "signal": classical features;
            "r2plus1d:FILE", "vggish:FILE": weights of these networks;
            "FOLDER" or "OWNER/MODEL": a transformers model, local or of the hub;
            with its kind before it where the name of the modality does not tell it (video is picture, audio
            is sound, text is words): "signal-picture", "words:FOLDER", or its family: "wav2vec2:FOLDER";
            and options after it: ",tokens=4" (K), ",frames=32" (of a clip), ",pca=FILE" (VGGish), and for texts
            ",pooling=cls", ",normalize=true", ",prompt=NAME", ",prefix=TEXT" (see `read_sentences`).
        device: where the networks run.

    Raises:
        UserError: an unknown encoder or option, a kind that cannot be told, parts that do not fit together,
            or a model that cannot be loaded.
    """
    return {
        modality: _joined(modality, [_build(modality, part, device) for part in _PLUS.split(spec)])
        for modality, spec in specs.items()
    }


def describe(parts: Sequence[Encoder]) -> dict[str, Any]:
    """What made the features of a modality, as JSON; joined encoders are listed under `parts`."""
    if len(parts) == 1:
        return parts[0].describe()
    return {
        "name": "+".join(part.name for part in parts),
        "version": "+".join(part.version for part in parts),
        "kind": parts[0].kind,
        "tokens": parts[0].tokens,
        "width": sum(part.width for part in parts),
        "parts": [part.describe() for part in parts],
    }


def _joined(modality: str, parts: list[Encoder]) -> tuple[Encoder, ...]:
    for what in ("kind", "tokens"):
        values = [getattr(part, what) for part in parts]
        if len(set(values)) > 1:
            raise UserError(
                f"modality {modality}: {' and '.join(part.name for part in parts)} cannot be joined: "
                f"their {what} are {' and '.join(map(str, values))}",
                remedy="join encoders of one kind with as many tokens a shot",
            )
    return tuple(parts)


def _build(modality: str, part: str, device: str) -> Encoder:
    spec, options = _options(modality, part)
    if (signal := re.fullmatch(rf"signal-({'|'.join(KINDS)})", spec)) is not None:
        return _build_as(signal[1], modality, "signal", options, device)  # type: ignore[arg-type]
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in NETWORKS:
        return _build_network(prefix, modality, rest, options, device)
    if colon and (prefix in KINDS or prefix in FAMILIES):
        explicit: Kind = FAMILIES.get(prefix, prefix)  # type: ignore[arg-type]
        if not rest:
            raise _unknown(modality, spec)
        family = prefix if prefix in FAMILIES else None
        return _build_as(explicit, modality, rest, options, device, family=family)
    kind = next((k for k in KINDS if modality == k), KIND_OF_MODALITY.get(modality))
    if not spec or (spec != "signal" and not _is_model(spec)):
        raise _unknown(modality, spec)
    if kind is not None:
        return _build_as(kind, modality, spec, options, device)
    kinds = [f"signal-{k}" if spec == "signal" else f"{k}:{spec}" for k in KINDS]
    raise UserError(
        f"modality {modality}: its name does not tell whether encoder {spec} is for picture, sound or words",
        remedy=f"write one of {', '.join(kinds)}, or name the modality {', '.join(KIND_OF_MODALITY)}",
    )


def _build_network(name: str, modality: str, path: str, options: dict[str, Any], device: str) -> Encoder:
    if name == "vggish":
        from lmp.films.encoders.vggish import VGGishEncoder

        _check_options(modality, name, options, ("tokens", "pca"))
        return VGGishEncoder(Path(path), **options, device=device)
    from lmp.films.encoders.r2plus1d import R2Plus1DEncoder

    _check_options(modality, name, options, ("tokens", "frames", "rate"))
    return R2Plus1DEncoder(Path(path), **options, device=device)


def _build_as(
    kind: Kind, modality: str, spec: str, options: dict[str, Any], device: str, *, family: str | None = None
) -> Encoder:
    if spec == "signal":
        _check_options(modality, spec, options, ("tokens",))
        return _SIGNAL[kind](**options)
    # transformers takes seconds to import and only these encoders need it.
    from lmp.films.encoders.transformers_adapter import TransformersEncoder

    _check_options(modality, spec, options, _OF_KIND[kind])
    return TransformersEncoder(kind, spec, family=family, **options, device=device)


def _options(modality: str, part: str) -> tuple[str, dict[str, Any]]:
    """The part without its options, and these."""
    options: dict[str, Any] = {}
    while (found := _OPTION.search(part)) is not None:
        name, value = found.groups()
        part = part[: found.start()]
        if name in _COUNTS:
            if not (value.isascii() and value.isdigit() and int(value) > 0):
                raise UserError(
                    f"modality {modality}: {name} of {part} is {value!r}", remedy="give a whole number, 1 or more"
                )
            options[name] = int(value)
        elif (choices := _CHOICES.get(name)) is not None:
            if value not in choices:
                raise UserError(
                    f"modality {modality}: {name} of {part} is {value!r}", remedy=f"give one of {', '.join(choices)}"
                )
            options[name] = choices[value]
        else:
            options[name] = Path(value) if name == "pca" else value
    return part, options


def _check_options(modality: str, spec: str, options: dict[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            raise UserError(
                f"modality {modality}: encoder {spec} has no option {name}",
                remedy=f"it has {', '.join(known)}",
            )


def _is_model(spec: str) -> bool:
    return "/" in spec or spec.startswith(("~", ".")) or Path(spec).is_dir()


def _unknown(modality: str, spec: str) -> UserError:
    known = ["signal", *(f"signal-{kind}" for kind in KINDS), *(f"{name}:FILE" for name in NETWORKS)]
    near = difflib.get_close_matches(spec, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? " if near else ""
    return UserError(
        f"modality {modality}: no encoder {spec!r}",
        remedy=f"{hint}Give signal, r2plus1d:FILE, vggish:FILE, "
        "the folder of a transformers model, or its hub name OWNER/MODEL",
    )
