"""Dropout on processors: as often as asked, the same on average, and gradients of the product with the mask that was drawn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.models import dropout as module
from okavango.models.bm_mae import Block
from okavango.models.dropout import attention, dropout, kept


@settings(max_examples=20, deadline=None)
@given(rate=st.floats(0.001, 0.999), seed=st.integers(0, 2**31), shape=st.sampled_from([(40_001,), (7, 91, 63)]))
def test_elements_are_dropped_as_often_as_asked(rate, seed, shape):
    torch.manual_seed(seed)
    keep = kept(shape, rate)
    assert keep.shape == shape and keep.dtype == torch.bool
    share, deviation = 1 - module.threshold(rate) / 65536, math.sqrt(rate * (1 - rate) / keep.numel())
    assert abs(float(keep.float().mean()) - share) < 6 * deviation + 1e-9 and abs(share - (1 - rate)) <= 2**-17
    flat = keep.flatten().double() - share
    for lag in (1, 2, 3, 4, 8):  # elements that share a word are independent
        assert abs(float((flat[:-lag] * flat[lag:]).mean())) < 6 * rate * (1 - rate) / math.sqrt(keep.numel()) + 1e-9


def test_all_sixteen_bits_decide():
    """Every value of 16 bits comes up, so a rate of one in 65,536 is kept to."""
    torch.manual_seed(0)
    dropped = sum(int((~kept((1 << 22,), 1 / 65536)).sum()) for _ in range(4))
    assert 256 - 6 * 16 < dropped < 256 + 6 * 16
    assert int(kept((1 << 20,), 1.0).sum()) < 60  # one value of 65,536 is always kept


def test_mean_and_variance_of_what_is_left():
    torch.manual_seed(0)
    x = torch.full((400_000,), 3.0)
    out = dropout(x, 0.1)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(3.0) * (65536 / (65536 - 6554)))}
    assert float(out.mean()) == pytest.approx(3, abs=0.01) and float(out.var()) == pytest.approx(9 * 0.1 / 0.9, rel=0.02)


def test_the_gradient_is_the_mask():
    x = torch.randn(50, 60, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    out = dropout(x, 0.3)
    out.sum().backward()
    assert torch.equal(out, x * x.grad) and set((x.grad > 0).unique().tolist()) == {True, False}


def test_off_outside_of_training():
    x = torch.randn(9, 8)
    assert dropout(x, 0.5, False) is x and dropout(x, 0.0) is x
    qkv = torch.randn(2, 7, 3, 2, 4)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    assert torch.equal(attention(qkv), F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert torch.equal(attention(qkv.bfloat16(), 0.0), attention(qkv.bfloat16()))


def recorded(monkeypatch) -> list[torch.Tensor]:
    """Masks, in the order in which they are drawn from now on."""
    masks: list[torch.Tensor] = []

    def draw(shape, rate):
        masks.append(kept(shape, rate))
        return masks[-1]

    monkeypatch.setattr(module, "kept", draw)
    return masks


def by_the_formula(qkv: torch.Tensor, keep: torch.Tensor, rate: float) -> torch.Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    share = 1 - module.threshold(rate) / 65536
    return ((weights * keep / share) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("block", [1, 40, 1 << 17])  # queries one by one, in uneven blocks, at once
def test_dropped_attention_equals_the_formula(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    masks = recorded(monkeypatch)
    torch.manual_seed(0)
    qkv = torch.randn(2, 13, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    out = attention(qkv, 0.4)
    keep = torch.cat([mask.flatten() for mask in masks]).view(2, 3, 13, 13)
    want = by_the_formula(qkv, keep, 0.4)
    torch.testing.assert_close(out, want)
    weight = torch.randn_like(out)
    (got,), (true,) = torch.autograd.grad((out * weight).sum(), qkv), torch.autograd.grad((want * weight).sum(), qkv)
    torch.testing.assert_close(got, true)


def test_gradcheck_of_dropped_attention(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 12)

    def fixed(qkv):
        torch.manual_seed(3)
        return attention(qkv, 0.3)

    assert torch.autograd.gradcheck(fixed, torch.randn(1, 5, 3, 2, 3, dtype=torch.float64, requires_grad=True))


def test_dropped_attention_is_the_plain_one_on_average():
    qkv = torch.randn(1, 6, 3, 2, 4)
    torch.manual_seed(0)
    draws = torch.stack([attention(qkv, 0.2) for _ in range(4000)])
    apart = (draws.mean(0) - attention(qkv)).abs() / (draws.std(0) / math.sqrt(len(draws))).clamp_min(1e-6)
    assert float(apart.max()) < 5


def test_a_block_follows_the_seed_alone_also_when_it_is_computed_again():
    from torch.utils.checkpoint import checkpoint

    block, x = Block(24, 2, 48, 0.1).train(), torch.randn(20, 24)
    results = []
    for recompute in (False, False, True):
        torch.manual_seed(5)
        block.zero_grad()
        out = checkpoint(block, x, [(20, 10)], use_reentrant=False) if recompute else block(x, [(20, 10)])
        out.square().sum().backward()
        results.append([out.detach(), *(parameter.grad.clone() for parameter in block.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    torch.manual_seed(6)
    assert not torch.equal(block(x, [(20, 10)]), results[0][0])
