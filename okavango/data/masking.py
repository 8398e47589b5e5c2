"""Which patches are hidden: blocks of random rectangles (BEiT, arXiv 2106.08254), shared out over a batch as DINOv2 does; or a
fixed number of them, shared out over modalities (MultiMAE, arXiv 2204.01678, as in BM-MAE, arXiv 2505.00568)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import numpy as np


def block_mask(
    grid: tuple[int, int],
    count: int,
    draw: Random,
    *,
    min_patches: int = 4,
    max_share: float = 0.5,
    min_aspect: float = 0.3,
) -> np.ndarray:
    """Hide about `count` patches by rectangles.

    A rectangle has a uniform area between `min_patches` and what is still missing (at most `max_share` of the grid), and a
    log-uniform aspect between `min_aspect` and its inverse. It is taken when it hides at least one new patch and not more than
    are missing; after ten failures in a row the mask stays short.

    Returns:
        bool (rows, columns), True where hidden.
    """
    rows, columns = grid
    mask = np.zeros(grid, bool)
    largest = int(max_share * rows * columns)
    aspect_range = (math.log(min_aspect), math.log(1 / min_aspect))
    missing = count
    while missing > 0:
        limit = min(missing, largest)
        for _ in range(10):
            area = draw.uniform(min_patches, limit)
            aspect = math.exp(draw.uniform(*aspect_range))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < columns):
                continue
            top, left = draw.randint(0, rows - height), draw.randint(0, columns - width)
            window = mask[top : top + height, left : left + width]
            added = height * width - int(window.sum())
            if 0 < added <= limit:
                window[:] = True
                missing -= added
                break
        else:
            break
    return mask


def batch_masks(
    crops: int, grid: tuple[int, int], draw: Random, *, probability: float, ratio: tuple[float, float], **rectangles
) -> np.ndarray:
    """Masks for the global crops of a batch.

    A share `probability` of the crops is masked; the i-th of them hides a uniform share between the i-th and the next of equally
    spaced bounds in `ratio`; then the masks are shuffled over the crops.

    Returns:
        bool (crops, patches).
    """
    masked, patches = int(crops * probability), grid[0] * grid[1]
    bounds = np.linspace(*ratio, masked + 1)
    masks = []
    for i in range(crops):
        count = int(patches * draw.uniform(bounds[i], bounds[i + 1])) if i < masked else 0
        masks.append(block_mask(grid, count, draw, **rectangles))
    draw.shuffle(masks)
    return np.stack(masks).reshape(crops, patches)


def modality_masks(
    tokens: Sequence[int], draw: np.random.Generator, *, ratio: float, concentration: float = 1.0
) -> list[np.ndarray]:
    """Hide a share of the tokens of all modalities together; how the others are shared out is drawn.

    Args:
        tokens: number of tokens of each modality.
        ratio: share that is hidden; exactly int(N (1 - ratio)) of all N tokens stay visible.
        concentration: of the Dirichlet distribution of the shares; 1 is uniform over all ways to share out.
    Returns:
        per modality bool (n,), True where hidden.
    """
    count = int(sum(tokens) * (1 - ratio))
    shares = visible_shares(tokens, count, draw, concentration)
    order = visible_first(shares, [draw.random(n) for n in tokens], draw.random(sum(tokens)), count)
    hidden = np.ones(len(order), bool)
    hidden[order[:count]] = False
    return np.split(hidden, np.cumsum(tokens)[:-1])


def visible_shares(tokens: Sequence[int], count: int, draw: np.random.Generator, concentration: float = 1.0) -> np.ndarray:
    """What part of `count` visible tokens each modality gets: a Dirichlet draw in which none gets more than it has.

    Where nearly all tokens are visible, such draws are rare: after 4096 in vain each gets a part in proportion to its tokens.

    Returns:
        float64 (modalities,), sums to 1.
    """
    limits = np.asarray(tokens) / max(1, count)
    for _ in range(16):
        drawn = draw.dirichlet([concentration] * len(tokens), 256)
        fitting = drawn[(drawn < limits).all(1)]
        if len(fitting):
            return fitting[0]
    return np.asarray(tokens) / sum(tokens)


def visible_first(shares: np.ndarray, noise: Sequence[np.ndarray], shuffle: np.ndarray, count: int) -> np.ndarray:
    """All tokens in an order whose first `count` are the visible ones.

    Each modality offers its part, rounded half to even; what rounding leaves over or lacks is settled at random.

    Args:
        shares: of each modality, (modalities,).
        noise: per modality uniform numbers (n,), which choose what it offers; shuffle: uniform (N,), which orders all tokens.
    Returns:
        int64 (N,), indices into the tokens of all modalities, one after another.
    """
    kept_back = [np.argsort(each) >= np.rint(share * count) for share, each in zip(shares, noise, strict=True)]
    return np.argsort(np.concatenate(kept_back) + shuffle, kind="stable")
