"""Elastic vision transformer: one set of weights, a grid of widths and depths (POA, arXiv 2408.01031).

A subnet keeps the leading channels, the leading heads and evenly spaced blocks. Every linear layer whose input is narrowed is
scaled by full width / active width (Eq. 2 and 3 of the paper). `ElasticViT.extract` folds all of that into a plain
`timm` vision transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from okavango.models.backbone import Backbone, FeatureInfo, register, resolve_layers
from okavango.models.elastic import (
    Mlp,
    Sliced,
    Supernet,
    add_residual,
    default_preprocess,
    folded,
    image_grid,
    kept_blocks,
    layer_norm,
    linear,
)
from okavango.models.features import Features, Layer, Subnet

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

NORM_EPS = 1e-6


class LayerScale(nn.Module):
    """Learned factor per channel."""

    def __init__(self, width: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[: x.shape[-1]]


class Attention(Sliced):
    """Multi-head self-attention over the leading heads."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, heads, N, head_dim)."""
        batch, tokens, width = x.shape
        qkv = linear(x, self.qkv, width, groups=3, rescale=self.rescale)
        qkv = qkv.view(batch, tokens, 3, width // self.head_dim, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*self.split(x))
        return linear(mixed.transpose(1, 2).flatten(2), self.proj, x.shape[-1], rescale=self.rescale)

    def weights(self, x: Tensor) -> Tensor:
        """Attention probabilities (B, heads, N, N); only for looking at them."""
        query, key, _ = self.split(x)
        return (query @ key.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1)


class Block(nn.Module):
    """Pre-norm transformer block with layer scale and stochastic depth; the width is that of its input."""

    def __init__(self, width: int, head_dim: int, mlp_ratio: float, layer_scale: float, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, head_dim)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.ls2 = LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        rate = self.drop_path if self.training else 0.0
        x = add_residual(x, lambda y: self.ls1(self.attn(layer_norm(y, self.norm1))), rate)
        return add_residual(x, lambda y: self.ls2(self.mlp(layer_norm(y, self.norm2))), rate)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, flattened row by row."""

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor, width: int) -> Tensor:
        assert self.proj.bias is not None
        out = F.conv2d(images, self.proj.weight[:width], self.proj.bias[:width], self.proj.stride)
        return out.flatten(2).transpose(1, 2)


def interpolate_positions(embed: Tensor, grid: tuple[int, int], native: tuple[int, int], offset: float) -> Tensor:
    """Position embedding (1, 1 + N, D) of the native grid -> (1, 1 + h * w, D), bicubic, without antialias, in float32.

    Args:
        offset: DINO's trick of adding it to the wanted size and passing a scale factor, which decides the sampling points; a
            checkpoint is used with the value it was trained with. 0 passes the size itself.
    """
    if grid == native:
        return embed
    head, patches = embed[:, :1], embed[:, 1:]
    patches = patches.float().unflatten(1, native).permute(0, 3, 1, 2)
    if offset:
        scale = [(size + offset) / full for size, full in zip(grid, native, strict=True)]
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([head, patches.flatten(2).transpose(1, 2).to(embed.dtype)], 1)


class _Tokens(Backbone):
    """What the elastic and the extracted transformer share: patches in, `Features` out."""

    head_dim: int
    patch_size: int
    position_offset: float
    native_grid: tuple[int, int]

    def resize_weights(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Fit a position embedding that was trained with another number of patches; None for anything else."""
        side = round((tensor.shape[1] - 1) ** 0.5) if tensor.ndim == 3 else 0
        if name.rpartition(".")[2] != "pos_embed" or side * side + 1 != tensor.shape[1] or tensor.shape[-1] != shape[-1]:
            return None
        return interpolate_positions(tensor, self.native_grid, (side, side), self.position_offset)

    def _features(self, x: Tensor, grid: tuple[int, int], layers: dict[int, Tensor], norm: nn.LayerNorm) -> Features:
        normed, prefix = layer_norm(x, norm), self.feature_info.prefix
        return Features(
            pooled=normed[:, 0],
            prefix=normed[:, :prefix],
            tokens={"image": normed[:, prefix:]},
            grid={"image": grid},
            layers={
                i: Layer(prefix=y[:, :prefix], tokens={"image": y[:, prefix:]}, grid={"image": grid}) for i, y in layers.items()
            },
        )


class ElasticViT(_Tokens, Supernet):
    """Vision transformer whose width and depth are chosen per call.

    Args:
        image_size: side of the square training image in pixels.
        patch_size: side of a patch in pixels.
        min_width, max_width, width_step: range of widths; each is a multiple of `head_dim`.
        min_depth, max_depth: range of depths.
        head_dim: channels per attention head, the same at all widths.
        channels: channels of the image.
        mlp_ratio: hidden width of the MLP over the width.
        layer_scale: initial value of layer scale.
        drop_path: rate of stochastic depth, the same in all blocks; active in training mode only.
        position_offset: see `interpolate_positions`.
        rescale: scale a layer whose input is narrowed by full width / active width. Off is the paper's ablation, which takes
            k-NN of its ViT-S on ImageNet from 76.8 to 75.3.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    optional_parameters = ("mask_token",)  # has no gradient until tokens are masked

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        min_width: int = 384,
        max_width: int = 1024,
        width_step: int = 64,
        min_depth: int = 12,
        max_depth: int = 24,
        head_dim: int = 64,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
        position_offset: float = 0.1,
        rescale: bool = True,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size}: must be a multiple of patch_size {patch_size}")
        if not head_dim <= min_width <= max_width or width_step < 1:
            raise ValueError(f"widths {min_width}..{max_width} by {width_step}: expected {head_dim} <= min_width <= max_width")
        if any(value % head_dim for value in (min_width, max_width, width_step)) or (max_width - min_width) % width_step:
            raise ValueError(f"widths {min_width}..{max_width} by {width_step}: all must be multiples of head_dim {head_dim}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path {drop_path}: expected 0 up to, not including, 1")
        if not 1 <= min_depth <= max_depth:
            raise ValueError(f"depths {min_depth}..{max_depth}: expected 1 <= min_depth <= max_depth")
        self.architecture = "elastic_vit"
        self.arguments = {
            "image_size": image_size,
            "patch_size": patch_size,
            "min_width": min_width,
            "max_width": max_width,
            "width_step": width_step,
            "min_depth": min_depth,
            "max_depth": max_depth,
            "head_dim": head_dim,
            "channels": channels,
            "mlp_ratio": mlp_ratio,
            "layer_scale": layer_scale,
            "drop_path": drop_path,
            "position_offset": position_offset,
        }
        self.widths = tuple(range(min_width, max_width + 1, width_step))
        self.depths = tuple(range(min_depth, max_depth + 1))
        self.head_dim, self.patch_size, self.position_offset = head_dim, patch_size, position_offset
        self.mask_stride = patch_size
        side = image_size // patch_size
        self.native_grid = (side, side)
        self.preprocess = default_preprocess(image_size, channels)
        self.feature_info = FeatureInfo(max_width, max_depth, (max_width,) * max_depth, (patch_size,) * max_depth, prefix=1)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, max_width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, max_width))
        self.mask_token = nn.Parameter(torch.zeros(1, max_width))
        self.patch_embed = PatchEmbed(patch_size, channels, max_width)
        self.blocks = nn.ModuleList(Block(max_width, head_dim, mlp_ratio, layer_scale, drop_path) for _ in range(max_depth))
        self.norm = nn.LayerNorm(max_width, eps=NORM_EPS)
        self._set_rescale(rescale)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    # -- subnets ------------------------------------------------------------------------------------------------------

    def _sizes(self, subnet: Subnet | None) -> tuple[int, int]:
        """Width and depth of a subnet, checked."""
        subnet = self.check_subnet(subnet)
        assert not isinstance(subnet.depth, tuple)  # one number, as all of the grid
        return subnet.width, int(subnet.depth)

    def _hidden(self, width: int) -> int:
        """Hidden width of the MLPs of a subnet."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.mlp.fc1.out_features * width // self.widths[-1]

    def count_parameters(self, subnet: Subnet | None = None) -> int:
        """Parameters of the stand-alone model of a subnet (the mask token is not one of them)."""
        width, depth = self._sizes(subnet)
        hidden = self._hidden(width)
        block = (3 * width * width + 3 * width) + (width * width + width) + (2 * width * hidden + hidden + width) + 6 * width
        patch = self.patch_embed.proj.weight[0].numel() * width + width
        return depth * block + patch + 2 * width + width + self.pos_embed.shape[1] * width

    # -- forward ------------------------------------------------------------------------------------------------------

    def _embed(self, images: Tensor, mask: Tensor | None, width: int) -> tuple[Tensor, tuple[int, int]]:
        grid = image_grid(images, self.patch_size, "patch size")
        x = self.patch_embed(images, width)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token[:, :width].to(x.dtype), x)
        x = torch.cat([self.cls_token[..., :width].expand(x.shape[0], -1, -1).to(x.dtype), x], 1)
        return x + interpolate_positions(self.pos_embed[..., :width], grid, self.native_grid, self.position_offset), grid

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        """Image (B, C, H, W) -> features of the subnet; H and W are any multiples of the patch size.

        `token_mask["image"]`: bool (B, N), True where the mask token replaces the patch. Layer i is the i-th active block.
        """
        width, depth = self._sizes(subnet)
        mask = None if token_mask is None else token_mask.get("image")
        wanted = set(resolve_layers(layers, depth))
        x, grid = self._embed(inputs["image"], mask, width)
        kept: dict[int, Tensor] = {}
        for position, index in enumerate(kept_blocks(depth, len(self.blocks))):
            block = self.blocks[index]
            x = checkpoint(block, x, use_reentrant=False) if self.activation_checkpointing and self.training else block(x)
            if position in wanted:
                kept[position] = x
        return self._features(x, grid, kept, self.norm)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The final layer norm, applied to tokens (..., width) of any layer."""
        return layer_norm(tokens, self.norm)

    def attention_weights(self, inputs, layer: int = -1, subnet: Subnet | None = None) -> Tensor:
        """Attention probabilities (B, heads, 1 + N, 1 + N) of one active block."""
        width, depth = self._sizes(subnet)
        (layer,) = resolve_layers([layer], depth)
        x, _ = self._embed(inputs["image"], None, width)
        blocks = [self.blocks[index] for index in kept_blocks(depth, len(self.blocks))]
        for below in blocks[:layer]:
            x = below(x)
        block = blocks[layer]
        assert isinstance(block, Block)
        return block.attn.weights(layer_norm(x, block.norm1))

    def layer_ids(self) -> dict[str, int]:
        """See `Backbone.layer_ids`; the rule of DINOv2."""
        ids = dict.fromkeys(("cls_token", "pos_embed", "mask_token"), 0)
        for name, _ in self.named_parameters():
            if name.startswith("patch_embed."):
                ids[name] = 0
            elif name.startswith("blocks."):
                ids[name] = int(name.split(".")[1]) + 1
        return ids

    # -- stand-alone models ---------------------------------------------------------------------------------------------

    def extract(self, subnet: Subnet) -> ViT:
        """Cut a stand-alone model out of this one; the weights are copied, the width scale is folded in.

        Returns:
            A `ViT` around timm's VisionTransformer, in eval mode, on the same device: the subnet's outputs to 1e-5.
        Raises:
            ValueError: a subnet that is not in `list_subnets()`.

        Example:
            >>> net = ElasticViT(image_size=32, patch_size=8, min_width=32, max_width=64, width_step=16, head_dim=16, max_depth=4,
            ...                  min_depth=2)
            >>> net.extract(Subnet(32, 2)).feature_info.channels
            32
        """
        width, depth = self._sizes(subnet)
        hidden = self._hidden(width)
        own = self.state_dict()

        def narrow(name: str, out: int, groups: int = 1) -> dict[str, Tensor]:
            weight = own[f"{name}.weight"]
            inputs = width if weight.shape[1] == self.widths[-1] else hidden
            return folded(weight, own[f"{name}.bias"], inputs, out, groups, self.rescale)

        tensors = {key: own[key][..., :width] for key in ("cls_token", "pos_embed")}
        tensors |= {f"patch_embed.proj.{leaf}": own[f"patch_embed.proj.{leaf}"][:width] for leaf in ("weight", "bias")}
        tensors |= {f"norm.{leaf}": own[f"norm.{leaf}"][:width] for leaf in ("weight", "bias")}
        for position, index in enumerate(kept_blocks(depth, len(self.blocks))):
            old, new = f"blocks.{index}", f"blocks.{position}"
            for leaf in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
                tensors[f"{new}.{leaf}"] = own[f"{old}.{leaf}"][:width]
            for name, out, groups in (
                ("attn.qkv", width, 3),
                ("attn.proj", width, 1),
                ("mlp.fc1", hidden, 1),
                ("mlp.fc2", width, 1),
            ):
                for leaf, tensor in narrow(f"{old}.{name}", out, groups).items():
                    tensors[f"{new}.{name}.{leaf}"] = tensor
        model = vit(
            image_size=self.native_grid[0] * self.patch_size,
            patch_size=self.patch_size,
            width=width,
            depth=depth,
            head_dim=self.head_dim,
            channels=self.patch_embed.proj.in_channels,
            mlp_ratio=hidden / width,
            layer_scale=self.arguments["layer_scale"],
            position_offset=self.position_offset,
        ).to(self.pos_embed.device, self.pos_embed.dtype)
        model.trunk.load_state_dict(tensors)
        model.preprocess = self.preprocess
        return model.eval()


class ViT(_Tokens):
    """timm's VisionTransformer as a backbone (`trunk`): what `ElasticViT.extract` returns.

    Other image sizes interpolate the position embedding as the supernet does, which is not timm's rule.
    """

    def __init__(self, trunk: VisionTransformer, *, position_offset: float, arguments: dict):
        super().__init__()
        self.architecture, self.arguments = "vit", arguments
        self.trunk, self.position_offset = trunk, position_offset
        self.patch_size = arguments["patch_size"]
        self.native_grid = (arguments["image_size"] // self.patch_size,) * 2
        width, depth = arguments["width"], arguments["depth"]
        self.head_dim = arguments["head_dim"]
        self.preprocess = default_preprocess(arguments["image_size"], arguments["channels"])
        prefix = 1 + arguments["registers"]
        self.feature_info = FeatureInfo(width, depth, (width,) * depth, (self.patch_size,) * depth, prefix=prefix)

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        trunk, grid = self.trunk, image_grid(images, self.patch_size, "patch size")
        assert trunk.cls_token is not None and trunk.pos_embed is not None
        x = trunk.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([trunk.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = x + interpolate_positions(trunk.pos_embed, grid, self.native_grid, self.position_offset)
        if trunk.reg_token is not None:  # registers have no position
            x = torch.cat([x[:, :1], trunk.reg_token.expand(x.shape[0], -1, -1), x[:, 1:]], 1)
        return x, grid

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        """Image (B, C, H, W) -> features; H and W are any multiples of the patch size."""
        if subnet is not None or token_mask is not None:
            raise ValueError("an extracted ViT has no subnets and no mask token; use the elastic supernet for both")
        x, grid = self._embed(inputs["image"])
        wanted = set(resolve_layers(layers, len(self.trunk.blocks)))
        kept = {}
        for position, block in enumerate(self.trunk.blocks):
            x = block(x)
            if position in wanted:
                kept[position] = x
        assert isinstance(self.trunk.norm, nn.LayerNorm)
        return self._features(x, grid, kept, self.trunk.norm)

    def attention_weights(self, inputs, layer: int = -1, subnet: Subnet | None = None) -> Tensor:
        """Attention probabilities (B, heads, 1 + N, 1 + N) of one block."""
        if subnet is not None:
            raise ValueError("an extracted ViT has no subnets; use the elastic supernet")
        (layer,) = resolve_layers([layer], len(self.trunk.blocks))
        below = super().__call__(inputs, layers=(layer - 1,)).layers[layer - 1] if layer else None
        if below is None:
            x, _ = self._embed(inputs["image"])
        else:
            assert below.prefix is not None  # the class token
            x = torch.cat([below.prefix, below.tokens["image"]], 1)
        block: Any = self.trunk.blocks[layer]
        batch, tokens, width = x.shape
        qkv = block.attn.qkv(block.norm1(x)).view(batch, tokens, 3, width // self.head_dim, self.head_dim)
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return (query @ key.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1)

    def layer_ids(self) -> dict[str, int]:
        """See `Backbone.layer_ids`."""
        ids = {}
        for name, _ in self.named_parameters():
            if name.startswith("trunk.blocks."):
                ids[name] = int(name.split(".")[2]) + 1
            elif not name.startswith("trunk.norm"):
                ids[name] = 0
        return ids


@register
def vit(
    *,
    image_size: int = 224,
    patch_size: int = 16,
    width: int = 384,
    depth: int = 12,
    head_dim: int = 64,
    channels: int = 3,
    mlp_ratio: float = 4.0,
    layer_scale: float = 1e-5,
    position_offset: float = 0.1,
    registers: int = 0,
) -> ViT:
    """A plain vision transformer with the layout of an extracted subnet (timm's class inside), `registers` tokens if wanted."""
    from timm.models.vision_transformer import VisionTransformer

    arguments = dict(locals())
    arguments.pop("VisionTransformer")
    trunk = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=channels,
        embed_dim=width,
        depth=depth,
        num_heads=width // head_dim,
        mlp_ratio=(int(width * mlp_ratio + 1e-6) + 0.5) / width,  # timm rounds down, also where the product is a hair too small
        init_values=layer_scale,
        norm_layer=lambda size, **_: nn.LayerNorm(size, eps=NORM_EPS),
        num_classes=0,
        reg_tokens=registers,
    )
    if registers:  # timm would give them positions
        trunk.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch_size) ** 2, width))
        nn.init.trunc_normal_(trunk.pos_embed, std=0.02)
    return ViT(trunk, position_offset=position_offset, arguments=arguments)


@register
def elastic_vit(**arguments) -> ElasticViT:
    """Any elastic vision transformer: takes all arguments of `ElasticViT`."""
    return ElasticViT(**arguments)


@register
def elastic_vit_tiny(**arguments) -> ElasticViT:
    """For small pictures and two cores: 28 px, patch 7, widths 64..128, depths 2..6, heads of 32; 1.2 M parameters."""
    small = dict(
        image_size=28,
        patch_size=7,
        min_width=64,
        max_width=128,
        width_step=32,
        min_depth=2,
        max_depth=6,
        head_dim=32,
        layer_scale=1.0,
    )
    return ElasticViT(**{**small, **arguments})


@register
def elastic_vit_small(**arguments) -> ElasticViT:
    """Widths 192..384, depths 6..12, up to ViT-S/16."""
    return ElasticViT(**{**dict(min_width=192, max_width=384, min_depth=6, max_depth=12), **arguments})


@register
def elastic_vit_base(**arguments) -> ElasticViT:
    """Widths 384..768, depths 8..12, up to ViT-B/16."""
    return ElasticViT(**{**dict(min_width=384, max_width=768, min_depth=8, max_depth=12), **arguments})


@register
def elastic_vit_large(**arguments) -> ElasticViT:
    """The published supernet: widths 384..1024, depths 12..24, ViT-S/16 to ViT-L/16; 143 subnets."""
    return ElasticViT(**{**dict(min_width=384, max_width=1024, min_depth=12, max_depth=24), **arguments})
