"""Where samples come from: folders, WebDataset shards, arrays, Hugging Face datasets. Map-style, picklable, never shuffled.

A source answers `source[i]` with ``{"image": uint8 (C, H, W), "label": int, "id": str}``; of GeoTIFF patches, the image is `Bands`.
What cannot be read raises `BadSample`, so that a loader can replace and count it.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from okavango.data.geotiff import Alike, GeoError, sidecar
from okavango.models.raster import Bands

try:  # deprecated since torchvision 0.29 and to be removed; up to twice as fast as PIL, which does all of it otherwise
    from torchvision.io import ImageReadMode, decode_image

    warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision", module="torchvision")
except ImportError:
    decode_image = None

SCANS = (".nii", ".nii.gz")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")


class BadSample(ValueError):
    """A sample that cannot be read.

    Attributes:
        id: the sample's id in its source.
        reason: what is wrong with it, one line.
    """

    def __init__(self, id: str, reason: str):
        super().__init__(id, reason)
        self.id, self.reason = id, reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class Source(Protocol):
    """A numbered collection of samples.

    Attributes:
        name: short name for logs and records.
        classes: class names in the order of the label numbers; empty when unlabelled.
        labels: int64 (N,), or None when unlabelled.
        digest: sha256 of the manifest (ids, sizes, labels); file times and places do not enter.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray | None

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample ``{"image": uint8 (C, H, W) of 1 or 3 channels, "id": str}``, with "label": int where it is known. Of rasters,
        the image is `okavango.models.raster.Bands`.

        Raises:
            BadSample: the sample cannot be read.
        """
        ...


def open_source(spec: str | os.PathLike | Source, *, max_side: int | None = None) -> Source:
    """Open a collection of pictures by looking at what is there.

    Args:
        spec: a source (returned as it is), a `datasets.Dataset`, or a place: a folder of pictures, flat or with a folder per
            class; the same of GeoTIFF patches (see `Patches`); a folder, pattern (``"train-{000..127}.tar"``, ``"*.tar"``) or file
            of WebDataset shards; a folder written by `datasets.save_to_disk`; a folder of NIfTI studies, or a table of them,
            ``studies.csv`` or ``studies.csv:SPLIT`` (see `okavango.data.studies.Studies`); ``samples/fashion`` or
            ``samples/fashion:test`` for a sample that ships with the package; ``NAME:REST`` for a source that another package
            offers by the entry point ``okavango.data``.
        max_side: pictures with a longer side are shrunk to it while they are decoded (sources that read files only).
    Raises:
        ValueError: nothing there, or nothing that can be read; the message says what was expected.
    """
    if not isinstance(spec, str | os.PathLike):
        if hasattr(spec, "classes") and hasattr(spec, "digest"):
            return spec
        return HuggingFace(spec, max_side=max_side)
    text = os.fspath(spec)
    if text.startswith("samples/"):
        return _shipped(text)
    plugin, colon, rest = text.partition(":")
    for point in entry_points(group="okavango.data", name=plugin) if colon else ():
        return point.load()(rest)
    if "://" in text:
        raise ValueError(f"data {text!r}: only local data is read; download it first and name the folder or the .tar files")
    path = Path(text).expanduser()
    table, _, split = text.partition(".csv:")
    if path.suffix == ".csv" or split or _holds_scans(path):
        make = importlib.import_module("okavango.data.studies").Studies
        return make(f"{table}.csv", split=split) if split else make(path)
    if path.suffix == ".tar" or (not path.exists() and re.search(r"[*?\[{]", text)):
        return Shards(text, max_side=max_side)
    if path.is_file():
        raise ValueError(f"data {text!r} is a file; expected a folder of pictures, .tar shards or a saved `datasets` folder")
    if not path.is_dir():
        raise ValueError(f"data {text!r}: no such folder; expected a folder of pictures, .tar shards or samples/fashion")
    names = set(os.listdir(path))
    if "dataset_dict.json" in names:
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"data {text!r} holds several splits; name one of them: " + ", ".join(str(path / s) for s in splits))
    if {"dataset_info.json", "state.json"} <= names:
        return HuggingFace(path, max_side=max_side)
    if any(name.endswith(".tar") for name in names):
        return Shards(path, max_side=max_side)
    folder = ImageFolder(path, max_side=max_side)
    return Patches(folder) if sidecar(path) or sidecar(path.resolve().parent) or not _is_picture(path / folder.ids[0]) else folder


def _holds_scans(path: Path) -> bool:
    """Whether the first file below a folder that is a picture or a scan is a scan."""
    for _, subfolders, files in os.walk(path, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(name.lower() for name in files if not name.startswith(".")):
            if name.endswith(SCANS + EXTENSIONS):
                return name.endswith(SCANS)
    return False


def _shipped(text: str) -> Source:
    name, _, split = text.removeprefix("samples/").partition(":")
    try:
        make = getattr(importlib.import_module(f"okavango.samples.{name}"), name)
    except (ImportError, AttributeError):
        raise ValueError(
            f"no sample {text!r} ships; there are samples/fashion, samples/places and samples/brain (or :test)"
        ) from None
    return make(split) if split else make()


class _Manifest:
    """Ids, labels and digest, the part that all sources share."""

    name: str
    ids: Sequence[str]
    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} samples, {len(self.classes)} classes)"

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {self.name!r}, which has {len(self)}")
        index %= len(self)
        sample = {"image": self._image(index), "id": self.ids[index]}
        return sample if self.labels is None else {**sample, "label": int(self.labels[index])}

    @cached_property
    def digest(self) -> str:
        hasher = hashlib.sha256()
        labels: Iterable = itertools.repeat("") if self.labels is None else self.labels
        for id, size, label in zip(self.ids, self._sizes(), labels, strict=False):
            hasher.update(f"{id}\t{size}\t{label}\n".encode("utf-8", "surrogateescape"))
        return hasher.hexdigest()

    def _image(self, index: int) -> Tensor | Bands:
        raise NotImplementedError

    def _sizes(self) -> Iterable[object]:
        """Per sample, something that changes when its content does."""
        raise NotImplementedError


class ImageFolder(_Manifest):
    """All pictures below a folder, sorted by path. When each lies in a sub-folder, the first one names its class.

    Args:
        root: the folder. Hidden files and folders are left out.
        max_side: see `open_source`.
    Raises:
        ValueError: the folder holds no picture.
    """

    def __init__(self, root: str | os.PathLike, *, max_side: int | None = None):
        self.root, self.max_side = Path(root).expanduser(), max_side
        self.name = self.root.resolve().name
        paths = sorted(_pictures(self.root))
        if not paths:
            raise ValueError(f"no pictures in {os.fspath(root)!r}; looked for {' '.join(EXTENSIONS)}")
        self.ids = _Names(paths)
        if all("/" in path for path in paths):
            self.classes, self.labels = _number([path.split("/", 1)[0] for path in paths])

    def _image(self, index: int) -> Tensor:
        id = self.ids[index]
        try:
            data = (self.root / id).read_bytes()
        except OSError as error:
            raise BadSample(id, error.strerror or str(error)) from None
        return decode(data, id, self.max_side)

    def _sizes(self) -> Iterable[object]:
        root = os.fspath(self.root)
        for id in self.ids:  # plain strings: a million Path objects would take longer than the files
            try:
                yield os.stat(os.path.join(root, id)).st_size
            except OSError:
                yield "missing"


class Patches(_Manifest):
    """The GeoTIFFs below a folder, in the order and with the classes of `ImageFolder`; each sample is a `Bands`.

    What the bands are is said by a ``bands.json`` in the folder or the one above (see `okavango.data.geotiff`), else by the tags of
    the first file. All files are like the first one.

    Args:
        folder: what was found.
        **given: see `okavango.data.geotiff.Scene`; goes before bands.json.
    Raises:
        GeoError: the first file cannot be read, or bands.json says what there is not.
    """

    def __init__(self, folder: ImageFolder, **given: Any):
        self.root, self.name, self.ids = folder.root, folder.name, folder.ids
        self.classes, self.labels, self.folder = folder.classes, folder.labels, folder
        said = sidecar(self.root) or sidecar(self.root.resolve().parent)
        self.read = Alike(self.root / self.ids[0], **{**said, **given})

    def _image(self, index: int) -> Bands:
        try:
            return self.read(self.root / self.ids[index])
        except GeoError as error:
            raise BadSample(self.ids[index], str(error).removeprefix(f"{self.root / self.ids[index]}: ")) from None

    def _sizes(self) -> Iterable[object]:
        return self.folder._sizes()


class Shards(_Manifest):
    """WebDataset tar shards, read at random through an index of member offsets.

    Members whose names agree up to the first dot of the last path part are one sample: a picture and, if there is one, its label as
    ``.cls`` (a number) or ``.json`` ({"label": number}). Without these, the folder inside the archive is the class, as in
    `ImageFolder`. A file ``classes.txt`` beside the shards names the classes, one a line, in the order of their numbers. Shards are
    opened anew for each read: no file position is shared between threads or forked workers.

    Args:
        where: a folder with .tar files, one .tar file, a glob or a brace pattern such as ``train-{00..07}.tar``.
        max_side: see `open_source`.
    Raises:
        ValueError: no shard, a torn or compressed shard, no picture, or labels on some samples only.
    """

    def __init__(self, where: str | os.PathLike, *, max_side: int | None = None):
        self.max_side = max_side
        self.paths = _shard_paths(os.fspath(where))
        self.name = Path(where).resolve().name.removesuffix(".tar")
        ids, spans, labels = [], [], []
        for number, path in enumerate(self.paths):
            for key, members in _grouped(path):
                picture = next((span for ending, span in members.items() if f".{ending.split('.')[-1]}" in EXTENSIONS), None)
                if picture is None:
                    continue
                ids.append(f"{path.stem}/{key}")
                spans.append((number, *picture))
                labels.append(_member_label(path, key, members))
        if not ids:
            raise ValueError(
                f"no pictures in the shards of {os.fspath(where)!r}; looked for members ending in {' '.join(EXTENSIONS)}"
            )
        self.ids, self.spans = _Names(ids), np.asarray(spans, np.int64)
        named = self.paths[0].parent / "classes.txt"
        classes = tuple(named.read_text(encoding="utf-8").splitlines()) if named.exists() else ()
        labelled = [label is not None for label in labels]
        if all(labelled):
            self.labels = np.asarray(labels, np.int64)
            self.classes = classes or tuple(str(number) for number in range(self.labels.max() + 1))
            if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
                raise ValueError(
                    f"{named}: names {len(self.classes)} classes, but labels run {self.labels.min()}..{self.labels.max()}"
                )
        elif any(labelled):
            raise ValueError(
                f"shards of {self.name!r}: sample {ids[labelled.index(False)]} has no label, others have; mend the shards"
            )
        elif all(id.count("/") > 1 for id in ids):
            self.classes, self.labels = _number([id.split("/")[1] for id in ids], classes)

    def _image(self, index: int) -> Tensor:
        number, offset, size = self.spans[index]
        id = self.ids[index]
        try:
            data = _read_span(self.paths[number], offset, size)
        except OSError as error:
            raise BadSample(id, error.strerror or str(error)) from None
        return decode(data, id, self.max_side)

    def _sizes(self) -> Iterable[object]:
        return self.spans[:, 2]


class Arrays(_Manifest):
    """Pictures that are already in memory.

    Args:
        images: uint8 (N, H, W) or (N, H, W, C) of 1 or 3 channels, array or tensor.
        labels: integers (N,), or None.
        classes: their names; numbers by default.
    Raises:
        ValueError: other shapes, dtypes or lengths.
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: Sequence[int] | np.ndarray | Tensor | None = None,
        *,
        classes=(),
        name: str = "arrays",
    ):
        images = torch.as_tensor(images)
        if images.ndim not in (3, 4) or images.dtype != torch.uint8 or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
            raise ValueError(f"images: expected uint8 (N, H, W) or (N, H, W, 1 or 3), got {images.dtype} {tuple(images.shape)}")
        self.name = name
        self.images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        self.ids = _Numbers(len(images))
        if labels is not None:
            self.labels = np.asarray(labels).astype(np.int64)
            if self.labels.shape != (len(images),):
                raise ValueError(f"labels: expected one for each of {len(images)} images, got shape {self.labels.shape}")
            self.classes = tuple(classes) or tuple(str(number) for number in range(self.labels.max(initial=-1) + 1))
            if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
                raise ValueError(f"labels run {self.labels.min()}..{self.labels.max()}, but there are {len(self.classes)} classes")

    def _image(self, index: int) -> Tensor:
        return self.images[index].contiguous()

    def _sizes(self) -> Iterable[object]:
        return (hashlib.sha256(image.contiguous().numpy()).hexdigest() for image in self.images)


class HuggingFace(_Manifest):
    """A local dataset of the `datasets` library.

    Args:
        dataset: a `datasets.Dataset`, or a folder that `save_to_disk` wrote.
        image, label: names of the columns; found by their type when not given.
        max_side: see `open_source`.
    Raises:
        ValueError: no such column, or not a dataset.
        ImportError: `datasets` is not installed.
    """

    def __init__(self, dataset: Any, *, image: str | None = None, label: str | None = None, max_side: int | None = None):
        try:
            import datasets
        except ImportError:
            raise ImportError("Hugging Face data needs the package datasets: pip install datasets") from None
        self.name, self.max_side = "huggingface", max_side
        if isinstance(dataset, str | os.PathLike):
            self.name, dataset = Path(dataset).resolve().name, datasets.load_from_disk(os.fspath(dataset))
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(
                f"expected one split (datasets.Dataset), got {type(dataset).__name__}; name a split, e.g. data['train']"
            )
        if not len(dataset):
            raise ValueError(f"dataset {self.name!r} is empty")
        features = dataset.features
        pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        numbers = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        self.column = _column("image", image, pictures, features, self.name)
        if label is None and not numbers and "label" in features and str(getattr(features["label"], "dtype", "")).startswith("int"):
            numbers = ["label"]
        if label is not None or numbers:
            column = _column("label", label, numbers, features, self.name)
            self.labels = np.asarray(dataset.with_format(None)[column][:], np.int64)
            self.classes = tuple(getattr(features[column], "names", ())) or tuple(str(n) for n in range(self.labels.max() + 1))
            if (self.labels < 0).any():
                self.labels, self.classes = None, ()  # the library marks the labels of a hidden test set by -1
        self.ids = _Numbers(len(dataset))
        # only the pictures travel to the workers, as stored bytes: decoding is ours
        self.dataset = (
            dataset.with_format(None).select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        )

    def _image(self, index: int) -> Tensor:
        stored, id = self.dataset[index][self.column], self.ids[index]
        if stored is None:
            raise BadSample(id, "no picture in this row")
        try:
            data = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
        except OSError as error:
            raise BadSample(id, error.strerror or str(error)) from None
        return decode(data, id, self.max_side)

    def _sizes(self) -> Iterable[object]:
        for row in self.dataset:
            stored = row[self.column] or {}
            yield len(stored["bytes"]) if stored.get("bytes") is not None else os.path.basename(stored.get("path") or "missing")


def decode(data: bytes, id: str, max_side: int | None = None) -> Tensor:
    """Pixels of a picture file: uint8 (C, H, W) of 1 channel for grey pictures and 3 (RGB) for all others.

    EXIF orientation is applied, alpha is dropped, 16-bit grey is scaled to 8 bits, of an animation the first frame is taken.

    Args:
        data: the whole file.
        id: names the sample in errors.
        max_side: a picture whose longer side is larger is shrunk to it (bicubic, low-passed); JPEG skips the detail early.
    Raises:
        BadSample: empty, torn or not a picture.
    """
    if not data:
        raise BadSample(id, "file is empty")
    # JPEG, and PNG of 8 bits without palette or alpha, are what torchvision decodes as we want it
    plain = data[:2] == b"\xff\xd8" or (data[:4] == b"\x89PNG" and data[24:25] == b"\x08" and data[25:26] in (b"\x00", b"\x02"))
    try:
        if decode_image is not None and plain and (max_side is None or max(Image.open(io.BytesIO(data)).size) <= max_side):
            pixels = decode_image(
                torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED, apply_exif_orientation=True
            )
            if pixels.shape[0] in (1, 3) and pixels.dtype == torch.uint8:
                return pixels
        with Image.open(io.BytesIO(data)) as picture:
            return _from_pil(picture, max_side)
    except Exception as error:  # decoders raise almost anything on torn data
        reason = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else (str(error) or type(error).__name__)
        raise BadSample(id, reason.splitlines()[0][:200]) from None


def _from_pil(picture: Image.Image, max_side: int | None) -> Tensor:
    if max_side is not None and picture.format == "JPEG":
        picture.draft(picture.mode, (max_side, max_side))
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values {values.min()}..{values.max()} are outside the 16 bits that can be scaled to 8")
        picture = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert the picture to 8 or 16 bits")
    elif picture.mode not in ("L", "RGB"):
        picture = picture.convert("L" if picture.mode in ("1", "LA", "La") else "RGB")
    if max_side is not None and max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


class _Names(Sequence[str]):
    """Many strings in one block of bytes: quick to pickle, and forked workers do not copy it by counting references."""

    def __init__(self, names: Sequence[str]):
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.block, self.ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return self.block[self.ends[index] : self.ends[index + 1]].decode("utf-8", "surrogateescape")


class _Numbers(Sequence[str]):
    """Ids of samples that have no names: their numbers."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(index)
        return str(index)


def _is_picture(path: Path) -> bool:
    """False for a TIFF that holds something else: more channels than a picture has, or floating-point values."""
    if not path.name.lower().endswith((".tif", ".tiff")):
        return True
    log = logging.getLogger("PIL.TiffImagePlugin")
    said, log.disabled = log.disabled, True  # that a TIFF has too many channels for it is the answer, not an error
    try:
        with Image.open(path) as picture:
            return picture.mode != "F"
    except Exception:  # whatever is wrong with it, reading it as a raster will say so
        return False
    finally:
        log.disabled = said


def _pictures(root: Path) -> Iterator[str]:
    """Relative paths, with forward slashes, of all pictures below a folder; links are followed, each folder is read once."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield prefix + name


def _number(names: list[str], order: tuple[str, ...] = ()) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names (sorted unless `order` gives them) and the number of each sample's class."""
    classes = order or tuple(sorted(set(names)))
    number = {name: index for index, name in enumerate(classes)}
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ValueError(f"class {unknown[0]!r} is not in classes.txt, which lists {', '.join(classes)}")
    return classes, np.asarray([number[name] for name in names], np.int64)


def _column(what: str, wanted: str | None, found: list[str], features, name: str) -> str:
    if wanted is not None and wanted not in features:
        raise ValueError(f"dataset {name!r} has no column {wanted!r}; it has {', '.join(features)}")
    if wanted is None and len(found) != 1:
        raise ValueError(
            f"dataset {name!r}: {'several' if found else 'no'} {what} columns; name one with {what}=; it has {', '.join(features)}"
        )
    return wanted or found[0]


def _braces(pattern: str) -> list[str]:
    """``a-{08..10}`` -> a-08 a-09 a-10, ``{x,y}`` -> x y, as WebDataset and the shell do."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    choices = match[1].split(",")
    if span:
        choices = [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]
    return [one for choice in choices for one in _braces(pattern[: match.start()] + choice + pattern[match.end() :])]


def _shard_paths(where: str) -> list[Path]:
    where = os.path.expanduser(where)
    if os.path.isdir(where):
        paths = sorted(glob.glob(os.path.join(glob.escape(where), "*.tar")))
    else:
        paths = [path for one in _braces(where) for path in (sorted(glob.glob(one)) if re.search(r"[*?\[]", one) else [one])]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        raise ValueError(f"no shard {missing[0]!r}" if missing else f"no .tar shards match {where!r}")
    return [Path(path) for path in paths]


def _grouped(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Samples of one shard: key and {ending: (offset, size)}; consecutive members of one key belong together."""
    length = path.stat().st_size
    end, key = 0, None
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // 512) * 512
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"member {member.name!r} is cut off")
                match = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name)
                if not member.isreg() or not match or member.name.startswith("__"):
                    continue
                if match[1] != key:
                    if members:
                        yield str(key), members
                    key, members = match[1], {}
                if match[2].lower() in members:
                    raise ValueError(f"shard {path}: two members {member.name!r} in one sample")
                members[match[2].lower()] = (member.offset_data, member.size)
            # tarfile takes a cut between two members for the end of the archive; a whole one closes with zeros
            if _read_span(path, end, 512).strip(b"\0") or length < end + 512:
                raise tarfile.ReadError(f"it ends after byte {length} without the closing block")
    except tarfile.TarError as error:
        raise ValueError(f"shard {path} is torn or not an uncompressed tar ({error}); write or fetch it again") from None
    if members:
        yield str(key), members


def _member_label(path: Path, key: str, members: dict[str, tuple[int, int]]) -> int | None:
    try:
        if "cls" in members:
            return int(_read_span(path, *members["cls"]))
        if "json" in members:
            facts = json.loads(_read_span(path, *members["json"]))
            label = facts.get("label") if isinstance(facts, dict) else None
            return None if label is None else int(label)
    except (ValueError, TypeError):
        raise ValueError(f"shard {path}: the label of sample {key!r} is not a number") from None
    return None


def _read_span(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


class Part:
    """Some samples of a source, as a source."""

    def __init__(self, source: Source, indices: Iterable[int]):
        self.source, self.indices = source, [int(i) for i in indices]
        self.classes, self.name = source.classes, f"{source.name}[{len(self.indices)}]"
        self.labels = None if source.labels is None else np.asarray(source.labels)[self.indices]

    @property
    def digest(self) -> str:
        """Follows from the whole source's and the indices."""
        return hashlib.sha256(f"{self.source.digest} {self.indices}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self.source[self.indices[index]]


def cached(source: Source, limit: int = 2**30) -> Source:
    """The same source, which keeps the samples it has decoded, so that several passes decode once.

    Args:
        limit: bytes of pixels that are kept; samples beyond are decoded each time.
    """
    return _Cached(source, limit)


class _Cached:
    def __init__(self, source: Source, limit: int):
        self.source, self.left = source, limit
        self.name, self.classes, self.labels, self.digest = source.name, source.classes, source.labels, source.digest
        self.samples: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.samples:
            return self.samples[index]
        sample = self.source[index]
        image = sample["image"]
        size = np.asarray(image.values).nbytes if isinstance(image, Bands) else image.numel()
        if size <= self.left:
            self.left -= size
            self.samples[index] = sample
        return sample
