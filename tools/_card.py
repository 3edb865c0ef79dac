"""The model card of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmp.model import LmpConfig
from tools._parity import TOLERANCE, Proof
from tools._source import CROSS_MODAL, Origin, Source

CARD = """---
library_name: transformers
license: {license}
tags:
- lmp
- video
- movies
- multimodal
- custom_code
---

# {run}

A long-range multimodal model of films: for each shot it takes features of frozen base encoders and gives
tokens that know the whole window of shots around it. Pretrained with lmp by masked shot modelling, alignment
of modalities and cross-modal reconstruction, after "Long-range Multimodal Pretraining for Movie
Understanding" (ICCV 2023). {what}

## Load

```python
import torch
from transformers import {auto_class}

model = {auto_class}.from_pretrained("FOLDER", trust_remote_code=True).eval()
{example}
```

{missing} Several segments may lie end to end in one row: `lengths` gives their shots, and they do not
see each other. A dense batch [batch, shots, tokens, width] is taken as well. The remote code needs torch and
transformers only; transformers 4.51 needs a folder name without dots.

## Input

| modality | tokens per shot | width | base encoders |
|---|---|---|---|
{modality_rows}

`preprocessing.json` says how these features were made; other features than these give meaningless tokens.
{position_note}

## Origin

| | |
|---|---|
| run | {run} |
| step | {step} ({finished}) |
| shots seen | {shots_seen} |
| tokens seen | {tokens_seen} |
| training data digest | `{data_digest}` |
| config.yaml sha256 | `{config_sha256}` |
| checkpoint manifest sha256 | `{checkpoint_sha256}` |
| code | lmp {lmp}, commit {commit} |
| parameters | {parameters} |
| films left out | {left_out} |

`fingerprint.json` holds the sha256 of every tensor, and which ones are tied ({ties}).

## Checked

After writing, this folder was loaded by transformers {transformers} in a process in which lmp cannot be
imported, and run on a fixed input with two segments, masked shots and missing modalities. Every tensor has
the sha256 that it has in the checkpoint.
Largest difference of any output from the training model: **{difference:.3g}** (allowed: {tolerance:g}).

## Limitations

- It knows only what the base features hold, and what the training films show; scores on other kinds of film
  are unknown until measured.
- {overlap}
- Features are of fixed widths, and shots must be cut as in training: another shot detector changes the input.
- License of the weights: {license}{license_note}
"""


def card(source: Source, proof: Proof, *, parameters: int) -> str:
    """The text of README.md."""
    config, origin = source.trained.config, source.origin
    shown = source.preprocessing()
    commit = f"`{origin.commit}`" if origin.commit else "unknown"
    return CARD.format(
        license=origin.license,
        license_note=" (not stated by who exported it)" if origin.license == "unknown" else "",
        run=origin.run,
        what=_what(source),
        auto_class=source.auto_class,
        example=_example(source),
        missing=_missing(source),
        modality_rows="\n".join(
            f"| {name} | {shape['tokens']} | {shape['width']} | {_names(shown['encoders'][name])} |"
            for name, shape in shown["modalities"].items()
        ),
        position_note=_position_note(config),
        step=origin.step,
        finished="the run was finished" if origin.finished else "the run was NOT finished",
        shots_seen=_count(origin.shots_seen),
        tokens_seen=_count(origin.tokens_seen),
        data_digest=origin.data_digest,
        config_sha256=origin.config_sha256,
        checkpoint_sha256=origin.checkpoint_sha256,
        lmp=origin.lmp or "of unknown version",
        commit=commit + (" with local changes" if origin.changed else ""),
        parameters=f"{parameters:,}",
        ties=", ".join(f"{name} is {first}" for name, first in source.ties.items()) or "none",
        left_out=_left_out(origin),
        overlap=_overlap(origin),
        transformers=proof.transformers,
        difference=proof.difference,
        tolerance=TOLERANCE,
    )


def _what(source: Source) -> str:
    if source.part == CROSS_MODAL:
        return (
            f"This is its cross-modal transformer alone: from the contextual tokens of {_and(source.config.sources)} "
            f"it tells those of {source.config.target}."
        )
    if source.part is not None:
        return f"This is its contextual transformer of {source.part} alone."
    return "With the heads of pretraining." if source.with_heads else "Without the heads of pretraining."


def _example(source: Source) -> str:
    """Lines of python that run `model` on 8 shots."""
    config = source.trained.config
    spec = config.modalities
    times = ", times=4.0 * torch.arange(8)" if config.positions == "time_rope" else ""
    target_tokens = spec[config.target]["tokens"]
    if source.part == CROSS_MODAL:
        given = ", ".join(f'"{n}": torch.randn(8, {spec[n]["tokens"]}, {config.width})' for n in config.sources)
        return (
            f"contextual = {{{given}}}  # what the contextual transformers give\n"
            f"output = model(contextual, lengths=[8]{times})\n"
            f"# output.last_hidden_state: [shots, {target_tokens}, {config.width}]"
        )
    if source.part is not None:
        shape = spec[source.part]
        return (
            f"features = torch.randn(8, {shape['tokens']}, {shape['width']})  # [shots, tokens, width]\n"
            f"output = model(features, lengths=[8]{times})\n"
            f"# output.last_hidden_state: [shots, {shape['tokens']}, {config.width}]"
        )
    first, shape = next(iter(spec.items()))
    return (
        f'features = {{"{first}": torch.randn(8, {shape["tokens"]}, {shape["width"]})}}'
        "  # NAME -> [shots, tokens, width]\n"
        f"output = model(features, lengths=[8]{times})\n"
        f"# output.contextual: NAME -> [shots, tokens, {config.width}]; "
        f"output.cross: [shots, {target_tokens}, {config.width}]"
    )


def _missing(source: Source) -> str:
    if source.part == CROSS_MODAL:
        return "Tokens of every source must be given, also where the shot lacks it."
    if source.part is not None:
        return "A shot where `valid` is False counts as missing and is replaced by a learned token."
    return (
        "A modality that is left out, or a shot where `valid[NAME]` is False, counts as missing and is replaced by a\n"
        "learned token."
    )


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _left_out(origin: Origin) -> str:
    if origin.left_out is None:
        return "none: the run had no list of films to leave out"
    found = origin.left_out
    return (
        f"{found['films']:,} films, {found['shots']:,} shots, by {found['ids']:,} ids of {', '.join(found['files'])} "
        f"(sha256 of the ids `{found['digest']}`)"
    )


def _overlap(origin: Origin) -> str:
    if origin.left_out is None:
        return (
            "The training films may overlap with those of a benchmark. Compare the film lists before quoting a score."
        )
    return (
        "Films on the lists above were left out of training, by the ids in their records. Other benchmarks' films\n"
        "may be among the training films: compare the lists before quoting a score."
    )


def _position_note(config: LmpConfig) -> str:
    if config.positions == "learned":
        return f"Segments hold at most {config.max_positions} shots."
    if config.positions == "time_rope":
        return "`times`, the start of each shot in seconds, must be given."
    return "Segments may be of any length; lengths beyond those of training are untested."


def _names(encoder: Any) -> str:
    """One line for what a manifest says about the base encoders of a modality."""
    if encoder is None:
        return "not recorded"
    if isinstance(encoder, Mapping):
        known = [f"{key} {value}" for key, value in encoder.items() if isinstance(value, str | int | float)]
        return ", ".join(known) or "see preprocessing.json"
    return str(encoder)
