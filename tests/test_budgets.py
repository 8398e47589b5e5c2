"""The largest subnet within a budget, for every kind of supernet."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from okavango.models import elastic
from okavango.models.backbone import create_model

torch.set_num_threads(1)
NAMES = ("elastic_vit_tiny", "elastic_swin_tiny", "elastic_resnet_tiny")


@cache
def supernet(name: str):
    return create_model(name).eval()


@cache
def counts(name: str) -> list[int]:
    """Parameters of all subnets, ascending."""
    return sorted(map(supernet(name).count_parameters, supernet(name).list_subnets()))


@pytest.mark.parametrize("name", NAMES)
@given(share=st.floats(0.0, 1.2))
@settings(max_examples=20, deadline=None)
def test_the_largest_subnet_within_a_number_of_parameters(name, share):
    net, params = supernet(name), round(share * counts(name)[-1])
    fitting = [count for count in counts(name) if count <= params]
    if not fitting:
        with pytest.raises(ValueError, match=f"the smallest has {counts(name)[0]}"):
            net.fit_budget(params=params)
        return
    fit = net.fit_budget(params=params)
    assert fit.parameters == net.count_parameters(fit.subnet) == fitting[-1] and fit.latency_ms is None


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_and_the_largest_subnet(name):
    least, most = counts(name)[0], counts(name)[-1]
    assert supernet(name).fit_budget(params=least).parameters == least
    assert supernet(name).fit_budget(params=most).subnet == supernet(name).intact
    with pytest.raises(ValueError, match="the smallest has"):
        supernet(name).fit_budget(params=least - 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [0, 3, -1])
def test_the_largest_subnet_within_a_latency(monkeypatch, name, rank):
    net, budget, tried = supernet(name), counts(name)[rank] / 10_000, []

    def latency(model, batch, repeats):
        tried.append(sum(parameter.numel() for parameter in model.parameters()))
        return tried[-1] / 10_000

    monkeypatch.setattr(elastic, "latency", latency)
    fit = net.fit_budget(latency_ms=budget)
    assert fit.parameters == counts(name)[rank] and fit.latency_ms <= budget
    assert {net.count_parameters(subnet) for subnet in fit.measured} == set(tried)
    assert len(fit.measured) == len(tried) < len(net.list_subnets())
    both = net.fit_budget(latency_ms=1e6, params=counts(name)[rank])
    assert both.parameters == counts(name)[rank]


@pytest.mark.parametrize("name", NAMES)
def test_latencies_are_measured(name):
    net = supernet(name)
    with pytest.raises(ValueError, match=r"no subnet takes at most 1e-06 ms.*the fastest measured, w\d+_d[\d-]+, takes"):
        net.fit_budget(latency_ms=1e-6, repeats=1)
    with pytest.raises(ValueError, match="give latency_ms=, params= or both"):
        net.fit_budget()
    fit = net.fit_budget(latency_ms=1e6, repeats=1)
    assert fit.subnet == net.intact and 0 < fit.latency_ms < 1e6
