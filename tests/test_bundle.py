"""Bundles: MONAI's own parser and workflow run what was exported, and find what the library finds."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from okavango.data.studies import Studies, read_scan, write_scan
from okavango.downstream.segmentation import infer
from okavango.downstream.segmentation.bundle import StackedSegmenter, export_bundle, load_weights
from okavango.downstream.segmentation.head import Segmenter
from okavango.models.backbone import create_model

AFFINE = np.array([[0.0, 0, 1.5, 5], [0, -1, 0, 7], [2, 0, 0, -9], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    arguments = {"modalities": ("t1", "flair"), "size": 16, "patch_size": 4, "width": 24, "depth": 3, "heads": 2, "mlp": 32}
    return Segmenter(create_model("bm_mae_tiny", **arguments, spacing=(1.0, 1.0, 1.0), orientation="RAS"), feature_size=4).eval()


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return export_bundle(model, tmp_path_factory.mktemp("b") / "bundle", name="tiny", licence="cc0-1.0")


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    for id in ("p1", "p2"):
        rng = np.random.default_rng(len(id))
        for name in ("t1", "flair"):
            write_scan(folder / f"{id}_{name}.nii.gz", rng.uniform(1, 9, (9, 18, 15)).astype(np.float32), AFFINE)
    write_scan(folder / "half_t1.nii.gz", np.ones((9, 18, 15), np.float32), AFFINE)  # left out: no flair
    return folder


def test_what_the_files_say(bundle, model):
    meta = json.loads((bundle / "configs" / "metadata.json").read_text())
    inputs, outputs = (meta["network_data_format"][key] for key in ("inputs", "outputs"))
    assert inputs["image"]["channel_def"] == {"0": "t1", "1": "flair"} and inputs["image"]["spatial_shape"] == [16, 16, 16]
    assert list(outputs["pred"]["channel_def"].values()) == ["tumour core", "whole tumour", "enhancing tumour"]
    assert meta["eval_metrics"] == {} and meta["intended_use"] and meta["monai_version"] and meta["numpy_version"]
    assert "cc0-1.0" in (bundle / "LICENSE").read_text() and "0 t1, 1 flair" in (bundle / "docs" / "README.md").read_text()
    with pytest.raises(ValueError, match="exists already"):
        export_bundle(model, bundle)


def test_the_network_takes_one_tensor_in_the_order_of_its_channels(bundle, model):
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    parser["bundle_root"] = str(bundle)
    network = parser.get_parsed_content("network")
    assert isinstance(network, StackedSegmenter) and not network.training
    volumes = {name: torch.randn(1, 1, 16, 16, 16) for name in ("t1", "flair")}
    with torch.no_grad():
        ours = model.logits(volumes)
        assert torch.equal(network(torch.cat([volumes["t1"], volumes["flair"]], 1)), ours)
        assert not torch.allclose(network(torch.cat([volumes["flair"], volumes["t1"]], 1)), ours)
        definition = json.loads((bundle / "configs" / "inference.json").read_text())["network_def"]
        fields = {key: value for key, value in definition.items() if key != "_target_"}
        swapped = load_weights(StackedSegmenter(**{**fields, "modalities": ("t2f", "t1n")}), bundle / "models" / "model.pt")
        assert torch.equal(swapped(torch.cat([volumes["flair"], volumes["t1"]], 1)), ours)
        alone = load_weights(StackedSegmenter(**{**fields, "modalities": ("flair",)}), bundle / "models" / "model.pt")
        assert torch.equal(alone(volumes["flair"]), model.logits({"flair": volumes["flair"]}))
    with pytest.raises(ValueError, match="1 channels; expected 2: t1, flair"):
        network(volumes["t1"])


def test_the_workflow_writes_what_the_library_predicts(bundle, model, studies, tmp_path):
    workflow = ConfigWorkflow(
        str(bundle / "configs" / "inference.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="inference",
        bundle_root=str(bundle),
        dataset_dir=str(studies),
        output_dir=str(tmp_path),
    )
    workflow.initialize()
    assert not workflow.check_properties()
    workflow.run()
    workflow.finalize()
    source = Studies(studies)
    files = sorted(tmp_path.glob("*.nii.gz"))
    assert [file.name for file in files] == ["p1_t1_seg.nii.gz", "p2_t1_seg.nii.gz"]
    for file, id in zip(files, ("p1", "p2"), strict=True):
        image = nibabel.load(file)
        assert np.allclose(image.affine, AFFINE, atol=1e-4) and image.shape == (9, 18, 15)
        ours = infer.label_map(infer.segment(model, source[source.ids.index(id)])).numpy()
        theirs = read_scan(file).values
        # MONAI resamples with its own arithmetic: voxels at the threshold may differ
        assert (ours == theirs).mean() > 0.98 and len(np.unique(ours)) > 1


def test_models_that_make_no_bundle(tmp_path):
    backbone = create_model("bm_mae_tiny", modalities=("t1",), size=16, patch_size=4, width=24, depth=3, heads=2, mlp=32)
    with pytest.raises(ValueError, match="labels of its own"):
        export_bundle(Segmenter(backbone, labels=("grey",), feature_size=2), tmp_path / "b")
