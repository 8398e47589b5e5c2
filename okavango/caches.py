"""What is kept on disk to be faster the next time: where it lies, how large it is, when it was last used, and how it goes away.

Fetched checkpoints lie under `home`, in ``web/`` and ``hf/``. All other caches lie where their user wants them; ``known/`` holds a
note of each such folder, which a run keeps locked while it uses the folder. Only files that bear the names that we give are ever
counted or removed, so a folder that holds a user's own files too keeps those. A removed file is made or fetched again when it is
needed. Torch is not imported here.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = {
    "web": "checkpoints fetched by their address",
    "hf": "checkpoints fetched from Hugging Face",
    "features": "features and results of `leaderboard study`",
    "studies": "prepared studies, --objective.cache",
    "descriptors": "descriptors of `evaluate --report` under a retrieval protocol",
}
RECENT = 600  # seconds; a checkpoint that was fetched or opened so lately may be being read
# Names of our files in folders of a user's choice; what is being written has a process number before or after its name.
_NAMES = {
    "features": r"\.?[0-9a-f]{64}\.(safetensors|npy)(\.\d+)?",
    "studies": r"(\.\d+-)?[0-9a-f]{32}\.safetensors",
    "descriptors": r"\.?(store\.json|(global|local|keys)-\d{5}\.npy)(\.\d+)?",
}


@dataclass(frozen=True)
class Item:
    """What can be removed by itself: a checkpoint, a store of descriptors, a file of another cache.

    Attributes:
        kind: of `KINDS`.
        folder: what it is listed under.
        paths: files, or a folder that is ours as a whole.
        bytes: on the disk.
        used: when it was last used, seconds since the epoch.
        note: file of ``known/`` that is locked by runs that use it, or None.
    """

    kind: str
    folder: Path
    paths: tuple[Path, ...]
    bytes: int
    used: float
    note: Path | None = None


def home() -> Path:
    """``OKAVANGO_HOME``, or okavango in the user's cache folder."""
    if os.environ.get("OKAVANGO_HOME"):
        return Path(os.environ["OKAVANGO_HOME"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "okavango"


# -- for those who have a cache -----------------------------------------------------------------------------------------------


def hold(folder: str | os.PathLike, kind: str) -> Callable[[], None]:
    """Note where a cache lies, and keep it from being cleaned.

    Args:
        kind: of `KINDS`, one whose folder the user chooses.
    Returns:
        what lets it go; the end of the process does so too. Where `home` cannot be written nothing is noted, and nobody cleans.
    """
    where = Path(folder).expanduser().resolve()
    note = home() / "known" / f"{hashlib.sha256(f'{kind} {where}'.encode()).hexdigest()[:32]}.json"
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(note, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return lambda: None
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for one who is cleaning
    os.pwrite(descriptor, json.dumps({"kind": kind, "path": str(where)}).encode(), 0)

    def let_go() -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # for processes that were forked from this one as well
        os.close(descriptor)

    return let_go


@functools.cache
def hold_for_good(folder: str | os.PathLike, kind: str) -> None:
    """`hold` as long as this process lives."""
    hold(folder, kind)


@contextlib.contextmanager
def used(folder: str | os.PathLike, kind: str) -> Iterator[None]:
    """`hold` as long as this lasts."""
    let_go = hold(folder, kind)
    try:
        yield
    finally:
        let_go()


def touch(path: Path) -> None:
    """Note that a file was used, in its time of access; when it was written stays as it is."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


# -- for those who look after them ----------------------------------------------------------------------------------------------


def find(kind: str = "") -> list[Item]:
    """All that is cached, or all of a kind.

    Raises:
        ValueError: there is no such kind.
    """
    if kind and kind not in KINDS:
        raise ValueError(f"unknown kind of cache {kind!r}; expected one of {', '.join(KINDS)}")
    found = [item for item in (*_fetched(), *_noted()) if kind in ("", item.kind)]
    return sorted(found, key=lambda item: (list(KINDS).index(item.kind), item.folder, item.used))


def clean(
    kind: str = "", *, older: float = 0.0, max_gb: float | None = None, say: Callable[[str], None] = print
) -> tuple[int, int]:
    """Remove what was not used for long, or the least recently used of too much, or, when neither is asked for, everything.

    What a run is using stays, and is said; see `RECENT` for fetched checkpoints.

    Args:
        kind: of `KINDS`, "" for all.
        older: days since the last use.
        max_gb: 10^9 bytes that may stay, of this kind or of all.
    Returns:
        bytes that were removed and that stay.
    Raises:
        ValueError: there is no such kind, or a number below 0.
    """
    for option, value in (("--older", older), ("--max-gb", max_gb)):
        if value is not None and value < 0:
            raise ValueError(f"{option} {value:g}: expected at least 0")
    items = sorted(find(kind), key=lambda item: item.used)
    stays, now = sum(item.bytes for item in items), time.time()
    everything = not older and max_gb is None
    doomed: dict[tuple[Path, Path | None], list[Item]] = {}
    left = stays
    for item in items:
        if everything or (older and now - item.used > older * 86400) or (max_gb is not None and left > max_gb * 1e9):
            doomed.setdefault((item.folder, item.note), []).append(item)
            left -= item.bytes
    removed = 0
    for (folder, note), some in doomed.items():
        with _alone(some[0], now) as free:
            if not free:
                say(f"{folder}: in use, left alone")
                continue
            for path in [path for item in some for path in item.paths]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            size = sum(item.bytes for item in some)
            if note is not None and not any(item.folder == folder for item in _noted()):
                note.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # holds something else
                    folder.rmdir()
            removed += size
            say(f"{folder}: removed {some[0].kind}, {size / 1e6:,.1f} MB")
    return removed, stays - removed


def _fetched() -> Iterator[Item]:
    """Checkpoints, whole or in part, each in a folder that is ours."""
    for kind, pattern in (("web", "*"), ("hf", "models--*")):
        for folder in filter(Path.is_dir, (home() / kind).glob(pattern)):
            files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
            yield Item(kind, folder, (folder,), *_facts(files or [folder]))


def _noted() -> Iterator[Item]:
    for note in (home() / "known").glob("*.json"):
        try:
            about = json.loads(note.read_text(encoding="utf-8"))
            kind, folder = about["kind"], Path(about["path"])
            names = [name for name in os.listdir(folder) if re.fullmatch(_NAMES[kind], name)]
        except (OSError, ValueError, KeyError, TypeError):  # a folder that is gone, or no note
            continue
        paths = [folder / name for name in sorted(names)]
        units = ([paths] if paths else []) if kind == "descriptors" else [[path] for path in paths]
        for unit in units:
            yield Item(kind, folder, tuple(unit), *_facts(unit), note)


def _facts(paths: Sequence[Path]) -> tuple[int, float]:
    """Bytes and the last use."""
    stats = [path.stat() for path in paths if path.exists()]
    return sum(stat.st_size for stat in stats), max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=0.0)


@contextlib.contextmanager
def _alone(item: Item, now: float) -> Iterator[bool]:
    """Whether nobody uses an item, nor can begin to as long as this lasts."""
    if item.note is None:
        yield now - item.used > RECENT
        return
    descriptor = os.open(item.note, os.O_RDWR | os.O_CREAT)  # another one who cleans may have removed it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)
