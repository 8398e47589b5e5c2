"""Sensors as data: bands with their names, wavelengths and sizes, and what a stored number means at each processing level.

Sources: ESA, Sentinel-2 Products Specification and spectral responses (S2A); the notice on processing baseline 04.00 (operational
2022-01-25); USGS, Landsat Collection 2 Level-1 and Level-2 product guides and the Landsat 7 and 8-9 data users handbooks; Chander,
Markham and Helder 2009 (solar irradiance of TM and ETM+); HLS User Guide 2.0; USDA NAIP (Leica ADS bands).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from okavango.models.preprocess import PreprocessError

BASELINE_OFFSET = -1000.0  # of Sentinel-2 numbers from processing baseline 04.00 on
HARMONISED = "harmonised"  # as a baseline: the catalogue has already taken the offset away


@dataclass(frozen=True)
class Band:
    """One band.

    Attributes:
        name: the sensor's own name.
        common: names that hold across sensors ("red", "nir", ...); bands of two sensors are the same where they share one.
        centre, width: in nanometres, None where it has none (radar) or none is known.
        gsd: native ground sampling distance in metres.
        kind: "optical", "thermal" or "sar".
        aliases: further names of this sensor.
    """

    name: str
    common: tuple[str, ...] = ()
    centre: float | None = None
    width: float | None = None
    gsd: float = 10.0
    kind: str = "optical"
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Level:
    """What a stored number means: value = number * scale + offset.

    Attributes:
        names: of the level, the usual one first.
        units: of what the usual files store.
        scale, offset: number -> reflectance, None where each scene has its own (see `landsat_scaling`).
        thermal: number -> kelvin, scale and offset, or None.
        nodata: the stored number for "no measurement", or None.
        lacks: bands that the level does not have.
    """

    names: tuple[str, ...]
    units: str = "dn"
    scale: float | None = None
    offset: float = 0.0
    thermal: tuple[float, float] | None = None
    nodata: float | None = 0.0
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sensor:
    """A sensor, its bands in their usual order, its processing levels; those of one family serve the same checkpoints."""

    name: str
    bands: tuple[Band, ...]
    levels: tuple[Level, ...]
    aliases: tuple[str, ...] = ()
    family: str = ""


SENTINEL_2 = Sensor(
    "sentinel-2",
    (
        Band("B01", ("coastal",), 442.7, 21, 60),
        Band("B02", ("blue",), 492.4, 66, 10),
        Band("B03", ("green",), 559.8, 36, 10),
        Band("B04", ("red",), 664.6, 31, 10),
        Band("B05", ("rededge1",), 704.1, 15, 20),
        Band("B06", ("rededge2",), 740.5, 15, 20),
        Band("B07", ("rededge3",), 782.8, 20, 20),
        Band("B08", ("nir",), 832.8, 106, 10),
        Band("B8A", ("nir_narrow",), 864.7, 21, 20, aliases=("B08A", "8A", "08A", "rededge4")),
        Band("B09", ("water_vapour",), 945.1, 20, 60),
        Band("B10", ("cirrus",), 1373.5, 31, 60),
        Band("B11", ("swir1",), 1613.7, 91, 20),
        Band("B12", ("swir2",), 2202.4, 175, 20),
    ),
    (Level(("L1C", "TOA"), scale=1e-4), Level(("L2A", "SR", "BOA"), scale=1e-4, lacks=("B10",))),
    ("s2", "sentinel2", "sentinel-2a", "sentinel-2b", "sentinel-2c", "sentinel-2 msi"),
)

SENTINEL_1 = Sensor(
    "sentinel-1",
    tuple(Band(name, (name.lower(),), kind="sar") for name in ("VV", "VH", "HH", "HV")),
    (Level(("GRD",), units="linear"), Level(("RTC",), units="linear")),
    ("s1", "sentinel1", "sentinel-1a", "sentinel-1b", "sentinel-1c"),
)

_LANDSAT_LEVELS = (
    Level(("L1", "L1TP", "L1GT", "L1GS", "C2L1")),
    Level(("L2", "L2SP", "L2SR", "C2L2"), scale=2.75e-5, offset=-0.2, thermal=(0.00341802, 149.0)),
)

LANDSAT_5 = Sensor(
    "landsat-5",
    (
        Band("B1", ("blue",), 485, 70, 30),
        Band("B2", ("green",), 560, 80, 30),
        Band("B3", ("red",), 660, 60, 30),
        Band("B4", ("nir",), 830, 140, 30),
        Band("B5", ("swir1",), 1650, 200, 30),
        Band("B6", ("thermal",), 11450, 2100, 120, "thermal"),
        Band("B7", ("swir2",), 2215, 270, 30),
    ),
    _LANDSAT_LEVELS,
    ("l5", "lt05", "landsat5", "landsat-5 tm"),
)

LANDSAT_7 = Sensor(
    "landsat-7",
    (
        Band("B1", ("blue",), 485, 70, 30),
        Band("B2", ("green",), 560, 80, 30),
        Band("B3", ("red",), 660, 60, 30),
        Band("B4", ("nir",), 835, 130, 30),
        Band("B5", ("swir1",), 1650, 200, 30),
        Band("B6", ("thermal",), 11450, 2100, 60, "thermal", ("B6_VCID_1", "B61")),
        Band("B6_VCID_2", ("thermal_high_gain",), 11450, 2100, 60, "thermal", ("B62",)),
        Band("B7", ("swir2",), 2215, 270, 30),
        Band("B8", ("pan",), 710, 380, 15),
    ),
    _LANDSAT_LEVELS,
    ("l7", "le07", "landsat7", "landsat-7 etm+"),
)

_OLI = (
    Band("B1", ("coastal",), 443, 16, 30),
    Band("B2", ("blue",), 482, 60, 30),
    Band("B3", ("green",), 561, 57, 30),
    Band("B4", ("red",), 655, 37, 30),
    Band("B5", ("nir", "nir_narrow"), 865, 28, 30),
    Band("B6", ("swir1",), 1609, 85, 30),
    Band("B7", ("swir2",), 2201, 187, 30),
    Band("B8", ("pan",), 590, 172, 15),
    Band("B9", ("cirrus",), 1373, 20, 30),
    Band("B10", ("thermal",), 10895, 590, 100, "thermal"),
    Band("B11", ("thermal2",), 12005, 1010, 100, "thermal"),
)
LANDSAT_8 = Sensor("landsat-8", _OLI, _LANDSAT_LEVELS, ("l8", "lc08", "landsat8", "landsat-8 oli"), "landsat-8")
LANDSAT_9 = Sensor("landsat-9", _OLI, _LANDSAT_LEVELS, ("l9", "lc09", "landsat9", "landsat-9 oli-2"), "landsat-8")

_HLS_LEVELS = (Level(("L2", "SR", "HLS"), scale=1e-4, thermal=(0.01, 273.15), nodata=-9999.0),)
HLS_S30 = Sensor(
    "hls-s30",
    tuple(Band(b.name, b.common, b.centre, b.width, 30, b.kind, b.aliases) for b in SENTINEL_2.bands),
    _HLS_LEVELS,
    ("hlss30", "s30"),
    "hls",
)
HLS_L30 = Sensor(
    "hls-l30",
    tuple(
        Band(f"B{int(b.name[1:]):02d}", ("nir_narrow",) if "nir" in b.common else b.common, b.centre, b.width, 30, b.kind)
        for b in _OLI
        if b.name != "B8"
    ),
    _HLS_LEVELS,
    ("hlsl30", "l30"),
    "hls",
)

_CAMERA = (Level(("", "orthophoto"), units="u8", nodata=None),)
NAIP = Sensor(
    "naip",
    (
        Band("red", ("red",), 635, 32, 0.6, aliases=("B1",)),
        Band("green", ("green",), 555, 60, 0.6, aliases=("B2",)),
        Band("blue", ("blue",), 465, 60, 0.6, aliases=("B3",)),
        Band("nir", ("nir",), 845, 74, 0.6, aliases=("B4",)),
    ),
    _CAMERA,
)
# Cameras differ, so no wavelength is claimed; this is also where names are looked up when nobody says which sensor it was.
RGB_AERIAL = Sensor(
    "rgb",
    tuple(Band(name, (name,), None, None, 0.3) for name in ("red", "green", "blue", "nir")),
    _CAMERA,
    ("rgb-aerial", "aerial", "rgbn"),
)

SENSORS: dict[str, Sensor] = {
    sensor.name: sensor
    for sensor in (
        SENTINEL_2,
        SENTINEL_1,
        LANDSAT_5,
        LANDSAT_7,
        LANDSAT_8,
        LANDSAT_9,
        HLS_S30,
        HLS_L30,
        NAIP,
        RGB_AERIAL,
    )
}
_SENSOR_KEYS = {alias: sensor for sensor in SENSORS.values() for alias in (sensor.name, *sensor.aliases)}

# other spellings of the common names
_COMMON = {
    "r": "red",
    "g": "green",
    "b": "blue",
    "n": "nir",
    "coastal_aerosol": "coastal",
    "nearinfrared": "nir",
    "near_infrared": "nir",
    "nir_broad": "nir",
    "nir08": "nir_narrow",
    "narrow_nir": "nir_narrow",
    "nir09": "water_vapour",
    "water_vapor": "water_vapour",
    "swir_1": "swir1",
    "swir16": "swir1",
    "swir_2": "swir2",
    "swir22": "swir2",
    "rededge_1": "rededge1",
    "rededge071": "rededge1",
    "rededge_2": "rededge2",
    "rededge075": "rededge2",
    "rededge_3": "rededge3",
    "rededge078": "rededge3",
    "panchromatic": "pan",
    "lwir11": "thermal",
    "lwir12": "thermal2",
}


def find_sensor(name: str) -> Sensor | None:
    """The sensor of that name or alias, in any case; None for one that is not in the table.

    Example:
        >>> find_sensor("Sentinel-2A").name
        'sentinel-2'
    """
    return _SENSOR_KEYS.get(name.strip().lower())


def sensor_name(name: str) -> str:
    """The table's name for a sensor; an unknown one is only lowered."""
    sensor = find_sensor(name)
    return sensor.name if sensor else name.strip().lower()


def sensor_family(name: str) -> str:
    """Sensors of one family serve the same checkpoints (Landsat 8 and 9, both of HLS); of others, the name itself."""
    sensor = find_sensor(name)
    return (sensor.family or sensor.name) if sensor else sensor_name(name)


def find_level(sensor: str, name: str) -> Level | None:
    """The processing level of that name, in any case."""
    known = find_sensor(sensor)
    levels = known.levels if known else ()
    return next((level for level in levels if name.strip().upper() in (each.upper() for each in level.names)), None)


def find_band(sensor: str, name: str) -> Band | None:
    """The band that `name` means on that sensor, or across sensors where `sensor` is "".

    Zeros, case, separators and the prefixes of Landsat's files do not matter. A bare number names no band: it may be an index.

    Example:
        >>> find_band("sentinel-2", "b8a").name, find_band("landsat-7", "SR_B3").common
        ('B8A', ('red',))
    """
    known = find_sensor(sensor or RGB_AERIAL.name)
    return None if known is None else _band_keys(known).get(_key(name))


@functools.cache
def _band_keys(sensor: Sensor) -> dict[str, Band]:
    keys = {}
    for band in reversed(sensor.bands):
        spellings = [key for key, common in _COMMON.items() if common in band.common]
        keys.update({_key(name): band for name in (*spellings, *band.common)})
    own = {_key(name): band for band in sensor.bands for name in (band.name, *band.aliases)}
    if sensor is RGB_AERIAL:  # names that every sensor shares, for data of no known sensor
        rest = {_key(name): Band(name, (name,), kind="sar") for name in ("vv", "vh", "hh", "hv")}
        names = [name for each in (SENTINEL_2, LANDSAT_8) for band in each.bands for name in band.common if name not in own]
        rest |= {_key(name): Band(name, (name,)) for name in names}
        rest |= {_key(key): Band(common, (common,)) for key, common in _COMMON.items() if _key(common) in rest}
        own = {**rest, **own}
    return {**keys, **own}


def _key(name: str) -> str:
    text = re.sub(r"[\s_.\-]+", "", name.lower())
    return re.sub(r"^(?:sr|st|toa|boa)?b(?:and)?0*(\d+a?)$", r"b\1", text)


def wavelengths(sensor: str, channels: Sequence[str]) -> tuple[float | None, ...]:
    """Centres in nanometres of named bands, None where there is none or the name is not known."""
    bands = [find_band(sensor, name) for name in channels]
    return tuple(band.centre if band else None for band in bands)


def baseline_offset(baseline: str) -> float | None:
    """What is added to Sentinel-2 numbers before they are divided by 10,000; None when the baseline does not tell.

    The baseline decides and not the date, since archives were processed again.

    Args:
        baseline: such as "02.14" or "N0400", or "harmonised" for numbers from which a catalogue has taken the offset already.

    Example:
        >>> baseline_offset("02.08"), baseline_offset("N0510"), baseline_offset("")
        (0.0, -1000.0, None)
    """
    text = baseline.strip().lower()
    if text in (HARMONISED, "harmonized"):
        return 0.0
    if not (match := re.fullmatch(r"n?(\d{2})[._]?(\d{2})", text)):
        return None
    return BASELINE_OFFSET if int(match[1]) >= 4 else 0.0


def scaling(sensor: str, level: str, band: Band, baseline: str = "") -> tuple[float, float] | None:
    """Scale and offset from stored number to reflectance (kelvin for thermal bands); None where the table cannot tell.

    Example:
        >>> scaling("landsat-8", "L2", find_band("landsat-8", "B4"))
        (2.75e-05, -0.2)
    """
    found = find_level(sensor, level)
    if found is None or band.kind == "sar":
        return None
    if band.kind == "thermal":
        return found.thermal
    if found.scale is None:
        return None
    if sensor_name(sensor) == SENTINEL_2.name:
        shift = baseline_offset(baseline)
        return None if shift is None else (found.scale, shift * found.scale)
    return found.scale, found.offset


# Solar irradiance above the atmosphere in W m-2 um-1 (Chander et al. 2009), for scenes whose MTL has no numbers for reflectance.
_ESUN = {
    "landsat-5": {"B1": 1983, "B2": 1796, "B3": 1536, "B4": 1031, "B5": 220.0, "B7": 83.44},
    "landsat-7": {"B1": 1997, "B2": 1812, "B3": 1533, "B4": 1039, "B5": 230.8, "B7": 84.90, "B8": 1362},
}


def solar_irradiance(sensor: str, band: str) -> float:
    """Above the atmosphere in W m-2 um-1, of a band of Landsat 5 or 7; nan for others."""
    return _ESUN.get(sensor_name(sensor), {}).get(band, math.nan)


def landsat_scaling(mtl: Mapping[str, object], sensor: str, band: str) -> tuple[float, float]:
    """Scale and offset from a level-1 number to reflectance above the atmosphere, from the scene's MTL.

    Collection 1 and 2: (number * REFLECTANCE_MULT + REFLECTANCE_ADD) / sin(sun elevation). Older files know only radiance:
    pi * radiance * distance ** 2 / (irradiance * sin(sun elevation)), with the distance from the date where it is not given.

    Args:
        mtl: the names and values of the MTL, flat, e.g. ``{"SUN_ELEVATION": 49.8, "REFLECTANCE_MULT_BAND_3": ...}``.
        sensor: "landsat-5", "landsat-7", ...
        band: any name of the band.
    Raises:
        PreprocessError: an unknown band, or numbers that the MTL lacks.

    Example:
        >>> mtl = {"SUN_ELEVATION": 30.0, "REFLECTANCE_MULT_BAND_4": 2e-5, "REFLECTANCE_ADD_BAND_4": -0.1}
        >>> scale, offset = landsat_scaling(mtl, "landsat-8", "red")
        >>> round(scale, 6), round(offset, 6)
        (4e-05, -0.2)
    """
    found = find_band(sensor, band)
    if found is None or found.kind != "optical":
        raise PreprocessError(f"{sensor}: {band!r} is no band that has a reflectance")
    number = found.name[1:]

    def value(*names: str) -> float | None:
        return next((float(str(mtl[name])) for name in names if name in mtl), None)

    elevation = value("SUN_ELEVATION")
    if elevation is None or elevation <= 0:
        raise PreprocessError(f"MTL: SUN_ELEVATION is {elevation}; expected degrees above 0")
    sine = math.sin(math.radians(elevation))
    mult, add = value(f"REFLECTANCE_MULT_BAND_{number}"), value(f"REFLECTANCE_ADD_BAND_{number}")
    if mult is not None and add is not None:
        return mult / sine, add / sine
    mult, add = value(f"RADIANCE_MULT_BAND_{number}"), value(f"RADIANCE_ADD_BAND_{number}")
    if mult is None or add is None:
        high, low = (value(f"RADIANCE_{end}_BAND_{number}", f"L{end[:3]}_BAND{number}") for end in ("MAXIMUM", "MINIMUM"))
        top, bottom = (value(f"QUANTIZE_CAL_{end[:3]}_BAND_{number}", f"QCAL{end[:3]}_BAND{number}") for end in ("MAX", "MIN"))
        if None in (high, low, top, bottom):
            raise PreprocessError(f"MTL: no numbers for the reflectance or radiance of band {number}")
        mult = (high - low) / (top - bottom)  # type: ignore[operator]
        add = low - mult * bottom  # type: ignore[operator]
    sun = _ESUN.get(sensor_name(sensor), {}).get(found.name)
    if sun is None:
        raise PreprocessError(f"MTL: only radiance for band {number}, and no solar irradiance of {sensor} is known")
    distance = value("EARTH_SUN_DISTANCE") or _sun_distance(str(mtl.get("DATE_ACQUIRED", mtl.get("ACQUISITION_DATE", ""))))
    factor = math.pi * distance**2 / (sun * sine)
    return mult * factor, add * factor


def _sun_distance(date: str) -> float:
    """Astronomical units on an ISO date, from the mean anomaly; within 0.0003 of the almanac."""
    import datetime

    try:
        day = datetime.date.fromisoformat(date.strip('" ')[:10]).timetuple().tm_yday
    except ValueError:
        raise PreprocessError(f"MTL: neither EARTH_SUN_DISTANCE nor a date ({date!r}); expected one") from None
    return 1 - 0.01672 * math.cos(math.radians(0.9856 * (day - 4)))
