"""Keys of the published POA code (`alipay/POA`, "teacher" checkpoints) <-> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from okavango.models.elastic_vit import ElasticViT
from okavango.zoo.loading import load_weights

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
_RESNET = (
    (r"^(layer\d+)\.layers\.(\d+\.conv\d)\.conv\.", r"\1.\2."),
    (r"^(layer\d+)\.layers\.", r"\1."),
)
_RESNET_BACK = (
    (r"^(layer\d+)\.(\d+\.conv\d)\.", r"\1.layers.\2.conv."),
    (r"^(layer\d+)\.(\d+)\.", r"\1.layers.\2."),
)
_BACKBONE = _VIT + _RESNET
_BACKBONE_BACK = _VIT_BACK + _RESNET_BACK
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
    """Official keys of backbones and heads -> ours; prefixes such as ``student.`` stay, ``dino_head`` becomes ``head``."""
    return {_convert(name, _BACKBONE, _HEAD, "dino_head.", "head."): tensor for name, tensor in tensors.items()}


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    return {_convert(name, _BACKBONE_BACK, _HEAD_BACK, "head.", "dino_head."): tensor for name, tensor in tensors.items()}


def _convert(name: str, backbone, head, head_old: str, head_new: str) -> str:
    prefix = next(start for start in ("student.", "teacher.", "") if name.startswith(start))
    rest = name[len(prefix) :]
    if rest.startswith(head_old):
        return prefix + head_new + _rename(rest[len(head_old) :], head)
    if rest.startswith("backbone."):
        return prefix + "backbone." + _rename(rest[len("backbone.") :], backbone)
    return name if prefix else _rename(_rename(name, backbone), head)


def read_official(
    path: Path, *, image_size: int = 224, patch_size: int = 16, head_dim: int = 64, min_width: int = 0, min_depth: int = 0
) -> tuple[ElasticViT, list[str]]:
    """Build the supernet that an official ViT teacher checkpoint holds.

    Args:
        path: ``.safetensors``, or a pickle ``{"teacher": {...}}``, which is read with `weights_only`.
        image_size, patch_size, head_dim: of the network, since the weights do not tell them.
        min_width, min_depth: least width and depth of its subnets; 0 takes the published 3/8 of the width and half of the depth.
    Returns:
        The model, and the names of tensors that do not belong to it (the projection heads).
    Raises:
        ValueError: not a ViT checkpoint of the published code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        pickled = path.suffix != ".safetensors"
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
        tensors: dict[str, Tensor] = stored.get("teacher", stored)
    except Exception as error:  # a torn or foreign file makes the readers raise almost anything
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path}: not a file of weights ({type(error).__name__}: {reason})") from None
    backbone = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if not name.startswith("dino_head.")}
    if "pos_embed" not in backbone or "blocks.0.attn.qkv.linear.weight" not in backbone:
        raise ValueError(f"{path}: no ViT teacher of the published POA code (keys like backbone.blocks.0.attn.qkv.linear.weight)")
    width = backbone["pos_embed"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in backbone if name.startswith("blocks."))
    model = ElasticViT(
        image_size=image_size,
        patch_size=patch_size,
        head_dim=head_dim,
        min_width=min_width or width * 3 // 8,
        max_width=width,
        width_step=head_dim,
        min_depth=min_depth or depth // 2,
        max_depth=depth,
        channels=backbone["patch_embed.proj.weight"].shape[1],
    )
    load_weights(model, from_official(backbone))
    return model.eval(), sorted(name for name in tensors if name.startswith("dino_head."))
