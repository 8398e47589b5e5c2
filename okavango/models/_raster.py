"""The operations that a raster plan is made of, and the checks that look at values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from okavango.models._apply import interpolated, normalise, resize_to
from okavango.models.preprocess import Normalise, PreprocessError, Resize


@dataclass(frozen=True)
class Step:
    """One operation: its name, a line for people, and its arguments."""

    op: str
    says: str
    arguments: tuple[tuple[str, Any], ...] = ()


_CIRRUS = 100.0  # Sentinel-2 numbers; B10 sees little but high clouds, so it is the darkest band of a scene
ORDER = "the order of the channels looks wrong (EuroSAT's files end in B11, B12, B8A)"


def cirrus_problem(names: Sequence[str], levels: Sequence[float]) -> str | None:
    """Why typical values of the named bands, in Sentinel-2 numbers, cannot be theirs."""
    if "B10" not in names:
        return None
    cirrus, darkest = levels[names.index("B10")], min(range(len(names)), key=lambda i: levels[i])
    if cirrus <= _CIRRUS or cirrus <= 2 * levels[darkest]:
        return None
    return f"B10 (cirrus) of about {cirrus:.0f} is much brighter than {names[darkest]} of about {levels[darkest]:.0f}"


def _look_normalised(units: str, low: float, high: float, whole: bool) -> str | None:
    """What was expected, where values of that range have rather been scaled or normalised; `whole` for whole numbers."""
    if units == "dn" and not whole and high < 20:
        return "sensor numbers"
    if units == "u8" and ((not whole and 0 < high <= 1) or low < -0.5):
        return "0..255"
    if units == "reflectance" and low < -0.5:
        return "reflectances"
    if units == "linear" and low < 0:
        return "linear backscatter"
    if units == "db" and -6 < low < 0 and high < 6:
        return "decibels of backscatter, which go down to -20 and less"
    return None


def _look_out_of_unit(units: str, low: float, high: float) -> str | None:
    """What a range says against a unit."""
    if units == "u8" and high > 255:
        return "do not fit 0..255"
    if units == "db" and low >= 0 and high > 0:
        return "look like linear backscatter, not like decibels"
    if units == "db" and (high > 60 or low < -120):
        return "do not fit decibels"
    if units == "kelvin" and (low < 100 or high > 500):
        return "do not fit temperatures in kelvin"
    return None


# -- operations: (values (B, C, H, W) float32 of our own, measured bool or None) -> the same ------------------------------------

State = tuple[Tensor, Tensor | None]


def run(
    steps: Sequence[Step], count: int, values: np.ndarray | Tensor, mask: np.ndarray | Tensor | None, checks_only: bool = False
) -> Tensor:
    """Stored values of `count` channels -> what the steps make of them, float32 (B, C, h, w).

    Args:
        checks_only: stop after the last step that looks at the values.
    """
    pixels, measured = _tensor(values), None if mask is None else _tensor(mask).bool()
    if pixels.ndim not in (3, 4) or pixels.shape[-3] != count:
        raise PreprocessError(f"values of shape {tuple(pixels.shape)}: expected ({count}, H, W), the plan's channels, or a batch")
    if measured is not None:
        if measured.ndim == 2 or (measured.ndim == 3 and pixels.ndim == 4 and measured.shape != pixels.shape[1:]):
            measured = measured.unsqueeze(-3)  # one mask for all channels
        measured = measured if measured.ndim == 4 else measured[None]
    if checks_only:
        steps = steps[: 1 + max((i for i, step in enumerate(steps) if step.op in _CHECKS), default=-1)]
    state: State = (pixels if pixels.ndim == 4 else pixels[None], measured)
    for step in steps:
        state = _OPS[step.op](*state, **dict(step.arguments))
    return state[0]


def _tensor(array: np.ndarray | Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise PreprocessError(f"values of dtype {array.dtype}: expected numbers")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch has neither read-only tensors nor negative strides
    return torch.from_numpy(array)


def _op_depth(values, measured, *, sensor) -> State:
    if values.dtype == torch.uint8:
        raise PreprocessError(
            f"8-bit values are a picture of {sensor}, not its numbers; say units='u8', or pass allow={{'range': 'the reason'}}"
        )
    return values, measured


def _op_order(values, measured, *, names, scale, offset, nodata) -> State:
    step = max(1, min(values.shape[-2:]) // 8)
    sample = values[..., ::step, ::step].float()
    good = sample.isfinite() & (sample != (torch.nan if nodata is None else nodata))
    if measured is not None:
        good &= measured[..., ::step, ::step]
    levels = sample.masked_fill(~good, torch.nan).transpose(0, 1).flatten(1).nanmedian(1).values
    levels = levels * levels.new_tensor(scale) + levels.new_tensor(offset)
    seen = [(name, level) for name, level in zip(names, levels.tolist(), strict=True) if level == level]
    if problem := cirrus_problem([name for name, _ in seen], [level for _, level in seen]):
        raise PreprocessError(f"{problem}: {ORDER}; name the channels as they lie, or pass allow={{'order': 'the reason'}}")
    return values, measured


def _op_select(values, measured, *, indices, nodata, fill) -> State:
    out = values.new_empty((len(values), len(indices), *values.shape[-2:]), dtype=torch.float32)
    for position, index in enumerate(indices):  # one pass that picks, converts and leaves the caller's values alone
        out[:, position] = fill if index is None else values[:, index]
    absent = [position for position, index in enumerate(indices) if index is None]
    if measured is not None and measured.shape[1] > 1:
        measured = torch.stack([measured[:, index or 0] for index in indices], 1)
    good = out.isfinite() if values.is_floating_point() else None
    if nodata is not None:
        good = out != nodata if good is None else good & (out != nodata)
    if good is not None and not bool(good.all()):
        measured = good if measured is None else good & measured
    if measured is not None:
        measured = measured.expand(out.shape).clone()
        measured[:, absent] = True
        measured = None if bool(measured.all()) else measured
    return out, measured


def _bounds(values, measured, positions) -> tuple[Tensor, Tensor]:
    """Lowest and highest measured value of each of these channels; infinite where nothing was measured."""
    if len(positions) < values.shape[1]:
        values, measured = (None if each is None else each[:, list(positions)] for each in (values, measured))
    low, high = (values, values) if measured is None else (values.masked_fill(~measured, end) for end in (torch.inf, -torch.inf))
    return low.amin((0, 2, 3)), high.amax((0, 2, 3))


def _op_check(values, measured, *, units, scale, offset, positions, skip) -> State:
    lows, highs = _bounds(values, measured, positions)
    if units in ("dn", "reflectance") and float(highs.max()) == 65535 and "saturated" not in skip:
        raise PreprocessError(
            "cells of 65535 are saturated; say nodata=65535 or give a mask to leave them out, or pass "
            "allow={'saturated': 'the reason'}"
        )
    factor, add = lows.new_tensor(scale), lows.new_tensor(offset)
    ends = torch.stack([lows * factor + add, highs * factor + add])[:, lows <= highs]
    if not ends.numel():  # nothing was measured
        return values, measured
    low, high = float(ends.min()), float(ends.max())
    cells = values.flatten()[:: max(1, values.numel() // 4096)]
    whole = bool((cells == cells.round()).all())
    if "normalised" not in skip and (what := _look_normalised(units, low, high, whole)):
        raise PreprocessError(
            f"values {low:.3g}..{high:.3g} look scaled or normalised already; expected {what}; pass the values as they were stored "
            "with their units=, or allow={'normalised': 'the reason'}"
        )
    if "range" in skip:
        return values, measured
    what = _look_out_of_unit(units, low, high)
    if units == "reflectance" and high > 2:
        cells = values[:, list(positions)] * factor.view(-1, 1, 1) + add.view(-1, 1, 1)
        if float((cells > 2).float().mean()) > 0.01:
            what = "look like sensor numbers, not like reflectances"
    if what:
        raise PreprocessError(f"values {low:.3g}..{high:.3g} {what}; say the right units=, or pass allow={{'range': 'the reason'}}")
    return values, measured


def _op_valid(values, measured, *, valid, units, positions) -> State:
    lows, highs = _bounds(values, measured, positions)
    low, high = float(lows.min()), float(highs.max())
    if low <= high and (low < valid[0] or high > valid[1]):
        raise PreprocessError(
            f"values {low:.3g}..{high:.3g} ({units}) lie outside of {valid[0]:g}..{valid[1]:g}, what is possible in the "
            "checkpoint's own data; say the right units= and scale=, or pass allow={'range': 'the reason'}"
        )
    return values, measured


def _op_fill(values, measured) -> State:
    if measured is not None:  # before any resize, so that no cell that was not measured leaks into its neighbours
        count = measured.sum((-2, -1), keepdim=True).clamp_min(1)
        mean = values.where(measured, 0).sum((-2, -1), keepdim=True, dtype=torch.float64) / count
        values = values.where(measured, mean.float())
    return values, measured


def _op_affine(values, measured, *, scale, offset) -> State:
    def column(numbers):
        return numbers[0] if len(set(numbers)) == 1 else values.new_tensor(numbers).view(1, -1, 1, 1)

    return values.mul_(column(scale)).add_(column(offset)), measured


def _op_clip(values, measured, *, low, high) -> State:
    return values.clamp_(low, high), measured


def _op_decibel(values, measured) -> State:
    powered = values > 0  # no power is no measurement
    if not bool(powered.all()):
        measured = powered if measured is None else measured & powered
    return _op_fill(values.clamp_min_(1e-10).log10_().mul_(10), measured)


def _op_power(values, measured) -> State:
    return torch.pow(10, values / 10), measured


def _op_quantise(values, measured) -> State:
    return values.clamp_(0, 255).add_(2e-4).floor_(), measured  # a whole level must not fall to the one below by rounding


def _op_normalise(values, measured, *, rule: Normalise) -> State:
    of_the_sample = rule.rule in ("percentile", "zscore", "zscore_nonzero", "deviations") and not rule.batch_dependent
    if not of_the_sample:
        turned = None if measured is None else measured.transpose(0, 1)
        return normalise(values.transpose(0, 1), rule, turned).transpose(0, 1), measured
    masks = [None] * len(values) if measured is None else list(measured)
    return torch.stack([normalise(sample, rule, mask) for sample, mask in zip(values, masks, strict=True)]), measured


def _op_resize(values, measured, *, rule: Resize, size) -> State:
    shape = values.shape
    first = resize_to(values[0], size, rule, _interpolated)
    out = first[None]
    if shape[0] > 1:  # sample by sample, so that what a crop throws away stays in the cache
        out = first.new_empty(shape[0], *first.shape)
        for number, sample in enumerate(values):
            out[number] = resize_to(sample, size, rule, _interpolated) if number else first
    if measured is not None:
        nearest = dataclasses.replace(rule, interpolation="nearest", fill=1.0)
        measured = resize_to(measured.flatten(0, 1).float(), size, nearest).unflatten(0, shape[:2]) > 0.5
    return out.contiguous(), measured


def _interpolated(planes: Tensor, size: list[int], rule: Resize) -> Tensor:
    """OpenCV's bilinear kernel is several times as fast as torch's, where it means the same: it knows no antialias."""
    enlarging = planes.shape[-2] <= size[0] and planes.shape[-1] <= size[1]
    plain = rule.interpolation == "bilinear" and rule.corners == "half_pixel" and (enlarging or not rule.antialias)
    if not plain or planes.device.type != "cpu":
        return interpolated(planes, size, rule)
    out = np.empty((len(planes), *size), np.float32)
    for plane, target in zip(planes.contiguous().numpy(), out, strict=True):
        cv2.resize(plane, (size[1], size[0]), dst=target, interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(out)


def _op_unmeasured(values, measured, *, value) -> State:
    return values if measured is None else values.masked_fill(~measured, value), measured


def _op_absent(values, measured, *, value, positions) -> State:
    values[:, list(positions)] = value
    return values, measured


def _op_nothing(values, measured) -> State:
    return values, measured


_CHECKS = ("depth", "order", "check", "valid")
_OPS: dict[str, Callable[..., State]] = {
    "depth": _op_depth,
    "order": _op_order,
    "select": _op_select,
    "check": _op_check,
    "valid": _op_valid,
    "fill": _op_fill,
    "affine": _op_affine,
    "clip": _op_clip,
    "decibel": _op_decibel,
    "power": _op_power,
    "quantise": _op_quantise,
    "normalise": _op_normalise,
    "resize": _op_resize,
    "unmeasured": _op_unmeasured,
    "absent": _op_absent,
    "nothing": _op_nothing,
}
