"""Export the contextual and cross-modal transformers of a run as ONNX, with dynamic batch and length.

    python -m tools.export_onnx RUN OUT [--part NAME ...] [--step N] [--overwrite]

    OUT/NAME.onnx              features [batch, shots, K, width], valid [batch, shots], lengths [batch]
                               (and times [batch, shots] where the model places shots by seconds)
                               -> tokens [batch, shots, K, D]
    OUT/cross_modal.onnx       the sources' tokens by name, lengths (and times) -> tokens of the target
    OUT/preprocessing.json     how the base features were made
    OUT/fingerprint.json       where the weights come from, sha256 of every tensor and file, the differences measured

`lengths` are the shots of each film: what lies behind them is padding, is not attended to, and its tokens mean nothing.
OUT appears only after onnxruntime gave the training model's outputs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmp.errors import UserError
from lmp.model import LmpContextualModel, LmpCrossModel
from lmp.model.attention import rotary_of
from lmp.model.modeling_lmp import read_sources
from tools._output import MARK, add_source_arguments, check_folder, listed, new_folder, run_command, write_json
from tools._parity import compare, different, fingerprint
from tools._source import CROSS_MODAL, Source, digests, open_source

TOLERANCE = 1e-4
"""Largest difference of any token between the training model and onnxruntime, which has other kernels."""
CASES = ((1, 1), (2, 7), (3, 11))
"""Batches and lengths that are compared."""
SMALL = 8
"""Elements of the constants that are folded."""
Layout = Callable[[int], tuple[Any, Any]]


class DensePart(nn.Module):
    """What both graphs share: places of shots in a dense batch, and attention within each film's length."""

    def __init__(self, part: LmpContextualModel | LmpCrossModel) -> None:
        super().__init__()
        self.part = part
        self.timed = part.config.positions == "time_rope"

    def layout(self, like_BS: Tensor, lengths_B: Tensor, times_BS: Tensor | None) -> tuple[Tensor | None, Layout]:
        """What is added to shots [B * S, D]; and, by the tokens of a shot, which keys are seen and rotations."""
        batch, shots = like_BS.shape[0], like_BS.shape[1]
        place_S = torch.arange(shots, device=lengths_B.device)
        position_P = place_S.expand(batch, shots).flatten()
        angle_PC = self.part._angles(position_P, times_BS if times_BS is None else times_BS.flatten(), position_P.shape)
        seen_BS = place_S < lengths_B[:, None]

        def layout(tokens: int) -> tuple[Any, Any]:
            seen_BL = seen_BS.repeat_interleave(tokens, dim=1) if tokens > 1 else seen_BS
            return (batch, seen_BL[:, None, None]), rotary_of(angle_PC, tokens)

        return self.part._added_positions(position_P), layout


def attend_dense(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, *, q_segments: Any, k_segments: Any) -> Tensor:
    """Attention of a dense batch; the segments are (batch, [B, 1, 1, L] bool: the keys that are seen)."""
    batch, seen_B11L = k_segments
    q_BHLC, k_BHLC, v_BHLC = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q_THC, k_THC, v_THC))
    out_BHLC = F.scaled_dot_product_attention(q_BHLC, k_BHLC, v_BHLC, attn_mask=seen_B11L)
    return out_BHLC.transpose(1, 2).flatten(0, 1)


class DenseContextual(DensePart):
    """`LmpContextualModel` over a dense batch of films of unequal lengths."""

    def forward(self, features: Tensor, valid: Tensor, lengths: Tensor, times: Tensor | None = None) -> Tensor:
        """[B, S, K, I], [B, S], [B], [B, S] -> [B, S, K, D]."""
        name = self.part.config.modality
        position_PD, layout = self.layout(valid, lengths, times)
        valid_P = valid.flatten()
        token_PKD = self.part.embeddings[name](features.flatten(0, 1), valid_P, torch.zeros_like(valid_P), position_PD)
        token_PKD = self.part.contextual[name](token_PKD, *layout(token_PKD.shape[1]), attend_dense)
        return token_PKD.unflatten(0, (valid.shape[0], valid.shape[1]))


class DenseCross(DensePart):
    """`LmpCrossModel` over a dense batch of films of unequal lengths."""

    def forward(self, contextual: dict[str, Tensor], lengths: Tensor, times: Tensor | None = None) -> Tensor:
        """NAME -> [B, S, K, D], [B], [B, S] -> [B, S, K of the target, D]."""
        sources = [contextual[name] for name in self.part.config.sources]
        position_PD, layout = self.layout(sources[0], lengths, times)
        tokens = [source.flatten(0, 1) for source in sources]
        token_PKD = read_sources(self.part.cross, tokens, position_PD, layout, attend_dense)
        return token_PKD.unflatten(0, (sources[0].shape[0], sources[0].shape[1]))


def export(run: Path, out: Path, *, parts: Sequence[str] = (), overwrite: bool = False, **which: Any) -> float:
    """Write `out` from a checkpoint of `run`.

    Args:
        run: a run folder.
        out: the folder to write.
        parts: modalities and "cross_modal"; empty for all.
        overwrite: replace `out` if it is an earlier export.
        which: step, allow_unfinished; see `open_source`.

    Returns:
        The largest difference of any token from the training model.

    Raises:
        UserError: as `open_source`; a package is missing, `out` is there, or a graph is not the training model.
    """
    _check_packages()
    out = out.absolute()
    check_folder(out, overwrite=overwrite)
    whole = open_source(run, **which)
    names = list(dict.fromkeys(parts)) or [*whole.config.modalities, CROSS_MODAL]
    sources = {name: whole.of_part(name) for name in names}
    with new_folder(out) as folder:
        differences, files = {}, {}
        for name, source in sources.items():
            graph = folder / f"{name}.onnx"
            _write(graph, source)
            _check_weights(graph, source)
            differences[name] = _compare(graph, source)
            # Large weights lie beside the graph.
            for file in sorted(folder.glob(f"{graph.name}*")):
                files[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        shown = [source.preprocessing() for source in sources.values()]
        merged = {key: {k: v for one in shown for k, v in one[key].items()} for key in ("modalities", "encoders")}
        write_json(folder / "preprocessing.json", whole.preprocessing() | merged)
        facts = fingerprint(whole, differences)
        kept = {name for source in sources.values() for name in source.weights}
        facts["tensors"] = {name: tensor for name, tensor in facts["tensors"].items() if name in kept}
        write_json(folder / MARK, facts | {"part": names, "architecture": "onnx", "files": files})
    return max(differences.values())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export_onnx",
        description="Export the contextual and cross-modal transformers of a run as ONNX.",
    )
    add_source_arguments(parser, part=False)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--part", action="append", default=[], metavar="NAME", help="a modality, or cross_modal; again")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at OUT")
    return run_command(_command, parser, argv)


def _command(arguments: argparse.Namespace) -> str:
    difference = export(
        arguments.run,
        arguments.out,
        parts=arguments.part,
        overwrite=arguments.overwrite,
        step=arguments.step,
        allow_unfinished=arguments.allow_unfinished,
    )
    return f"{arguments.out}: largest difference of onnxruntime from the training model {difference:.3g}"


def _check_packages() -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"{package} is not installed", remedy="pip install 'lmp[onnx]'") from error


def _dense(source: Source) -> DensePart:
    part: LmpContextualModel | LmpCrossModel
    part = LmpCrossModel(source.config) if source.part == CROSS_MODAL else LmpContextualModel(source.config)
    part.load_state_dict(source.weights, strict=True)
    dense = DenseCross(part) if source.part == CROSS_MODAL else DenseContextual(part)
    return dense.requires_grad_(False).eval()


def _inputs(source: Source, batch: int, shots: int) -> dict[str, Tensor]:
    """By name: random features with missing shots, films of falling length, times."""
    config = source.trained.config
    draw = torch.Generator().manual_seed(batch * 1000 + shots)
    if source.part == CROSS_MODAL:
        widths = {name: (config.modalities[name]["tokens"], config.width) for name in config.sources}
        given = {name: torch.randn(batch, shots, *width, generator=draw) for name, width in widths.items()}
    else:
        spec = config.modalities[str(source.part)]
        given = {
            "features": torch.randn(batch, shots, spec["tokens"], spec["width"], generator=draw),
            "valid": torch.rand(batch, shots, generator=draw) < 0.8,
        }
    given["lengths"] = (shots - 3 * torch.arange(batch)).clamp(min=1)
    if config.positions == "time_rope":
        given["times"] = 4.0 * torch.rand(batch, shots, generator=draw).cumsum(1)
    return given


def _write(graph: Path, source: Source) -> None:
    from onnxscript import optimizer

    dense, given = _dense(source), _inputs(source, 2, 5)
    axes = {name: {0: "batch"} if tensor.ndim == 1 else {0: "batch", 1: "shots"} for name, tensor in given.items()}
    arguments: Any = tuple(given.values())
    shapes: Any = tuple(axes.values())
    if source.part == CROSS_MODAL:
        names = source.trained.config.sources
        rest = [name for name in given if name not in names]
        arguments = ({name: given[name] for name in names}, *(given[name] for name in rest))
        shapes = ({name: axes[name] for name in names}, *(axes[name] for name in rest))
    # Not optimised here, so that every weight keeps its name and bytes; the runtime optimises when it loads.
    program = torch.onnx.export(
        dense,
        arguments,
        dynamo=True,
        input_names=list(given),
        output_names=["tokens"],
        dynamic_shapes=shapes,
        optimize=False,
        verbose=False,
    )
    assert program is not None  # which it is only without dynamo
    # Only what the runtime would warn of: casts of constants, and what is left of them.
    optimizer.fold_constants(
        program.model,
        input_size_limit=SMALL,
        output_size_limit=SMALL,
        should_fold=lambda node: False if node.op_type == "Transpose" else None,
    )
    optimizer.remove_unused_nodes(program.model)
    weight_bytes = sum(tensor.nbytes for tensor in source.weights.values())
    program.save(str(graph), external_data=weight_bytes > 1 << 30)  # a file of protobuf ends at 2 GiB


def _check_weights(graph: Path, source: Source) -> None:
    """Every weight must be in the graph, under its name, with its bytes."""
    import onnx
    from onnx import numpy_helper

    stored = {
        tensor.name.removeprefix("part."): torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(str(graph)).graph.initializer
    }
    found = digests({name: tensor for name, tensor in stored.items() if name in source.weights})
    if faults := different(source.digests, found):
        raise UserError(
            f"{graph.name}: does not hold the model's weights: {listed(faults)}",
            remedy="report this with the version of torch and onnxscript; nothing was exported",
        )


def _compare(graph: Path, source: Source) -> float:
    """The largest difference of onnxruntime from the training model, which reads the films one by one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, shots in CASES:
        given = _inputs(source, batch, shots)
        if source.trained.config.positions == "learned":
            shots = min(shots, source.trained.config.max_positions)
            given = {name: tensor if tensor.ndim == 1 else tensor[:, :shots] for name, tensor in given.items()}
            given["lengths"] = given["lengths"].clamp(max=shots)
        (tokens,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        found = torch.from_numpy(tokens)
        for film, length in enumerate(given["lengths"].tolist()):
            expected = _expected(source, {name: tensor[film] for name, tensor in given.items()}, length)
            differences, faults = compare({"tokens": expected}, {"tokens": found[film, :length]}, tolerance=TOLERANCE)
            if faults:
                raise UserError(
                    f"{graph.name}: onnxruntime is not the training model: {listed(faults)}",
                    remedy="report this with the version of torch and onnxruntime; nothing was exported",
                )
            worst = max(worst, differences["tokens"])
    return worst


@torch.no_grad()
def _expected(source: Source, film: dict[str, Tensor], length: int) -> Tensor:
    """The training model's own tokens [S, K, D] of one film."""
    trunk = source.model.lmp
    times = film["times"][:length] if "times" in film else None
    if source.part == CROSS_MODAL:
        contextual = {name: film[name][:length] for name in source.trained.config.sources}
        position_PD, layout = trunk._layout(
            torch.Size([length]), torch.device("cpu"), lengths=None, positions=None, times=times
        )
        return read_sources(trunk.cross, list(contextual.values()), position_PD, layout, trunk.attention)
    name = str(source.part)
    out = trunk({name: film["features"][:length]}, {name: film["valid"][:length]}, times=times)
    return out.contextual[name]


if __name__ == "__main__":
    sys.exit(main())
