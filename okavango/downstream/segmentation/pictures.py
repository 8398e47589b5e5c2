"""Three-plane pictures of volumes, with labels laid over them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from okavango.models.volume import Array, Scan, turning

COLOURS = ("#e41a1c", "#ffdd33", "#377eb8", "#4daf4a", "#984ea3", "#ff7f00")
PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))  # and the axis of a RAS volume that stands still


def three_planes(
    volumes: Mapping[str, Array],
    out: str | os.PathLike,
    *,
    masks: Mapping[str, Array] | Mapping[str, Mapping[str, Array]] | None = None,
    affine: np.ndarray | None = None,
    at: Sequence[int] | None = None,
    title: str = "",
) -> Path:
    """Write a picture: a row per volume, its axial, coronal and sagittal plane through one point.

    With an affine, front is up in the axial plane and top in the others, the person's right is on the right and marked R, and
    voxels have their proportions. Without one, the array is taken to be RAS of cubic voxels.

    Args:
        volumes: name -> (D, H, W), all on one grid; grey runs from the 0.5th to the 99.5th percentile of what is not the lowest.
        out: file to write, .png for one.
        masks: name -> (D, H, W), true where it lies over every volume; or per volume a mapping of such, for predictions beside
            truth. Later ones lie over earlier ones.
        affine: (4, 4), index -> millimetres, of that grid.
        at: index of the point, (3,); when not given, the planes in which the masks together are largest, without masks the middle.
        title: above all; say "semi-synthetic" here where it is.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = list(volumes)
    grids = {name: _ras(volume, affine) for name, volume in volumes.items()}
    per_row = masks is not None and all(isinstance(mask, Mapping) for mask in masks.values())
    given: Mapping[str, Any] = masks or {}
    rows: dict[str, dict[str, Array]] = {name: dict(given.get(name, {}) if per_row else given) for name in names}
    laid = {name: {key: _ras(mask, affine) > 0 for key, mask in row.items()} for name, row in rows.items()}
    keys = list(dict.fromkeys(key for row in laid.values() for key in row))
    spacing = (
        np.ones(3) if affine is None else np.linalg.norm(np.asarray(affine)[:3, :3] @ _order(volumes[names[0]], affine), axis=0)
    )
    if at is None:
        everything = [mask for row in laid.values() for mask in row.values() if mask.any()]
        point = _middle(np.any(everything, 0)) if everything else tuple(side // 2 for side in grids[names[0]].shape)
    else:
        marker = np.zeros(volumes[names[0]].shape, bool)
        marker[tuple(at)] = True
        point = tuple(int(index[0]) for index in np.nonzero(_ras(marker, affine)))

    figure = Figure(figsize=(7.5, 2.5 * len(names) + 0.6), facecolor="black", layout="constrained")
    axes = figure.subplots(len(names), 3, squeeze=False)
    for row, name in enumerate(names):
        volume = grids[name].astype(np.float32)
        used = volume[volume > volume.min()]
        low, high = np.percentile(used, [0.5, 99.5]) if used.size else (0.0, 1.0)
        for column, (plane, axis) in enumerate(PLANES):
            ax, (across, up) = axes[row, column], [other for other in range(3) if other != axis]
            ax.imshow(
                np.take(volume, point[axis], axis).T,
                cmap="gray",
                vmin=min(low, volume.min()),
                vmax=high,
                origin="lower",
                aspect=spacing[up] / spacing[across],
                interpolation="nearest",
            )
            for number, key in enumerate(keys):
                flat = np.take(laid[name][key], point[axis], axis).T if key in laid[name] else np.zeros((1, 1), bool)
                if flat.any():
                    colour = COLOURS[number % len(COLOURS)]
                    ax.contourf(flat, levels=[0.5, 1.5], colors=[colour], alpha=0.25)
                    ax.contour(flat, levels=[0.5], colors=[colour], linewidths=0.8)
            ax.set_axis_off()
            ax.set_title(f"{name}, {plane}" if row == 0 or column == 0 else "", color="white", fontsize=8)
            if axis != 0:
                ax.text(0.98, 0.5, "R", color="white", fontsize=7, ha="right", va="center", transform=ax.transAxes)
    if title:
        figure.suptitle(title, color="white", fontsize=10)
    if keys:
        handles = [Line2D([], [], color=COLOURS[number % len(COLOURS)], label=key) for number, key in enumerate(keys)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(keys), frameon=False, labelcolor="white", fontsize=8)
    path = Path(out)
    figure.savefig(path, dpi=110, facecolor="black")
    return path


def _ras(volume: Array, affine: np.ndarray | None) -> np.ndarray:
    values = volume.detach().cpu().numpy() if isinstance(volume, Tensor) else np.asarray(volume)
    if affine is None:
        return values
    for step in turning(Scan(values, affine), "RAS"):
        values = np.asarray(step.apply(values, True, 0.0))
    return values


def _order(volume: Array, affine: np.ndarray) -> np.ndarray:
    """(3, 3), index after turning -> index before, without the shift."""
    steps = turning(Scan(torch.empty(tuple(volume.shape)), affine), "RAS")
    return steps[0].matrix()[:3, :3] if steps else np.eye(3)


def _middle(mask: np.ndarray) -> tuple[int, ...]:
    """The largest plane of a mask along each axis."""
    return tuple(int(mask.sum(tuple(other for other in range(3) if other != axis)).argmax()) for axis in range(3))
