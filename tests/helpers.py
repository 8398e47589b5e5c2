"""Small things that several tests need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
