"""Strong augmentation for fine-tuning, by timm and torchvision. Both draw from global generators, which are seeded for the moment
and put back, so that what comes out follows from a seed alone.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's generators (on the processor) start from a seed inside, and go on as before afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@functools.lru_cache(maxsize=8)
def _operations(policy: str, side: int, fill: tuple[int, int, int]):
    from timm.data.auto_augment import rand_augment_transform

    return rand_augment_transform(policy, {"translate_const": int(side * 0.45), "img_mean": fill})


def check_policy(policy: str) -> None:
    """Refuse what is no policy.

    Raises:
        ValueError: timm does not know it.
    """
    try:
        _operations(policy, 224, (0, 0, 0))
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"randaugment={policy!r}: expected a policy of timm such as rand-m9-mstd0.5-inc1") from error


def rand_augment(pixels: Tensor, policy: str, fill: Sequence[float], seed: int) -> Tensor:
    """RandAugment (arXiv 1909.13719) as timm has it.

    Args:
        pixels: uint8 (1 or 3, H, W); a grey picture becomes grey again.
        policy: timm's name of it, e.g. "rand-m9-mstd0.5-inc1": magnitude 9, its deviation 0.5, operations that grow with it.
        fill: red, green and blue, 0..1, of what a shift or a turn uncovers. seed: of all draws.
    Raises:
        ValueError: another number of channels or dtype.
    """
    if pixels.dtype != torch.uint8 or len(pixels) not in (1, 3):
        raise ValueError(f"randaugment takes uint8 pictures of 1 or 3 channels, got {pixels.dtype} {tuple(pixels.shape)}")
    red, green, blue = (round(255 * value) for value in fill)
    operations = _operations(policy, min(pixels.shape[-2:]), (red, green, blue))
    with seeded(seed):
        changed = TF.pil_to_tensor(operations(TF.to_pil_image(pixels.expand(3, -1, -1))))
    return TF.rgb_to_grayscale(changed) if len(pixels) == 1 else changed


def erase(values: Tensor, probability: float, seed: int) -> Tensor:
    """Random erasing (arXiv 1708.04896) as timm has it: noise in one rectangle of 2..33 % of a normalised picture (C, H, W)."""
    from timm.data.random_erasing import RandomErasing

    with seeded(seed):
        return RandomErasing(probability, mode="pixel", device="cpu")(values.clone())


def mix(images: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float, seed: int) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a batch with itself, either with probability 1/2 where both are on.

    Args:
        images: (B, C, H, W); labels: int64 (B,).
        mixup, cutmix: parameters of the Beta distributions, 0 for off, not both.
    Returns:
        images and shares of the classes, float32 (B, classes).
    """
    choices = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    choices += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    with seeded(seed):
        return v2.RandomChoice(choices)(images, labels)
