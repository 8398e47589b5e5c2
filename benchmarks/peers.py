"""Our DINOv2 beside LightlyTrain's, stable-pretraining's and one composed of timm and PyTorch: one step, and whole runs.

    python benchmarks/peers.py step --lightly PYTHON [--precision bf16] [--out FILE.jsonl]
    python benchmarks/peers.py whole --lightly PYTHON --stable PYTHON [--pictures 20000] [--out FILE.jsonl]

PYTHON is the interpreter of a virtual environment that holds the peer (see README.md); a peer without one is left out. Every run is
a process of its own; the scripts that they run are in candidates/. Candidates take turns, in an order that turns round.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import load, publish, speed_record
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from okavango.zoo.leaderboard.records import Record

HERE = Path(__file__).parent
CANDIDATES = {"okavango": "run_okavango.py", "timm": "run_timm.py", "lightly": "run_lightly.py", "stable": "run_stable.py"}
SAME = (
    "backbone, drop path, one head for classes and patches, prototypes, Sinkhorn with 3 rounds, iBOT, KoLeo, AdamW with layer-wise "
    "rates, clipping, teacher's average, sizes and numbers of crops, share of hidden patches, threads, workers"
)
EQUAL = {
    "okavango": f"measured here: {SAME}",
    "timm": f"as ours: {SAME}; crops are random tensors, hidden patches are single ones, drop path computes what it drops (timm's)",
    "lightly": f"as ours, by its settings: {SAME}; schedules differ, which costs nothing; it logs and profiles in its own way",
    "stable": "as ours: backbone, sizes and numbers of crops, Sinkhorn, AdamW, threads, workers; cannot be set: two heads, each as "
    "wide as our one, all patches go through the head, 0.3 of the patches of all crops are hidden, no KoLeo, no clipping; timm's "
    "drop path, whose rate rises over the blocks",
}

# What every candidate is given: ViT-S/14, the smallest backbone that LightlyTrain's DINOv2 takes.
STEP = {
    "width": 384,
    "depth": 12,
    "patch": 14,
    "global_size": 112,
    "local_size": 56,
    "locals": 8,
    "batch": 8,
    "prototypes": 4096,
    "hidden": 2048,
    "bottleneck": 256,
    "drop_path": 0.3,
    "precision": "fp32",
    "workers": 1,
    "threads": 1,
    "seed": 0,
    "save_every": 10**6,
}
# whole runs: small crops of few kinds, so that the step does not hide everything else
WHOLE = {**STEP, "global_size": 56, "local_size": 28, "locals": 2, "batch": 16, "prototypes": 1024, "hidden": 512}


def write_pictures(folder: Path, count: int, side: int = 256, different: int = 256) -> None:
    """JPEGs of smooth random colours; beyond `different` of them, the same contents in files of their own."""
    generator = torch.Generator().manual_seed(0)
    contents = []
    for _ in range(min(count, different)):
        rough = torch.rand(3, 16, 16, generator=generator)
        pixels = TF.resize(rough, [side, side], InterpolationMode.BICUBIC).clamp(0, 1).mul(255).to(torch.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(contents[number % len(contents)])


def run(python: str, script: str, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """One candidate's process from start to end.

    Returns:
        what its clock noted (see candidates/clock.py), with its "crops" if it kept them; "started" and "ended" in seconds since the
        epoch; "processor", the processor time of the process with all its workers.
    Raises:
        SystemExit: it failed; shows the end of what it wrote.
    """
    work = work / f"{Path(script).stem}-{time.monotonic_ns()}"
    work.mkdir()
    own = {"out": str(work / "run"), "notes": str(work / "notes.json")}
    quiet = {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1", "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
    path = {"PYTHONPATH": str(HERE.parent)} if python == sys.executable else {}
    with open(work / "output.txt", "wb") as output:
        started = time.time()
        process = subprocess.Popen(
            [os.path.abspath(python), str(HERE / "candidates" / script), json.dumps({**settings, **own})],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=work,
            env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **quiet, **path},
        )
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.time()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{script} failed:\n{(work / 'output.txt').read_text(errors='replace')[-3000:]}")
    notes = json.loads((work / "notes.json").read_text())
    if (work / "crops.npz").exists():
        notes["crops"] = dict(np.load(work / "crops.npz"))
    shutil.rmtree(work)
    return {**notes, "started": started, "ended": ended, "processor": usage.ru_utime + usage.ru_stime}


def step(given: argparse.Namespace, work: Path) -> list[Record]:
    """Processor time of the training process from step to step; crops are made by a worker, which is not counted."""
    settings = {**STEP, **{name: getattr(given, name) for name in ("steps", "batch", "precision")}, "data": str(work / "data")}
    settings["epochs"] = 1
    write_pictures(work / "data", settings["steps"] * settings["batch"])
    notes, loads = rounds({name: CANDIDATES[name] for name in ("okavango", "timm", "lightly")}, settings, given, work)
    seconds = {
        name: [later[1] - before[1] for one in runs for before, later in zip(one["steps"][1:], one["steps"][2:], strict=False)]
        for name, runs in notes.items()
    }
    records = []
    for name, runs in notes.items():
        facts = {"n": len(seconds[name]) * settings["batch"], "protocol": "dinov2_step/v1", "loads": loads, "times": seconds}
        facts["dataset"] = "JPEGs of random colours"
        shared = {**settings, "data": "", "equal": EQUAL[name], "trained_parameters": runs[0]["trained"]}
        ours = f"{median(seconds[name]) / median(seconds['okavango']):.2f} times ours"
        records += [
            speed_record("dinov2", metric, round(value, 3), baseline=name, settings=shared, label=name, notes=note, **facts)
            for metric, value, note in (
                ("seconds of processor per step", median(seconds[name]), ours),
                ("peak memory of the training process, MiB", max(one["peak_mib"] for one in runs), ""),
            )
        ]
    return records


def whole(given: argparse.Namespace, work: Path) -> list[Record]:
    """Runs from the start of the process to its end, with everything: start, reading, steps, checkpoints, export."""
    records = []
    for count in given.pictures:
        settings = {**WHOLE, "steps": given.steps, "precision": given.precision, "data": str(work / f"data{count}")}
        settings |= {"save_every": max(1, given.steps // 2), "epochs": -(-given.steps * WHOLE["batch"] // count)}
        write_pictures(work / f"data{count}", count)
        notes, loads = rounds({name: CANDIDATES[name] for name in ("okavango", "lightly", "stable")}, settings, given, work)
        pictures = settings["steps"] * settings["batch"]
        took = {name: [one["ended"] - one["started"] for one in runs] for name, runs in notes.items()}
        for name, runs in notes.items():
            facts = {"n": pictures, "protocol": f"dinov2_run_{count}/v1", "loads": loads, "times": took, "baseline": name}
            facts["dataset"] = f"{count} JPEGs of random colours"
            shared = {**settings, "data": "", "equal": EQUAL[name]}
            values = {
                "pictures per second, everything counted": pictures / median(took[name]),
                "pictures per second of processor": pictures / median(one["processor"] for one in runs),
                "seconds to the first step": median(one["steps"][0][0] - one["started"] for one in runs),
                "share of time in checkpoints": median(one["checkpoints"] / (one["ended"] - one["started"]) for one in runs),
            }
            records += [
                speed_record("dinov2", metric, round(value, 4), settings=shared, label=name, **facts)
                for metric, value in values.items()
            ]
    return records


def rounds(
    candidates: dict[str, str], settings: dict[str, Any], given: argparse.Namespace, work: Path
) -> tuple[dict[str, list[dict]], tuple[float, float]]:
    """What the runs of every candidate noted, in turns, and the load before and after."""
    pythons = {"okavango": sys.executable, "timm": sys.executable, "lightly": given.lightly, "stable": given.stable}
    names, before = [name for name in candidates if pythons[name]], load()
    notes: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(given.rounds):
        for name in names[:: 1 if turn % 2 else -1]:
            notes[name].append(run(pythons[name], candidates[name], settings, work))
            print(f"round {turn + 1} of {given.rounds}: {name}", flush=True)
    return notes, (before, load())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("step", "whole"))
    parser.add_argument("--lightly", metavar="PYTHON", help="interpreter of LightlyTrain's environment")
    parser.add_argument("--stable", metavar="PYTHON", help="interpreter of stable-pretraining's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=STEP["batch"], help="of the step; whole runs take 16")
    parser.add_argument("--pictures", type=int, nargs="+", default=[256], help="JPEGs of a whole run, e.g. 256 20000")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, help="a file *.jsonl for the records; a page is drawn beside it")
    given = parser.parse_args(arguments)
    if given.what == "step" and given.steps < 3:
        parser.error("--steps: expected at least 3, of which the first two warm up")
    with tempfile.TemporaryDirectory(prefix="peers-") as work:
        records = {"step": step, "whole": whole}[given.what](given, Path(work))
    publish(records, given.out, {"step": "One DINOv2 step", "whole": "DINOv2 runs from start to end"}[given.what])


if __name__ == "__main__":
    main()
