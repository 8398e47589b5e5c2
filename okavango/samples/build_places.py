"""Make the sample of places that ships with the package: views of real panoramas with known headings, equal bytes on every run.

    npm pack @pmndrs/assets@1.7.0 && tar xzf pmndrs-assets-1.7.0.tgz && pip install OpenEXR
    python -m okavango.samples.build_places --source package --out okavango/samples/places

Each panorama is a place. The database has views at even headings, 75 degrees wide; queries have a drawn heading, pitch, width,
exposure and gamma. A view's position is a made one, so that the usual names and the usual rule serve: place p stands at
(1000 p, 0) metres, and heading h on a circle of 48 m around it, where 30 degrees are a chord of 24.85 m. So "within 25 m" means
the same place, and a heading that differs by 30 degrees at most.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

# By place, so that nothing of a test place is seen in training; inside, outside, day and night are in both parts.
SPLITS = {
    "train": ("apartment", "city", "esplanade", "forest", "hall", "lab", "night", "sunrise", "workshop"),
    "test": ("bridge", "dawn", "lobby", "park", "sunset", "venice", "warehouse"),
}
UNANSWERABLE = {"train": (), "test": ("studio", "sky")}  # queries without a place in the database; nearly without texture
DATABASE = {"train": 24, "test": 12}  # views per place
QUERIES = {"train": 12, "test": 24}
RADIUS = 48.0  # metres
SIDE = 112  # pixels of a view
SEED = 2024


def read_panorama(path: Path) -> np.ndarray:
    """Linear light of an equirectangular panorama, float64 (H, W, 3): the 90th percentile becomes 0.8.

    Args:
        path: a JavaScript module whose default export is an OpenEXR file as a data URL.
    """
    import OpenEXR

    data = base64.b64decode(path.read_text(encoding="ascii").split("base64,", 1)[1].rstrip().rstrip(";'\""))
    with tempfile.NamedTemporaryFile(suffix=".exr") as file:
        file.write(data)
        file.flush()
        channels = OpenEXR.File(file.name).channels()
    light = channels["RGB"].pixels if "RGB" in channels else np.stack([channels[name].pixels for name in "RGB"], -1)
    light = light[..., :3].astype(np.float64)
    finite = np.isfinite(light)
    light = np.where(finite, light, light[finite].max()).clip(0)
    light *= 0.8 / np.percentile(light, 90)
    brightest = light.max(-1, keepdims=True)
    burnt = (brightest > 1) & (light.min(-1, keepdims=True) < 1e-3)  # the sun: two of its channels were lost, which looks blue
    return np.where(burnt, brightest, light)


def view(panorama: np.ndarray, heading: float, pitch: float = 0.0, width: float = 75.0, side: int = SIDE) -> np.ndarray:
    """What a pinhole camera sees, float64 (side, side, 3), by bilinear lookup.

    Args:
        panorama: (H, W, 3), equirectangular; its middle column has the heading 0.
        heading: degrees clockwise; pitch: degrees upwards; width: field of view in degrees.
    """
    half = math.tan(math.radians(width / 2))
    steps = ((np.arange(side) + 0.5) / side * 2 - 1) * half
    right, down = np.meshgrid(steps, steps)
    tilt = math.radians(pitch)
    forward, up = math.cos(tilt) + down * math.sin(tilt), math.sin(tilt) - down * math.cos(tilt)
    azimuth = np.arctan2(right, forward) + math.radians(heading)
    elevation = np.arctan2(up, np.hypot(right, forward))
    height, columns = panorama.shape[:2]
    x = (azimuth / (2 * math.pi) + 0.5) * columns - 0.5
    y = ((0.5 - elevation / math.pi) * height - 0.5).clip(0, height - 1)
    left, top = np.floor(x), np.floor(y)
    across, along = (x - left)[..., None], (y - top)[..., None]
    first, second = left.astype(int) % columns, (left.astype(int) + 1) % columns  # the seam is no border
    above, below = top.astype(int), np.minimum(top.astype(int) + 1, height - 1)
    upper = panorama[above, first] * (1 - across) + panorama[above, second] * across
    lower = panorama[below, first] * (1 - across) + panorama[below, second] * across
    return upper * (1 - along) + lower * along


def picture_name(place: int, heading: float, pitch: float = 0.0) -> str:
    """``@east@north@...@.jpg`` with the heading and pitch in their own fields, in the order of the common benchmarks."""
    angle = math.radians(heading)
    east, north = 1000 * place + RADIUS * math.cos(angle), RADIUS * math.sin(angle)
    return f"@{east:010.2f}@{north:010.2f}@@@@@{place:02d}@@{heading:06.2f}@{pitch:+05.2f}@@@@@.jpg"


def save(path: Path, light: np.ndarray, exposure: float = 0.0, gamma: float = 2.2) -> None:
    """One JPEG; `exposure` in stops."""
    values = (light * 2.0**exposure).clip(0, 1) ** (1 / gamma)
    stream = io.BytesIO()
    Image.fromarray((values * 255).round().astype(np.uint8)).save(stream, "JPEG", quality=85, optimize=True)
    path.write_bytes(stream.getvalue())


def build(source: Path, out: Path) -> dict:
    """Write pictures, licence and PROVENANCE.json; returns what the latter holds.

    Args:
        source: the unpacked npm package.
        out: folder to write to; a former `train` and `test` in it are replaced.
    """
    modules = {path.name.split(".")[0]: path for path in sorted((source / "hdri").glob("*.exr.js"))}
    numbers = {name: number for number, name in enumerate(modules)}
    provenance: dict = {
        "name": "Views of 18 panoramas of real places",
        "source": "npm package @pmndrs/assets 1.7.0, folder hdri: panoramas of Poly Haven (https://polyhaven.com/hdris), 512 x 256",
        "licence": "CC0-1.0, see LICENSE",
        "command": "python -m okavango.samples.build_places --source package --out DIR",
        "changes": "light scaled, clipped and turned into 8 bits; pinhole views of 112 x 112 pixels as JPEG of quality 85",
        "seed": SEED,
        "originals_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in modules.values()},
        "places": numbers,
        "splits": {},
    }
    random = np.random.Generator(np.random.Philox(SEED))
    for split, places in SPLITS.items():
        shutil.rmtree(out / split, ignore_errors=True)
        for part in ("database", "queries"):
            (out / split / part).mkdir(parents=True)
        for name in (*places, *UNANSWERABLE[split]):
            panorama, place = read_panorama(modules[name]), numbers[name]
            for step in range(DATABASE[split] if name in places else 0):
                heading = 360 / DATABASE[split] * step
                save(out / split / "database" / picture_name(place, heading), view(panorama, heading))
            for _ in range(QUERIES[split] if name in places else QUERIES[split] // 2):
                heading, pitch, width = random.uniform(0, 360), random.uniform(-8, 8), random.uniform(60, 90)
                exposure, gamma = random.uniform(-1.2, 1.2), random.uniform(1.8, 2.6)
                path = out / split / "queries" / picture_name(place, heading, pitch)
                save(path, view(panorama, heading, pitch, width), exposure, gamma)
        files = {part: sorted((out / split / part).iterdir()) for part in ("database", "queries")}
        provenance["splits"][split] = {
            "places": list(places),
            "unanswerable": list(UNANSWERABLE[split]),
            **{part: len(paths) for part, paths in files.items()},
            "pictures_sha256": {
                part: hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()
                for part, paths in files.items()
            },
        }
    shutil.copyfile(source / "LICENSE", out / "LICENSE")
    (out / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    return provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="the unpacked npm package @pmndrs/assets 1.7.0")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    provenance = build(given.source, given.out)
    counts = (f"{name}: {part['database']} + {part['queries']}" for name, part in provenance["splits"].items())
    print(", ".join(counts), "->", given.out)


if __name__ == "__main__":
    main()
