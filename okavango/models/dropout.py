"""Dropout on processors, at a fraction of the time of torch's, and the same on average.

There, torch draws a number for every element, and its attention leaves the blockwise kernel where weights are dropped: it keeps
those of all pairs of tokens several times over. Here an element takes 16 random bits of torch's generator, and attention goes
through blocks of queries that stay in the processor's cache, and keeps one byte a pair. Elsewhere torch's own are used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 18  # attention weights in work at a time: a megabyte in float32


def threshold(rate: float) -> int:
    """How many of the 65,536 values of 16 bits mean that an element is dropped; at least one does not."""
    return min(round(rate * 65536), 65535)


def kept(shape: tuple[int, ...], rate: float) -> Tensor:
    """bool, False with probability `rate`, exact to 1 / 65,536; from torch's generator for processors."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    return (words.view(torch.int16)[:count] >= threshold(rate) - 32768).view(shape)


def dropout(x: Tensor, rate: float, training: bool = True) -> Tensor:
    """Elements become 0 with probability `rate`, the others grow so that the mean stays; off outside of training."""
    if not training or not rate or not _ours(x):
        return F.dropout(x, rate, training)
    return x * kept(x.shape, rate).to(x.dtype).mul_(65536 / (65536 - threshold(rate)))


def attention(qkv: Tensor, rate: float = 0.0) -> Tensor:
    """Self-attention, whose weights become 0 with probability `rate` after the softmax; the others grow so that the mean stays.

    Args:
        qkv: queries, keys and values side by side, (B, L, 3, H, d).
        rate: 0 outside of training.
    Returns:
        (B, L, H d).
    """
    if rate and _ours(qkv):
        return _DroppedAttention.apply(qkv, rate)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(queries, keys, values, dropout_p=rate).transpose(1, 2).flatten(2)


def _ours(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


class _DroppedAttention(torch.autograd.Function):
    """Weights are computed again in the backward pass; only which of them were kept is remembered."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rate: float) -> Tensor:
        batch, length, _, heads, width = qkv.shape
        out = qkv.new_empty(batch, length, heads, width)
        keep = torch.empty(batch, heads, length, length, dtype=torch.bool)
        rows = max(1, BLOCK // length)
        scores, weights = qkv.new_empty(2, min(rows, length), length)
        for sample in range(batch):
            for head in range(heads):
                queries, keys, values = qkv[sample, :, :, head].unbind(1)
                queries = queries * width**-0.5
                for start in range(0, length, rows):
                    part = slice(start, start + rows)
                    count = min(rows, length - start)
                    keep[sample, head, part] = kept((count, length), rate)
                    torch.mm(queries[part], keys.T, out=scores[:count])
                    torch.softmax(scores[:count], 1, out=weights[:count])
                    torch.mul(weights[:count], keep[sample, head, part], out=scores[:count])
                    torch.mm(scores[:count], values, out=out[sample, part, head])
        out *= 65536 / (65536 - threshold(rate))
        ctx.save_for_backward(qkv, keep, out)
        ctx.rate = rate
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grown: Tensor) -> tuple[Tensor, None]:
        qkv, keep, out = ctx.saved_tensors
        batch, length, _, heads, width = qkv.shape
        grown = grown.view_as(out)
        # the sum over a row of weight x its gradient, which the softmax takes away
        common = (grown * out).sum(-1)
        grown = grown * (65536 / (65536 - threshold(ctx.rate)))
        found = torch.empty_like(qkv)
        rows = max(1, BLOCK // length)
        scores, weights, dropped = qkv.new_empty(3, min(rows, length), length)
        for sample in range(batch):
            for head in range(heads):
                queries, keys, values = qkv[sample, :, :, head].unbind(1)
                to_queries, to_keys, to_values = found[sample, :, :, head].unbind(1)
                queries, rest = queries * width**-0.5, common[sample, :, head, None]
                for start in range(0, length, rows):
                    part = slice(start, start + rows)
                    count = min(rows, length - start)
                    a, b, c = scores[:count], weights[:count], dropped[:count]
                    beta = float(start > 0)
                    torch.mm(queries[part], keys.T, out=a)
                    torch.softmax(a, 1, out=b)
                    torch.mul(b, keep[sample, head, part], out=c)
                    torch.addmm(to_values, c.T, grown[sample, part, head], beta=beta, out=to_values)
                    torch.mm(grown[sample, part, head], values.T, out=a)
                    a.mul_(c).addcmul_(b, rest[part], value=-1)
                    torch.mm(a, keys, out=to_queries[part])
                    torch.addmm(to_keys, a.T, queries[part], beta=beta, out=to_keys)
                to_queries *= width**-0.5
        return found, None
