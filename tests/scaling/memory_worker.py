"""Counts the bytes of real steps; as a script, one of two ranks that count what DeepSpeed keeps, and sp = 2."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lmp.config import validate
from lmp.model import LmpConfig, LmpForPretraining
from lmp.objectives import ObjectivesConfig, build_objectives
from lmp.objectives.base import Gather, ObjectiveBatch
from lmp.objectives.masking import draw_masks
from lmp.parallel.memory import apply_memory
from lmp.parallel.memory_settings import MemorySettings
from lmp.parallel.mesh import Mesh, mesh
from lmp.parallel.ulysses import UlyssesAttention
from lmp.scaling.live_memory import LiveMemory
from lmp.scaling.memory import Choice, Job, model_states, parameter_counts, predict_memory
from lmp.train.engine import Engine
from lmp.train.step import gather_over
from tests.workers import save_findings

OBJECTIVES = ObjectivesConfig(tile=64)
BUCKET = 50_000


def model_of(width: int, layers: int, tokens: int, positions: str) -> LmpConfig:
    return LmpConfig(
        modalities={
            "video": {"tokens": tokens, "width": 33},
            "audio": {"tokens": 1, "width": 17},
            "text": {"tokens": 1, "width": 40},
        },
        width=width,
        heads=4,
        contextual_layers=layers,
        cross_layers=layers,
        contrastive_width=32,
        positions=positions,
    )


def counted_step(
    *,
    pack: int,
    width: int,
    layers: int,
    tokens: int,
    positions: str,
    bf16: bool = False,
    lengths: Sequence[int] | None = None,
    checkpointing: Any = "none",
    offload: bool = False,
    tile: int | None = None,
    here: Mesh | None = None,
) -> tuple[int, int]:
    """Bytes that forward and losses leave alive, and the peak of forward and backward, without model and features."""
    torch.manual_seed(0)
    config = model_of(width, layers, tokens, positions)
    model = LmpForPretraining(config).to(torch.bfloat16 if bf16 else torch.float32)
    apply_memory(model, MemorySettings(checkpointing, offload, tile))
    gather: Gather = lambda local: local  # noqa: E731
    if here is not None and here.sequence_group is not None:
        model.set_attention(UlyssesAttention(here.sequence_group))
        gather = gather_over(here)
    view = batch_of(config, lengths or (pack,), here)
    objectives = build_objectives(OBJECTIVES, target="video", sources=config.sources)
    with LiveMemory() as live:
        for parameter in model.parameters():
            live.count(parameter)
            parameter.grad = torch.zeros_like(parameter)
        for feature in view.features.values():
            live.count(feature)
        base = live.now
        output = model(
            view.features, view.valid, lengths=lengths or (pack,), masked=view.masked, positions=view.position_P
        )
        terms = [objective(output, view, gather) for objective in objectives]
        kept = live.now - base
        torch.stack([term.total for term in terms]).sum().backward()
        return kept, live.peak - base


def batch_of(config: LmpConfig, lengths: Sequence[int], here: Mesh | None) -> ObjectiveBatch:
    """A full pack, or this rank's run of it, with every modality valid."""
    shots = sum(lengths)
    rows = shots // (here.sequence if here else 1)
    own = slice((here.sp_rank if here else 0) * rows, ((here.sp_rank if here else 0) + 1) * rows)
    features = {name: torch.randn(rows, spec["tokens"], spec["width"]) for name, spec in config.modalities.items()}
    valid = {name: torch.ones(rows, dtype=torch.bool) for name in features}
    film_P, shot_P = torch.zeros(rows, dtype=torch.int64), torch.arange(shots)[own]
    return ObjectiveBatch(
        features=features,
        valid=valid,
        masked=draw_masks(valid, film_P, shot_P, seed=0, epoch=0, pack=0, ratio=OBJECTIVES.mask_ratio),
        segment_P=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[own],
        film_P=film_P,
        shot_P=shot_P,
        position_P=torch.cat([torch.arange(length) for length in lengths])[own],
    )


def counted_states(zero: int, precision: str, here: Mesh) -> dict[str, tuple[float, float]]:
    """Predicted and counted bytes of an engine in the backward and the update of its second step."""
    extra = {"zero_optimization": {"reduce_bucket_size": BUCKET}} if zero else {}
    sections = {
        "data": {"train": ["none"], "pack_shots": 32},
        "train": {"precision": precision},
        "parallel": {"zero": zero, "deepspeed": extra},
    }
    config, shape = validate(sections, source="test"), model_of(96, 1, 1, "rope")
    with LiveMemory() as live:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            engine = Engine(LmpForPretraining(shape), config, here)
        gc.collect()
        features = {name: torch.randn(2, 1, spec["width"]) for name, spec in shape.modalities.items()}
        for _ in range(2):
            live.reset_peak()
            output = engine(features, lengths=(2,))
            heads = (output.predicted, output.aligned, output.target, output.scale)
            loss = sum(x.sum() for named in heads for x in named.values()) + output.reconstructed.sum()
            engine.backward(loss)
            backward = live.peak
            del output, heads, loss
            live.reset_peak()
            with contextlib.redirect_stdout(io.StringIO()):
                engine.step(1e-3)
            update = live.peak
        engine.close()
    states = model_states(
        *parameter_counts(shape),
        zero=zero,
        bf16=precision == "bf16",
        world_size=here.world_size,
        accumulates=False,
        bucket=BUCKET,
    )
    name = f"ZeRO {zero} {precision}"
    return {f"{name} backward": (states.backward, backward), f"{name} update": (states.update, update)}


def main(folder: Path) -> None:
    findings: dict[str, dict[str, tuple[float, float]]] = {"states": {}, "activations": {}}
    with mesh(2, timeout_minutes=2) as here:
        for precision in ("fp32", "bf16"):
            for zero in range(int(precision == "bf16"), 4):
                findings["states"] |= counted_states(zero, precision, here)
        cases = (("none", (256,)), ("none", (100, 156)), ("full", (256,)), ("selective", (100, 156)))
        for checkpointing, lengths in cases:
            setup: dict[str, Any] = {"pack": 256, "width": 64, "layers": 3, "tokens": 2, "positions": "rope"}
            kept, peak = counted_step(**setup, lengths=lengths, checkpointing=checkpointing, here=here)
            job = Job(model_of(64, 3, 2, "rope"), OBJECTIVES, False, 2, 1, feature_bytes=4)
            memory = predict_memory(job, Choice(0, 2, checkpointing, False, None, 256), lengths)
            name = f"{checkpointing} {lengths}"
            findings["activations"][f"{name} kept"] = (memory.kept + memory.loss, kept)
            whole = memory.backward - memory.states.backward - memory.features
            findings["activations"][f"{name} peak"] = (whole, peak)
    save_findings(folder, findings)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
