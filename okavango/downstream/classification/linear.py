"""Linear probe by SGD on frozen features: one head per learning rate, all trained at once (after DINOv2, arXiv 2304.07193)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
MOMENTUM = 0.9
STEPS, BATCH = 2000, 256


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

    SGD with momentum 0.9 and no weight decay, rate * batch / 256 falling to 0 by a cosine. Weights begin at N(0, 0.01), the same in
    every head, biases at 0. The heads stand side by side in one (D, H * C) matrix, so a step is two matrix products whatever H is.

    Args:
        features: float32 (N, D), standardised; labels: int64 (N,).
        rates: base learning rate of each head.
        steps: number of updates; batch: samples in each, at most N, drawn epoch by epoch without replacement.
        seed: decides initial weights and order.
    Returns:
        weights (H, D, C) and biases (H, C). A head that diverged holds values that are not finite.
    """
    count, heads, batch = len(features), len(rates), min(batch, len(features))
    generator = torch.Generator().manual_seed(seed)
    first = torch.empty(features.shape[1], 1, classes).normal_(0, 0.01, generator=generator)
    weight = first.repeat(1, heads, 1)
    bias = torch.zeros(heads, classes)
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    base = torch.tensor(rates) * batch / 256
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(count, generator=generator)
        chosen, order = order[:batch], order[batch:]
        x = features[chosen]
        logits = (x @ weight.flatten(1)).view(batch, heads, classes) + bias
        error = logits.softmax(dim=2)  # gradient of the cross-entropy: probability minus one-hot
        error[torch.arange(batch), :, labels[chosen]] -= 1
        error /= batch
        weight_speed.mul_(MOMENTUM).add_((x.T @ error.flatten(1)).view_as(weight))
        bias_speed.mul_(MOMENTUM).add_(error.sum(dim=0))
        rate = base * (0.5 * (1 + np.cos(np.pi * step / steps)))
        weight -= rate[:, None] * weight_speed
        bias -= rate[:, None] * bias_speed
    return weight.transpose(0, 1), bias


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
