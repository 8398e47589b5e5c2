"""Elastic ResNet: one set of weights, a grid of inner widths and of depths per stage (POA, arXiv 2408.01031).

All blocks are bottlenecks with group norm. The channels between blocks are fixed; a subnet keeps the leading channels inside each
block and evenly spaced blocks of each stage. A convolution whose input is narrowed is scaled by full width / active width (Eq. 2
and 3 of the paper), and a narrowed norm has the same number of groups. The intact network is therefore a *wide* ResNet; the usual
ResNet-50 and ResNet-152 are subnets of it. `ElasticResNet.extract` folds all of that into timm's ResNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from okavango.models.backbone import Backbone, FeatureInfo, register, resolve_layers
from okavango.models.elastic import Sliced, Supernet, default_preprocess, kept_blocks, leading
from okavango.models.features import Features, Layer, Subnet

if TYPE_CHECKING:
    from timm.models.resnet import ResNet as TimmResNet

STRIDES = (4, 8, 16, 32)  # input pixels per cell of each stage
STAGES = len(STRIDES)


def convolve(x: Tensor, conv: nn.Conv2d, out: int, rescale: bool = True) -> Tensor:
    """A slice of a convolution without bias: the leading `x.shape[1]` inputs and the leading `out` outputs.

    Args:
        x: (B, inputs, H, W), inputs <= conv.in_channels.
    Returns:
        (B, out, h, w), with `rescale` scaled by in_channels / inputs.
    """
    inputs, weight = x.shape[1], leading(conv.weight, out)
    if inputs < conv.in_channels:  # a slice of the inputs is copied in any case, so the scale costs nothing here
        weight = weight[:, :inputs] * (conv.in_channels / inputs if rescale else 1)
    return F.conv2d(x, weight, None, conv.stride, conv.padding)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group norm over the active channels with the leading weights; the number of groups stays, the groups are smaller."""
    channels = x.shape[1]
    return F.group_norm(x, norm.num_groups, leading(norm.weight, channels), leading(norm.bias, channels), norm.eps)


class Bottleneck(Sliced):
    """Residual block of a 1x1, a 3x3 (with the stride) and a 1x1 convolution, each with group norm.

    Args:
        inputs, out: channels before and after the block, never narrowed.
        width: greatest number of channels inside.
        stride: of the 3x3 convolution and of the shortcut.
        groups: of every norm.
    """

    def __init__(self, inputs: int, width: int, out: int, stride: int, groups: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.norm3 = nn.GroupNorm(groups, out)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inputs != out:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.GroupNorm(groups, out))

    def forward(self, x: Tensor, width: int) -> Tensor:
        y = F.relu(group_norm(convolve(x, self.conv1, width, self.rescale), self.norm1))
        y = F.relu(group_norm(convolve(y, self.conv2, width, self.rescale), self.norm2))
        y = self.norm3(convolve(y, self.conv3, self.conv3.out_channels, self.rescale))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def rows(x: Tensor) -> Tensor:
    """A map (B, D, h, w) as tokens (B, h * w, D), row by row."""
    return x.flatten(2).transpose(1, 2)


def _features(maps: Sequence[Tensor], layers: Mapping[int, Tensor]) -> Features:
    """Maps of the four stages, and outputs of blocks, as features."""
    last = maps[-1]
    return Features(
        pooled=last.mean((2, 3)),
        tokens={"image": rows(last)},
        grid={"image": (last.shape[2], last.shape[3])},
        layers={i: Layer(None, {"image": rows(y)}, {"image": (y.shape[2], y.shape[3])}) for i, y in layers.items()},
        maps=tuple(maps),
        strides=STRIDES,
    )


def _info(depths: Sequence[int], out_channels: int) -> FeatureInfo:
    """Layers are blocks."""
    stages = [stage for stage, depth in enumerate(depths) for _ in range(depth)]
    return FeatureInfo(
        channels=out_channels << STAGES - 1,
        layers=len(stages),
        layer_channels=tuple(out_channels << stage for stage in stages),
        strides=tuple(STRIDES[stage] for stage in stages),
    )


def check_sizes(groups: int, sizes: Sequence[int], depths: Sequence[int], out_channels: int) -> None:
    """Refuse what neither an elastic nor a plain ResNet can have.

    Args:
        sizes: numbers of channels that are normed.
    Raises:
        ValueError: sizes that do not fit each other.
    """
    if groups < 1 or any(size < 1 or size % groups for size in sizes):
        raise ValueError(f"groups {groups}: must divide stem_channels, out_channels and all widths, {', '.join(map(str, sizes))}")
    if out_channels % 4:
        raise ValueError(f"out_channels {out_channels}: must be a multiple of 4, a quarter being the usual inner width")
    if len(depths) != STAGES or min(depths) < 1:
        raise ValueError(f"depths {tuple(depths)}: expected at least one block in each of four stages")


class ElasticResNet(Supernet):
    """Bottleneck ResNet with group norm whose inner width and whose depth per stage are chosen per call.

    `Features.maps` are the four stages, `tokens` are the last of them and `pooled` is their mean; there is no final norm.

    Args:
        image_size: side of the square training image in pixels.
        min_width, max_width, width_step: range of inner widths of the first stage; each further stage has twice as many channels.
        min_depths, max_depths: ranges of blocks of the four stages.
        stem_channels: channels before the first stage.
        out_channels: channels after the first stage; each further stage has twice as many.
        groups: of all norms; divides all numbers of channels.
        channels: channels of the image.
        mask_stride: pixels per cell of `token_mask`, a multiple of 4.
        rescale: scale a convolution whose input is narrowed by full width / active width. Off is the paper's ablation, made with
            ViTs; the norm after each convolution takes the scale out again, up to its epsilon, so little depends on it here.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    depths: tuple[tuple[int, ...], ...]
    optional_parameters = ("mask_token",)  # has no gradient until tokens are masked

    def __init__(
        self,
        *,
        image_size: int = 224,
        min_width: int = 64,
        max_width: int = 128,
        width_step: int = 32,
        min_depths: Sequence[int] = (3, 4, 6, 3),
        max_depths: Sequence[int] = (3, 8, 36, 3),
        stem_channels: int = 64,
        out_channels: int = 256,
        groups: int = 32,
        channels: int = 3,
        mask_stride: int = 16,
        rescale: bool = True,
    ):
        super().__init__()
        if not 1 <= min_width <= max_width or width_step < 1 or (max_width - min_width) % width_step:
            raise ValueError(
                f"widths {min_width}..{max_width} by {width_step}: expected 1 <= min_width <= max_width in whole steps"
            )
        self.widths = tuple(range(min_width, max_width + 1, width_step))
        min_depths, max_depths = tuple(min_depths), tuple(max_depths)
        check_sizes(groups, (stem_channels, out_channels, *self.widths), min_depths, out_channels)
        if len(max_depths) != STAGES or any(low > high for low, high in zip(min_depths, max_depths, strict=True)):
            raise ValueError(f"depths {min_depths}..{max_depths}: expected min_depths <= max_depths, for each of four stages")
        if mask_stride < STRIDES[0] or mask_stride % STRIDES[0]:
            raise ValueError(f"mask_stride {mask_stride}: must be a multiple of {STRIDES[0]}, the stride of the stem")
        self.architecture = "elastic_resnet"
        self.arguments = {
            "image_size": image_size,
            "min_width": min_width,
            "max_width": max_width,
            "width_step": width_step,
            "min_depths": min_depths,
            "max_depths": max_depths,
            "stem_channels": stem_channels,
            "out_channels": out_channels,
            "groups": groups,
            "channels": channels,
            "mask_stride": mask_stride,
        }
        ranges = [range(low, high + 1) for low, high in zip(min_depths, max_depths, strict=True)]
        self.depths = tuple(product(*ranges))
        self.mask_stride = mask_stride
        self.preprocess = default_preprocess(image_size, channels)
        self.feature_info = _info(max_depths, out_channels)

        self.conv1 = nn.Conv2d(channels, stem_channels, 7, 2, 3, bias=False)
        self.norm1 = nn.GroupNorm(groups, stem_channels)
        self.mask_token = nn.Parameter(torch.zeros(1, stem_channels, 1, 1))
        inputs = stem_channels
        for stage, depth in enumerate(max_depths):
            blocks = nn.ModuleList()
            for index in range(depth):
                out, stride = out_channels << stage, 2 if stage and index == 0 else 1
                blocks.append(Bottleneck(inputs, max_width << stage, out, stride, groups))
                inputs = out
            self.add_module(f"layer{stage + 1}", blocks)
        self._set_rescale(rescale)

    # -- subnets ------------------------------------------------------------------------------------------------------

    def sampling_pool(self, scale: float = 2.0) -> tuple[Subnet, ...]:
        """The multiset that training draws from; the last entry is the intact network.

        Depths are ordered by the number of blocks; the shallowest has `scale` times the weight of the deepest, multiplicities are
        rounded half to even. All widths count the same.
        """
        ordered = sorted(self.depths, key=sum)  # stable: equal numbers of blocks stay in lexicographic order
        pool = []
        for width in self.widths:
            for depth, weight in zip(ordered, np.linspace(scale, 1, len(ordered)), strict=True):
                pool += [Subnet(width, depth)] * int(np.round(weight))
        return tuple(pool)

    def _sizes(self, subnet: Subnet | None) -> tuple[int, tuple[int, ...]]:
        """Width and depths of a subnet, checked."""
        subnet = self.check_subnet(subnet)
        assert isinstance(subnet.depth, tuple)
        return subnet.width, subnet.depth

    def _blocks(self, depths: Sequence[int]) -> Iterator[tuple[int, int, Bottleneck]]:
        """(stage, position in the subnet's stage, block) of each active block, both from 0."""
        for stage, depth in enumerate(depths):
            blocks: Any = self.get_submodule(f"layer{stage + 1}")
            for position, index in enumerate(kept_blocks(depth, len(blocks))):
                yield stage, position, blocks[index]

    def count_parameters(self, subnet: Subnet | None = None) -> int:
        """Parameters of the stand-alone model of a subnet (the mask token is not one of them)."""
        width, depths = self._sizes(subnet)
        total = self.conv1.weight.numel() + 2 * self.norm1.num_channels
        for stage, _, block in self._blocks(depths):
            inner, inputs, out = width << stage, block.conv1.in_channels, block.conv3.out_channels
            total += inputs * inner + 9 * inner * inner + inner * out + 4 * inner + 2 * out
            total += 0 if block.downsample is None else inputs * out + 2 * out
        return total

    # -- forward ------------------------------------------------------------------------------------------------------

    def _stem(self, images: Tensor, mask: Tensor | None) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(images))), 3, 2, 1)
        if mask is None:
            return x
        height, width = images.shape[-2:]
        if height % self.mask_stride or width % self.mask_stride:
            step = self.mask_stride
            raise ValueError(
                f"image of {height}x{width} pixels: with a mask both sides must be multiples of the mask stride {step}"
            )
        mask = mask.unflatten(1, (height // self.mask_stride, width // self.mask_stride))
        times = self.mask_stride // STRIDES[0]
        mask = mask.repeat_interleave(times, 1).repeat_interleave(times, 2)
        return torch.where(mask[:, None], self.mask_token.to(x.dtype), x)

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        """Image (B, C, H, W) of any size -> features of the subnet.

        `token_mask["image"]`: bool (B, N), N cells of `mask_stride` pixels, True where the mask token replaces the stem's output;
        both sides of the image are multiples of `mask_stride` then. Layer i is the i-th active block of all stages.
        """
        width, depths = self._sizes(subnet)
        mask = None if token_mask is None else token_mask.get("image")
        wanted = set(resolve_layers(layers, sum(depths)))
        x = self._stem(inputs["image"], mask)
        maps: list[Tensor] = []
        kept: dict[int, Tensor] = {}
        recompute = self.activation_checkpointing and self.training
        for number, (stage, position, block) in enumerate(self._blocks(depths)):
            inner = width << stage
            x = checkpoint(block, x, inner, use_reentrant=False) if recompute else block(x, inner)
            if number in wanted:
                kept[number] = x
            if position == depths[stage] - 1:
                maps.append(x)
        return _features(maps, kept)

    def layer_ids(self) -> dict[str, int]:
        """See `Backbone.layer_ids`; blocks are counted over all stages, and no parameter stands after the last one."""
        return _layer_ids(self, "", self.arguments["max_depths"])

    # -- stand-alone models ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def extract(self, subnet: Subnet) -> ResNet:
        """Cut a stand-alone model out of this one; the weights are copied, the width scale is folded in.

        Returns:
            A `ResNet` around timm's ResNet, in eval mode, on the same device: the subnet's outputs to 1e-5. See there for what is
            not timm's own.
        Raises:
            ValueError: a subnet that is not in `list_subnets()`.

        Example:
            >>> net = elastic_resnet_tiny()
            >>> net.extract(Subnet(16, (1, 1, 2, 1))).feature_info.layers
            5
        """
        width, depths = self._sizes(subnet)
        arguments = self.arguments
        tensors = {"conv1.weight": self.conv1.weight, "bn1.weight": self.norm1.weight, "bn1.bias": self.norm1.bias}
        for stage, position, block in self._blocks(depths):
            name, inner = f"layer{stage + 1}.{position}", width << stage
            scale = block.conv2.in_channels / inner if self.rescale else 1
            tensors[f"{name}.conv1.weight"] = block.conv1.weight[:inner]
            tensors[f"{name}.conv2.weight"] = block.conv2.weight[:inner, :inner] * scale
            tensors[f"{name}.conv3.weight"] = block.conv3.weight[:, :inner] * scale
            for number, norm, channels in ((1, block.norm1, inner), (2, block.norm2, inner), (3, block.norm3, None)):
                tensors[f"{name}.bn{number}.weight"] = norm.weight[:channels]
                tensors[f"{name}.bn{number}.bias"] = norm.bias[:channels]
            if block.downsample is not None:
                tensors |= {f"{name}.downsample.{leaf}": tensor for leaf, tensor in block.downsample.state_dict().items()}
        model = resnet(
            width=width,
            depths=depths,
            **{key: arguments[key] for key in ("image_size", "stem_channels", "out_channels", "groups", "channels")},
        ).to(self.mask_token.device, self.mask_token.dtype)
        model.trunk.load_state_dict(tensors)
        model.preprocess = self.preprocess
        return model.eval()


def _layer_ids(model: nn.Module, prefix: str, depths: Sequence[int]) -> dict[str, int]:
    """0 for the stem, 1 + the number of blocks before it for a block ``layer1.0.``."""
    ids = {}
    for name, _ in model.named_parameters():
        module, _, rest = name.removeprefix(prefix).partition(".")
        inside = module.startswith("layer")
        ids[name] = 1 + sum(depths[: int(module.removeprefix("layer")) - 1]) + int(rest.partition(".")[0]) if inside else 0
    return ids


class ResNet(Backbone):
    """timm's ResNet as a backbone (`trunk`): what `ElasticResNet.extract` returns.

    timm has no mask token. Its constructor makes a stem of 64 channels; where that shall be another number, stem and first block
    are replaced afterwards.
    """

    def __init__(self, trunk: TimmResNet, *, arguments: dict):
        super().__init__()
        self.architecture, self.arguments = "resnet", arguments
        self.trunk = trunk
        self.preprocess = default_preprocess(arguments["image_size"], arguments["channels"])
        self.feature_info = _info(arguments["depths"], arguments["out_channels"])

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        """Image (B, C, H, W) of any size -> features; layer i is the i-th block, counted over all stages."""
        if subnet is not None or token_mask is not None:
            raise ValueError("an extracted ResNet has no subnets and no mask token; use the elastic supernet for both")
        trunk, wanted = self.trunk, set(resolve_layers(layers, self.feature_info.layers))
        x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(inputs["image"]))))
        maps: list[Tensor] = []
        kept: dict[int, Tensor] = {}
        number = 0
        stages: Any = (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
        for stage in stages:
            for block in stage:
                x = block(x)
                if number in wanted:
                    kept[number] = x
                number += 1
            maps.append(x)
        return _features(maps, kept)

    def layer_ids(self) -> dict[str, int]:
        """See `Backbone.layer_ids`; blocks are counted over all stages, and no parameter stands after the last one."""
        return _layer_ids(self, "trunk.", self.arguments["depths"])


@register
def resnet(
    *,
    image_size: int = 224,
    width: int = 64,
    depths: Sequence[int] = (3, 4, 6, 3),
    stem_channels: int = 64,
    out_channels: int = 256,
    groups: int = 32,
    channels: int = 3,
    drop_path: float = 0.0,
) -> ResNet:
    """A plain ResNet with group norm and the layout of an extracted subnet (timm's class inside); by default a ResNet-50.

    Args:
        width: channels inside the blocks of the first stage; depths: blocks of the four stages; others: see `ElasticResNet`.
        drop_path: timm's rate of stochastic depth of the last block; it rises linearly from 0. Active in training mode only.
    Raises:
        ValueError: sizes that do not fit each other.
    """
    from timm.models import resnet as module

    timm_resnet: Any = module  # its annotations ask for classes where it takes functions too

    def norm(size: int, **_) -> nn.GroupNorm:
        return nn.GroupNorm(groups if size % groups == 0 else 1, size)  # 1 for timm's own stem only, which is replaced then

    check_sizes(groups, (stem_channels, out_channels, width), depths, out_channels)
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path {drop_path}: expected 0 up to, not including, 1")
    depths, planes = tuple(depths), out_channels // timm_resnet.Bottleneck.expansion
    inside = dict(base_width=64 * (width + 0.01) / planes, norm_layer=norm)  # timm rounds planes * base_width / 64 down
    trunk = timm_resnet.ResNet(
        timm_resnet.Bottleneck,
        depths,
        num_classes=0,
        in_chans=channels,
        channels=tuple(planes << stage for stage in range(STAGES)),
        drop_path_rate=drop_path,
        **inside,
    )
    if stem_channels != trunk.conv1.out_channels:
        trunk.conv1 = nn.Conv2d(channels, stem_channels, 7, 2, 3, bias=False)
        trunk.bn1 = norm(stem_channels)
        trunk.feature_info[0]["num_chs"] = stem_channels
        shortcut = None
        if stem_channels != out_channels:
            shortcut = timm_resnet.downsample_conv(stem_channels, out_channels, 1, norm_layer=norm)
        trunk.layer1[0] = timm_resnet.Bottleneck(stem_channels, planes, downsample=shortcut, **inside)
    arguments = {
        "image_size": image_size,
        "width": width,
        "depths": depths,
        "stem_channels": stem_channels,
        "out_channels": out_channels,
        "groups": groups,
        "channels": channels,
        "drop_path": drop_path,
    }
    return ResNet(trunk, arguments=arguments)


@register
def elastic_resnet(**arguments) -> ElasticResNet:
    """Any elastic ResNet: takes all arguments of `ElasticResNet`."""
    return ElasticResNet(**arguments)


@register
def elastic_resnet_tiny(**arguments) -> ElasticResNet:
    """For small pictures and two cores: 64 px, inner widths 16..32, depths (1, 1..2, 1..3, 1); 1.7 M parameters."""
    small = dict(
        image_size=64,
        min_width=16,
        max_width=32,
        width_step=8,
        min_depths=(1, 1, 1, 1),
        max_depths=(1, 2, 3, 1),
        stem_channels=16,
        out_channels=64,
        groups=8,
    )
    return ElasticResNet(**{**small, **arguments})


@register
def elastic_resnet_50(**arguments) -> ElasticResNet:
    """Inner widths 32..64 with 16 groups, depths (3, 2..4, 2..6, 3), up to ResNet-50."""
    middle = dict(min_width=32, max_width=64, width_step=16, min_depths=(3, 2, 2, 3), max_depths=(3, 4, 6, 3), groups=16)
    return ElasticResNet(**{**middle, **arguments})


@register
def elastic_resnet_152(**arguments) -> ElasticResNet:
    """The published supernet: inner widths 64..128, depths (3, 4..8, 6..36, 3), ResNet-50 to a wide ResNet-152; 465 subnets."""
    published = dict(min_width=64, max_width=128, width_step=32, min_depths=(3, 4, 6, 3), max_depths=(3, 8, 36, 3))
    return ElasticResNet(**{**published, **arguments})
