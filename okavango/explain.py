"""Pictures that explain a backbone: attention maps, principal components of patch features, and grids of them beside the input.

Attention is recomputed from the input of one block, so the normal forward keeps its fused kernels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.models.backbone import Backbone, resolve_layers
from okavango.models.elastic_swin import windows_on_map
from okavango.models.features import Features, Subnet


class ExplainError(ValueError):
    """The model or the features do not offer what is to be shown."""


# -- attention --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention(model: Backbone, images: Any, *, layer: int = -1, subnet: Subnet | None = None, class_maps: bool = False) -> Tensor:
    """Attention probabilities of one block, in eval mode.

    Args:
        model: an elastic or extracted vision transformer or Swin, a wrapped vision transformer (`timm/`, `torchvision/`,
            `open_clip/`), or timm's Swin of the first version.
        images: float (B, C, H, W) as after the preprocess, or anything else that `model.preprocess(image=...)` takes.
        layer: block, negative ones count from the end.
        subnet: slice of an elastic model.
        class_maps: only what the class token looks at, or, where there is none, the patches on average, as a map.
    Returns:
        (B, heads, N, N), rows sum to 1, prefix tokens first; with `class_maps` (B, heads, h, w). A Swin's N are the cells of the
        map that the block works on; between its windows stands 0, and what cells look at in the padding of a map is left out.
    Raises:
        ExplainError: a model without attention that can be shown, or whose tokens form no map when maps are asked for.
    """
    batch = as_batch(model, images)
    training = model.training
    model.eval()
    try:
        own = getattr(model, "attention_weights", None)
        weights = own({"image": batch}, layer, subnet) if own else _caught(model, batch, layer, subnet)
    finally:
        model.train(training)
    if not class_maps:
        return weights
    info = model.feature_info
    grids = [tuple(-(-side // stride) for side in batch.shape[-2:]) for stride in info.strides]
    grid = next((grid for grid in grids if weights.shape[-1] == info.prefix + grid[0] * grid[1]), None)
    if grid is None:
        raise ExplainError(f"{type(model).__name__}: the tokens of this block form no map; leave class_maps out")
    rows = weights[:, :, 0] if info.prefix else weights.mean(2)
    return rows[:, :, info.prefix :].unflatten(-1, grid)


def as_batch(model: Backbone, images: Any) -> Tensor:
    """Float batches (B, C, H, W) pass as they are, raw pictures go through the model's preprocess."""
    ready = isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point()
    batch = images if ready else model.preprocess(image=images)["image"]
    parameter = next(model.parameters())
    return batch.to(parameter.device, parameter.dtype)


def _caught(model: Backbone, batch: Tensor, layer: int, subnet: Subnet | None) -> Tensor:
    """Attention of a block of another library, from what goes into it."""
    from timm.models.swin_transformer import SwinTransformerBlock

    if subnet is not None:
        raise ExplainError(f"{type(model).__name__}: has no subnets")
    modules = [module for module in model.modules() if _is_plain(module) or type(module) is SwinTransformerBlock]
    if not modules:
        raise ExplainError(
            f"{type(model).__name__} ({model.architecture}): has no plain self-attention to show; use a vision transformer"
        )
    (index,) = resolve_layers([layer], len(modules))
    caught: list[tuple[tuple, dict]] = []
    hook = modules[index].register_forward_pre_hook(lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
    try:
        model(image=batch)
    finally:
        hook.remove()
    args, kwargs = caught[0]
    if type(modules[index]) is SwinTransformerBlock:
        return _swin_weights(modules[index], args[0])
    if kwargs.get("attn_mask") is not None:
        raise ExplainError(f"{model.architecture}: block {index} masks its attention, which is not recomputed")
    return _weights(modules[index], args[0] if args else kwargs["query"])


def _is_plain(module: nn.Module) -> bool:
    """Softmax(q k / sqrt(d)) and nothing added: no relative positions, no rotation."""
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight is not None
    from timm.layers import Attention

    return type(module) is Attention


def _weights(module: Any, x: Tensor) -> Tensor:
    """(B, N, D) into a block's attention -> probabilities (B, heads, N, N)."""
    if isinstance(module, nn.MultiheadAttention):
        x = x if module.batch_first else x.transpose(0, 1)
        projected, head_dim = F.linear(x, module.in_proj_weight, module.in_proj_bias), module.head_dim
        qkv = projected.unflatten(-1, (3, module.num_heads, head_dim)).permute(2, 0, 3, 1, 4)
        query, key = qkv[0], qkv[1]
    else:
        qkv = module.qkv(x).unflatten(-1, (3, module.num_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, head_dim = module.q_norm(qkv[0]), module.k_norm(qkv[1]), module.head_dim
    return (query @ key.transpose(-1, -2) * head_dim**-0.5).softmax(-1)


def _swin_weights(block: Any, x: Tensor) -> Tensor:
    """(B, H, W, D) into a block of timm's Swin -> probabilities (B, heads, H * W, H * W), 0 between windows.

    The block computes them; the same cutting into windows says where each of them stands.
    """
    from timm.models.swin_transformer import window_partition

    caught: list[Tensor] = []
    hook, fused = block.attn.softmax.register_forward_hook(lambda _, __, out: caught.append(out)), block.attn.fused_attn
    block.attn.fused_attn = False
    try:
        block(x)
    finally:
        hook.remove()
        block.attn.fused_attn = fused
    height, width = x.shape[1:3]
    numbers = torch.arange(1, height * width + 1, device=x.device).view(1, height, width, 1)
    numbers = numbers.roll([-shift for shift in block.shift_size], (1, 2))
    numbers = F.pad(numbers, (0, 0, 0, -width % block.window_size[1], 0, -height % block.window_size[0]))
    cells = window_partition(numbers, block.window_size).flatten(1)
    return windows_on_map(caught[0].unflatten(0, (len(x), -1)), cells, height * width)


# -- principal components ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def pca(
    source: Features | Backbone,
    images: Any = None,
    *,
    layer: int | None = None,
    subnet: Subnet | None = None,
    foreground: float | None = None,
    percentiles: tuple[float, float] = (1.0, 99.0),
) -> Tensor:
    """First three principal components of patch features over the whole batch, as colours.

    Args:
        source: features, or a model that is run on `images` (see `attention`).
        layer: block or stage; None takes the tokens after the final norm, or the coarsest map of a convolutional network.
        subnet: slice of an elastic model.
        foreground: 0..1; patches whose first component, scaled like a colour, lies below become black, and the colours come from
            the components of the others (DINOv2, arXiv 2304.07193, figure 1).
        percentiles: of each component, which become 0 and 255.
    Returns:
        uint8 (B, h, w, 3). The sign of a component is such that its largest loading is positive.
    Raises:
        ExplainError: no patch features, fewer than three channels, no patch above the threshold.
    """
    patches, grid = _patches(source, images, layer, subnet)
    if patches.shape[-1] < 3:
        raise ExplainError(f"patch features have {patches.shape[-1]} channels; three colours need at least three")
    flat = patches.flatten(0, 1).double()
    keep = torch.ones(flat.shape[0], dtype=torch.bool, device=flat.device)
    if foreground is not None:
        keep = _stretch(_components(flat, 1), percentiles)[:, 0] >= foreground
        if int(keep.sum()) < 2:
            raise ExplainError(f"foreground={foreground}: {int(keep.sum())} patches lie above; lower the threshold")
    colours = torch.zeros(flat.shape[0], 3, dtype=torch.float64, device=flat.device)
    colours[keep] = _stretch(_components(flat[keep], 3), percentiles)
    return (colours * 255).round().to(torch.uint8).view(patches.shape[0], *grid, 3)


def _patches(source: Features | Backbone, images: Any, layer: int | None, subnet: Subnet | None) -> tuple[Tensor, tuple[int, ...]]:
    """Patch features (B, N, D) and their grid."""
    if isinstance(source, Features):
        if layer is not None and layer not in source.layers:
            raise ExplainError(
                f"layer {layer}: the features hold layers {sorted(source.layers) or 'none'}; ask for it in the forward"
            )
        features = source
    else:
        training = source.training
        source.eval()
        try:
            features = source({"image": as_batch(source, images)}, subnet=subnet, layers=() if layer is None else (layer,))
        finally:
            source.train(training)
        layer = None if layer is None else next(iter(features.layers))
    if layer is not None:
        return features.layers[layer].tokens["image"], features.layers[layer].grid["image"]
    if "image" in features.tokens:
        return features.tokens["image"], features.grid["image"]
    if features.maps:
        return features.maps[-1].flatten(2).transpose(1, 2), tuple(features.maps[-1].shape[-2:])
    raise ExplainError("the features hold neither tokens nor maps of an image")


def _components(rows: Tensor, count: int) -> Tensor:
    """Scores (M, count) of the first principal components of rows (M, D)."""
    centred = rows - rows.mean(0)
    directions = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return centred @ (directions * largest.sign())


def _stretch(scores: Tensor, percentiles: tuple[float, float]) -> Tensor:
    low, high = (np.percentile(scores.cpu().numpy(), percentile, axis=0) for percentile in percentiles)
    bottom, top = torch.as_tensor(low, device=scores.device), torch.as_tensor(high, device=scores.device)
    return ((scores - bottom) / (top - bottom).clamp_min(1e-12)).clamp(0, 1)


# -- pictures ---------------------------------------------------------------------------------------------------------------


def pictures(model: Backbone, batch: Tensor) -> Tensor:
    """Undo a preprocess: normalised float (B, C, H, W) -> uint8 (B, H, W, 3), for looking at."""
    rule = model.preprocess.array().normalise
    values = batch.detach().float().cpu()
    if rule.rule == "standard":
        values = values * torch.tensor(rule.std).view(-1, 1, 1) + torch.tensor(rule.mean).view(-1, 1, 1)
    else:
        low = values.amin((1, 2, 3), keepdim=True)
        values = (values - low) / (values.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-12)
    rgb = values[:, :3] if values.shape[1] >= 3 else values[:, :1].expand(-1, 3, -1, -1)
    return (rgb.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


# Dark blue over violet and orange to pale yellow: brightness grows with the value, so it can be read in grey too.
_HEAT = np.array([(9, 7, 40), (76, 19, 108), (152, 40, 102), (221, 81, 58), (252, 160, 44), (252, 253, 191)], np.float64)


def heat(maps: Tensor) -> Tensor:
    """Maps (B, h, w) -> uint8 colours (B, h, w, 3), each map stretched from its least to its greatest value."""
    values = maps.detach().double().cpu()
    low = values.amin((1, 2), keepdim=True)
    scaled = ((values - low) / (values.amax((1, 2), keepdim=True) - low).clamp_min(1e-12)).numpy()
    stops = np.linspace(0, 1, len(_HEAT))
    return torch.from_numpy(np.stack([np.interp(scaled, stops, _HEAT[:, c]) for c in range(3)], -1).round().astype(np.uint8))


def save_grid(path: str | os.PathLike, columns: Mapping[str, Tensor | Sequence[Any]], *, side: int = 160) -> Path:
    """Write a PNG: one row per sample, one labelled column per entry.

    Args:
        path: ends in ``.png``.
        columns: label -> uint8 (B, h, w, 3) pictures of any size, or float (B, h, w) maps, which `heat` colours.
        side: pixels of the longer side of a cell; small pictures are enlarged without blur, so that patches stay visible.
    Raises:
        ExplainError: no columns, columns of different length, another kind of array.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw

    path = Path(path)
    if path.suffix != ".png":
        raise ExplainError(f"{path}: the name must end in .png")
    cells = {label: _as_pictures(label, values) for label, values in columns.items()}
    counts = {label: len(column) for label, column in cells.items()}
    if not cells or len(set(counts.values())) != 1 or not min(counts.values()):
        raise ExplainError(f"columns must be there and of one length, got {counts}")
    gap, title = 6, 18
    height, width = next(iter(cells.values())).shape[1:3]
    cell = (max(1, round(side * width / max(width, height))), max(1, round(side * height / max(width, height))))
    rows = next(iter(counts.values()))
    canvas = Pillow.new("RGB", (gap + len(cells) * (cell[0] + gap), title + rows * (cell[1] + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for x, (label, column) in enumerate(cells.items()):
        left = gap + x * (cell[0] + gap)
        while len(label) > 1 and draw.textlength(label) > cell[0]:
            label = label[:-1]
        draw.text((left, 3), label, fill="black")
        for y, picture in enumerate(column):
            grows = picture.shape[0] < cell[1]
            drawn = Pillow.fromarray(picture).resize(cell, Pillow.Resampling.NEAREST if grows else Pillow.Resampling.LANCZOS)
            canvas.paste(drawn, (left, title + y * (cell[1] + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path


def _as_pictures(label: str, values: Tensor | Sequence[Any]) -> np.ndarray:
    tensor = values if isinstance(values, Tensor) else torch.stack([torch.as_tensor(np.asarray(value)) for value in values])
    if tensor.ndim == 3 and tensor.is_floating_point():
        tensor = heat(tensor)
    if tensor.ndim != 4 or tensor.shape[-1] != 3 or tensor.dtype != torch.uint8:
        raise ExplainError(
            f"column {label!r}: expected uint8 (B, h, w, 3) or float (B, h, w), got {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor.cpu().numpy()
