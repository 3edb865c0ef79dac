"""The one place where sums of losses become a loss whose averaged gradient is that of a single process.

Every objective gives its rank's additive share `total` of a sum over rows, and the number of rows `count`. The
loss of the step is the mean over the rows of all ranks and micro-batches. DeepSpeed averages gradients over all
ranks, therefore each rank's share is multiplied by their number:

    loss_rank = sum_o weight_o * total_o * world_size / global_count_o
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def all_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    dist.all_reduce(values)
    return values


def global_counts(local: Sequence[Tensor], device: torch.device) -> Tensor:
    """Rows of each objective over all micro-batches and ranks.

    Args:
        local: for each micro-batch of this rank the counts of the objectives, [O] each.
        device: where the collective runs.

    Returns:
        float64 counts [O], the same on every rank.
    """
    return all_sum(torch.stack([counts.to(device, torch.float64) for counts in local]).sum(0))


def share_of_loss(totals: Sequence[Tensor], weights: Sequence[float], counts: Tensor, world_size: int) -> Tensor:
    """This micro-batch's share of the step's loss, to be given to backward.

    Args:
        totals: one scalar per objective, connected to the graph.
        weights: one per objective.
        counts: global counts [O]; an objective without rows contributes zero.
        world_size: number of ranks over which DeepSpeed averages gradients.
    """
    factors = torch.where(counts > 0, world_size / counts.clamp(min=1), torch.zeros_like(counts))
    shares = [
        total * (weight * factor).to(total.dtype)
        for total, weight, factor in zip(totals, weights, factors, strict=True)
    ]
    return torch.stack(shares).sum()


def reduce_metrics(
    local: Mapping[str, tuple[Tensor, Tensor]], names: Sequence[str], device: torch.device
) -> dict[str, float]:
    """Exact means over all ranks of metrics given as (sum, count).

    Args:
        local: this rank's sums and counts; a name that is missing counts as empty.
        names: the metrics, in the same order on every rank.
        device: where the collective runs.

    Returns:
        the means by name; metrics without any row are left out.
    """
    zero = torch.zeros((), dtype=torch.float64, device=device)
    pairs = [
        torch.stack([part.detach().to(device, torch.float64) for part in local.get(name, (zero, zero))])
        for name in names
    ]
    if not pairs:
        return {}
    table = all_sum(torch.stack(pairs))
    return {name: float(total / count) for name, (total, count) in zip(names, table.cpu(), strict=True) if count > 0}
