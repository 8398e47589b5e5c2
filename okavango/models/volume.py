"""Applies `Volume` specs to scans: turn, crop to the foreground, resample, cut to size, normalise; and the way back.

The sequences of a study go through the same steps and stay on one grid. The steps are written down in a `Geometry`, by which a
label follows them (`carry`) and a prediction returns to the grid on which the study is stored (`undo`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from okavango.models._apply import normalise
from okavango.models.preprocess import Preprocess, PreprocessError, Resize, Volume

Grid = tuple[int, int, int]
Array = np.ndarray | Tensor

_WORLD = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}  # axis of space, direction along it
_SAME_SPACING = 1e-3  # relative difference below which nothing is resampled
_SAME_PLACE = 0.1  # voxels by which corners may differ where two sequences share a grid


@dataclass(frozen=True, eq=False)
class Scan:
    """One volume with its description.

    Attributes:
        values: (D, H, W), any number type, in the order of axes in which it is stored.
        affine: float64 (4, 4), index -> millimetres to the right, front and top (RAS+), or None when unknown.
        spacing: millimetres per voxel along each axis; follows from the affine where there is one.
        name: of the file, for messages.
    Raises:
        PreprocessError: an affine that is not one.
    """

    values: Array
    affine: np.ndarray | None = None
    spacing: tuple[float, float, float] | None = None
    name: str = ""

    def __post_init__(self):
        if self.affine is None:
            return
        affine = np.asarray(self.affine, np.float64)
        singular = affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9
        if singular:
            raise PreprocessError(f"{self.name or 'scan'}: its affine places it nowhere; expected an invertible 4x4 matrix")
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "spacing", tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()))


# -- steps: each knows its grid before and after, the matrix from new to old indices, and its own way back -----------------------


@dataclass(frozen=True)
class Turn:
    """Axes in another order and direction: axis i is `order[i]` of before, backwards where `flip[i]`."""

    before: Grid
    order: Grid
    flip: tuple[bool, bool, bool]

    @property
    def after(self) -> Grid:
        return tuple(self.before[axis] for axis in self.order)  # type: ignore[return-value]

    def matrix(self) -> np.ndarray:
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1
        for axis, (source, flipped) in enumerate(zip(self.order, self.flip, strict=True)):
            matrix[source, axis] = -1 if flipped else 1
            matrix[source, 3] = self.before[source] - 1 if flipped else 0
        return matrix

    def apply(self, values: Array, nearest: bool, fill: float) -> Array:
        lead = values.ndim - 3
        order = (*range(lead), *(lead + axis for axis in self.order))
        flipped = [lead + axis for axis in range(3) if self.flip[axis]]
        if isinstance(values, Tensor):
            return values.permute(order).flip(flipped) if flipped else values.permute(order)
        return np.flip(values.transpose(order), tuple(flipped))

    def back(self) -> Turn:
        order = tuple(self.order.index(axis) for axis in range(3))
        return Turn(self.after, order, tuple(self.flip[axis] for axis in order))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Window:
    """The part of the grid that begins at index `start`, which may be outside: what is outside is filled."""

    before: Grid
    start: Grid
    after: Grid

    def matrix(self) -> np.ndarray:
        matrix = np.eye(4)
        matrix[:3, 3] = self.start
        return matrix

    def apply(self, values: Array, nearest: bool, fill: float) -> Array:
        spans = [(max(0, s), min(b, s + a)) for b, s, a in zip(self.before, self.start, self.after, strict=True)]
        box: Any = (..., *(slice(low, max(low, high)) for low, high in spans))
        inside = values[box]
        short = [(low - s, s + a - max(low, high)) for (low, high), s, a in zip(spans, self.start, self.after, strict=True)]
        if not any(itertools.chain(*short)):
            return inside
        padding = [width for pair in reversed(short) for width in pair]
        return F.pad(_tensor(inside) if nearest else _float(inside), padding, value=fill)

    def back(self) -> Window:
        return Window(self.after, tuple(-s for s in self.start), self.before)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Resample:
    """Another number of voxels along the axes: index i of after is index ``offset + step * i`` of before.

    Linear between voxels, and the outermost voxel beyond them. `filtered` axes are low-pass filtered where they shrink.
    """

    before: Grid
    after: Grid
    step: tuple[float, float, float]
    offset: tuple[float, float, float]
    filtered: bool = False
    nearest: bool = False

    def matrix(self) -> np.ndarray:
        matrix = np.diag([*self.step, 1.0])
        matrix[:3, 3] = self.offset
        return matrix

    def apply(self, values: Array, nearest: bool, fill: float) -> Tensor:
        nearest = nearest or self.nearest
        out = _tensor(values) if nearest else _float(values)
        for axis in sorted(range(3), key=lambda axis: self.after[axis] / self.before[axis]):  # what shrinks most goes first
            size, step, offset = self.before[axis], self.step[axis], self.offset[axis]
            if (step, offset, size) == (1, 0, self.after[axis]):
                continue
            places = np.clip(offset + step * np.arange(self.after[axis]), 0, size - 1)
            out = _sample(out, out.ndim - 3 + axis, places, max(1.0, step) if self.filtered else 1.0, nearest)
        return out

    def back(self) -> Resample:
        offset = tuple(-o / s for o, s in zip(self.offset, self.step, strict=True))
        return Resample(self.after, self.before, tuple(1 / s for s in self.step), offset, False, self.nearest)  # type: ignore[arg-type]


def _sample(values: Tensor, axis: int, places: np.ndarray, reach: float, nearest: bool) -> Tensor:
    """Values along one axis at fractional indices: a sum over few taps with the weights of a triangle of half-width `reach`."""

    def pick(indices: np.ndarray) -> Tensor:
        return values.index_select(axis, torch.from_numpy(indices).to(values.device))

    if nearest:
        return pick(np.rint(places).astype(np.int64))
    indices = np.floor(places - reach)[:, None] + 1 + np.arange(2 * math.ceil(reach))
    weights = np.maximum(0, 1 - np.abs(indices - places[:, None]) / reach)
    weights[(indices < 0) | (indices >= values.shape[axis])] = 0
    weights /= weights.sum(1, keepdims=True)
    indices = np.clip(indices, 0, values.shape[axis] - 1).astype(np.int64)
    shape = (-1,) + (1,) * (values.ndim - 1 - axis)
    columns = torch.from_numpy(weights.T.astype(np.float32)).to(values.device)
    out = pick(indices[:, 0]).mul_(columns[0].view(shape))
    for tap in range(1, indices.shape[1]):
        out.addcmul_(pick(indices[:, tap]), columns[tap].view(shape))
    return out


Step = Turn | Window | Resample
_STEPS: dict[str, type] = {"turn": Turn, "window": Window, "resample": Resample}


@dataclass(frozen=True)
class Geometry:
    """What was done to the grid of a study, in order.

    Attributes:
        shape: the stored grid.
        affine: of the stored grid, (4, 4) as nested tuples, or None when unknown.
        steps: see there.
    """

    shape: Grid
    affine: tuple[tuple[float, ...], ...] | None = None
    steps: tuple[Step, ...] = ()

    @property
    def size(self) -> Grid:
        """The grid after all steps."""
        return self.steps[-1].after if self.steps else self.shape

    def matrix(self) -> np.ndarray:
        """float64 (4, 4): index on the last grid -> index on the stored one."""
        matrix = np.eye(4)
        for step in self.steps:
            matrix = matrix @ step.matrix()
        return matrix

    def placed(self) -> np.ndarray | None:
        """The affine of the last grid, float64 (4, 4); None when that of the stored one is unknown."""
        return None if self.affine is None else np.asarray(self.affine) @ self.matrix()

    def then(self, *steps: Step) -> Geometry:
        """With further steps."""
        return replace(self, steps=self.steps + steps)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        kinds = {cls: kind for kind, cls in _STEPS.items()}
        return {
            "shape": self.shape,
            "affine": self.affine,
            "steps": [{"kind": kinds[type(step)], **vars(step)} for step in self.steps],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Geometry:
        """Read what `to_json` wrote."""
        steps = []
        for entry in data["steps"]:
            fields = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items() if key != "kind"}
            steps.append(_STEPS[entry["kind"]](**fields))
        affine = data["affine"]
        return cls(tuple(data["shape"]), affine and tuple(map(tuple, affine)), tuple(steps))


def carry(geometry: Geometry, values: Array, *, nearest: bool = False, fill: float = 0.0) -> Tensor:
    """What stands on the stored grid -> on the last one.

    Args:
        values: (..., D, H, W).
        nearest: take the nearest voxel, for labels, and keep the number type; otherwise linear, in float32.
        fill: value of padded cells.
    Raises:
        PreprocessError: another grid.
    """
    _expect_grid(values, geometry.shape, "stored")
    return _carry(geometry.steps, values, nearest, fill)


def undo(geometry: Geometry, values: Array, *, nearest: bool = False, fill: float = 0.0) -> Tensor:
    """What stands on the last grid, such as a prediction -> on the stored one; cells that had been cut off are filled.

    Args, Raises: as for `carry`.

    Example:
        >>> turned = Geometry((2, 3, 4)).then(Turn((2, 3, 4), (2, 0, 1), (True, False, False)))
        >>> stored = torch.arange(24).view(2, 3, 4)
        >>> torch.equal(undo(turned, carry(turned, stored, nearest=True), nearest=True), stored)
        True
    """
    _expect_grid(values, geometry.size, "network's")
    return _carry([step.back() for step in reversed(geometry.steps)], values, nearest, fill)


def _carry(steps: Sequence[Step], values: Array, nearest: bool, fill: float) -> Tensor:
    for step in steps:
        values = step.apply(values, nearest, fill)
    return _tensor(values).contiguous() if nearest else _float(values)


def _expect_grid(values: Array, grid: Grid, whose: str) -> None:
    if tuple(values.shape[-3:]) != tuple(grid):
        raise PreprocessError(f"a volume of {sizes(values.shape[-3:])} voxels does not stand on the {whose} grid of {sizes(grid)}")


# -- which steps a spec asks for ----------------------------------------------------------------------------------------------


def orientation(affine: np.ndarray) -> str:
    """Axis codes of an affine: towards where each axis of the array runs.

    Example:
        >>> orientation(np.diag([-1.0, -1.0, 1.0, 1.0]))
        'LPS'
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    best = max(itertools.permutations(range(3)), key=lambda order: sum(abs(directions[order[axis], axis]) for axis in range(3)))
    letters = {place: letter for letter, place in _WORLD.items()}
    return "".join(letters[world, 1 if directions[world, axis] > 0 else -1] for axis, world in enumerate(best))


def turning(scan: Scan, wanted: str | None) -> tuple[Step, ...]:
    """The step that brings a scan into an orientation such as "RAS"; none where it is so already, or none is wanted.

    Raises:
        PreprocessError: the scan does not tell its orientation, or the wanted one is none.
    """
    if wanted is None:
        return ()
    goal = [_WORLD.get(letter, (-1, 0)) for letter in wanted]
    if sorted(world for world, _ in goal) != [0, 1, 2]:
        raise PreprocessError(f"orientation {wanted!r}: expected three letters, one each of RL, AP and SI, such as RAS")
    if scan.affine is None:
        raise PreprocessError(
            f"{scan.name or 'scan'}: this checkpoint wants {wanted} orientation, and an array alone tells none; "
            "pass Scan(values, affine)"
        )
    have = [_WORLD[letter] for letter in orientation(scan.affine)]
    order = [[world for world, _ in have].index(world) for world, _ in goal]
    flip = [have[source][1] != sign for source, (_, sign) in zip(order, goal, strict=True)]
    if order == [0, 1, 2] and not any(flip):
        return ()
    return (Turn(_grid(scan.values), tuple(order), tuple(flip)),)  # type: ignore[arg-type]


def _spaced(grid: Grid, have: Sequence[float] | None, wanted: Sequence[float] | None, name: str) -> tuple[Step, ...]:
    """Resampling to a voxel size; the first voxel stays where it is, as in MONAI's `Spacing`. No low-pass filter, as there."""
    if wanted is None:
        return ()
    if have is None:
        raise PreprocessError(
            f"{name or 'scan'}: this checkpoint wants voxels of {_mm(wanted)}, and an array alone tells no size; "
            "pass Scan(values, affine) or Scan(values, spacing=...)"
        )
    ratios = [w / h if abs(w / h - 1) > _SAME_SPACING else 1.0 for h, w in zip(have, wanted, strict=True)]
    if ratios == [1, 1, 1]:
        return ()
    # with the 1 inside, as MONAI has it: a half goes to the even number
    after = tuple(round((side - 1) / ratio + 1) for side, ratio in zip(grid, ratios, strict=True))
    return (Resample(grid, after, tuple(ratios), (0.0, 0.0, 0.0)),)  # type: ignore[arg-type]


def _sized(grid: Grid, size: Grid, rule: Resize) -> tuple[Step, ...]:
    """Scaling, cropping and padding to a size."""
    if rule.rule == "none":
        if any(side % rule.multiple_of for side in grid):
            raise PreprocessError(f"volume of {sizes(grid)} voxels: all sides must be multiples of {rule.multiple_of}")
        return ()
    steps: tuple[Step, ...] = ()
    target = [int(side / rule.crop_ratio + 1e-6) for side in size]
    if rule.rule == "shortest":
        factor = max(t / g for t, g in zip(target, grid, strict=True))
        target = [max(t, int(g * factor + 1e-6)) for t, g in zip(target, grid, strict=True)]
    elif rule.rule == "pad":
        factor = min(s / g for s, g in zip(size, grid, strict=True))
        target = [max(1, round(g * factor)) for g in grid]
    if rule.rule != "crop" and list(grid) != target:
        if rule.interpolation not in ("nearest", "bilinear"):
            raise PreprocessError(f"resize: interpolation {rule.interpolation!r} of volumes; expected bilinear or nearest")
        if rule.corners == "aligned":
            step = [(g - 1) / (t - 1) if t > 1 else 1.0 for g, t in zip(grid, target, strict=True)]
            offset = [0.0, 0.0, 0.0]
        else:
            step = [g / t for g, t in zip(grid, target, strict=True)]
            offset = [(s - 1) / 2 for s in step]
        scaled = Resample(grid, tuple(target), tuple(step), tuple(offset), rule.antialias, rule.interpolation == "nearest")  # type: ignore[arg-type]
        steps, grid = (scaled,), scaled.after
    if grid != tuple(size):
        # in the middle, as MONAI's CenterSpatialCrop and SpatialPad understand it where a difference is odd
        start = [g // 2 - s // 2 if g > s else -((s - g) // 2) for g, s in zip(grid, size, strict=True)]
        steps += (Window(grid, tuple(start), tuple(size)),)  # type: ignore[arg-type]
    return steps


def _foreground(volumes: Sequence[Array]) -> tuple[Step, ...]:
    """The box outside of which all volumes are zero."""
    grid, start, after = _grid(volumes[0]), [], []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        used = np.zeros(grid[axis], bool)
        for volume in volumes:
            used |= np.asarray((volume != 0).any(others).cpu()) if isinstance(volume, Tensor) else (volume != 0).any(others)
        inside = np.flatnonzero(used)
        start.append(int(inside[0]))
        after.append(int(inside[-1]) + 1 - start[-1])
    return () if tuple(after) == grid else (Window(grid, tuple(start), tuple(after)),)  # type: ignore[arg-type]


# -- studies ------------------------------------------------------------------------------------------------------------------


def prepare(preprocess: Preprocess, study: Mapping[str, Any]) -> tuple[dict[str, Tensor], Geometry]:
    """Bring the sequences of one study into the network's grid and units, all by the same steps.

    Args:
        preprocess: specs of volumes of one size, spacing, orientation and resize rule.
        study: modality or alias -> `Scan`, or a bare array (D, H, W); a modality of several channels takes {channel: scan} or an
            array (C, D, H, W). Any subset of the modalities, at least one.
    Returns:
        modality -> float32 (C, D, H, W), and what was done to the grid.
    Raises:
        PreprocessError: an unknown or doubled name, a volume that is not three-dimensional, is empty, all zero or not finite,
            sequences on different grids, or a description that the specs need and the data lacks.
    """
    named: dict[str, Any] = {}
    for given, value in study.items():
        name = preprocess.resolve(given)
        if name in named:
            raise PreprocessError(f"modality {name!r} was given twice, once as {given!r}")
        named[name] = value
    if not named:
        raise PreprocessError(f"the study has no sequence; this checkpoint takes {', '.join(preprocess)}")
    specs = {name: _volume(preprocess, name) for name in named}
    spec = next(iter(specs.values()))
    for name, other in specs.items():
        if _target(other) != _target(spec):
            raise PreprocessError(f"modalities {next(iter(specs))!r} and {name!r} go to different grids; prepare them one by one")
    scans = {name: _channels(specs[name], value, name) for name, value in named.items()}

    first = next(iter(scans.values()))[0]
    turned: dict[str, list[Scan]] = {}
    for name, channels in scans.items():
        turned[name] = [_turned(_checked(scan, name), spec.orientation) for scan in channels]
        for scan in turned[name]:
            expect_same_grid(scan, next(iter(turned.values()))[0])
    start = next(iter(turned.values()))[0]
    everything = [scan.values for channels in turned.values() for scan in channels]
    native = _foreground(everything) if spec.foreground else ()
    grid = native[-1].after if native else _grid(start.values)
    native += _spaced(grid, start.spacing, spec.spacing, first.name)
    grid = native[-1].after if native else grid
    sized = _sized(grid, spec.size, spec.resize)
    late: tuple[Step, ...] = ()
    if spec.resize.on == "native":
        native += sized
    else:
        late = sized

    done = {}
    for name, channels in turned.items():
        own = specs[name]
        parts = [_carry(native, scan.values, False, own.resize.fill) for scan in channels]
        values = parts[0][None] if len(parts) == 1 else torch.stack(parts)
        if (own.scale, own.offset) != (1, 0):
            values = values * own.scale + own.offset
        done[name] = _carry(late, normalise(values, own.normalise), False, own.resize.fill)
    affine = None if first.affine is None else tuple(map(tuple, first.affine.tolist()))
    return done, Geometry(_grid(first.values), affine, turning(first, spec.orientation) + native + late)


def batches(preprocess: Preprocess, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Volumes of one or several studies -> batches, see `Preprocess.__call__`.

    Args:
        inputs: modality -> one sample (see `prepare`), a list of them in which None marks a study that lacks the modality, or an
            array with a leading B.
    Returns:
        modality -> float32 (B, C, D, H, W), zero where a study lacks it; in that case also "present", bool (B, modalities).
    """
    columns = {name: _samples(_volume(preprocess, name), value, name) for name, value in inputs.items()}
    counts = {name: len(column) for name, column in columns.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        raise PreprocessError(f"studies per modality: {counts}; expected one entry a study in each, None where it lacks one")
    groups: dict[tuple, list[str]] = {}
    for name in columns:
        groups.setdefault(_target(_volume(preprocess, name)), []).append(name)
    rows: list[dict[str, Tensor]] = [{} for _ in range(max(counts.values()))]
    for names in groups.values():
        for index, row in enumerate(rows):
            study = {name: columns[name][index] for name in names if columns[name][index] is not None}
            row |= prepare(preprocess, study)[0] if study else {}
    if empty := [index for index, row in enumerate(rows) if not row]:
        raise PreprocessError(f"study {empty[0]} of the batch has no sequence")
    out = {}
    for name in columns:
        there = {tuple(row[name].shape) for row in rows if name in row}
        if len(there) != 1:
            raise PreprocessError(
                f"modality {name!r}: "
                + (f"studies have sizes {sorted(s[-3:] for s in there)}; pass them one by one" if there else "all studies lack it")
            )
        blank = torch.zeros(there.pop())
        out[name] = torch.stack([row.get(name, blank) for row in rows])
    if any(set(row) != set(columns) for row in rows):
        out["present"] = torch.tensor([[name in row for name in preprocess] for row in rows])
    return out


def expect_same_grid(scan: Scan, other: Scan) -> None:
    """Two volumes have the same shape and, where both tell it, stand at the same place.

    Raises:
        PreprocessError: naming both.
    """
    if _grid(scan.values) != _grid(other.values):
        raise PreprocessError(
            f"{scan.name or 'a sequence'} has {sizes(scan.values.shape)} voxels{_at(scan)}, {other.name or 'another'} has "
            f"{sizes(other.values.shape)}{_at(other)}; register and resample a study to one grid"
        )
    if scan.affine is None or other.affine is None:
        return
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, side - 1) for side in _grid(scan.values)))])
    apart = float(np.abs((scan.affine - other.affine) @ corners.T)[:3].max())
    if apart > _SAME_PLACE * min(other.spacing or (1.0,)):
        who, whom = scan.name or "a sequence", other.name or "another"
        codes = orientation(scan.affine), orientation(other.affine)
        differ = f"is stored as {codes[0]} and {whom} as {codes[1]}"
        if codes[0] == codes[1]:
            differ = f"stands up to {apart:.1f} mm away from {whom}"
        raise PreprocessError(f"{who} {differ}; register and resample a study to one grid")


def sizes(shape: Sequence[int]) -> str:
    """ "240x240x155"."""
    return "x".join(str(int(side)) for side in shape)


def _at(scan: Scan) -> str:
    return f" of {_mm(scan.spacing)}" if scan.spacing is not None else ""


def _mm(spacing: Sequence[float]) -> str:
    return "x".join(f"{side:g}" for side in np.round(spacing, 3)) + " mm"


def _volume(preprocess: Preprocess, name: str) -> Volume:
    spec = preprocess[name]
    if not isinstance(spec, Volume):
        raise PreprocessError(f"modality {name!r}: is {type(spec).__name__}; expected one of volumes")
    if spec.normalise.batch_dependent:
        raise PreprocessError(f"modality {name!r}: statistics of a whole batch are not defined for volumes")
    return spec


def _target(spec: Volume) -> tuple:
    return spec.size, spec.spacing, spec.orientation, spec.foreground, replace(spec.resize, fill=0.0)


def _channels(spec: Volume, value: Any, name: str) -> list[Scan]:
    """One sample of a modality as one scan a channel, in the network's order."""
    count = len(spec.channels)
    if isinstance(value, Mapping):
        aliases = {**{channel.lower(): channel for channel in spec.channels}, **{a.lower(): c for a, c in spec.aliases}}
        found = {aliases.get(given.lower(), given): each for given, each in value.items()}
        if set(found) != set(spec.channels) or len(found) < len(value):
            raise PreprocessError(f"modality {name!r}: got {', '.join(value)}; expected one each of {', '.join(spec.channels)}")
        return [_scan(found[channel]) for channel in spec.channels]
    if isinstance(value, Scan) or (count == 1 and getattr(value, "ndim", 0) == 3):
        if count > 1:
            raise PreprocessError(f"modality {name!r}: one volume, but this checkpoint expects {count}: {', '.join(spec.channels)}")
        return [_scan(value)]
    if not isinstance(value, np.ndarray | Tensor) or value.ndim != 4 or len(value) != count:
        shape = sizes(value.shape) if hasattr(value, "shape") else type(value).__name__
        axes = "(D, H, W)" if count == 1 else f"({count}, D, H, W)"
        raise PreprocessError(f"modality {name!r}: got {shape}; expected a Scan or an array {axes}")
    return [Scan(channel) for channel in value]


def _samples(spec: Volume, value: Any, name: str) -> list[Any]:
    """The samples of a batch; a single one is a batch of one."""
    if isinstance(value, list | tuple):
        return list(value)
    single = 3 if len(spec.channels) == 1 else 4
    if isinstance(value, np.ndarray | Tensor) and value.ndim == single + 1:
        return list(value)
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 5 and value.shape[1] == len(spec.channels):
        return list(value)  # (B, 1, D, H, W)
    return [value]


def _scan(value: Any) -> Scan:
    return value if isinstance(value, Scan) else Scan(value)


def _checked(scan: Scan, name: str) -> Scan:
    values, who = scan.values, scan.name or f"modality {name!r}"
    if not isinstance(values, np.ndarray | Tensor) or values.ndim != 3:
        shape = sizes(values.shape) if hasattr(values, "shape") else type(values).__name__
        raise PreprocessError(f"{who}: got {shape}; expected one three-dimensional volume, a 4D file has to be split first")
    if not all(values.shape):
        raise PreprocessError(f"{who}: the volume is empty, its shape is {sizes(values.shape)}")
    if isinstance(values, np.ndarray) and values.dtype.kind not in "biuf":
        raise PreprocessError(f"{who}: values are {values.dtype}; expected real numbers")
    total = 0.0  # whole numbers are finite
    if isinstance(values, Tensor):
        total = float(values.sum(dtype=torch.float64)) if values.is_floating_point() else total
    elif values.dtype.kind == "f":
        total = float(values.sum(dtype=np.float64))
    if not math.isfinite(total):
        raise PreprocessError(f"{who}: has values that are not finite (NaN or infinity); mask them or leave the file out")
    if total == 0 and not bool((values != 0).any()):
        raise PreprocessError(f"{who}: all voxels are zero; leave the file out")
    return scan


def _turned(scan: Scan, wanted: str | None) -> Scan:
    for step in turning(scan, wanted):
        affine = None if scan.affine is None else scan.affine @ step.matrix()
        return Scan(step.apply(scan.values, True, 0.0), affine, None, scan.name)
    return scan


def _grid(values: Array) -> Grid:
    return tuple(int(side) for side in values.shape[-3:])  # type: ignore[return-value]


def _tensor(values: Array) -> Tensor:
    if isinstance(values, Tensor):
        return values
    return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))


def _float(values: Array) -> Tensor:
    """float32 in the usual order of axes."""
    if isinstance(values, Tensor):
        return values.float().contiguous()
    return torch.from_numpy(np.array(values, np.float32, order="C"))
