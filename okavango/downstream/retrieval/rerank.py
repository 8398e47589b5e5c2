"""Order a short list anew by mutual nearest neighbours among local descriptors (SelaVPR, arXiv 2402.14505, section 3.4)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CELLS = 2**27  # entries of the similarity matrices that an accelerator holds at once: half a GiB
ROWS = 96  # of a similarity matrix that a processor makes and looks through while they are in its cache


@torch.no_grad()
def mutual(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Which local descriptors are each other's nearest; of equally near ones, the first is.

    Args:
        a: (B, n, C), b: (B, m, C), unit length.
    Returns:
        partner, int64 (B, n): the nearest of b for each of a; and bool (B, n): whether that one's nearest of a is this one.
    """
    on_cpu = a.device.type == "cpu"
    step = 1 if on_cpu else max(1, CELLS // (a.shape[1] * b.shape[1]))
    match = _match_on_cpu if on_cpu else _match
    found = [match(one, other) for one, other in zip(a.split(step), b.split(step), strict=True)]
    partners, both = (torch.cat(parts) for parts in zip(*found, strict=True))
    return partners, both


def _match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    similarity = a @ b.transpose(1, 2)
    partner = similarity.argmax(2)
    return partner, similarity.argmax(1).gather(1, partner) == torch.arange(a.shape[1], device=a.device)


def _match_on_cpu(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One pair, (1, n, C) and (1, m, C), in blocks of `ROWS` of its similarities, each of which is gone through in the cache.

    The product is most of the work then: maxima are found by numpy's vector instructions, which torch does not use for their
    places, and the place of a column's maximum is only asked for where a row has its own maximum in it.
    """
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    queries, cells = a[0].to(dtype), b[0].to(dtype).T
    block = torch.empty(min(ROWS, len(queries)), cells.shape[1], dtype=dtype)
    greatest = torch.full(cells.shape[1:], -torch.inf, dtype=dtype).numpy()  # of each column, in the blocks so far
    nearest = np.full(cells.shape[1], -1)  # its row, where that row's maximum is in this column
    partner = np.empty(len(queries), np.int64)
    equal = np.empty(block.shape, bool)
    for first in range(0, len(queries), ROWS):
        rows = queries[first : first + ROWS]
        similarity = torch.mm(rows, cells, out=block[: len(rows)]).numpy()
        partner[first : first + ROWS] = own = similarity.argmax(1)
        top = similarity.max(0)
        new = np.where(top > greatest, -1, nearest)  # an earlier row keeps a column that it has with an equal value
        if np.count_nonzero(np.equal(similarity, top, out=equal[: len(rows)])) == len(top):
            found = np.flatnonzero((similarity[np.arange(len(rows)), own] == top[own]) & (top > greatest)[own])
            new[own[found]] = found + first
        else:  # a maximum stands in several rows: the first counts
            new = np.where(top > greatest, similarity.argmax(0) + first, nearest)
        nearest, greatest = new, np.maximum(greatest, top)
    both = nearest[partner] == np.arange(len(queries))
    return torch.from_numpy(partner)[None], torch.from_numpy(both)[None]


def match_counts(query: Tensor, candidates: Tensor, *, single_is_none: bool = False) -> Tensor:
    """Number of mutual nearest neighbours between a query and each candidate.

    Args:
        query: (n, C); candidates: (K, m, C); unit length.
        single_is_none: exactly one match counts as 0, as the published code has it.
    Returns:
        int64 (K,), at least 1 unless `single_is_none`: the greatest similarity of all is always mutual.
    """
    counts = mutual(query.expand(len(candidates), -1, -1), candidates)[1].sum(1)
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
