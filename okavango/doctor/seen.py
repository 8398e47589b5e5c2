"""What is seen of the data: stored values, values in the contract's units, and what reaches the network, one pass over a sample."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from okavango.data.sources import BadSample, Source
from okavango.data.statistics import Statistics, Streaming, stored
from okavango.models.band_statistics import STATISTICS
from okavango.models.preprocess import Image, Normalise, Preprocess, PreprocessError, Raster, Resize
from okavango.models.raster import SWITCHES, Bands, as_expected, plan
from okavango.models.sensors import sensor_name

PIXELS = 256  # of each sample that are looked at one by one


@dataclass(eq=False)
class Seen:
    """The data under a contract; checks read this and nothing else.

    Attributes:
        source, preprocess, modality: the data, the contract, and the part of it that the data feed.
        data: what the data say of themselves otherwise than their files do (rasters), see `okavango.models.raster.Bands`.
        split: see `okavango.data.statistics`.
        indices: which samples of the source could be read, in that order; bad: why others could not.
        kinds: names of stored channels -> number of samples; the most frequent kind is the one that is measured.
        sizes: (height, width) -> number of samples; dtypes: name -> number.
        descriptions: of rasters, what they say of themselves -> number of samples.
        refused: message of the contract -> number of samples that it refuses.
        some: names of stored channels -> of each raster some pixels, float32 (N, C), see `pixels`.
        reference: statistics of stored values that the data should have, such as those of the training set, or None.
    """

    source: Source
    preprocess: Preprocess
    modality: str
    data: dict[str, Any] = field(default_factory=dict)
    split: str = ""
    reference: Statistics | None = None
    indices: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    kinds: Counter[tuple[str, ...]] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    descriptions: Counter[Bands] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    raw: dict[tuple[str, ...], Streaming] = field(default_factory=dict)
    before: Streaming | None = None
    after: Streaming | None = None
    some: dict[tuple[str, ...], list[np.ndarray]] = field(default_factory=dict)

    @property
    def spec(self) -> Image | Raster:
        """The part of the contract that the data feed."""
        spec = self.preprocess[self.modality]
        assert isinstance(spec, Image | Raster)  # `image_modality` chose it
        return spec

    @property
    def kind(self) -> tuple[str, ...]:
        """Stored channels of most samples."""
        return self.kinds.most_common(1)[0][0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of most samples."""
        return self.sizes.most_common(1)[0][0]

    @property
    def samples(self) -> int:
        """How many samples were read."""
        return self.kinds.total()

    @cached_property
    def stored(self) -> Statistics:
        """Of the stored values of the most frequent kind, channel by channel as stored."""
        return self.raw[self.kind].finish(source=self.source.name, digest=self.source.digest)

    @cached_property
    def values(self) -> Statistics | None:
        """In the units of the contract, before its normalisation, in the order of the network; None where there is no way to it."""
        return None if self.before is None else self.before.finish(units="values")

    @cached_property
    def inputs(self) -> Statistics | None:
        """What the network gets, None where the contract refuses all samples."""
        return None if self.after is None else self.after.finish(units="network input")

    @cached_property
    def pixels(self) -> np.ndarray:
        """Some pixels of rasters, float32 (N, C), nan where nothing was measured.

        Of the most frequent kind; in the units of a contract for rasters and in the order of its network, or as stored under one
        for pictures.
        """
        return np.concatenate(self.some.get(self.kind, [np.empty((0, len(self.spec.channels)), np.float32)]))

    @cached_property
    def expected(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and deviation that the values of each channel should have, or None where the contract says nothing of them."""
        spec, count = self.spec, len(self.spec.channels)
        if self.reference is not None and isinstance(spec, Image) and len(self.reference.channels) in (1, count):
            mean, std = (np.resize(row, count) for row in (self.reference.mean, self.reference.std))
            return mean * spec.scale + spec.offset, std * abs(spec.scale)
        return expected_values(spec)

    @property
    def described(self) -> Bands | None:
        """What most of the rasters say of themselves; None for pictures."""
        return self.descriptions.most_common(1)[0][0] if self.descriptions else None

    def under(self, **data: Any) -> Seen:
        """The same data, some of them, if they said something else of themselves."""
        some = self.indices[:: max(1, len(self.indices) // 16)]
        return look(self.source, self.preprocess, self.modality, some, data={**self.data, **data}, reference=self.reference)

    @cached_property
    def own_rule(self) -> Normalise | None:
        """The rule that standardises these data by their own statistics."""
        if self.values is None or not np.all(np.asarray(self.values.std) > 0):
            return None
        origin = f"{self.source.name}, {self.samples} samples, {self.source.digest[:12]}"
        return Normalise(rule="standard", mean=self.values.mean, std=self.values.std, origin=origin)


def expected_values(spec: Image | Raster) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and deviation of the values of each channel that a spec is made for, as far as its normalisation tells."""
    rule, count = spec.normalise, len(spec.channels)
    if rule.rule == "standard":
        return np.asarray(rule.mean), np.asarray(rule.std)
    if rule.rule in ("minmax", "stretch"):
        low, high = np.asarray(rule.low), np.asarray(rule.high)
        return (low + high) / 2, (high - low) / 4
    if rule.rule == "none" and isinstance(spec, Image) and spec.scale != 1.0:  # scaled to 0..1
        return np.full(count, 0.5), np.full(count, 0.25)
    if rule.rule == "none" and isinstance(spec, Raster):
        return typical(spec)
    return None  # statistics of the sample itself


#: Tables of `okavango.models.band_statistics` that stand for a sensor's data all over the world.
TYPICAL = {
    ("sentinel-2", "L1C"): "ssl4eo_s12_l1c_50k",
    ("sentinel-2", "L2A"): "ssl4eo_s12_l2a_50k",
    ("sentinel-1", "GRD"): "ssl4eo_s12_s1",
}


def typical(spec: Raster) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and deviation, in the units of a spec, of its bands all over the world; None where no table tells."""
    table = STATISTICS.get(TYPICAL.get((sensor_name(spec.sensor), spec.level.upper()), ""))
    factor = {("dn", "dn"): 1.0, ("dn", "reflectance"): 1e-4, ("db", "db"): 1.0}.get((table.units, spec.units)) if table else None
    if table is None or factor is None:
        return None
    try:
        mean, std = (factor * np.asarray(table.of(name, spec.channels)) for name in ("mean", "std"))
    except PreprocessError:
        return None  # a band that the level lacks
    return mean, std


def look(
    source: Source,
    preprocess: Preprocess,
    modality: str,
    indices: Iterable[int],
    *,
    data: Mapping[str, Any] | None = None,
    split: str = "",
    reference: Statistics | None = None,
) -> Seen:
    """Read some samples once and take the statistics of all stages.

    Args:
        data, split, reference: see `Seen`.
    Raises:
        PreprocessError: none of them could be read.
    """
    seen = Seen(source, preprocess, modality, dict(data or {}), split, reference)
    plain = _unnormalised(preprocess, modality)
    for index in map(int, indices):
        try:
            image = said_otherwise(source[index]["image"], seen.data)
        except BadSample as error:
            seen.bad.append(str(error))
            continue
        names, values, mask = stored(image)
        seen.indices.append(index)
        seen.kinds[names] += 1
        seen.sizes[values.shape[-2], values.shape[-1]] += 1
        seen.dtypes[str(values.dtype)] += 1
        if isinstance(image, Bands):
            seen.descriptions[image.describe()] += 1
        if names not in seen.raw:
            seen.raw[names] = Streaming(names, split)
        seen.raw[names].update(values, mask)
        in_units = _values(plain, seen.spec, modality, image)
        seen.before = _updated(seen.before, seen.spec.channels, in_units)
        if in_units is not None and isinstance(image, Bands):
            measured = values if mask is None else np.where(mask, values, np.nan)
            cells = in_units.flatten(1).numpy() if isinstance(seen.spec, Raster) else measured.reshape(len(values), -1)
            few = np.linspace(0, cells.shape[1] - 1, min(PIXELS, cells.shape[1])).astype(int)
            seen.some.setdefault(names, []).append(cells[:, few].T.astype(np.float32))
        try:
            seen.after = _updated(seen.after, seen.spec.channels, preprocess(**{modality: image})[modality][0])
        except PreprocessError as error:
            seen.refused[str(error)] += 1
    if not seen.samples:
        raise PreprocessError(f"{source.name}: none of the samples could be read" + (f"; {seen.bad[0]}" if seen.bad else ""))
    return seen


def said_otherwise(image: Any, data: Mapping[str, Any]) -> Any:
    """A sample's picture with other fields of its description, where it has one."""
    return dataclasses.replace(image, **data) if data and isinstance(image, Bands) else image


def _unnormalised(preprocess: Preprocess, modality: str) -> Preprocess:
    """The contract without resize and normalisation; of pictures also without scale, so that values in any range are taken."""
    spec, whole = preprocess.array(modality), Resize(rule="none")
    if isinstance(spec, Raster):
        absent = None if spec.absent is None else float("nan")
        return preprocess.replace(modality, normalise=Normalise(), resize=whole, nodata_fill=float("nan"), absent=absent)
    return preprocess.replace(modality, scale=1.0, offset=0.0, normalise=Normalise(), resize=whole)


def _values(plain: Preprocess, spec: Image | Raster, modality: str, image: Any) -> torch.Tensor | None:
    """Values before the normalisation, (C, H, W), nan where nothing was measured; None where there is no way to them."""
    try:
        if isinstance(spec, Raster):
            return plain(allow=dict.fromkeys(SWITCHES, "to look at it"), **{modality: image})[modality][0]
        return plain(**{modality: image})[modality][0].double() * spec.scale + spec.offset
    except PreprocessError:
        return None


def places(seen: Seen) -> list[int | None]:
    """For each place of the network, the number of the stored channel that stands there; None where none does."""
    spec, have = seen.spec, len(seen.kind)
    if isinstance(spec, Raster) or seen.described is not None:
        bands = spec if isinstance(spec, Raster) else Raster(channels=spec.channels, units="u8")
        try:
            made = plan(bands, seen.described or as_expected(bands), allow=dict.fromkeys(SWITCHES, ""))
        except PreprocessError:
            return [None] * len(spec.channels)
        return list(dict(next(step for step in made.steps if step.op == "select").arguments)["indices"])
    if have in (1, 2):
        return [0] * len(spec.channels)
    names = [channel if channel in seen.kind else None for channel in spec.channels]
    return [seen.kind.index(name) if name else k if k < have else None for k, name in enumerate(names)]


def _updated(streaming: Streaming | None, channels: tuple[str, ...], values: torch.Tensor | None) -> Streaming | None:
    if values is None:
        return streaming
    return (streaming or Streaming(channels)).update(values.numpy())


def chosen(source: Source, count: int) -> np.ndarray:
    """At most `count` samples, evenly over the source; over its classes where it has labels. Ascending indices."""
    order = np.arange(len(source)) if source.labels is None else np.argsort(source.labels, kind="stable")
    return np.sort(order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))])


def steps(seen: Seen) -> list[str]:
    """What the contract does to the data, one plain line a step."""
    kinds = " or ".join(f"{count} of {', '.join(kind)}" for kind, count in seen.kinds.most_common(3))
    sizes = ", ".join(f"{height}x{width}" for (height, width), _ in seen.sizes.most_common(3))
    more = f" and {len(seen.sizes) - 3} other sizes" if len(seen.sizes) > 3 else ""
    lines = [f"read {seen.samples} samples: {kinds}; {sizes}{more}; {' or '.join(seen.dtypes)}"]
    lines += _raster_steps(seen) if isinstance(seen.spec, Raster) else _image_steps(seen)
    if seen.inputs is not None:
        mean, std = (", ".join(f"{value:.2f}" for value in row) for row in (seen.inputs.mean, seen.inputs.std))
        height, width = seen.size if seen.spec.resize.rule == "none" else seen.spec.size
        lines.append(f"network gets float32 {len(seen.spec.channels)} x {height} x {width}: mean {mean}; deviation {std}")
    elif seen.refused and not isinstance(seen.spec, Raster):
        lines.append(f"refused: {seen.refused.most_common(1)[0][0]}")
    return lines


def _raster_steps(seen: Seen) -> list[str]:
    """The plan of the contract, or the one that it would make if nothing were refused."""
    assert isinstance(seen.spec, Raster)
    described, prefix = seen.described or as_expected(seen.spec), ""
    try:
        made = plan(seen.spec, described)
    except PreprocessError as error:
        try:
            made, prefix = plan(seen.spec, described, allow=dict.fromkeys(SWITCHES, "")), "(refused) "
        except PreprocessError:
            return [f"refused: {error}"]
    return [prefix + step.says for step in made.steps if step.says] + [f"note: {note}" for note in made.notes]


def _image_steps(seen: Seen) -> list[str]:
    spec, have, want = seen.spec, seen.kind, seen.spec.channels
    if seen.described is not None:
        taken = [None if k is None else have[k] for k in places(seen)]
        channels = (
            f"{', '.join(want)} are {', '.join(map(str, taken))}" if None not in taken else f"{', '.join(want)}, not all there"
        )
    elif len(have) == 1 and len(want) == 3:
        channels = f"grey is repeated as {', '.join(want)}"
    elif len(have) in (2, 4) and len(want) in (1, 3):
        channels = f"alpha is dropped, {', '.join(want)} stay"
    elif len(have) == 3 and len(want) == 1:
        channels = "colour becomes grey"
    elif set(have) == set(want) and have != want:
        channels = f"put in the order {', '.join(want)}"
    else:
        channels = f"{', '.join(want)}, as stored"
    resize = f"resize: {_resize(seen)}"
    shift = f" + {_number(spec.offset)}" if spec.offset else ""
    lines = [f"channels: {channels}", f"scale: value * {_number(spec.scale)}{shift}", f"normalise: {_normalise(spec.normalise)}"]
    lines.insert(1 if spec.resize.on == "native" else 3, resize)
    return lines


def _resize(seen: Seen) -> str:
    rule, (height, width) = seen.spec.resize, seen.spec.size
    how = f"{rule.interpolation}, {'antialiased' if rule.antialias else 'no antialias'}"
    how += ", corners aligned" if rule.corners == "aligned" else ""
    before = f"{int(height / rule.crop_ratio)}x{int(width / rule.crop_ratio)}"
    if rule.rule == "none":
        return "none, the network takes the size as it is"
    if rule.rule == "exact":
        return f"to {before}, aspect ignored ({how})" + (f", centre {height}x{width}" if rule.crop_ratio != 1 else "")
    if rule.rule == "pad":
        return f"longest side to {max(height, width)} ({how}), padded to {height}x{width}"
    if rule.rule == "crop":
        return f"cropped or padded to {height}x{width}, not scaled"
    if len(seen.sizes) == 1 and seen.size == (height, width) and rule.crop_ratio == 1:
        return f"none needed, the data are {height}x{width}"
    return f"shortest side to cover {before} ({how}), centre {height}x{width}"


def _normalise(rule: Normalise) -> str:
    mean, std = _number(rule.mean), _number(rule.std)
    low, high = _number(rule.low), _number(rule.high)
    texts = {
        "standard": f"minus {mean}, divided by {std}",
        "minmax": f"{low} becomes 0, {high} becomes 1",
        "stretch": f"{low} becomes 0, {high} becomes 1, cut there",
        "percentile": f"percentiles {_number(rule.percentiles or (2, 98))} of the sample become 0 and 1, cut there",
        "zscore": "mean and deviation of the sample become 0 and 1",
        "zscore_nonzero": "mean and deviation of the sample's non-zero cells become 0 and 1",
        "none": "not at all",
    }
    text = texts.get(rule.rule, rule.rule)
    text += f", then minus {mean}, divided by {std}" if rule.rule in ("stretch", "percentile") and rule.mean else ""
    text += f", cut to {_number(rule.clip)}" if rule.clip else ""
    return text + (f" ({rule.origin})" if rule.origin else "")


def _number(value: Any) -> str:
    """A number, or several; 1/255 is written as that."""
    if isinstance(value, tuple):
        return ", ".join(map(_number, value))
    return "1/255" if abs(value * 255 - 1) < 1e-9 else f"{value:.4g}"
