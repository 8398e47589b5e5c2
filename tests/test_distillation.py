"""Losses and targets of self-distillation against torch's own functions and brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from okavango.models.backbone import create_model
from okavango.pretrain.objectives.distillation import (
    Centre,
    ProjectionHead,
    ProjectionHeads,
    cross_entropy,
    cross_view,
    koleo,
    masked_patch_loss,
    sinkhorn,
)
from okavango.pretrain.objectives.poa import POA
from okavango.pretrain.settings import POASettings

torch.set_num_threads(1)

seeds = st.integers(0, 999)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit_logits(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@given(seeds, st.integers(1, 6), st.integers(2, 40), st.sampled_from([0.04, 0.1, 1.0]))
@settings(max_examples=50, deadline=None)
def test_cross_entropy_equals_torchs_with_soft_targets(seed, rows, columns, temperature):
    targets, logits = random(rows, columns, seed=seed).softmax(-1), random(rows, columns, seed=seed + 1).requires_grad_()
    ours = cross_entropy(targets, logits, temperature)
    theirs = F.cross_entropy(logits / temperature, targets, reduction="none")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.sum(), logits)[0], atol=1e-4, rtol=1e-4)


def test_cross_entropy_gives_the_targets_no_gradient_and_computes_in_float32():
    targets, logits = random(2, 5).softmax(-1).requires_grad_(), random(2, 5, seed=1).requires_grad_()
    cross_entropy(targets, logits, 0.1).sum().backward()
    assert targets.grad is None and logits.grad is not None
    assert cross_entropy(targets, logits.bfloat16(), 0.1).dtype == torch.float32
    assert torch.isfinite(cross_entropy(targets, 1e4 * logits, 0.1)).all()


@given(seeds, st.integers(1, 12), st.integers(2, 20), st.sampled_from([0.04, 0.07, 0.5]))
@settings(max_examples=50, deadline=None)
def test_sinkhorn_against_alternate_scaling_in_float64(seed, rows, columns, temperature):
    logits = unit_logits(rows, columns, seed)
    plan = torch.exp(logits.double() / temperature).T  # prototypes x samples, as in the paper
    plan /= plan.sum()
    for _ in range(3):
        plan /= plan.sum(1, keepdim=True) * columns
        plan /= plan.sum(0, keepdim=True) * rows
    torch.testing.assert_close(sinkhorn(logits, temperature).double(), (plan * rows).T, atol=1e-5, rtol=1e-4)


@given(seeds, st.integers(1, 12), st.integers(2, 20))
@settings(max_examples=40, deadline=None)
def test_marginals_of_sinkhorn(seed, rows, columns):
    logits = unit_logits(rows, columns, seed)
    before = logits.clone()
    balanced = sinkhorn(logits, 0.5, iterations=60)
    torch.testing.assert_close(balanced.sum(1), torch.ones(rows), atol=1e-5, rtol=0)
    torch.testing.assert_close(balanced.sum(0), torch.full((columns,), rows / columns), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(sinkhorn(logits, 0.07).sum(1), torch.ones(rows), atol=1e-5, rtol=0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-4, 0.004, 0.01])
def test_sharp_temperatures_stay_finite(temperature):
    """Cosines over a small temperature exceed what float32 can exponentiate."""
    logits = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(3)), dim=1)
    targets = sinkhorn(logits, temperature)
    assert torch.isfinite(targets).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(40))


def test_sinkhorn_of_nothing_is_nothing():
    assert sinkhorn(torch.zeros(0, 7), 0.07).shape == (0, 7)
    assert not sinkhorn(torch.zeros(3, 7, requires_grad=True), 0.07).requires_grad


@given(seeds, st.integers(2, 9), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_koleo_against_brute_force(seed, rows, width):
    x = random(rows, width, seed=seed)
    unit = [row.double() / row.double().norm() for row in x]
    total = 0.0
    for i in range(rows):
        others = [j for j in range(rows) if j != i]
        nearest = max(others, key=lambda j, i=i: float(unit[i] @ unit[j]))
        total -= math.log(float((unit[i] - unit[nearest] + 1e-8).norm()) + 1e-8) / rows
    close = min(float((unit[i] - unit[j]).norm()) for i in range(rows) for j in range(i))
    if close > 1e-3:  # below, float32 decides
        assert float(koleo(x)) == pytest.approx(total, abs=2e-3)


def test_koleo_grows_as_points_come_together():
    spread = torch.eye(4)
    huddled = spread + 10
    assert float(koleo(huddled)) > float(koleo(spread))
    x = huddled.clone().requires_grad_()
    koleo(x).backward()
    assert torch.isfinite(x.grad).all() and x.grad.any()
    assert torch.isfinite(koleo(torch.ones(3, 4))) and koleo(spread.bfloat16()).dtype == torch.float32


def test_koleo_ignores_autocast():
    x = random(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo(x), koleo(x)) and koleo(x).dtype == torch.float32
        inside = koleo(x)
    torch.testing.assert_close(inside, koleo(x), atol=0, rtol=0)


@given(seeds, st.integers(1, 4), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_cross_view_against_all_pairs(seed, batch, crops):
    columns, temperature = 6, 0.1
    teacher = random(2 * batch, columns, seed=seed).softmax(-1)  # view by view, not yet swapped
    swapped = torch.cat([teacher[batch:], teacher[:batch]])
    wide, narrow = random(2 * batch, columns, seed=seed + 1), random(crops * batch, columns, seed=seed + 2)

    def entropy(target, logits):
        return -(target * (logits / temperature).log_softmax(-1)).sum()

    expected = sum(entropy(teacher[(1 - v) * batch + i], wide[v * batch + i]) for v in range(2) for i in range(batch)) / (2 * batch)
    local = sum(
        entropy(teacher[v * batch + i], narrow[c * batch + i]) / batch for c in range(crops) for v in range(2) for i in range(batch)
    )
    found, found_local = cross_view(swapped, wide, narrow, temperature)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found_local, torch.as_tensor(local, dtype=torch.float32), atol=1e-3, rtol=1e-5)


def test_masked_patches_count_within_their_crop_and_crops_equally():
    hidden = [3, 0, 1]  # per crop
    targets, logits = random(4, 5).softmax(-1), random(4, 5, seed=1)
    weights = torch.tensor([1 / 3] * 3 + [1.0])
    entropies = F.cross_entropy(logits / 0.1, targets, reduction="none")
    expected = (entropies[:3].mean() + entropies[3]) / len(hidden)
    torch.testing.assert_close(masked_patch_loss(targets, logits, weights, len(hidden), 0.1), expected)


def test_a_centre_uses_the_mean_of_earlier_batches():
    centre, mean = Centre(4, momentum=0.9), torch.zeros(4)
    for seed in range(3):
        logits = random(6, 4, seed=seed)
        torch.testing.assert_close(centre(logits, 0.05), ((logits - mean) / 0.05).softmax(-1))
        mean = 0.9 * mean + 0.1 * logits.mean(0)
        torch.testing.assert_close(centre.centre, mean)
    assert centre(torch.zeros(0, 4), 0.05).shape == (0, 4)
    torch.testing.assert_close(centre.centre, mean)
    assert "centre" in centre.state_dict() and not list(centre.parameters())


@pytest.mark.parametrize("width, rescale", [(16, True), (12, True), (8, True), (16, False), (12, False)])
def test_projection_head_against_plain_layers(width, rescale):
    head, x = ProjectionHead(16, 10, 6, 7, rescale), random(5, width)
    nn.init.uniform_(head.last_g, 0.5, 2)
    for layer in (head.fc1, head.fc2, head.fc3):
        nn.init.normal_(layer.weight, std=0.3), nn.init.normal_(layer.bias)
    with torch.no_grad():
        y = F.gelu((x * (16 / width if rescale else 1)) @ head.fc1.weight[:, :width].T + head.fc1.bias)
        y = head.fc3(F.gelu(head.fc2(y)))
        y = y / y.norm(dim=-1, keepdim=True)
        directions = head.last_v / head.last_v.norm(dim=1, keepdim=True)
        torch.testing.assert_close(head(x), (y @ directions.T) * head.last_g.T, atol=1e-5, rtol=1e-5)
        assert bool((head(x).abs() <= head.last_g.T + 1e-5).all())


@pytest.mark.parametrize("rescale", [True, False])
def test_heads_scale_narrow_input_when_the_backbone_does(rescale):
    settings = POASettings(prototypes=(5, 7), head_hidden=8, head_bottleneck=4)
    backbone = create_model("elastic_vit_tiny", max_depth=2, rescale=rescale)
    objective = POA(backbone, settings, steps=1)
    branches = (objective.student, objective.teacher)
    assert [head.rescale for branch in branches for head in branch["head"]] == 4 * [rescale]
    assert [branch["backbone"].blocks[0].mlp.rescale for branch in branches] == 2 * [rescale]


def test_projection_heads_share_nothing():
    heads = ProjectionHeads(16, 10, 6, (7, 9, 7))
    assert [logits.shape for logits in heads(random(2, 16))] == [(2, 7), (2, 9), (2, 7)]
    places = [parameter.data_ptr() for parameter in heads.parameters()]
    assert len(places) == len(set(places)) == 24
