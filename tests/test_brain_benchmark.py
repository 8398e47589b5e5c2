"""The benchmark on semi-synthetic brains and the demonstration on a real one, on phantoms and at a size of seconds."""

from __future__ import annotations

import csv
import importlib
import json

import numpy as np
import pytest
import torch
from helpers import ROOT
from sklearn.naive_bayes import GaussianNB

from okavango import verbs, volume_verbs
from okavango.data.sources import open_source
from okavango.data.studies import write_scan
from okavango.models.volume import Scan
from okavango.pretrain import loop
from okavango.samples.brain import phantom
from okavango.zoo.leaderboard.records import read_records

torch.set_num_threads(1)


@pytest.fixture
def script(monkeypatch):
    """Imports a module of benchmarks/ or examples/; runs draw no curves, which would be most of the time."""
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.setattr(loop, "learning_curves", lambda *_: None)
    return importlib.import_module


# -- semi-synthetic studies ---------------------------------------------------------------------------------------------------


@pytest.fixture
def brain(script, monkeypatch):
    module = script("brain")
    for name, value in {"SIZE": (24, 24, 24), "SPACING": 8.0, "VALIDATION": 1}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_all_of_it(brain, tmp_path, monkeypatch):
    page, out = tmp_path / "mri.md", tmp_path / "board" / "brain.jsonl"
    page.write_text(f"# Title\n\n{brain.START}\nold\n{brain.END}\n\nend {brain.END}\n")
    where = ["--folder", str(tmp_path / "runs"), "--anatomies", "phantom-0", "phantom-1", "--test", "phantom-2"]
    sizes = ["--studies", "10", "--labelled", "3", "--seeds", "5", "--pretrain-steps", "2", "--steps", "2"]
    command = [*where, *sizes, "--out", str(out), "--docs", str(page)]
    brain.main(command)

    table = tmp_path / "runs" / "semi-synthetic.csv"
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    parts = {split: [row for row in rows if row["split"] == split] for split in dict.fromkeys(row["split"] for row in rows)}
    assert {split: len(part) for split, part in parts.items()} == {"test": 2, "validation": 1, "pretrain": 7, "labelled-3": 3}
    ids = {split: {row["id"] for row in part} for split, part in parts.items()}
    assert ids["labelled-3"] < ids["pretrain"] and not ids["validation"] & ids["pretrain"]
    assert [("phantom-2" in row["id"]) for row in rows] == [row["split"] == "test" for row in rows]
    assert not any(row["seg"] for row in parts["pretrain"]) and all(row["seg"] for row in parts["labelled-3"])
    assert "seg" not in open_source(f"{table}:pretrain")[0] and open_source(f"{table}:test")[0]["seg"].values.any()

    records = read_records(out)
    assert len(records) == 2 * (16 * 3 + 2 * 3) + 2 * 3 + 16 * 3 + 2 * 3
    assert all("semi-synthetic" in record.dataset and "nothing follows for patients" in record.notes for record in records)
    assert {record.n for record in records} == {2} and {tuple(record.settings["seeds"]) for record in records} == {(5,)}
    recipes = {
        name: json.loads((tmp_path / "runs" / f"{name}-labelled3-steps2-seed5" / "recipe.json").read_text())
        for name in ("scratch", "pretrained", "specialist-flair", "specialist-t1ce+flair")
    }
    differing = {key for key in recipes["scratch"] if recipes["scratch"][key] != recipes["pretrained"][key]}
    assert differing == {"model", "model_args", "start"}
    assert recipes["specialist-t1ce+flair"]["objective"]["modalities"] == ["t1ce", "flair"]
    assert {recipe["run"]["steps"] for recipe in recipes.values()} == {2}

    # A number of the page against the program that users call, for one model and subset.
    run = tmp_path / "runs" / "pretrained-labelled3-steps2-seed5"
    ours = volume_verbs.evaluate(str(run), data=f"{table}:test", modalities=["flair,t2"], say=lambda line: None)
    expected = {record.metric: record.value for record in ours if record.metric.startswith("Dice")}
    found = {
        record.metric: record.value
        for record in records
        if record.baseline == "pretrained" and record.settings["seen with"] == "t2+flair" and record.metric in expected
    }
    assert found == pytest.approx(expected) and len(found) == 3

    html, text = out.with_suffix(".html").read_text(), page.read_text()
    assert html.count("nothing follows for patients") > len(records) and html.count("data:image/png") == 2
    head, _, rest = text.partition(brain.START)
    tables, _, end = rest.partition(brain.END)
    assert (head, end) == ("# Title\n\n", f"\n\nend {brain.END}\n") and "old" not in tables
    assert tables.count("| t1ce flair |") == 4 and "semi-synthetic studies; nothing follows for patients" in tables

    # Again: nothing is trained, nothing measured. Other studies are not mixed with these.
    with monkeypatch.context() as patch:
        for module, name in ((verbs, "pretrain"), (verbs, "finetune"), (volume_verbs, "whole_volume_score")):
            patch.setattr(module, name, None)
        assert [r.value for r in brain.main(command)] == [r.value for r in records]
    with pytest.raises(SystemExit, match="holds other studies"):
        brain.main([*command, "--studies", "15"])


def test_too_few_studies_and_unknown_anatomies(brain, tmp_path):
    where = ["--folder", str(tmp_path), "--anatomies", "phantom-0", "--test", "phantom-2", "--studies", "6"]
    with pytest.raises(SystemExit, match="3 studies to train on; expected at least 4"):
        brain.main([*where, "--labelled", "4"])
    with pytest.raises(SystemExit, match="unknown anatomy 'nobody'"):
        brain.main([*where[:1], str(tmp_path / "other"), "--anatomies", "nobody"])


def test_a_run_that_was_stopped_is_not_measured(brain, tmp_path):
    with pytest.raises(SystemExit, match="stopped before its end"):
        brain.finished(lambda *_, **__: None, "bm_mae_tiny", tmp_path / "run")


def test_numbers_of_records_and_tables(brain):
    """Scores by hand: pretraining adds 0.1 in study 0 and 0.3 in study 1, one model for all is 0.2 below specialists."""
    studies, base = np.array([0.1, 0.5]), dict.fromkeys(brain.SUBSETS, 0.0) | {("t1",): 0.15}

    def scores(shift, subsets):
        rows = {subset: np.stack([studies + shift + base[subset], studies + shift + base[subset] + 0.02]) for subset in subsets}
        return {subset: np.broadcast_to(row[:, None, None], (2, 3, 2, 2)) for subset, row in rows.items()}  # seeds, regions, ...

    facts = {"parameters": 7, "settings": {"labelled": 4, "seeds": [0, 1], "nothing drawn": {"WT": 0, "TC": 0, "ET": 1}}}
    setups = {brain.Setup("scratch", 4): scores(0.0, brain.SUBSETS)}
    setups[brain.Setup("pretrained", 4)] = scores(np.array([0.1, 0.3]), brain.SUBSETS)
    for only in brain.SPECIALISTS:
        setups[brain.Setup("pretrained", 4, only)] = scores(np.array([0.3, 0.5]), [only])
    about = {"pretraining": {"studies": 9, "steps": 8}, "fine-tuning": {"steps": 6}}
    results = {setup: brain.Measured(found, facts) for setup, found in setups.items()}
    records = brain.records_of(results, "test", {"train": ["a"], "test": ["b"]}, about)
    look = brain.Looked(records)
    assert look.of("scratch", 4, ("t1",), "Dice WT").value == pytest.approx(0.3 + 0.15 + 0.01)
    assert look.of("scratch", 4, ("t1",), "Dice WT").settings["value per seed"] == [0.45, 0.47]
    assert look.of("scratch", 4, brain.MEAN, "Dice ET").value == pytest.approx(0.31 + 0.15 / 15)
    gain = look.of(brain.LESS[0], 4, brain.MEAN, "difference in Dice TC")
    assert gain.value == pytest.approx(0.2) and gain.interval == pytest.approx((0.1, 0.3)) and gain.n == 2
    lines = brain.block(records).splitlines()
    assert lines[0] == brain.START and lines[-1] == brain.END and "9 unlabelled studies, 8 steps" in lines[1]
    assert lines[1].endswith("a Dice of 0.000 (WT), 0.000 (TC), 0.500 (ET).")
    assert "| t1 | 0.660 (+0.200\\*) | 0.660 (+0.200\\*) | 0.660 (+0.200\\*) |" in lines
    assert any(
        line.startswith("| flair | TC | 0.510 (0.210..0.810) | 0.710") and "| -0.200 (-0.200..-0.200) | -0.200, -0.200 |" in line
        for line in lines
    )
    assert records[0].dataset == "semi-synthetic brain, b"
    assert brain.records_of(results, "validation", {"train": ["a"], "test": ["b"]}, about)[0].dataset.endswith("a validation")
    for draw in (brain.heat_map, brain.gains):
        assert draw(records).startswith(b"\x89PNG")


# -- tissues ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def template(tmp_path):
    """A phantom in the template's files: axes to the left, bottom and front, six classes."""
    anatomy = phantom(0)
    tissue = anatomy.tissue.copy()
    low = np.arange(tissue.shape[2])[None, None] < 20
    tissue[(tissue > 0) & low & (tissue != 5)] = 6
    affine = np.diag([-2.0, 1, 1, 1])
    affine[1:3, 1:3] = [[0, 2], [-2, 0]]
    affine[:3, 3] = (70, -80, 60)
    for name, values in (("BrainCerebellum", anatomy.t1), ("Tissue", tissue.astype(np.float32))):  # as the package has it
        turned = np.ascontiguousarray(values[::-1].transpose(0, 2, 1)[:, ::-1])
        write_scan(tmp_path / f"T_template0_{name}.nii.gz", turned, affine)
    return tmp_path


def test_halves_are_mirrored_in_shape_and_share_nothing(script, template):
    tissue = script("tissue")
    t1, labels = (tissue.read_turned(template / name) for name in (tissue.T1, tissue.TISSUE))
    np.testing.assert_array_equal(t1.values, phantom(0).t1)  # to the right, front and top again
    found = tissue.halves(t1, labels)
    (left, left_labels), (right, _) = found["left"], found["right"]
    assert left.values.shape == right.values.shape == left_labels.values.shape

    def across(scan):
        return scan.affine[0, 3] + scan.affine[0, 0] * np.arange(len(scan.values))

    assert across(left).max() + 2 * tissue.GAP < across(right).min() + 2.1  # millimetres to the right
    for scan in (left, right):
        start = round((scan.affine[0, 3] - t1.affine[0, 3]) / 2)
        np.testing.assert_array_equal(scan.values, t1.values[start : start + len(scan.values)])
    with pytest.raises(SystemExit, match="different grids"):
        tissue.halves(t1, Scan(labels.values[1:], labels.affine, None, "labels"))
    with pytest.raises(SystemExit, match="label 9; expected 0..6"):
        tissue.halves(t1, Scan(np.where(labels.values == 1, 9, labels.values), labels.affine, None, "labels"))
    with pytest.raises(SystemExit, match="No such file"):
        tissue.read_turned(template / "nothing.nii.gz")


def test_tissues_by_grey_values(script):
    tissue = script("tissue")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, (12, 12, 12))  # the sixth class is not there
    t1 = np.where(labels > 0, (0.2 * labels + rng.normal(0, 0.06, labels.shape)).clip(0.01), 0)
    inside = labels > 0
    reference = GaussianNB().fit(t1[inside][:, None], labels[inside])
    said = tissue.by_gaussians(t1, labels)(t1)
    assert (said[inside] == reference.predict(t1[inside][:, None])).mean() > 0.995 and not said[~inside].any()
    three = np.where(labels > 3, 0, labels)
    grey = np.where(three > 0, t1, 0)
    assert (tissue.by_kmeans(np.repeat(grey, 9, 0), np.repeat(three, 9, 0))(grey) == three).mean() > 0.9


def test_the_demonstration(script, template, tmp_path, monkeypatch):
    tissue = script("tissue")
    page, out = tmp_path / "page.md", tmp_path / "tissue.jsonl"
    page.write_text(f"# Title\n\n{tissue.START}\nold\n{tissue.END}\n\nend\n")
    command = ["--template", str(template), "--work", str(tmp_path / "work"), "--out", str(out), "--docs", str(page)]
    command += ["--steps", "2", "--window", "16", "--spacing", "6"]
    tissue.main(command)
    records = read_records(out)
    assert len(records) >= 4 * 7 and all(record.interval is None and "demonstration" in record.notes for record in records)
    dice = {(record.baseline, record.metric): record.value for record in records}
    t1, labels = (tissue.read_turned(template / name) for name in (tissue.T1, tissue.TISSUE))
    found = tissue.halves(t1, labels)
    mirrored, truth = found["left"][1].values[::-1], found["right"][1].values
    for number, name in enumerate(tissue.CLASSES, 1):
        said, true = mirrored == number, truth == number
        assert dice["mirror", f"Dice {name}"] == pytest.approx(2 * (said & true).sum() / (said.sum() + true.sum()))
    mean = np.mean([dice["network", f"Dice {name}"] for name in tissue.CLASSES])
    assert dice["network", "Dice, mean"] == pytest.approx(mean) and 0 <= mean < 1
    text = page.read_text()
    assert text.startswith("# Title\n\n") and text.endswith("\n\nend\n") and "old" not in text and "| brain stem |" in text
    assert (tmp_path / "work" / "tissue.png").stat().st_size > 10_000
    assert tissue.NOTICE in out.with_suffix(".html").read_text()
    with monkeypatch.context() as patch:  # a run that is over is not made again
        patch.setattr(verbs, "finetune", None)
        assert [record.value for record in tissue.main(command)] == [record.value for record in records]
