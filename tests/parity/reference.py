"""The step of pretraining as one plain PyTorch process computes it, in fp64.

Written from the model's description, apart from its code: all packs of the step are one long sequence, attention is
dense with a boolean block-diagonal mask, every contrastive loss has its full matrix of logits, the loss is the mean
over all rows of the step, and gradients come from autograd. It knows parameters by their names only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmp.model import LmpConfig
from lmp.objectives.settings import ObjectivesConfig
from tests.parity.cases import WholePack

Flags = dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """Loss of the step, loss and rows of each objective, and the gradient of every parameter."""

    loss: float
    losses: dict[str, float]
    rows: dict[str, int]
    gradients: dict[str, Tensor]


def reference_step(
    weights: Mapping[str, Tensor],
    shape: LmpConfig,
    packs: Sequence[WholePack],
    masks: Sequence[Flags],
    objectives: ObjectivesConfig,
) -> Expected:
    """Loss and gradients of a whole step.

    Args:
        weights: parameters by name.
        shape: of the model.
        packs: all packs of the step.
        masks: for each pack NAME -> [P] bool.
        objectives: their weights (those of weight 0 are left out), and how rows compare.
    """
    leaves = {name: w.detach().double().requires_grad_() for name, w in weights.items()}
    step = _Step(packs, masks, shape, objectives)
    out = _Model(leaves, shape).forward(step)
    parts = {"masked_shot": _masked_shot, "alignment": _alignment, "reconstruction": _reconstruction}
    loss = torch.zeros((), dtype=torch.float64)
    losses, rows = {}, {}
    for name in parts:
        weight = getattr(objectives, name).weight
        if weight == 0:
            continue
        row_losses = parts[name](out, step, shape)
        rows[name] = row_losses.numel()
        if rows[name]:
            losses[name] = float(row_losses.detach().mean())
            loss = loss + weight * row_losses.mean()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return Expected(float(loss.detach()), losses, rows, dict(zip(leaves, gradients, strict=True)))


class _Step:
    """All packs of a step, end to end, as N shots."""

    def __init__(
        self, packs: Sequence[WholePack], masks: Sequence[Flags], shape: LmpConfig, how: ObjectivesConfig
    ) -> None:
        self.how = how
        names = list(shape.modalities)
        self.features = {name: torch.cat([pack.features[name] for pack in packs]).double() for name in names}
        self.valid = {name: torch.cat([pack.valid[name] for pack in packs]) for name in names}
        self.masked = {name: torch.cat([mask[name] for mask in masks]) for name in names}
        self.seen = {name: self.valid[name] & ~self.masked[name] for name in names}
        self.pack_N = torch.cat([torch.full_like(pack.film_P, number) for number, pack in enumerate(packs)])
        self.segment_N = 1000 * self.pack_N + torch.cat([pack.segment_P for pack in packs])
        self.position_N = torch.cat([pack.position_P for pack in packs])
        self.film_N = torch.cat([pack.film_P for pack in packs])
        self.shot_N = torch.cat([pack.shot_P for pack in packs])
        self.time_N = torch.cat([pack.time_P for pack in packs]).double()


@dataclass
class _Output:
    predicted: dict[str, Tensor]
    target: dict[str, Tensor]
    aligned: dict[str, Tensor]
    reconstructed: Tensor
    scale: dict[str, Tensor]
    bias: dict[str, Tensor]


class _Model:
    """The network as functions of named parameters."""

    def __init__(self, weights: Mapping[str, Tensor], shape: LmpConfig) -> None:
        self.w, self.shape = weights, shape

    def forward(self, step: _Step) -> _Output:
        shape, names = self.shape, list(self.shape.modalities)
        tokens = {name: spec["tokens"] for name, spec in shape.modalities.items()}
        contextual = {}
        for name in names:
            x_TD = self._embedded(name, step).flatten(0, 1)
            for layer in range(shape.layers_of(name)):
                x_TD = self._contextual_block(f"lmp.contextual.{name}.layers.{layer}", x_TD, tokens[name], step)
            contextual[name] = self._norm(f"lmp.contextual.{name}.norm", x_TD).unflatten(0, (-1, tokens[name]))
        source_NKD = torch.cat([contextual[name] for name in shape.sources], dim=1)
        cross = self._cross(source_NKD, tokens[shape.target], step)
        return _Output(
            predicted={name: self._head(f"prediction_heads.{name}", contextual[name]) for name in names},
            target={name: self._target(name, step) for name in names},
            aligned={name: self._head(f"alignment_heads.{name}", contextual[name]) for name in names},
            reconstructed=self._head("reconstruction_head", cross),
            scale={
                name: 1 / (shape.minimum_temperature + self.w[f"temperatures.{name}.log_excess"].exp())
                for name in ("masked", "alignment", "reconstruction")
            },
            bias={
                name: self.w.get(f"biases.{name}.value", torch.zeros(1))
                for name in ("masked", "alignment", "reconstruction")
            },
        )

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + self.shape.norm_eps).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        hidden = self._linear(f"{name}.fc1", x)
        return self._linear(f"{name}.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    def _head(self, name: str, x: Tensor) -> Tensor:
        return _unit(self._mlp(name, x))

    def _target(self, name: str, step: _Step) -> Tensor:
        x = step.features[name]
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return _unit(self._linear(f"target_projections.{name}", scaled))

    def _embedded(self, name: str, step: _Step) -> Tensor:
        prefix = f"lmp.embeddings.{name}"
        x_NKD = self._norm(f"{prefix}.norm", self._linear(f"{prefix}.projection", step.features[name]))
        hidden_N1 = (step.valid[name] & step.masked[name])[:, None, None]
        absent_N1 = ~step.valid[name][:, None, None]
        x_NKD = torch.where(hidden_N1, self.w[f"{prefix}.mask"], x_NKD)
        x_NKD = torch.where(absent_N1, self.w[f"{prefix}.none"], x_NKD)
        return self._placed(prefix, x_NKD + self.w[f"{prefix}.modality"], step)

    def _placed(self, prefix: str, x_NKD: Tensor, step: _Step) -> Tensor:
        if x_NKD.shape[1] > 1:
            x_NKD = x_NKD + self.w[f"{prefix}.tokens.weight"]
        if self.shape.positions == "learned":
            x_NKD = x_NKD + self.w["lmp.positions.weight"][step.position_N][:, None]
        elif self.shape.positions == "sinusoidal":
            angle = self._angles(step.position_N, self.shape.width, base=10000.0)
            x_NKD = x_NKD + torch.cat([angle.sin(), angle.cos()], dim=-1)[:, None]
        return x_NKD

    def _angles(self, place_N: Tensor, width: int, *, base: float) -> Tensor:
        return place_N.double()[:, None] / base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)

    def _turned(self, x_THC: Tensor, tokens: int, step: _Step) -> Tensor:
        """Rotary positions, as a product of complex numbers."""
        place_N = {"rope": step.position_N, "time_rope": step.time_N}.get(self.shape.positions)
        if place_N is None:
            return x_THC
        angle = self._angles(place_N, x_THC.shape[-1], base=self.shape.rope_base).repeat_interleave(tokens, 0)
        half = x_THC.shape[-1] // 2
        turned = (
            torch.complex(x_THC[..., :half], x_THC[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        )
        return torch.cat([turned.real, turned.imag], dim=-1)

    def _attention(self, name: str, q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, step: _Step) -> Tensor:
        shots, heads = step.segment_N.numel(), self.shape.heads
        q_tokens, k_tokens = q_TD.shape[0] // shots, k_TD.shape[0] // shots
        q = self._turned(q_TD.unflatten(-1, (heads, -1)), q_tokens, step)
        k = self._turned(k_TD.unflatten(-1, (heads, -1)), k_tokens, step)
        v = v_TD.unflatten(-1, (heads, -1))
        q_segment, k_segment = (step.segment_N.repeat_interleave(n) for n in (q_tokens, k_tokens))
        scores = torch.einsum("qhc,khc->hqk", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(q_segment[:, None] != k_segment, -math.inf)
        return self._linear(f"{name}.out", torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).flatten(1))

    def _self_attention(self, name: str, x_TD: Tensor, step: _Step) -> Tensor:
        return self._attention(name, *self._linear(f"{name}.qkv", x_TD).chunk(3, dim=-1), step)

    def _contextual_block(self, name: str, x_TD: Tensor, tokens: int, step: _Step) -> Tensor:
        x_TD = x_TD + self._self_attention(f"{name}.attention", self._norm(f"{name}.attention_norm", x_TD), step)
        return x_TD + self._mlp(f"{name}.mlp", self._norm(f"{name}.mlp_norm", x_TD))

    def _cross(self, source_NKD: Tensor, tokens: int, step: _Step) -> Tensor:
        query_NKD = self.w["lmp.cross.query"].expand(source_NKD.shape[0], tokens, -1)
        x_TD = self._placed("lmp.cross", query_NKD, step).flatten(0, 1)
        source_TD = source_NKD.flatten(0, 1)
        for layer in range(self.shape.cross_layers):
            name = f"lmp.cross.layers.{layer}"
            x_TD = x_TD + self._self_attention(f"{name}.self_attention", self._norm(f"{name}.self_norm", x_TD), step)
            q_TD = self._linear(f"{name}.cross_attention.q", self._norm(f"{name}.cross_norm", x_TD))
            k_TD, v_TD = self._linear(f"{name}.cross_attention.kv", source_TD).chunk(2, dim=-1)
            x_TD = x_TD + self._attention(f"{name}.cross_attention", q_TD, k_TD, v_TD, step)
            x_TD = x_TD + self._mlp(f"{name}.mlp", self._norm(f"{name}.mlp_norm", x_TD))
        return self._norm("lmp.cross.norm", x_TD).unflatten(0, (-1, tokens))


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _row_losses(
    out: _Output,
    step: _Step,
    query: Tensor,
    candidate: Tensor,
    *,
    rows_N: Tensor,
    chosen_N: Tensor,
    name: str,
) -> Tensor:
    """The loss of each row over its candidates, from the full matrix of all tokens of the step.

    Args:
        query, candidate: [N, K, E] both.
        rows_N, chosen_N: [N] bool, shots whose tokens are rows and candidates.
        name: of the temperature and the bias.
    """
    tokens = query.shape[1]
    logits = out.scale[name] * (query.flatten(0, 1) @ candidate.flatten(0, 1).T) + out.bias[name]
    group_N = {"pack": step.pack_N, "film": step.segment_N, "step": torch.zeros_like(step.pack_N)}[step.how.scope]
    allowed_NN = chosen_N[None, :] & (group_N[:, None] == group_N[None, :])
    near_NN = (step.shot_N[:, None] - step.shot_N[None, :]).abs() <= step.how.exclude_near
    if step.how.exclude_near:
        allowed_NN = allowed_NN & ~(near_NN & (step.film_N[:, None] == step.film_N[None, :]))
    positive_TT = torch.eye(logits.shape[0], dtype=torch.bool)
    allowed_TT = allowed_NN.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1) | positive_TT
    number_R = rows_N.repeat_interleave(tokens).nonzero()[:, 0]
    logits_RT, allowed_RT = logits[number_R], allowed_TT[number_R]
    if step.how.loss == "sigmoid":
        signed_RT = torch.where(positive_TT[number_R], logits_RT, -logits_RT)
        return -(F.logsigmoid(signed_RT) * allowed_RT).sum(1)
    return F.cross_entropy(logits_RT.masked_fill(~allowed_RT, -math.inf), number_R, reduction="none")


def _masked_shot(out: _Output, step: _Step, shape: LmpConfig) -> Tensor:
    losses = [
        _row_losses(
            out,
            step,
            out.predicted[name],
            out.target[name],
            rows_N=step.masked[name],
            chosen_N=step.valid[name],
            name="masked",
        )
        for name in shape.modalities
    ]
    return torch.cat(losses)


def _alignment(out: _Output, step: _Step, shape: LmpConfig) -> Tensor:
    shot = {name: _unit(x.mean(1, keepdim=True)) for name, x in out.aligned.items()}
    losses = []
    for one, other in combinations(shape.modalities, 2):
        both_N = step.seen[one] & step.seen[other]
        sides = [
            _row_losses(out, step, shot[a], shot[b], rows_N=both_N, chosen_N=both_N, name="alignment")
            for a, b in ((one, other), (other, one))
        ]
        losses.append((sides[0] + sides[1]) / 2)
    return torch.cat(losses)


def _reconstruction(out: _Output, step: _Step, shape: LmpConfig) -> Tensor:
    target = shape.target
    some_source_N = torch.stack([step.seen[name] for name in shape.sources]).any(0)
    return _row_losses(
        out,
        step,
        out.reconstructed,
        out.aligned[target].detach(),
        rows_N=step.seen[target] & some_source_N,
        chosen_N=step.seen[target],
        name="reconstruction",
    )
