"""The benchmarks run at their smallest sizes and count right; what they measure is not looked at."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ROOT

from okavango.data.geotiff import read
from okavango.models.features import Subnet
from okavango.recipes.pretraining import poa_vit_small
from okavango.zoo.hub import load
from okavango.zoo.leaderboard.records import read_records

NETWORK = dict(patch_size=8, min_width=32, max_width=64, width_step=32, head_dim=16, min_depth=1, max_depth=2)
SMALL = dict(batch=2, global_size=32, local_size=16, locals=2, hidden=16, prototypes=(8, 12))


@pytest.fixture
def script(monkeypatch):
    """Imports a module of benchmarks/."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module


def test_candidates_take_turns_and_the_first_round_warms_up(script):
    timing = script("timing")
    calls, now = [], [0.0]

    def candidate(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return run

    times = timing.interleave({"a": candidate("a", 1.0), "b": candidate("b", 2.0)}, 2, lambda: now[0])
    assert times == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert calls == ["b", "a", "a", "b", "b", "a"]


def test_a_fresh_process_is_another_one(script):
    assert script("timing").fresh(os.getpid) != os.getpid()


def test_stand_ins_are_in_the_middle_of_equal_parts(script):
    stand_ins = script("pretrain_step").stand_ins
    costs = [50, 10, 40, 20, 30, 60]
    assert [costs[i] for i in stand_ins(costs, 3)] == [20, 40, 60]
    assert [costs[i] for i in stand_ins(costs, 2)] == [20, 50]
    assert sorted(stand_ins(costs, 0)) == sorted(stand_ins(costs, 99)) == list(range(6))


def test_multiply_adds_against_a_sum_by_hand(script):
    module = script("pretrain_step")
    case = module.Case(recipe=poa_vit_small, model_args=NETWORK, **SMALL)
    step = module.Step(case.whole())
    counted, hidden = module.MultiplyAdds(step), int(step.batch["masks"].sum())

    def backbone(crops: int, side: int, width: int, depth: int) -> int:
        cells = (side // 8) ** 2
        block = 12 * width * width * (cells + 1) + 2 * width * (cells + 1) ** 2
        return crops * (3 * 64 * width * cells + depth * block)

    def heads(rows: int, width: int) -> int:
        return rows * sum(width * 16 + 16 * 16 + 16 * 256 + 256 * count for count in (8, 12))

    for subnet in (Subnet(64, 2), Subnet(32, 2), Subnet(64, 1)):
        width, depth = subnet.width, subnet.depth
        expected = backbone(4, 32, width, depth) + backbone(4, 16, width, depth) + heads(4 + 4 + hidden, width)
        assert counted.student(subnet) == expected
    assert counted.student(None) == counted.student(Subnet(64, 2))
    teacher = backbone(4, 32, 64, 2) + heads(4 + hidden, 64)
    assert counted.teacher() == teacher
    mean = (counted.student(Subnet(32, 2)) + counted.student(Subnet(64, 1))) / 2
    steps = (teacher + 3 * counted.student(None) + 3 * mean) / (teacher + 3 * counted.student(None))
    assert counted.ratio([Subnet(32, 2), Subnet(64, 1)]) == pytest.approx(steps)


def test_pretrain_step_writes_records_and_a_page(script, monkeypatch, tmp_path):
    module = script("pretrain_step")
    monkeypatch.setattr(module, "CASES", {"small": module.Case(recipe=poa_vit_small, model_args=NETWORK, **SMALL)})
    monkeypatch.setattr(module, "fresh", lambda function, *arguments: function(*arguments))
    module.main(["--repeats", "1", "--draws", "2", "--out", str(tmp_path / "steps.jsonl")])
    records = read_records(tmp_path / "steps.jsonl")
    ratio = {record.baseline: record.value for record in records if record.metric == "time of a POA step over a DINOv2 step"}
    (share,) = [record.value for record in records if record.metric == "measured over expected"]
    assert set(ratio) == {"measured", "multiply-adds"} and share == pytest.approx(ratio["measured"] / ratio["multiply-adds"])
    assert {record.baseline for record in records} >= {"poa step", "dinov2 step"}
    assert len(records[0].settings["seconds"]) == 4 and records[0].settings["drawn"].startswith("2 that stand for")
    assert (tmp_path / "steps.html").exists()


def test_both_steps_differ_in_the_elastic_branch_only(script):
    case = script("pretrain_step").CASES["vit_64px"]
    poa, dinov2 = case.whole(), case.whole(elastic=False)
    assert poa != dinov2 and replace(poa, objective=replace(poa.objective, elastic=False)) == dinov2


def test_retrieval_writes_records_and_a_page(script, monkeypatch, tmp_path):
    module = script("retrieval")
    monkeypatch.setattr(module, "fresh", lambda function, *arguments: function(*arguments))
    records = module.main(["--quick", "--parts", "rerank", "describe", "--out", str(tmp_path / "retrieval.jsonl")])
    assert read_records(tmp_path / "retrieval.jsonl") == records
    found = {(record.model, record.metric): record.value for record in records}
    slow, fast = (found[f"re-ranking, {name}", "milliseconds per query"] for name in ("formula", "okavango"))
    assert found["re-ranking", "time of the formula over ours"] == pytest.approx(slow / fast)
    assert found["whole re-ranking of 5 candidates", "milliseconds per query"] > 0
    assert ("describing", "speed of ours over the loop") in found
    assert "data:image/png;base64," in (tmp_path / "retrieval.html").read_text()


def test_what_re_ranking_is_measured_against_counts_by_the_formula(script):
    module = script("retrieval")
    query, candidates = module.local_maps(3, 4, 5)
    for candidate, count in zip(candidates, module.directly(query, candidates).tolist(), strict=True):
        s = (query @ candidate.T).tolist()
        nearest = [max(range(16), key=lambda j, i=i: s[i][j]) for i in range(16)]
        assert count == sum(max(range(16), key=lambda k, j=j: s[k][j]) == i for i, j in enumerate(nearest))


def test_a_search_is_the_same_in_processes_of_its_own(script):
    module = script("retrieval")
    records = module.search(1, 1, (300, 16, 4, 5), None)
    assert records[0].settings["same rows as faiss"] == 1.0 and records[0].settings["first is right"] == 1.0
    assert {record.baseline for record in records} == {"okavango", "faiss"}


def test_growth_writes_records_and_a_page_with_a_picture(script, monkeypatch, tmp_path):
    module = script("growth")
    monkeypatch.setattr(module, "GRID", {"width": (64, 128), "batch": (4,)})
    monkeypatch.setattr(module, "BASE", module.Point(width=64, depth=2, local_crops=0, batch=2, processes=1))
    monkeypatch.setattr(module, "in_its_own_process", module.measure)
    records = module.main(["--quick", "--axes", "width", "--out", str(tmp_path / "growth.jsonl")])
    assert [(r.baseline, r.settings["point"]["width"]) for r in records] == [("width", 64)] * 2 + [("width", 128)] * 2
    assert read_records(tmp_path / "growth.jsonl") == records
    assert "data:image/png;base64," in (tmp_path / "growth.html").read_text()


def test_patches_become_the_same_input_by_ours_and_by_torchvision(script, tmp_path, monkeypatch):
    files = script("preprocess").write_patches(tmp_path / "data", 3, 16)
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks" / "candidates"), *sys.path])
    candidates = importlib.import_module("run_patches")
    ours = candidates.okavango(files)(files)
    assert ours.shape == (3, 13, 224, 224)
    for name in ("torchvision", "torchvision_each"):
        torch.testing.assert_close(getattr(candidates, name)(files)(files), ours, atol=1e-5, rtol=0)


def test_a_scene_for_the_benchmark_has_a_network_that_takes_it(script, tmp_path):
    scene = script("scene")
    scene.write_scene(tmp_path / "scene.tif", 600)
    scene.save_network(tmp_path / "checkpoint")
    bands = read(tmp_path / "scene.tif", sensor="sentinel-2", level="L2A", units="dn", baseline="02.08")
    assert bands.values.shape == (4, 600, 600) and (bands.values[:, :85, :85] == 0).all() and (bands.values[:, 86:, 86:] > 0).all()
    model = load(str(tmp_path / "checkpoint"))
    assert model(**model.preprocess(image=bands)).pooled.shape == (1, 64)


@pytest.mark.parametrize("part, count", [("step", 5), ("segmentation", 4), ("data", 5)])
def test_every_part_on_scans_writes_records_and_a_page(part, count, script, monkeypatch, tmp_path):
    module = script("mri")
    monkeypatch.setattr(module, "fresh", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(module, "DATA", {"small": module.DATA["120x120x78 of 2 mm"]})
    small = ["--count", "1", "--size", "16", "--shrink", "6"] if part == "data" else ["--quick", "--sizes", "64"]
    records = module.main([part, "--repeats", "1", *small, "--out", str(tmp_path / "mri.jsonl")])
    assert read_records(tmp_path / "mri.jsonl") == records and (tmp_path / "mri.html").exists()
    assert len(records) == count * (1 if part == "data" else 2)
    ours, *_ = records
    assert ours.baseline == "okavango" and ours.value > 0 and "times as fast" in records[-1].notes
    if part == "data":
        assert ours.settings["greatest_difference"] < 0.01
