"""Losses of segmentation, by MONAI: soft Dice with the cross-entropy that goes with it, and the pairing that BM-MAE published."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def dice_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice plus binary cross-entropy, for regions that may overlap.

    Dice is 1 - (2 I + 1e-5) / (sum p + sum t + 1e-5) on sigmoids, a mean over samples and channels (Milletari et al., arXiv
    1606.04797, without squares).

    Args:
        logits: (B, K, D, H, W); target: the same shape, bool or 0..1.
    """
    from monai.losses import DiceLoss

    target = target.to(logits.dtype)
    return DiceLoss(sigmoid=True)(logits, target) + F.binary_cross_entropy_with_logits(logits, target)


def dice_softmax_multihot(logits: Tensor, target: Tensor) -> Tensor:
    """What BM-MAE was fine-tuned with: soft Dice on sigmoids plus *softmax* cross-entropy with the multi-hot target.

    The regions overlap, so this is no proper loss of several labels; it is kept to repeat published runs.
    """
    from monai.losses import DiceCELoss

    return DiceCELoss(to_onehot_y=False, sigmoid=True)(logits, target.to(logits.dtype))


def dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice without the background plus cross-entropy, for labels that exclude each other.

    Args:
        logits: (B, 1 + labels, D, H, W), background first; target: int64 (B, 1, D, H, W).
    """
    from monai.losses import DiceCELoss

    return DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)(logits, target)


REGION_LOSSES: dict[str, Loss] = {"dice_bce": dice_bce, "official": dice_softmax_multihot}
