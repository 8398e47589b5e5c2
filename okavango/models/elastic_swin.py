"""Elastic Swin transformer: one set of weights, a grid of widths and of depths of the third stage (POA, arXiv 2408.01031).

Stage s of a subnet of width w has w * 2**s channels and one head per `head_dim` of them. A subnet keeps the leading channels, the
leading heads and evenly spaced blocks of the third stage; a linear layer whose input is narrowed is scaled by full width / active
width. Three things are not those of the usual Swin (arXiv 2103.14030): the norm of the patch embedding is taken over the full
width and cut afterwards, a block shifts its windows by the parity of its index in the full stage, also where the map is no larger
than one window, and maps are padded to whole windows before they are shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

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

NORM_EPS = 1e-5
STAGES = 4
ELASTIC_STAGE = 2  # the third, the only one whose depth varies


def relative_position_index(window: int) -> Tensor:
    """The row of the bias table for each pair of cells (query, key) of a window: int64 (window**2, window**2)."""
    side = torch.arange(window)
    cells = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).flatten(0, 1)
    rows, columns = (cells[:, None] - cells[None] + window - 1).unbind(-1)
    return rows * (2 * window - 1) + columns


def split_windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, D) -> (B, windows, window**2, D), row by row; H and W are multiples of the window."""
    return x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of `split_windows`: (B, windows, window**2, D) -> (B, height, width, D)."""
    x = x.unflatten(2, (window, window)).unflatten(1, (height // window, width // window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def windows_on_map(weights: Tensor, cells: Tensor, count: int) -> Tensor:
    """Attention within windows as attention between all cells of a map.

    Args:
        weights: (B, windows, heads, c, c).
        cells: int64 (windows, c), which of the map's cells, from 1, each of a window's is; 0 for none.
        count: cells of the map.
    Returns:
        (B, heads, count, count), 0 between cells of different windows.
    """
    whole = weights.new_zeros(len(weights), weights.shape[2], count + 1, count + 1)
    whole[:, :, cells[:, :, None], cells[:, None, :]] = weights.transpose(1, 2)
    return whole[:, :, 1:, 1:]


def same_part(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Which cells of a window may look at each other when the map has been rolled by half a window.

    Rolling brings cells from opposite borders together; only those that were neighbours before do.

    Args:
        height, width: of the map in cells, in whole windows.
    Returns:
        bool (windows, window**2, window**2).
    """

    def parts(size: int) -> Tensor:
        cells = torch.arange(size, device=device)
        return (cells >= size - window).long() + (cells >= size - window // 2).long()

    part = 3 * parts(height)[:, None] + parts(width)
    part = split_windows(part[None, :, :, None], window)[0, :, :, 0]
    return part[:, :, None] == part[:, None, :]


class WindowAttention(Sliced):
    """Self-attention within windows over the leading heads, with a learned bias for each offset between two cells."""

    relative_position_index: Tensor

    def __init__(self, width: int, head_dim: int, window: int):
        super().__init__()
        self.head_dim = head_dim
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, width // head_dim))
        # stored with the weights, as the published checkpoints do, so that a model built on the meta device gets it from the file
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """(B, windows, cells, D) -> the same shape.

        Args:
            visible: bool (windows, cells, cells), see `same_part`; None where all cells of a window see each other.
        """
        query, key, value, bias = self._parts(x, visible)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        windows, _, width = x.shape[1:]
        mixed = mixed.unflatten(1, (windows, width // self.head_dim)).transpose(2, 3).flatten(3)
        return linear(mixed, self.proj, width, rescale=self.rescale)

    def _parts(self, x: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value (B, windows * heads, cells, head_dim), and what is added to their products."""
        windows, cells, width = x.shape[1:]
        heads = width // self.head_dim
        qkv = linear(x, self.qkv, width, groups=3, rescale=self.rescale).unflatten(-1, (3, heads, self.head_dim))
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
        bias = self.relative_position_bias_table[:, :heads][self.relative_position_index].permute(2, 0, 1)
        bias = bias.expand(windows, heads, cells, cells)
        if visible is not None:
            bias = bias.masked_fill(~visible[:, None], -torch.inf)
        # windows stand with the heads, so that the batch needs no copies of the bias
        return query, key, value, bias.flatten(0, 1)[None].to(query.dtype)

    def weights(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """What `forward` mixes the values by: (B, windows, heads, cells, cells), rows sum to 1."""
        query, key, _, bias = self._parts(x, visible)
        return (query @ key.transpose(-1, -2) * self.head_dim**-0.5 + bias).softmax(-1).unflatten(1, (x.shape[1], -1))


class Block(nn.Module):
    """Pre-norm transformer block on a map (B, H, W, D), with attention within plain or shifted windows."""

    def __init__(self, width: int, head_dim: int, window: int, shifted: bool, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.window, self.drop_path = window, drop_path
        self.shift = window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = WindowAttention(width, head_dim, window)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, round(width * mlp_ratio))

    def _windows(self, x: Tensor) -> tuple[Tensor, int, int]:
        """A map as its windows, and the sides of the padded map."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))  # zeros, which are looked at like other cells
        rows, columns = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        return split_windows(x, self.window), rows, columns

    def attention_weights(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B, H, W, D) into the block -> who looks at whom on the map, (B, heads, H * W, H * W), 0 between windows.

        Rows sum to 1, less what falls on the zeros that pad the map to whole windows.
        """
        weights = self.attn.weights(self._windows(layer_norm(x, self.norm1))[0], visible if self.shift else None)
        count = x.shape[1] * x.shape[2]
        numbers = torch.arange(1, count + 1, device=x.device).view(1, *x.shape[1:3], 1)
        cells = self._windows(numbers)[0][0, :, :, 0]  # 0 where the map is padded
        return windows_on_map(weights, cells, count)

    def _attend(self, x: Tensor, visible: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        windows, rows, columns = self._windows(x)
        x = self.attn(windows, visible if self.shift else None)
        x = join_windows(x, self.window, rows, columns)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width]

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """`visible`: what `same_part` says of the padded map; only shifted windows look at it."""
        rate = self.drop_path if self.training else 0.0
        x = add_residual(x, lambda y: self._attend(layer_norm(y, self.norm1), visible), rate, part_above=1.0)
        return add_residual(x, lambda y: self.mlp(layer_norm(y, self.norm2)), rate, part_above=1.0)


def leading_of_four(weight: Tensor, width: int) -> Tensor:
    """The leading `width` of each quarter of the last dimension: (..., 4 * full) -> (..., 4 * width)."""
    return weight.unflatten(-1, (4, -1))[..., :width].flatten(-2)


class PatchMerging(Sliced):
    """2 x 2 cells -> one of twice the width; the cells stand row by row, each with all its channels."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=NORM_EPS)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, ceil(H / 2), ceil(W / 2), 2 D)."""
        height, width, channels = x.shape[1:]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
        norm, full = self.norm, self.norm.weight.shape[0] // 4
        scale, shift = leading_of_four(norm.weight, channels), leading_of_four(norm.bias, channels)
        weight = leading_of_four(self.reduction.weight[: 2 * channels], channels)
        if channels < full and self.rescale:  # the weight has been copied anyway, and is smaller than the map
            weight = weight * (full / channels)
        return F.linear(F.layer_norm(x, (4 * channels,), scale, shift, norm.eps), weight)


class PatchEmbed(nn.Module):
    """Non-overlapping patches and a norm, both at the full width, of which the leading channels go on."""

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, images: Tensor, width: int) -> Tensor:
        """(B, C, H, W) -> (B, H / patch, W / patch, width)."""
        return self.norm(self.proj(images).permute(0, 2, 3, 1))[..., :width]


class Stage(nn.Module):
    """Blocks of one width, then the merging that leads to the next stage (the last stage has none)."""

    def __init__(self, blocks: Sequence[Block], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class _Hierarchy(Backbone):
    """What the elastic and the extracted transformer share: four stages from pictures to `Features`."""

    def _build(self, blocks: Sequence[str], width: int, embed_width: int, rates: Sequence[float]) -> None:
        """Make all modules but the mask token from `self.arguments`.

        Args:
            blocks: per stage a letter per block, "n" for plain windows and "s" for shifted ones.
            width: of the first stage; embed_width: of the patch embedding; rates: of stochastic depth, of all blocks.
        """
        given, rates = self.arguments, list(rates)
        self.patch_size: int = given["patch_size"]
        self.window: int = given["window"]
        self.head_dim: int = given["head_dim"]
        widths = [width * 2**number for number in range(STAGES)]
        self.patch_embed = PatchEmbed(self.patch_size, given["channels"], embed_width)
        stages = []
        for number, letters in enumerate(blocks):
            made = [
                Block(widths[number], self.head_dim, self.window, letter == "s", given["mlp_ratio"], rates.pop(0))
                for letter in letters
            ]
            stages.append(Stage(made, PatchMerging(widths[number]) if number + 1 < STAGES else None))
        self.stages = nn.ModuleList(stages)
        self.norms = nn.ModuleList(nn.LayerNorm(size, eps=NORM_EPS) for size in widths)
        self.strides = tuple(self.patch_size * 2**number for number in range(STAGES))
        channels = [size for size, letters in zip(widths, blocks, strict=True) for _ in letters]
        strides = [stride for stride, letters in zip(self.strides, blocks, strict=True) for _ in letters]
        self.preprocess = default_preprocess(given["image_size"], given["channels"])
        self.feature_info = FeatureInfo(widths[-1], len(channels), tuple(channels), tuple(strides))

    @property
    def blocks(self) -> list[Block]:
        """All blocks in their order, for those who treat them one by one (`--compile`)."""
        return [cast(Block, block) for stage in self.stages for block in cast(Stage, stage).blocks]

    def _embed(self, images: Tensor, width: int) -> Tensor:
        image_grid(images, self.patch_size, "patch size")
        return self.patch_embed(images, width)

    def attention_weights(self, inputs, layer: int = -1, subnet: Subnet | None = None) -> Tensor:
        """Attention probabilities (B, heads, N, N) of one active block over its map; see `Block.attention_weights`."""
        caught: list[tuple[Block, tuple]] = []
        hooks = [block.register_forward_pre_hook(lambda block, args: caught.append((block, args))) for block in self.blocks]
        try:
            self(inputs, subnet=subnet)
        finally:
            for hook in hooks:
                hook.remove()
        (layer,) = resolve_layers([layer], len(caught))
        block, (x, visible) = caught[layer]
        return block.attention_weights(x, visible)

    def _run(self, x: Tensor, kept: Sequence[Sequence[int]], layers: Sequence[int]) -> Features:
        """Patches (B, H, W, width) through the kept blocks of each stage."""
        wanted = set(resolve_layers(layers, sum(map(len, kept))))
        maps: list[Tensor] = []
        outputs: dict[int, Layer] = {}
        position = 0
        for number, indices in enumerate(kept):
            stage = cast(Stage, self.stages[number])
            rows, columns = (-(-side // self.window) * self.window for side in x.shape[1:3])
            visible = same_part(rows, columns, self.window, x.device)  # once for all blocks of the stage
            for index in indices:
                block = stage.blocks[index]
                if self.activation_checkpointing and self.training:
                    x = cast(Tensor, checkpoint(block, x, visible, use_reentrant=False))
                else:
                    x = block(x, visible)
                if position in wanted:
                    outputs[position] = Layer(None, {"image": x.flatten(1, 2)}, {"image": tuple(x.shape[1:3])})
                position += 1
            maps.append(layer_norm(x, cast(nn.LayerNorm, self.norms[number])))
            if stage.downsample is not None:
                x = stage.downsample(x)
        tokens = maps[-1].flatten(1, 2)
        return Features(
            pooled=tokens.mean(1),
            tokens={"image": tokens},
            grid={"image": tuple(maps[-1].shape[1:3])},
            layers=outputs,
            maps=tuple(each.permute(0, 3, 1, 2) for each in maps),
            strides=self.strides,
        )

    def resize_weights(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Fit a table of position biases that was trained with another window, by bicubic interpolation; None for anything else."""
        leaf = name.rpartition(".")[2]
        if leaf == "relative_position_index":
            return relative_position_index(self.window)
        side, own = round(tensor.shape[0] ** 0.5), 2 * self.window - 1
        if leaf != "relative_position_bias_table" or side * side != tensor.shape[0] or tensor.shape[1] != shape[1]:
            return None
        table = tensor.float().t().unflatten(1, (side, side))[None]
        table = F.interpolate(table, size=(own, own), mode="bicubic", align_corners=False)
        return table[0].flatten(1).t().to(tensor.dtype)

    def layer_ids(self) -> dict[str, int]:
        """See `Backbone.layer_ids`: blocks are counted through all stages, a merging belongs to the block after it."""
        before = [0]
        for stage in self.stages:
            before.append(before[-1] + len(cast(Stage, stage).blocks))
        ids = {}
        for name, _ in self.named_parameters():
            if name == "mask_token" or name.startswith("patch_embed."):
                ids[name] = 0
            elif name.startswith("stages."):
                _, number, part, index = name.split(".")[:4]
                ids[name] = 1 + (before[int(number)] + int(index) if part == "blocks" else before[int(number) + 1])
        return ids


def check_sizes(given: dict) -> None:
    """Refuse what neither an elastic nor a plain Swin can have.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    image_size, patch_size, head_dim, ratio = (given[name] for name in ("image_size", "patch_size", "head_dim", "mlp_ratio"))
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size}: must be a multiple of patch_size {patch_size}")
    if given["window"] < 2:
        raise ValueError(f"window {given['window']}: expected at least 2 cells")
    if ratio <= 0 or head_dim * ratio % 1:
        raise ValueError(f"mlp_ratio {ratio}: times head_dim {head_dim} it must be a whole number, above 0")


class ElasticSwin(_Hierarchy, Supernet):
    """Swin transformer whose width and whose depth of the third stage are chosen per call.

    `Subnet.depth` names the blocks of all four stages, `Subnet(96, (2, 2, 6, 2))`; `Subnet(96, 6)`, as the paper's tables have it,
    is taken for the same.

    Args:
        image_size: side of the square training image in pixels.
        patch_size: side of a patch in pixels.
        window: side of a window in cells.
        min_width, max_width, width_step: range of widths of the first stage; each is a multiple of `head_dim`.
        depths: blocks of each of the four stages.
        min_depth: least number of blocks of the third stage.
        head_dim: channels per attention head, the same at all widths and stages.
        channels: channels of the image.
        mlp_ratio: hidden width of the MLP over the width.
        drop_path: rate of stochastic depth of the last block; it rises linearly from 0. Active in training mode only.
        mask_stride: pixels per cell of `token_mask`.
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
        patch_size: int = 4,
        window: int = 7,
        min_width: int = 96,
        max_width: int = 128,
        width_step: int = 16,
        depths: Sequence[int] = (2, 2, 18, 2),
        min_depth: int = 6,
        head_dim: int = 16,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        mask_stride: int = 16,
        rescale: bool = True,
    ):
        super().__init__()
        depths = tuple(depths)
        self.architecture = "elastic_swin"
        self.arguments = {
            "image_size": image_size,
            "patch_size": patch_size,
            "window": window,
            "min_width": min_width,
            "max_width": max_width,
            "width_step": width_step,
            "depths": depths,
            "min_depth": min_depth,
            "head_dim": head_dim,
            "channels": channels,
            "mlp_ratio": mlp_ratio,
            "drop_path": drop_path,
            "mask_stride": mask_stride,
        }
        check_sizes(self.arguments)
        if not head_dim <= min_width <= max_width or width_step < 1:
            raise ValueError(f"widths {min_width}..{max_width} by {width_step}: expected {head_dim} <= min_width <= max_width")
        if any(value % head_dim for value in (min_width, max_width, width_step)) or (max_width - min_width) % width_step:
            raise ValueError(f"widths {min_width}..{max_width} by {width_step}: all must be multiples of head_dim {head_dim}")
        if len(depths) != STAGES or min(depths) < 1:
            raise ValueError(f"depths {depths}: expected at least one block in each of four stages")
        if not 1 <= min_depth <= depths[ELASTIC_STAGE]:
            raise ValueError(f"min_depth {min_depth}: expected 1..{depths[ELASTIC_STAGE]}, the blocks of the third stage")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path {drop_path}: expected 0 up to, not including, 1")
        if mask_stride < patch_size or mask_stride % patch_size:
            raise ValueError(f"mask_stride {mask_stride}: must be a multiple of patch_size {patch_size}")
        self.mask_stride = mask_stride
        self.widths = tuple(range(min_width, max_width + 1, width_step))
        self.depths = tuple(self._per_stage(depth) for depth in range(min_depth, depths[ELASTIC_STAGE] + 1))
        self.mask_token = nn.Parameter(torch.zeros(1, max_width))
        blocks, total = [("ns" * depth)[:depth] for depth in depths], sum(depths)
        self._build(blocks, max_width, max_width, [drop_path * index / max(1, total - 1) for index in range(total)])
        self._set_rescale(rescale)

    # -- subnets ------------------------------------------------------------------------------------------------------

    def _per_stage(self, depth: int) -> tuple[int, ...]:
        """Blocks of all stages when the third one has `depth`."""
        full = self.arguments["depths"]
        return (*full[:ELASTIC_STAGE], depth, *full[ELASTIC_STAGE + 1 :])

    def check_subnet(self, subnet: Subnet | None) -> Subnet:
        """The subnet with a depth per stage, or the intact one for None.

        Args:
            subnet: its depth is one number per stage, or that of the third stage.
        Raises:
            ValueError: not on the grid of widths and depths.
        """
        if subnet is not None and not isinstance(subnet.depth, tuple):
            subnet = Subnet(subnet.width, self._per_stage(subnet.depth))
        return super().check_subnet(subnet)

    def _sizes(self, subnet: Subnet | None) -> tuple[int, list[tuple[int, ...]]]:
        """Width and kept blocks per stage of a subnet, checked."""
        subnet = self.check_subnet(subnet)
        assert isinstance(subnet.depth, tuple)  # `check_subnet` sees to it
        totals = [len(cast(Stage, stage).blocks) for stage in self.stages]
        return subnet.width, [kept_blocks(depth, total) for depth, total in zip(subnet.depth, totals, strict=True)]

    def count_parameters(self, subnet: Subnet | None = None) -> int:
        """Parameters of the stand-alone model of a subnet (the mask token is not one of them)."""
        width, kept = self._sizes(subnet)
        full = self.widths[-1]
        count = full * (self.patch_embed.proj.weight[0].numel() + 1) + 2 * full
        for number, indices in enumerate(kept):
            size = width * 2**number
            hidden = round(size * self.arguments["mlp_ratio"])
            table = (2 * self.window - 1) ** 2 * (size // self.head_dim)
            block = (3 * size * size + 3 * size) + (size * size + size) + (2 * size * hidden + hidden + size) + 4 * size + table
            count += len(indices) * block + 2 * size
            if number + 1 < STAGES:
                count += 8 * size + 8 * size * size
        return count

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        """Image (B, C, H, W) -> features of the subnet; H and W are any multiples of the patch size.

        `maps` are the four stages, each after a norm of its own; `tokens` are the last of them and `pooled` is their mean.
        `token_mask["image"]`: bool (B, N), N cells of `mask_stride` pixels, True where the mask token replaces the patches of the
        cell; both sides of the image are multiples of `mask_stride` then. Layer i is the i-th active block of all stages.
        """
        width, kept = self._sizes(subnet)
        images, mask = inputs["image"], None if token_mask is None else token_mask.get("image")
        x = self._embed(images, width)
        if mask is not None:
            mask = mask.unflatten(1, image_grid(images, self.mask_stride, "mask stride"))
            times = self.mask_stride // self.patch_size
            mask = mask.repeat_interleave(times, 1).repeat_interleave(times, 2)
            x = torch.where(mask[..., None], self.mask_token[:, :width].to(x.dtype), x)
        return self._run(x, kept, layers)

    # -- stand-alone models ---------------------------------------------------------------------------------------------

    def extract(self, subnet: Subnet) -> Swin:
        """Cut a stand-alone model out of this one; the weights are copied, the width scale is folded in.

        Returns:
            A `Swin`, in eval mode, on the same device: the subnet's outputs to 1e-5.
        Raises:
            ValueError: a subnet that is not in `list_subnets()`.

        Example:
            >>> net = ElasticSwin(image_size=32, patch_size=2, window=4, min_width=8, max_width=16, width_step=8, head_dim=8,
            ...                   depths=(1, 1, 3, 1), min_depth=2, mask_stride=8)
            >>> net.extract(Subnet(8, (1, 1, 2, 1))).feature_info.channels
            64
        """
        width, kept = self._sizes(subnet)
        own, ratio = self.state_dict(), self.arguments["mlp_ratio"]
        tensors = {name: tensor for name, tensor in own.items() if name.startswith("patch_embed.")}
        for number, indices in enumerate(kept):
            size = width * 2**number
            hidden = round(size * ratio)
            for position, index in enumerate(indices):
                old, new = f"stages.{number}.blocks.{index}", f"stages.{number}.blocks.{position}"
                for leaf in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
                    tensors[f"{new}.{leaf}"] = own[f"{old}.{leaf}"][:size]
                table, cells = "attn.relative_position_bias_table", "attn.relative_position_index"
                tensors[f"{new}.{table}"] = own[f"{old}.{table}"][:, : size // self.head_dim]
                tensors[f"{new}.{cells}"] = own[f"{old}.{cells}"]
                for name, inputs, out, groups in (
                    ("attn.qkv", size, size, 3),
                    ("attn.proj", size, size, 1),
                    ("mlp.fc1", size, hidden, 1),
                    ("mlp.fc2", hidden, size, 1),
                ):
                    weight, bias = own[f"{old}.{name}.weight"], own[f"{old}.{name}.bias"]
                    for leaf, tensor in folded(weight, bias, inputs, out, groups, self.rescale).items():
                        tensors[f"{new}.{name}.{leaf}"] = tensor
            for leaf in ("weight", "bias"):
                tensors[f"norms.{number}.{leaf}"] = own[f"norms.{number}.{leaf}"][:size]
            if number + 1 < STAGES:
                merging = f"stages.{number}.downsample"
                for leaf in ("weight", "bias"):
                    tensors[f"{merging}.norm.{leaf}"] = leading_of_four(own[f"{merging}.norm.{leaf}"], size)
                reduction = own[f"{merging}.reduction.weight"]
                scale = reduction.shape[1] / (4 * size) if self.rescale else 1
                tensors[f"{merging}.reduction.weight"] = leading_of_four(reduction[: 2 * size], size) * scale
        model = Swin(
            image_size=self.arguments["image_size"],
            patch_size=self.patch_size,
            window=self.window,
            width=width,
            embed_width=self.widths[-1],
            blocks=tuple("".join("ns"[index % 2] for index in indices) for indices in kept),
            head_dim=self.head_dim,
            channels=self.patch_embed.proj.in_channels,
            mlp_ratio=ratio,
        ).to(self.mask_token.device, self.mask_token.dtype)
        model.load_state_dict(tensors)
        model.preprocess = self.preprocess
        return model.eval()


class Swin(_Hierarchy):
    """Swin transformer with the layout of an extracted subnet: what `ElasticSwin.extract` returns.

    timm's SwinTransformer cannot represent one: there the norm of the patch embedding has the width of the first stage, blocks
    shift their windows in turn, and maps are padded after they were shifted. With `embed_width` equal to `width`, blocks "nsns...",
    `always_partition=True` and maps in whole windows the two compute the same, but for the order of cells in a merging.

    Args:
        width: of the first stage.
        drop_path: rate of stochastic depth of the last block; it rises linearly from 0. Active in training mode only.
        embed_width: channels of the patch embedding, over which its norm is taken; the leading `width` of them go on. 0 is `width`.
        blocks: per stage a letter per block: "n" for plain windows, "s" for windows shifted by half.
        image_size, patch_size, window, head_dim, channels, mlp_ratio: see `ElasticSwin`.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 4,
        window: int = 7,
        width: int = 96,
        embed_width: int = 0,
        blocks: Sequence[str] = ("ns", "ns", "nsnsns", "ns"),
        head_dim: int = 16,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        blocks, embed_width = tuple(blocks), embed_width or width
        self.architecture = "swin"
        self.arguments = {
            "image_size": image_size,
            "patch_size": patch_size,
            "window": window,
            "width": width,
            "embed_width": embed_width,
            "blocks": blocks,
            "head_dim": head_dim,
            "channels": channels,
            "mlp_ratio": mlp_ratio,
            "drop_path": drop_path,
        }
        check_sizes(self.arguments)
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path {drop_path}: expected 0 up to, not including, 1")
        if not 0 < width <= embed_width or width % head_dim:
            raise ValueError(f"width {width}: expected a multiple of head_dim {head_dim}, at most embed_width {embed_width}")
        if len(blocks) != STAGES or any(not letters or set(letters) - {"n", "s"} for letters in blocks):
            raise ValueError(f"blocks {blocks}: expected for each of four stages a letter per block, n or s")
        total = sum(map(len, blocks))
        self._build(blocks, width, embed_width, [drop_path * index / max(1, total - 1) for index in range(total)])

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        """Image (B, C, H, W) -> features; H and W are any multiples of the patch size. See `ElasticSwin.forward`."""
        if subnet is not None or token_mask is not None:
            raise ValueError("an extracted Swin has no subnets and no mask token; use the elastic supernet for both")
        x = self._embed(inputs["image"], self.arguments["width"])
        return self._run(x, [range(len(letters)) for letters in self.arguments["blocks"]], layers)


@register
def swin(**arguments) -> Swin:
    """A plain Swin transformer with the layout of an extracted subnet: takes all arguments of `Swin`."""
    return Swin(**arguments)


@register
def elastic_swin(**arguments) -> ElasticSwin:
    """Any elastic Swin transformer: takes all arguments of `ElasticSwin`."""
    return ElasticSwin(**arguments)


@register
def elastic_swin_tiny(**arguments) -> ElasticSwin:
    """For small pictures and two cores: 32 px, patch 2, window 4, widths 16..32, third-stage depths 2..6; 3.1 M parameters."""
    small = dict(
        image_size=32,
        patch_size=2,
        window=4,
        min_width=16,
        max_width=32,
        width_step=8,
        depths=(2, 2, 6, 2),
        min_depth=2,
        head_dim=8,
        mask_stride=8,
    )
    return ElasticSwin(**{**small, **arguments})


@register
def elastic_swin_small(**arguments) -> ElasticSwin:
    """Widths 64..96, third-stage depths 6..18, up to Swin-S with window 7."""
    return ElasticSwin(**{**dict(min_width=64, max_width=96), **arguments})


@register
def elastic_swin_base(**arguments) -> ElasticSwin:
    """The published supernet: widths 96..128, third-stage depths 6..18, Swin-T to Swin-B with window 7; 39 subnets."""
    return ElasticSwin(**{**dict(min_width=96, max_width=128), **arguments})
