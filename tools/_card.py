"""The model card of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmp.model import LmpConfig
from tools._parity import TOLERANCE, Proof


@dataclass(frozen=True)
class Origin:
    """Where a model comes from; also the head of fingerprint.json.

    Attributes:
        run: name of the run folder.
        step: optimizer steps made.
        finished: whether the run was finished.
        shots_seen: shots that training went over, repeats counted.
        data_digest: digest of the training shards.
        config_sha256: of the run's config.yaml.
        commit: of the code that trained; None if unknown.
        changed: whether the checkout differed from that commit.
        lmp: version that trained.
        license: of the exported weights.
    """

    run: str
    step: int
    finished: bool
    shots_seen: int | None
    data_digest: str
    config_sha256: str
    commit: str | None
    changed: bool
    lmp: str | None
    license: str


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
Understanding" (ICCV 2023). {heads}

## Load

```python
import torch
from transformers import {auto_class}

model = {auto_class}.from_pretrained("FOLDER", trust_remote_code=True).eval()
features = {example}  # NAME -> [shots, tokens, width]
output = model(features, lengths=[8]{times})
# output.contextual: NAME -> [shots, tokens, {width}]; output.cross: [shots, {target_tokens}, {width}]
```

A modality that is left out, or a shot where `valid[NAME]` is False, counts as missing and is replaced by a
learned token. Several segments may lie end to end in one row: `lengths` gives their shots, and they do not
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
| training data digest | `{data_digest}` |
| config.yaml sha256 | `{config_sha256}` |
| code | lmp {lmp}, commit {commit} |
| parameters | {parameters} |

`fingerprint.json` holds the sha256 of every tensor.

## Checked

After writing, this folder was loaded by transformers {transformers} in a process in which lmp cannot be
imported, and run on a fixed input with two segments, masked shots and missing modalities. Every tensor has
the sha256 that it has in the checkpoint.
Largest difference of any output from the training model: **{difference:.3g}** (allowed: {tolerance:g}).

## Limitations

- It knows only what the base features hold, and what the training films show; scores on other kinds of film
  are unknown until measured.
- The training films may overlap with those of a benchmark. Compare the film lists before quoting a score.
- Features are of fixed widths, and shots must be cut as in training: another shot detector changes the input.
- License of the weights: {license}{license_note}
"""


def card(config: LmpConfig, origin: Origin, proof: Proof, *, encoders: Mapping[str, Any], parameters: int) -> str:
    """The text of README.md."""
    with_heads = "reconstructed" in proof.per_output
    first, spec = next(iter(config.modalities.items()))
    timed = config.positions == "time_rope"
    commit = f"`{origin.commit}`" if origin.commit else "unknown"
    return CARD.format(
        license=origin.license,
        license_note=" (not stated by who exported it)" if origin.license == "unknown" else "",
        run=origin.run,
        heads="With the heads of pretraining." if with_heads else "Without the heads of pretraining.",
        auto_class="AutoModelForPreTraining" if with_heads else "AutoModel",
        example=f'{{"{first}": torch.randn(8, {spec["tokens"]}, {spec["width"]})}}',
        times=", times=4.0 * torch.arange(8)" if timed else "",
        width=config.width,
        target_tokens=config.modalities[config.target]["tokens"],
        modality_rows="\n".join(
            f"| {name} | {shape['tokens']} | {shape['width']} | {_names(encoders.get(name))} |"
            for name, shape in config.modalities.items()
        ),
        position_note=_position_note(config),
        step=origin.step,
        finished="the run was finished" if origin.finished else "the run was NOT finished",
        shots_seen="unknown" if origin.shots_seen is None else f"{origin.shots_seen:,}",
        data_digest=origin.data_digest,
        config_sha256=origin.config_sha256,
        lmp=origin.lmp or "of unknown version",
        commit=commit + (" with local changes" if origin.changed else ""),
        parameters=f"{parameters:,}",
        transformers=proof.transformers,
        difference=proof.difference,
        tolerance=TOLERANCE,
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
