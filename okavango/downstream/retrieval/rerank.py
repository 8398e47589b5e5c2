"""Order a short list anew by mutual nearest neighbours among local descriptors (SelaVPR, arXiv 2402.14505, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

CELLS = 2**27  # entries of the similarity matrices that are held at once: half a GiB


@torch.no_grad()
def mutual(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Which local descriptors are each other's nearest.

    Args:
        a: (B, n, C), b: (B, m, C), unit length.
    Returns:
        partner, int64 (B, n): the nearest of b for each of a; and bool (B, n): whether that one's nearest of a is this one.
    """
    partners, both = [], []
    rows = torch.arange(a.shape[1], device=a.device)
    step = max(1, CELLS // (a.shape[1] * b.shape[1]))
    for one, other in zip(a.split(step), b.split(step), strict=True):
        similarity = one @ other.transpose(1, 2)
        partner = similarity.argmax(2)
        partners.append(partner)
        both.append(similarity.argmax(1).gather(1, partner) == rows)
    return torch.cat(partners), torch.cat(both)


def match_counts(query: Tensor, candidates: Tensor, *, single_is_none: bool = False) -> Tensor:
    """Number of mutual nearest neighbours between a query and each candidate.

    Args:
        query: (n, C); candidates: (K, m, C); unit length.
        single_is_none: exactly one match counts as 0, as the published code has it.
    Returns:
        int64 (K,), at least 1 unless `single_is_none`: the greatest similarity of all is always mutual.
    """
    step = max(1, CELLS // (len(query) * candidates.shape[1]))
    parts = candidates.split(step)  # here, so that the query is not repeated for all of them at once
    counts = torch.cat([mutual(query.expand(len(part), -1, -1), part)[1].sum(1) for part in parts])
    return torch.where(counts == 1, 0, counts) if single_is_none else counts


def rerank(queries: Tensor, database: Tensor, candidates: Tensor, *, single_is_none: bool = False) -> tuple[Tensor, Tensor]:
    """Order each query's candidates by their match counts, descending; equal counts keep their order.

    Args:
        queries: local descriptors (Q, n, C) or (Q, H, W, C); database: (N, m, C) or (N, H, W, C); unit length.
        candidates: database indices (Q, K), best first, as `search` returns them.
        single_is_none: see `match_counts`.
    Returns:
        database indices int64 (Q, K), best first, and the counts int64 (Q, K) in the order of `candidates`.
    """
    queries, database = (maps.flatten(1, -2) for maps in (queries, database))
    counts = torch.stack(
        [match_counts(query, database[own], single_is_none=single_is_none) for query, own in zip(queries, candidates, strict=True)]
    )
    order = counts.argsort(dim=1, descending=True, stable=True)
    return candidates.gather(1, order), counts
