"""Whether bands lie in another order than they are named: two kinds of evidence that hold from one region to another.

An order costs what it leaves unexplained, in squared deviations, at most `CAP` for each band or pair:

- **spectrum**: means and deviations of the bands, as logarithms and after one common gain for all, against those of published data
  sets of the kind (`references`), of which the nearest counts. Stored numbers become reflectances first, for each place by the
  scale of the band that is claimed to lie there.
- **correlations** between bands, against what their wavelengths lead to expect (`alike`).

Tried are the orders that occur (`habitual`, `moved`), what fits the spectrum best, and from the cheapest one all exchanges of two.
Another order is believed when it is cheaper by `SURE` and leaves at most `LEFT` of the cost. A known habit (reversed, shifted, red
and blue exchanged, near infrared first, as some data set lies) is suspected from `MAYBE` on, when it leaves no more than half of
what the spectrum costs.

What this cannot tell: bands that are alike (7, 8 and 8A), red from blue where the ground does not, and scenes of one thing only.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from okavango.models.band_statistics import STATISTICS, BandStatistics
from okavango.models.sensors import HARMONISED, find_band, scaling, sensor_name, solar_irradiance, wavelengths

SURE, LEFT, MAYBE = 6.0, 0.6, 1.5
CAP = 9.0
MEAN, DEVIATION = 0.25, 0.35  # by how much the logarithms of two data sets differ, after a common gain
RARE = {"habit": 0.0, "one": 1.0, "any": 3.0}  # what an order must gain more: known habits, one band or two moved, others

Reference = tuple[np.ndarray, np.ndarray]  # means and deviations of the places


@dataclass(frozen=True)
class Reordered:
    """Another order of the channels.

    Attributes:
        order: order[place] is the channel that belongs there. habit: in a few words, "" for an order that is none.
        now, then: cost of the order as claimed, and of this one. sure: whether it is believed or suspected.
        evidence: both costs by their kind.
    """

    order: tuple[int, ...]
    habit: str
    now: float
    then: float
    sure: bool
    evidence: dict[str, dict[str, float]]


def find_order(
    cells: np.ndarray,
    channels: Sequence[str],
    *,
    sensor: str,
    level: str = "",
    units: str = "dn",
    expected: Reference | None = None,
    files: Sequence[Sequence[int]] = (),
) -> Reordered | None:
    """Another order of the channels that explains some cells clearly better, or None.

    Args:
        cells: float (N, C), one row a pixel; rows with nan are left out.
        channels: what the columns are claimed to be; they are looked up in `sensor`.
        level, units: of the values, see `okavango.models.raster.Bands`.
        expected: mean and deviation that a contract expects of each, (C,) each, in those units.
        files: further orders in which such files lie.
    """
    cells = np.asarray(cells, np.float64)
    cells = cells[np.isfinite(cells).all(1)]
    if len(channels) < 2 or len(cells) < 100 or np.any(cells.std(0) <= 0):
        return None
    costs = Costs(cells, channels, sensor, level, units, expected)
    if not costs.spectra:
        return None
    identity = tuple(range(len(channels)))
    habits = dict(habitual(channels, sensor, files))
    near = set(moved(len(channels)))

    def worth(order: tuple[int, ...]) -> float:
        return costs.of(order) + RARE["habit" if order in habits else "one" if order in near else "any"]

    now = costs.of(identity)
    best = min({*habits, *near, *costs.fitting()} - {identity}, key=worth)
    while (better := min(exchanged(best), key=worth)) != identity and worth(better) < worth(best):
        best = better
    if now - worth(best) >= SURE and costs.of(best) <= LEFT * now:
        return _found(costs, best, habits.get(best, ""), True)
    suspects = [order for order in habits if costs.spectrum(order) <= costs.spectrum(identity) / 2]
    best = min(suspects, key=costs.of, default=identity)
    return _found(costs, best, habits[best], False) if now - costs.of(best) >= MAYBE else None


def _found(costs: Costs, order: tuple[int, ...], habit: str, sure: bool) -> Reordered:
    identity = tuple(range(len(order)))
    parts = {"now": costs.parts(identity), "then": costs.parts(order)}
    evidence = {when: {name: round(value, 2) for name, value in part.items()} for when, part in parts.items()}
    return Reordered(order, habit, costs.of(identity), costs.of(order), sure, evidence)


class Costs:
    """What orders of some cells cost. `spectra`: one matrix (channels, places) per reference."""

    def __init__(self, cells: np.ndarray, channels: Sequence[str], sensor: str, level: str, units: str, expected: Reference | None):
        rules = [comparable(sensor, level, units, name) for name in channels]
        known = references(channels, sensor, level, units)
        if expected is not None and np.ptp(expected[0]) > 0:
            scales, offsets = np.array(rules).T
            known.append((expected[0] * scales + offsets, expected[1] * scales))
        mean, std = cells.mean(0), cells.std(0)
        # (channels, places): the scale is that of the band which is claimed to lie in the place
        means = np.stack([mean * scale + offset for scale, offset in rules], 1)
        stds = np.stack([std * scale for scale, _ in rules], 1)
        brightness = (
            (lambda numbers: numbers * math.log(10) / 10) if units == "db" else logarithm
        )  # decibels are logarithms already
        self.spectra = []
        for their_mean, their_std in known:
            shift = brightness(means) - brightness(their_mean)
            ratio = logarithm(stds) - logarithm(their_std)
            self.spectra.append(
                np.minimum(np.square((shift - shift.mean()) / MEAN), CAP)
                + np.minimum(np.square((ratio - ratio.mean()) / DEVIATION), CAP)
            )
        self.places = np.arange(len(channels))
        self.correlations = np.corrcoef(cells.T)
        self.wanted = alike(wavelengths(sensor, channels))
        self.of = functools.cache(lambda order: sum(self.parts(order).values()))

    def parts(self, order: tuple[int, ...]) -> dict[str, float]:
        """The cost by its kind."""
        return {"spectrum": self.spectrum(order), "correlations": self._correlated(order)}

    def spectrum(self, order: tuple[int, ...]) -> float:
        return min(float(spectrum[list(order), self.places].sum()) for spectrum in self.spectra)

    def _correlated(self, order: tuple[int, ...]) -> float:
        """Summed over the pairs of a band, averaged over its pairs, so that it weighs as much as the spectrum does."""
        wanted, tolerance = self.wanted
        found = self.correlations[np.ix_(order, order)]
        misfit = np.minimum(np.square((found - wanted) / tolerance), CAP)
        return float(np.nansum(np.triu(misfit, 1)) * 2 / (len(order) - 1))

    def fitting(self) -> Iterator[tuple[int, ...]]:
        """For each reference, the order whose spectrum is nearest."""
        for spectrum in self.spectra:
            channels, places = linear_sum_assignment(spectrum)
            yield tuple(int(channels[k]) for k in np.argsort(places))


# -- orders that are tried --------------------------------------------------------------------------------------------------


def habitual(channels: Sequence[str], sensor: str, files: Sequence[Sequence[int]] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """Orders that people and files are known for, each with its name, which for the same order the last one gives.

    order[place] is the channel that belongs there.
    """
    identity = tuple(range(len(channels)))
    yield identity[1:] + identity[:1], "shifted by one"
    yield identity[-1:] + identity[:-1], "shifted by one"
    yield identity[::-1], "the reverse"
    for file in files:
        yield tuple(file), "the order of published files"
    place = {common: k for k, name in enumerate(channels) for common in _common(sensor, name)}
    if home := place.get("nir"):
        yield (*(k + 1 for k in range(home)), 0, *identity[home + 1 :]), "near infrared first"
    if "red" in place and "blue" in place:
        swap = {place["red"]: place["blue"], place["blue"]: place["red"]}
        yield tuple(swap.get(k, k) for k in identity), "red and blue exchanged"


def moved(count: int) -> Iterator[tuple[int, ...]]:
    """All orders in which one channel moved, or two changed places."""
    yield from exchanged(tuple(range(count)))
    for start, end in itertools.permutations(range(count), 2):
        order = list(range(count))
        order.insert(end, order.pop(start))
        yield tuple(order)


def exchanged(order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All orders with two more exchanged."""
    for first, second in itertools.combinations(range(len(order)), 2):
        other = list(order)
        other[first], other[second] = other[second], other[first]
        yield tuple(other)


# -- what is expected -------------------------------------------------------------------------------------------------------


def references(channels: Sequence[str], sensor: str, level: str, units: str) -> list[Reference]:
    """Means and deviations of these bands in published data sets, made comparable: reflectances, 8 bits or decibels.

    A band of another sensor stands for one that shares a name with it ("red"); of the level, top of the atmosphere and surface
    are kept apart.
    """
    found = []
    for table in STATISTICS.values():
        if not table.mean or (level and table.level and _above(level) != _above(table.level)):
            continue
        if _kind(table.sensor, table.units) != _kind(sensor, units):
            continue
        rows = [_row(table, sensor, name) for name in channels]
        if all(row is not None for row in rows):
            mean, std = np.array(rows).T
            found.append((mean, std))
    return found


def _row(table: BandStatistics, sensor: str, name: str) -> tuple[float, float] | None:
    """Comparable mean and deviation of one band in a table."""
    wanted, same = _common(sensor, name), sensor_name(table.sensor) == sensor_name(sensor)
    band = find_band(sensor, name)
    for common in wanted:
        for k, channel in enumerate(table.channels):
            theirs = find_band(table.sensor, channel)
            if theirs and (band and theirs.name == band.name if same else common in theirs.common):
                scale, offset = comparable(table.sensor, table.level, table.units, channel)
                return table.mean[k] * scale + offset, table.std[k] * scale
    return None


def _common(sensor: str, name: str) -> tuple[str, ...]:
    band = find_band(sensor, name)
    return band.common if band else ()


def _above(level: str) -> bool:
    """Of the top of the atmosphere, not of the surface."""
    return level.upper().startswith(("L1", "TOA"))


def _kind(sensor: str, units: str) -> str:
    if units == "u8" and sensor_name(sensor) not in RADIANCE:
        return "8 bits"
    return "reflectance" if units in ("dn", "reflectance", "u8") else units


#: Radiance of the numbers 255 and 1 (of Landsat 7 at the usual gains), W m-2 sr-1 um-1: Chander, Markham and Helder 2009, tables 2
#: and 4.
RADIANCE = {
    "landsat-5": ((193.0, 365.0, 264.0, 221.0, 30.2, 16.5), (-1.52, -2.84, -1.17, -1.51, -0.37, -0.15)),
    "landsat-7": ((191.6, 196.5, 152.9, 241.1, 31.06, 10.8), (-6.2, -6.4, -5.0, -5.1, -1.0, -0.35)),
}
_TM = ("B1", "B2", "B3", "B4", "B5", "B7")


def comparable(sensor: str, level: str, units: str, name: str) -> tuple[float, float]:
    """Scale and offset that make numbers of a band reflectances, up to a gain that all bands share; 1 and 0 for what is none."""
    band, own = find_band(sensor, name), sensor_name(sensor)
    if band is None or units not in ("dn", "u8") or band.kind != "optical":
        return 1.0, 0.0
    if own in RADIANCE and not level.upper().startswith("L2"):
        if band.name not in _TM:
            return 1.0, 0.0
        high, low = (ends[_TM.index(band.name)] for ends in RADIANCE[own])
        factor = math.pi / solar_irradiance(own, band.name)  # without the elevation of the sun, which all bands share
        scale = (high - low) / 254
        return factor * scale, factor * (low - scale)
    if units == "u8":
        return 1.0, 0.0
    if own in ("landsat-8", "landsat-9") and not level.upper().startswith("L2"):
        return 2e-5, -0.1  # likewise
    return scaling(sensor, level or "L1C", band, HARMONISED) or (1.0, 0.0)


def logarithm(numbers: np.ndarray) -> np.ndarray:
    """Of positive numbers; of those near 0 or below, that of a thousandth of the greatest."""
    return np.log(np.maximum(numbers, 1e-3 * np.abs(numbers).max()))


_GROUPS = {"visible": 690, "edge": 725, "infrared": 1000, "cirrus": 1450, "short-wave": 3000, "other": math.inf}

#: Correlation of two bands by the groups of their wavelengths, and by how much scenes differ. Nothing is expected of other pairs.
_ALIKE = {
    ("visible", "visible"): (1.0, 0.08),
    ("visible", "edge"): (0.88, 0.15),
    ("visible", "infrared"): (0.15, 0.4),
    ("visible", "short-wave"): (0.55, 0.3),
    ("edge", "infrared"): (0.5, 0.4),
    ("edge", "short-wave"): (0.8, 0.2),
    ("infrared", "infrared"): (1.0, 0.1),
    ("infrared", "short-wave"): (0.45, 0.3),
    ("short-wave", "short-wave"): (0.92, 0.1),
}
SLOPE = 0.00045  # by which bands of the visible, or of the near infrared, are less alike for each nm between them


def alike(centres: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Correlations (C, C) that bands of these wavelengths (nm) should have, and their tolerance; nan where none is expected."""
    wanted, tolerance = np.full((2, len(centres), len(centres)), np.nan)
    for (first, one), (second, other) in itertools.combinations(enumerate(centres), 2):
        if one is None or other is None:
            continue
        low, high = sorted((one, other))
        pair = tuple(next(name for name, end in _GROUPS.items() if centre < end) for centre in (low, high))
        if pair in _ALIKE:
            value, width = _ALIKE[pair]
            wanted[first, second] = wanted[second, first] = value - SLOPE * (high - low) * (value == 1.0)
            tolerance[first, second] = tolerance[second, first] = width
    return wanted, tolerance
