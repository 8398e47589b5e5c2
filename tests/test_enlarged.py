"""Enlarging rasters gives what torch's own kernel gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.models._apply import resize_to
from okavango.models._raster import _enlarged
from okavango.models.preprocess import Resize


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(12, 30), st.integers(12, 30)),
    st.sampled_from(["exact", "shortest", "short_side"]),
    st.sampled_from(["half_pixel", "aligned"]),
    st.sampled_from([1.0, 0.875]),
)
def test_it_is_the_bilinear_resize_of_every_rule(shape, size, rule, corners, crop_ratio):
    spec = Resize(rule=rule, interpolation="bilinear", antialias=False, corners=corners, crop_ratio=crop_ratio)
    values = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    want = resize_to(values.flatten(0, 1), size, spec).unflatten(0, (2, 3))
    got = _enlarged(values, size, spec)
    assert got.shape == want.shape and got.is_contiguous()
    torch.testing.assert_close(got, want, atol=5e-6, rtol=0)


def test_reduced_precision_around_it_does_not_reach_it():
    spec = Resize(rule="exact", interpolation="bilinear", antialias=False)
    values = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 1000
    with torch.autocast("cpu", torch.bfloat16):
        got = _enlarged(values, (16, 16), spec)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0], resize_to(values[0], (16, 16), spec), atol=1e-3, rtol=0)


@pytest.mark.parametrize("count", [1, 7, 30])
def test_any_number_of_planes(count):
    spec = Resize(rule="exact", interpolation="bilinear", antialias=False)
    values = torch.rand(count, 13, 5, 4, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.interpolate(values, size=(20, 20), mode="bilinear")
    torch.testing.assert_close(_enlarged(values, (20, 20), spec), want, atol=5e-6, rtol=0)
