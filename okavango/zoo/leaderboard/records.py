"""One measured result with its provenance. Tables and pages are rendered from records; numbers are never typed.

A file of records holds one JSON object a line. Torch is not imported here.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1
PACKAGES = ("okavango", "torch", "torchvision", "timm", "numpy", "faiss-cpu", "scikit-learn")


class RecordError(ValueError):
    """A record that this version cannot read or that contradicts itself."""


class RecordWarning(UserWarning):
    """A line that was skipped because its write was cut short."""


def now() -> str:
    """The present, UTC, as ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One number and what is needed to trust or repeat it.

    Attributes:
        model: checkpoint or architecture, e.g. "elastic_vit_tiny.poa_fashion".
        dataset: name of the source; protocol: with its version, e.g. "knn/v1"; metric: e.g. "accuracy".
        value: accuracies and other shares are fractions, 0..1.
        n: samples that were measured.
        subnet: e.g. "w192_d8"; "" for the intact network.
        baseline: what stands behind the number: "pretrained", "untrained", "raw pixels", ...
        interval: lower and upper end of the 95 % bootstrap interval, in the units of the value.
        parameters: of the network that was measured; latency_ms: milliseconds per sample on `hardware`. None when not known.
        weights_sha256: of the weights file; train_manifest_sha256, test_manifest_sha256: `digest` of the sources.
        seed: of everything that was drawn.
        settings: of the protocol, fit for JSON; versions, hardware: see `environment`; command: that repeats the measurement.
        created: UTC, ISO 8601.
        label: short name for tables, "" to use the model's; notes: free text.
    """

    model: str
    dataset: str
    protocol: str
    metric: str
    value: float
    n: int
    subnet: str = ""
    baseline: str = "pretrained"
    interval: tuple[float, float] | None = None
    parameters: int | None = None
    latency_ms: float | None = None
    weights_sha256: str = ""
    train_manifest_sha256: str = ""
    test_manifest_sha256: str = ""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    created: str = field(default_factory=now)
    label: str = ""
    notes: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        where = f"record of {self.model!r} on {self.dataset!r}"
        if self.format_version != FORMAT_VERSION:
            raise RecordError(
                f"{where}: format_version {self.format_version!r}; this version reads {FORMAT_VERSION}, upgrade okavango"
            )
        for name in ("model", "dataset", "protocol", "metric"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise RecordError(f"{where}: {name} is {getattr(self, name)!r}; expected a name")
        if not _is_number(self.value):
            raise RecordError(f"{where}: value is {self.value!r}; expected a finite number")
        if not isinstance(self.n, int) or self.n < 1:
            raise RecordError(f"{where}: n is {self.n!r}; expected the number of samples, at least 1")
        for name in ("parameters", "latency_ms"):
            number = getattr(self, name)
            if number is not None and not (_is_number(number) and number >= 0):
                raise RecordError(f"{where}: {name} is {number!r}; expected a number of at least 0, or null")
        if self.interval is not None:
            object.__setattr__(self, "interval", tuple(self.interval))
            if len(self.interval) != 2 or not all(map(_is_number, self.interval)) or self.interval[0] > self.interval[1]:
                raise RecordError(f"{where}: interval is {self.interval!r}; expected (low, high)")

    @property
    def name(self) -> str:
        """The label, or the model where there is none."""
        return self.label or self.model

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values, `format_version` first."""
        return {"format_version": self.format_version, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Any, where: str = "record") -> Record:
        """Read what `to_json` wrote.

        Raises:
            RecordError: another format version, an unknown or a missing field, or a value out of range.
        """
        if not isinstance(data, dict):
            raise RecordError(f"{where}: expected a JSON object, got {type(data).__name__}")
        if data.get("format_version") != FORMAT_VERSION:
            found = data.get("format_version")
            raise RecordError(f"{where}: format_version {found!r}; this version reads {FORMAT_VERSION}, upgrade okavango")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in data:
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                raise RecordError(f"{where}: unknown field {key!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        for key, f in fields.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and key not in data:
                raise RecordError(f"{where}: field {key!r} is missing")
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise RecordError(f"{where}: {error}") from None


def write_record(path: str | os.PathLike, record: Record) -> None:
    """Append one line, in a single write that is on the disk when this returns. Folders are made.

    A last line that an earlier write left unfinished is closed first, so that it cannot swallow this one.

    Raises:
        RecordError: the settings hold what JSON cannot.
        OSError: the line could not be written whole, e.g. on a full disk.
    """
    path = Path(path)
    try:
        line = json.dumps(record.to_json(), allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise RecordError(
            f"record of {record.model!r}: {error}; settings, versions and hardware must be plain JSON values"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(handle, line) != len(line):
            raise OSError(f"{path}: the record was written in part only; is the disk full?")
        os.fsync(handle)
    finally:
        os.close(handle)


def read_records(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Record]:
    """All records of one or several files, in order.

    A line that is not whole (its write was cut short) is skipped and named in a `RecordWarning`.

    Raises:
        RecordError: unknown format version, unknown or missing fields; the message names file and line.
        FileNotFoundError: there is no such file.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    records = []
    for path in map(Path, paths):
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
            except ValueError:
                warnings.warn(f"{path}:{number}: the line is cut short and was skipped", RecordWarning, stacklevel=2)
                continue
            records.append(Record.from_json(data, f"{path}:{number}"))
    return records


def published_file(name: str) -> Path:
    """The file of records that holds the tables of a publication; see the notes of its records for what it was made of.

    Raises:
        ValueError: there is no such file; the message lists those that there are.
    """
    folder = Path(__file__).parent / "published"
    known = sorted(path.stem for path in folder.glob("*.jsonl"))
    if name not in known:
        raise ValueError(f"no published tables {name!r}; there are {', '.join(known)}")
    return folder / f"{name}.jsonl"


def bootstrap(correct: np.ndarray, seed: int, rounds: int = 1000) -> tuple[float, float]:
    """95 % percentile interval of the mean, by resampling (Efron 1979).

    Args:
        correct: bool or float (N,).
        seed: of the resampling; rounds: number of resamples.
    Returns:
        (low, high).
    Raises:
        ValueError: not one-dimensional, or empty.
    """
    low, high = np.quantile(_resampled_means(np.asarray(correct), seed, rounds), (0.025, 0.975))
    return float(low), float(high)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, seed: int, rounds: int = 1000) -> tuple[float, float, float]:
    """How much better `a` is than `b` on the same samples.

    Args:
        a, b: bool or float (N,), the same samples in the same order.
    Returns:
        (mean of a - mean of b, low, high), the interval of 95 %; it excludes 0 where the difference is not chance.
    Raises:
        ValueError: shapes that differ, not one-dimensional, or empty.
    """
    if np.shape(a) != np.shape(b):
        raise ValueError(f"paired bootstrap: {np.shape(a)} and {np.shape(b)} results; both must be of the same samples")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    low, high = np.quantile(_resampled_means(difference, seed, rounds), (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def environment() -> tuple[dict[str, str], dict[str, Any]]:
    """What this process runs on.

    Returns:
        versions: of Python and of those of `PACKAGES` that are installed.
        hardware: "cpu" (model name), "cores", "threads" (of torch, if imported), "system", "accelerator" where there is one.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            module = sys.modules.get(package)  # imported from a checkout
            if getattr(module, "__version__", None):
                versions[package] = str(module.__version__)  # type: ignore[union-attr]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    hardware: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": cores,
        "system": f"{platform.system()} {platform.machine()}",
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        hardware["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            hardware["accelerator"] = torch.cuda.get_device_name()
    return versions, hardware


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _resampled_means(values: np.ndarray, seed: int, rounds: int) -> np.ndarray:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap: results of shape {values.shape}; expected (N,) with at least one")
    rng = np.random.default_rng(seed)
    return np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(rounds)])


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
