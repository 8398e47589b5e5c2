"""Which elastic student each step of a run trains, and how the run covers the candidates. Needs neither model nor run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from okavango.data.loading import derive
from okavango.models.features import Subnet


@lru_cache(maxsize=2)
def drawn_order(size: int, seed: int, rank: int, cycle: int) -> np.ndarray:
    """Places in a pool of `size` entries in the order in which a rank uses them up: step = cycle * size + position.

    Returns:
        a permutation of 0 .. size - 1, int64 (size,), read-only.
    """
    order = np.random.Generator(np.random.Philox(derive(seed, "subnet", rank, cycle))).permutation(size)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, eq=False)
class Coverage:
    """How the draws of a run are spread over the candidates.

    Attributes:
        subnets: the S candidates, ascending.
        multiplicity: entries of each in the pool, int64 (S,).
        counts: draws of each by the end of the run, all ranks together, int64 (S,).
        candidates_seen, entries_seen: share of the candidates, and of the pool's entries, that some rank has drawn after
            1, 2, .. steps; float64 (min(steps, size of the pool),), 0..1. After that many steps both stay as they are.
    """

    subnets: tuple[Subnet, ...]
    multiplicity: np.ndarray
    counts: np.ndarray
    candidates_seen: np.ndarray
    entries_seen: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        """Draws that each would have in exact proportion to its multiplicity, float64 (S,)."""
        return self.counts.sum() * self.multiplicity / self.multiplicity.sum()


def coverage(pool: Sequence[Subnet], *, seed: int, steps: int, ranks: int = 1) -> Coverage:
    """Count the draws of a run without repeating them: a whole cycle draws each entry once, so only the last one is looked at.

    Args:
        pool: with multiplicities, as `POA.pool`.
        seed: of the run; steps: its length; ranks: processes that draw for themselves, 1 when they share one subnet.
    Raises:
        ValueError: an empty pool, or less than one step or rank.

    Example:
        >>> found = coverage([Subnet(32, 1), Subnet(32, 1), Subnet(64, 1)], seed=0, steps=300)
        >>> found.counts.tolist(), found.entries_seen.tolist()
        ([200, 100], [0.3333333333333333, 0.6666666666666666, 1.0])
    """
    if not pool or steps < 1 or ranks < 1:
        raise ValueError(f"coverage: pool of {len(pool)}, {steps} steps, {ranks} ranks; expected at least one of each")
    size, subnets = len(pool), tuple(sorted(set(pool)))
    candidate = np.array([subnets.index(subnet) for subnet in pool])  # of each entry
    multiplicity = np.bincount(candidate)
    cycles, rest = divmod(steps, size)
    counts = ranks * cycles * multiplicity
    first = np.full(size, size)  # step at which some rank first draws an entry
    for rank in range(ranks):
        first = np.minimum(first, np.argsort(drawn_order(size, seed, rank, 0)))
        counts = counts + np.bincount(candidate[drawn_order(size, seed, rank, cycles)[:rest]], minlength=len(subnets))
    first_of_candidate = np.full(len(subnets), size)
    np.minimum.at(first_of_candidate, candidate, first)
    after = np.arange(1, min(steps, size) + 1)

    def share(firsts: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.sort(firsts), after) / len(firsts)

    return Coverage(subnets, multiplicity, counts, share(first_of_candidate), share(first))


def coverage_picture(path: str | os.PathLike, pool: Sequence[Subnet], *, seed: int, steps: int, ranks: int = 1) -> Path:
    """Draw `coverage` as PNG.

    Left, the shares that the first steps see, for several numbers of ranks. Right, the draws of each width and depth by the end of
    the run, and these over the expected ones; a width and depth that is not in the pool (the intact network) is left blank.

    Args:
        path: file to write; others: see `coverage`.
    Returns:
        the path that was written.
    """
    from matplotlib.figure import Figure

    found = coverage(pool, seed=seed, steps=steps, ranks=ranks)
    figure = Figure(figsize=(13, 7))
    axes = figure.subplot_mosaic([["seen", "counts"], ["seen", "ratio"]], width_ratios=[1, 1.9])
    figure.subplots_adjust(left=0.045, right=1, bottom=0.11, top=0.96, wspace=0.13, hspace=0.42)

    for colour, count in enumerate(sorted({1, 2, 4, 8, ranks})):
        one = found if count == ranks else coverage(pool, seed=seed, steps=steps, ranks=count)
        label, width = (f"{count} (this run)", 2.2) if count == ranks else (str(count), 1)
        after = range(1, len(one.entries_seen) + 1)
        axes["seen"].plot(after, 100 * one.candidates_seen, color=f"C{colour}", linewidth=width, label=label)
        axes["seen"].plot(after, 100 * one.entries_seen, color=f"C{colour}", linewidth=width, linestyle=":")
    axes["seen"].legend(title="ranks that draw", fontsize=8, title_fontsize=8)
    axes["seen"].set_title(f"{len(found.subnets)} candidates (lines), {len(pool)} entries of the pool (dots)", fontsize=9)
    axes["seen"].set_xlabel(f"steps, the first {len(found.entries_seen):,} of {steps:,}", fontsize=8)
    axes["seen"].set_ylabel("drawn so far, %", fontsize=8)
    axes["seen"].set_ylim(0, 102)
    axes["seen"].grid(alpha=0.3)

    _heat_map(axes["counts"], found, found.counts, "{:.0f}", cmap="cividis")
    axes["counts"].set_title(f"times drawn in {steps:,} steps, ranks that draw: {ranks}", fontsize=9)
    _heat_map(axes["ratio"], found, found.counts / found.expected, "{:.2f}", cmap="RdBu", vmin=0, vmax=2)
    axes["ratio"].set_title("times drawn / times expected from the multiplicities", fontsize=9)
    for axis in axes.values():
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)
    return Path(path)


def _heat_map(axis, found: Coverage, values: np.ndarray, form: str, **colours) -> None:
    """One value per candidate: widths upwards, depths to the right by their number of blocks; written where there is room."""
    widths = sorted({subnet.width for subnet in found.subnets})
    depths = sorted({subnet.depth for subnet in found.subnets}, key=lambda d: (sum(d), d) if isinstance(d, tuple) else (d, ()))
    grid = np.full((len(widths), len(depths)), np.nan)
    for subnet, value in zip(found.subnets, values, strict=True):
        grid[widths.index(subnet.width), depths.index(subnet.depth)] = value
    drawn = axis.imshow(grid, origin="lower", aspect="auto", interpolation="nearest", **colours)
    axis.figure.colorbar(drawn, ax=axis, pad=0.01).ax.tick_params(labelsize=7)
    every = -(-len(depths) // 40)
    names = ["-".join(map(str, depth)) if isinstance(depth, tuple) else str(depth) for depth in depths[::every]]
    axis.set_xticks(range(0, len(depths), every), names, rotation=90 if isinstance(depths[0], tuple) else 0)
    axis.set_yticks(range(len(widths)), list(map(str, widths)))
    axis.set_xlabel("depth", fontsize=8)
    axis.set_ylabel("width", fontsize=8)
    if grid.size > 160:
        return
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            bright = np.dot(drawn.cmap(drawn.norm(value))[:3], (0.299, 0.587, 0.114)) > 0.5
            ink = "black" if bright else "white"
            axis.text(column, row, form.format(value), ha="center", va="center", fontsize=6, color=ink)
