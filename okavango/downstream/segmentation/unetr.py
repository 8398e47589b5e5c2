"""A UNETR decoder (Hatamizadeh et al., arXiv 2103.10504) on the tokens of any backbone of volumes, from MONAI's blocks.

The hidden states are averaged over the modalities that a sample has, so the decoder does not depend on how many there are (BM-MAE,
arXiv 2505.00568).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn


class UnetrDecoder(nn.ModuleDict):
    """Volumes, hidden states and last tokens -> a map of the volumes' size. Names of parts are those of MONAI's `UNETR`.

    For patches of 16 voxels: ``encoder1`` reads the volumes, ``encoder2`` to ``encoder4`` the hidden states, ``decoder5`` to
    ``decoder2`` go up from the last tokens, each by a factor of two. Smaller patches have fewer steps.

    Args:
        channels: of the volumes together.
        outputs: channels of the result.
        width: of the tokens.
        patch: voxels per token along each axis, a power of two, at least 2.
        feature_size: channels at full size; doubled with each step down.
    Raises:
        ValueError: a patch that is no power of two.
    """

    def __init__(self, channels: int, outputs: int, width: int, patch: int = 16, feature_size: int = 16):
        super().__init__()
        if patch < 2 or patch & (patch - 1):
            raise ValueError(f"unetr: patches of {patch} voxels; expected 2, 4, 8, 16 ..., each step of the decoder doubles")
        self.levels = patch.bit_length() - 1
        common: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        sizes = [feature_size * 2**level for level in range(self.levels)]
        self["encoder1"] = UnetrBasicBlock(in_channels=channels, out_channels=sizes[0], stride=1, **common)
        for level in range(1, self.levels):
            self[f"encoder{level + 1}"] = UnetrPrUpBlock(
                in_channels=width,
                out_channels=sizes[level],
                num_layer=self.levels - 1 - level,
                stride=1,
                upsample_kernel_size=2,
                conv_block=True,
                **common,
            )
        for level in reversed(range(self.levels)):
            below = width if level == self.levels - 1 else sizes[level + 1]
            self[f"decoder{level + 2}"] = UnetrUpBlock(
                in_channels=below, out_channels=sizes[level], upsample_kernel_size=2, **common
            )
        self["out"] = UnetOutBlock(spatial_dims=3, in_channels=sizes[0], out_channels=outputs)

    def forward(self, volumes: Tensor, hidden: Sequence[Tensor], last: Tensor) -> Tensor:
        """Logits.

        Args:
            volumes: (B, channels, D, H, W), sides multiples of the patch.
            hidden: `levels` - 1 maps (B, width, D / patch, ...), from early to late blocks.
            last: the same after the final norm.
        Returns:
            (B, outputs, D, H, W).
        """
        skips = [self["encoder1"](volumes), *(self[f"encoder{i}"](states) for i, states in enumerate(hidden, start=2))]
        out = last
        for level in reversed(range(self.levels)):
            out = self[f"decoder{level + 2}"](out, skips[level])
        return self["out"](out)


def hidden_blocks(depth: int, count: int) -> tuple[int, ...]:
    """Indices of blocks whose outputs are read, evenly spaced.

    Example:
        >>> hidden_blocks(12, 3), hidden_blocks(4, 3), hidden_blocks(2, 3)
        ((3, 6, 9), (1, 2, 3), (0, 1, 1))
    """
    return tuple(min(depth * step // (count + 1), depth - 1) for step in range(1, count + 1))


def averaged(
    tokens: Mapping[str, Tensor], grid: Mapping[str, Sequence[int]], modalities: Sequence[str], present: Tensor | None
) -> Tensor:
    """The mean over the modalities that each sample has, as a map.

    Args:
        tokens: per modality (B, N, D). grid: per modality the sizes that N factors into, all the same.
        modalities: those that the columns of `present` stand for.
        present: bool (B, modalities), or None where every sample has all that `tokens` has.
    Returns:
        (B, D, *grid).
    Raises:
        ValueError: modalities on different grids.
    """
    sizes = {tuple(grid[name]) for name in tokens}
    if len(sizes) != 1:
        raise ValueError(f"unetr: modalities have tokens on the grids {sorted(sizes)}; expected the same for all")
    names = list(tokens)
    if present is None:
        mean = torch.stack(list(tokens.values())).mean(0)
    else:
        columns = present[:, [modalities.index(name) for name in names]]
        mean = torch.zeros_like(tokens[names[0]])
        for column, name in enumerate(names):  # not a product: what stands in place of an absent modality may be anything
            mean = mean + torch.where(columns[:, column, None, None], tokens[name], 0)
        mean = mean / columns.sum(1).clamp(min=1).to(mean.dtype)[:, None, None]
    return mean.transpose(1, 2).unflatten(2, sizes.pop())
