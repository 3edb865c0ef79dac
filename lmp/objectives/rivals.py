"""Cheap rivals of masked shot modelling: what needs no training must be beaten.

Both predict a masked token's base feature from the unmasked shots of its own segment, and choose by cosine
among the candidates that the loss gives each row, in base-feature space centred on the mean of all candidates (raw
features share a large part).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lmp.objectives.base import Contrast, PackView, numbering, token_index
from lmp.objectives.contrastive import at_least_fp32, top1_hits


@torch.no_grad()
def rival_hits(
    features_PKD: Tensor, name: str, pack: PackView, *, rows_P: Tensor, contrast: Contrast
) -> dict[str, Tensor]:
    """Whether each rival chooses the right candidate; a rival with nothing to go by in the segment misses.

    Args:
        features_PKD: base features of the modality, whole pack.
        name: the modality.
        pack: the whole pack.
        rows_P: [P_local] bool, the masked shots of this rank's slice.
        contrast: of the objective.

    Returns:
        "copy" (the nearest unmasked shot of the segment, the earlier of two; it may not choose that shot
        itself) and "mean" (of the segment's unmasked shots) -> [R * K] bool.
    """
    valid_P = pack.valid[name]
    known_P = valid_P & ~pack.masked[name]
    place_R = pack.place_P[rows_P]
    listed_P = numbering(valid_P)
    centred_NKD = at_least_fp32(features_PKD[valid_P])
    centred_NKD = centred_NKD - centred_NKD.mean((0, 1))
    tokens = centred_NKD.shape[1]

    # Numbered anew: segment numbers may have gaps.
    segment_N = pack.segment_P[valid_P].unique_consecutive(return_inverse=True)[1]
    mean_SKD = _segment_means(centred_NKD, known_P[valid_P], segment_N)
    mean_RD = mean_SKD[segment_N[listed_P[place_R]]].flatten(0, 1)

    unit_NKD = F.normalize(centred_NKD, dim=-1)
    near_R = nearest_known(known_P, pack.segment_P)[place_R]
    found_R = near_R >= 0
    copied_R = listed_P[near_R.clamp(min=0)].clamp(min=0)
    # A row without any unmasked shot asks with zeros: all ties, a miss.
    copy_RD = (unit_NKD[copied_R] * found_R[:, None, None]).flatten(0, 1)
    first_R = torch.where(found_R, copied_R * tokens, -tokens).repeat_interleave(tokens)

    unit_GD = unit_NKD.flatten(0, 1)
    positive_R = token_index(listed_P[place_R], tokens)
    only = contrast.restriction(pack, place_R=place_R, chosen_P=valid_P, tokens=tokens)
    copy_only = replace(only, skip_R2=torch.stack([first_R, first_R + tokens], dim=1))
    return {
        "copy": top1_hits(copy_RD, unit_GD, positive_R, only=copy_only, tile=contrast.tile),
        "mean": top1_hits(mean_RD, unit_GD, positive_R, only=only, tile=contrast.tile),
    }


def nearest_known(known_P: Tensor, segment_P: Tensor) -> Tensor:
    """[P] int64: place of the nearest known shot of the same segment, the earlier of two; -1: none."""
    length = known_P.shape[0]
    place_P = torch.arange(length, device=known_P.device)
    if length == 0:
        return place_P
    before_P = torch.where(known_P, place_P, -1).cummax(0).values
    after_P = torch.where(known_P, place_P, length).flip(0).cummin(0).values.flip(0)
    has_before_P = (before_P >= 0) & (segment_P[before_P.clamp(min=0)] == segment_P)
    has_after_P = (after_P < length) & (segment_P[after_P.clamp(max=length - 1)] == segment_P)
    take_before_P = has_before_P & (~has_after_P | (place_P - before_P <= after_P - place_P))
    return torch.where(take_before_P, before_P, torch.where(has_after_P, after_P, -1))


def _segment_means(x_NKD: Tensor, known_N: Tensor, segment_N: Tensor) -> Tensor:
    """[S, K, D]: token by token, the mean of each segment's known shots; zeros where there is none."""
    segments = int(segment_N.max()) + 1 if segment_N.numel() else 0
    known_segment_N = segment_N[known_N]
    sum_SKD = x_NKD.new_zeros(segments, *x_NKD.shape[1:]).index_add_(0, known_segment_N, x_NKD[known_N])
    count_S = torch.bincount(known_segment_N, minlength=segments).clamp(min=1)
    return sum_SKD / count_S[:, None, None]
