"""What one rank sees of the collectives; test_collectives.py judges it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmp.model.attention import Segments
from lmp.parallel.collectives import gather_rows, heads_to_sequence, sequence_to_heads
from lmp.parallel.contract import global_counts, reduce_metrics, share_of_loss
from lmp.parallel.ulysses import UlyssesAttention
from tests.parallel.cases import COUNTS, WEIGHTS, Whole, metrics_of, own, totals_of


def gathering(whole: Whole, rank: int) -> dict[str, Any]:
    group = dist.group.WORLD
    local = own(whole.rows, rank).requires_grad_()
    out = gather_rows(local, group)
    (out * whole.weights[rank]).sum().backward()
    bits = gather_rows(own(whole.rows > 0, rank), group)
    return {"rows": out.detach(), "rows_grad": local.grad, "bits": bits}


def exchanging(whole: Whole, rank: int) -> dict[str, Any]:
    group = dist.group.WORLD
    local = own(whole.q, rank).requires_grad_()
    heads = sequence_to_heads(local, group)
    heads.retain_grad()
    back = heads_to_sequence(heads, group)
    found = {"heads": heads.detach(), "back": back.detach()}
    (back * own(whole.out_grad, rank)).sum().backward()
    return {**found, "heads_grad": heads.grad, "back_grad": local.grad}


def attending(whole: Whole, rank: int) -> dict[str, Any]:
    local = [own(x, rank).requires_grad_() for x in (whole.q, whole.k, whole.v)]
    segments = [Segments.from_lengths(whole.lengths), Segments.from_lengths(whole.lengths, tokens_per_shot=2)]
    attend = UlyssesAttention(dist.group.WORLD)
    out = attend(*local, q_segments=segments[0], k_segments=segments[1])
    (out * own(whole.out_grad, rank)).sum().backward()
    return {"attended": out.detach(), "attended_grads": [x.grad for x in local]}


def contract(rank: int) -> dict[str, Any]:
    cpu = torch.device("cpu")
    counts = global_counts([torch.tensor(c, dtype=torch.float64) for c in COUNTS[rank]], cpu)
    parameter = torch.ones(3, requires_grad=True)
    for micro in range(len(COUNTS[rank])):
        share_of_loss(totals_of(parameter, rank, micro), WEIGHTS, counts, dist.get_world_size()).backward()
    names = ["both", "one", "none"]
    return {"counts": counts, "gradient": parameter.grad, "means": reduce_metrics(metrics_of(rank), names, cpu)}


def main(folder: Path) -> None:
    from tests.workers import save_findings

    dist.init_process_group("gloo")
    rank, whole = dist.get_rank(), Whole.make()
    findings = {**gathering(whole, rank), **exchanging(whole, rank), **attending(whole, rank), **contract(rank)}
    save_findings(folder, findings)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
