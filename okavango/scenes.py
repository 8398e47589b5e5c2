"""Whole scenes: a vector or a class for every tile, as a GeoTIFF that lies where the scene lies and whose pixel is a tile.

Memory holds a strip of the scene and one batch at a time. What is done lies beside the output, in OUT.partial, strip by strip, and
counts when it is whole; a run that was killed goes on by the same command and writes the same file, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from okavango.data import geotiff
from okavango.data.geotiff import Scene
from okavango.data.tiles import Tiles, Window
from okavango.downstream.classification.features import evaluating, image_modality
from okavango.downstream.classification.head import Classifier
from okavango.files import write_json, write_whole
from okavango.models.backbone import Backbone
from okavango.models.features import Subnet, to_device
from okavango.models.preprocess import ArraySpec, Raster
from okavango.models.raster import Bands, plan
from okavango.pretrain.state import run_lock
from okavango.zoo.checkpoint import file_sha256

FORMAT_VERSION = 1
SEGMENT = 2**26  # bytes of stored values that are read at a time
CACHE = 2**28  # bytes of decoded blocks that GDAL keeps
SAMPLE = 2000  # tiles that principal components are fitted on
TOGETHER = 16  # rows of tiles that are begun anew after a kill, at most
BLOCK = 256  # side of the output's blocks, in pixels; less for small maps

Describe = Callable[[list[Bands]], np.ndarray]  # tiles -> float32 (B, D)
Cutter = Callable[[range, range], Iterator[tuple[int, int, Bands]]]  # rows and columns -> tiles with theirs
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cut:
    """How a scene is cut.

    Attributes:
        tile: side of a tile in pixels of the scene, 0 for the checkpoint's input size.
        overlap: pixels that neighbouring tiles share.
        measured: least share of measured pixels, over all bands, that a tile must have; others become nodata.
    """

    tile: int = 0
    overlap: int = 0
    measured: float = 0.5

    def __post_init__(self):
        if not 0 <= self.measured <= 1:
            raise ValueError(f"measured {self.measured}: expected a share, 0..1")


def embed_scene(
    model: Backbone,
    where: str | os.PathLike,
    out: str | os.PathLike,
    *,
    subnet: Subnet | None = None,
    cut: Cut = Cut(),  # noqa: B008 (frozen)
    components: int = 0,
    half: bool = False,
    batch: int = 64,
    allow: Mapping[str, str] | None = None,
    say: Say = print,
) -> Path:
    """Write `Features.pooled` of every tile: a float32 band per number, NaN where too little was measured.

    Args:
        model: run where it is, in eval mode.
        where: see `okavango.data.geotiff.Scene`. out: file that ends in .tif; it appears when it is complete.
        components: keep so many principal components, fitted on tiles spread evenly over the scene; 0 keeps all numbers.
        half: store 16 bits a number.
        batch: tiles per forward pass; numbers depend on it by rounding, so a run goes on with the same one only.
        allow: see `okavango.models.raster.plan`.
    Raises:
        ValueError: the scene cannot be read or does not fit the checkpoint, or OUT.partial holds another run.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modality = image_modality(model.preprocess)

    def describe(samples: list[Bands]) -> np.ndarray:
        inputs = to_device(model.preprocess(allow=allow, **{modality: samples}), device)
        with evaluating(model), torch.inference_mode():
            pooled = model(inputs, subnet=subnet).pooled
        if pooled is None:
            raise ValueError(f"{type(model).__name__} has no pooled features; choose a backbone that pools, or wrap it")
        return pooled.float().cpu().numpy()

    name = "component" if components else "feature"
    kind = _Kind("embedding", describe, names=lambda count: [f"{name} {number}" for number in range(count)], half=half)
    made = {"subnet": str(subnet or ""), "components": components}
    return _write_map(model, modality, where, Path(out), kind, made, cut, batch, allow, say)


def classify_scene(
    model: Classifier,
    where: str | os.PathLike,
    out: str | os.PathLike,
    *,
    cut: Cut = Cut(),  # noqa: B008 (frozen)
    batch: int = 64,
    allow: Mapping[str, str] | None = None,
    say: Say = print,
) -> Path:
    """Write the most probable class of every tile: one band of class numbers, whose tags name the classes; otherwise as above.

    8 bits, 255 where too little was measured; 16 bits and 65535 for more than 255 classes.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def describe(samples: list[Bands]) -> np.ndarray:
        inputs = to_device(model.preprocess(allow=allow, **{model.modality: samples}), device)
        return model.predict(inputs).argmax(1, keepdim=True).float().cpu().numpy()

    dtype = "uint8" if len(model.classes) <= 255 else "uint16"
    tags = {f"class_{number}": name for number, name in enumerate(model.classes)}
    kind = _Kind("classes", describe, dtype, float(np.iinfo(dtype).max), lambda _: ["class"], tags)
    return _write_map(model, model.modality, where, Path(out), kind, {}, cut, batch, allow, say)


@dataclass(frozen=True)
class _Kind:
    """What a map holds: how tiles become numbers, and how these are stored."""

    what: str
    describe: Describe
    dtype: str = "float32"
    nodata: float = float("nan")
    names: Callable[[int], list[str]] = lambda count: [""] * count  # of the bands
    tags: Mapping[str, str] = field(default_factory=dict)
    half: bool = False


def _write_map(
    model: Backbone | Classifier,
    modality: str,
    where: str | os.PathLike,
    out: Path,
    kind: _Kind,
    made: dict[str, Any],
    cut: Cut,
    batch: int,
    allow: Mapping[str, str] | None,
    say: Say,
) -> Path:
    if out.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"--out {out}: expected a name that ends in .tif")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
    spec, folder = model.preprocess.array(modality), out.with_name(f"{out.name}.partial")
    with geotiff.cache(CACHE), Scene(where, bands=_needed(spec, where, allow, say)) as scene, run_lock(folder):
        tiles = Tiles(scene.height, scene.width, cut.tile or min(spec.size), cut.overlap)
        made = {
            "format_version": FORMAT_VERSION,
            "what": kind.what,
            "tile": tiles.size,
            "overlap": tiles.overlap,
            "measured": cut.measured,
            "batch": batch,
            "half": kind.half,
            **made,
            "allow": dict(allow or {}),
            "description": repr(scene.about.describe()),
            "preprocess": model.preprocess.to_json(),
            "weights": _digest(model),
            "scene": {path.name: file_sha256(path) for path in scene.files},
        }
        _claim(folder, made)
        cutter, describe = partial(_cut, scene, tiles, measured=cut.measured), kind.describe
        if made.get("components"):
            describe = _projected(describe, made["components"], cutter, tiles, batch, folder / "components.npz")
        strips = {folder / f"strip-{rows.start:06d}.npy": rows for rows in _strips(scene, tiles)}
        left = {path: rows for path, rows in strips.items() if not path.exists()}
        done, began = len(strips) - len(left), time.monotonic()
        say(f"{tiles.rows} x {tiles.columns} tiles of {tiles.size} pixels; {done} of {len(strips)} strips are done")
        said = began
        for number, (path, rows) in enumerate(left.items(), 1):
            values = _described(cutter, rows, range(tiles.columns), describe, batch)
            write_whole(path, partial(np.save, arr=values))
            if (now := time.monotonic()) - said > 10:
                rest = (now - began) / number * (len(left) - number)
                say(f"{done + number} of {len(strips)} strips are done, {rest:.0f} s left")
                said = now
        _assemble(list(strips), tiles, scene, kind, made, folder / "map.tif")
        (folder / "map.tif").replace(out)
        shutil.rmtree(folder)
    say(f"the map is {out}")
    return out


def _needed(spec: ArraySpec, where: str | os.PathLike, allow: Mapping[str, str] | None, say: Say) -> list[str] | None:
    """The bands of a scene that a checkpoint takes, None for all; says what is done to them.

    Raises:
        PreprocessError: they do not fit.
    """
    if not isinstance(spec, Raster):
        return None
    with Scene(where) as scene:
        made = plan(spec, scene.about, allow=allow or {})
        say(str(made))
        indices = next(dict(step.arguments)["indices"] for step in made.steps if step.op == "select")
        return [scene.about.channels[index] for index in sorted({index for index in indices if index is not None})]


def _digest(model: Backbone | Classifier) -> str:
    """Of all weights by name."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def _claim(folder: Path, made: dict[str, Any]) -> None:
    """Begin a run, or find that it is the same one; one that made nothing is forgotten."""
    manifest = folder / "manifest.json"
    if not any(folder.glob("strip-*.npy")):
        (folder / "components.npz").unlink(missing_ok=True)
        write_json(manifest, made)
    found = json.loads(manifest.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(made))
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            short = isinstance(wanted.get(name), str | int | float) and name != "weights"
            what = f"{name} {found.get(name)!r}, now {wanted.get(name)!r}" if short else f"another {name}"
            raise ValueError(
                f"{folder}: holds a part of a run with {what}; repeat that command, delete the folder or choose another --out"
            )


def _strips(scene: Scene, tiles: Tiles) -> list[range]:
    """Rows of tiles that are read together: as many as a row of the file's blocks holds."""
    together = max(1, min(scene.block // tiles.stride, TOGETHER))
    return [range(row, min(row + together, tiles.rows)) for row in range(0, tiles.rows, together)]


def _described(cutter: Cutter, rows: range, columns: range, describe: Describe, batch: int) -> np.ndarray:
    """What is made of some tiles: float32 (D, rows, columns), NaN for those left out; D is 0 where all are."""
    places: list[tuple[int, int]] = []
    found: list[np.ndarray] = []
    for kept in _batched(cutter(rows, columns), batch):
        places += [(row - rows.start, column - columns.start) for row, column, _ in kept]
        found.append(describe([tile for _, _, tile in kept]))
    values = np.full((found[0].shape[1] if found else 0, len(rows), len(columns)), np.nan, np.float32)
    if found:
        at_rows, at_columns = zip(*places, strict=True)
        values[:, at_rows, at_columns] = np.concatenate(found).T
    return values


def _cut(scene: Scene, tiles: Tiles, rows: range, columns: range, *, measured: float) -> Iterator[tuple[int, int, Bands]]:
    """(row, column, tile) of those that are measured well enough, read in pieces of bounded size."""
    height = (len(rows) - 1) * tiles.stride + tiles.size
    together = max(1, SEGMENT // (height * tiles.stride * len(scene.about.channels) * scene.dtype.itemsize))
    for first in range(columns.start, columns.stop, together):
        some = range(first, min(first + together, columns.stop))
        width = (len(some) - 1) * tiles.stride + tiles.size
        piece = scene.read(Window(rows.start * tiles.stride, first * tiles.stride, height, width))
        values, mask = np.asarray(piece.values), piece.mask
        for row in rows:
            for column in some:
                top, left = (row - rows.start) * tiles.stride, (column - first) * tiles.stride
                where = (slice(None), slice(top, top + tiles.size), slice(left, left + tiles.size))
                tile = replace(piece, values=values[where], mask=None if mask is None else mask[where])
                if _share(tile) >= measured:
                    yield row, column, tile


def _share(tile: Bands) -> float:
    """Share of measured values."""
    values, share = np.asarray(tile.values), 1.0
    if tile.mask is not None:
        share = float(np.mean(tile.mask))
    if tile.nodata is not None or values.dtype.kind == "f":
        share = min(share, float(np.mean((values != tile.nodata) & np.isfinite(values))))
    return share


def _batched(items: Iterable[Any], size: int) -> Iterator[list]:
    iterator = iter(items)
    while together := list(islice(iterator, size)):
        yield together


def _projected(describe: Describe, count: int, cutter: Cutter, tiles: Tiles, batch: int, file: Path) -> Describe:
    """`describe`, followed by the projection on principal components of tiles that are spread evenly over the scene."""
    if not file.exists():
        chosen = np.unique(np.linspace(0, tiles.rows * tiles.columns - 1, SAMPLE).round().astype(int))
        places = (divmod(int(number), tiles.columns) for number in chosen)
        kept = (tile for row, column in places for *_, tile in cutter(range(row, row + 1), range(column, column + 1)))
        found = [describe(some) for some in _batched(kept, batch)]
        vectors = np.concatenate(found).astype(np.float64) if found else np.empty((0, 0))
        if count > min(vectors.shape):
            raise ValueError(f"{count} components of {len(vectors)} tiles with {vectors.shape[1]} numbers each; ask for fewer")
        mean = vectors.mean(0)
        axes = np.linalg.eigh(np.atleast_2d(np.cov(vectors.T)))[1][:, ::-1][:, :count]
        axes *= np.sign(axes[np.abs(axes).argmax(0), range(count)])  # so that the signs are not arbitrary
        write_whole(file, lambda handle: np.savez(handle, mean=mean, axes=axes))
    with np.load(file) as saved:
        mean, axes = saved["mean"], saved["axes"]
    return lambda samples: ((describe(samples) - mean) @ axes).astype(np.float32)


def _assemble(paths: Sequence[Path], tiles: Tiles, scene: Scene, kind: _Kind, made: dict[str, Any], out: Path) -> None:
    """The strips as one tiled and compressed GeoTIFF; equal strips give equal bytes.

    Raises:
        ValueError: all tiles were left out; the strips are removed, so that another `measured` can be tried.
    """
    strips = [np.load(path, mmap_mode="r") for path in paths]
    count = max(len(strip) for strip in strips)
    if not count:
        shutil.rmtree(out.parent)
        raise ValueError(f"no tile has a share of {made['measured']} of its pixels measured; lower --measured")
    side = min(BLOCK, -(-max(tiles.rows, tiles.columns) // 16) * 16)
    placed = bool(scene.about.crs or scene.about.transform)
    profile: dict[str, Any] = {
        "width": tiles.columns,
        "height": tiles.rows,
        "count": count,
        "dtype": kind.dtype,
        "nodata": kind.nodata,
        "crs": scene.about.crs or None,
        "transform": tiles.transform(scene.transform) if placed else None,
        "tiled": True,
        "blockxsize": side,
        "blockysize": side,
        "interleave": "band",
        "compress": "deflate",
        "predictor": 3 if kind.dtype == "float32" else 2,
        "bigtiff": "if_safer",
    }
    if kind.half:
        profile["nbits"] = 16
    with geotiff.create(out, **profile) as dataset:
        for index, name in enumerate(kind.names(count), 1):
            dataset.set_band_description(index, name)
        dataset.update_tags(okavango=json.dumps({name: value for name, value in made.items() if name != "preprocess"}))
        dataset.update_tags(1, **kind.tags)
        for top in range(0, tiles.rows, side):
            part = geotiff.window(Window(top, 0, min(side, tiles.rows - top), tiles.columns))
            for first in range(0, count, 64):
                bands = slice(first, min(first + 64, count))
                values = _rows(strips, bands, top, part.height, tiles.columns)
                values = np.where(np.isnan(values), kind.nodata, values).astype(kind.dtype)
                dataset.write(values, indexes=range(bands.start + 1, bands.stop + 1), window=part)


def _rows(strips: Sequence[np.ndarray], bands: slice, top: int, height: int, width: int) -> np.ndarray:
    """Some rows of some bands, out of the strips that hold them."""
    values = np.full((bands.stop - bands.start, height, width), np.nan, np.float32)
    begin = 0
    for strip in strips:
        first, last = max(top, begin), min(top + height, begin + strip.shape[1])
        if first < last and len(strip):
            values[:, first - top : last - top] = strip[bands, first - begin : last - begin]
        begin += strip.shape[1]
    return values
