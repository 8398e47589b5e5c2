"""Keys of the published POA code (`alipay/POA`, "teacher" checkpoints) <-> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from okavango.models.elastic import Supernet
from okavango.models.elastic_resnet import ElasticResNet
from okavango.models.elastic_swin import ElasticSwin
from okavango.models.elastic_vit import ElasticViT
from okavango.zoo.loading import load_weights, renamed

_BACKBONE = (  # the keys of the families have no pattern in common, so one table serves all
    (r"(blocks\.\d+\.norm[12])\.norm\.", r"\1."),
    (r"(blocks\.\d+\.(?:attn|mlp)\.\w+)\.linear\.", r"\1."),
    (r"^norm\.norm\.", "norm."),
    (r"(blocks\.\d+\.attn)\.w_msa\.(qkv|proj)\.linear\.", r"\1.\2."),
    (r"(blocks\.\d+\.attn)\.w_msa\.", r"\1."),
    (r"(blocks\.\d+)\.ffn\.(fc[12])\.linear\.", r"\1.mlp.\2."),
    (r"(downsample)\.norm\.norm\.", r"\1.norm."),
    (r"(downsample\.reduction)\.linear\.", r"\1."),
    (r"(patch_embed\.norm)\.norm\.", r"\1."),
    (r"^norm(\d)\.norm\.", r"norms.\1."),
    (r"^(layer\d\.)layers\.(\d+\.conv\d\.)conv\.", r"\1\2"),
    (r"^(layer\d\.)layers\.", r"\1"),
)
_VIT_BACK = (
    (r"(blocks\.\d+\.norm[12])\.", r"\1.norm."),
    (r"(blocks\.\d+\.(?:attn|mlp)\.\w+)\.", r"\1.linear."),
    (r"^norm\.", "norm.norm."),
)
_SWIN_BACK = (
    (r"(stages\.\d\.blocks\.\d+\.norm[12])\.", r"\1.norm."),
    (r"(stages\.\d\.blocks\.\d+\.attn)\.(qkv|proj)\.", r"\1.w_msa.\2.linear."),
    (r"(stages\.\d\.blocks\.\d+\.attn)\.(relative)", r"\1.w_msa.\2"),
    (r"(stages\.\d\.blocks\.\d+)\.mlp\.(fc[12])\.", r"\1.ffn.\2.linear."),
    (r"(downsample\.norm)\.", r"\1.norm."),
    (r"(downsample\.reduction)\.", r"\1.linear."),
    (r"(patch_embed\.norm)\.", r"\1.norm."),
    (r"^norms\.(\d)\.", r"norm\1.norm."),
)
_RESNET_BACK = (
    (r"^(layer\d\.)(\d+\.conv\d\.)", r"\1layers.\2conv."),
    (r"^(layer\d\.)(\d+\.)", r"\1layers.\2"),
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


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official keys of backbones and heads -> ours; prefixes such as ``student.`` stay, ``dino_head`` becomes ``head``."""
    return {_convert(name, _BACKBONE, _HEAD, "dino_head.", "head."): tensor for name, tensor in tensors.items()}


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    backbone = (*_SWIN_BACK, *_VIT_BACK, *_RESNET_BACK)
    return {_convert(name, backbone, _HEAD_BACK, "head.", "dino_head."): tensor for name, tensor in tensors.items()}


def _convert(name: str, backbone, head, head_old: str, head_new: str) -> str:
    prefix = next(start for start in ("student.", "teacher.", "") if name.startswith(start))
    rest = name[len(prefix) :]
    if rest.startswith(head_old):
        return prefix + head_new + renamed(rest[len(head_old) :], head)
    if rest.startswith("backbone."):
        return prefix + "backbone." + renamed(rest[len("backbone.") :], backbone)
    return name if prefix else renamed(renamed(name, backbone), head)


def read_official(
    path: Path, *, image_size: int = 224, patch_size: int = 16, head_dim: int = 64, min_width: int = 0, min_depth: int = 0
) -> tuple[Supernet, list[str]]:
    """Build the supernet that an official teacher checkpoint, of a ViT, a Swin or a ResNet, holds.

    Args:
        path: ``.safetensors``, or a pickle ``{"teacher": {...}}``, which is read with `weights_only`.
        image_size: side of the training image, since the weights do not tell it.
        patch_size, head_dim: of a ViT; the weights of the others tell what they need.
        min_width, min_depth: least width and depth of its subnets; 0 takes the published share of the full ones: 3/8 and 1/2 for
            ViT, 3/4 and, in the third stage, 1/3 for Swin, 1/2 and 1/6 for ResNet.
    Returns:
        The model, and the names of tensors that do not belong to it (the projection heads).
    Raises:
        ValueError: not a checkpoint of the published code.
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
    if "pos_embed" in backbone and "blocks.0.attn.qkv.linear.weight" in backbone:
        model = _vit(backbone, image_size, patch_size, head_dim, min_width, min_depth)
    elif "stages.0.blocks.0.attn.w_msa.qkv.linear.weight" in backbone:
        model = _swin(backbone, image_size, min_width, min_depth)
    elif "layer1.layers.0.conv1.conv.weight" in backbone:
        model = _resnet(backbone, image_size, min_width, min_depth)
    else:
        raise ValueError(
            f"{path}: no ViT, Swin or ResNet teacher of the published POA code (keys like "
            "backbone.blocks.0.attn.qkv.linear.weight, backbone.stages.0.blocks.0.attn.w_msa.qkv.linear.weight or "
            "backbone.layer1.layers.0.conv1.conv.weight)"
        )
    load_weights(model, from_official(backbone))
    return model.eval(), sorted(name for name in tensors if name.startswith("dino_head."))


def _vit(backbone: dict[str, Tensor], image_size: int, patch_size: int, head_dim: int, min_width: int, min_depth: int) -> Supernet:
    width = backbone["pos_embed"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in backbone if name.startswith("blocks."))
    return ElasticViT(
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


def _swin(backbone: dict[str, Tensor], image_size: int, min_width: int, min_depth: int) -> Supernet:
    width, channels, patch_size, _ = backbone["patch_embed.proj.weight"].shape
    places = {tuple(map(int, re.findall(r"\d+", name)[:2])) for name in backbone if re.match(r"stages\.\d+\.blocks", name)}
    depths = [sum(stage == number for stage, _ in places) for number in range(4)]
    offsets, heads = backbone["stages.0.blocks.0.attn.w_msa.relative_position_bias_table"].shape
    head_dim = width // heads
    return ElasticSwin(
        image_size=image_size,
        patch_size=patch_size,
        window=(round(offsets**0.5) + 1) // 2,
        min_width=min_width or width * 3 // 4 // head_dim * head_dim,
        max_width=width,
        width_step=head_dim,
        depths=depths,
        min_depth=min_depth or max(1, depths[2] // 3),
        head_dim=head_dim,
        channels=channels,
        mask_stride=4 * patch_size,
    )


def _resnet(backbone: dict[str, Tensor], image_size: int, min_width: int, min_depth: int) -> Supernet:
    stem_channels, channels, *_ = backbone["conv1.weight"].shape
    width, out_channels = (backbone[f"layer1.layers.0.conv{number}.conv.weight"].shape[0] for number in (1, 3))
    first, second, third, fourth = (
        sum(re.fullmatch(rf"layer{stage}\.layers\.\d+\.norm1\.weight", name) is not None for name in backbone)
        for stage in (1, 2, 3, 4)
    )
    return ElasticResNet(
        image_size=image_size,
        min_width=min_width or width // 2,
        max_width=width,
        width_step=32,  # as the number of groups, which the weights do not tell either
        min_depths=(first, max(1, second // 2), min_depth or max(1, third // 6), fourth),
        max_depths=(first, second, third, fourth),
        stem_channels=stem_channels,
        out_channels=out_channels,
        groups=32,
        channels=channels,
    )
