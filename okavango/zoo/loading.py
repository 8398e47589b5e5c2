"""Tensors into a model, strictly: what became of each of them is reported, and nothing is left out silently."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

Resize = Callable[[str, Tensor, Sequence[int]], Tensor | None]


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or fitted to a model; the message says what to do."""


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a file and of every parameter of a model.

    Attributes:
        matched: names in the model that were filled as they are.
        renamed: name in the file -> name in the model, where they differ.
        resized: name in the model -> (shape in the file, shape in the model).
        skipped: name in the file -> why it was left out.
        missing: names in the model that the file does not fill.
        unexpected: names in the file that the model does not have.
    """

    matched: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} tensors matched"]
        if self.renamed:
            lines.append(f"{len(self.renamed)} renamed: {_some(f'{old} -> {new}' for old, new in self.renamed.items())}")
        lines += [f"resized {name}: {list(old)} -> {list(new)}" for name, (old, new) in self.resized.items()]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines.append(f"{len(names)} skipped, {reason}: {_some(names)}")
        if self.missing:
            lines.append(f"{len(self.missing)} missing in the file: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"{len(self.unexpected)} unexpected in the file: {_some(self.unexpected)}")
        return "\n".join(lines)


def _some(names, count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names) - count} more)" if len(names) > count else "")


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    rename: Mapping[str, str] | None = None,
    resize: Resize | None = None,
    skip: Mapping[str, str] | None = None,
    strict: bool = True,
) -> LoadReport:
    """Fill a model from named tensors; each is cast to the dtype that the model has.

    Args:
        model: filled in place; parameters on the meta device are replaced.
        tensors: name -> tensor.
        rename: name in `tensors` -> name in the model.
        resize: called as ``resize(name, tensor, shape)`` where shapes differ; returns the fitted tensor or None when it cannot.
            By default the model's own `resize_weights`, where it has one.
        skip: pattern of names in `tensors` (``decoder.*``) -> the reason to leave them out.
        strict: raise when a name is missing or unexpected, or a shape does not fit.
    Raises:
        CheckpointError: two tensors for one name; with `strict`, any tensor without a place or place without a tensor.

    Example:
        >>> import torch
        >>> print(load_weights(nn.Linear(2, 1), {"weight": torch.ones(1, 2), "b": torch.zeros(1)}, rename={"b": "bias"}))
        2 tensors matched
        1 renamed: b -> bias
    """
    rename, skip = rename or {}, skip or {}
    resize = resize or getattr(model, "resize_weights", None)
    places = model.state_dict()
    filled: dict[str, Tensor] = {}
    renamed, resized, skipped, unexpected, unfit = {}, {}, {}, [], []
    for old, tensor in tensors.items():
        name = rename.get(old, old)
        reason = next((why for pattern, why in skip.items() if fnmatchcase(old, pattern)), None)
        if reason is not None:
            skipped[old] = reason
            continue
        if name not in places:
            unexpected.append(old)
            continue
        if name in filled:
            raise CheckpointError(f"{type(model).__name__}: two tensors of the file go to {name!r}; mend `rename`")
        place = places[name]
        if tensor.shape != place.shape:
            fitted = resize(name, tensor, tuple(place.shape)) if resize else None
            if fitted is None or fitted.shape != place.shape:
                skipped[old] = f"shape {list(tensor.shape)} does not fit {list(place.shape)}"
                unfit.append(f"{old} {skipped[old]}")
                continue
            resized[name] = (tuple(tensor.shape), tuple(place.shape))
            tensor = fitted
        if name != old:
            renamed[old] = name
        filled[name] = tensor.to(place.dtype) if place.is_floating_point() else tensor
    report = LoadReport(
        matched=tuple(name for name in filled if name not in resized),
        renamed=renamed,
        resized=resized,
        skipped=skipped,
        missing=tuple(name for name in places if name not in filled),
        unexpected=tuple(unexpected),
    )
    if strict and (report.missing or report.unexpected or unfit):
        parts = [f"{len(unfit)} do not fit ({_some(unfit)})"] if unfit else []
        parts += [f"{len(report.missing)} missing ({_some(report.missing)})"] if report.missing else []
        parts += [f"{len(report.unexpected)} unexpected ({_some(report.unexpected)})"] if report.unexpected else []
        raise CheckpointError(
            f"weights do not fit {type(model).__name__}: {'; '.join(parts)}; "
            "use the architecture and arguments they were saved with, name them in `rename` or `skip`, or pass strict=False"
        )
    on_meta = any(place.is_meta for place in places.values())
    model.load_state_dict(filled, strict=False, assign=on_meta)
    return report


def renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """The name by the first of (pattern, replacement) that fits it; unchanged where none does."""
    for pattern, replacement in rules:
        name, changed = re.subn(pattern, replacement, name)
        if changed:
            break
    return name
