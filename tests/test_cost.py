"""The counted cost of a step: the shortcut over the pool against every subnet, and the counts against sums written by hand."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ROOT

from okavango.models.backbone import create_model
from okavango.recipes import named

spec = importlib.util.spec_from_file_location("cost", ROOT / "benchmarks" / "cost.py")
cost = importlib.util.module_from_spec(spec)
sys.modules["cost"] = cost  # dataclasses look their module up
spec.loader.exec_module(cost)


def small(name: str, **model_args):
    recipe = named(name, "pretrain")
    objective = replace(recipe.objective, prototypes=(8,), head_hidden=16, head_bottleneck=8)
    return replace(recipe, model_args={**recipe.model_args, **model_args}, objective=objective)


VIT = {"min_width": 16, "max_width": 64, "width_step": 16, "head_dim": 16, "min_depth": 1, "max_depth": 3}


@pytest.mark.parametrize(
    "recipe",
    [
        small("poa_tiny", **VIT),
        small("poa_swin_tiny", min_depth=1),
        small("poa_resnet_tiny", max_depths=(1, 2, 3, 1)),
    ],
    ids=["vit", "swin", "resnet"],
)
def test_a_few_subnets_tell_the_mean_over_the_pool(recipe):
    objective = cost.build(recipe)
    every = {subnet: cost.student(objective, subnet) for subnet in set(objective.pool)}
    assert len(set(every.values())) > 3
    expected = sum(every[subnet] for subnet in objective.pool) / len(objective.pool)
    assert cost.mean_over(objective.pool, every.__getitem__) == pytest.approx(expected, rel=1e-9)


def test_a_vit_by_hand():
    recipe = small("poa_tiny", **VIT)
    found = cost.count(recipe)
    pictures, width, depth, patch_values = cost.PICTURES, 64, 3, 7 * 7 * 3
    hidden = round(2 * pictures * 0.5 * 0.3 * 16)

    def backbone(crops: int, patches: int) -> int:
        tokens = patches + 1
        block = tokens * 12 * width**2 + 2 * tokens**2 * width  # queries, keys, values, projection, MLP; scores and mixture
        return crops * (patches * patch_values * width + depth * block)

    def head(rows: int) -> int:
        return rows * (width * 16 + 16 * 16 + 16 * 8 + 8 * 8)

    wide, narrow = backbone(2 * pictures, 16), backbone(2 * pictures, 4)
    patches = (2 * pictures * 16 + 2 * pictures * 4) * patch_values * width  # pictures need no gradient
    forward = wide + narrow + head(4 * pictures + hidden)
    assert found.teacher == pytest.approx((wide + head(2 * pictures + hidden)) / pictures)
    assert found.intact == pytest.approx((3 * forward - patches) / pictures)


def test_bytes_are_those_of_real_tensors():
    recipe = small("poa_tiny", **VIT)
    found = cost.count(recipe)
    objective = recipe.objective.build(create_model(recipe.model, **recipe.model_args), (), recipe.run)
    adamw = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad])
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    adamw.step()
    moments = [t for entry in adamw.state.values() for t in entry.values() if t.ndim]
    assert found.state_bytes == sum(t.nbytes for t in [*objective.parameters(), *moments])
    assert found.resident_bytes - found.state_bytes == sum(p.grad.nbytes for p in objective.parameters() if p.requires_grad)


def test_hours_and_the_published_rate_agree():
    found = cost.Cost(teacher=1e9, intact=2e9, elastic=1e9, backbone=1, parameters=1, trained=1)
    rate = cost.published_rate(found)
    assert found.gpu_hours(cost.PUBLISHED["steps"] * cost.PUBLISHED["batch"], rate) == pytest.approx(cost.PUBLISHED["hours"])
    assert found.gpu_hours(3600, 8e9) == pytest.approx(1), "a picture takes 8e9 operations, a second"


def test_the_page_holds_the_parameters_of_the_recipes():
    page = cost.block_in((ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8"))
    for name in cost.RECIPES:
        parameters = list(cost.build(named(name, "pretrain")).parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        assert f"| {trained / 1e6:.1f} | {sum(p.numel() for p in parameters) / 1e6:.1f} |" in page, name
