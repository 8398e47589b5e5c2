"""Linear probe by SGD on frozen features: one head per learning rate, all trained at once (after DINOv2, arXiv 2304.07193)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
MOMENTUM = 0.9
STEPS, BATCH = 2000, 256


class Heads:
    """Linear classifiers of one input, one per learning rate, side by side in a (D, H * C) matrix: a step on all of them is two
    matrix products whatever H is.

    SGD with momentum 0.9 and no weight decay. Weights begin at N(0, 0.01), the same in every head, biases at 0.

    Args:
        width: D of the input; classes: C; rates: peak learning rate of each of the H heads.
        generator: on the processor, of the initial weights.
        device: of everything.
    Attributes:
        weight: (D, H, C); bias: (H, C). A head that diverged holds values that are not finite.
    """

    def __init__(
        self, width: int, classes: int, rates: Tensor, generator: torch.Generator, device: torch.device | str | None = None
    ):
        first = torch.empty(width, 1, classes).normal_(0, 0.01, generator=generator).to(device)
        self.weight = first.repeat(1, len(rates), 1)
        self.bias = torch.zeros(len(rates), classes, device=device)
        self.rates = rates.to(device)
        self._speeds = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, H, C)."""
        return (x @ self.weight.flatten(1)).view(len(x), *self.bias.shape) + self.bias

    def step(self, x: Tensor, labels: Tensor, share: float) -> None:
        """One update by the mean cross-entropy of a batch.

        Args:
            x: float32 (B, D); labels: int64 (B,); share: of the peak rates that this step has, 0..1.
        """
        error = self.logits(x).softmax(dim=2)  # gradient of the cross-entropy: probability minus one-hot
        error[torch.arange(len(x), device=x.device), :, labels] -= 1
        error /= len(x)
        weight_speed, bias_speed = self._speeds
        weight_speed.mul_(MOMENTUM).add_((x.T @ error.flatten(1)).view_as(weight_speed))
        bias_speed.mul_(MOMENTUM).add_(error.sum(dim=0))
        rate = self.rates * share
        self.weight -= rate[:, None] * weight_speed
        self.bias -= rate[:, None] * bias_speed


def cosine(step: int, steps: int) -> float:
    """Share of the peak rate at a step: falls from 1 to 0 by a cosine."""
    return 0.5 * (1 + np.cos(np.pi * step / steps))


def train_heads(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    rates: Sequence[float] = RATES,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Train one linear classifier per learning rate on the same batches.

    See `Heads`; rate * batch / 256 falls to 0 by a cosine.

    Args:
        features: float32 (N, D), standardised; labels: int64 (N,).
        rates: base learning rate of each head.
        steps: number of updates; batch: samples in each, at most N, drawn epoch by epoch without replacement.
        seed: decides initial weights and order.
    Returns:
        weights (H, D, C) and biases (H, C). A head that diverged holds values that are not finite.
    """
    count, batch = len(features), min(batch, len(features))
    generator = torch.Generator().manual_seed(seed)
    heads = Heads(features.shape[1], classes, torch.tensor(rates) * batch / 256, generator)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(count, generator=generator)
        chosen, order = order[:batch], order[batch:]
        heads.step(features[chosen], labels[chosen], cosine(step, steps))
    return heads.weight.transpose(0, 1), heads.bias


def best_head(weights: Tensor, biases: Tensor, features: Tensor, labels: Tensor) -> tuple[int, list[float]]:
    """The head with the highest accuracy on held-out features; of equal ones the first, that is the lowest rate.

    Returns:
        its index, and every head's accuracy (a head that diverged has 0).
    """
    logits = torch.einsum("nd,hdc->hnc", features, weights) + biases[:, None]
    correct = (logits.argmax(dim=2) == labels).float().mean(dim=1)
    finite = torch.isfinite(weights).flatten(1).all(dim=1)
    accuracies = torch.where(finite, correct, 0.0).tolist()
    return max(range(len(accuracies)), key=accuracies.__getitem__), accuracies
