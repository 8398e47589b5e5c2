"""Make the Fashion-MNIST sample that ships with the package: WebDataset shards of a stratified subset, equal bytes on every run.

    python -m okavango.samples.build_fashion --source DIR_WITH_IDX_GZ --out okavango/samples/fashion

The first `--train` (`--test`) pictures of each class are taken, in the order of the original files. A picture is one PNG named
``class/original index``; one shard holds at most 5000.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SPLITS = {"train": "train", "test": "t10k"}
PER_SHARD = 5000


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file (LeCun's format: 0, 0, type, dimensions, sizes as big-endian int32, values).

    Raises:
        ValueError: another format or a torn file.
    """
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = np.frombuffer(data, ">i4", data[3], offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != shape.prod():
        raise ValueError(f"{path}: {values.size} values, the header promises {shape.prod()}")
    return values.reshape(shape)


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices of the first `count` samples of each class.

    Raises:
        ValueError: a class has fewer.
    """
    picked = [np.flatnonzero(labels == number)[:count] for number in range(len(CLASSES))]
    if any(len(some) < count for some in picked):
        raise ValueError(f"fewer than {count} pictures in a class; ask for less")
    return np.sort(np.concatenate(picked))


def write_shard(path: Path, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> None:
    """One tar of PNG files, without times, owners or anything else that varies."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index in indices:
            stream = io.BytesIO()
            Image.fromarray(images[index]).save(stream, "PNG", optimize=True)
            member = tarfile.TarInfo(f"{CLASSES[labels[index]]}/{index:05d}.png")
            member.size = stream.tell()
            stream.seek(0)
            archive.addfile(member, stream)


def build(source: Path, out: Path, counts: dict[str, int]) -> dict:
    """Write shards, class names and PROVENANCE.json; returns what the latter holds.

    Args:
        source: folder with the four original ``*-ubyte.gz`` files.
        out: folder to write to.
        counts: split -> pictures per class.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    provenance: dict = {
        "name": "Fashion-MNIST, stratified subset",
        "source": "https://github.com/zalandoresearch/fashion-mnist as packaged by Debian in dataset-fashion-mnist",
        "paper": "Xiao, Rasul, Vollgraf: Fashion-MNIST, arXiv:1708.07747",
        "licence": "MIT, see LICENSE",
        "command": "python -m okavango.samples.build_fashion --source DIR_WITH_IDX_GZ --out DIR "
        + " ".join(f"--{split} {count}" for split, count in counts.items()),
        "changes": "first pictures of each class; stored as PNG, pixels unchanged",
        "originals_sha256": {},
        "shards_sha256": {},
        "splits": {},
    }
    for split, prefix in SPLITS.items():
        files = [source / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
        images, labels = map(read_idx, files)
        indices = first_of_each(labels, counts[split])
        for number, start in enumerate(range(0, len(indices), PER_SHARD)):
            path = out / f"{split}-{number:02d}.tar"
            write_shard(path, images, labels, indices[start : start + PER_SHARD])
            provenance["shards_sha256"][path.name] = _sha256(path)
        provenance["originals_sha256"] |= {file.name: _sha256(file) for file in files}
        provenance["splits"][split] = {
            "samples": len(indices),
            "per_class": dict.fromkeys(CLASSES, counts[split]),
            # the last original index taken of each class; all earlier ones of that class are in
            "last_original_index": {name: int(indices[labels[indices] == k].max()) for k, name in enumerate(CLASSES)},
            "original_indices_sha256": hashlib.sha256(" ".join(map(str, indices)).encode()).hexdigest(),
        }
    (out / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    return provenance


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder with train-images-idx3-ubyte.gz and its three siblings")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1000, help="training pictures per class (default 1000)")
    parser.add_argument("--test", type=int, default=200, help="test pictures per class (default 200)")
    given = parser.parse_args()
    provenance = build(given.source, given.out, {"train": given.train, "test": given.test})
    print(", ".join(f"{name}: {facts['samples']} pictures" for name, facts in provenance["splits"].items()), "->", given.out)


if __name__ == "__main__":
    main()
