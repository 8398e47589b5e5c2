"""Brings rasters to the input that a checkpoint was trained on, by name: pixels that describe themselves, and the plan for them.

`Bands` are pixels with what they say of themselves. `plan` holds that against a `Raster` spec and returns the steps between the
two, or raises a `PreprocessError` of one sentence; `apply_raster` runs them. Nothing is guessed: what cannot be known is refused,
and each refusal names the switch that lets it pass, with a reason that the plan records.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture
from torch import Tensor

from okavango.models._apply import apply
from okavango.models._raster import ORDER, Step, cirrus_problem, run
from okavango.models.preprocess import PreprocessError, Raster
from okavango.models.sensors import (
    HARMONISED,
    SENTINEL_2,
    Band,
    baseline_offset,
    find_band,
    find_level,
    find_sensor,
    scaling,
    sensor_family,
    sensor_name,
)

UNITS = ("dn", "reflectance", "db", "linear", "u8", "kelvin")
SWITCHES = {
    "undescribed": "a plain array is what the checkpoint's own data look like: its channels in its order, its stored values",
    "sensor": "the sensor differs or is not known; bands are matched by the names that hold across sensors",
    "level": "the processing level differs or is not known",
    "baseline": "Sentinel-2 numbers of an unknown processing baseline have no offset",
    "normalised": "the values are tagged as normalised, or look so",
    "range": "the values do not fit their unit, or lie outside of what the checkpoint calls possible",
    "saturated": "saturated cells (65535) count as measured",
    "order": "the bands look as if they were in another order than their names say",
}


@dataclass(frozen=True, kw_only=True)
class Bands:
    """Pixels with what they say of themselves.

    Attributes:
        values: stored values of any dtype, (C, H, W) or (B, C, H, W), numpy or torch; of a masked array, what it hides becomes the
            mask. None for a description alone.
        channels: band names in the order of the array, any alias that the sensor knows.
        sensor: e.g. "sentinel-2", see `okavango.models.sensors`; level: processing level such as "L1C"; "" unknown.
        units: "dn" (the sensor's stored numbers), "reflectance" (0..1), "db" or "linear" (radar), "u8" (0..255), "kelvin"; ""
            unknown.
        scale, offset: value in `units` = stored value * scale + offset; one number, or one per channel.
        wavelengths: nanometres per channel, None where there is none; empty when unknown or as the sensor's table has it.
        nodata: stored value for "no measurement"; cells that are not finite never count as measured, so NaN becomes None.
        mask: True where measured: (H, W) or (C, H, W), with a leading B for a batch.
        resolution: metres; crs: WKT; transform: the six numbers of the affine map; time: ISO.
        baseline: of Sentinel-2, such as "04.00", or "harmonised" where the offset of 04.00 is taken away already.
        normalised: already through a normalisation.
    """

    values: np.ndarray | Tensor | None = field(default=None, compare=False, repr=False)
    channels: tuple[str, ...]
    sensor: str = ""
    level: str = ""
    units: str = ""
    scale: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)
    wavelengths: tuple[float | None, ...] = ()
    nodata: float | None = None
    mask: np.ndarray | Tensor | None = field(default=None, compare=False, repr=False)
    resolution: float | None = None
    crs: str = ""
    transform: tuple[float, ...] = ()
    time: str = ""
    baseline: str = ""
    normalised: bool = False

    def __post_init__(self):
        for name in ("channels", "scale", "offset", "wavelengths", "transform"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, (str, int, float, np.number)) else tuple(value)
            object.__setattr__(self, name, value)  # lists are welcome; descriptions must be hashable
        if self.nodata is not None and self.nodata != self.nodata:
            object.__setattr__(self, "nodata", None)  # never measured in any case, and equal to no other
        count = len(self.channels)
        if self.units not in ("", *UNITS):
            raise PreprocessError(f"units {self.units!r}: expected one of {', '.join(UNITS)}")
        for name, singles in (("scale", True), ("offset", True), ("wavelengths", False)):
            numbers = getattr(self, name)
            if len(numbers) not in ({1, count} if singles else {0, count}):
                raise PreprocessError(f"{name} has {len(numbers)} numbers for {count} channels: {', '.join(self.channels)}")
        if self.values is None:
            return
        if isinstance(self.values, np.ma.MaskedArray):  # as rasterio reads them with masked=True
            if self.mask is not None:
                raise PreprocessError("a masked array, and a mask besides; expected one of them")
            object.__setattr__(self, "mask", ~np.ma.getmaskarray(self.values))
            object.__setattr__(self, "values", np.ma.getdata(self.values))
        shape = tuple(self.values.shape)
        if len(shape) not in (3, 4) or 0 in shape:
            raise PreprocessError(f"bands of shape {shape}: expected (C, H, W), or (B, C, H, W) for a batch")
        if shape[-3] != count:
            hint = "; the channels come first" if shape[-1] == count else ""
            raise PreprocessError(f"bands of shape {shape} with {count} names ({', '.join(self.channels)}){hint}")
        if self.mask is not None and tuple(self.mask.shape) not in (shape, shape[:-3] + shape[-2:], shape[-3:], shape[-2:]):
            raise PreprocessError(f"mask of shape {tuple(self.mask.shape)} for bands of shape {shape}; expected {shape[-2:]}")

    def describe(self) -> Bands:
        """The description without the pixels and without place and time, which no plan depends on."""
        return dataclasses.replace(self, values=None, mask=None, crs="", transform=(), time="")

    def pictures(self, channels: Sequence[str]) -> list[Tensor]:
        """8-bit pictures (C, H, W) with these channels, for checkpoints that were trained on pictures.

        Raises:
            PreprocessError: not 8-bit, or a channel is missing.
        """
        if self.values is None or self.units != "u8" or str(self.values.dtype).removeprefix("torch.") != "uint8":
            raise PreprocessError(
                f"this checkpoint takes 8-bit pictures ({', '.join(channels)}), and these bands are "
                f"{self.units or 'of no known unit'}; say how they become its input: see okavango.models.expectations.imagenet"
            )
        indices = [index or 0 for index, _ in _match(Raster(channels=tuple(channels), units="u8"), self.describe())]
        pixels = torch.as_tensor(self.values)
        pixels = pixels if pixels.ndim == 4 else pixels[None]
        return [sample[torch.tensor(indices, device=sample.device)] for sample in pixels]


@dataclass(frozen=True)
class Plan:
    """What will be done to data of one description for one spec; `print(plan)` shows it.

    Attributes:
        spec: what the checkpoint expects; source: what the data say of themselves.
        steps: in order.
        allowed: (switch, reason) of what would have been refused.
        notes: what is worth knowing and needs no decision.
    """

    spec: Raster
    source: Bands
    steps: tuple[Step, ...]
    allowed: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{number}. {step.says}" for number, step in enumerate((s for s in self.steps if s.says), 1)]
        lines += [f"allowed: {switch} ({reason or 'no reason given'})" for switch, reason in self.allowed]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON of what is done, for records of results."""
        return {"steps": [step.says for step in self.steps if step.says], "allowed": dict(self.allowed), "notes": list(self.notes)}


# -- the plan ---------------------------------------------------------------------------------------------------------------


def plan(spec: Raster, bands: Bands, *, allow: Mapping[str, str] | frozenset[str] = frozenset()) -> Plan:
    """Hold what the data say of themselves against what the checkpoint expects.

    Args:
        spec: of the checkpoint.
        bands: the data, or a description without values. Values, where there are any, are checked too.
        allow: switches of `SWITCHES` -> reason; a set of names where there is no reason to record.
    Returns:
        The steps in between; the same description always gives the same plan.
    Raises:
        PreprocessError: a band is missing, level or unit do not fit or are unknown, the data are normalised already, the values do
            not fit the unit; the sentence names the switch that would allow it.

    Example:
        >>> spec = Raster(channels=("B04", "B03"), sensor="sentinel-2", level="L1C", units="reflectance", scale=(1e-4,))
        >>> data = Bands(channels=("B02", "B03", "B04"), sensor="sentinel-2", level="L1C", units="dn", baseline="02.08")
        >>> print(plan(spec, data))
        1. take B04, B03 from channels 2, 1 of 3
        2. dn to reflectance: x * 0.0001
        3. resize to 224x224 (shortest, bicubic, antialias)
    """
    reasons = _reasons(allow)
    made = _plan(spec, bands.describe(), frozenset(reasons))
    if bands.values is not None:
        run(made.steps, len(bands.channels), bands.values, bands.mask, checks_only=True)
    return dataclasses.replace(made, allowed=tuple(reasons.items()))


def apply_raster(plan: Plan, values: np.ndarray | Tensor, mask: np.ndarray | Tensor | None = None) -> Tensor:
    """Run a plan.

    Args:
        plan: from `plan`.
        values: stored values (C, H, W) or (B, C, H, W) in the order of the plan's source; they are never changed.
        mask: True where measured, as in `Bands`.
    Returns:
        float32 (B, C, h, w) on the device of `values`, what the backbone takes.
    Raises:
        PreprocessError: the values do not fit their unit, look normalised already, are saturated, or lie in another order.
    """
    return run(plan.steps, len(plan.source.channels), values, mask)


def _reasons(allow: Mapping[str, str] | frozenset[str]) -> dict[str, str]:
    reasons = dict(allow) if isinstance(allow, Mapping) else dict.fromkeys(allow, "")
    for switch in reasons:
        if switch not in SWITCHES:
            raise PreprocessError(f"unknown switch {switch!r}; expected {', '.join(SWITCHES)}")
    return reasons


def _refuse(allow: frozenset[str], switch: str, sentence: str, otherwise: str) -> None:
    """Raises, unless the switch is set."""
    if switch not in allow:
        raise PreprocessError(f"{sentence}; {otherwise}, or pass allow={{{switch!r}: 'the reason'}}")


Match = tuple[int | None, str]  # index into the channels of the data, None for a band that they lack, and its name there


@functools.lru_cache(maxsize=512)
def _plan(spec: Raster, source: Bands, allow: frozenset[str]) -> Plan:
    if source.normalised:
        _refuse(allow, "normalised", "the data are normalised already", "pass the values as they were stored")
    if not source.units:
        raise PreprocessError(f"the unit of the data is not known; say units= one of {', '.join(UNITS)}")
    if spec.units not in UNITS:
        raise PreprocessError(f"the checkpoint's unit is {spec.units!r}; expected one of {', '.join(UNITS)}")
    _check_sensor(spec, source, allow)
    _check_level(spec, source, allow)
    _check_statistics(spec, allow)
    matches = _match(spec, source)
    notes: list[str] = []
    steps = _raw_checks(source, allow)
    steps += _select(spec, source, matches, notes)
    steps += _range_checks(source, matches, allow)
    steps.append(Step("fill", "" if source.nodata is None else "cells that were not measured: the mean of their band, for now"))
    steps += _conversion(spec, source, matches, allow)
    if spec.valid and "range" not in allow:
        steps.append(Step("valid", "", (("valid", spec.valid), ("units", spec.units), ("positions", _present(matches)))))
    resize, norm = _resize_steps(spec), _normalise_steps(spec, notes)
    if spec.resize.on == "native" and not _commute(spec, norm):
        steps += [*resize, *norm]
    else:  # an affine map and a linear resize commute, and the smaller side of an enlargement is the cheaper one
        steps += [*norm, *resize]
    steps += _last_steps(spec, source, matches)
    if spec.resolution and source.resolution and not 0.5 <= source.resolution / spec.resolution <= 2:
        notes.append(f"the data have {source.resolution:g} m a pixel, the checkpoint was trained on {spec.resolution:g} m")
    return Plan(spec, source, _joined(steps), notes=tuple(notes))


def _check_sensor(spec: Raster, source: Bands, allow: frozenset[str]) -> None:
    want, have = sensor_name(spec.sensor), sensor_name(source.sensor)
    if want and sensor_family(want) != sensor_family(have):
        what = f"the data are of {have}" if have else "the data do not say their sensor"
        _refuse(allow, "sensor", f"{what}, and this checkpoint was trained on {want}", f"say sensor={want!r} if they are")


def _check_level(spec: Raster, source: Bands, allow: frozenset[str]) -> None:
    if not spec.level or sensor_family(spec.sensor) != sensor_family(source.sensor):
        return
    want, have = find_level(spec.sensor, spec.level), find_level(source.sensor, source.level)
    same = want.names == have.names if want and have else spec.level.lower() == source.level.lower()
    if not same:
        what = f"the data are of level {source.level}" if source.level else "the data do not say their processing level"
        _refuse(allow, "level", f"{what}, and this checkpoint was trained on {spec.level}", f"say level={spec.level!r} if they are")


def _match(spec: Raster, source: Bands) -> list[Match]:
    """For each channel of the spec, the channel of the data: by name on one sensor, else by the names that sensors share."""
    theirs = _named_bands(source)
    one_sensor = sensor_name(spec.sensor) == sensor_name(source.sensor)

    def fits(name: str, band: Band | None, index: int) -> bool:
        other = theirs[index]
        if band and other:
            return band.name == other.name if one_sensor else bool(set(band.common) & set(other.common))
        alike = one_sensor or (band is None and other is None)  # B4 of one sensor is not B4 of another
        return alike and name.lower() == source.channels[index].lower()

    matches: list[Match] = []
    for position, name in enumerate(spec.channels):
        band = find_band(spec.sensor, name)
        index = next((index for index in range(len(theirs)) if fits(name, band, index)), None)
        if index is None and spec.nearest_nm:
            index = _nearest(spec, source, position, band, theirs)
        if index is None and spec.absent is None:
            common = f" ({band.common[0]})" if band and band.common and band.common[0] != name else ""
            raise PreprocessError(
                f"the data lack band {name}{common}; they have {', '.join(source.channels)}. To go on without it, give the spec "
                "absent=0.0 (for a standardised band, its mean) or nearest_nm=, how far a neighbour may be in nanometres"
            )
        matches.append((index, name if index is None else source.channels[index]))
    return matches


def _named_bands(source: Bands) -> list[Band | None]:
    """The band that each channel of the data is, None where the sensor or the name is not in the table."""
    sensor, level = find_sensor(source.sensor), find_level(source.sensor, source.level)
    bands: list[Band | None] = []
    seen: dict[str, str] = {}
    for name in source.channels:
        band = find_band(source.sensor, name)
        if band is None and sensor:
            names = ", ".join(each.name for each in sensor.bands)
            raise PreprocessError(f"{sensor.name} has no band {name!r}; its bands are {names}")
        if band and level and band.name in level.lacks:
            raise PreprocessError(f"{source.level} of {source.sensor} has no band {band.name}; the level or the names are wrong")
        key = band.name if band else name.lower()
        if key in seen:
            raise PreprocessError(f"channels {seen[key]!r} and {name!r} are the same band, {key}")
        seen[key] = name
        bands.append(band)
    return bands


def _nearest(spec: Raster, source: Bands, position: int, band: Band | None, have: Sequence[Band | None]) -> int | None:
    want = spec.wavelengths[position] if spec.wavelengths else band and band.centre
    theirs = source.wavelengths or [each and each.centre for each in have]
    gaps = [(abs(want - other), index) for index, other in enumerate(theirs) if want and other]
    gap, index = min(gaps, default=(float("inf"), None))
    return index if gap <= spec.nearest_nm else None


def _present(matches: Sequence[Match]) -> tuple[int, ...]:
    """Positions in the spec of the bands that the data have."""
    return tuple(position for position, (index, _) in enumerate(matches) if index is not None)


def _select(spec: Raster, source: Bands, matches: Sequence[Match], notes: list[str]) -> list[Step]:
    taken = [(str(index), name) for index, name in matches if index is not None]
    says = f"take {', '.join(name for _, name in taken)} from channels {', '.join(index for index, _ in taken)}"
    if spec.nearest_nm:
        pairs = zip(spec.channels, matches, strict=True)
        notes += [
            f"{ours} is taken from {name}" for ours, (index, name) in pairs if index is not None and name.lower() != ours.lower()
        ]
    fill = spec.absent if spec.absent is not None and spec.absent_on == "native" else 0.0
    arguments = (("indices", tuple(index for index, _ in matches)), ("nodata", source.nodata), ("fill", fill))
    return [Step("select", f"{says} of {len(source.channels)}", arguments)]


def _conversion(spec: Raster, source: Bands, matches: Sequence[Match], allow: frozenset[str]) -> list[Step]:
    """From stored values to the spec's units."""
    steps, pair = [], (source.units, spec.units)
    taken = [index for index, _ in matches]
    said = [_said(source, index) for index in taken]
    if source.units == "dn" and sensor_name(source.sensor) == SENTINEL_2.name:
        shift = baseline_offset(source.baseline)
        if shift is None:
            _refuse(
                allow,
                "baseline",
                "Sentinel-2 numbers of an unknown processing baseline: from 04.00 on they carry an offset of 1000",
                "say baseline= (such as '02.08', '04.00', or 'harmonised' where a catalogue has taken the offset away)",
            )
        shifted = [
            (scale, offset + (0.0 if index is None else shift or 0.0)) for index, (scale, offset) in zip(taken, said, strict=True)
        ]
        if shift:
            steps += _affine_steps("without the offset since baseline 04.00, not below 0", shifted)
        else:
            steps += _affine_steps("the data's scale", shifted)
        steps.append(Step("clip", "", (("low", 0.0), ("high", None))))  # the numbers are unsigned
        said = [(1.0, 0.0)] * len(said)
    what = pair[0] if pair[0] == pair[1] else f"{pair[0]} to {pair[1]}"
    pairs = enumerate(zip(taken, said, strict=True))
    steps += _affine_steps(what, [_affine(spec, source, position, index, *own) for position, (index, own) in pairs])
    if pair == ("linear", "db"):
        steps.append(Step("decibel", "linear to decibels: 10 log10(x); not above 0: not measured"))
    if pair == ("db", "linear"):
        steps.append(Step("power", "decibels to linear: 10 ** (x / 10)"))
    if spec.units == "u8" and source.units != "u8":
        steps.append(Step("quantise", "cut to 0..255, rounded down"))
    return steps


def _affine_steps(what: str, numbers: Sequence[tuple[float, float]]) -> list[Step]:
    """One step that scales each channel, or none where nothing changes."""
    scales, offsets = (tuple(each) for each in zip(*numbers, strict=True))
    if set(scales) == {1} and set(offsets) == {0}:
        return []
    return [Step("affine", f"{what}: {_formula(numbers)}", (("scale", scales), ("offset", offsets)))]


def _said(source: Bands, index: int | None) -> tuple[float, float]:
    """What a channel of the data says of its scale and offset."""
    if index is None:
        return 1.0, 0.0
    return source.scale[index if len(source.scale) > 1 else 0], source.offset[index if len(source.offset) > 1 else 0]


def _affine(spec: Raster, source: Bands, position: int, index: int | None, scale: float, offset: float) -> tuple[float, float]:
    """Scale and offset of one channel from stored value (its unit: `scale`, `offset`) to the spec's units or their logarithm."""
    if index is None:
        return 1.0, 0.0
    have, want = source.units, spec.units
    same = sensor_name(spec.sensor) == sensor_name(source.sensor)
    if (have == want and (have != "dn" or same)) or {have, want} == {"db", "linear"}:
        return scale, offset
    own = spec.scale[position if len(spec.scale) > 1 else 0], spec.offset[position if len(spec.offset) > 1 else 0]
    if have not in ("dn", "reflectance") or want not in ("dn", "reflectance", "u8", "kelvin") or (want == "u8" and own == (1, 0)):
        raise PreprocessError(
            f"the data are in {have} and this checkpoint takes {want}, and nothing says how one becomes the other; choose a "
            "contract in the data's unit, such as those of okavango.models.expectations.imagenet"
        )
    if have == "dn" and same and own != (1, 0):  # the checkpoint's own stored values
        return _then(scale, offset, *own)
    if have == "dn":
        scale, offset = _then(scale, offset, *_meaning(source, source.channels[index], want))
    if want in ("reflectance", "kelvin"):
        return scale, offset
    factor, add = _meaning(as_expected(spec, stored=True), spec.channels[position], "reflectance")
    scale, offset = scale / factor, (offset - add) / factor
    return (scale, offset) if want == "dn" else _then(scale, offset, *own)


def _then(scale: float, offset: float, factor: float, add: float) -> tuple[float, float]:
    return scale * factor, offset * factor + add


def _meaning(bands: Bands, channel: str, want: str) -> tuple[float, float]:
    """Scale and offset from the sensor's number to reflectance, or kelvin where that is wanted."""
    band = find_band(bands.sensor, channel)
    found = band and scaling(bands.sensor, bands.level, band, HARMONISED)
    if not found or (band and band.kind == "thermal") != (want == "kelvin"):
        raise PreprocessError(
            f"what the numbers of {bands.sensor or 'an unknown sensor'}, level {bands.level or 'unknown'}, mean is not known for "
            f"{channel}; say it by units=, scale= and offset= (Landsat level 1: okavango.models.sensors.landsat_scaling)"
        )
    return found


def _normalise_steps(spec: Raster, notes: list[str]) -> list[Step]:
    rule = spec.normalise
    if rule.rule == "none" and rule.clip is None:
        if spec.units in ("dn", "kelvin"):
            notes.append(f"nothing is normalised: the network gets {spec.units} as they are")
        return []
    origin = f", statistics of {rule.origin}" if rule.origin else ""
    if rule.rule in ("none", "standard", "minmax") and rule.clip is None:
        low, high = (rule.mean, rule.std) if rule.rule == "standard" else (rule.low, rule.high)
        spread = high if rule.rule == "standard" else tuple(b - a for a, b in zip(low, high, strict=True))
        if not all(spread):
            raise PreprocessError("the checkpoint's normalisation divides by zero: a std, or high - low, is 0")
        scale = tuple(1 / each for each in spread)
        offset = tuple(-a / each for a, each in zip(low, spread, strict=True))
        says = "(x - mean) / std" if rule.rule == "standard" else "(x - low) / (high - low)"
        return [Step("affine", f"{says}{origin}", (("scale", scale), ("offset", offset)))]
    says = {
        "none": "",
        "standard": "(x - mean) / std",
        "minmax": "(x - low) / (high - low)",
        "stretch": "stretch low..high to 0..1",
        "percentile": f"stretch percentiles {rule.percentiles or (2, 98)} of each sample to 0..1",
        "zscore": "standardise each sample",
        "zscore_nonzero": "standardise each sample over its cells that are not zero",
        "deviations": f"mean -+ {rule.deviations:g} deviations of each sample to 0..1",
    }[rule.rule]
    if rule.batch_dependent:
        says = says.replace("each sample", "the batch")
    if rule.quantise and rule.rule in ("stretch", "percentile"):
        says += f", rounded down to {rule.quantise} levels"
    if rule.mean and rule.rule in ("stretch", "percentile"):
        says += ", then (x - mean) / std"
    if rule.clip is not None:
        says += f"{', ' if says else ''}cut to {rule.clip[0]:g}..{rule.clip[1]:g}"
    return [Step("normalise", f"{says}{origin}", (("rule", rule),))]


def _commute(spec: Raster, norm: Sequence[Step]) -> bool:
    """Whether normalising first gives what resizing first would; padded cells are in the units of what is resized."""
    plain = spec.resize.rule not in ("pad", "crop") and spec.resize.interpolation != "lanczos"
    return plain and all(step.op == "affine" for step in norm)


def _resize_steps(spec: Raster) -> list[Step]:
    rule, (height, width) = spec.resize, spec.size
    if rule.rule == "none":
        return [Step("resize", "", (("rule", rule), ("size", spec.size)))]
    words = [rule.rule.replace("_", " "), rule.interpolation]
    words += ["aligned corners"] * (rule.corners == "aligned") + ["antialias"] * rule.antialias
    side = f"{height}" if rule.rule == "short_side" else f"{height}x{width}"
    before = f", from {int(height / rule.crop_ratio + 1e-6)} cut in the middle" if rule.crop_ratio != 1 else ""
    return [Step("resize", f"resize to {side} ({', '.join(words)}{before})", (("rule", rule), ("size", spec.size)))]


def _last_steps(spec: Raster, source: Bands, matches: Sequence[Match]) -> list[Step]:
    says = "" if source.nodata is None else f"cells that were not measured: {spec.nodata_fill:g}"
    steps = [Step("unmeasured", says, (("value", spec.nodata_fill),))]
    absent = tuple(position for position, (index, _) in enumerate(matches) if index is None)
    if absent:
        names, where = ", ".join(spec.channels[position] for position in absent), "after normalisation"
        if spec.absent_on == "native":
            where = "before normalisation"
        else:
            steps.append(Step("absent", "", (("value", spec.absent), ("positions", absent))))
        steps.append(Step("nothing", f"bands that the data lack ({names}): {spec.absent:g} {where}"))
    return steps


def _joined(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Neighbouring affine maps become one, in float64; both lines stay."""
    out: list[Step] = []
    for step in steps:
        if step.op == "affine" and out and out[-1].op == "affine":
            first, second = dict(out[-1].arguments), dict(step.arguments)
            count = max(len(numbers) for each in (first, second) for numbers in each.values())
            a, b, c, d = (each[name] * (count // len(each[name])) for each in (first, second) for name in ("scale", "offset"))
            scale = tuple(x * y for x, y in zip(a, c, strict=True))
            offset = tuple(x * y + z for x, y, z in zip(b, c, d, strict=True))
            out[-1] = Step("affine", f"{out[-1].says}; {step.says}", (("scale", scale), ("offset", offset)))
        elif step.op != "nothing" or step.says:
            out.append(step)
    return tuple(out)


def _formula(numbers: Sequence[tuple[float, float]]) -> str:
    different = set(numbers) - {(1.0, 0.0)}  # which absent bands have
    if len(different) > 1:
        return "x * scale + offset of each band"
    ((scale, offset),) = different
    sign = "-" if offset < 0 else "+"
    return f"x{'' if scale == 1 else f' * {scale:g}'}{'' if offset == 0 else f' {sign} {abs(offset):g}'}"


# -- checks of the description -----------------------------------------------------------------------------------------------


def _check_statistics(spec: Raster, allow: frozenset[str]) -> None:
    """Statistics that were listed in another order than the names."""
    mean = spec.normalise.mean
    if sensor_name(spec.sensor) != SENTINEL_2.name or not mean or spec.units not in ("dn", "reflectance"):
        return
    factor = 1e4 if spec.units == "reflectance" else 1.0
    names = [band.name if (band := find_band(spec.sensor, name)) else "" for name in spec.channels]
    if problem := cirrus_problem(names, [factor * each for each in mean]):
        _refuse(allow, "order", f"by the checkpoint's statistics, {problem}: {ORDER}", "give the statistics by band name")


def _raw_checks(source: Bands, allow: frozenset[str]) -> list[Step]:
    """What can only be seen before bands are selected and converted."""
    steps, sensor = [], sensor_name(source.sensor)
    sixteen_bits = sensor_family(sensor) in ("sentinel-2", "landsat-8", "hls")
    if source.units == "dn" and sixteen_bits and "range" not in allow:
        steps.append(Step("depth", "", (("sensor", sensor),)))
    names = tuple(band.name if band else "" for band in _named_bands(source))
    optical = sensor == SENTINEL_2.name and source.units in ("dn", "reflectance")
    if optical and "B10" in names and "order" not in allow:
        factor = 1e4 if source.units == "reflectance" else 1.0
        scale, offset = (tuple(factor * number for number in numbers) for numbers in (source.scale, source.offset))
        arguments = (("names", names), ("scale", scale), ("offset", offset), ("nodata", source.nodata))
        steps.append(Step("order", "", arguments))
    return steps


def _range_checks(source: Bands, matches: Sequence[Match], allow: frozenset[str]) -> list[Step]:
    """What the selected values must look like, in the data's own units."""
    positions = _present(matches)
    taken = [index for index, _ in matches if index is not None]
    scale, offset = (tuple(n[index] for index in taken) if len(n) > 1 else n for n in (source.scale, source.offset))
    skip = tuple(sorted(allow & {"normalised", "range", "saturated"}))
    arguments = {"units": source.units, "scale": scale, "offset": offset, "positions": positions, "skip": skip}
    return [Step("check", "", tuple(arguments.items()))] if positions else []


# -- the call -------------------------------------------------------------------------------------------------------------------


@apply.register
def _(spec: Raster, value: Any, name: str, allow: Mapping[str, str] | None = None) -> Tensor:
    samples = list(value) if isinstance(value, (list, tuple)) else [value]
    if not samples:
        raise PreprocessError(f"modality {name!r}: the list of samples is empty")
    try:
        reasons = _reasons(allow or {})
        return _apply_all(spec, [_described(spec, sample, reasons) for sample in samples], frozenset(reasons))
    except PreprocessError as error:
        raise PreprocessError(f"modality {name!r}: {error}") from None


def _apply_all(spec: Raster, samples: Sequence[Bands], allow: frozenset[str]) -> Tensor:
    """Samples of one description and size go through their plan together."""
    groups: dict[tuple, list[int]] = {}
    for position, bands in enumerate(samples):
        if bands.values is None:
            raise PreprocessError("a description without values; give the pixels")
        alone = position if bands.mask is not None or bands.values.ndim == 4 else None
        kind = (type(bands.values), bands.values.dtype, tuple(bands.values.shape), alone)
        groups.setdefault((bands.describe(), kind), []).append(position)
    if spec.normalise.batch_dependent and len(groups) > 1:
        raise PreprocessError("statistics of the batch need samples of one size and description; pass them as one array")
    done: dict[int, Tensor] = {}
    for (source, _), members in groups.items():
        made, first = _plan(spec, source, allow), samples[members[0]]
        if len(members) == 1:
            done[members[0]] = apply_raster(made, first.values, first.mask)  # type: ignore[arg-type]
            continue
        stack: Any = torch.stack if isinstance(first.values, Tensor) else np.stack
        batch = apply_raster(made, stack([samples[position].values for position in members]))
        if len(groups) == 1:
            return batch  # the rule, and no copy
        done.update(zip(members, batch.split(1), strict=True))
    if len({tuple(part.shape[1:]) for part in done.values()}) > 1:
        sizes = sorted({tuple(part.shape[-2:]) for part in done.values()})
        raise PreprocessError(f"samples have sizes {sizes} and the resize rule is {spec.resize.rule!r}; pass them one by one")
    return done[0] if len(done) == 1 else torch.cat([done[position] for position in range(len(samples))])


def _described(spec: Raster, sample: Any, allow: Mapping[str, str]) -> Bands:
    if isinstance(sample, Bands):
        return sample
    if isinstance(sample, Picture.Image):
        array = np.asarray(sample)
        sample = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if not isinstance(sample, (np.ndarray, Tensor)):
        raise PreprocessError(f"a {type(sample).__name__}; expected Bands")
    if "undescribed" not in allow:
        names = ", ".join(map(repr, spec.channels[:3])) + (", ..." if len(spec.channels) > 3 else "")
        said = f"sensor={spec.sensor!r}, level={spec.level!r}, units='dn'" if spec.sensor else f"units={spec.units!r}"
        said += ", baseline='02.08'" if sensor_name(spec.sensor) == SENTINEL_2.name else ""
        raise PreprocessError(
            f"an array that does not say what it is; describe it, Bands(values=x, channels=({names}), {said}), or pass "
            "allow={'undescribed': 'the reason'} if its channels and stored values are the checkpoint's own"
        )
    return dataclasses.replace(as_expected(spec), values=sample)


def as_expected(spec: Raster, *, stored: bool = False) -> Bands:
    """The description of data that are just as the checkpoint's own: its channels in its order, its stored values.

    Channels that the processing level does not have, which the contract fills, are left out.

    Args:
        stored: describe the sensor's numbers, also where the spec's `scale` would bring them to its units.
    """
    numbers = stored or (spec.units == "u8" and (spec.scale, spec.offset) != ((1.0,), (0.0,)))
    level = find_level(spec.sensor, spec.level)
    lacking = [band and level and band.name in level.lacks for band in (find_band(spec.sensor, name) for name in spec.channels)]

    def there(each: tuple) -> tuple:
        kept = tuple(value for value, lacks in zip(each, lacking, strict=True) if not lacks) if len(each) == len(lacking) else each
        return kept or each

    return Bands(
        channels=there(spec.channels),
        sensor=spec.sensor,
        level=spec.level,
        units="dn" if numbers else spec.units,
        scale=(1.0,) if numbers else there(spec.scale),
        offset=(0.0,) if numbers else there(spec.offset),
        wavelengths=there(spec.wavelengths),
        nodata=spec.nodata,
        resolution=spec.resolution,
        baseline=HARMONISED,
    )
