"""Which patches are hidden: blocks of random rectangles (BEiT, arXiv 2106.08254), shared out over a batch as DINOv2 does."""

from __future__ import annotations

import math
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
