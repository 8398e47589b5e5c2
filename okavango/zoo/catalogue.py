"""The list of published weights and of all architectures. Importing it does not import torch.

A new checkpoint is one `Entry` here. What the packaged ones say of themselves (hash, size, licence, input) is read from their own
`config.json` and card, never typed twice.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
PERMISSIVE = ("mit", "apache-2.0", "bsd-*", "cc0-1.0", "cc-by-4.0")
LIBRARIES = ("timm", "torchvision", "open_clip")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One published checkpoint.

    Attributes:
        architecture: name that `create_model` knows; tag: what distinguishes this checkpoint, e.g. "poa_fashion".
        source: folder inside okavango/zoo/weights, ``https://`` URL of a checkpoint folder, or ``hf://org/name@commit``; empty for
            weights that users get from their owners and convert, as `note` says.
        sha256: of the weights file; bytes: its size. Empty for packaged weights, whose config knows.
        licence: SPDX identifier in lower case; packaged weights say it in their card.
        parameters: of the backbone, 0 when they are to be counted.
        input: of the backbone in words, "" when its preprocess tells.
        paper: where the method comes from; trained_on: names of data sets; metrics: name -> value; note: one sentence.
    """

    architecture: str
    tag: str
    source: str
    sha256: str = ""
    bytes: int = 0
    licence: str = ""
    parameters: int = 0
    input: str = ""
    paper: str = ""
    trained_on: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def name(self) -> str:
        """``architecture.tag``."""
        return f"{self.architecture}.{self.tag}"

    @property
    def folder(self) -> Path | None:
        """Where packaged weights lie; None for those that are fetched."""
        return None if "://" in self.source or not self.source else WEIGHTS_FOLDER / self.source

    @property
    def available(self) -> bool:
        """False for packaged weights that this installation lacks."""
        return self.folder is None or (self.folder / "config.json").is_file()

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` of packaged weights, {} for those that are fetched."""
        if self.folder is None or not self.available:
            return {}
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))


CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            architecture="elastic_vit_tiny",
            tag="poa_fashion",
            source="elastic_vit_tiny.poa_fashion",
            paper="arXiv 2408.01031",
            trained_on=("fashion-mnist train",),
            note="POA supernet for 28 px pictures, trained on two CPU cores; for trying things out and for tests.",
        ),
        Entry(
            architecture="bm_mae",
            tag="brats21",
            source="",
            licence="cc-by-nc-4.0",
            paper="arXiv 2505.00568",
            trained_on=("BraTS 2021",),
            note=(
                "the published weights are under CC BY-NC 4.0, not for commercial use, and are not fetched; get bmmae.pth from its "
                "authors, then `okavango zoo convert bmmae.pth --family bm_mae --out DIR`"
            ),
        ),
    )
}


class ModelInfo(str):
    """A name of the zoo that knows more about itself.

    Attributes:
        name: the string itself.
        weights: True when `load` takes the name, False for an architecture that `create_model` builds untrained.
        licence: of the weights, "" without.
        entry: the catalogue's entry, None without weights.
    """

    entry: Entry | None

    def __new__(cls, name: str, entry: Entry | None = None) -> ModelInfo:
        info = super().__new__(cls, name)
        info.entry = entry
        return info

    @property
    def name(self) -> str:
        return str(self)

    @property
    def weights(self) -> bool:
        return self.entry is not None and bool(self.entry.source)

    @property
    def licence(self) -> str:
        return licence_of(self.entry) if self.entry else ""

    @functools.cached_property
    def parameters(self) -> int:
        """Of the backbone; counted on the meta device (no memory) where the catalogue does not say."""
        stated = self.entry.parameters if self.entry else 0
        return stated or sum(parameter.numel() for parameter in self._empty.parameters())

    @functools.cached_property
    def input(self) -> str:
        """The input in words, e.g. "image 28x28 (red, green, blue)"."""
        if self.entry and self.entry.input:
            return self.entry.input
        from okavango.models.preprocess import Preprocess, Text

        stored = self.entry.config.get("preprocess") if self.entry else None
        words = []
        for name, spec in (Preprocess.from_json(stored) if stored else self._empty.preprocess).items():
            if isinstance(spec, Text):
                words.append(f"{name} of {spec.length} tokens")
            else:
                words.append(f"{name} {'x'.join(map(str, spec.size))} ({', '.join(spec.channels)})")
        return "; ".join(words)

    @functools.cached_property
    def _empty(self):
        import torch

        from okavango.models.backbone import create_model

        config = self.entry.config if self.entry else {}
        architecture = self.entry.architecture if self.entry else str(self)
        with torch.device("meta"):
            return create_model(architecture, **config.get("arguments", {}))


def licence_of(entry: Entry) -> str:
    """The entry's licence, for packaged weights that of their card."""
    if entry.licence or entry.folder is None or not (entry.folder / "README.md").is_file():
        return entry.licence
    match = re.search(r'^license:\s*"?([^"\n]+)"?\s*$', (entry.folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else ""


def find(name: str) -> Entry | None:
    """The entry of ``arch.tag``, or the first one of ``arch``; None when there is none."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    return next((entry for entry in CATALOGUE.values() if entry.architecture == name), None)


def list_models(pattern: str = "*", *, licence: str | None = None, weights: bool | None = None) -> list[ModelInfo]:
    """Names of the zoo: ``arch.tag`` for weights that `load` takes, ``arch`` for architectures that `create_model` builds.

    Args:
        pattern: shell pattern on the name; ``timm/...``, ``torchvision/...`` and ``open_clip/...`` list those libraries' models.
        licence: pattern on the licence of the weights, or "permissive" for MIT, Apache-2.0, BSD, CC0 and CC-BY. Architectures
            without weights have no licence of their own and are left out when this is given.
        weights: True for names with weights only, False for architectures only.

    Example:
        >>> list_models("elastic_vit_s*", weights=False)
        ['elastic_vit_small']
    """
    library = pattern.partition("/")[0]
    if library in LIBRARIES and "/" in pattern:
        infos = [ModelInfo(name) for name in _library_models(library)]
    else:
        from okavango.models.backbone import architectures

        infos = [ModelInfo(name) for name in architectures()]
        infos += [ModelInfo(entry.name, entry) for entry in CATALOGUE.values() if entry.available]
    wanted = PERMISSIVE if licence == "permissive" else (licence,)
    return sorted(
        info
        for info in infos
        if fnmatchcase(info, pattern)
        and (weights is None or info.weights == weights)
        and (licence is None or any(fnmatchcase(info.licence, str(one).lower()) for one in wanted))
    )


def _library_models(library: str) -> list[str]:
    listing: dict[str, Callable[[], list[str]]] = {"timm": _timm, "torchvision": _torchvision, "open_clip": _open_clip}
    return [f"{library}/{name}" for name in listing[library]()]


def _timm() -> list[str]:
    import timm

    return timm.list_models()


def _torchvision() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _open_clip() -> list[str]:
    import open_clip

    return open_clip.list_models()
