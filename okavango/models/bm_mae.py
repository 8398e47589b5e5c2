"""BM-MAE (arXiv 2505.00568): one vision transformer over the patches of several three-dimensional scans of a brain.

Every modality has its own patch embedding and fixed positions; the tokens of all of them go through one encoder. Any subset of the
modalities may be given, per call and per sample. What is absent or hidden is not computed: the tokens of a batch stand in one list
without gaps, in which sequences of equal length lie side by side, and attention runs once for each length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from okavango.models.backbone import ArgumentError, Backbone, FeatureInfo, register, resolve_layers
from okavango.models.dropout import attention, dropout
from okavango.models.features import Features, Layer
from okavango.models.preprocess import Normalise, Preprocess, Resize, Volume

Grid = tuple[int, int, int]
Positions = Literal["interpolate", "extend"]

# What else the published sequences are called, by BraTS 2023 and UPenn-GBM among others.
ALIASES = {
    "t1": ("t1n", "t1w", "t1native"),
    "t1ce": ("t1c", "t1gd", "t1post", "t1wce"),
    "t2": ("t2w",),
    "flair": ("t2f", "t2flair", "fla"),
}


# -- patches and positions ------------------------------------------------------------------------------------------------------


def grid_of(size: Sequence[int], patch: int) -> Grid:
    """Patches along each axis of a volume; a last one that is not full counts."""
    depth, height, width = (-(-side // patch) for side in size)
    return depth, height, width


def patch_view(volumes: Tensor, patch: int) -> Tensor:
    """(B, 1, D, H, W) -> (B, d, h, w, patch, patch, patch); a view, unless zeros have to fill up the ends of axes."""
    short = [-side % patch for side in volumes.shape[-3:]]
    if any(short):
        volumes = F.pad(volumes, (0, short[2], 0, short[1], 0, short[0]))
    cells = volumes[:, 0]
    for axis in (3, 2, 1):
        cells = cells.unflatten(axis, (-1, patch))
    return cells.permute(0, 1, 3, 5, 2, 4, 6)


def from_patches(patches: Tensor, size: Sequence[int], patch: int) -> Tensor:
    """(B, N, patch ** 3) -> (B, 1, *size), the inverse of `patch_view`; what had filled up the ends is cut off."""
    cells = patches.unflatten(2, (patch,) * 3).unflatten(1, grid_of(size, patch))
    volumes = cells.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return volumes[:, None, : size[0], : size[1], : size[2]]


def sincos(grid: Sequence[int], width: int) -> Tensor:
    """Sines and cosines of integer indices into a grid, flattened with the last axis fastest.

    Returns:
        float32 (N, width); sixths of the width hold sine and cosine of the second index, the first and the third, of frequencies
        10000 ** (-i / (width / 6)).
    """
    frequencies = 10_000 ** (-torch.arange(width // 6, dtype=torch.float64) / (width // 6))
    first, second, third = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    parts = []
    for index in (second, first, third):
        angles = index.flatten()[:, None] * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, 1).float()


def positions_at(table: Tensor, native: Grid, grid: Grid, rule: Positions) -> Tensor:
    """A table of positions (1, N, D) of the native grid -> that of another grid.

    Args:
        rule: "interpolate" stretches the table, linearly along each axis, as if the same brain was cut into other patches; "extend"
            takes the formula at the indices at hand, as if more or less of it was seen.
    """
    if grid == native:
        return table
    if rule == "extend":
        return sincos(grid, table.shape[-1]).to(table)[None]
    cells = table.float().unflatten(1, native).permute(0, 4, 1, 2, 3)
    return F.interpolate(cells, size=grid, mode="trilinear").flatten(2).transpose(1, 2).to(table.dtype)


class PatchEmbed(nn.Module):
    """Voxels of a patch to a token: a linear layer, kept in the shape of a convolution, and a fixed table of positions."""

    positions: Tensor

    def __init__(self, patch: int, width: int, grid: Grid):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, patch, patch, patch))
        self.bias = nn.Parameter(torch.empty(width))
        self.register_buffer("positions", sincos(grid, width)[None])
        nn.init.xavier_uniform_(self.weight.data.flatten(1))
        nn.init.uniform_(self.bias, -(patch**-1.5), patch**-1.5)

    def forward(self, patches: Tensor) -> Tensor:
        """(..., patch ** 3) -> (..., width), without positions."""
        return F.linear(patches, self.weight.flatten(1), self.bias)


# -- sequences of several lengths -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """Which tokens of a batch there are, and where they stand in one list (T, D) without gaps, shortest sequences first.

    Attributes:
        prefix: class tokens before each sequence, 0 or 1.
        grids: modality -> grid, in the order of the tokens of a sequence; N in all.
        groups: (rows of the list, tokens of each sequence) for each length.
        rows: place of each row in the whole batch (B, prefix + N), flattened; None when all are there, one sample after another.
        visible: bool (B, N), None when all are there.
    """

    prefix: int
    grids: dict[str, Grid]
    groups: tuple[tuple[int, int], ...]
    rows: Tensor | None = None
    visible: Tensor | None = None

    @classmethod
    def of(cls, grids: dict[str, Grid], batch: int, prefix: int, visible: Tensor | None = None) -> Packing:
        """Sort the samples of a batch by what is visible of them, bool (B, N); None means all."""
        length = prefix + sum(map(math.prod, grids.values()))
        if visible is None:
            return cls(prefix, grids, ((batch * length, length),))
        counts = visible.sum(1) + prefix
        order = counts.argsort(stable=True)
        lengths, samples = torch.unique_consecutive(counts[order], return_counts=True)
        groups = tuple((k * n, n) for k, n in zip(samples.tolist(), lengths.tolist(), strict=True) if n) or ((0, 1),)
        found = F.pad(visible, (prefix, 0), value=True)[order].nonzero()
        return cls(prefix, grids, groups, order[found[:, 0]] * length + found[:, 1], visible)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each modality."""
        return [math.prod(grid) for grid in self.grids.values()]

    def spread(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """The list (T, D) -> the whole batch (B, prefix + N, D), with `fill` (D,), or zeros, where there is no token."""
        length = self.prefix + sum(self.sizes)
        if self.visible is None or self.rows is None:
            return x.unflatten(0, (-1, length))
        places = len(self.visible) * length
        empty = x.new_zeros(places, x.shape[1]) if fill is None else fill.to(x.dtype).expand(places, -1)
        return empty.index_copy(0, self.rows, x).unflatten(0, (-1, length))

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """(B, prefix + N, ...) -> modality -> its part (B, n, ...)."""
        return dict(zip(self.grids, whole[:, self.prefix :].split(self.sizes, 1), strict=True))


# -- transformer ------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention within each sequence of a list; dropout is off outside of training."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
        qkv, rate = self.qkv(x), self.dropout if self.training else 0.0
        parts = qkv.split([rows for rows, _ in groups]) if len(groups) > 1 else [qkv]
        mixed = []
        for part, (_, length) in zip(parts, groups, strict=True):
            mixed.append(attention(part.unflatten(0, (-1, length)).unflatten(2, (3, self.num_heads, -1)), rate).flatten(0, 1))
        return dropout(self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed)), self.dropout, self.training)


class Mlp(nn.Module):
    """Two layers, dropout after both."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block on a list of sequences (T, D)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden, dropout)

    def forward(self, x: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
        x = x + self.attn(self.norm1(x), groups)
        return x + self.mlp(self.norm2(x))


def run_blocks(
    blocks: Iterable[nn.Module], x: Tensor, groups: Sequence[tuple[int, int]], *, recompute: bool, keep: Collection[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """A list of sequences through blocks; what comes out of the last one, and of those that are to be kept.

    Args:
        recompute: keep no activations of a block for the backward pass, compute them again.
    """
    kept = {}
    for index, block in enumerate(blocks):
        x = checkpoint(block, x, groups, use_reentrant=False) if recompute else block(x, groups)
        if index in keep:
            kept[index] = x
    return x, kept


# -- the backbone -----------------------------------------------------------------------------------------------------------------


class BMMAE(Backbone):
    """Encoder of BM-MAE.

    A volume whose sides the patch size does not divide is filled up with zeros at the end of those axes; `Features.grid` then
    counts patches that reach beyond it. All modalities have their own grid; heads ask for equal ones.

    Args:
        modalities: names of the scans, in the order of the tokens and of the columns of `present`.
        size: voxels of the trained volume, one number or one per axis.
        patch_size: side of a patch in voxels.
        width, depth, heads, mlp: channels, blocks, attention heads, hidden width of the MLPs.
        dropout: rate in training (published: 0 for pretraining and segmentation, 0.1 for classification and survival).
        class_token: off, as in the published segmentation network, `pooled` is the mean of the tokens that were computed.
        positions: how other grids than the trained one get theirs, see `positions_at`.
        spacing, orientation: what the trained volumes have, for the preprocess; None takes scans as they are stored.
    Raises:
        ArgumentError: sizes that do not fit each other, or names that are none.
    """

    def __init__(
        self,
        *,
        modalities: Sequence[str] = tuple(ALIASES),
        size: int | Sequence[int] = 128,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp: int = 1536,
        dropout: float = 0.0,
        class_token: bool = True,
        positions: Positions = "interpolate",
        spacing: Sequence[float] | None = (1.0, 1.0, 1.0),
        orientation: str | None = "LPS",
    ):
        super().__init__()
        sides = (size,) * 3 if isinstance(size, int) else tuple(size)
        if len(sides) != 3 or any(side < 1 or side % patch_size for side in sides):
            raise ArgumentError(f"size {size}: expected one number or three, multiples of patch_size {patch_size}")
        if width % 6 or width % heads:
            raise ArgumentError(f"width {width}: must be a multiple of 6, for the positions, and of heads {heads}")
        if positions not in ("interpolate", "extend"):
            raise ArgumentError(f"positions {positions!r}: expected 'interpolate' or 'extend'")
        if not modalities or len(set(modalities)) < len(modalities):
            raise ArgumentError(f"modalities {tuple(modalities)}: expected at least one name, each once")
        self.architecture = "bm_mae"
        self.arguments: dict[str, Any] = {
            "modalities": tuple(modalities),
            "size": sides,
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp": mlp,
            "dropout": dropout,
            "class_token": class_token,
            "positions": positions,
            "spacing": None if spacing is None else tuple(map(float, spacing)),
            "orientation": orientation,
        }
        self.patch_size = self.mask_stride = patch_size
        self.native_grid = grid_of(sides, patch_size)
        self.feature_info = FeatureInfo(width, depth, (width,) * depth, (patch_size,) * depth, prefix=int(class_token))
        self.preprocess = Preprocess({name: self._spec(name) for name in modalities})
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02)) if class_token else None
        self.patch_embed = nn.ModuleDict({name: PatchEmbed(patch_size, width, self.native_grid) for name in modalities})
        self.blocks = nn.ModuleList(Block(width, heads, mlp, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def _spec(self, name: str) -> Volume:
        if not name.isidentifier():
            raise ArgumentError(f"modality {name!r}: expected a name of letters, digits and underscores")
        return Volume(
            channels=(name,),
            aliases=tuple((alias, name) for alias in ALIASES.get(name, ())),
            size=self.arguments["size"],
            spacing=self.arguments["spacing"],
            orientation=self.arguments["orientation"],
            resize=Resize(rule="crop", interpolation="bilinear"),
            normalise=Normalise(rule="zscore_nonzero"),
        )

    def add_modality(self, name: str, like: str | None = None) -> None:
        """Give the model, in place, one more modality with its own embedding; what it computes of the others stays as it is.

        Args:
            name: new; its column in `present` is the last.
            like: modality or alias whose embedding and positions are copied; None starts from a random one.
        Raises:
            ArgumentError: a name that is taken, or none.
        """
        if name in self.preprocess or any(name in aliases for aliases in self._aliases()):
            raise ArgumentError(f"modality {name!r}: the model takes {', '.join(self.modalities)} already, also under other names")
        spec, norm = self._spec(name), self.norm.weight
        embed = PatchEmbed(self.patch_size, self.feature_info.channels, self.native_grid).to(norm.device, norm.dtype)
        if like is not None:
            embed.load_state_dict(self.patch_embed[self.preprocess.resolve(like)].state_dict())
        self.patch_embed[name] = embed.train(self.training)
        self.arguments = {**self.arguments, "modalities": (*self.modalities, name)}
        self.preprocess = Preprocess({**self.preprocess, name: spec})

    def _aliases(self) -> Iterable[tuple[str, ...]]:
        return (ALIASES.get(known, ()) for known in self.modalities)

    def __call__(self, inputs=None, *, present=None, token_mask=None, subnet=None, layers=(), **modalities) -> Features:
        """See `Backbone`; modalities, also those of `token_mask`, may be called by their aliases."""
        named = self._named(modalities if inputs is None else inputs)
        return super().__call__(named, present=present, token_mask=token_mask, subnet=subnet, layers=layers)

    def _named(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """By their own names, in the model's order."""
        named: dict[str, Any] = {}
        for name, value in given.items():
            known = self.preprocess.resolve(name)
            if known in named:
                raise ValueError(f"{self.architecture}: modality {known!r} was given twice, once as {name!r}")
            named[known] = value
        return {name: named[name] for name in self.modalities if name in named}

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        """Volumes {modality: (B, 1, D, H, W)}, any subset -> features.

        Args:
            present: bool (B, modalities); what stands in the volume of an absent modality has no influence.
            token_mask: modality -> bool (B, N), True where the token is hidden. Tokens that are hidden or absent are not computed;
                in the result they are zeros, and False in `Features.token_mask`.
        """
        wanted = set(resolve_layers(layers, len(self.blocks)))
        x, packing, kept = self.encode(inputs, present=present, token_mask=token_mask, layers=wanted)
        whole = packing.spread(x)
        grid: dict[str, tuple[int, ...]] = {**packing.grids}
        if self.cls_token is not None:
            pooled = whole[:, 0]
        elif packing.visible is None:
            pooled = whole.mean(1)
        else:
            pooled = whole.sum(1) / packing.visible.sum(1, keepdim=True).clamp_min(1)
        return Features(
            pooled=pooled,
            prefix=self._prefix(whole),
            tokens=packing.split(whole),
            token_mask=None if packing.visible is None else packing.split(F.pad(packing.visible, (packing.prefix, 0))),
            grid=grid,
            layers={
                index: Layer(prefix=self._prefix(whole), tokens=packing.split(whole), grid=grid)
                for index, whole in ((index, packing.spread(each)) for index, each in kept.items())
            },
        )

    def _prefix(self, whole: Tensor) -> Tensor | None:
        return None if self.cls_token is None else whole[:, :1]

    def encode(
        self,
        inputs: Mapping[str, Tensor],
        *,
        present: Tensor | None = None,
        token_mask: Mapping[str, Tensor] | None = None,
        layers: Collection[int] = (),
    ) -> tuple[Tensor, Packing, dict[int, Tensor]]:
        """As `forward`, without gaps: tokens after the final norm (T, D), where they stand, and those after some blocks."""
        inputs = self._named(inputs)
        cells = {name: patch_view(self._checked(name, volumes), self.patch_size) for name, volumes in inputs.items()}
        packing = self._packing(cells, present, token_mask)
        recompute = self.activation_checkpointing and self.training
        x, kept = run_blocks(self.blocks, self._embed(cells, packing), packing.groups, recompute=recompute, keep=layers)
        return self.norm(x), packing, kept

    def _checked(self, name: str, volumes: Tensor) -> Tensor:
        if volumes.ndim != 5 or volumes.shape[1] != 1:
            raise ValueError(f"{self.architecture}: {name!r} is {list(volumes.shape)}; expected (B, 1, D, H, W)")
        return volumes

    def _packing(self, cells: Mapping[str, Tensor], present: Tensor | None, token_mask: Mapping[str, Tensor] | None) -> Packing:
        grids: dict[str, Grid] = {name: (view.shape[1], view.shape[2], view.shape[3]) for name, view in cells.items()}
        first = next(iter(cells.values()))
        batch, prefix = first.shape[0], self.feature_info.prefix
        if odd := [name for name, view in cells.items() if view.shape[0] != batch]:
            raise ValueError(f"{self.architecture}: {len(cells[odd[0]])} samples of {odd[0]!r}, {batch} of {next(iter(cells))!r}")
        if present is None and not token_mask:
            return Packing.of(grids, batch, prefix)
        if present is None:
            present = torch.ones(batch, len(self.modalities), dtype=torch.bool, device=first.device)
        elif present.shape != (batch, len(self.modalities)):
            raise ValueError(f"{self.architecture}: present is {list(present.shape)}; expected {[batch, len(self.modalities)]}")
        else:
            absent = [name not in cells for name in self.modalities]
            if bool((present[:, absent]).any()):
                names = ", ".join(name for name in self.modalities if name not in cells)
                raise ValueError(f"{self.architecture}: present names a modality that was not given, one of {names}")
        hidden = self._named(token_mask or {})
        parts = []
        for name, grid in grids.items():
            there = present[:, self.modalities.index(name), None].expand(-1, math.prod(grid))
            if name in hidden:
                if hidden[name].shape != there.shape:
                    raise ValueError(
                        f"{self.architecture}: token_mask of {name!r} is {list(hidden[name].shape)}; expected {list(there.shape)}"
                    )
                there = there & ~hidden[name].bool()
            parts.append(there)
        visible = torch.cat(parts, 1)
        return Packing.of(grids, batch, prefix, visible)

    def _embed(self, cells: Mapping[str, Tensor], packing: Packing) -> Tensor:
        """Class tokens and the tokens of visible patches, packed."""
        batch = next(iter(cells.values())).shape[0]
        tables = {
            name: positions_at(self.patch_embed[name].positions, self.native_grid, grid, self.arguments["positions"])  # type: ignore[arg-type]
            for name, grid in packing.grids.items()
        }
        heads = [] if self.cls_token is None else [self.cls_token.expand(batch, -1, -1)]
        if packing.rows is None:
            parts = [self.patch_embed[name](view.flatten(4).flatten(1, 3)) + tables[name] for name, view in cells.items()]
            return torch.cat([*heads, *parts], 1).flatten(0, 1)
        length, start = packing.prefix + sum(packing.sizes), packing.prefix
        sample, slot = packing.rows // length, packing.rows % length
        places, parts = [(slot < start).nonzero().flatten()], [head.flatten(0, 1) for head in heads]
        for name, view in cells.items():
            stop = start + tables[name].shape[1]
            rows = ((slot >= start) & (slot < stop)).nonzero().flatten()
            index = slot[rows] - start
            patches = view[sample[rows], *torch.unravel_index(index, packing.grids[name])].flatten(1)
            parts.append(self.patch_embed[name](patches) + tables[name][0, index])
            places.append(rows)
            start = stop
        tokens = torch.cat(parts)
        return torch.empty_like(tokens).index_copy(0, torch.cat(places), tokens)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See `Backbone.final_norm`."""
        return self.norm(tokens)

    def layer_ids(self) -> dict[str, int]:
        """See `Backbone.layer_ids`."""
        ids = {}
        for name, _ in self.named_parameters():
            if name.startswith(("cls_token", "patch_embed.")):
                ids[name] = 0
            elif name.startswith("blocks."):
                ids[name] = int(name.split(".")[1]) + 1
        return ids

    def resize_weights(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Fit a table of positions that was made for a cube of another size; None for anything else."""
        side = round(tensor.shape[1] ** (1 / 3)) if tensor.ndim == 3 else 0
        if not name.endswith("positions") or side**3 != tensor.shape[1] or tensor.shape[-1] != shape[-1]:
            return None
        return positions_at(tensor, (side, side, side), self.native_grid, self.arguments["positions"])


@register
def bm_mae(**arguments) -> BMMAE:
    """The published encoder, 69.3 M parameters: T1, T1 with contrast, T2 and FLAIR, 128 x 128 x 128 voxels of 1 mm.

    Takes all arguments of `BMMAE`. Scans are turned as BraTS has them, to the left, back and top.
    """
    return BMMAE(**arguments)


@register
def bm_mae_tiny(**arguments) -> BMMAE:
    """For trying things out on a processor: 48 x 48 x 48 voxels of 4 mm, patches of 8."""
    tiny: dict[str, Any] = dict(size=48, patch_size=8, width=96, depth=4, heads=4, mlp=192, spacing=(4.0, 4.0, 4.0))
    return BMMAE(**{**tiny, **arguments})
