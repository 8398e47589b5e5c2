"""A scene of 20,000 x 20,000 pixels embedded by a small network: time, memory beyond the model, and the same file after a kill.

    python benchmarks/scene.py [--side 20000] [--tile 200] [--work FOLDER] [--out FILE.jsonl]

The scene is made in FOLDER (4 bands of uint16, blocks of 512 pixels, deflate) and stays there for the next time. Two runs of
`okavango embed`: one from start to end, whose greatest resident memory is read off; one that is killed again and again and ends by
the same command. Their maps must be equal byte for byte. What the program, the libraries and the model need is the greatest memory
of `okavango zoo verify`, which loads the checkpoint and runs it once.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import load, publish, speed_record

HERE = Path(__file__).parent
BANDS = ("B02", "B03", "B04", "B08")
LIMIT = 2048  # MiB beyond the model

#: The command line, which says at last how much memory it has taken; only the process itself knows (see `peak_memory`).
MEASURED = """
import runpy, sys
from clock import peak_memory
try:
    runpy.run_module("okavango", run_name="__main__")
finally:
    print(peak_memory(), file=sys.stderr)
"""


def write_scene(path: Path, side: int) -> None:
    """Smooth fields with noise, which compress about as real scenes do; the upper left corner was not measured."""
    import rasterio
    from affine import Affine

    rng = np.random.default_rng(0)
    tile = 512
    profile = {"driver": "GTiff", "width": side, "height": side, "count": len(BANDS), "dtype": "uint16", "nodata": 0}
    stored = {"tiled": True, "blockxsize": tile, "blockysize": tile, "compress": "deflate", "predictor": 2, "zlevel": 1}
    place = {"crs": "EPSG:32632", "transform": Affine(10, 0, 500_000, 0, -10, 5_000_000), "bigtiff": "if_safer"}
    aside = path.with_suffix(".writing.tif")
    with rasterio.open(aside, "w", **profile, **stored, **place) as dataset:
        for index, name in enumerate(BANDS, 1):
            dataset.set_band_description(index, name)
        for top in range(0, side, tile):
            height = min(tile, side - top)
            rows = np.sin(np.arange(top, top + height) / 700)[:, None] * np.cos(np.arange(side) / 900)[None]
            for band in range(len(BANDS)):
                values = 1500 + 300 * band + 800 * rows + rng.integers(0, 200, (height, side), dtype=np.int16)
                values[: max(0, side // 7 - top), : side // 7] = 0
                dataset.write(values.astype(np.uint16), band + 1, window=((top, top + height), (0, side)))
    aside.replace(path)


def save_network(folder: Path) -> None:
    """An untrained network of four bands with a contract."""
    from okavango.models.backbone import create_model
    from okavango.models.preprocess import Normalise, Preprocess, Raster, Resize
    from okavango.zoo.checkpoint import save_checkpoint

    torch.manual_seed(0)
    size = {"patch_size": 14, "min_width": 64, "max_width": 64, "width_step": 64, "min_depth": 2, "max_depth": 2, "head_dim": 32}
    model = create_model("elastic_vit", image_size=56, channels=len(BANDS), **size).eval()
    spec = Raster(
        channels=BANDS,
        sensor="sentinel-2",
        level="L2A",
        units="reflectance",
        scale=(1e-4,),
        size=(56, 56),
        resize=Resize(rule="exact", interpolation="bilinear"),
        normalise=Normalise(rule="standard", mean=(0.2,) * 4, std=(0.1,) * 4, origin="made up"),
    )
    model.preprocess = Preprocess(image=spec)
    save_checkpoint(model, folder)


def command(checkpoint: Path, scene: Path, out: Path, tile: int) -> list[str]:
    return ["embed", str(checkpoint), str(scene), "--out", str(out), "--tile", str(tile), "--batch", "64"]


def run(words: list[str]) -> tuple[float, float]:
    """Seconds on the wall and the greatest resident memory, MiB, of one whole run."""
    began = time.perf_counter()
    process = subprocess.run([sys.executable, "-c", MEASURED, *words], env=environment(), capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"okavango {' '.join(words)} failed: {process.stderr}")
    return time.perf_counter() - began, float(process.stderr.split()[-1])


def run_killed(words: list[str], out: Path, seconds: float) -> int:
    """Run to the end, but kill it each time after so many seconds of embedding; how often that was."""
    kills = 0
    while True:
        process = subprocess.Popen([sys.executable, "-m", "okavango", *words], env=environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while (line := process.stdout.readline()) and "strips are done" not in line:
            pass
        try:
            if process.wait(seconds):
                sys.exit("okavango embed failed")
            return kills
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            if out.exists():  # killed while it tidied up: the map is complete then, which is compared below
                return kills


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE / "candidates")]), "OKAVANGO_OFFLINE": "1"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--tile", type=int, default=200)
    parser.add_argument("--work", type=Path, help="folder for scene and maps, kept; a temporary one by default")
    parser.add_argument("--kills", type=int, default=3, help="about how often the second run is killed")
    parser.add_argument("--out", type=Path, help="a file *.jsonl for the records; a page is drawn beside it")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="scene-") as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        about = {"sensor": "sentinel-2", "level": "L2A", "units": "dn", "baseline": "02.08"}
        (work / "bands.json").write_text(json.dumps(about))
        scene, checkpoint = work / f"scene_{given.side}.tif", work / "checkpoint"
        if not scene.exists():
            write_scene(scene, given.side)
        if not (checkpoint / "config.json").exists():
            save_network(checkpoint)
        shutil.rmtree(work / "whole.tif.partial", ignore_errors=True)
        before = load()
        start, program = run(["zoo", "verify", str(checkpoint)])
        seconds, peak = run(command(checkpoint, scene, work / "whole.tif", given.tile))
        shutil.rmtree(work / "killed.tif.partial", ignore_errors=True)
        (work / "killed.tif").unlink(missing_ok=True)
        words = command(checkpoint, scene, work / "killed.tif", given.tile)
        kills = run_killed(words, work / "killed.tif", max(0.2, (seconds - start) / (given.kills + 1)))
        if not kills or not filecmp.cmp(work / "whole.tif", work / "killed.tif", shallow=False):
            sys.exit(f"killed {kills} times, and the map is not the one of the run that was not")
        if peak - program > LIMIT:
            sys.exit(f"{peak - program:.0f} MiB beyond the model; at most {LIMIT} are promised")
        tiles = (-(-given.side // given.tile)) ** 2
        shared = {"side": given.side, "bands": len(BANDS), "tile": given.tile, "batch": 64, "kills": kills, "equal_bytes": True}
        shared |= {"scene_bytes": scene.stat().st_size, "map_bytes": (work / "whole.tif").stat().st_size}
        facts = {"protocol": "scene/v1", "n": tiles, "loads": (before, load()), "dataset": "a made-up scene", "settings": shared}
        values = {
            "seconds, everything counted": round(seconds, 1),
            "tiles per second, everything counted": round(tiles / seconds, 1),
            "peak memory beyond program and model, MiB": round(peak - program, 1),
            "peak memory, MiB": round(peak, 1),
        }
        records = [speed_record("scene", metric, value, label="okavango embed", **facts) for metric, value in values.items()]
    publish(records, given.out, "A whole scene")


if __name__ == "__main__":
    main()
