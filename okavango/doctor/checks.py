"""What can be wrong with data under a contract: one small function each, `Seen` -> findings. `CHECKS` lists them.

A check looks at numbers only. Where there are labels, `okavango.doctor.trials` measures afterwards whether its suggestion helps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from okavango.doctor.orders import Reordered, find_order
from okavango.doctor.seen import Seen, places, typical
from okavango.models.band_statistics import STATISTICS
from okavango.models.preprocess import Image, Normalise, Raster
from okavango.models.raster import UNITS
from okavango.models.sensors import HARMONISED, baseline_offset, sensor_name

Severity = Literal["ok", "look", "wrong"]

# Distance of values from what a normalisation expects, see `misfit`: ordinary pictures lie below 2 under the statistics of
# ImageNet (black drawings on white and white ones on black included), and data of a training set's kind below 0.25 of its own.
FAR, OFF = 4.0, 3.0
FAR_OF_REFERENCE, OFF_OF_REFERENCE = 1.0, 0.25

MARKS = (-999.0, -9999.0, -99999.0, -32767.0, -32768.0)  # for missing values; no unit goes down there

FACTORS = {
    255.0: "they are 0..1 already, not 0..255",
    1 / 255: "they are 0..255, not 0..1",
    1 / 257: "they are 16-bit numbers, not 8-bit ones",
    16.0: "they are 12-bit numbers in files of 16 bits",
    1 / 16: "they are 12-bit numbers, not 8-bit ones",
    1e4: "they are reflectance already, not reflectance times 10000",
    1e-4: "they are reflectance times 10000, not reflectance",
    100.0: "they are fractions, not per cent",
    1e-2: "they are per cent, not fractions",
}

_UNITS = {
    "dn": "the sensor's stored numbers",
    "reflectance": "reflectances",
    "db": "decibels",
    "linear": "linear backscatter",
    "u8": "8-bit numbers",
    "kelvin": "kelvin",
}


@dataclass(frozen=True)
class Finding:
    """Something that one should know of the data.

    Attributes:
        check: name of the check that found it.
        severity: "ok" for a remark, "look" where it may be meant so, "wrong" where it can hardly be.
        sentence: what, why, and what to do.
        evidence: the numbers behind it, fit for JSON.
        change: the suggestion in a few words, "" where there is none.
        changes: fields of the contract's spec that it sets; data: fields of the description of the data (`Bands`) that it sets.
    """

    check: str
    severity: Severity
    sentence: str
    evidence: dict[str, Any] = field(default_factory=dict)
    change: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


Check = Callable[[Seen], Iterator[Finding]]


def examine(seen: Seen) -> list[Finding]:
    """All findings, the gravest first. A refusal that another finding explains is told there."""
    found = [finding for check in CHECKS for finding in check(seen)]
    for check in CAUSES:
        causes = list(check(seen))
        found += causes
        if causes:
            break
    if seen.refused and any(finding.severity == "wrong" and finding.change for finding in found):
        refusal = seen.refused.most_common(1)[0][0]
        found = [replace(each, evidence={**each.evidence, "refused": refusal}) for each in found if each.check != "refused"]
    return sorted(found, key=lambda finding: ("wrong", "look", "ok").index(finding.severity))


# -- what the contract itself says ----------------------------------------------------------------------------------------


def refused(seen: Seen) -> Iterator[Finding]:
    """The contract does not take the data."""
    for message, count in seen.refused.most_common(3):
        sentence = f"The contract refuses {_of(count, seen.samples)}: {message}"
        yield Finding("refused", "wrong", sentence, {"samples": count})


def unreadable(seen: Seen) -> Iterator[Finding]:
    """Files that are torn or no pictures."""
    if share := len(seen.bad) / (len(seen.bad) + seen.samples):
        sentence = f"{len(seen.bad)} of {len(seen.bad) + seen.samples} samples cannot be read; the first one: {seen.bad[0]}"
        yield Finding("unreadable", "wrong" if share > 0.01 else "look", sentence, {"share": share})


def mixed(seen: Seen) -> Iterator[Finding]:
    """Samples of several kinds of channels in one collection: a shortcut for a classifier, and statistics that fit neither."""
    if len(seen.kinds) > 1:
        kinds = " and ".join(f"{count} have {_channels(kind)}" for kind, count in seen.kinds.most_common())
        sentence = (
            f"The samples differ in their channels: {kinds}. If that goes with the class, it gives the class away; make them alike."
        )
        yield Finding("channels differ", "look", sentence, {" ".join(kind): count for kind, count in seen.kinds.items()})


# -- values ---------------------------------------------------------------------------------------------------------------


def not_finite(seen: Seen) -> Iterator[Finding]:
    """NaN and infinity in pictures, which spread over the whole output of a network; rasters of which little was measured."""
    missing, count = sum(seen.stored.missing), sum(seen.stored.count)
    share = missing / max(1, missing + count)
    if share and isinstance(seen.spec, Image):
        sentence = f"{_percent(share)} of the values are no numbers (NaN, infinite, beyond 3e38); fill or mark them before."
        yield Finding("not finite", "wrong", sentence, {"share": share})
    elif share > 0.5:
        sentence = (
            f"{_percent(share)} of the cells were not measured: what the network sees there is filled in. Leave such tiles out."
        )
        yield Finding("not measured", "look", sentence, {"share": share})


def constant(seen: Seen) -> Iterator[Finding]:
    """A channel without any variation carries nothing, and its place in the network is fed with a constant."""
    flat = [k for k, (low, high) in enumerate(zip(seen.stored.low, seen.stored.high, strict=True)) if low == high]
    if flat:
        names = " and ".join(f"{seen.kind[k]} ({seen.stored.low[k]:g})" for k in flat)
        sentence = f"Constant in all {seen.samples} samples: {names}. The file or its reading is broken; leave the channel out."
        yield Finding("constant", "wrong", sentence, {seen.kind[k]: seen.stored.low[k] for k in flat})


def already_normalised(seen: Seen) -> Iterator[Finding]:
    """Stored values around 0 with a deviation around 1, which the contract would normalise again."""
    if seen.spec.normalise.rule == "none" and seen.spec.scale in (1.0, (1.0,)):
        return
    low, means, stds = seen.stored.percentile(5.0), np.asarray(seen.stored.mean), np.asarray(seen.stored.std)
    if np.mean(low < -0.3) <= 0.5 or np.any(np.abs(means) >= 2) or np.any(stds >= 3) or np.mean(stds) <= 0.2:
        return
    mean, std = float(means.mean()), float(stds.mean())
    sentence = (
        f"The stored values have a mean of {mean:.2f}, a deviation of {std:.2f}, and go down to {min(seen.stored.low):.2f}: they "
        "are normalised already, and the contract would do it twice. Give the values as they were stored, or switch it off."
    )
    evidence = {"mean": mean, "std": std}
    if isinstance(seen.spec, Image):
        changes = {"scale": 1.0, "offset": 0.0, "normalise": Normalise()}
        yield Finding("normalised twice", "wrong", sentence, evidence, "no scale and no normalisation", changes)
    else:
        yield Finding("normalised twice", "wrong", sentence, evidence)


def scale(seen: Seen) -> Iterator[Finding]:
    """Values that are a known factor away from what the normalisation expects."""
    if seen.expected is None or seen.values is None:
        return
    now, high = _misfit(seen), np.max(seen.values.high)
    # pictures end at 1, or at 255: the lamps of dark pictures must not be multiplied beyond that
    top = np.inf if not isinstance(seen.spec, Image) else 1.05 if np.max(seen.expected[0]) < 1.5 else 268.0
    impossible = 1 / 255 if max(seen.stored.high) > 256 else 1 / 257  # the two are too close to be told by means
    fits = {factor: _misfit(seen, factor) for factor in FACTORS if high * factor <= top and factor != impossible}
    factor = min(fits, key=fits.__getitem__, default=1.0)
    if now <= (FAR if seen.reference is None else FAR_OF_REFERENCE) or not fits or fits[factor] >= min(2.0, now / 4):
        return
    mean, wanted = float(np.mean(seen.values.mean)), float(np.mean(seen.expected[0]))
    times = f"{factor:g} times too small" if factor > 1 else f"{1 / factor:g} times too large"
    sentence = (
        f"Before its normalisation the contract expects a mean of about {wanted:.4g}, and these have one of {mean:.4g}: the values "
        f"are {times}, so {FACTORS[factor]}. Change the scale, or store them as the contract expects."
    )
    evidence = {"factor": factor, "mean": mean, "expected": wanted, "misfit": now, "misfit_then": fits[factor]}
    if isinstance(seen.spec, Image):
        number = seen.spec.scale * factor
        yield Finding("scale", "wrong", sentence, evidence, f"scale {number:.4g}", {"scale": number})
    elif seen.described is not None:
        data = {name: tuple(factor * number for number in getattr(seen.described, name)) for name in ("scale", "offset")}
        yield Finding("scale", "wrong", sentence, evidence, f"values times {factor:g}", data=data)


def names(seen: Seen) -> Iterator[Finding]:
    """Rasters whose bands nobody names: whether they would fit in the contract's order, or in another one."""
    spec, described = seen.spec, seen.described
    if not isinstance(spec, Raster) or described is None or not all(name.isdigit() for name in described.channels):
        return
    if seen.expected is None or len(described.channels) != len(spec.channels):
        return
    said: dict[str, Any] = {"channels": spec.channels, "sensor": spec.sensor, "level": spec.level, "baseline": HARMONISED}
    said |= {"scale": (1.0,), "offset": (0.0,)}
    fits: dict[str, tuple[float, list[int]]] = {}
    for unit in (described.units,) if described.units else UNITS:
        other = seen.under(**said, units=unit)
        if other.values is not None:
            mean, std = _moments(other)
            found = reordered(other)
            order = list(found.order if found and found.sure else range(len(mean)))
            fits[unit] = misfit(mean[order], std[order], seen.expected), order
    unit = min(fits, key=lambda unit: fits[unit][0], default="")
    if not unit or fits[unit][0] >= 2.0:
        return
    distance, order = fits[unit]
    called = tuple(spec.channels[order.index(k)] for k in range(len(order)))
    sentence = (
        f"Nobody says which band is which. As {_UNITS[unit]} of {spec.sensor or 'this sensor'} in the order {', '.join(called)} "
        "they fit what the contract expects. If that is what they are, say so in a bands.json beside them."
    )
    data = {name: value for name, value in {**said, "channels": called, "units": unit}.items() if value}
    yield Finding("names", "wrong", sentence, {"misfit_then": distance}, f"{unit}, {' '.join(called)}", data=data)


def units(seen: Seen) -> Iterator[Finding]:
    """Rasters whose unit is not said, or is not what the values look like."""
    if not isinstance(seen.spec, Raster) or seen.described is None or seen.expected is None:
        return
    said, now = seen.described.units, float("inf") if seen.values is None else _misfit(seen)
    if now <= FAR and said:
        return
    others = {unit: seen.under(units=unit, scale=(1.0,), offset=(0.0,)) for unit in UNITS if unit != said}
    fits = {unit: _misfit(other) for unit, other in others.items() if other.values is not None}
    unit = min(fits, key=fits.__getitem__, default="")
    if not unit or fits[unit] >= min(2.0, now / 4):
        return
    what = f"The data say that they are {_UNITS[said]}" if said else "Nobody says the unit of the data"
    sentence = f"{what}, and they look like {_UNITS[unit]}: as such they fit what the contract expects. Say units={unit!r}."
    evidence = {"units": unit, "misfit_then": fits[unit], **({} if np.isinf(now) else {"misfit": now})}
    data = {"units": unit, "scale": (1.0,), "offset": (0.0,)}
    yield Finding("units", "wrong", sentence, evidence, f"units {unit}", data=data)


def offset(seen: Seen) -> Iterator[Finding]:
    """The 1000 that Sentinel-2's numbers carry since processing baseline 04.00: forgotten, or taken away twice."""
    described, step = seen.described, {"dn": 1000.0, "reflectance": 0.1}.get(getattr(seen.spec, "units", ""))
    if described is None or step is None or seen.values is None or sensor_name(described.sensor) != "sentinel-2":
        return
    if described.units not in ("dn", "reflectance"):
        return
    shift = baseline_offset(described.baseline)
    low = float(np.min(seen.values.percentile(0.1)))
    evidence = {"lowest": low, "baseline": described.baseline}
    if shift != -1000.0 and low >= 0.9 * step:
        sentence = (
            f"No band goes below {low:.4g}: the values carry the offset of {step:g} that Sentinel-2 has had since processing "
            "baseline 04.00 and the contract does not know of. Say baseline='04.00', so that it is taken away."
        )
        data: dict[str, Any] = {"baseline": "04.00"}
        if described.units == "reflectance":
            data = {"offset": tuple(number - 0.1 for number in described.offset)}
        yield Finding("offset", "wrong", sentence, evidence, f"offset of {step:g} taken away", data=data)
    elif shift is None and described.units == "dn":
        sentence = (
            f"The values go down to {low:.4g}, so they do not carry the offset of {step:g} that Sentinel-2 has had since "
            "processing baseline 04.00. Say baseline='harmonised'."
        )
        yield Finding("offset", "wrong", sentence, evidence, "no offset", data={"baseline": HARMONISED})
    elif shift == -1000.0:
        shares = [
            at / count for low, at, count in zip(seen.values.low, seen.values.at_low, seen.values.count, strict=True) if low == 0
        ]
        if shares and (share := float(np.median(shares))) > 0.05:
            sentence = (
                f"{_percent(share)} of the values fall below 0 when the offset of 1000 is taken away, as baseline "
                f"{described.baseline} asks: a catalogue has taken it away already. Say baseline='harmonised'."
            )
            data = {"baseline": HARMONISED}
            yield Finding("offset", "wrong", sentence, {**evidence, "share": share}, "offset kept", data=data)


def nodata(seen: Seen) -> Iterator[Finding]:
    """Marks for missing values that count as measured."""
    if seen.described is None:
        return
    for name, low, high, at_low, at_high, count in zip(
        seen.kind,
        seen.stored.low,
        seen.stored.high,
        seen.stored.at_low,
        seen.stored.at_high,
        seen.stored.count,
        strict=True,
    ):
        mark, cells = (low, at_low) if low in MARKS or low < -1e30 else (high, at_high) if high == 65535 or high > 1e30 else (0, 0)
        if cells:
            sentence = (
                f"{_percent(cells / count)} of {name} hold {mark:g}, a mark for missing values that nobody declared; it leaks "
                f"into means and, when the picture is resized, into its neighbours. Say nodata={mark:g}."
            )
            evidence = {"channel": name, "value": mark, "share": cells / count}
            yield Finding("nodata", "wrong", sentence, evidence, f"nodata {mark:g}", data={"nodata": mark})
            return


def empty(seen: Seen) -> Iterator[Finding]:
    """Cells of a raster that are 0 in every channel."""
    share = seen.stored.at_low[0] / max(1, seen.stored.count[0])
    if seen.described is None or set(seen.stored.low) != {0.0} or len(set(seen.stored.at_low)) > 1 or share <= 0.01:
        return
    sentence = (
        f"{_percent(share)} of the cells are 0 in every channel, which usually means that nothing was measured there. If so, say "
        "nodata=0."
    )
    yield Finding("empty", "look", sentence, {"value": 0, "share": share}, "nodata 0", data={"nodata": 0.0})


def inverted(seen: Seen) -> Iterator[Finding]:
    """Dark objects on white where the contract was made for the reverse, or the other way round."""
    spec = seen.spec
    if not isinstance(spec, Image) or seen.values is None or seen.expected is None:
        return
    flipped = np.sum(2 * spec.offset + 255 * spec.scale) - np.asarray(seen.values.mean)
    now, then = _misfit(seen), misfit(flipped, np.asarray(seen.values.std), seen.expected)
    bright = float(np.mean((np.asarray(seen.values.mean) - seen.expected[0]) / seen.expected[1]))
    by_reference = seen.reference is not None and now > OFF_OF_REFERENCE and then < now / 4
    if not by_reference and not (bright > 0.9 and then < min(now - 0.25, OFF)):
        return
    sentence = (
        f"The pictures are {'brighter' if bright > 0 else 'darker'} than the contract expects, by {abs(bright):.1f} deviations, "
        "and would fit better inverted (255 - value): dark things on white, where the network saw bright ones on black? If so, "
        "invert them."
    )
    changes = {"scale": -spec.scale, "offset": spec.offset + 255 * spec.scale}
    severity: Severity = "wrong" if by_reference else "look"
    yield Finding("inverted", severity, sentence, {"misfit": now, "misfit_then": then}, "inverted, 255 - value", changes)


def saturated(seen: Seen) -> Iterator[Finding]:
    """Many values at the greatest number that the type can hold."""
    top = 255 if seen.dtypes.most_common(1)[0][0] == "uint8" else None  # of wider types, see `nodata`
    for name, high, at_high, count in zip(seen.kind, seen.stored.high, seen.stored.at_high, seen.stored.count, strict=True):
        limit = 0.25 if isinstance(seen.spec, Image) else 0.01
        if high == top and at_high > limit * count:
            share = at_high / count
            sentence = (
                f"{_percent(share)} of {name} hold {high:g}, the greatest number of the type: a white background, clipped "
                "highlights, or a mark for missing values. In the last two cases something is lost; mark or mend it."
            )
            yield Finding("saturated", "look", sentence, {"channel": name, "value": high, "share": share})
            return


def fit(seen: Seen) -> Iterator[Finding]:
    """Values far from what the normalisation expects, for no simple reason."""
    limit = OFF if seen.reference is None else OFF_OF_REFERENCE
    if seen.expected is None or seen.values is None or (distance := _misfit(seen)) <= limit:
        return
    shift = (np.asarray(seen.values.mean) - seen.expected[0]) / seen.expected[1]
    ratio = np.asarray(seen.values.std) / seen.expected[1]
    worst = int(np.argmax(np.square(shift) + np.square(np.log(ratio.clip(1e-4)))))
    whose = f"the reference, {seen.reference.source}" if seen.reference else seen.spec.normalise.origin or "the training data"
    sentence = (
        f"The values are not like those of {whose}: {seen.spec.channels[worst]} is off by {shift[worst]:+.1f} deviations, and its "
        f"deviation is {ratio[worst]:.2g} times theirs. No simple cause was found: another kind of data, or an earlier step that "
        "changed them."
    )
    own = seen.own_rule
    changes = {"normalise": own} if own else {}
    evidence = {"misfit": distance, "shift": shift.tolist(), "ratio": ratio.tolist()}
    yield Finding("fit", "look", sentence, evidence, "standardised by the data's own statistics" if own else "", changes)


# -- order of channels ----------------------------------------------------------------------------------------------------


def channel_order(seen: Seen) -> Iterator[Finding]:
    """The channels lie in another order than they are named in; of bands, see `okavango.doctor.orders`."""
    yield from _order_of_colours(seen) if seen.described is None and isinstance(seen.spec, Image) else _order_of_bands(seen)


def _order_of_colours(seen: Seen) -> Iterator[Finding]:
    """Another order fits what the normalisation expects markedly better."""
    spec, limit = seen.spec, 0.15
    if seen.values is None or seen.expected is None or len(spec.channels) < 2:
        return
    order, gain = better_order(*_moments(seen), *seen.expected, limit)
    if gain < limit:
        return
    moved = [k for k, other in enumerate(order) if k != other]
    names = [spec.channels[k] for k in order]
    sentence = (
        f"{', '.join(names[k] for k in moved)} look like {', '.join(spec.channels[k] for k in moved)}: in the order "
        f"{', '.join(names)} the means and deviations fit what the contract expects markedly better. Check the order in the files."
    )
    evidence = {"gain": gain, "order": names}
    severity: Severity = "look" if seen.reference is None else "wrong"  # colours differ from collection to collection
    yield Finding("channel order", severity, sentence, evidence, " ".join(names), {"channels": tuple(names)})


def _order_of_bands(seen: Seen) -> Iterator[Finding]:
    channels, found = named(seen), reordered(seen)
    if found is None:
        return
    moved = [k for k, other in enumerate(found.order) if k != other]
    theirs = ", ".join(channels[found.order[k]] for k in moved)
    how = f" ({found.habit})" if found.habit else ""
    sentence = (
        f"The bands {'lie' if found.sure else 'seem to lie'} in another order than they are named in{how}: what is called {theirs} "
        f"looks like {', '.join(channels[k] for k in moved)}. That leaves {found.then:.1f} unexplained of their means, "
        f"deviations and correlations, the order as named {found.now:.1f}. "
    )
    evidence: dict[str, Any] = {**found.evidence, "order": [channels[k] for k in found.order]}
    severity: Severity = "wrong" if found.sure else "look"
    if seen.described is None:
        yield Finding("channel order", severity, sentence + "Check the order in the files.", evidence)
        return
    called = list(seen.described.channels)
    taken = places(seen) if isinstance(seen.spec, Raster) else range(len(called))
    for place, other in enumerate(found.order):
        here, there = taken[place], taken[other]
        if here is not None and there is not None:
            called[there] = seen.described.channels[here]
    sentence += f"{'Say' if found.sure else 'If so, say'} channels={json.dumps(called)}, the names in the order of the files."
    change = f"channels {' '.join(called)}"
    yield Finding("channel order", severity, sentence, evidence, change, data={"channels": tuple(called)})


def named(seen: Seen) -> tuple[str, ...]:
    """What the columns of `seen.pixels` are called: bands of a contract for rasters, those of the data for one for pictures."""
    return seen.spec.channels if isinstance(seen.spec, Raster) else seen.kind


def reordered(seen: Seen) -> Reordered | None:
    """The order that explains the bands clearly better than the one that they are named in; bands that the data lack stay."""
    spec, described, channels = seen.spec, seen.described, named(seen)
    kept = [k for k in range(len(channels)) if np.isfinite(seen.pixels[:, k]).any()]
    about = {"sensor": described.sensor, "level": described.level, "units": described.units} if described else {}
    expected, files = None, []
    if isinstance(spec, Raster):
        about = {"sensor": spec.sensor or about.get("sensor", ""), "level": about.get("level") or spec.level, "units": spec.units}
        if seen.expected is not None and spec.normalise.rule == "standard":
            expected = seen.expected[0][kept], seen.expected[1][kept]
        if len(kept) == len(channels):
            files = _usual_orders(spec, places(seen))
    found = find_order(seen.pixels[:, kept], [channels[k] for k in kept], expected=expected, files=files, **about)
    if found is None:
        return None
    order = list(range(len(channels)))
    for place, other in zip(kept, found.order, strict=True):
        order[place] = kept[other]
    return replace(found, order=tuple(order))


def better_order(
    mean: np.ndarray,
    std: np.ndarray,
    wanted_mean: np.ndarray,
    wanted_std: np.ndarray,
    limit: float,
) -> tuple[list[int], float]:
    """Which channel fits each place best, moving as few as possible.

    Of the best assignment of channels to places, cycles are kept that gain at least `limit` and leave no more than a third of their
    misfit: data of another kind fit nowhere, and that is no matter of the order. Then whatever can go back to its own place at a
    cost below `limit` does, for neighbours may be almost equal.

    Args:
        mean, std: of the channels (C,); wanted_mean, wanted_std: of the places (C,).
        limit: smallest gain that counts, in squared deviations.
    Returns:
        order (order[place] is the channel that fits it), and the gain.
    """
    cost = np.square((mean[:, None] - wanted_mean) / wanted_std)
    cost += np.square(np.log((std[:, None] / wanted_std).clip(1e-4)))
    channels, places = linear_sum_assignment(cost)
    best = dict(zip(places.tolist(), channels.tolist(), strict=True))
    order, seen = list(range(len(mean))), set()
    for start in range(len(mean)):
        cycle, place = [], start
        while place not in seen:
            seen.add(place)
            cycle.append(place)
            place = best[place]
        now, then = (sum(cost[other[place], place] for place in cycle) for other in (order, best))
        if now - then >= limit and then <= now / 3:
            for place in cycle:
                order[place] = best[place]
    for place in range(len(order)):
        home = order.index(place)
        back = cost[place, place] + cost[order[place], home] - cost[order[place], place] - cost[place, home]
        if home != place and back < limit:
            order[place], order[home] = place, order[place]

    return order, float(sum(cost[place, place] - cost[channel, place] for place, channel in enumerate(order)))


def _usual_orders(spec: Raster, taken: Sequence[int | None]) -> list[list[int]]:
    """Orders in which the files of published data sets lie, as `find_order` takes them.

    Args:
        taken: for each place of the network, the number of the data's channel that is taken for it.
    """
    if sorted(-1 if number is None else number for number in taken) != list(range(len(spec.channels))):
        return []  # the data have other channels besides
    files = {table.channels for table in STATISTICS.values() if set(table.channels) == set(spec.channels)} - {spec.channels}
    return [[taken.index(file.index(name)) for name in spec.channels] for file in sorted(files)]


def level(seen: Seen) -> Iterator[Finding]:
    """Sentinel-2 of the other processing level: without, or with, what the air adds to the short wavelengths."""
    spec, described = seen.spec, seen.described
    if not isinstance(spec, Raster) or described is None or seen.values is None or sensor_name(described.sensor) != "sentinel-2":
        return
    tables = {name: typical(replace(spec, level=name)) for name in ("L1C", "L2A")}
    fits = {name: misfit(*_moments(seen), table) for name, table in tables.items() if table is not None}
    said = described.level or spec.level
    other = "L2A" if said == "L1C" else "L1C"
    if len(fits) < 2 or said not in fits or fits[other] >= min(0.6 * fits[said], fits[said] - 0.3):
        return
    sentence = (
        f"The data count as {said}, and are more like Sentinel-2's {other} (worldwide averages of SSL4EO-S12), as the short "
        f"wavelengths tell. Check the product; a network trained on {spec.level or said} sees {other} as another kind of picture."
    )
    yield Finding("level", "look", sentence, {"misfit": fits[said], "misfit_then": fits[other]})


# -- size -----------------------------------------------------------------------------------------------------------------


def resolution(seen: Seen) -> Iterator[Finding]:
    """Metres a pixel, against those that the network was trained on."""
    spec, described = seen.spec, seen.described
    if not isinstance(spec, Raster) or described is None or not spec.resolution or not described.resolution:
        return
    ratio = described.resolution / spec.resolution
    if not 0.5 <= ratio <= 2:
        sentence = (
            f"A pixel of the data is {described.resolution:g} m wide, one of the training data was {spec.resolution:g} m: things "
            f"look {max(ratio, 1 / ratio):.2g} times {'smaller' if ratio > 1 else 'larger'} than the network knows them. Cut out "
            "tiles that cover as much ground as a training picture did."
        )
        yield Finding("resolution", "look", sentence, {"data": described.resolution, "trained": spec.resolution})


def size(seen: Seen) -> Iterator[Finding]:
    """The size of the data against the one that the network was trained on, and what is lost on the way."""
    spec, rule = seen.spec, seen.spec.resize
    (height, width), (tall, wide) = seen.size, spec.size
    factor, aspect = min(height / tall, width / wide), (height / width) / (tall / wide)
    stretch, whole = max(aspect, 1 / aspect), {"resize": replace(rule, rule="shortest")}
    numbers = {"native": f"{height}x{width}", "trained": f"{tall}x{wide}", "factor": factor}
    data = f"The data are {height}x{width}, the network was trained at {tall}x{wide}"
    if rule.rule == "none" and (height, width) != (tall, wide):
        sentence = f"{data}, and the contract leaves the size alone. Scale them to the trained size."
        yield Finding("size", "look", sentence, numbers, f"resized to {tall}x{wide}", whole)
    elif rule.rule == "crop" and (cells := min(height, tall) * min(width, wide)) < 0.6 * max(height * width, tall * wide):
        kept, filled = cells / (height * width), cells / (tall * wide)
        what = f"only {_percent(kept)} of them are seen" if kept < filled else f"{_percent(1 - filled)} of the input are padding"
        sentence = f"{data}; the contract crops and pads, so {what}. Scale them to the trained size."
        yield Finding("size", "look", sentence, numbers, f"resized to {tall}x{wide}", whole)
    elif rule.rule == "exact" and stretch > 1.5:
        sentence = f"{data}: they are stretched by {stretch:.2g} along one side. Scale the shortest side and take the centre."
        yield Finding("size", "look", sentence, numbers, "shortest side scaled, centre taken", whole)
    elif rule.rule == "shortest" and stretch > 1.67:
        sentence = (
            f"{data}: {_percent(1 - 1 / stretch)} of each picture are cut off. Pad instead, or cut the pictures into squares."
        )
        yield Finding("size", "look", sentence, numbers, "padded", {"resize": replace(rule, rule="pad")})
    elif rule.rule != "crop" and factor > 2 and not rule.antialias and rule.interpolation != "area":
        sentence = f"{data}: they shrink {factor:.2g} times without a low-pass filter, which leaves aliasing. Switch it on."
        yield Finding("size", "look", sentence, numbers, "antialias", {"resize": replace(rule, antialias=True)})
    elif rule.rule != "crop" and factor > 8:
        sentence = f"{data}: details of less than {factor:.0f} pixels vanish. Cut the pictures into tiles if the task needs them."
        yield Finding("size", "look", sentence, numbers)
    elif rule.rule != "crop" and factor < 0.5:
        sentence = f"{data}: they are enlarged {1 / factor:.2g} times, as they should be; they hold no more detail for it."
        yield Finding("size", "ok", sentence, numbers)


#: Each stands for itself.
CHECKS: tuple[Check, ...] = (refused, unreadable, mixed, not_finite, constant, empty, saturated, resolution, size)

#: What may be behind values that do not fit, the simplest first; where one is found, the next ones would only follow from it.
CAUSES: tuple[Check, ...] = (names, nodata, already_normalised, units, scale, offset, channel_order, level, inverted, fit)


# -- numbers that several checks need ---------------------------------------------------------------------------------------


def misfit(mean: np.ndarray, std: np.ndarray, expected: tuple[np.ndarray, np.ndarray]) -> float:
    """How far channels are from what is expected: squared shift in deviations plus squared logarithm of the ratio of deviations.

    Averaged over the channels; 0 is a perfect fit, 1 is a shift by one deviation or a deviation 2.7 times too large or small.
    """
    shift = (mean - expected[0]) / expected[1]
    ratio = np.log((std / expected[1]).clip(1e-4, 1e4))
    return float(np.mean(np.square(shift) + np.square(ratio)))


def _misfit(seen: Seen, factor: float = 1.0) -> float:
    assert seen.expected is not None
    mean, std = _moments(seen)
    return misfit(factor * mean, factor * std, seen.expected)


def _moments(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    assert seen.values is not None
    return np.asarray(seen.values.mean), np.asarray(seen.values.std)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _of(count: int, all: int) -> str:
    return f"all {all} samples" if count == all else f"{count} of {all} samples"


def _channels(kind: tuple[str, ...]) -> str:
    return kind[0] if len(kind) == 1 else ", ".join(kind)
