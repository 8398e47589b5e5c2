"""Dice, HD95 and NSD per study and region, by MONAI, with a word for every empty case.

A study's result for a region is one of four cases: "both" (drawn and predicted), "missed" (drawn, nothing predicted), "invented"
(predicted, nothing drawn), "none" (neither). What the last three count as depends on the convention:

| | missed | invented | none |
|---|---|---|---|
| brats | Dice 0, NSD 0, HD95 the diagonal of the volume | the same | Dice 1, NSD 1, HD95 0 |
| reference | Dice 0, NSD 0, HD95 left out | Dice left out, NSD 0, HD95 left out | left out |

"brats" follows the challenge (its 373.13 mm is the diagonal of 240 x 240 x 155 voxels of 1 mm); "reference" is the mean without NaN
that BM-MAE's published scripts take, in which a complete miss does not hurt HD95. Numbers of the two cannot be compared.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

METRICS = ("dice", "hd95", "nsd")
CONVENTIONS = ("brats", "reference")
TOLERANCE = 1.0  # mm by which surfaces may lie apart for NSD
BEST = {"dice": 1.0, "hd95": 0.0, "nsd": 1.0}
NAMES = {"dice": "Dice", "hd95": "HD95", "nsd": "NSD"}


@dataclass(frozen=True)
class Score:
    """One study, one region.

    Attributes:
        id: of the study; region: its name.
        case: "both", "missed", "invented" or "none".
        dice, nsd: 0..1; hd95: millimetres; NaN where the case leaves them open.
        diagonal: of the volume, millimetres.
    """

    id: str
    region: str
    case: str
    dice: float
    hd95: float
    nsd: float
    diagonal: float

    def value(self, metric: str, convention: str = "brats") -> float:
        """What the study counts as; NaN where the convention leaves it out.

        Raises:
            ValueError: unknown metric or convention.
        """
        if metric not in METRICS or convention not in CONVENTIONS:
            raise ValueError(f"{metric!r} by {convention!r}; expected one of {', '.join(METRICS)} by {' or '.join(CONVENTIONS)}")
        if self.case == "both":
            return getattr(self, metric)
        if convention == "brats":
            return BEST[metric] if self.case == "none" else {"dice": 0.0, "nsd": 0.0, "hd95": self.diagonal}[metric]
        counts_zero = metric == "nsd" and self.case != "none" or metric == "dice" and self.case == "missed"
        return 0.0 if counts_zero else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; NaN becomes null."""
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        """Read what `to_json` wrote."""
        fields: dict[str, Any] = {key: math.nan if value is None else value for key, value in data.items()}
        return cls(**fields)


def score(
    predicted: Tensor,
    target: Tensor,
    spacing: Sequence[float],
    regions: Sequence[str],
    *,
    id: str = "",
    tolerance: float = TOLERANCE,
) -> list[Score]:
    """Compare two segmentations of one study.

    Args:
        predicted, target: bool (regions, D, H, W).
        spacing: millimetres per voxel along the axes.
        tolerance: of NSD, millimetres.
    Raises:
        ValueError: shapes that differ, or do not go with the regions.
    """
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    if predicted.shape != target.shape or predicted.ndim != 4 or len(predicted) != len(regions):
        raise ValueError(
            f"segmentations of {list(predicted.shape)} and {list(target.shape)}; expected ({len(regions)}, D, H, W) of both"
        )
    diagonal = math.sqrt(sum((side * step) ** 2 for side, step in zip(target.shape[1:], spacing, strict=True)))
    scores = []
    for region, said, true in zip(regions, predicted.bool(), target.bool(), strict=True):
        case = {(True, True): "both", (False, True): "missed", (True, False): "invented", (False, False): "none"}[
            bool(said.any()), bool(true.any())
        ]
        dice = hd95 = nsd = math.nan
        if case == "both":
            box = _box(said | true)
            a, b = said[box][None, None], true[box][None, None]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # MONAI announces changes of its own arguments
                dice = float(compute_dice(a, b))
                distances: dict[str, Any] = {"include_background": True, "spacing": tuple(spacing)}
                hd95 = float(compute_hausdorff_distance(a, b, percentile=95, **distances))
                nsd = float(compute_surface_dice(a, b, [tolerance], **distances))
        scores.append(Score(id, region, case, dice, hd95, nsd, diagonal))
    return scores


def _box(mask: Tensor) -> tuple[slice, ...]:
    """Where a mask is, with a voxel around, so that its surface stays one; distances are taken in there only."""
    spans = []
    for axis in range(3):
        used = torch.nonzero(mask.any(dim=tuple(other for other in range(3) if other != axis)))
        spans.append(slice(max(0, int(used.min()) - 1), int(used.max()) + 2))
    return tuple(spans)


@dataclass(frozen=True, eq=False)
class Summary:
    """One metric of one region over studies.

    Attributes:
        value: the mean of `values`, NaN where there are none.
        values: of the studies that count, (n,).
        cases: case -> number of studies, of all.
        left_out: studies that the convention leaves out.
        median: of `values`.
    """

    region: str
    metric: str
    convention: str
    value: float
    values: np.ndarray
    cases: dict[str, int]
    left_out: int
    median: float


def summarise(scores: Iterable[Score], convention: str = "brats") -> list[Summary]:
    """Means over studies, per region (in order of appearance) and metric."""
    rows: dict[str, list[Score]] = {}
    for each in scores:
        rows.setdefault(each.region, []).append(each)
    found = []
    for region, row in rows.items():
        cases = {case: count for case, count in sorted(Counter(each.case for each in row).items())}
        for metric in METRICS:
            values = np.array([each.value(metric, convention) for each in row])
            kept = values[~np.isnan(values)]
            mean, median = (float(kept.mean()), float(np.median(kept))) if len(kept) else (math.nan, math.nan)
            found.append(Summary(region, metric, convention, mean, kept, cases, len(values) - len(kept), median))
    return found
