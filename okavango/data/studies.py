"""Studies of several sequences in NIfTI files, and what brings them to a network: prepared once, kept on disk, augmented by seed.

A study is ``{"t1": Scan, "flair": Scan, ..., "present": names, "id": str, "affine": (4, 4)}``, with "seg" (a `Scan` of label
numbers), "label", "time" and "event" where they are known, and "absent", such as ["t2 is missing", "flair is torn"], where others
have more. Prepared, its sequences are float32 tensors on the network's grid, its
"seg" is on the same grid, and "geometry" tells the way back.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from okavango import caches
from okavango.data.sources import BadSample, Source, _Manifest, _number
from okavango.models.bm_mae import ALIASES
from okavango.models.preprocess import Preprocess, PreprocessError, Volume
from okavango.models.volume import Geometry, Scan, Turn, carry, expect_same_grid, orientation, prepare, turning

# Name of a sequence -> endings of file names and columns of tables: BraTS 2020, BraTS 2023, UPenn-GBM and their kin.
SEQUENCES = {name: (name, *others) for name, others in ALIASES.items()}
SEGMENTATION = ("seg", "segm", "segmentation", "automated_approx_segm", "combined_approx_segm")  # a later one only without earlier
FACTS = ("id", "split", "label", "time", "event")

# Region of a tumour -> label numbers, per convention. What is not listed is refused; an empty name is no region.
REGIONS: dict[str, dict[str, tuple[int, ...]]] = {
    "brats": {"TC": (1, 4), "WT": (1, 2, 4), "ET": (4,)},  # until 2022, and UPenn-GBM
    "brats2023": {"TC": (1, 3), "WT": (1, 2, 3), "ET": (3,)},
    "brats2024": {"TC": (1, 3), "WT": (1, 2, 3), "ET": (3,), "": (4,)},  # 4 is the cavity after surgery
}


class Unreadable(ValueError):
    """A file that is missing or torn."""


# -- files --------------------------------------------------------------------------------------------------------------------


def read_scan(path: str | os.PathLike) -> Scan:
    """One NIfTI file, .nii or .nii.gz, with its affine; values as stored, or float32 where the header scales them.

    Raises:
        Unreadable: missing, torn, not NIfTI.
        ValueError: several volumes in one file.
        ImportError: nibabel is not installed.
    """
    try:
        import nibabel
    except ImportError:
        raise ImportError("NIfTI files need the package nibabel: pip install 'okavango[mri]'") from None
    path = Path(path)
    try:
        data = _inflated(path.read_bytes()) if path.suffix == ".gz" else np.memmap(path, mode="r")
        first = bytes(data[:540])
        header_class = nibabel.Nifti2Header if b"n+2" in first[4:12] else nibabel.Nifti1Header
        header = header_class.from_fileobj(io.BytesIO(first))
        affine, shape, dtype = header.get_best_affine(), header.get_data_shape(), header.get_data_dtype()
        start, (slope, inter) = header.get_data_offset(), header.get_slope_inter()
        need = start + int(np.prod(shape)) * dtype.itemsize
        if len(data) < need or not first[344:348].startswith((b"n+1", b"n+2")) and header_class is nibabel.Nifti1Header:
            raise Unreadable(f"is cut off, {len(data)} of {need} bytes" if len(data) < need else "is not a NIfTI file")
    except Unreadable:
        raise
    except Exception as error:  # headers of torn files raise almost anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unreadable(f"cannot be read ({reason.splitlines()[0]})") from None
    values = np.ndarray(shape, dtype, buffer=data, offset=start, order="F")
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise ValueError(f"has {values.ndim} axes, {'x'.join(map(str, shape))}; expected one three-dimensional volume, split it")
    if slope is not None and (slope, inter) != (1, 0):
        values = values.astype(np.float32) * np.float32(slope) + np.float32(inter)
    return Scan(values, affine, None, path.name)


def _inflated(data: bytes) -> bytes:
    parts = []
    while data.strip(b"\0"):  # some writers pad the end, some join several streams
        stream = zlib.decompressobj(wbits=31)
        parts.append(stream.decompress(data))
        if not stream.eof:
            raise EOFError("the gzip stream is cut off")
        data = stream.unused_data
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_scan(path: str | os.PathLike, values: np.ndarray | Tensor, affine: np.ndarray, description: str = "") -> None:
    """One NIfTI file, equal bytes for equal values.

    Args:
        values: (D, H, W); its number type is stored as it is, bool as uint8.
        description: at most 79 bytes for the header.
    """
    import nibabel

    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    image = nibabel.Nifti1Image(array.astype(np.uint8) if array.dtype == bool else array, affine)
    image.header["descrip"] = description.encode("ascii", "replace")[:79]
    image.header.set_xyzt_units("mm")
    partial = Path(path).with_name(f".{os.getpid()}-{Path(path).name}")  # keeps the ending, which decides on compression
    nibabel.save(image, partial)
    os.replace(partial, path)


# -- the source ---------------------------------------------------------------------------------------------------------------


class Studies(_Manifest):
    """Studies below a folder, or in a table of paths.

    Folder: files are called ``ID_SEQUENCE.nii.gz`` or ``ID-SEQUENCE.nii.gz`` and may lie in any sub-folders, as in BraTS
    2020 to 2024 and UPenn-GBM. What has another ending is left out.

    Table: a CSV file with a column of paths, relative to it, per sequence: t1, t1n, T1Gd, flair ... in upper or lower case, or any
    other name, such as pet, whose cells end in .nii or .nii.gz. Where there are any: ``seg``, ``id``, ``label`` (a class), ``time``
    and ``event`` (of survival; 1 when it was seen), ``split``. An empty cell is a sequence that the study lacks.

    Args:
        where: folder or .csv file.
        split: value of the column ``split`` that is wanted; needed where there are several.
        missing: what a sequence that others have, or that is torn, makes of a study: "absent" leaves the sequence out, "bad" makes
            it a bad sample. A study without any sequence is bad in either case.
        codes: convention of label numbers, a key of `REGIONS`; told by the names of files when empty.
    Attributes:
        modalities: sequences that at least one study has.
        files: per study, sequence or "seg" -> path.
        facts: per study, what the table says of it.
    Raises:
        ValueError: nothing there, or two files for one sequence.
    """

    def __init__(
        self,
        where: str | os.PathLike,
        *,
        split: str = "",
        missing: Literal["absent", "bad"] = "absent",
        codes: str = "",
    ):
        if missing not in ("absent", "bad") or (codes and codes not in REGIONS):
            known = f"absent or bad, and codes among {', '.join(REGIONS)}"
            raise ValueError(f"studies: missing {missing!r}, codes {codes!r}; expected {known}")
        root = Path(where).expanduser()
        self.name, self.missing, self.codes = (
            root.resolve().name.removesuffix(".csv") + (f"-{split}" if split else ""),
            missing,
            codes,
        )
        if root.suffix == ".csv":
            self.files, self.facts = _table(root, split)
        else:
            self.files, self.facts = _folder(root)
        self.ids = [facts["id"] for facts in self.facts]
        found = {name for files in self.files for name in files} - {"seg"}
        self.modalities = tuple(name for name in (*SEQUENCES, *sorted(found - set(SEQUENCES))) if name in found)
        labels = [facts.get("label", "") for facts in self.facts]
        if all(labels):
            self.classes, self.labels = _number(labels)
        elif any(labels):
            raise ValueError(
                f"{where}: study {self.ids[labels.index('')]} has no label, others have; fill the column or leave it out"
            )

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"study {index} of {self.name!r}, which has {len(self)}")
        index %= len(self)
        id, files, facts = self.ids[index], self.files[index], self.facts[index]
        sample: dict[str, Any] = {}
        absent: list[str] = []
        for modality in self.modalities:
            problem, state = f"lacks {modality}", "missing"
            try:
                if modality in files:
                    sample[modality] = read_scan(files[modality])
                    continue
            except Unreadable as error:
                problem, state = f"{files[modality].name} {error}", "torn"
                if self.missing == "absent":
                    warnings.warn(f"study {id}: {problem}; the sequence is left out", stacklevel=2)
            except ValueError as error:
                raise BadSample(id, f"{files[modality].name} {error}") from None
            if self.missing == "bad":
                raise BadSample(id, problem)
            absent.append(f"{modality} is {state}")
        if not sample:
            raise BadSample(id, "none of its sequences can be read")
        sample["present"], sample["id"] = tuple(sample), id
        sample["affine"] = sample[sample["present"][0]].affine
        if absent:
            sample["absent"] = absent
        if "seg" in files:
            try:
                sample["seg"] = read_scan(files["seg"])
            except ValueError as error:
                raise BadSample(id, f"{files['seg'].name} {error}") from None
            sample["codes"] = self.codes or ("brats2023" if re.search(r"-seg\.nii", files["seg"].name) else "brats")
        if self.labels is not None:
            sample["label"] = int(self.labels[index])
        if facts.get("time"):
            sample["time"], sample["event"] = float(facts["time"]), bool(float(facts.get("event") or 0))
        return sample

    def narrowed(self, modalities: Iterable[str], seg: bool) -> Studies:
        """The same studies, of which only these sequences, and the segmentation if wanted, are read."""
        narrow = object.__new__(Studies)
        wanted = tuple(name for name in self.modalities if name in set(modalities))
        keep = {*wanted, "seg"} if seg else set(wanted)
        files = [{name: path for name, path in each.items() if name in keep} for each in self.files]
        narrow.__dict__ |= {**self.__dict__, "modalities": wanted, "files": files, "digest": self.digest}
        return narrow

    def stamp(self, index: int) -> str:
        """Changes when a file or a fact of the study does: names, sizes and times of files, and what the table says."""
        stats = {name: path.stat() for name, path in self.files[index].items() if path.exists()}
        files = {name: (str(self.files[index][name]), stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items())}
        return json.dumps([files, self.facts[index], self.missing, self.codes, self.modalities, self.classes])

    def _sizes(self) -> Iterable[object]:
        for files in self.files:
            yield {name: path.stat().st_size if path.exists() else "missing" for name, path in sorted(files.items())}


def _folder(root: Path) -> tuple[list[dict[str, Path]], list[dict[str, str]]]:
    endings = {ending: name for name, others in SEQUENCES.items() for ending in others} | dict.fromkeys(SEGMENTATION, "seg")
    pattern = re.compile(rf"(.+?)[_-]({'|'.join(sorted(endings, key=len, reverse=True))})\.nii(\.gz)?", re.IGNORECASE)
    studies: dict[str, dict[str, Path]] = {}
    ranks: dict[str, int] = {}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            match = pattern.fullmatch(name)
            if not match or name.startswith("."):
                continue
            id, ending = match[1], match[2].lower()
            kind, rank = endings[ending], SEGMENTATION.index(ending) if ending in SEGMENTATION else 0
            files = studies.setdefault(id, {})
            if kind == "seg" and kind in files and rank != ranks[id]:
                if rank > ranks[id]:
                    continue  # a corrected segmentation is better than an automatic one
            elif kind in files:
                raise ValueError(f"study {id} has two files for {kind}: {files[kind]} and {Path(folder) / name}; remove one")
            files[kind] = Path(folder) / name
            if kind == "seg":
                ranks[id] = rank
    _adopt(studies)
    ids = sorted(id for id, files in studies.items() if set(files) - {"seg"})
    if not ids:
        raise ValueError(f"no studies in {os.fspath(root)!r}; expected files such as ID_t1.nii.gz, ID_t1ce.nii.gz or ID-t1c.nii.gz")
    return [studies[id] for id in ids], [{"id": id} for id in ids]


def _adopt(studies: dict[str, dict[str, Path]]) -> None:
    """A segmentation under a strange name belongs to the one study of its folder (BraTS 2020 has such a one)."""
    for id in [id for id, files in studies.items() if set(files) == {"seg"}]:
        home = studies[id]["seg"].parent
        kin = [other for other, files in studies.items() if other != id and any(path.parent == home for path in files.values())]
        if len(kin) == 1:
            studies[kin[0]].setdefault("seg", studies.pop(id)["seg"])


def _table(path: Path, split: str) -> tuple[list[dict[str, Path]], list[dict[str, str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    columns: dict[str, str] = {}
    for column in rows[0] if rows else ():
        lower = (column or "").strip().lower()
        kinds = [name for name, others in SEQUENCES.items() if lower in others]
        scans = any(str(row[column]).strip().endswith((".nii", ".nii.gz")) for row in rows)
        name = kinds[0] if kinds else "seg" if lower in SEGMENTATION else lower if lower in FACTS or scans else ""
        if name in columns:
            raise ValueError(f"{path}: columns {columns[name]!r} and {column!r} both mean {name}; leave one out")
        if name:
            columns[name] = column
    paths = set(columns) - set(FACTS)
    if not paths - {"seg"}:
        raise ValueError(f"{path}: no column of NIfTI paths; expected t1, t1ce, t2, flair or their other names")
    splits = sorted({row[columns["split"]].strip() for row in rows}) if "split" in columns else []
    if (split and split not in splits) or (not split and len(splits) > 1):
        raise ValueError(
            f"{path} holds the splits {', '.join(splits) or '(none)'}; name one of them: {path.name}:{(splits or [''])[0]}"
        )
    files, facts = [], []
    for number, row in enumerate(rows, 1):
        cells = {name: (row[column] or "").strip() for name, column in columns.items()}
        if split and cells["split"] != split:
            continue
        files.append({name: path.parent / cells[name] for name in sorted(paths) if cells[name]})
        facts.append({"id": str(number), **{name: cells[name] for name in FACTS if cells.get(name)}})
        for name in ("time", "event"):
            if cells.get(name) and not re.fullmatch(r"-?\d+(\.\d*)?([eE]-?\d+)?", cells[name]):
                raise ValueError(f"{path}, row {number}: {name} is {cells[name]!r}; expected a number")
    ids = [each["id"] for each in facts]
    if doubled := sorted({id for id in ids if ids.count(id) > 1}):
        raise ValueError(f"{path}: two rows have the id {doubled[0]!r}")
    return files, facts


# -- to the network -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepare:
    """The deterministic part: a study -> tensors on the network's grid; see `okavango.models.volume.prepare`.

    Attributes:
        preprocess: of the backbone. Sequences that it does not know are left out.
        seg: "regions" makes bool (3, D, H, W) of the label numbers, tumour core, whole tumour and enhancing tumour, by the study's
            convention; "labels" keeps the numbers, int64 (1, D, H, W); "none" leaves the segmentation out.
    """

    preprocess: Preprocess
    seg: Literal["regions", "labels", "none"] = "none"

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The sample with sequences and "seg" as tensors, "geometry", and everything else that it had; once prepared, it stays.

        Raises:
            BadSample: what `prepare` refuses, a segmentation on another grid, an unknown label number.
        """
        if "geometry" in sample:
            return dict(sample)
        scans = {name: sample[name] for name in self.known(sample)}
        id = str(sample.get("id", ""))
        try:
            if not scans:
                raise PreprocessError(f"has none of the sequences {', '.join(self.preprocess)}")
            volumes, geometry = prepare(self.preprocess, scans)
            out = {name: value for name, value in sample.items() if name not in (*scans, "seg", "codes") and not _is_scan(value)}
            out |= {**volumes, "geometry": geometry}
            if "seg" in sample and self.seg != "none":
                first = next(iter(scans.values()))
                stored = _labels(sample["seg"], first if isinstance(first, Scan) else Scan(first))
                if self.seg == "regions":
                    labels = regions(stored, sample.get("codes", "brats"), getattr(sample["seg"], "name", "") or "seg")
                else:
                    labels = torch.from_numpy(stored.astype(np.int64))[None]
                out["seg"] = carry(geometry, labels, nearest=True)
        except PreprocessError as error:
            raise BadSample(id, str(error)) from None
        return out

    def known(self, names: Iterable[str]) -> list[str]:
        """Those names that the preprocess takes as volumes, by alias or not."""
        known = []
        for name in names:
            try:
                spec = self.preprocess[self.preprocess.resolve(name)]
            except PreprocessError:
                continue
            known += [name] if isinstance(spec, Volume) else []
        return known


def regions(labels: np.ndarray, codes: str, name: str = "seg") -> Tensor:
    """Label numbers (D, H, W) -> bool (3, D, H, W): tumour core, whole tumour, enhancing tumour, by a convention of `REGIONS`.

    Raises:
        PreprocessError: a number that the convention does not know.
    """
    table = REGIONS[codes]
    known = {0}.union(*table.values())
    numbers = np.unique(labels)
    if strange := [number for number in numbers.tolist() if number not in known]:
        others = [key for key, other in REGIONS.items() if {0}.union(*other.values()) >= set(numbers.tolist())]
        hint = f"; codes={others[0]!r} knows all of this file" if others else ""
        raise PreprocessError(f"{name}: label {strange[0]:g} is unknown to {codes!r}, which has {sorted(known)}{hint}")
    return torch.from_numpy(np.stack([np.isin(labels, values) for region, values in table.items() if region]))


def _labels(seg: Any, first: Scan) -> np.ndarray:
    """Label numbers on the grid of the first sequence, as it is stored."""
    seg = seg if isinstance(seg, Scan) else Scan(seg)
    if seg.affine is not None and first.affine is not None:
        for step in turning(seg, orientation(first.affine)):
            seg = Scan(step.apply(seg.values, True, 0.0), seg.affine @ step.matrix(), None, seg.name)
    expect_same_grid(seg, first)
    values = seg.values.numpy() if isinstance(seg.values, Tensor) else seg.values
    if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
        raise PreprocessError(f"{seg.name or 'seg'}: labels are not whole numbers; it must not be interpolated")
    return values


def _is_scan(value: Any) -> bool:
    return isinstance(value, Scan)


class Prepared:
    """A source whose samples went through `Prepare`, with a cache on disk if wanted.

    Args:
        source: of studies.
        prepare: see there. Files that it does not need are not read.
        cache: folder of prepared studies, one safetensors file each, mapped into memory when read. A file is named by what it was
            made from (names, sizes and times of files, and the preprocess), so that nothing stale is read; remove the folder at
            any time, or let `okavango cache clean` do so. Four sequences of 128 x 128 x 128 voxels take 34 MB.
    Raises:
        ValueError: no sequence that the network takes, or a cache for a source that cannot tell when a study changed.
    """

    def __init__(self, source: Source, prepare: Prepare, cache: str | os.PathLike | None = None):
        if isinstance(source, Studies):
            known = prepare.known(source.modalities)
            if not known:
                have, want = ", ".join(source.modalities), ", ".join(prepare.preprocess)
                raise ValueError(f"data {source.name!r} has the sequences {have}, and the network takes {want}; nothing fits")
            source = source.narrowed(known, seg=prepare.seg != "none")
        if cache and not hasattr(source, "stamp"):
            raise ValueError(f"data {source.name!r}: only studies from files can be cached; leave the cache off")
        self.source, self.prepare = source, prepare
        self.name, self.classes, self.labels, self.digest = source.name, source.classes, source.labels, source.digest
        self.cache = Path(cache).expanduser() if cache else None
        if self.cache is not None:
            caches.hold_for_good(self.cache, "studies")
        self.settings = json.dumps([prepare.preprocess.to_json(), prepare.seg, _CACHE_VERSION])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.cache is None:
            return self.prepare(self.source[index])
        key = f"{self.settings}\n{self.source.stamp(index % len(self))}"  # type: ignore[attr-defined]
        path = self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        try:
            sample = _read_prepared(path)
            caches.touch(path)
            return sample
        except Exception:  # not there yet, or torn: made again
            sample = self.prepare(self.source[index])
        self.cache.mkdir(parents=True, exist_ok=True)
        _write_prepared(path, sample)
        return sample


_CACHE_VERSION = 2


def _write_prepared(path: Path, sample: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in sample.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in sample.items() if name not in tensors}
    rest |= {"geometry": sample["geometry"].to_json(), "affine": None if rest.get("affine") is None else rest["affine"].tolist()}
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    save_file(tensors, partial, {"sample": json.dumps(rest)})
    os.replace(partial, path)


def _read_prepared(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        rest = json.loads(file.metadata()["sample"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    rest["geometry"], rest["present"] = Geometry.from_json(rest["geometry"]), tuple(rest.get("present", ()))
    rest["affine"] = None if rest["affine"] is None else np.asarray(rest["affine"])
    return {**rest, **tensors}


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The random part, the same for all sequences of a study and its segmentation; everything follows from the seed.

    Attributes:
        flip: probability of a flip along each axis.
        scale: values are multiplied by 1 + up to this, up or down.
        shift: values are moved by up to this, up or down, in units of the normalised volume; the background moves with them.
    """

    flip: float = 0.5
    scale: float = 0.1
    shift: float = 0.1

    def __call__(self, sample: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Prepared sample -> another one; the tensors of the first are left as they are."""
        geometry = sample["geometry"]
        draws = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        flips = tuple(draw < self.flip for draw in draws[:3])
        factor, offset = 1 + self.scale * (2 * draws[3] - 1), self.shift * (2 * draws[4] - 1)
        axes = [axis - 3 for axis in range(3) if flips[axis]]
        out = dict(sample)
        for name, value in sample.items():
            if isinstance(value, Tensor) and tuple(value.shape[-3:]) == geometry.size:
                turned = value.flip(axes) if axes else value
                labels = name == "seg"
                out[name] = turned if labels else torch.add(torch.tensor(offset, dtype=value.dtype), turned, alpha=factor)
        if axes:
            out["geometry"] = geometry.then(Turn(geometry.size, (0, 1, 2), flips))
        return out


@dataclass(frozen=True)
class StudyTransform:
    """For loaders: prepare what is not prepared, then augment. `augment` None leaves it at that."""

    prepare: Prepare
    augment: Augment | None = dataclasses.field(default_factory=Augment)

    def __call__(self, sample: Mapping[str, Any], seed: int) -> dict[str, Any]:
        prepared = self.prepare(sample)
        return prepared if self.augment is None else self.augment(prepared, seed)


def monai_transforms(preprocess: Preprocess, modalities: Iterable[str], augment: Augment | None = None) -> Any:
    """The same as a `Compose` of MONAI's dictionary transforms, from {modality: path}; for pipelines and bundles of MONAI.

    The random ones draw from MONAI's own state.

    Args:
        preprocess: specs with resize rule "crop" or "none", and z-score or no normalisation.
    Raises:
        ValueError: MONAI has no transform for it. ImportError: MONAI is not installed.
    """
    try:
        from monai import transforms as T
    except ImportError:
        raise ImportError("MONAI's transforms need the package monai: pip install 'okavango[mri]'") from None
    keys = list(modalities)
    spec = preprocess[preprocess.resolve(keys[0])]
    assert isinstance(spec, Volume)
    if spec.foreground or spec.resize.rule not in ("crop", "none") or not spec.normalise.rule.startswith(("zscore", "none")):
        raise ValueError(
            f"MONAI has no transforms for foreground {spec.foreground}, resize {spec.resize.rule!r}, "
            f"normalise {spec.normalise.rule!r} of several sequences"
        )
    steps: list[Any] = [T.LoadImaged(keys, image_only=True), T.EnsureChannelFirstd(keys), T.EnsureTyped(keys)]
    if spec.orientation:
        steps.append(T.Orientationd(keys, axcodes=spec.orientation))
    if spec.spacing:
        steps.append(T.Spacingd(keys, pixdim=spec.spacing, mode="bilinear"))
    if (spec.scale, spec.offset) != (1, 0):
        steps.append(T.Lambdad(keys, lambda values: values * spec.scale + spec.offset))
    if spec.resize.rule == "crop":
        steps.append(T.ResizeWithPadOrCropd(keys, spec.size, constant_values=spec.resize.fill))
    if spec.normalise.rule != "none":
        steps.append(T.NormalizeIntensityd(keys, nonzero=spec.normalise.rule == "zscore_nonzero", channel_wise=True))
    if augment is not None:
        steps += [T.RandFlipd(keys, prob=augment.flip, spatial_axis=axis) for axis in range(3)]
        steps.append(T.RandScaleIntensityd(keys, factors=augment.scale, prob=1.0))
        steps.append(T.RandShiftIntensityd(keys, offsets=augment.shift, prob=1.0))
    return T.Compose(steps)
