"""Sets of labels for the pictures of a source: several classes to one picture, as land cover often has."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from okavango.data.sources import Source


class LabelSets:
    """A source whose samples have a set of labels each, "label": int64 (L,) of 0 and 1, instead of a class.

    Args:
        source: the pictures.
        sets: id -> names of its labels; every id of the source must be there, others are left alone.
        classes: all L names in their order; what occurs in `sets`, sorted, when left out. Training and test part need the same.
    Raises:
        ValueError: a sample without an entry, or a name that is not in `classes`.

    Example:
        >>> import torch
        >>> from okavango.data.sources import Arrays
        >>> fields = LabelSets(Arrays(torch.zeros(2, 4, 4, 3, dtype=torch.uint8)), {"0": ["maize", "water"], "1": []})
        >>> fields.classes, fields[0]["label"].tolist()
        (('maize', 'water'), [1, 1])
    """

    def __init__(self, source: Source, sets: Mapping[str, Sequence[str]], classes: Sequence[str] = ()):
        ids: Sequence[str] = source.ids  # type: ignore[attr-defined]
        self.source, self.name = source, source.name
        self.classes = tuple(classes) or tuple(sorted({name for names in sets.values() for name in names}))
        column = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.zeros((len(ids), len(self.classes)), np.int64)
        for row, id in enumerate(ids):
            if id not in sets:
                raise ValueError(f"{source.name}: sample {id!r} has no entry among the label sets, not even an empty one")
            for name in sets[id]:
                if name not in column:
                    raise ValueError(f"{source.name}: sample {id!r} has the label {name!r}, which is not among the classes")
                self.labels[row, column[name]] = 1

    @property
    def digest(self) -> str:
        """sha256 of the source's manifest, the names and the sets."""
        hasher = hashlib.sha256(f"{self.source.digest}\t{json.dumps(self.classes)}\n".encode())
        hasher.update(self.labels.tobytes())
        return hasher.hexdigest()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.source[index], "label": self.labels[index]}


def read_label_sets(path: str | os.PathLike) -> dict[str, list[str]]:
    """A JSON object of {id: [names]}.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no JSON ({error})") from None
    fits = isinstance(found, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in found.values()
    )
    if not fits:
        raise ValueError(f"{path}: expected an object of lists of names, {{id: [label, ...]}}")
    return found
