"""Draws of elastic students: how a run covers its pool, against counting one draw after the other."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from okavango import verbs
from okavango.models.backbone import create_model
from okavango.models.elastic import sampling_pool
from okavango.models.features import Subnet
from okavango.pretrain import collectives, loop
from okavango.pretrain.draws import coverage, coverage_picture, drawn_order
from okavango.pretrain.objectives import poa
from okavango.pretrain.objectives.poa import POA
from okavango.recipes import named

RECIPES = {"vit": "poa_vit_large", "swin": "poa_swin_base", "resnet": "poa_resnet_152"}


def quiet(line: str) -> None:
    """Nothing is printed."""


def draws(pool, seed: int, steps: int, ranks: int) -> list[list[Subnet]]:
    """rank -> step -> subnet, by the objective's own method."""
    objective = SimpleNamespace(pool=tuple(pool), seed=seed, shared_subnet=False)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(ranks):
            patch.setattr(collectives, "rank", lambda rank=rank: rank)
            drawn.append([POA.draw(objective, step) for step in range(steps)])
    return drawn


def whole_pool(family: str) -> tuple[Subnet, ...]:
    recipe = named(RECIPES[family], "pretrain")
    with torch.device("meta"):
        net = create_model(recipe.model, **recipe.model_args)
    return net.sampling_pool(recipe.objective.sampling_scale)[:-1]


pools = st.one_of(
    st.builds(
        lambda widths, depths, scale: sampling_pool(range(8, 8 + widths), range(1, 1 + depths), scale),
        *(st.integers(1, 4), st.integers(1, 4), st.floats(1, 3)),
    ),
    st.lists(st.builds(Subnet, st.integers(1, 3), st.shared(st.integers(1, 9))), min_size=1, max_size=20),
    st.lists(st.builds(lambda width, a, b: Subnet(width, (a, b, 2)), *[st.integers(1, 3)] * 3), min_size=1, max_size=20),
)


@given(pools, st.integers(0, 2**40), st.integers(1, 150), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_coverage_is_what_counting_the_draws_gives(pool, seed, steps, ranks):
    found, drawn = coverage(pool, seed=seed, steps=steps, ranks=ranks), draws(pool, seed, steps, ranks)
    counts = Counter(subnet for row in drawn for subnet in row)
    assert dict(zip(found.subnets, found.counts.tolist(), strict=True)) == {subnet: counts[subnet] for subnet in set(pool)}
    assert dict(zip(found.subnets, found.multiplicity.tolist(), strict=True)) == Counter(pool)
    seen = [len({subnet for row in drawn for subnet in row[: step + 1]}) / len(set(pool)) for step in range(min(steps, len(pool)))]
    assert found.candidates_seen.tolist() == pytest.approx(seen)
    orders = [drawn_order(len(pool), seed, rank, 0).tolist() for rank in range(ranks)]
    entries = [len({entry for order in orders for entry in order[: n + 1]}) / len(pool) for n in range(min(steps, len(pool)))]
    assert found.entries_seen.tolist() == pytest.approx(entries)


@given(pools, st.integers(0, 2**40), st.integers(0, 300), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_whole_cycles_are_exact_and_parts_of_one_are_near(pool, seed, more, ranks):
    first = coverage(pool, seed=seed, steps=len(pool), ranks=ranks)
    assert first.counts.tolist() == (ranks * first.multiplicity).tolist() == first.expected.tolist()
    assert first.candidates_seen[-1] == first.entries_seen[-1] == 1
    later = coverage(pool, seed=seed, steps=len(pool) + more, ranks=ranks)
    assert later.expected.sum() == pytest.approx(ranks * (len(pool) + more)) and later.counts.sum() == ranks * (len(pool) + more)
    assert (np.abs(later.counts - later.expected) < ranks * later.multiplicity).all()


def test_an_order_belongs_to_its_rank_cycle_and_seed():
    orders = {(s, r, c): drawn_order(50, s, r, c).tolist() for s in (0, 1) for r in (0, 1) for c in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 8
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    with pytest.raises(ValueError, match="read-only"):
        drawn_order(50, 0, 0, 0)[0] = 1


@pytest.mark.parametrize("family", RECIPES)
def test_published_pools(family):
    table = json.loads((ROOT / "tests" / "parity" / "poa" / "enumeration.json").read_text())[family]
    pool, steps = whole_pool(family), 1000
    found = coverage(pool, seed=3, steps=steps, ranks=2)
    assert (len(pool), len(found.subnets)) == (table["pool_entries"] - 1, table["distinct"] - 1)
    counts = Counter(subnet for row in draws(pool, 3, steps, 2) for subnet in row)
    assert found.counts.tolist() == [counts[subnet] for subnet in found.subnets]


@pytest.mark.parametrize("family", RECIPES)
def test_the_documented_table_is_right(family):
    recipe, pool = named(RECIPES[family], "pretrain"), whole_pool(family)
    found = coverage(pool, seed=0, steps=1)
    (row,) = (line for line in (ROOT / "docs" / "poa.md").read_text().splitlines() if f"`{recipe.name}` | " in line)
    widths, depths = ({getattr(subnet, name) for subnet in pool} for name in ("width", "depth"))
    assert re.findall(r"[\d.,]+", row.partition("` | ")[2]) == [
        *(str(len(widths)), str(len(depths)), str(len(found.subnets)), str(len(pool))),
        *(str(found.multiplicity.min()), str(found.multiplicity.max())),
        *(f"{recipe.run.steps:,}", f"{recipe.run.steps / len(pool):.1f}"),
    ]


@pytest.mark.parametrize("pool, steps, ranks", [((), 1, 1), ((Subnet(1, 1),), 0, 1), ((Subnet(1, 1),), 1, 0)])
def test_nothing_to_cover_is_an_error(pool, steps, ranks):
    with pytest.raises(ValueError, match=f"pool of {len(pool)}, {steps} steps, {ranks} ranks"):
        coverage(pool, seed=0, steps=steps, ranks=ranks)


# -- pictures ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", RECIPES)
def test_every_family_has_a_picture(family, tmp_path):
    picture = coverage_picture(tmp_path / "a.png", whole_pool(family), seed=0, steps=200_001, ranks=3)
    assert len(Image.open(picture).convert("L").getcolors()) > 20


def test_the_picture_shows_the_run(tmp_path):
    pool = sampling_pool((32, 64), (1, 2))
    runs = [{"seed": 0, "steps": 20}, {"seed": 0, "steps": 20}, {"seed": 1, "steps": 20}, {"seed": 0, "steps": 20, "ranks": 2}]
    first, same, *others = (coverage_picture(tmp_path / "a.png", pool, **run).read_bytes() for run in runs)
    assert first == same and len({first, *others}) == 3


def tiny(name: str = "poa_tiny", **changes):
    return verbs.override(named(name, "pretrain"), {"steps": 4, "batch": 4, "workers": 0, "save_every": 4, **changes})


def test_a_run_leaves_its_picture_and_resuming_does_not_change_it(tmp_path, monkeypatch):
    original, drawn = POA.draw, {}

    def draw(self, step):
        drawn[step] = original(self, step)
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return drawn[step]

    monkeypatch.setattr(POA, "draw", draw)
    monkeypatch.setattr(loop, "learning_curves", lambda log, picture: None)  # the other picture takes longer than the run
    stop = -1
    whole = verbs.pretrain(tiny(), out=tmp_path / "whole", say=quiet)
    net = create_model("elastic_vit_tiny", **tiny().model_args)
    found = coverage(net.sampling_pool(3.0)[:-1], seed=0, steps=4)
    assert Counter(drawn.values()) == Counter({subnet: int(n) for subnet, n in zip(found.subnets, found.counts, strict=True) if n})
    drawn, stop = {}, 1
    parts = verbs.pretrain(tiny(), out=tmp_path / "parts", say=quiet)
    assert sorted(drawn) == [0, 1] and not (parts / "coverage.png").exists()
    stop = -1
    verbs.pretrain(tiny(), out=tmp_path / "parts", say=quiet)
    assert sorted(drawn) == list(range(4))
    assert (parts / "coverage.png").read_bytes() == (whole / "coverage.png").read_bytes()


def test_ranks_that_share_their_subnet_count_as_one_and_dinov2_has_none(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(poa, "coverage_picture", lambda path, pool, *, seed, steps, ranks: asked.append((path, seed, steps, ranks)))
    monkeypatch.setattr(collectives, "world_size", lambda: 5)
    for name, changes in (("poa_tiny", {}), ("poa_tiny", {"objective.shared_subnet": True}), ("dinov2_tiny", {})):
        recipe = tiny(name, seed=7, **changes)
        recipe.objective.build(create_model(recipe.model, **recipe.model_args), (), recipe.run).after_run(Path("run"))
    assert asked == [(Path("run/coverage.png"), 7, 4, 5), (Path("run/coverage.png"), 7, 4, 1)]
