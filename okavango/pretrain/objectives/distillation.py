"""Heads, targets and losses of self-distillation: DINO, iBOT, KoLeo, Sinkhorn centring. Pure functions where they can be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.models.elastic import Sliced, linear
from okavango.pretrain.collectives import max_over_ranks, mean_over_ranks, sum_over_ranks

FLOOR = 80.0  # of exponents below a column's greatest in Sinkhorn: exp(-80) is still a normal float32


class ProjectionHead(Sliced):
    """Three-layer MLP to a unit sphere, then a weight-normed linear layer to prototypes.

    Args:
        width: greatest input width; narrower input uses the leading columns.
        hidden, bottleneck: widths inside.
        prototypes: K, outputs.
        rescale: scale the first layer by width / input width, as the backbone does.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int, rescale: bool = True):
        super().__init__()
        self.rescale = rescale
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, bottleneck)
        # The published 0.02 keeps the scale of signals at 2048 hidden units. A narrow head with it would shrink them until the
        # biases, which grow by the learning rate a step, make all outputs equal; the targets are uniform then and stay so.
        std = 0.02 * (2048 / hidden) ** 0.5
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.last_g = nn.Parameter(torch.ones(prototypes, 1))
        self.last_v = nn.Parameter(nn.Linear(bottleneck, prototypes, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(N, W) -> logits (N, K), cosine-like: within +-last_g."""
        x = F.gelu(linear(x, self.fc1, self.fc1.out_features, rescale=self.rescale))
        x = self.fc3(F.gelu(self.fc2(x)))
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return F.linear(x, F.normalize(self.last_v, dim=1, eps=0) * self.last_g)


class ProjectionHeads(nn.ModuleList):
    """Several projection heads with their own numbers of prototypes, sharing nothing (POA, section 3.3)."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: Sequence[int], rescale: bool = True):
        super().__init__(ProjectionHead(width, hidden, bottleneck, count, rescale) for count in prototypes)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(x) for head in self]


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Balanced assignment of samples to prototypes (SwAV, arXiv 2006.09882), over all processes together.

    Args:
        logits: (B, K) of this process.
    Returns:
        float32 (B, K); each row sums to 1, each column to about B / K. Empty input stays empty.
    """
    scaled = logits.float() / temperature
    # The first division is by the sum of each column, so scaling a column changes nothing but the range: no overflow, and, with a
    # floor, no row of zeros.
    greatest = scaled.amax(0) if len(scaled) else scaled.new_full(scaled.shape[1:], -torch.inf)
    assignment = (scaled - max_over_ranks(greatest)).clamp_min(-FLOOR).exp()
    # A factor per row and one per column stand for all the divisions: an iteration reads the matrix twice and writes nothing.
    samples = sum_over_ranks(torch.tensor(float(len(assignment)), device=logits.device))
    rows = assignment.new_ones(len(assignment))
    for _ in range(iterations):
        columns = samples / (sum_over_ranks(rows @ assignment) * assignment.shape[1])
        rows = 1 / (assignment @ columns)
    return assignment.mul_(columns).mul_(rows[:, None])


class Centre(nn.Module):
    """The softmax alternative to Sinkhorn: softmax((logits - centre) / temperature), the centre an average of earlier batches."""

    centre: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float, groups: Tensor | None = None) -> Tensor:
        """Targets (B, K) with the centre as it was before this batch, which then moves towards the batch's mean."""
        targets = ((logits.float() - self.centre) / temperature).softmax(-1)
        if len(logits):
            self.centre.lerp_(mean_over_ranks(logits.float().mean(0)), 1 - self.momentum)
        return targets


def cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Cross-entropy per row, (..., K) against (..., K) -> (...); targets sum to 1 and carry no gradient.

    -sum t log softmax(s) is logsumexp(s) - <t, s>, which spares the temporary of log_softmax.
    """
    scaled = logits.float() / temperature
    return scaled.logsumexp(-1) - torch.linalg.vecdot(targets.detach(), scaled)


def cross_view(targets: Tensor, global_logits: Tensor, local_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """DINO's loss between the teacher's views and a student's crops of the same pictures.

    Args:
        targets: (2B, K) of the teacher's global crops, halves swapped: row i belongs to the other view of crop i.
        global_logits: (2B, K) of the student; local_logits: (nB, K), crop by crop.
    Returns:
        mean over the two global pairs; sum over n x 2 local pairs of their means.
    """
    batch = len(targets) // 2
    both = targets[:batch] + targets[batch:]
    local = local_logits.float().unflatten(0, (-1, batch)) / temperature
    local_sum = (2 * local.logsumexp(-1) - torch.linalg.vecdot(both.expand_as(local), local)).mean(1).sum()
    return cross_entropy(targets, global_logits, temperature).mean(), local_sum


def masked_patch_loss(targets: Tensor, logits: Tensor, weights: Tensor, crops: int, temperature: float) -> Tensor:
    """iBOT's loss (arXiv 2111.07832): cross-entropy of hidden patches, averaged within a crop, then over all crops.

    Args:
        targets, logits: (M, K), M hidden patches of the batch.
        weights: (M,), one over the number of hidden patches in the same crop.
        crops: number of global crops, unmasked ones included.
    """
    return (cross_entropy(targets, logits, temperature) * weights).sum() / crops


def koleo(features: Tensor) -> Tensor:
    """KoLeo entropy estimator (arXiv 1806.03198): minus the mean log distance to the nearest neighbour, on unit vectors.

    Args:
        features: (B, D), B >= 2, of this process; any dtype, computed in float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            similarity = unit @ unit.t()
            similarity.fill_diagonal_(-2)  # below any cosine, also that of opposite vectors
            nearest = similarity.argmax(1)
        distance = (unit - unit[nearest] + 1e-8).norm(dim=1)
        return -(distance + 1e-8).log().mean()
