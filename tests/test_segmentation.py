"""Segmentation of studies: decoder, losses, metrics, windows, files in the right place, evaluation of every subset."""

from __future__ import annotations

import json
import math
import os

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from okavango import volume_verbs
from okavango.cli import main
from okavango.data.loading import Batches
from okavango.data.sources import BadSample
from okavango.data.studies import Prepare, Studies, read_scan, write_scan
from okavango.downstream.segmentation import infer, metrics
from okavango.downstream.segmentation.head import Segmenter
from okavango.downstream.segmentation.losses import dice_bce, dice_ce, dice_softmax_multihot
from okavango.downstream.segmentation.unetr import averaged, hidden_blocks
from okavango.downstream.volumes import cut_out, stack, whole
from okavango.models.backbone import create_model
from okavango.models.volume import Scan
from okavango.pretrain.optim import Optimiser
from okavango.recipes import named
from okavango.testing import check_objective
from okavango.zoo.checkpoint import load_checkpoint, save_checkpoint

TINY = {"modalities": ("t1", "flair"), "size": 16, "patch_size": 4, "width": 24, "depth": 3, "heads": 2, "mlp": 32}
PLAIN = {"spacing": None, "orientation": None}


def tiny(**settings):
    torch.manual_seed(0)
    return Segmenter(create_model("bm_mae_tiny", **TINY, **PLAIN), feature_size=4, **settings).eval()


def volumes(batch=1, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, 1, side, side + 2, side - 1, generator=generator) for name in TINY["modalities"]}


def study(id="a", seed=0, side=18, seg=True, affine=None):
    """A bright cube in noise; the cube is a tumour that enhances."""
    rng = np.random.default_rng(seed)
    affine = np.eye(4) if affine is None else affine
    labels = np.zeros((side, side + 2, side - 1), np.uint8)
    labels[5:12, 6:12, 4:10] = 4
    scans = {
        name: Scan((rng.uniform(1, 2, labels.shape) + 8 * (labels > 0)).astype(np.float32), affine, None, f"{id}_{name}.nii.gz")
        for name in TINY["modalities"]
    }
    sample = {**scans, "present": tuple(scans), "id": id, "affine": affine}
    return {**sample, "seg": Scan(labels, affine, None, f"{id}_seg.nii.gz"), "codes": "brats"} if seg else sample


class Memory:
    """A source that holds samples."""

    name, classes, labels, digest = "memory", (), None, "0" * 64

    def __init__(self, *samples):
        self.items, self.ids = samples, [sample["id"] for sample in samples]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Bright(Segmenter):
    """Voxels above one standard deviation are everything; no network, so every way through windows must give the same."""

    def logits(self, inputs, present=None):
        return (next(iter(inputs.values())) - 1).repeat(1, 3, 1, 1, 1)


def bright(**arguments):
    backbone = create_model("bm_mae_tiny", **TINY, **{**PLAIN, **arguments})
    return Bright(backbone, feature_size=2).eval()


# -- the head -------------------------------------------------------------------------------------------------------------------


def test_a_subset_in_a_mixed_batch_is_the_subset_alone():
    model, given = tiny(), volumes(3)
    present = torch.tensor([[True, True], [True, False], [False, True]])
    poisoned = {name: volume.clone() for name, volume in given.items()}
    poisoned["flair"][1], poisoned["t1"][2] = torch.nan, torch.nan
    with torch.no_grad():
        mixed = model.logits(poisoned, present)
        alone = [
            model.logits({name: given[name][i : i + 1] for j, name in enumerate(given) if present[i, j]})
            for i in range(len(present))
        ]
    assert mixed.shape == (3, 3, 16, 18, 15)
    assert torch.allclose(mixed, torch.cat(alone), atol=1e-5)


def test_order_of_modalities_does_not_matter_and_others_are_not_looked_at():
    model, given = tiny(), volumes()
    with torch.no_grad():
        assert torch.equal(model.logits(given), model.logits(dict(reversed(given.items()))))
        fixed = tiny(modalities=("t2f",))
        assert fixed.modalities == ("flair",)
        assert fixed.decoder["encoder1"].layer.conv1.conv.in_channels == 1
        only = fixed.logits({"flair": given["flair"]})
        assert torch.equal(fixed.logits(given, torch.tensor([[True, True]])), only)
    with pytest.raises(ValueError, match="no input; expected some of flair"):
        fixed.logits({"t1": given["t1"]})


def test_averaged_takes_what_each_sample_has():
    tokens = {"t1": torch.ones(2, 8, 3), "t2": torch.full((2, 8, 3), 3.0)}
    grid = dict.fromkeys(tokens, (2, 2, 2))
    mean = averaged(tokens, grid, ("t1", "flair", "t2"), torch.tensor([[True, False, True], [False, False, True]]))
    assert mean.shape == (2, 3, 2, 2, 2) and mean[0].unique().tolist() == [2.0] and mean[1].unique().tolist() == [3.0]
    assert averaged(tokens, grid, ("t1", "flair", "t2"), None).unique().tolist() == [2.0]
    with pytest.raises(ValueError, match="same for all"):
        averaged(tokens, {"t1": (2, 2, 2), "t2": (8, 1, 1)}, ("t1", "t2"), None)
    assert hidden_blocks(24, 3) == (6, 12, 18)


@pytest.mark.parametrize("labels", [(), ("grey", "white")])
@pytest.mark.parametrize("decoder", ["unetr", "linear"])
def test_objective(labels, decoder, tmp_path):
    model = tiny(labels=labels, decoder=decoder, drop=0.5, crop="random")
    sample = study()
    if labels:
        sample["seg"] = Scan((sample["seg"].values > 0).astype(np.uint8) * 2, sample["affine"])
    rules = check_objective(model, [sample, {**sample, "id": "b"}, {**sample, "id": "c"}])
    assert "forward" in rules and "backward" in rules
    save_checkpoint(model, tmp_path / "m", kind="head", head=model.head_config(), backbone_prefix=model.backbone_prefix)
    heads = {Segmenter.entry: lambda backbone, arguments: Segmenter(backbone, **arguments)}
    again, _ = load_checkpoint(tmp_path / "m", heads=heads)
    inputs = volumes(side=13)
    probabilities = again.predict(inputs)
    assert torch.equal(probabilities, model.predict(inputs)) and probabilities.shape[1] == (2 if labels else 3)
    assert again.head_config() == model.head_config()


def test_parts_that_are_trained():
    model = tiny(frozen=True)
    groups = model.param_groups()
    assert {name.split(".")[0] for group in groups for name, _ in group["params"]} == {"decoder"}
    model.train()
    assert not model.backbone.training and model.decoder.training
    decayed = tiny(layer_decay=0.5, decay_vectors=True).param_groups()
    rates = {name: group["lr_mult"] for group in decayed for name, _ in group["params"]}
    assert (rates["backbone.blocks.2.norm1.weight"], rates["backbone.cls_token"], rates["decoder.out.conv.conv.bias"]) == (
        0.5,
        0.0625,
        1,
    )
    assert {group["wd_mult"] for group in decayed} == {1.0}


@pytest.mark.parametrize(
    "name, small",
    [("SegResNet", {"init_filters": 8}), ("DynUNet", {"levels": 3, "filters": 4})],
)
def test_networks_of_monai(name, small, tmp_path):
    torch.manual_seed(0)
    backbone = create_model(f"monai/{name}", modalities=("t1", "flair"), size=16, **PLAIN, **small)
    model = Segmenter(backbone).eval()
    given = volumes(2)
    present = torch.tensor([[True, True], [True, False]])
    with torch.no_grad():
        mixed = model.logits({**given, "flair": torch.cat([given["flair"][:1], given["flair"][1:] * torch.nan])}, present)
        assert torch.allclose(mixed[1:], model.logits({"t1": given["t1"][1:]}), atol=1e-5)
    assert mixed.shape == (2, 3, 16, 18, 15)
    save_checkpoint(backbone, tmp_path / "m")
    again, _ = load_checkpoint(tmp_path / "m")
    assert torch.equal(again(given).maps[0], backbone.eval()(given).maps[0])
    with pytest.raises(ValueError, match="no tokens to hide"):
        again(given, layers=(0,))


def test_swin_unetr_of_monai(tmp_path):
    torch.manual_seed(0)
    backbone = create_model("monai/SwinUNETR", modalities=("t1", "flair"), size=64, **PLAIN, feature_size=12).eval()
    given = volumes(side=40)  # filled up to 64 voxels, the fewest that it takes
    with torch.no_grad():
        found = backbone(given).maps[0]
    assert found.shape == (1, 12, *given["t1"].shape[-3:]) and backbone.feature_info.channels == 12
    save_checkpoint(backbone, tmp_path / "m")
    again, _ = load_checkpoint(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(given).maps[0], found)


def test_names_of_networks():
    with pytest.raises(ValueError, match="did you mean 'SegResNet'"):
        create_model("monai/SegResnet")
    with pytest.raises(ValueError, match="init_filter"):
        create_model("monai/SegResNet", init_filter=3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": "bce"}, "dice_bce or official"),
        ({"loss": "official", "labels": ("a",)}, "is of regions"),
        ({"layers": (0, 1)}, "2 layers; patches of 4 voxels need 1"),
        ({"modalities": ("pet",)}, "unknown modality 'pet'"),
        ({"drop": 1.5}, "drop=1.5"),
        ({"crop": "left"}, "crop='left'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


@pytest.mark.parametrize(
    "recipe, epochs, base, expected",
    [
        ("segment_bm_mae", 70, 5e-4, {0: 0.1, 9: 0.959764, 10: 0.950484, 35: 0.5, 69: 0.000503}),
        ("classify_bm_mae", 20, 1e-4, {0: 0.2, 4: 0.904508, 5: 0.853553, 10: 0.5, 19: 0.006156}),
        ("survive_bm_mae", 10, 1e-4, {0: 0.2, 4: 0.904508, 5: 0.853553, 9: 0.578217}),
    ],
)
def test_published_schedules(recipe, epochs, base, expected):
    recipe = named(recipe, "finetune")
    assert recipe.run.epochs == epochs and recipe.run.batch == 2 and recipe.optim.lr == base
    groups = [{"params": [("w", torch.nn.Parameter(torch.zeros(1)))], "lr_mult": 1.0, "wd_mult": 1.0}]
    optimiser = Optimiser(groups, recipe.optim, epochs, recipe.run.batch)  # a step an epoch
    for epoch, factor in expected.items():
        assert optimiser.schedule(epoch)["lr"] == pytest.approx(base * factor, abs=base * 1e-6)


def test_the_published_network_has_no_class_token():
    recipe = named("segment_bm_mae", "finetune")
    backbone = create_model("bm_mae_tiny", **TINY)
    model = recipe.objective.build(backbone, (), recipe.run)
    assert model.backbone.cls_token is None and model.loss == "official"
    assert torch.equal(model.backbone.norm.weight, backbone.norm.weight)


# -- samples --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.tuples(*[st.integers(4, 20)] * 3))
def test_cut_out(seed, size):
    model = tiny()
    sample = Prepare(whole(model.preprocess), "regions")(study())
    cut = cut_out(sample, size, seed)
    assert cut["t1"].shape == (1, *size) and cut["seg"].shape == (3, *size) and cut["seg"].dtype == torch.bool
    again = cut_out(sample, size, seed)
    assert torch.equal(cut["t1"], again["t1"]) and cut["geometry"].size == size
    # the segmentation stays on the voxels it was on: the cube is the bright part
    assert bool((cut["t1"][cut["seg"][:1]] > 1).all())


def test_stack_marks_what_each_study_has():
    model = tiny()
    prepare = Prepare(model.preprocess)
    full = prepare(study())
    part = {name: value for name, value in full.items() if name != "flair"}
    batch = stack([full, part], model.preprocess, model.modalities)
    assert batch["present"].tolist() == [[True, True], [True, False]] and not bool(batch["flair"][1].any())
    assert set(stack([part], model.preprocess, model.modalities)) == {"t1", "present"}
    drawn = [stack([full], model.preprocess, model.modalities, drop=1.0, seed=seed)["present"] for seed in range(40)]
    seen = {tuple(rows[0].tolist()) for rows in drawn}
    assert seen == {(True, True), (True, False), (False, True)}


def test_samples_that_cannot_be_learnt_from():
    transform = tiny().transform(tiny().preprocess)
    with pytest.raises(BadSample, match="has no seg"):
        transform(study(seg=False), 0)
    with pytest.raises(BadSample, match="none of the sequences t1, flair"):
        transform({"id": "x", "seg": study()["seg"], "t2": study()["t1"]}, 0)
    strange = study()
    strange["seg"] = Scan(np.where(strange["seg"].values > 0, 7, 0).astype(np.uint8), strange["affine"], None, "a_seg.nii.gz")
    with pytest.raises(BadSample, match="a_seg.nii.gz: label 7 is unknown"):
        transform(strange, 0)
    with pytest.raises(BadSample, match="label 7 in its segmentation; expected 0..2"):
        tiny(labels=("a", "b")).transform(tiny().preprocess)(strange, 0)


# -- losses ---------------------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    logits, target = torch.tensor([2.0, -1.0, 0.5, -3.0]).view(1, 2, 2, 1, 1), torch.tensor([1, 0, 1, 1]).view(1, 2, 2, 1, 1)
    p = logits.sigmoid()
    soft = [1 - (2 * (p * target)[0, k].sum() + 1e-5) / (p[0, k].sum() + target[0, k].sum() + 1e-5) for k in range(2)]
    bce = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    assert float(dice_bce(logits, target.bool())) == pytest.approx(float(sum(soft) / 2 + bce), abs=1e-6)
    softmax = -(target * logits.log_softmax(1)).sum(1).mean()
    assert float(dice_softmax_multihot(logits, target.bool())) == pytest.approx(float(sum(soft) / 2 + softmax), abs=1e-6)
    labels = torch.tensor([0, 1]).view(1, 1, 2, 1, 1)
    q = logits.softmax(1)[0, 1].flatten()
    dice = 1 - (2 * q[1] + 1e-5) / (q.sum() + 1 + 1e-5)
    crossed = -logits.log_softmax(1)[0].flatten(1)[[0, 1], [0, 1]].mean()
    assert float(dice_ce(logits, labels)) == pytest.approx(float(dice + crossed), abs=1e-6)


# -- metrics --------------------------------------------------------------------------------------------------------------------


def test_metrics_of_a_moved_box():
    """4 x 4 x 4 voxels, moved by one along the first axis, where voxels are 3 mm: a quarter of it is missed, a quarter invented."""
    true, said = torch.zeros(1, 12, 12, 12, dtype=torch.bool), torch.zeros(1, 12, 12, 12, dtype=torch.bool)
    true[0, 3:7, 4:8, 4:8], said[0, 4:8, 4:8, 4:8] = True, True
    (found,) = metrics.score(said, true, (3.0, 1.0, 1.0), ("WT",), id="a")
    assert (found.case, found.dice, found.hd95) == ("both", pytest.approx(0.75), pytest.approx(3.0))
    assert found.diagonal == pytest.approx(math.sqrt(36**2 + 12**2 + 12**2))
    # surfaces: 56 voxels each; all of the moved face but its rim lies 3 mm away from the other surface
    assert found.nsd == pytest.approx(surface_share(said[0].numpy(), true[0].numpy(), (3.0, 1.0, 1.0), 1.0))
    (wide,) = metrics.score(said, true, (3.0, 1.0, 1.0), ("WT",), tolerance=3.0)
    assert wide.nsd == 1.0


def surface_share(a, b, spacing, tolerance):
    """NSD by distances from every surface voxel to every other."""
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (a, b)]
    points = [np.argwhere(edge) * np.asarray(spacing) for edge in edges]
    apart = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    near = (apart.min(1) <= tolerance).sum() + (apart.min(0) <= tolerance).sum()
    return near / (len(points[0]) + len(points[1]))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.tuples(*[st.sampled_from([0.5, 1.0, 2.5])] * 3))
def test_metrics_of_random_shapes(seed, spacing):
    rng = np.random.default_rng(seed)
    a, b = (ndimage.gaussian_filter(rng.normal(size=(9, 10, 11)), 1.5) > 0 for _ in range(2))
    (found,) = metrics.score(torch.from_numpy(a)[None], torch.from_numpy(b)[None], spacing, ("r",))
    assert found.dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert found.nsd == pytest.approx(surface_share(a, b, spacing, 1.0))


def test_empty_cases_are_defined_and_counted():
    empty, box = torch.zeros(1, 3, 4, 12, dtype=torch.bool), torch.zeros(1, 3, 4, 12, dtype=torch.bool)
    box[0, 1, 1:3, 2:6] = True
    cases = {"both": (box, box), "missed": (empty, box), "invented": (box, empty), "none": (empty, empty)}
    scores = [metrics.score(*pair, (1, 1, 1), ("ET",), id=case)[0] for case, pair in cases.items()]
    assert [score.case for score in scores] == list(cases)
    by = {(c, m): [s.value(m, c) for s in scores] for c in metrics.CONVENTIONS for m in metrics.METRICS}
    nan = math.nan
    assert by["brats", "dice"] == [1, 0, 0, 1] and by["brats", "nsd"] == [1, 0, 0, 1] and by["brats", "hd95"] == [0, 13, 13, 0]
    expected = {"dice": [1, 0, nan, nan], "hd95": [0, nan, nan, nan], "nsd": [1, 0, 0, nan]}
    for metric, values in expected.items():
        assert np.array_equal(by["reference", metric], values, equal_nan=True), metric
    dice, hd95, nsd = metrics.summarise(scores, "reference")
    assert (dice.value, len(dice.values), dice.left_out, hd95.value, nsd.value) == (0.5, 2, 2, 0, pytest.approx(1 / 3))
    assert dice.cases == {"both": 1, "invented": 1, "missed": 1, "none": 1}
    assert math.isnan(metrics.summarise(scores[3:], "reference")[0].value)
    again = [metrics.Score.from_json(json.loads(json.dumps(score.to_json()))) for score in scores]
    assert [s.value("hd95") for s in again] == by["brats", "hd95"]
    with pytest.raises(ValueError, match="expected one of dice, hd95, nsd"):
        scores[0].value("iou")
    with pytest.raises(ValueError, match=r"expected \(2, D, H, W\)"):
        metrics.score(empty, box, (1, 1, 1), ("a", "b"))


# -- whole volumes --------------------------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(st.tuples(*[st.integers(9, 30)] * 3), st.sampled_from([0.0, 0.25, 0.5]), st.integers(1, 3))
def test_windows_cover_volumes_of_any_size(size, overlap, batch):
    model = bright()
    volume = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
    found = infer.window_probabilities(model, {"t1": volume}, torch.tensor([[True, False]]), overlap=overlap, batch=batch)
    assert torch.allclose(found, (volume - 1).sigmoid().expand(-1, 3, -1, -1, -1), atol=1e-5)


AFFINES = {
    "as it is": np.diag([1.0, 1.0, 1.0, 1.0]),
    "left, back, 2 mm": np.array([[-2.0, 0, 0, 90], [0, -1, 0, 40], [0, 0, 1.5, -12], [0, 0, 0, 1]]),
    "axes in another order": np.array([[0.0, 0, 1.2, 5], [0, -1, 0, 7], [3, 0, 0, -9], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("name", AFFINES)
def test_predictions_lie_where_the_study_lies(name, tmp_path):
    sample = study(affine=AFFINES[name])
    sample["t1"].values[:2], sample["flair"].values[:2] = 0, 0  # a border to crop
    model = bright(spacing=(1.0, 1.0, 1.0), orientation="RAS")
    ((_, path),) = list(infer.predict_folder(model, Memory(sample), tmp_path, made_by={}, say=lambda line: None))
    image = nibabel.load(path)
    assert np.allclose(image.affine, AFFINES[name]) and image.shape == sample["t1"].values.shape
    assert nibabel.aff2axcodes(image.affine) == nibabel.aff2axcodes(AFFINES[name])
    labels, true = np.asarray(image.dataobj), sample["seg"].values > 0
    assert image.get_data_dtype() == np.uint8 and set(np.unique(labels)) == {0, 4}
    assert 2 * ((labels > 0) & true).sum() / ((labels > 0).sum() + true.sum()) > (0.99 if name == "as it is" else 0.85)
    # the same millimetres: centres of mass in space
    middle = [nibabel.affines.apply_affine(image.affine, np.argwhere(mask).mean(0)) for mask in (labels > 0, true)]
    assert np.abs(middle[0] - middle[1]).max() < 0.6


def test_label_numbers_of_each_convention():
    regions = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]).bool().view(3, 1, 1, 4)
    assert infer.label_map(regions).flatten().tolist() == [0, 1, 4, 2]
    assert infer.label_map(regions, "brats2023").flatten().tolist() == [0, 1, 3, 2]


def test_a_killed_run_over_a_folder_goes_on(tmp_path):
    source, model = Memory(study("a"), study("b", 1), study("c", 2)), bright()
    child = os.fork()
    if not child:  # dies without a word after its second study
        seen = infer.predict_folder(model, source, tmp_path, made_by={"weights": "1"}, say=lambda line: None)
        next(seen), next(seen)
        os.kill(os.getpid(), 9)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.nii.gz")}
    assert set(first) == {"a_seg.nii.gz", "b_seg.nii.gz"}
    (tmp_path / ".123-c_seg.nii.gz").write_bytes(b"torn")
    lines: list[str] = []
    done = list(infer.predict_folder(model, source, tmp_path, made_by={"weights": "1"}, say=lines.append))
    assert [id for id, _ in done] == ["a", "b", "c"] and lines[:2] == ["a: is there already", "b: is there already"]
    assert all(path.exists() for _, path in done)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in first} == first
    with pytest.raises(ValueError, match="by another model or other settings"):
        list(infer.predict_folder(model, source, tmp_path, made_by={"weights": "2"}))


def test_bad_studies_are_named_and_left_out(tmp_path):
    other_grid, two_sets = study("b"), study("c", side=19)
    other_grid["flair"] = two_sets["flair"]
    blank = study("d")
    blank["t1"] = Scan(np.zeros_like(blank["t1"].values), blank["affine"], None, "d_t1.nii.gz")
    lines: list[str] = []
    source = Memory(study("a"), other_grid, blank)
    done = list(infer.predict_folder(bright(), source, tmp_path, made_by={}, say=lines.append))
    assert [id for id, _ in done] == ["a"]
    assert "left out b: c_flair.nii.gz has 19x21x18 voxels" in lines[1] and "a_t1" not in lines[1]
    assert lines[2] == "left out d: d_t1.nii.gz: all voxels are zero; leave the file out"
    with pytest.raises(ValueError, match="differ in signs only"):
        list(infer.predict_folder(bright(), Memory(study("x/1"), study("x:1")), tmp_path / "o", made_by={}))


# -- verbs ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for id in ("p1", "p2"):
        sample = study(id, seed=int(id[1]))
        for name in (*sample["present"], "seg"):
            write_scan(tmp_path / "data" / f"{id}_{name}.nii.gz", sample[name].values, sample["affine"])
    return tmp_path / "data"


def test_every_subset_in_one_command(folder, tmp_path, monkeypatch):
    model, report = tiny(), tmp_path / "report"
    options = {"data": str(folder), "report": report, "out": tmp_path / "records.jsonl", "say": lambda line: None}
    records = volume_verbs.evaluate(model, **options)
    assert [tuple(r.settings["modalities"]) for r in records[::9]] == [("t1", "flair"), ("t1",), ("flair",)]
    assert {r.metric for r in records} == {f"{m} {r}" for m in ("Dice", "HD95", "NSD") for r in ("TC", "WT", "ET")}
    assert all(r.protocol == "segmentation/brats/v1" and r.n == 2 and r.interval for r in records)
    assert all(sum(r.settings["cases"].values()) == 2 for r in records)
    page = (report / "index.html").read_text()
    assert page.count("<tr>") == 4 and page.count("●") >= 4 and "HD95 ET" in page and "src=" not in page
    # what was measured is not measured again
    monkeypatch.setattr(infer, "segment", None)
    again = volume_verbs.evaluate(model, **options)
    assert [r.value for r in again] == [r.value for r in records]
    asked = {"protocol": "segmentation/reference", "modalities": ("t2f",), "say": lambda line: None}
    (one, *_) = volume_verbs.evaluate(model, data=str(folder), **asked)
    assert one.protocol == "segmentation/reference/v1" and one.settings["modalities"] == ["flair"]


@pytest.mark.filterwarnings("ignore:study p2")
def test_what_studies_lack_is_counted(folder):
    (folder / "p1_flair.nii.gz").unlink()
    torn = folder / "p2_flair.nii.gz"
    torn.write_bytes(torn.read_bytes()[:200])
    lines: list[str] = []
    records = volume_verbs.evaluate(bright(), data=str(folder), modalities=("t1,flair", "t1", "flair"), say=lines.append)
    assert lines[-1] == "of 2 studies: flair is missing in 1, flair is torn in 1, 2 left out"
    by = {tuple(record.settings["modalities"]): record.settings for record in records}
    assert by["t1", "flair"]["absent"] == {"flair is missing": 1, "flair is torn": 1}
    assert "absent" not in by["t1",] and by["t1",].get("studies_left_out") is None and ("flair",) not in by


def test_what_samples_lack_is_counted_by_the_loader():
    samples = [{"id": "a", "absent": ["t2 is missing"]}, {"id": "b"}]

    batches = Batches(samples, lambda sample, seed: sample, lambda samples, seed: {}, batch=2, seed=0)
    assert batches[0, 0] == {"bad": [], "absent": ["t2 is missing"]}
    assert Batches(samples[1:], lambda sample, seed: sample, lambda samples, seed: {}, batch=1, seed=0)[0, 0] == {"bad": []}


def test_what_is_written_is_what_is_measured(folder, tmp_path):
    model = bright()
    path = dict(volume_verbs.predict(model, str(folder), tmp_path / "out", pictures=True, say=lambda line: None))["p2"]
    assert path.with_name("p2.png").exists()
    (score, *_) = volume_verbs.whole_volume_score(model, Studies(folder)[1], ("t1", "flair"), 0.5, 1)
    said, true = read_scan(path).values == 4, read_scan(folder / "p2_seg.nii.gz").values == 4
    assert score.dice == pytest.approx(2 * (said & true).sum() / (said.sum() + true.sum())) and score.dice > 0.99


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    for arguments, line in [
        ({"protocol": "segmentation/dice"}, "unknown protocol 'segmentation/dice'"),
        ({"protocol": "studies/survival"}, "holds a Segmenter; expected a SurvivalHead"),
        ({"modalities": ("t1,pet",)}, "unknown modality 'pet'"),
    ]:
        with pytest.raises(ValueError, match=line):
            volume_verbs.evaluate(tiny(), data=str(folder), **arguments)
    with pytest.raises(ValueError, match="the model was made for flair"):
        volume_verbs.evaluate(tiny(modalities=("flair",)), data=str(folder), modalities=("t1",))
    with pytest.raises(ValueError, match="give --out FOLDER"):
        volume_verbs.predict(tiny(), str(folder))
    for arguments in (
        ["evaluate", "x", "--protocol", "segmentation/brats", "knn", "--data", "y"],
        ["evaluate", "x", "--protocol", "segmentation/brats"],
        ["evaluate", "x", "--data", "y", "--overlap", "0.1"],
        ["predict", "x", "y", "--synthesize", "flair"],
    ):
        assert main(arguments) == 2
        assert "okavango: " in capsys.readouterr().err


def test_synthesis(folder, tmp_path):
    recipe = named("bm_mae_tiny", "pretrain")
    objective = recipe.objective.build(create_model("bm_mae_tiny", **TINY, **PLAIN), (), recipe.run)
    save_checkpoint(
        objective, tmp_path / "run" / "export-full", kind="objective", head=objective.head_config(), backbone_prefix="backbone."
    )
    results = volume_verbs.synthesize(str(tmp_path / "run"), str(folder), "t2f", tmp_path / "made", say=lambda line: None)
    assert [id for id, _ in results] == ["p1", "p2"] and all(set(found) == {"psnr", "ssim"} for _, found in results)
    image = nibabel.load(tmp_path / "made" / "p1_flair_synthetic.nii.gz")
    assert image.shape == (18, 20, 17) and (tmp_path / "made" / "p1_flair_synthetic.png").exists()


def test_fidelity_of_the_same_and_of_a_shift():
    real = torch.rand(13, 13, 13, generator=torch.Generator().manual_seed(0))
    brain = torch.ones_like(real).bool()
    assert volume_verbs.fidelity(real, real, brain) == {"psnr": math.inf, "ssim": pytest.approx(1.0, abs=1e-5)}
    span = float(real.max() - real.min())
    assert volume_verbs.fidelity(real + 0.1 * span, real, brain)["psnr"] == pytest.approx(20, abs=1e-3)
    outside = brain.clone()
    outside[:6] = False
    spoilt = torch.where(outside, real, 9.0)
    assert volume_verbs.fidelity(spoilt, real, outside)["psnr"] == math.inf  # what is no brain does not count
