"""Descriptors on disk, found again by the content of their pictures. A pass that is stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from okavango.files import write_whole

FORMAT_VERSION = 1
KEY = 16  # bytes of a picture's digest
SEGMENT = 2**26  # bytes that are held before they are written


def content_key(image: Tensor) -> bytes:
    """Digest of a picture's pixels: the same for copies under other names, another for any other picture.

    Args:
        image: uint8 (C, H, W).
    """
    hasher = hashlib.blake2b(repr(tuple(image.shape)).encode(), digest_size=KEY)
    hasher.update(image.contiguous().numpy().data)
    return hasher.digest()


class DescriptorStore:
    """Global descriptors in float32 and local ones in float16, in memory-mapped files that only grow.

    A segment is three files: ``global-N.npy`` (n, D), ``local-N.npy`` (n, H, W, C) where there are local ones, and ``keys-N.npy``
    (n, 16), which is written last: a segment without it does not count and is written anew. Memory holds the keys and one segment.

    Args:
        folder: made where it is missing.
        describer: what the descriptors depend on, see `okavango.downstream.retrieval.describe`; a folder serves one.
    Raises:
        ValueError: the folder holds descriptors of another model, or something else.
    """

    def __init__(self, folder: str | os.PathLike, describer: str):
        self.folder, self.describer = Path(folder), describer
        self.folder.mkdir(parents=True, exist_ok=True)
        about, wanted = self.folder / "store.json", {"format_version": FORMAT_VERSION, "describer": describer}
        if not about.exists():
            if any(self.folder.iterdir()):
                raise ValueError(f"{self.folder}: not empty, and no store of descriptors; name another folder")
            write_whole(about, lambda file: file.write(json.dumps(wanted).encode()))
        found = json.loads(about.read_text())
        if found != wanted:
            raise ValueError(
                f"{self.folder}: holds descriptors of another model, input or version ({found.get('describer', '?')[:16]}, not "
                f"{describer[:16]}); name another folder"
            )
        self.segments: list[tuple[np.ndarray, np.ndarray | None]] = []
        self.rows: dict[bytes, tuple[int, int]] = {}
        while (self.folder / f"keys-{len(self.segments):05d}.npy").exists():
            self._open()
        self._held: dict[bytes, tuple[np.ndarray, np.ndarray | None]] = {}

    def __len__(self) -> int:
        return len(self.rows) + len(self._held)

    def __contains__(self, key: bytes) -> bool:
        return key in self.rows or key in self._held

    def add(self, keys: list[bytes], pooled: Tensor, local: Tensor | None) -> None:
        """Keep descriptors of new pictures: (B, D), and (B, H, W, C) or None."""
        for position, key in enumerate(keys):
            if key not in self:
                one = None if local is None else local[position].half().cpu().numpy()
                self._held[key] = (pooled[position].float().cpu().numpy(), one)
        first, one = next(iter(self._held.values()), (np.empty(0), None))
        if len(self._held) * (first.nbytes + (0 if one is None else one.nbytes)) >= SEGMENT:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self._held:
            return
        number = len(self.segments)
        pooled, local = zip(*self._held.values(), strict=True)
        arrays = {"global": np.stack(pooled), "keys": np.stack([np.frombuffer(key, np.uint8) for key in self._held])}
        if local[0] is not None:
            arrays = {"local": np.stack(local), **arrays}
        for name, array in arrays.items():
            write_whole(self.folder / f"{name}-{number:05d}.npy", partial(np.save, arr=array))
        self._held = {}
        self._open()

    def _open(self) -> None:
        number = len(self.segments)
        keys = np.load(self.folder / f"keys-{number:05d}.npy", allow_pickle=False)
        local = self.folder / f"local-{number:05d}.npy"
        maps = np.load(local, mmap_mode="r", allow_pickle=False) if local.exists() else None
        self.segments.append((np.load(self.folder / f"global-{number:05d}.npy", mmap_mode="r", allow_pickle=False), maps))
        self.rows |= {key.tobytes(): (number, row) for row, key in enumerate(keys)}

    def pooled(self, keys: list[bytes]) -> np.ndarray:
        """Global descriptors, float32 (n, D), of pictures that were written."""
        return np.stack([self.segments[segment][0][row] for segment, row in map(self.rows.__getitem__, keys)])

    def local(self, keys: list[bytes]) -> Tensor:
        """Local descriptors, float32 (n, H, W, C), of pictures that were written.

        Raises:
            ValueError: the model has none.
        """
        found = []
        for segment, row in map(self.rows.__getitem__, keys):
            maps = self.segments[segment][1]
            if maps is None:
                raise ValueError("this model has no local descriptors, so nothing can be re-ranked by them")
            found.append(maps[row])
        return torch.from_numpy(np.stack(found)).float()

    @property
    def bytes_each(self) -> dict[str, int]:
        """Bytes per picture: "global" and "local"."""
        pooled, local = self.segments[0] if self.segments else (None, None)
        return {name: 0 if array is None else array[0].nbytes for name, array in (("global", pooled), ("local", local))}
