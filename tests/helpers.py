"""Small things that several tests need."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
TINY = ["pretrain", "poa_tiny", "--steps", "12", "--batch", "8", "--save-every", "3", "--threads", "1"]


def environ() -> dict[str, str]:
    """The environment of a command that a test starts."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "OKAVANGO_OFFLINE": "1"}


def command(*arguments: object, processes: int = 1) -> list[str]:
    """`python -m okavango ...`, or the same under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, "-m", "okavango", *map(str, arguments)]


def run(*arguments: object, processes: int = 1, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a command to its end and return what it printed."""
    done = subprocess.run(
        command(*arguments, processes=processes), env=environ(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def weights(out: Path) -> dict[str, bytes]:
    """Every tensor of a finished run, as bytes."""
    return {
        f"{folder}/{name}": tensor.numpy().tobytes()
        for folder in ("export", "export-full")
        for name, tensor in load_file(out / folder / "model.safetensors").items()
    }


def land_cover(centres: Sequence[float], rng: np.random.Generator, count: int, shares: Sequence[float] | None = None) -> np.ndarray:
    """Reflectances (count, C) of pixels that mix soil, plants, water and roofs, with shade and haze, at wavelengths in nm.

    Bands of such pixels correlate as those of real scenes do. `shares` are the four parameters of a Dirichlet distribution.
    """
    curves = (
        ((440, 1600, 2200), (0.06, 0.38, 0.34)),
        (
            (440, 490, 560, 665, 705, 740, 783, 865, 945, 1375, 1610, 2200),
            (0.03, 0.03, 0.07, 0.03, 0.1, 0.28, 0.36, 0.38, 0.37, 0.05, 0.2, 0.09),
        ),
        ((440, 560, 705, 865, 2200), (0.07, 0.05, 0.02, 0.01, 0.005)),
        ((440, 865, 2200), (0.16, 0.24, 0.25)),
    )
    pure = np.stack([np.interp(centres, *curve) for curve in curves])
    mixed = rng.dirichlet(rng.uniform(0.3, 1.5, 4) if shares is None else shares, count) @ pure
    haze = 0.02 * rng.normal(size=(count, 1)) * np.exp(-(np.asarray(centres) - 440) / 250)
    return mixed * (1 + 0.15 * rng.normal(size=(count, 1))) + 0.006 * rng.normal(size=mixed.shape) + haze
