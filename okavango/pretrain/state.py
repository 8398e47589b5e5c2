"""States of a run on disk: written aside, checked by a manifest, renamed when complete; and the lock and log of a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from okavango.files import write_json
from okavango.zoo.checkpoint import sha256_now, sync

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class StateError(RuntimeError):
    """A state or a run folder cannot be used; one line that says why and what to do."""


@dataclass(frozen=True)
class State:
    """A complete state: its folder, the number of optimiser steps done, and what else was noted."""

    folder: Path
    step: int
    meta: dict

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part ("objective", "optimiser", "ema", "best"), on the CPU."""
        return load_file(self.folder / f"{part}.safetensors")


def save_state(root: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], meta: dict, keep: int = 2) -> Path:
    """Write ``root/step-NNNNNNNN`` and drop all but the newest `keep` states.

    The folder gets its name only when every file in it is on the disk and listed with its hash, so a state that exists by name is
    complete; a crash leaves at most a folder that starts with a dot, which the next save removes.

    Raises:
        StateError: the disk is full or refuses; what was there before stays.
    """
    final = root / f"step-{step:08d}"
    aside = root / f".{final.name}.writing"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".step-*"):
            shutil.rmtree(leftover)
        aside.mkdir()
        for part, tensors in parts.items():
            # safetensors keeps one copy per tensor, so views of shared memory are written out
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside / f"{part}.safetensors")
        write_json(aside / "meta.json", {"format_version": FORMAT_VERSION, "step": step, **meta})
        files = sorted(path for path in aside.iterdir())
        for path in files:
            path.chmod(0o644)  # safetensors makes files that only their owner can read
            sync(path)
        write_json(aside / MANIFEST, {path.name: {"sha256": sha256_now(path), "bytes": path.stat().st_size} for path in files})
        if final.exists():
            shutil.rmtree(final)
        aside.replace(final)
        sync(root)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StateError(f"could not write the state of step {step} to {root}: {error}; free some space and start again") from error
    for old in states(root)[:-keep]:
        shutil.rmtree(old)
    return final


def states(root: Path) -> list[Path]:
    """Folders of states, oldest first, complete or not."""
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def check_state(folder: Path) -> str:
    """What is wrong with a state, "" when nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, entry in manifest.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if sha256_now(path) != entry["sha256"]:
                return f"{name} does not match its sha256"
        version = json.loads((folder / "meta.json").read_text())["format_version"]
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    if version > FORMAT_VERSION:
        return f"format {version} is newer than this okavango reads ({FORMAT_VERSION})"
    return ""


def latest_state(root: Path) -> tuple[State | None, list[str]]:
    """The newest state that is intact, and one line for each newer one that is not."""
    problems = []
    for folder in reversed(states(root)):
        if wrong := check_state(folder):
            problems.append(f"{folder.name} is damaged ({wrong}); the one before is used")
            continue
        meta = json.loads((folder / "meta.json").read_text())
        return State(folder, meta["step"], meta), problems
    return None, problems


def cut_log(path: Path, step: int) -> None:
    """Drop lines of a JSON-lines log that belong to steps from `step` on, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line).get("step", -1) < step:
                kept.append(line + "\n")
    aside = path.with_name(f".{path.name}.cut")
    aside.write_text("".join(kept))
    aside.replace(path)


@contextlib.contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold the run folder alone; processes forked from this one do not hold it.

    Raises:
        StateError: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(descriptor, 20).decode().strip() or "unknown"
        os.close(descriptor)
        raise StateError(f"{out} is in use by process {holder}; wait for it or choose another --out") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    held = True

    def release_in_child() -> None:
        if held:  # a forked loader must not keep the lock alive after this process is killed
            os.close(descriptor)

    os.register_at_fork(after_in_child=release_in_child)
    try:
        yield
    finally:
        held = False
        os.close(descriptor)
