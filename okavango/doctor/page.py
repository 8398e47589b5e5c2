"""A report of the doctor as one HTML page that needs nothing else: verdict, findings, plan, accuracies, histograms, pictures."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from okavango.data.statistics import Statistics, Streaming, stored
from okavango.doctor.check import Report, measured
from okavango.doctor.seen import Seen, places, said_otherwise
from okavango.doctor.trials import NEIGHBOURS
from okavango.files import page_template, write_whole
from okavango.models.preprocess import Preprocess, PreprocessError, Raster
from okavango.models.raster import SWITCHES

SHOWN = 6  # samples whose pictures are shown
SIDE = 224  # pixels of the longest side of a picture
BINS = 72
WIDTH, HEIGHT = 320, 96  # of a histogram
SPREAD = 2.5  # deviations at which the pictures of a network's input turn black and white


def render(report: Report, out: str | os.PathLike) -> Path:
    """Write the page, whole or not at all; the same report gives the same bytes.

    Returns:
        the path that was written.
    """
    out, seen = Path(out), report.seen
    height, width = seen.size
    name, other, described = _alternative(report)
    html = page_template(Path(__file__).with_name("page.html.j2")).render(
        title=f"{report.checkpoint} on {report.data}",
        verdict=report.verdict,
        state="wrong" if report.wrong else "look" if report.findings and report.findings[0].severity == "look" else "ok",
        summary={
            "samples": f"{seen.samples:,} of {len(seen.source):,}",
            "stored": f"{len(seen.kind)} x {height} x {width}, {seen.dtypes.most_common(1)[0][0]}",
            "network": f"{len(seen.spec.channels)} x {' x '.join(map(str, seen.spec.size))}",
        },
        findings=[
            {
                "severity": each.severity,
                "check": each.check,
                "sentence": each.sentence,
                "change": each.change,
                "measured": measured(trial) if (trial := report.trial(each)) else "",
                "evidence": json.dumps(each.evidence, indent=1, default=float) if each.evidence else "",
            }
            for each in report.findings
        ],
        steps=report.steps,
        trials=_trials(report),
        neighbours=NEIGHBOURS,
        unmeasured=report.unmeasured,
        channels=_channels(report),
        frame={"width": WIDTH, "height": HEIGHT},
        rows=_rows(report, name, other, described),
        spread=SPREAD,
        suggestion=_lines(report.suggested.to_json()["specs"][seen.modality]) if report.suggested != seen.preprocess else "",
        described=_lines(report.described),
        contract=_lines(seen.preprocess.to_json()["specs"][seen.modality]),
        provenance={
            "data": report.data,
            "digest of their manifest": seen.source.digest,
            "checkpoint": report.checkpoint,
            **({"reference": f"{seen.reference.source} {seen.reference.digest[:12]}"} if seen.reference else {}),
        },
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda file: file.write(html.encode("utf-8", "replace")))
    return out


# -- accuracies -------------------------------------------------------------------------------------------------------------


def _trials(report: Report) -> dict[str, Any] | None:
    """Rows of the table, and where each difference with its interval lies on a common axis of -1..1."""
    if not report.trials:
        return None
    differences = [trial.difference for trial in report.trials if trial.difference]
    reach = max((abs(end) for each in differences for end in each), default=0.0)
    reach = max(0.02, reach) * 1.05
    rows = []
    for trial in report.trials:
        row: dict[str, Any] = {"name": trial.name, "refused": trial.refused, "line": None, "state": "even"}
        if trial.accuracy is not None and trial.interval is not None:
            row |= {"accuracy": f"{100 * trial.accuracy:.1f}", "interval": _interval(*trial.interval)}
        if trial.difference is not None:
            mean, low, high = trial.difference
            row["difference"], row["around"] = f"{100 * mean:+.1f}", _interval(low, high, signed=True)
            row["line"] = [f"{50 + 50 * each / reach:.2f}" for each in (mean, low, high)]
            row["state"] = "better" if low > 0 else "worse" if high < 0 else "even"
        rows.append(row)
    samples = max(trial.samples for trial in report.trials)
    return {"rows": rows, "reach": f"{100 * reach:.2g}", "samples": samples}


def _interval(low: float, high: float, signed: bool = False) -> str:
    return f"{100 * low:+.1f} to {100 * high:+.1f}" if signed else f"{100 * low:.1f} to {100 * high:.1f}"


# -- channels ---------------------------------------------------------------------------------------------------------------


def _channels(report: Report) -> list[dict[str, Any]]:
    """The channels of the network; those of the data where nobody knows which goes where."""
    seen, taken = report.seen, places(report.seen)
    if any(source is not None for source in taken):
        return [_channel(report, place, source) for place, source in enumerate(taken)]
    raw, known = seen.raw[seen.kind], seen.stored
    return [
        {"name": f"channel {name}", "before": _stored_histogram(raw, known, k), "after": None}
        | {"numbers": [("stored", *_numbers(known, k))]}
        for k, name in enumerate(seen.kind)
    ]


def _lines(fields: dict[str, Any]) -> str:
    """A JSON object, a field a line."""
    return "\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())


def _channel(report: Report, place: int, source: int | None) -> dict[str, Any]:
    """One channel of the network: what is stored, what arrives, as histograms and numbers."""
    seen, numbers = report.seen, []
    before = after = None
    if source is not None:
        before = _stored_histogram(seen.raw[seen.kind], seen.stored, source)
        numbers.append(("stored", *_numbers(seen.stored, source)))
    if seen.values is not None:
        numbers.append(("scaled", *_numbers(seen.values, place)))
    if seen.after is not None and seen.inputs is not None:
        standard = seen.spec.normalise.rule in ("standard", "zscore", "zscore_nonzero")
        after = _input_histogram(seen.after, seen.inputs, place, standard)
        numbers.append(("network", *_numbers(seen.inputs, place)))
    if seen.expected is not None:
        mean, std = (f"{row[place]:.4g}" for row in seen.expected)
        numbers.append(("expected", mean, std, "", "", ""))
    name = seen.spec.channels[place]
    called = name if source is None or seen.kind[source] == name else f"{name}, from {seen.kind[source]}"
    return {"name": called, "before": before, "after": after, "numbers": numbers}


def _numbers(known: Statistics, k: int) -> tuple[str, ...]:
    values = (known.mean[k], known.std[k], known.low[k], known.percentile(50.0)[k], known.high[k])
    return tuple(f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}" for value in values)


def _stored_histogram(streaming: Streaming, known: Statistics, channel: int) -> dict[str, Any]:
    low, high = known.low[channel], known.high[channel]
    if high > 4 * (end := known.percentile(99.9)[channel]) > 0 and high > 255:
        high = end  # a few bright cells would leave the rest in one bin
    if float(known.low[channel]).is_integer() and low >= 0 and high <= 255 and high - low > 3:
        low, high = 0.0, 256.0  # 8-bit numbers, on the whole of their range
    return _histogram(streaming, channel, low, high)


def _input_histogram(streaming: Streaming, known: Statistics, channel: int, standard: bool) -> dict[str, Any]:
    low, high = known.percentile(0.1)[channel], known.percentile(99.9)[channel]
    if not standard:
        return _histogram(streaming, channel, low, high)
    low, high = min(low, -3.5), max(high, 3.5)
    if known.percentile(1.0)[channel] > -12 and known.percentile(99.0)[channel] < 12:
        low, high = max(low, -12.0), min(high, 12.0)  # a long tail would leave nothing of the rest
    return _histogram(streaming, channel, low, high, bell=True)


def _histogram(streaming: Streaming, channel: int, low: float, high: float, bell: bool = False) -> dict[str, Any]:
    """Outline of the histogram between two values, as points of a polygon, and that of a standard normal distribution."""
    if not np.isfinite([low, high]).all():
        return {"points": "", "bell": "", "low": "", "high": "", "peak": ""}
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    shares = streaming.spread(channel, edges)
    expected = np.exp(-np.square((edges[:-1] + edges[1:]) / 2) / 2) / np.sqrt(2 * np.pi) * (edges[1] - edges[0])
    # a background in one or two bins must not flatten the rest: the next ones set the scale, if they are far lower
    ordered = np.sort(shares)
    top = max(1.3 * ordered[-4], 1.05 * expected.max() if bell else 0.0, 1e-12)
    top = ordered[-1] if top > ordered[-1] / 3 and not (bell and top > ordered[-1]) else top
    x = np.linspace(0, WIDTH, BINS + 1)
    y = HEIGHT * (1 - np.minimum(shares / top, 1))
    points = [f"0,{HEIGHT}", *(f"{a:.1f},{b:.1f}" for k, b in enumerate(y) for a in (x[k], x[k + 1])), f"{WIDTH},{HEIGHT}"]
    curve = [f"{a:.1f},{b:.1f}" for a, b in zip((x[:-1] + x[1:]) / 2, HEIGHT * (1 - expected / top), strict=True)]
    cut = int(np.argmax(shares)) if ordered[-1] > top * 1.001 else None
    return {
        "points": " ".join(points),
        "bell": " ".join(curve) if bell else "",
        "low": f"{low:.4g}",
        "high": f"{high:.4g}",
        "peak": "" if cut is None else f"{100 * shares[cut]:.0f} %",
    }


# -- pictures ---------------------------------------------------------------------------------------------------------------


def _alternative(report: Report) -> tuple[str, Preprocess, dict[str, Any]]:
    """What the pictures are compared with: all that is wrong put right, or else the first suggestion; "" where there is none."""
    seen = report.seen
    if report.suggested != seen.preprocess or report.described:
        return "with what is suggested", report.suggested, report.described
    for finding in report.findings:
        if finding.change and finding.severity == "look":
            return f"if {finding.change}", seen.preprocess.replace(seen.modality, **finding.changes), finding.data
    return "", seen.preprocess, {}


def _rows(report: Report, name: str, other: Preprocess, described: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Pictures of some samples: as stored, as the network gets them, and as it would get them otherwise."""
    seen = report.seen
    before, after, otherwise = [], [], []
    chosen = _rgb(seen.spec.channels, getattr(seen.spec, "sensor", ""))
    for number in np.unique(np.linspace(0, len(seen.indices) - 1, SHOWN).round().astype(int)):
        image = said_otherwise(seen.source[seen.indices[number]]["image"], seen.data)
        names, values, _ = stored(image)
        before.append(_png(_stretched(values[_rgb(names, _sensor(seen))], seen.stored, names, seen)))
        after.append(_network(seen.preprocess, seen.modality, image, chosen))
        otherwise.append(_network(other, seen.modality, said_otherwise(image, described), chosen))
    return [("as stored", before), ("what the network gets", after), *([(name, otherwise)] if name else [])]


def _network(preprocess: Preprocess, modality: str, image: Any, chosen: list[int]) -> str:
    """What the network gets as a picture, "" where the contract refuses."""
    spec = preprocess.array(modality)
    try:
        allow = dict.fromkeys(SWITCHES, "") if isinstance(spec, Raster) else None
        values = preprocess(allow=allow, **{modality: image})[modality][0].double().numpy()[chosen]
    except PreprocessError:
        return ""
    if spec.normalise.mean or spec.normalise.rule in ("zscore", "zscore_nonzero"):
        values = (values + SPREAD) / (2 * SPREAD)
    else:
        low, high = np.nanpercentile(values, (2, 98))
        values = (values - low) / max(high - low, 1e-12)
    return _png(values)


def _stretched(values: np.ndarray, known: Statistics, names: tuple[str, ...], seen: Seen) -> np.ndarray:
    """Stored values as 0..1: 8-bit ones as they are, others between the 2nd and 98th percentile of all samples."""
    if values.dtype == np.uint8:
        return values / 255
    if names != seen.kind:
        low, high = np.nanpercentile(values, (2, 98), axis=(1, 2))
    else:
        rows = _rgb(names, _sensor(seen))
        low, high = known.percentile(2.0)[rows], known.percentile(98.0)[rows]
    return (values - low[:, None, None]) / np.maximum(high - low, 1e-12)[:, None, None]


def _sensor(seen: Seen) -> str:
    """What the stored channels are named by: the sensor of the data, or else that of the contract."""
    return (seen.described.sensor if seen.described else "") or getattr(seen.spec, "sensor", "")


def _rgb(names: Sequence[str], sensor: str) -> list[int]:
    """Which channels are shown as red, green and blue: those of these names, or else the first three, or the only one."""
    from okavango.models.sensors import find_band

    def common(name: str) -> tuple[str, ...]:
        band = find_band(sensor, name)
        return band.common if band else (name.lower(),)

    found = [next((k for k, name in enumerate(names) if colour in common(name)), None) for colour in ("red", "green", "blue")]
    if None not in found:
        return [k for k in found if k is not None]
    return [0, 1, 2] if len(names) >= 3 else [0]


def _png(values: np.ndarray) -> str:
    """(1 or 3, H, W) of 0..1 as a data URL; large pictures are shrunk, small ones are left to the browser."""
    pixels = (np.nan_to_num(values).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    picture = Pillow.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
