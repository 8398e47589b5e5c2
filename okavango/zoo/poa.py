"""Keys of the published POA code (`alipay/POA`, "teacher" checkpoints) <-> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_VIT = (
    (r"(blocks\.\d+\.norm[12])\.norm\.", r"\1."),
    (r"(blocks\.\d+\.(?:attn|mlp)\.\w+)\.linear\.", r"\1."),
    (r"^norm\.norm\.", "norm."),
)
_VIT_BACK = (
    (r"(blocks\.\d+\.norm[12])\.", r"\1.norm."),
    (r"(blocks\.\d+\.(?:attn|mlp)\.\w+)\.", r"\1.linear."),
    (r"^norm\.", "norm.norm."),
)
_HEAD = (
    (r"^mlp(\d+)\.0\.linear\.", r"\1.fc1."),
    (r"^mlp(\d+)\.2\.", r"\1.fc2."),
    (r"^mlp(\d+)\.4\.", r"\1.fc3."),
    (r"^last_layer(\d+)\.weight_([gv])$", r"\1.last_\2"),
)
_HEAD_BACK = (
    (r"^(\d+)\.fc1\.", r"mlp\1.0.linear."),
    (r"^(\d+)\.fc2\.", r"mlp\1.2."),
    (r"^(\d+)\.fc3\.", r"mlp\1.4."),
    (r"^(\d+)\.last_([gv])$", r"last_layer\1.weight_\2"),
)


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name, changed = re.subn(pattern, replacement, name)
        if changed:
            break
    return name


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official ViT and head keys -> ours; prefixes such as ``student.`` stay, ``dino_head`` becomes ``head``."""
    return {_convert(name, _VIT, _HEAD, "dino_head.", "head."): tensor for name, tensor in tensors.items()}


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    return {_convert(name, _VIT_BACK, _HEAD_BACK, "head.", "dino_head."): tensor for name, tensor in tensors.items()}


def _convert(name: str, vit, head, head_old: str, head_new: str) -> str:
    prefix = re.match(r"(?:student\.|teacher\.)?", name)[0]
    rest = name[len(prefix) :]
    if rest.startswith(head_old):
        return prefix + head_new + _rename(rest[len(head_old) :], head)
    if rest.startswith("backbone."):
        return prefix + "backbone." + _rename(rest[len("backbone.") :], vit)
    return name if prefix else _rename(_rename(name, vit), head)
