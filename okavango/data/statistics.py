"""Statistics of channels: one pass, float64, masks respected, and with it where they come from.

Means and deviations are merged as in Chan, Golub and LeVeque (1979), whose special case for single values is Welford's. The bins
of the histogram are the bfloat16 numbers: 65536 of them cover every scale from 1e-38 to 1e38 at a precision of 0.8 %, so no range
has to be known beforehand, and merging is exact and does not depend on the order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from okavango.data.sources import BadSample, Part, Source
from okavango.files import write_json
from okavango.models.preprocess import Normalise
from okavango.models.raster import Bands

FORMAT_VERSION = 1
PERCENTILES = (0.1, 1.0, 2.0, 5.0, 25.0, 50.0, 75.0, 95.0, 98.0, 99.0, 99.9)
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

_BINS = 2**16
_LARGEST = float(np.finfo(np.float32).max)


class StatisticsError(ValueError):
    """Statistics that cannot be taken, merged, read or used like this; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is known of each channel of a collection, in the units that were given.

    Attributes:
        channels: names; all the tuples below have one entry for each.
        count: valid cells; missing: cells that a mask hid, and those that are not finite or beyond float32.
        mean, std: of the valid cells; the deviation divides by their number.
        low, high: the smallest and greatest valid value; at_low, at_high: how many valid cells hold exactly these.
        percentiles: one tuple per channel, at the shares of `PERCENTILES`, right to 0.8 % of the value.
        units: of the values, such as "stored", "reflectance", "network input".
        source: name of the collection; digest: of its manifest; split: "train", "val", "test" or "" when unknown; samples: how many
            of its samples were read.
    """

    channels: tuple[str, ...]
    count: tuple[int, ...]
    missing: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    at_low: tuple[int, ...]
    at_high: tuple[int, ...]
    percentiles: tuple[tuple[float, ...], ...]
    units: str = "stored"
    source: str = ""
    digest: str = ""
    split: str = ""
    samples: int = 0

    def percentile(self, share: float) -> np.ndarray:
        """One of `PERCENTILES`, of every channel, float64 (C,)."""
        return np.array([row[PERCENTILES.index(share)] for row in self.percentiles])

    def normalise(self) -> Normalise:
        """The rule that standardises data like these, with its origin.

        Raises:
            StatisticsError: the statistics are of a test or validation set, or a channel is constant.
        """
        if self.split in ("test", "val"):
            raise StatisticsError(
                f"statistics of {self.source}, a {self.split} set, must not normalise anything: what is measured on it would be "
                "too good; take those of the training set"
            )
        if flat := [name for name, std in zip(self.channels, self.std, strict=True) if not std > 0]:
            raise StatisticsError(f"channel {flat[0]} of {self.source} is constant and cannot be standardised")
        origin = f"{self.source} {self.split}".strip() + f", {self.samples} samples, {self.digest[:12]}"
        return Normalise(rule="standard", mean=self.mean, std=self.std, origin=origin)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; percentiles by their share."""
        return {"version": FORMAT_VERSION, **asdict(self), "shares": list(PERCENTILES)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Statistics:
        """Read what `to_json` wrote.

        Raises:
            StatisticsError: another version, a field that is missing or unknown, or not one number per channel.
        """
        names = {each.name for each in fields(cls)}
        given = dict(data) if isinstance(data, Mapping) else {}
        if given.pop("version", None) != FORMAT_VERSION or given.pop("shares", None) != list(PERCENTILES):
            raise StatisticsError(f"not statistics of format {FORMAT_VERSION}; `okavango preprocess statistics` writes them")
        if names != set(given):
            raise StatisticsError(f"statistics: fields {sorted(names ^ set(given))} are missing or unknown")
        values = {key: _tuples(value) for key, value in given.items()}
        per_channel = ("count", "missing", "mean", "std", "low", "high", "at_low", "at_high", "percentiles")
        if short := [name for name in per_channel if len(values[name]) != len(values["channels"])]:
            raise StatisticsError(f"statistics: {short[0]} has not one entry for each of {len(values['channels'])} channels")
        return cls(**values)


def save(statistics: Statistics, path: str | os.PathLike) -> Path:
    """Write them as JSON, the file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, statistics.to_json())
    return path


def read(path: str | os.PathLike) -> Statistics:
    """Read what `save` wrote.

    Raises:
        StatisticsError: the file holds something else; the message names it.
    """
    try:
        return Statistics.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (StatisticsError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StatisticsError(f"{os.fspath(path)}: {error}") from None


class Streaming:
    """Statistics that grow: `update` with one sample after another, `merge` with those of another worker, then `finish`.

    Args:
        channels: names, in the order of the arrays.
        split: which part of a data set the samples are of; only equal ones can be merged.
    """

    def __init__(self, channels: Sequence[str], split: str = ""):
        self.channels, self.split = tuple(channels), split
        size = len(self.channels)
        self.samples = 0
        self.count, self.missing = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.mean, self.squares = np.zeros(size), np.zeros(size)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self.at_low, self.at_high = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.histogram = np.zeros((size, _BINS), np.int64)

    def update(self, values: Any, mask: Any = None) -> Streaming:
        """Add a sample.

        Args:
            values: (C, ...) numbers of any type; what is not finite, or beyond float32, counts as missing.
            mask: bool (C, ...) or without the C, True where a value counts; None for everywhere.
        Raises:
            StatisticsError: another number of channels, or a mask of another shape.
        """
        values = np.asarray(values)
        if not values.ndim or len(values) != len(self.channels):
            raise StatisticsError(f"a sample of shape {values.shape}; expected {len(self.channels)} channels first")
        try:
            valid = np.broadcast_to(True if mask is None else np.asarray(mask, bool), values.shape)
        except ValueError:
            raise StatisticsError(f"a mask of shape {np.shape(mask)} for values of shape {values.shape}") from None
        self.samples += 1
        for channel, (cells, shown) in enumerate(zip(values, valid, strict=True)):
            cells = np.asarray(cells, np.float64).ravel()
            kept = cells[shown.ravel() & (np.abs(cells) <= _LARGEST)]
            self.missing[channel] += cells.size - kept.size
            if not kept.size:
                continue
            mean = kept.mean()
            self._add(channel, kept.size, mean, np.square(kept - mean).sum())
            low, high = kept.min(), kept.max()
            self._ends(channel, low, int((kept == low).sum()), high, int((kept == high).sum()))
            bins, cells = np.unique(_bins(kept), return_counts=True)
            self.histogram[channel, bins] += cells
        return self

    def merge(self, other: Streaming) -> Streaming:
        """Add what another one has seen.

        Raises:
            StatisticsError: other channels, or another split.
        """
        if self.channels != other.channels:
            both = [", ".join(each.channels) for each in (other, self)]
            raise StatisticsError(f"statistics of {both[0]} cannot be added to those of {both[1]}")
        if self.split != other.split:
            raise StatisticsError(
                f"statistics of the split {other.split or 'unknown'!r} cannot be added to those of {self.split or 'unknown'!r}: "
                "what is measured later on the test set must not depend on it"
            )
        self.samples += other.samples
        for channel in range(len(self.channels)):
            if other.count[channel]:
                self._add(channel, int(other.count[channel]), other.mean[channel], other.squares[channel])
            self._ends(channel, other.low[channel], other.at_low[channel], other.high[channel], other.at_high[channel])
        self.missing += other.missing
        self.histogram += other.histogram
        return self

    def _add(self, channel: int, count: int, mean: float, squares: float) -> None:
        """Chan's update by `count` values with a mean and a sum of squared deviations from it."""
        before = int(self.count[channel])
        together = before + count
        step = mean - self.mean[channel]
        self.mean[channel] += step * (count / together)
        self.squares[channel] += squares + step * step * (before * count / together)
        self.count[channel] = together

    def _ends(self, channel: int, low: float, at_low: int, high: float, at_high: int) -> None:
        """Smallest and greatest value, and how often they occur."""
        if low <= self.low[channel]:
            self.at_low[channel] = at_low + (self.at_low[channel] if low == self.low[channel] else 0)
            self.low[channel] = low
        if high >= self.high[channel]:
            self.at_high[channel] = at_high + (self.at_high[channel] if high == self.high[channel] else 0)
            self.high[channel] = high

    def spread(self, channel: int, edges: np.ndarray) -> np.ndarray:
        """Shares of a channel's valid cells between neighbouring edges, float64 (len(edges) - 1,)."""
        below = np.interp(edges, *self._cumulative(channel))
        return np.diff(below) / max(1, self.count[channel])

    def _cumulative(self, channel: int) -> tuple[np.ndarray, np.ndarray]:
        """Values, rising, and the number of cells below each; straight in between."""
        order = _ORDER[self.histogram[channel][_ORDER] > 0]
        counts = self.histogram[channel][order]
        ends = counts.cumsum()
        return np.stack([_FLOOR[order], _CEIL[order]], 1).ravel(), np.stack([ends - counts, ends], 1).ravel().astype(float)

    def finish(self, *, units: str = "stored", source: str = "", digest: str = "") -> Statistics:
        """The result so far; channels without a valid cell have nan."""
        percentiles = []
        for channel, count in enumerate(self.count):
            if not count:
                percentiles.append((float("nan"),) * len(PERCENTILES))
                continue
            values, below = self._cumulative(channel)
            wanted = np.interp(np.array(PERCENTILES) / 100 * count, below, values)
            wanted[np.abs(wanted) < 1.2e-38] = 0.0  # inside of the bin of 0
            percentiles.append(tuple(map(float, wanted.clip(self.low[channel], self.high[channel]))))
        empty = self.count == 0
        std = np.sqrt(self.squares / np.maximum(self.count, 1))
        columns = {"mean": self.mean, "std": std, "low": self.low, "high": self.high}
        return Statistics(
            channels=self.channels,
            count=tuple(map(int, self.count)),
            missing=tuple(map(int, self.missing)),
            at_low=tuple(map(int, self.at_low)),
            at_high=tuple(map(int, self.at_high)),
            percentiles=tuple(percentiles),
            units=units,
            source=source,
            digest=digest,
            split=self.split,
            samples=self.samples,
            **{name: tuple(map(float, np.where(empty, np.nan, column))) for name, column in columns.items()},
        )


def of_source(source: Source, *, split: str = "", limit: int = 0) -> Statistics:
    """Statistics of the stored values of a source.

    Args:
        source: samples are ``{"image": ...}``, (C, H, W) or `Bands`, whose cells without a measurement are left out.
        split: part of a data set that this is; "" guesses it from the source's name.
        limit: at most so many samples, evenly chosen; 0 for all.
    Raises:
        StatisticsError: the source holds training and test pictures in one, or samples of different channels, or none can be read.
    """
    check_one_split(source)
    split = split or split_of(source.name)
    chosen = source if not limit or limit >= len(source) else Part(source, np.linspace(0, len(source) - 1, limit).round())
    streaming: Streaming | None = None
    for index in range(len(chosen)):
        try:
            sample = chosen[index]
        except BadSample:
            continue
        names, values, mask = stored(sample["image"])
        if streaming is None:
            streaming = Streaming(names, split)
        if names != streaming.channels:
            raise StatisticsError(
                f"{source.name}: sample {sample['id']} has the channels {', '.join(names)}, others have "
                f"{', '.join(streaming.channels)}; take the statistics of each kind alone"
            )
        streaming.update(values, mask)
    if streaming is None:
        raise StatisticsError(f"{source.name}: none of its {len(chosen)} samples could be read")
    return streaming.finish(source=source.name, digest=source.digest)


def stored(image: Any) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """Names of the channels, values (C, H, W) and where they were measured (None: everywhere) of one sample's picture."""
    if isinstance(image, Bands):
        values = np.asarray(image.values)
        mask = None if image.mask is None else np.asarray(image.mask, bool)
        if image.nodata is not None:
            measured = values != image.nodata
            mask = measured if mask is None else measured & mask
        return image.channels, values, mask
    values = np.asarray(image)
    names = {1: ("grey",), 2: ("grey", "alpha"), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}
    return names.get(len(values), tuple(f"channel {number}" for number in range(1, len(values) + 1))), values, None


def split_of(name: str) -> str:
    """Which part of a data set a source is, by its name: "train", "val", "test" or "".

    Example:
        >>> split_of("fashion-test"), split_of("train"), split_of("photos")
        ('test', 'train', '')
    """
    words = name.lower().replace("_", "-").replace("[", "-").split("-")
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def check_one_split(source: Source) -> None:
    """Refuse a folder whose "classes" are the parts of a data set.

    Raises:
        StatisticsError: it holds a training and a test part.
    """
    parts = [name for name in source.classes if name.lower() in SPLITS]
    if len({SPLITS[name.lower()] for name in parts}) > 1:
        raise StatisticsError(
            f"{source.name} holds {' and '.join(parts)}; statistics of both at once would leak the test set; name one of them"
        )


def _bins(values: np.ndarray) -> np.ndarray:
    """Number of the bfloat16 at each value, or next to it towards zero."""
    near = values.astype(np.float32) + np.float32(0)  # -0 becomes 0
    # rounding to float32 must not carry a value over an edge of its bin
    near = np.where(np.abs(near.astype(np.float64)) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    return (near.view(np.uint32) >> 16).astype(np.int64)


def _edges() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order of the bins by value, and the lower and upper edge of each."""
    numbers = np.arange(_BINS, dtype=np.uint32)
    with np.errstate(invalid="ignore"):
        near = (numbers << 16).view(np.float32).astype(np.float64)  # the end nearer to zero
        far = ((numbers << 16) | 0xFFFF).view(np.float32).astype(np.float64)
    finite = np.flatnonzero(np.isfinite(near))
    negative = numbers >= _BINS // 2
    low, high = np.where(negative, far, near), np.where(negative, near, far)
    return finite[np.argsort(low[finite], kind="stable")], low, high


_ORDER, _FLOOR, _CEIL = _edges()


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
