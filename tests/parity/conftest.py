"""Where recorded references lie, and the report of what was compared with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(os.environ.get("OKAVANGO_PARITY", Path(__file__).parent))


class Fixture:
    """One recorded file and what the tests said of each of its tensors."""

    def __init__(self, family: str, name: str, report: dict):
        folder = ROOT / family
        self.tensors = load_file(folder / f"{name}.safetensors")
        self.folder = (folder / name).parent
        entry = report.setdefault(family, {}).setdefault(name, {"compared": {}, "left_out": {}})
        self.compared, self.left_out = entry["compared"], entry["left_out"]

    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "state_dict.safetensors")

    def input(self, key: str) -> torch.Tensor:
        self.left_out.setdefault(key, "input")
        return self.tensors[key]

    def compare(self, key: str, ours: torch.Tensor, tolerance: float) -> None:
        theirs, ours = self.tensors[key], ours.detach()
        assert tuple(ours.shape) == tuple(theirs.shape), f"{key}: {tuple(ours.shape)}, recorded {tuple(theirs.shape)}"
        error = float((ours.double() - theirs.double()).abs().max()) if theirs.numel() else 0.0
        scale = max(1.0, float(theirs.double().abs().max())) if theirs.numel() else 1.0
        self.compared[key] = error
        assert error <= tolerance * scale, f"{key}: differs by {error:.2e}, values up to {scale:.2e}"

    def finish(self) -> None:
        silent = set(self.tensors) - set(self.compared) - set(self.left_out)
        assert not silent, f"never looked at: {sorted(silent)[:5]}"


@pytest.fixture(scope="session")
def parity_root():
    """The folder with a folder per family, for tables that are not tensors."""
    return ROOT


@pytest.fixture(scope="session")
def report():
    entries: dict = {}
    yield entries
    for fixture in (fixture for family in entries.values() for fixture in family.values()):
        for key in set(fixture["left_out"]) & set(fixture["compared"]):  # one test compares it, another only uses the file
            del fixture["left_out"][key]
    if path := os.environ.get("OKAVANGO_PARITY_REPORT"):
        Path(path).write_text(json.dumps(entries, indent=1))


@pytest.fixture
def recorded(report):
    """Call with family and file (without suffix); afterwards every tensor must have been compared or named."""
    opened = []

    def open_fixture(family: str, name: str) -> Fixture:
        opened.append(Fixture(family, name, report))
        return opened[-1]

    yield open_fixture
    for fixture in opened:
        fixture.finish()
