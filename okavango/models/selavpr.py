"""SelaVPR (arXiv 2402.14505): a frozen DINOv2 (arXiv 2304.07193) with adapters, GeM and local descriptors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from okavango.models.adapters import Adapted, adapted_from
from okavango.models.backbone import ArgumentError, register
from okavango.models.elastic_vit import ViT, vit
from okavango.models.preprocess import Image, Preprocess, Resize

# DINOv2 in timm, by width and depth
_TIMM = {(384, 12): "vit_small_patch14", (768, 12): "vit_base_patch14", (1024, 24): "vit_large_patch14"}


@register
def selavpr(
    *,
    image_size: int | Sequence[int] = 224,
    patch_size: int = 14,
    width: int = 1024,
    depth: int = 24,
    head_dim: int = 64,
    registers: int = 0,
    table_size: int = 518,
    adapt: str | Mapping[str, Any] = "bottleneck",
    pool: str = "gem",
    local: Sequence[int] | None = None,
    pretrained: bool | str = False,
) -> Adapted:
    """Any size of SelaVPR.

    `Features.pooled` is the global descriptor (B, width); `Features.tokens` are the local ones, (B, H * W, local[-1]), in a grid of
    4 g - 3 cells for g patches and side; both of unit length. `Features.prefix` are DINOv2's class and register tokens.

    Args:
        image_size: side, or (height, width), of the input in pixels. The network takes any multiple of `patch_size`.
        width, depth, head_dim: of the transformer.
        registers: register tokens, 0 or 4 in DINOv2.
        table_size: side in pixels that the position table was made for; it is resampled to the patches at hand without antialias.
        adapt, pool, local: see `okavango.models.adapters.Adapted`; None takes (width / 4, width / 8) channels.
        pretrained: True for DINOv2's weights by timm, or a file that timm reads.
    Raises:
        ArgumentError: an image size that the patch size does not divide, or no DINOv2 of this size.
    """
    arguments = {key: value for key, value in locals().items() if key != "pretrained"}
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    if any(side % patch_size for side in size):
        raise ArgumentError(f"image_size {image_size}: both sides must be multiples of patch_size {patch_size}")
    trunk = vit(image_size=table_size, patch_size=patch_size, width=width, depth=depth, head_dim=head_dim, registers=registers)
    if pretrained:
        trunk.trunk.load_state_dict(_dinov2(trunk, pretrained))
    trunk.preprocess = Preprocess(image=Image(size=size, resize=Resize(rule="exact", interpolation="bilinear")))
    local = (width // 4, width // 8) if local is None else local
    model = adapted_from(trunk, {"adapt": adapt, "pool": pool, "local": local})
    model.architecture, model.arguments = "selavpr", arguments
    return model


def _dinov2(model: ViT, pretrained: bool | str) -> dict[str, Tensor]:
    """DINOv2's weights in the layout of `vit`, which keeps the class token's position apart where timm has added it."""
    from okavango.models import wrapped

    sizes = (model.arguments["width"], model.arguments["depth"])
    registers = model.arguments["registers"]
    if sizes not in _TIMM or registers not in (0, 4):
        raise ArgumentError(f"pretrained: no DINOv2 of width {sizes[0]}, depth {sizes[1]} and {registers} registers; leave it out")
    name = f"{_TIMM[sizes]}{'_reg4' if registers else ''}_dinov2"
    trunk = wrapped.create("timm", name, pretrained=pretrained).trunk
    tensors = dict(trunk.state_dict())
    if registers:
        table = tensors["pos_embed"]
        tensors["pos_embed"] = torch.cat([table.new_zeros(1, 1, table.shape[-1]), table], 1)
    return tensors


@register
def selavpr_vit_small(**arguments) -> Adapted:
    """SelaVPR on DINOv2 ViT-S/14; takes all arguments of `selavpr`."""
    return selavpr(**{**dict(width=384, depth=12), **arguments})


@register
def selavpr_vit_base(**arguments) -> Adapted:
    """SelaVPR on DINOv2 ViT-B/14."""
    return selavpr(**{**dict(width=768, depth=12), **arguments})


@register
def selavpr_vit_large(**arguments) -> Adapted:
    """SelaVPR on DINOv2 ViT-L/14, the published one: 53 M trained parameters of 357 M."""
    return selavpr(**{**dict(width=1024, depth=24), **arguments})
