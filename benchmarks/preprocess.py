"""Patches per second and core, from uint16 GeoTIFF files to the input of a network: ours, torchgeo's and torchvision's.

    python benchmarks/preprocess.py --torchgeo PYTHON [--side 64] [--out FILE.jsonl]

PYTHON is the interpreter of a virtual environment that holds torchgeo (see README.md); without it, torchgeo is left out. The work
is that of torchgeo's SSL4EO-S12 weights: 13 bands, resized to 256, the centre of 224 kept, divided by 10,000. All results are
compared before anything is reported. Candidates are processes of their own, take turns, and run on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from timing import load, publish, speed_record

HERE = Path(__file__).parent
SCRIPT = HERE / "candidates" / "run_patches.py"
OURS = "okavango"
EQUAL = {
    OURS: "measured here: reading, reconciliation by name, all checks of the values, resize, crop, scale",
    "torchgeo": "files read as its data sets read them; its own transforms, on a batch",
    "torchgeo_each": "the same, sample by sample",
    "torchvision": "files read as torchgeo's data sets read them; Resize, CenterCrop, Normalize of v2, on a batch",
    "torchvision_each": "the same, sample by sample",
}


def write_patches(folder: Path, count: int, side: int) -> list[str]:
    """Files as EuroSAT's: 13 bands of uint16, georeferenced, not compressed, pixel by pixel."""
    import rasterio
    from affine import Affine

    rng = np.random.default_rng(0)
    folder.mkdir()
    profile = {"driver": "GTiff", "width": side, "height": side, "count": 13, "dtype": "uint16", "interleave": "pixel"}
    files = []
    for number in range(count):
        values = rng.integers(200, 4000, (13, side, side)).astype(np.uint16)
        values[10] //= 100  # cirrus, the darkest band
        files.append(str(folder / f"patch_{number}.tif"))
        place = {"crs": "EPSG:32632", "transform": Affine(10, 0, 500_000 + 10 * side * number, 0, -10, 5_000_000)}
        with rasterio.open(files[-1], "w", **profile, **place) as dataset:
            dataset.write(values)
    return files


def run(python: str, settings: dict) -> tuple[list[float], np.ndarray]:
    """Seconds of every pass of one candidate, and its first batch."""
    path = {"PYTHONPATH": str(HERE.parent)} if python == sys.executable else {}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [os.path.abspath(python), str(SCRIPT), json.dumps(settings)]
    done = subprocess.run(command, env={**environment, **one, **path}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{settings['library']} failed:\n{done.stderr[-3000:]}")
    return json.loads(Path(settings["notes"]).read_text())["seconds"], np.load(settings["first"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torchgeo", metavar="PYTHON", help="interpreter of torchgeo's environment")
    parser.add_argument("--side", type=int, default=64, help="of a patch, in pixels")
    parser.add_argument("--patches", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="passes of each process")
    parser.add_argument("--out", type=Path, help="a file *.jsonl for the records; a page is drawn beside it")
    given = parser.parse_args(arguments)
    pythons = {name: given.torchgeo if name.startswith("torchgeo") else sys.executable for name in EQUAL}
    names, before = [name for name in EQUAL if pythons[name]], load()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    firsts: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="patches-") as work:
        files = write_patches(Path(work) / "data", given.patches, given.side)
        settings = {"files": files, "batch": given.batch, "repeats": given.repeats, "threads": 1}
        settings |= {"notes": f"{work}/notes.json", "first": f"{work}/first.npy"}
        for turn in range(given.rounds):
            for name in names[:: 1 if turn % 2 else -1]:
                took, firsts[name] = run(pythons[name], {**settings, "library": name})
                seconds[name] += took
                print(f"round {turn + 1} of {given.rounds}: {name}", flush=True)
    gaps = {name: float(np.abs(first - firsts[OURS]).max()) for name, first in firsts.items()}
    if max(gaps.values()) > 1e-5:
        sys.exit(f"the results differ: {gaps}")
    fastest = min((name for name in names if name != OURS), key=lambda name: median(seconds[name]))
    rates = {name: given.patches / median(seconds[name]) for name in names}
    shared = {"side": given.side, "bands": 13, "resized": 256, "kept": 224, "batch": given.batch, "threads": 1}
    facts = {"protocol": f"preprocess_{given.side}/v1", "n": given.patches, "loads": (before, load()), "times": seconds}
    records = [
        speed_record(
            "preprocess",
            "patches per second of processor",
            round(rates[name], 1),
            dataset=f"{given.side} px patches of 13 bands, uint16",
            baseline=name,
            label=name,
            settings={**shared, "equal": EQUAL[name], "largest_difference": gaps[name]},
            notes=f"ours is {rates[OURS] / rates[name]:.2f} times as fast" + (", the fastest other" if name == fastest else ""),
            **facts,
        )
        for name in names
    ]
    publish(records, given.out, "From GeoTIFF to network input")


if __name__ == "__main__":
    main()
