"""Multinomial logistic regression on frozen features, by L-BFGS on the whole training set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, eq=False)
class Standardiser:
    """Mean 0 and deviation 1 by the statistics of the training set; constant features become 0.

    Attributes:
        mean, std: float64 (D,).
    """

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray) -> Standardiser:
        values = np.asarray(features, dtype=np.float64)
        mean, std = values.mean(axis=0), values.std(axis=0)
        # A constant column's computed deviation is rounding noise, not zero.
        return cls(mean, np.where(std > 1e-7 * np.maximum(1e-12, np.abs(mean)), std, 1.0))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (np.asarray(features, dtype=np.float64) - self.mean) / self.std


@dataclass(frozen=True, eq=False)
class LogisticModel:
    """A fitted classifier.

    Attributes:
        weight: float64 (C, D); bias: float64 (C,); standardise: applied to features first.
        converged: the largest entry of the gradient is below the tolerance.
    """

    weight: np.ndarray
    bias: np.ndarray
    standardise: Standardiser
    converged: bool

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Float64 (N, C), rows sum to 1."""
        logits = self.standardise(features) @ self.weight.T + self.bias
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Class of each row, int64 (N,)."""
        return (self.standardise(features) @ self.weight.T + self.bias).argmax(axis=1)


def fit_logistic(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    C: float = 1.0,
    start: LogisticModel | None = None,
    iterations: int = 1000,
    tolerance: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> LogisticModel:
    """Minimise C * (sum of cross-entropies) + |weight|^2 / 2 over standardised features; the bias is free.

    C has scikit-learn's meaning. The objective is divided by C * N, so that `tolerance` means the same at any size.

    Args:
        features: (N, D); labels: int (N,), 0..classes-1.
        C: inverse strength of the penalty, positive.
        start: an earlier solution to begin from; it must come from the same features.
        iterations: at most so many L-BFGS iterations.
        tolerance: stop when no entry of the gradient is larger.
    Raises:
        ValueError: C not positive, or a label out of range.
    """
    if not C > 0:
        raise ValueError(f"logistic regression: C={C}; expected a positive number")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"logistic regression: labels must be 0..{classes - 1}, at least one")
    standardise = Standardiser.fit(features)
    x = torch.from_numpy(standardise(features)).to(dtype)
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    weight, bias = torch.zeros(classes, x.shape[1], dtype=dtype), torch.zeros(classes, dtype=dtype)
    if start is not None:
        weight.copy_(torch.from_numpy(start.weight))
        bias.copy_(torch.from_numpy(start.bias))
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=tolerance,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + weight.square().sum() / (2 * C * len(x))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[arg-type]
        closure()
    steepest = max(float(parameter.grad.abs().max()) for parameter in parameters if parameter.grad is not None)
    return LogisticModel(weight.detach().double().numpy(), bias.detach().double().numpy(), standardise, steepest <= tolerance)
