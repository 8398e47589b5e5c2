"""Schedules, learning rates, clipping and weight averages: pure functions of the step, held against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from okavango.pretrain.optim import Cosine, Optimiser, clip_gradients, lerp_parameters, peak_lr
from okavango.pretrain.settings import Optim

torch.set_num_threads(1)

value = st.floats(-10, 10, allow_nan=False)


@given(value, value, value, st.integers(1, 300), st.integers(0, 100), st.sampled_from([1.0, 0.9, 0.78, 0.5]))
@settings(deadline=None)
def test_a_schedule_equals_the_table_that_it_stands_for(base, final, start, steps, warmup, stretch):
    """The table: an inclusive linspace, then a cosine over the longer run, cut where the run ends."""
    warmup = min(warmup, steps)
    total = int(steps / stretch)
    rest = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / max(1, len(rest))))
    table = np.concatenate([np.linspace(start, base, warmup), cosine])[:steps]
    schedule = Cosine(base, final, steps, warmup=warmup, start=start, stretch=stretch)
    np.testing.assert_allclose([schedule(step) for step in range(steps)], table, atol=1e-9)


@given(value, value, st.integers(2, 500), st.integers(0, 50))
@settings(deadline=None)
def test_both_ends_of_a_cosine(base, final, steps, late):
    schedule = Cosine(base, final, steps)
    assert schedule(0) == pytest.approx(base, abs=1e-9)
    assert schedule(steps + late) == final
    low, high = sorted((base, final))
    values = [schedule(step) for step in range(steps)]
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)
    assert all((b - a) * (final - base) >= -1e-9 for a, b in zip(values, values[1:], strict=False))


def test_both_ends_of_a_warmup():
    schedule = Cosine(1.0, 0.0, 100, warmup=11, start=0.5)
    assert schedule(0) == 0.5 and schedule(10) == 1.0 and schedule(11) == 1.0 and schedule(5) == 0.75


def test_a_single_warmup_step_is_at_the_start():
    assert Cosine(1.0, 0.0, 10, warmup=1)(0) == 0.0


def test_a_stretched_cosine_stops_before_its_end():
    whole, cut = Cosine(1.0, 0.0, 1000), Cosine(1.0, 0.0, 780, stretch=0.78)
    assert [cut(step) for step in range(780)] == pytest.approx([whole(step) for step in range(780)])
    assert cut(779) > 0.1


@pytest.mark.parametrize("scaling, expected", [("sqrt", 0.004 * math.sqrt(1600 / 1024)), ("linear", 0.00625), ("none", 0.004)])
def test_peak_learning_rate(scaling, expected):
    assert peak_lr(Optim(lr=0.004, lr_batch=1024, lr_scaling=scaling), 1600) == pytest.approx(expected)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(0.01, 5), st.floats(0.01, 100), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_each_group_is_clipped_by_its_own_norm(sizes, limit, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = [[nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n, 2)), nn.Parameter(torch.zeros(1))] for n in sizes]
    for group in groups:
        for parameter in group[:2]:  # the third has no gradient
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    before = [[p.grad.clone() for p in group[:2]] for group in groups]
    norms = clip_gradients(groups, limit)
    for group, old, norm in zip(groups, before, norms, strict=True):
        expected = math.sqrt(sum(float((g.double() ** 2).sum()) for g in old))
        assert float(norm) == pytest.approx(expected, rel=1e-5)
        factor = min(1.0, limit / expected)
        for parameter, gradient in zip(group, old, strict=False):
            torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-4, atol=1e-6)
        assert group[2].grad is None


def test_no_limit_leaves_gradients_alone():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 0.0, 4.0])
    assert float(clip_gradients([[parameter]], 0)[0]) == 5.0 and torch.equal(parameter.grad, torch.tensor([3.0, 0.0, 4.0]))


@given(st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_weight_average_against_a_loop(momentum, seed):
    generator = torch.Generator().manual_seed(seed)
    mean = [torch.randn(shape, generator=generator) for shape in ((3,), (2, 4), ())]
    parameters = [nn.Parameter(torch.randn(tensor.shape, generator=generator)) for tensor in mean]
    expected = [momentum * a.double() + (1 - momentum) * p.detach().double() for a, p in zip(mean, parameters, strict=True)]
    kept = [p.detach().clone() for p in parameters]
    places = [tensor.data_ptr() for tensor in mean]
    lerp_parameters(mean, parameters, momentum)
    for found, wanted in zip(mean, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)
    assert [tensor.data_ptr() for tensor in mean] == places and all(
        torch.equal(a, b) for a, b in zip(parameters, kept, strict=True)
    )


def test_momentum_one_keeps_the_average_bit_for_bit():
    mean = [torch.randn(5)]
    before = mean[0].clone()
    lerp_parameters(mean, [torch.randn(5)], 1.0)
    assert torch.equal(mean[0], before)


def optimiser(steps: int = 20) -> tuple[list[nn.Parameter], Optimiser]:
    parameters = [nn.Parameter(torch.full((2,), float(i + 1))) for i in range(3)]
    groups = [
        {"params": [("body", parameters[0])], "lr_mult": 0.5, "wd_mult": 1.0},
        {"params": [("bias", parameters[1])], "lr_mult": 1.0, "wd_mult": 0.0},
        {"params": [("last", parameters[2])], "lr_mult": 1.0, "wd_mult": 1.0, "start_step": 4},
        {"params": [], "lr_mult": 1.0, "wd_mult": 1.0},
    ]
    settings_ = Optim(lr=0.1, lr_scaling="none", lr_end=0.01, warmup=0.25, weight_decay=(0.1, 0.3))
    return parameters, Optimiser(groups, settings_, steps, 8)


def test_groups_follow_the_schedule_by_their_factors():
    _, optim = optimiser()
    for step in range(20):
        shown = optim.schedule(step)
        lr = Cosine(0.1, 0.01, 20, warmup=5)(step)
        decay = Cosine(0.1, 0.3, 20)(step)
        assert shown == {"lr": lr, "weight_decay": decay}
        assert [group["lr"] for group in optim.adamw.param_groups] == [0.5 * lr, lr, lr if step >= 4 else 0.0]
        assert [group["weight_decay"] for group in optim.adamw.param_groups] == [decay, 0.0, decay]


def test_a_late_group_stands_still_until_its_step():
    parameters, optim = optimiser()
    for step in range(6):
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        optim.schedule(step)
        optim.adamw.step()
        assert torch.equal(parameters[2], torch.full((2,), 3.0)) == (step < 4)


def test_the_optimisers_state_goes_through_flat_tensors():
    def go_on(parameters, optim, steps):
        for step in steps:
            for i, parameter in enumerate(parameters):
                parameter.grad = torch.sin(torch.arange(2.0) + step + i)
            optim.schedule(step)
            optim.adamw.step()

    whole, optim = optimiser()
    go_on(whole, optim, range(10))
    half, first = optimiser()
    go_on(half, first, range(5))
    saved = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    assert set(saved) == {f"{name}/{leaf}" for name in ("body", "bias", "last") for leaf in ("step", "exp_avg", "exp_avg_sq")}
    again, second = optimiser()
    for parameter, value in zip(again, half, strict=True):
        parameter.data.copy_(value)
    second.load_state_tensors(saved)
    go_on(again, second, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert all(torch.equal(saved[name], tensor) for name, tensor in first.state_tensors().items())
