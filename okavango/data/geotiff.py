"""GeoTIFF files, folders of per-band files, and products of Sentinel-2 and Landsat, read as `Bands`.

A description is never guessed from values. Where several say something, the first of these is believed: arguments, a file
``bands.json``, the metadata of the product (``MTD_MSI*.xml``, ``*_MTL.txt``), tags of the file, names of files. What nobody says
stays unknown.

``bands.json`` is an object with any of the fields that `Scene` takes by name, and ``files``, a file name per channel:

    {"sensor": "sentinel-2", "level": "L1C", "units": "dn", "channels": ["B01", "B02", "B03"], "nodata": 0}
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from okavango.data.tiles import Window, moved
from okavango.models.preprocess import PreprocessError
from okavango.models.raster import UNITS, Bands
from okavango.models.sensors import SENTINEL_2, find_band, find_sensor, landsat_scaling

SIDECAR = "bands.json"
SUFFIXES = (".tif", ".tiff", ".jp2")


class GeoError(ValueError):
    """Files that cannot be read as one raster; the message names the file and says why."""


# -- what names say ---------------------------------------------------------------------------------------------------------

_BAND = re.compile(
    r"(?:^|[_.\-])(?:SR_|ST_)?(B(?:1[0-2]|0?[1-9]A?)(?:_VCID_[12])?|VV|VH|HH|HV|red|green|blue|nir)(?:_\d+m)?$", re.IGNORECASE
)


def band_name(stem: str) -> str:
    """The band that the name of a file ends with, as it is written there, or "".

    Example:
        >>> [band_name(stem) for stem in ("T32UMC_20220101T103421_B8A_20m", "LE71950252001211EDC00_B6_VCID_1", "x_TCI")]
        ['B8A', 'B6_VCID_1', '']
    """
    found = _BAND.search(stem)
    return found[1] if found else ""


def _named(name: str) -> dict[str, Any]:
    """What the name of a product says."""
    if found := re.match(r"S2[A-D]_MSI(L1C|L2A)_(\d{8}T\d{6})_N(\d\d)(\d\d)_", name):
        return {"sensor": "sentinel-2", "level": found[1], "time": _time(found[2]), "baseline": f"{found[3]}.{found[4]}"}
    if found := re.match(r"L[COTEM](0[4-9])_(L[12])\w\w_\d{6}_(\d{8})_", name):
        return {"sensor": f"landsat-{int(found[1])}", "level": found[2], "time": _time(found[3])}
    if found := re.match(r"L[COTEM]([4-9])\d{13}", name):
        return {"sensor": f"landsat-{found[1]}"}
    if found := re.match(r"S1[A-D]_\w\w_(GRD)\w_\w{4}_(\d{8}T\d{6})_", name):
        return {"sensor": "sentinel-1", "level": found[1], "time": _time(found[2])}
    return {}


def _time(digits: str) -> str:
    """20220131T102345 -> 2022-01-31T10:23:45"""
    day = f"{digits[:4]}-{digits[4:6]}-{digits[6:8]}"
    return day if len(digits) == 8 else f"{day}T{digits[9:11]}:{digits[11:13]}:{digits[13:15]}"


# -- what the metadata of products say --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """Files of a scene with the band that each holds (None where the file itself must say), and what is said of them."""

    files: list[tuple[Path, str | None]]
    facts: dict[str, Any]
    stored: dict[str, tuple[float, float]] = field(default_factory=dict)  # band -> scale and offset to `units`
    usual: tuple[str, ...] = ()  # bands that are read when nobody asks for others, all by default


def _product(where: Path) -> _Product:
    if where.is_dir():
        found = sorted(path for path in where.iterdir() if re.fullmatch(r"(?i).*_MTL\.txt|MTD_MSI\w+\.xml", path.name))
        if len(found) > 1:
            raise GeoError(f"{where}: holds several products; name one: {', '.join(path.name for path in found)}")
        return _product(found[0]) if found else _folder(where)
    if where.name.lower().endswith("_mtl.txt"):
        return _landsat(where)
    if re.fullmatch(r"MTD_MSI\w+\.xml", where.name):
        return _sentinel2(where)
    return _Product([(where, None)], _named(where.name))


def _folder(where: Path) -> _Product:
    """Per-band files without metadata: those whose names end with a band, or all where none does."""
    paths = sorted(path for path in where.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    if not paths:
        raise GeoError(f"{where}: no raster in this folder; looked for {' '.join(SUFFIXES)}")
    bands: list[tuple[Path, str | None]] = [(path, name) for path in paths if (name := band_name(path.stem))]
    stems = [(path, path.stem if len(paths) > 1 else None) for path in paths]
    return _Product(bands or stems, {**_named(paths[0].name), **_named(where.resolve().name)})


def _landsat(path: Path) -> _Product:
    """``*_MTL.txt`` of Collection 1 and 2, and older ones. Level 1 gets its scene's scale to reflectance."""
    values: dict[str, str] = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        key, equals, value = (part.strip() for part in line.partition("="))
        if equals and not key.endswith("GROUP"):
            values.setdefault(key, value.strip('"'))
    level = values.get("PROCESSING_LEVEL") or values.get("DATA_TYPE", "")
    sensor = find_sensor(f"landsat-{values.get('SPACECRAFT_ID', '')[-1:]}")
    if sensor is None or not level:
        raise GeoError(f"{path}: expected the metadata of a Landsat product: SPACECRAFT_ID, and PROCESSING_LEVEL or DATA_TYPE")
    beside = {each.stem.lower(): each for each in path.parent.iterdir() if each.suffix.lower() in SUFFIXES}
    files: list[tuple[Path, str | None]] = []
    stored, usual = {}, []
    for key, name in values.items():
        file = beside.get(Path(name).stem.lower())
        band = find_band(sensor.name, f"B{key.removeprefix('FILE_NAME_BAND_').removeprefix('ST_B')}")
        if not key.startswith("FILE_NAME_BAND_") or file is None or band is None:
            continue
        channel = band_name(file.stem)
        files.append((file, channel))
        if band.kind == "optical":
            if "pan" not in band.common:
                usual.append(channel)
            if level.startswith("L1"):
                with suppress(PreprocessError):  # metadata without numbers for this band: its unit stays "dn"
                    stored[channel] = landsat_scaling(values, sensor.name, channel)
    if not files:
        raise GeoError(f"{path}: none of the band files that it names lies beside it")
    time = values.get("DATE_ACQUIRED", "")
    if time and "SCENE_CENTER_TIME" in values:
        time += f"T{values['SCENE_CENTER_TIME'][:8]}"
    facts = {"sensor": sensor.name, "level": level[:2], "time": time, "nodata": 0.0, "units": "reflectance" if stored else "dn"}
    return _Product(files, facts, stored, tuple(usual))


def _sentinel2(path: Path) -> _Product:
    """`MTD_MSIL1C.xml` or `MTD_MSIL2A.xml` of a SAFE folder; of bands that are there at several resolutions, the finest."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise GeoError(f"{path}: torn, or no XML ({error})") from None

    def text(name: str) -> str:
        return next((element.text or "" for element in root.iter(name)), "")

    finest: dict[str, tuple[int, Path]] = {}
    for file in sorted(path.parent.glob("GRANULE/*/IMG_DATA/**/*")):
        name, metres = band_name(file.stem), re.search(r"_(\d+)m$", file.stem)
        if file.suffix.lower() in SUFFIXES and name.startswith("B"):
            found = (int(metres[1]) if metres else 0, file)
            finest[name] = min(finest.get(name, found), found)
    if not finest:
        raise GeoError(f"{path}: no band files below GRANULE/*/IMG_DATA")
    order = [band.name for band in SENTINEL_2.bands]
    facts = {
        "sensor": SENTINEL_2.name,
        "level": "L2A" if "L2A" in path.name else "L1C",
        "units": "dn",
        "nodata": 0.0,
        "baseline": text("PROCESSING_BASELINE"),
        "time": text("PRODUCT_START_TIME")[:19],
    }
    return _Product([(finest[name][1], name) for name in sorted(finest, key=order.index)], facts)


# -- scenes -----------------------------------------------------------------------------------------------------------------

FIELDS = ("channels", "sensor", "level", "units", "scale", "offset", "wavelengths", "nodata", "baseline", "time", "normalised")


def sidecar(folder: str | os.PathLike) -> dict[str, Any]:
    """What the ``bands.json`` of a folder says; nothing where there is none.

    Raises:
        GeoError: no JSON object, or a field that there is not.
    """
    path = Path(folder) / SIDECAR
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise GeoError(f"{path}: no JSON ({error})") from None
    unknown = sorted(set(said) - {*FIELDS, "files"}) if isinstance(said, dict) else []
    if unknown or not isinstance(said, dict):
        what = repr(unknown[0]) if unknown else f"a {type(said).__name__}"
        raise GeoError(f"{path}: {what}; expected an object with some of {', '.join((*FIELDS, 'files'))}")
    return said


@dataclass(frozen=True)
class _File:
    """One opened file and the bands of it that are read.

    Attributes:
        indexes: of its bands, from 1. positions: theirs in what is read.
        nodata: the stored value for "no measurement" in this file. masked: whether it has a mask of its own, or transparency.
    """

    path: Path
    dataset: Any
    indexes: tuple[int, ...]
    positions: tuple[int, ...]
    nodata: float | None
    masked: bool


class Scene:
    """The files of one place, opened; windows of it are read onto one grid.

    The grid is that of the finest band read, or has pixels of `resolution`. Coarser bands are brought to it bilinearly, finer ones
    by the average of what a pixel covers, from measured values only; whether a pixel was measured goes by the nearest one. Reading
    window by window gives the same pixels as reading all at once.

    Args:
        where: a GeoTIFF; a folder of per-band files, plain or of a Landsat or Sentinel-2 product; a product's metadata file
            (``*_MTL.txt``, ``MTD_MSI*.xml``); or a list of files.
        bands: names of the bands to read, in this order, by any of their names; None reads all (of Landsat, those of reflected
            light at their common resolution).
        resolution: side of a pixel, in units of the coordinate system; None for that of the finest band.
        **given: what is known of the data, and goes before what the files say: `channels` (names in the order of the bands of the
            file, or of the files), `sensor`, `level`, `units`, `scale`, `offset`, `wavelengths`, `nodata`, `baseline`, `time`,
            `normalised`; see `Bands`. ``units="dn"`` leaves out the scale to reflectance that a product or a tag gives.
    Attributes:
        about: the description of what `read` returns, `Bands` without values.
        height, width: of the grid, in pixels. transform: `affine.Affine` of the grid. dtype: of what `read` returns.
        block: rows of the grid that the files store together.
        files: paths, in the order in which they were found.
    Raises:
        GeoError: no raster there, torn, a band that is not there, or files that do not cover the same place.
        ImportError: rasterio is not installed.
    """

    def __init__(
        self,
        where: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        bands: Sequence[str] | None = None,
        resolution: float | None = None,
        **given: Any,
    ):
        if unknown := sorted(set(given) - set(FIELDS)):
            raise GeoError(f"unknown field {unknown[0]!r} of a description; expected {', '.join(FIELDS)}")
        if isinstance(where, str | os.PathLike):
            place = Path(where).expanduser()
            said = sidecar(place if place.is_dir() else place.parent)
            if not place.exists():
                raise GeoError(f"{place}: no such file or folder")
            listed = said.pop("files", None)
            product = _product(place)
            if listed and place.is_dir():
                product = _Product([(place / file, name) for name, file in listed.items()], product.facts)
        else:
            place, said = Path(where[0] if where else ""), {}
            product = _Product([(Path(path), band_name(Path(path).stem) or Path(path).stem) for path in where], {})
        if not product.files:
            raise GeoError("no file is named")
        self.files = [path for path, _ in product.files]
        self._opened = [(path, name, _open(path)) for path, name in product.files]
        try:
            self._describe(place, product, {**said, **given}, bands)
            self._lay(resolution)
        except Exception:
            self.close()
            raise

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for _, _, dataset in self._opened:
            dataset.close()

    def _describe(self, place: Path, product: _Product, said: dict[str, Any], wanted: Sequence[str] | None) -> None:
        """Name every band, choose those that are wanted, and put together what is known of them."""
        sensor = said.get("sensor", product.facts.get("sensor", ""))
        found = [
            (path, dataset, index, name)
            for path, given_name, dataset in self._opened
            for index, name in _bands_of(path, given_name, dataset, sensor)
        ]
        if names := said.pop("channels", None):
            names = [names] if isinstance(names, str) else list(names)
            if len(names) != len(found):
                raise GeoError(f"{place}: {len(found)} bands, but channels names {len(names)}: {', '.join(names)}")
            found = [(path, dataset, index, name) for (path, dataset, index, _), name in zip(found, names, strict=True)]
        if wanted is not None:
            chosen = [_find(place, name, sensor, [each[3] for each in found]) for name in wanted]
        else:
            usual = [number for number, each in enumerate(found) if each[3] in product.usual]
            chosen = usual or list(range(len(found)))
        if repeated := sorted({each[3] for each in found if [other[3] for other in found].count(each[3]) > 1}):
            raise GeoError(f"{place}: two bands are called {repeated[0]}; name the files, or say channels=")
        picked = [found[number] for number in chosen]
        facts = {**product.facts, **_tagged(picked), **said}
        if said.get("units") == "dn":
            facts = {**facts, "scale": said.get("scale", 1.0), "offset": said.get("offset", 0.0)}
        elif product.stored and said.get("units", "reflectance") == "reflectance" and not {"scale", "offset"} & set(said):
            if all(name in product.stored for *_, name in picked):
                facts["scale"] = [product.stored[name][0] for *_, name in picked]
                facts["offset"] = [product.stored[name][1] for *_, name in picked]
            else:  # thermal bands, and others that have no reflectance
                facts["units"] = "dn"
        for field_name in ("scale", "offset", "wavelengths"):  # one per band of the files
            value = facts.get(field_name)
            if field_name in said and isinstance(value, list | tuple) and len(value) == len(found) > 1:
                facts[field_name] = [value[number] for number in chosen]
        nodata = facts.pop("nodata", None)
        self.dtype = np.result_type(*(dataset.dtypes[index - 1] for _, dataset, index, _ in picked))
        self._of: list[_File] = []
        for path, _, dataset in self._opened:
            mine = [(index, position) for position, (_, other, index, _) in enumerate(picked) if other is dataset]
            if mine:
                indexes, positions = zip(*mine, strict=True)
                values = [dataset.nodatavals[index - 1] for index in indexes]
                alike = all(_same(value, values[0]) for value in values)  # a VRT may have one for each band
                own = said["nodata"] if "nodata" in said else values[0] if alike and values[0] is not None else nodata
                masked = "nodata" not in said and (not alike or _masked(dataset))
                self._of.append(_File(path, dataset, indexes, positions, own if alike or "nodata" in said else None, masked))
        if complex_ones := [dataset for _, dataset, index, _ in picked if "complex" in dataset.dtypes[index - 1]]:
            raise GeoError(f"{complex_ones[0].name}: holds complex numbers; write their magnitude or power, and read that")
        nodata = self._of[0].nodata
        if not all(_same(file.nodata, nodata) for file in self._of):
            nodata = None  # what marks a gap in one file is a measurement in another: the mask tells
        self.about = Bands(channels=tuple(name for *_, name in picked), nodata=_fitting(nodata, self.dtype), **facts)

    def _lay(self, resolution: float | None) -> None:
        """The grid, and whether every file lies on it."""
        finest = min(self._of, key=lambda file: _pixel(file.dataset)[1]).dataset
        self.transform, self.height, self.width = finest.transform, finest.height, finest.width
        if resolution:
            if finest.transform.b or finest.transform.d:
                raise GeoError(f"{self.files[0]}: lies at an angle to its coordinate system; leave resolution= out")
            factors = resolution / abs(finest.transform.e), resolution / abs(finest.transform.a)
            self.transform = moved(finest.transform, 0, 0, *factors)
            self.height, self.width = (max(1, round(side / f)) for side, f in zip(finest.shape, factors, strict=True))
        crs = next((file.dataset.crs for file in self._of if file.dataset.crs), None)
        for file in self._of:
            other = file.dataset
            if other.crs and other.crs != crs:
                first = f"{self._of[0].path.name} has {_short(crs)}"
                raise GeoError(f"{file.path}: {_short(other.crs)}, and {first}; the files of a scene share one")
            if not self._on_grid(file):
                pixel = max(_pixel(other)[1], _pixel(finest)[1])
                gap = max(abs(a - b) for a, b in zip(other.bounds, finest.bounds, strict=True))
                turned = other.transform.b or other.transform.d or other.transform.e * finest.transform.e < 0
                if turned or gap > pixel or other.transform.is_identity:
                    raise GeoError(
                        f"{file.path}: {other.width}x{other.height} pixels over {_box(other)}, and {Path(finest.name).name} has "
                        f"{finest.width}x{finest.height} over {_box(finest)}; the files of a scene cover the same place"
                    )
        rows = math.hypot(self.transform.b, self.transform.e)
        heights = (file.dataset.block_shapes[0][0] * _pixel(file.dataset)[0] / rows for file in self._of)
        self.block = max(1, round(max(heights)))
        placed = not self.transform.is_identity
        if not all(map(self._on_grid, self._of)):
            self.dtype = np.result_type(self.dtype, np.float32)
        self.about = replace(
            self.about,
            resolution=self._metres(crs) if placed and crs is not None and crs.is_projected else self.about.resolution,
            crs=crs.to_wkt() if crs else "",
            transform=tuple(self.transform)[:6] if placed else (),
        )

    def _metres(self, crs: Any) -> float:
        """Width of a pixel, also where the coordinate system counts in feet."""
        return math.hypot(self.transform.a, self.transform.d) * crs.linear_units_factor[1]

    def _on_grid(self, file: _File) -> bool:
        """Whether its pixels are the grid's, within a hundredth of one."""
        shape, ours, theirs = (self.height, self.width), self.transform, file.dataset.transform
        corners = [tuple(moved(each, *at))[2:6:3] for at in ((0, 0), shape) for each in (ours, theirs)]
        gaps = (abs(a - b) for pair in zip(corners[::2], corners[1::2], strict=True) for a, b in zip(*pair, strict=True))
        return shape == file.dataset.shape and max(gaps) <= 0.01 * math.hypot(ours.a, ours.d)

    def read(self, window: tuple[int, int, int, int] | None = None) -> Bands:
        """A part of the scene.

        Args:
            window: top, left, height and width in pixels of the grid; it may reach beyond the scene, where nothing was measured.
        Returns:
            Stored values (C, height, width). Cells that were not measured hold `nodata`; where there is no such value, `mask` tells
            them. The dtype is the file's; float where bands were brought to another resolution.
        Raises:
            GeoError: a file is torn there.
        """
        whole = Window(0, 0, self.height, self.width)
        window = Window(*window) if window is not None else whole
        if window.height < 1 or window.width < 1:
            raise GeoError(f"{self.files[0]}: a window of {window.height}x{window.width} pixels; expected at least 1x1")
        inside = _intersect(window, whole)
        parts = [(file, *self._part(file, inside)) for file in self._of]
        transform = tuple(moved(self.transform, window.top, window.left))[:6]
        about = replace(self.about, transform=transform if self.about.transform else ())
        if len(parts) == 1 and inside == window and parts[0][2] is None:
            return replace(about, values=parts[0][1].astype(self.dtype, copy=False))
        shape = (len(about.channels), window.height, window.width)
        values = np.full(shape, 0 if about.nodata is None else about.nodata, self.dtype)
        valid = np.zeros(shape, bool) if about.nodata is None else None
        rows = slice(inside.top - window.top, inside.top - window.top + inside.height)
        columns = slice(inside.left - window.left, inside.left - window.left + inside.width)
        for file, pixels, measured in parts:
            positions = list(file.positions)
            if valid is not None:
                valid[positions, rows, columns] = True if measured is None else measured
            elif measured is not None:
                pixels = np.where(measured, pixels, np.asarray(about.nodata, self.dtype))
            values[positions, rows, columns] = pixels
        return replace(about, values=values, mask=None if valid is None or valid.all() else valid)

    def _part(self, file: _File, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        """The bands of one file in a window of the grid: values, and where they were measured (None: see `nodata`)."""
        if window.height < 1 or window.width < 1:
            return np.zeros((len(file.indexes), max(0, window.height), max(0, window.width)), self.dtype), None
        if self._on_grid(file):
            values, measured = _pixels(file, window)
            # told by the common value already, where the file has no other one
            known = measured is None or (not file.masked and _same(file.nodata, self.about.nodata))
            return values, None if known else measured
        ours, theirs = self.transform, file.dataset.transform
        rows = (ours.f + ours.e * (window.top + 0.5 + np.arange(window.height)) - theirs.f) / theirs.e
        columns = (ours.c + ours.a * (window.left + 0.5 + np.arange(window.width)) - theirs.c) / theirs.a
        steps = abs(ours.e / theirs.e), abs(ours.a / theirs.a)
        top, below = (int(at) for at in (rows[0] - steps[0] / 2 - 1, rows[-1] + steps[0] / 2 + 2))
        left, right = (int(at) for at in (columns[0] - steps[1] / 2 - 1, columns[-1] + steps[1] / 2 + 2))
        near = _intersect(Window(top, left, below - top, right - left), Window(0, 0, file.dataset.height, file.dataset.width))
        values, measured = _pixels(file, near)
        rows, columns = rows - near.top, columns - near.left
        wide = np.result_type(values.dtype, np.float32)
        if measured is None:
            return _resampled(values.astype(wide), rows, columns, steps), None
        sums = _resampled(np.where(measured, values, 0).astype(wide), rows, columns, steps)
        shares = _resampled(measured.astype(wide), rows, columns, steps)
        nearest = np.ix_(np.arange(len(values)), _nearest(rows, near.height), _nearest(columns, near.width))
        return np.divide(sums, shares, out=np.zeros_like(sums), where=shares > 0), measured[nearest]


def read(
    where: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    window: tuple[int, int, int, int] | None = None,
    bands: Sequence[str] | None = None,
    resolution: float | None = None,
    **given: Any,
) -> Bands:
    """Read a raster, or a part of it, once; see `Scene`, which stays open for further windows.

    Args:
        window: see `Scene.read`. The rest: see `Scene`.
    """
    with Scene(where, bands=bands, resolution=resolution, **given) as scene:
        return scene.read(window)


class Alike:
    """Reads whole files that are alike, such as the patches of a data set: fast, since only the first is asked what it is.

    Where a file lies on the earth is not read.

    Args:
        first: a file; the others have as many bands, which mean the same.
        **given: see `Scene`.
    """

    def __init__(self, first: Path, **given: Any):
        self.given = given
        with Scene(first, **given) as scene:
            (file,) = scene._of
            self.about = replace(scene.about, crs="", transform=(), time="")
            self.indexes, self.count, self.dtype = list(file.indexes), file.dataset.count, scene.dtype
            self.plain = not file.masked and file.dataset.driver == "GTiff" and _same(file.nodata, self.about.nodata)
            self.said = _says(file.dataset)

    def __call__(self, path: Path) -> Bands:
        """The bands of one file.

        Raises:
            GeoError: torn, or not like the first one.
        """
        if not self.plain:
            return replace(read(path, **self.given), crs="", transform=(), time="")
        rasterio = _rasterio()
        try:
            # neither the folder nor the coordinate system is looked at, which takes longer than reading a small file
            with (
                rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"),
                rasterio.open(path, driver="GTiff", GEOREF_SOURCES="NONE") as dataset,
            ):
                count, said, masked = dataset.count, _says(dataset), _masked(dataset)
                values = dataset.read(self.indexes if count == self.count else None)
        except rasterio.errors.RasterioError as error:
            raise GeoError(f"{path}: torn, or no raster ({_line(error)})") from None
        if count != self.count or values.dtype != self.dtype:
            raise GeoError(
                f"{path}: {count} bands of {values.dtype}, and the first file has {self.count} of {self.dtype}; the files of a "
                "folder are read alike"
            )
        if said != self.said:
            what = next(name for name in said if said[name] != self.said[name])
            raise GeoError(
                f"{path}: {what} {said[what]}, and the first file has {self.said[what]}; the files of a folder are read alike"
            )
        if masked or path.with_name(f"{path.name}.msk").exists():
            return replace(read(path, **self.given), crs="", transform=(), time="")
        return replace(self.about, values=values)


def cache(size: int) -> Any:
    """A context in which GDAL keeps at most `size` bytes of decoded blocks; it believes the first that says so in a process."""
    return _rasterio().Env(GDAL_CACHEMAX=size)


def create(path: Path, **profile: Any) -> Any:
    """A GeoTIFF to write to, as `rasterio.open` makes it."""
    return _rasterio().open(path, "w", driver="GTiff", **profile)


def window(part: Window) -> Any:
    """As rasterio writes it."""
    return _rasterio().windows.Window(part.left, part.top, part.width, part.height)


@functools.cache
def _rasterio():
    try:
        import rasterio
    except ImportError:
        raise ImportError("reading GeoTIFF needs the package rasterio: pip install okavango[geo]") from None
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)  # said by the description
    return rasterio


def _open(path: Path) -> Any:
    rasterio = _rasterio()
    try:
        return rasterio.open(path)
    except rasterio.errors.RasterioError as error:
        if not path.exists():
            raise GeoError(f"{path}: no such file") from None
        raise GeoError(f"{path}: torn, or no raster ({_line(error)})") from None


def _pixel(dataset: Any) -> tuple[float, float]:
    """Height and width of a pixel along its own sides, which may lie at an angle to the coordinate system."""
    a, b, _, d, e, _ = tuple(dataset.transform)[:6]
    return math.hypot(b, e), math.hypot(a, d)


def _masked(dataset: Any) -> bool:
    """Whether it has a mask of its own, inside or beside the file, or transparency."""
    return any("per_dataset" in _names(flags) for flags in dataset.mask_flag_enums)


def _says(dataset: Any) -> dict[str, Any]:
    """What files that are read alike must agree in."""
    return {
        "nodata": str(dataset.nodata),
        "names of bands": dataset.descriptions,
        "scales": dataset.scales,
        "offsets": dataset.offsets,
    }


def _bands_of(path: Path, name: str | None, dataset: Any, sensor: str) -> list[tuple[int, str]]:
    """Index and name of the bands of a file, without transparency. A band that nothing names is called by its number."""
    colours = [each.name for each in dataset.colorinterp]
    indexes = [index for index, colour in enumerate(colours, 1) if colour != "alpha"]
    if name is not None:
        if len(indexes) > 1:
            raise GeoError(f"{path}: {len(indexes)} bands; each file of a scene's folder holds one. Name the file to read it alone")
        text = dataset.descriptions[indexes[0] - 1]
        return [(indexes[0], text if text and find_band(sensor, text) else name)]
    texts = [dataset.descriptions[index - 1] for index in indexes]
    if all(texts):
        return list(zip(indexes, texts, strict=True))
    if {colours[index - 1] for index in indexes} <= {"red", "green", "blue"}:
        return [(index, colours[index - 1]) for index in indexes]
    if len(indexes) == 1 and band_name(path.stem):
        return [(indexes[0], band_name(path.stem))]
    if colours == ["palette"]:
        return [(1, "palette")]  # numbers of colours or classes, no measurement
    return [(index, str(index)) for index in indexes]


def _find(place: Path, name: str, sensor: str, names: Sequence[str]) -> int:
    """The number of the band that is meant by a name."""
    if name in names:
        return names.index(name)
    wanted = find_band(sensor, name)
    if wanted:
        for number, each in enumerate(names):
            band = find_band(sensor, each)
            if band and band.name == wanted.name:
                return number
    hint = "; its bands have no names, say channels= or write a bands.json" if all(each.isdigit() for each in names) else ""
    raise GeoError(f"{place}: has no band {name!r}; it has {', '.join(names)}{hint}")


def _tagged(picked: Sequence[tuple[Path, Any, int, str]]) -> dict[str, Any]:
    """What the tags of the bands say beyond their names."""
    scales = [dataset.scales[index - 1] for _, dataset, index, _ in picked]
    offsets = [dataset.offsets[index - 1] for _, dataset, index, _ in picked]
    units = {(dataset.units[index - 1] or "").lower() for _, dataset, index, _ in picked}
    said: dict[str, Any] = {}
    if any(scale != 1 for scale in scales) or any(offset != 0 for offset in offsets):
        said = {"scale": scales, "offset": offsets}
    if len(units) == 1 and (unit := units.pop()) in UNITS:
        said["units"] = unit
    elif {name for *_, name in picked} == {"red", "green", "blue"} and {d.dtypes[i - 1] for _, d, i, _ in picked} == {"uint8"}:
        said["units"] = "u8"  # the colours of a picture
    return said


def _pixels(file: _File, part: Window) -> tuple[np.ndarray, np.ndarray | None]:
    """Stored values of a window inside the file, and where they were measured; None: everywhere."""
    rasterio = _rasterio()
    where = window(part)
    try:
        values = file.dataset.read(list(file.indexes), window=where)
        masks = file.dataset.read_masks(list(file.indexes), window=where) > 0 if file.masked else None
    except rasterio.errors.RasterioError as error:
        rows, columns = f"{part.top}..{part.top + part.height - 1}", f"{part.left}..{part.left + part.width - 1}"
        raise GeoError(f"{file.path}: torn, cannot be read at rows {rows}, columns {columns} ({_line(error)})") from None
    measured = masks
    if file.nodata is not None and file.nodata == file.nodata:
        measured = values != file.nodata if measured is None else measured & (values != file.nodata)
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        measured = finite if measured is None else measured & finite
    return values, None if measured is None or measured.all() else measured


def _resampled(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, steps: tuple[float, float]) -> np.ndarray:
    """(C, H, W) -> (C, rows, columns): bilinear at these places, or the average over `steps` pixels around them where steps > 1."""
    return _along(_along(values, rows, steps[0], 1), columns, steps[1], 2)


def _along(values: np.ndarray, centres: np.ndarray, step: float, axis: int) -> np.ndarray:
    shape = [1, 1, 1]
    shape[axis] = len(centres)
    count = values.shape[axis]

    def between(array: np.ndarray, at: np.ndarray) -> np.ndarray:
        """`array` at fractional indices, linear."""
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, array.shape[axis] - 1)
        share = (at - low).reshape(shape).astype(array.dtype)
        return array.take(low, axis) * (1 - share) + array.take(high, axis) * share

    if step <= 1 + 1e-6:
        return between(values, np.clip(centres - 0.5, 0, count - 1))  # the centre of pixel i is at i + 0.5
    start = np.zeros_like(values.take([0], axis), np.float64)
    sums = np.concatenate([start, values.cumsum(axis, dtype=np.float64)], axis)
    ends = [np.clip(centres + side * step / 2, 0, count) for side in (-1, 1)]
    widths = (ends[1] - ends[0]).reshape(shape)
    return ((between(sums, ends[1]) - between(sums, ends[0])) / widths).astype(values.dtype)


def _nearest(centres: np.ndarray, count: int) -> np.ndarray:
    return np.clip(np.floor(centres + 1e-6).astype(int), 0, count - 1)


def _intersect(first: Window, second: Window) -> Window:
    top, left = max(first.top, second.top), max(first.left, second.left)
    below = min(first.top + first.height, second.top + second.height)
    right = min(first.left + first.width, second.left + second.width)
    return Window(top, left, max(0, below - top), max(0, right - left))


def _fitting(nodata: float | None, dtype: np.dtype) -> float | None:
    """The value, or None where an array of that dtype cannot hold it."""
    if nodata is None or dtype.kind == "f":
        return nodata
    return nodata if nodata == nodata and np.iinfo(dtype).min <= nodata <= np.iinfo(dtype).max and nodata % 1 == 0 else None


def _same(first: float | None, second: float | None) -> bool:
    return first == second or (first is not None and second is not None and first != first and second != second)


def _names(flags: Sequence[Any]) -> list[str]:
    return [flag.name for flag in flags]


def _line(error: Exception) -> str:
    return (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0][:200]


def _short(crs: Any) -> str:
    return crs.to_string()[:60] if crs else "no coordinate system"


def _box(dataset: Any) -> str:
    return "{:.6g}..{:.6g}, {:.6g}..{:.6g}".format(*(dataset.bounds[i] for i in (0, 2, 1, 3)))
