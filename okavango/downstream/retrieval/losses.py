"""Losses on descriptors of places (SelaVPR, arXiv 2402.14505): triplets of global ones, mutual matches of local ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from okavango.downstream.retrieval.rerank import mutual


def similarity(a: Tensor, b: Tensor, *, single_by_place: bool = False) -> Tensor:
    """Mean cosine over mutual nearest neighbours; which ones they are carries no gradient, their cosines do, on both sides.

    Args:
        a: local descriptors (B, n, C); b: (B, m, C); unit length.
        single_by_place: with exactly one match, the mean cosine over equal cells instead, as the published code has it; m is n.
    Returns:
        (B,), -1..1.
    """
    partner, both = mutual(a, b)
    cosines = (a * b.gather(1, partner[..., None].expand(-1, -1, b.shape[2]))).sum(2)
    counts = both.sum(1)
    mean = (cosines * both).sum(1) / counts
    return (a * b).sum(2).mean(1).where(counts == 1, mean) if single_by_place else mean


def local_loss(
    anchor: Tensor, positive: Tensor, negatives: Tensor, *, margin: float = 0.0, single_by_place: bool = False
) -> Tensor:
    """How far negatives are more similar than the positive, beyond minus the margin.

    Args:
        anchor, positive: (B, n, C); negatives: (B, K, n, C); unit length.
    Returns:
        (B, K), 0 or more.
    """
    groups, count = negatives.shape[:2]
    right = similarity(anchor, positive, single_by_place=single_by_place)
    many = anchor[:, None].expand(-1, count, -1, -1).flatten(0, 1)
    wrong = similarity(many, negatives.flatten(0, 1), single_by_place=single_by_place)
    return F.relu(wrong.view(groups, count) - right[:, None] + margin)


def global_loss(anchor: Tensor, positive: Tensor, negatives: Tensor, *, margin: float = 0.1) -> Tensor:
    """Triplet loss by Euclidean distances, not squared.

    Args:
        anchor, positive: (B, D); negatives: (B, K, D).
    Returns:
        (B, K), 0 or more.
    """
    right, wrong = F.pairwise_distance(anchor, positive), F.pairwise_distance(anchor[:, None], negatives)
    return F.relu(right[:, None] - wrong + margin)
