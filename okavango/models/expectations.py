"""What published checkpoints expect as input, as contract entries, and the pipelines of the study that compared them.

The entries stand also for weights that are not here. Where a library's own transform differs from what the authors trained with,
the authors' is the default and the other a named variant.

Sources: torchgeo 0.8.1; the papers named beside each entry; Corley et al. 2023 (arXiv 2305.13456).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from okavango.models.band_statistics import STATISTICS, statistics
from okavango.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Normalise, Preprocess, PreprocessError, Raster, Resize
from okavango.models.sensors import SENTINEL_2, wavelengths

RGB = ("red", "green", "blue")
S2 = tuple(band.name for band in SENTINEL_2.bands)
S2_RGB = ("B04", "B03", "B02")
S2_L2A = tuple(name for name in S2 if name != "B10")
HLS = ("B02", "B03", "B04", "B8A", "B11", "B12")  # blue, green, red, narrow near infrared, two of short waves
S2_SATLAS = (*S2_RGB, "B05", "B06", "B07", "B08", "B11", "B12")
TRUE_COLOUR = 3558.0  # the Sentinel-2 number that is 255 in ESA's true-colour picture
SATLAS = 8160.0  # = 32 * 255, the number that Satlas takes for 1

_CROP = Resize(rule="exact", interpolation="bilinear", crop_ratio=224 / 256)  # to 256, then the middle 224
_EXACT = Resize(rule="exact", interpolation="bilinear")
_CENTRE = Resize(rule="crop", interpolation="bilinear", on="normalised")  # native scale; what is missing becomes 0


def _range(low: Sequence[float], high: Sequence[float], clip: bool = True) -> Normalise:
    return Normalise(rule="minmax", low=tuple(low), high=tuple(high), clip=(0.0, 1.0) if clip else None)


def _imagenet_after(low: float, high: float) -> Normalise:
    """(x - low) / (high - low), then ImageNet's statistics, in one step."""
    mean = tuple(low + each * (high - low) for each in IMAGENET_MEAN)
    std = tuple(each * (high - low) for each in IMAGENET_STD)
    return Normalise(rule="standard", mean=mean, std=std, origin="imagenet-1k train")


def _sentinel_2(channels: tuple[str, ...], level: str = "L1C", **fields: Any) -> Raster:
    common = {"sensor": "sentinel-2", "level": level, "wavelengths": wavelengths("sentinel-2", channels), "resolution": 10.0}
    return Raster(channels=channels, **{**common, **fields})


def _pictures(**fields: Any) -> Raster:
    """8-bit red, green and blue of any sensor, ImageNet's statistics."""
    return Raster(**{"channels": RGB, "units": "u8", "normalise": _imagenet_after(0, 255), "resize": _EXACT, **fields})


# -- the entries: variant -> modalities; "" is what the authors trained with -------------------------------------------------------


def _ssl4eo_s12(channels: tuple[str, ...]) -> Callable[[str], dict[str, Raster]]:
    table = STATISTICS["ssl4eo_s12_l1c"]
    changes: dict[str, dict[str, Any]] = {
        "": {"units": "reflectance", "scale": (1e-4,)},
        "statistics": {"units": "dn", "normalise": table.standard(channels)},
        "eight_bit": {"units": "dn", "normalise": table.eight_bit(channels)},
    }
    return lambda variant: {"image": _sentinel_2(channels, resize=_CROP, **changes[variant])}


def _seco(variant: str) -> dict[str, Raster]:
    """Red, green, blue as 8-bit reflectance * 255, stretched between SeCo's quantiles, then ImageNet's statistics.

    The quantiles are published per band: B04 0..129, B03 2..103, B02 3..88. "study" and "torchgeo" apply them in the order B02,
    B03, B04 to red, green, blue; torchgeo also multiplies by 255 again before ImageNet's statistics for 0..1, and cuts nothing.
    """
    low, high = ((0, 2, 3), (129, 103, 88)) if not variant else ((3, 2, 0), (88, 103, 129))
    rule = Normalise(rule="stretch", low=low, high=high, mean=IMAGENET_MEAN, std=IMAGENET_STD, origin="SeCo; imagenet-1k train")
    if variant == "torchgeo":  # ((x - low) / (high - low) * 255 - mean) / std
        spread = [(b - a) / 255 for a, b in zip(low, high, strict=True)]
        mean = tuple(a + m * s for a, m, s in zip(low, IMAGENET_MEAN, spread, strict=True))
        std = tuple(d * s for d, s in zip(IMAGENET_STD, spread, strict=True))
        rule = Normalise(rule="standard", mean=mean, std=std, origin="torchgeo's transform for SeCo")
    return {"image": _sentinel_2(S2_RGB, level="", units="u8", scale=(255 / 10000,), resize=_CROP, normalise=rule)}


def _satlas_ms(variant: str) -> dict[str, Raster]:
    """Red, green and blue as in the true-colour picture, the others divided by 8160; both cut to 0..1.

    "torchgeo" takes the 8-bit true-colour picture beside the other bands' numbers, and cuts nothing.
    """
    tops = ((255.0,) if variant == "torchgeo" else (TRUE_COLOUR,)) * 3 + (SATLAS,) * 6
    rule = _range((0.0,) * 9, tops, clip=variant != "torchgeo")
    return {"image": _sentinel_2(S2_SATLAS, level="L1C", units="dn", size=(256, 256), resize=_CENTRE, normalise=rule)}


def _satlas_landsat(variant: str) -> dict[str, Raster]:
    channels = tuple(f"B{number}" for number in range(1, 12))
    rule = _range((4000.0,) * 11, (20320.0,) * 11, clip=variant != "torchgeo")
    where: dict[str, Any] = {
        "sensor": "landsat-8",
        "level": "L1",
        "wavelengths": wavelengths("landsat-8", channels),
        "resolution": 30.0,
    }
    return {"image": Raster(channels=channels, units="dn", size=(256, 256), resize=_CENTRE, normalise=rule, **where)}


def _ssl4eo_l(sensor: str, level: str, channels: tuple[str, ...]) -> Callable[[str], dict[str, Raster]]:
    rule = _range((0.0,) * len(channels), (255.0,) * len(channels), clip=False)
    where: dict[str, Any] = {"sensor": sensor, "level": level, "wavelengths": wavelengths(sensor, channels), "resolution": 30.0}
    spec = Raster(channels=channels, units="u8", resize=_CENTRE, normalise=rule, **where)
    return lambda variant: {"image": spec}


def _croma(variant: str) -> dict[str, Raster]:
    """Both modalities stretched between mean -+ 2 std of each band over the batch. "torchgeo" normalises nothing."""
    rule = Normalise() if variant == "torchgeo" else Normalise(rule="deviations", batch_dependent=True)
    optical = _sentinel_2(S2_L2A, level="", units="dn", size=(120, 120), resize=_EXACT, normalise=rule)
    radar = Raster(channels=("VV", "VH"), sensor="sentinel-1", units="db", size=(120, 120), resize=_EXACT, normalise=rule)
    return {"optical": optical, "sar": radar}


def _dofa(table: str, sensor: str, scale: tuple[float, ...] = (1.0,)) -> Callable[[str], dict[str, Raster]]:
    """8-bit pictures of a sensor, standardised. "torchgeo" normalises nothing."""
    found = STATISTICS[table]
    own: dict[str, Any] = {"channels": found.channels, "wavelengths": wavelengths(sensor, found.channels), "sensor": sensor}

    def build(variant: str) -> dict[str, Raster]:
        rule = Normalise() if variant == "torchgeo" else found.standard(found.channels)
        return {"image": Raster(units="u8", scale=scale, resize=_EXACT, normalise=rule, **own)}

    return build


def _standardised(table: str, size: int, resolution: float) -> Callable[[str], dict[str, Raster]]:
    """The table's own bands, unit and statistics."""
    found = STATISTICS[table]
    spec = Raster(
        channels=found.channels,
        wavelengths=wavelengths(found.sensor, found.channels),
        sensor=found.sensor,
        level=found.level,
        units=found.units,
        resolution=resolution,
        size=(size, size),
        resize=_EXACT,
        normalise=found.standard(found.channels),
    )
    return lambda variant: {"image": spec}


def _scale_mae(variant: str) -> dict[str, Raster]:
    """224 pixels; the network wants the ground sampling distance besides. "torchgeo" resizes nothing."""
    return {"image": _pictures(resize=Resize(rule="none") if variant == "torchgeo" else _EXACT)}


_FMOW_RGB, _SAT_493M = (STATISTICS[name].standard(RGB) for name in ("fmow_rgb", "sat_493m"))
_SATMAE_BANDS = tuple(name for name in S2 if name not in ("B01", "B09", "B10"))
_SATMAE = _sentinel_2(_SATMAE_BANDS, units="dn", size=(96, 96), normalise=STATISTICS["fmow_sentinel"].eight_bit(_SATMAE_BANDS))
_SATLAS_RGB = _sentinel_2(
    S2_RGB,
    level="",
    units="u8",
    scale=(255 / TRUE_COLOUR,),
    size=(256, 256),
    resize=_CENTRE,
    normalise=_range((0.0,) * 3, (255.0,) * 3, clip=False),
)
_SSL4EO_S1 = Raster(
    channels=("VV", "VH"),
    sensor="sentinel-1",
    level="GRD",
    units="db",
    resolution=10.0,
    resize=_CROP,
    normalise=STATISTICS["ssl4eo_s12_s1"].standard(("VV", "VH")),
)
_TM = tuple(f"B{number}" for number in range(1, 8))
_ETM = ("B1", "B2", "B3", "B4", "B5", "B6", "B6_VCID_2", "B7", "B8")
_SR = ("B1", "B2", "B3", "B4", "B5", "B7")

# name -> (what builds it, its variants besides the default)
_ENTRIES: dict[str, tuple[Callable[[str], dict[str, Raster]], tuple[str, ...]]] = {
    "ssl4eo_s12_s2": (_ssl4eo_s12(S2), ("statistics", "eight_bit")),
    "ssl4eo_s12_s2_rgb": (_ssl4eo_s12(S2_RGB), ("statistics", "eight_bit")),
    "ssl4eo_s12_s1": (lambda variant: {"image": _SSL4EO_S1}, ()),
    "seco": (_seco, ("torchgeo", "study")),
    "seco_eco": (
        lambda variant: {"image": _sentinel_2(S2_RGB, level="", units="reflectance", scale=(1e-4,), resize=_EXACT)},
        (),
    ),
    "gassl": (lambda variant: {"image": _pictures()}, ()),
    "scale_mae": (_scale_mae, ("torchgeo",)),
    "satmae_rgb": (
        lambda variant: {
            "image": _pictures(normalise=_FMOW_RGB, resize=Resize(rule="exact", interpolation="bicubic", crop_ratio=224 / 256))
        },
        (),
    ),
    "satmae_s2": (lambda variant: {"image": _SATMAE}, ()),
    "satlas_rgb": (lambda variant: {"image": _SATLAS_RGB}, ()),
    "satlas_s2_ms": (_satlas_ms, ("torchgeo",)),
    "satlas_landsat": (_satlas_landsat, ("torchgeo",)),
    "ssl4eo_l_tm_toa": (_ssl4eo_l("landsat-5", "L1", _TM), ()),
    "ssl4eo_l_etm_toa": (_ssl4eo_l("landsat-7", "L1", _ETM), ()),
    "ssl4eo_l_etm_sr": (_ssl4eo_l("landsat-7", "L2", _SR), ()),
    "ssl4eo_l_oli_toa": (_ssl4eo_l("landsat-8", "L1", tuple(f"B{number}" for number in range(1, 12))), ()),
    "ssl4eo_l_oli_sr": (_ssl4eo_l("landsat-8", "L2", _TM), ()),
    "croma": (_croma, ("torchgeo",)),
    "dofa_sentinel_2": (_dofa("dofa_sentinel_2", "sentinel-2", (255 / TRUE_COLOUR,) * 3 + (255 / SATLAS,) * 6), ("torchgeo",)),
    "dofa_sentinel_1": (_dofa("dofa_sentinel_1", "sentinel-1"), ("torchgeo",)),
    "dofa_gaofen": (_dofa("dofa_gaofen", "gaofen"), ("torchgeo",)),
    "prithvi_1": (_standardised("prithvi_1", 224, 30.0), ()),
    "prithvi_2": (_standardised("prithvi_2", 224, 30.0), ()),
    "clay_sentinel_2": (_standardised("clay_sentinel_2", 256, 10.0), ()),
    "clay_sentinel_1": (_standardised("clay_sentinel_1", 256, 10.0), ()),
    "clay_landsat_l1": (_standardised("clay_landsat_l1", 256, 30.0), ()),
    "clay_landsat_l2": (_standardised("clay_landsat_l2", 256, 30.0), ()),
    "clay_naip": (_standardised("clay_naip", 256, 1.0), ()),
    "clay_linz": (_standardised("clay_linz", 256, 0.5), ()),
    "clay_modis": (_standardised("clay_modis", 256, 500.0), ()),
    "dinov3_sat": (lambda variant: {"image": _pictures(size=(256, 256), normalise=_SAT_493M)}, ()),
}
CHECKPOINTS: dict[str, tuple[str, ...]] = {name: ("", *variants) for name, (_, variants) in _ENTRIES.items()}

# what some networks want besides the pixels; wavelengths are in the contract
BESIDES: dict[str, str] = {
    "scale_mae": "ground sampling distance",
    "dofa_sentinel_2": "wavelengths in micrometres",
    "dofa_sentinel_1": "wavelengths in micrometres",
    "dofa_gaofen": "wavelengths in micrometres",
    "prithvi_1": "a stack of frames",
    "prithvi_2": "a stack of frames; place and date where it was trained with them",
    **{name: "wavelengths, ground sampling distance, place and time" for name in _ENTRIES if name.startswith("clay_")},
}


def checkpoint(name: str, variant: str = "") -> Preprocess:
    """What a published checkpoint expects.

    Args:
        name: of `CHECKPOINTS`.
        variant: "" as the authors trained it; "torchgeo" or "study" for a transform that differs from it, to repeat their numbers;
            "statistics", "eight_bit" for weights that were trained so.
    Raises:
        PreprocessError: unknown name or variant.

    Example:
        >>> checkpoint("seco").array().normalise.high, checkpoint("seco", "torchgeo").array().normalise.rule
        ((129, 103, 88), 'standard')
    """
    if name not in _ENTRIES:
        raise PreprocessError(f"unknown checkpoint {name!r}; expected {', '.join(_ENTRIES)}")
    build, variants = _ENTRIES[name]
    if variant and variant not in variants:
        raise PreprocessError(f"{name}: unknown variant {variant!r}; expected {', '.join(map(repr, ('', *variants)))}")
    return Preprocess(build(variant))


def imagenet(
    table: str = "imagenet", channels: Sequence[str] = (), *, size: int | tuple[int, int] = 224, resize: Resize | None = None
) -> Preprocess:
    """For a network trained on ImageNet: bands standardised by a data set's statistics, which suits such networks.

    Args:
        table: of `STATISTICS`; "imagenet" for 8-bit pictures of any sensor. Sensor, level and unit are those of the table.
        channels: bands in the network's order; red, green and blue when left out.
        size: pixels.
        resize: exact, bilinear with antialias when left out.
    Raises:
        PreprocessError: unknown table, or a band that it lacks.

    Example:
        >>> imagenet("eurosat").array().normalise.mean
        (947.62620298, 1042.92983953, 1118.24399958)
    """
    found = statistics(table)
    names = tuple(channels) or RGB
    return Preprocess(
        image=Raster(
            channels=names,
            wavelengths=wavelengths(found.sensor, names),
            sensor="" if found.units == "u8" and found.sensor in ("rgb", "naip") else found.sensor,
            level=found.level,
            units=found.units,
            size=(size, size) if isinstance(size, int) else size,
            resize=resize or _EXACT,
            normalise=found.standard(names),
        )
    )


def csmask(mean: Sequence[float], std: Sequence[float], *, size: int = 256) -> Preprocess:
    """ukis-csmask's cloud and water networks: blue, green, red, near infrared (and two of short waves) as reflectance.

    Args:
        mean, std: from the JSON that its weights come with, four or six numbers.
    """
    channels = ("blue", "green", "red", "nir", "swir1", "swir2")[: len(mean)]
    rule = Normalise(rule="standard", mean=tuple(mean), std=tuple(std), origin="ukis-csmask")
    return Preprocess(image=Raster(channels=channels, size=(size, size), resize=_EXACT, normalise=rule))


# -- the study ------------------------------------------------------------------------------------------------------------------

# data set, which is also the name of its statistics -> pixels of its patches
STUDY_DATASETS = {
    "eurosat": 64,
    "bigearthnet": 120,
    "treesatai": 20,
    "so2sat_random": 32,
    "so2sat_culture_10": 32,
    "sat6": 28,
    "ucmerced": 256,
    "resisc45": 256,
}
_NORMALISED_FIRST = ("eurosat", "ucmerced", "resisc45")
NORMALISATIONS = ("none", "divide", "standardization", "minmax", "for_seco", "imagenet")


def study_recipe(dataset: str, encoder: str) -> str:
    """The normalisation that the study's scripts give an encoder ("imagenet", "moco", "random", "rcf", "mosaiks", "statistics").

    EuroSAT, UC Merced and RESISC45 have no such rule: every normalisation was run there.
    """
    if encoder == "statistics":
        return "none"
    if encoder == "imagenet":
        return "standardization"
    return "none" if dataset.startswith("so2sat") else "divide"  # So2Sat is stored as reflectance


def study(
    dataset: str, normalisation: str, *, bands: str = "all", size: int | None = 224, as_published: bool = False
) -> Preprocess:
    """A pipeline of the study: bilinear resize of the short side with aligned corners and no antialias.

    EuroSAT, UC Merced and RESISC45 are normalised and then resized, the others resized and then normalised. Sets of 10 or 12 bands
    of Sentinel-2 are filled up to 13.

    Args:
        dataset: of `STUDY_DATASETS`.
        normalisation: "none", "divide" (by 10,000, or 255 for 8-bit), "standardization" (by the data set's statistics), "minmax",
            "for_seco" (x / 2750 cut to 0..1), "imagenet".
        bands: "all" or "rgb".
        size: pixels; None for the native size.
        as_published: with the study's slips: EuroSAT's bands in the order of its files (B8A last) although the 13-band networks
            take B8A ninth; BigEarthNet and TreeSatAI padded by a zero band at place 8 before normalisation, with statistics that
            assume place 10. Data need ``allow={"order": reason}`` where the statistics then contradict the names.
    Raises:
        PreprocessError: unknown data set, bands or normalisation.

    Example:
        >>> study("bigearthnet", "divide").array().channels[8:11]
        ('B8A', 'B09', 'B10')
        >>> study("bigearthnet", "divide", as_published=True).array().channels[8:11]
        ('B10', 'B8A', 'B09')
    """
    if dataset not in STUDY_DATASETS:
        raise PreprocessError(f"unknown data set {dataset!r} of the study; expected {', '.join(STUDY_DATASETS)}")
    if bands not in ("all", "rgb"):
        raise PreprocessError(f"bands {bands!r}: expected 'all' or 'rgb'")
    table = STATISTICS[dataset]
    optical = table.sensor == "sentinel-2"
    channels: tuple[str, ...] = (S2_RGB if optical else RGB) if bands == "rgb" else table.channels
    absent: tuple[str, ...] = ()
    if bands == "all" and optical:
        absent = tuple(name for name in S2 if name not in table.channels)
        channels = table.channels if as_published and not absent else S2
        if as_published and absent == ("B10",):
            channels = (*S2[:8], "B10", "B8A", "B09", *S2[11:])
    units, scale, rule = _study_normalise(dataset, normalisation, channels, absent, as_published)
    order: Literal["native", "normalised"] = "normalised" if dataset in _NORMALISED_FIRST else "native"
    resize = Resize(rule="short_side", interpolation="bilinear", antialias=False, corners="aligned", on=order)
    return Preprocess(
        image=Raster(
            channels=channels,
            wavelengths=wavelengths(table.sensor, channels),
            sensor=table.sensor,
            level=table.level,
            units=units,
            scale=(scale,),
            absent=0.0 if absent else None,
            absent_on="native" if as_published else "normalised",
            size=(size or STUDY_DATASETS[dataset],) * 2,
            resize=resize if size else Resize(rule="none"),
            normalise=rule,
        )
    )


def _study_normalise(
    dataset: str, normalisation: str, channels: tuple[str, ...], absent: tuple[str, ...], as_published: bool
) -> tuple[str, float, Normalise]:
    """Units, scale from stored values to them, and the rule."""
    table = STATISTICS[dataset]
    count = len(channels)
    if normalisation == "none":
        return table.units, 1.0, Normalise()
    if normalisation == "divide":
        if table.units == "dn":
            return "reflectance", 1e-4, Normalise()
        return table.units, 1.0, _range((0.0,) * count, (255.0,) * count, clip=False)
    if normalisation == "standardization":
        places = S2 if as_published and absent == ("B10",) and count == 13 else channels  # the slip: statistics by place
        empty = {"mean": 0.0, "std": 10000.0 if table.units == "dn" else 1.0}

        def numbers(name: str) -> tuple[float, ...]:
            return tuple(empty[name] if band in absent else table.of(name, (band,))[0] for band in places)

        return table.units, 1.0, Normalise(rule="standard", mean=numbers("mean"), std=numbers("std"), origin=table.origin)
    if normalisation == "minmax" and table.low:
        low, high = table.of("low", channels), table.of("high", channels)
        return table.units, 1.0, Normalise(rule="minmax", low=low, high=high, origin=table.origin)
    if normalisation == "minmax" and table.units == "u8":
        return "u8", 1.0, _range((0.0,) * count, (255.0,) * count, clip=False)
    if normalisation == "for_seco" and table.units == "dn":
        return "dn", 1.0, _range((0.0,) * count, (2750.0,) * count)
    if normalisation == "imagenet" and table.units == "u8" and count == 3:
        return "u8", 1.0, _imagenet_after(0, 255)
    raise PreprocessError(f"{dataset}: the study has no normalisation {normalisation!r} here; all are {', '.join(NORMALISATIONS)}")
