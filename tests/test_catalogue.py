"""The list of models: names, filters, and what an entry knows of itself."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from okavango.models.backbone import architectures, create_model
from okavango.zoo import catalogue
from okavango.zoo.catalogue import CATALOGUE, Entry, ModelInfo, find, licence_of, list_models
from okavango.zoo.checkpoint import save_checkpoint, verify_checkpoint
from okavango.zoo.hub import load

ROOT = str(Path(__file__).parents[1])


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Three entries: packaged and there, packaged and absent, on the web."""
    model = create_model("elastic_vit_tiny", image_size=14, max_depth=2)
    save_checkpoint(model, tmp_path / "here", card={"licence": "apache-2.0"})
    entries = [
        Entry(architecture="elastic_vit_tiny", tag="here", source="here"),
        Entry(architecture="elastic_vit_tiny", tag="gone", source="gone", licence="mit"),
        Entry(
            architecture="elastic_vit_base",
            tag="web",
            source="https://example.org/x",
            sha256="0" * 64,
            licence="cc-by-nc-4.0",
            parameters=5,
            input="image 7x7",
        ),
    ]
    monkeypatch.setattr(catalogue, "WEIGHTS_FOLDER", tmp_path)
    monkeypatch.setattr(catalogue, "CATALOGUE", {entry.name: entry for entry in entries})
    return model


def test_names_with_and_without_weights(published):
    names = list_models("elastic_vit_*")
    assert names == sorted(names) and "elastic_vit_tiny.here" in names and "elastic_vit_tiny" in names
    assert "elastic_vit_tiny.gone" not in names
    assert list_models(weights=True) == ["elastic_vit_base.web", "elastic_vit_tiny.here"]
    assert list_models(weights=False) == sorted(architectures())
    assert list_models("no such thing*") == []


def test_licences(published):
    assert list_models(licence="permissive") == ["elastic_vit_tiny.here"]
    assert list_models(licence="cc-by-nc-*") == ["elastic_vit_base.web"]
    assert list_models(licence="gpl-3.0") == []
    assert licence_of(find("elastic_vit_tiny.here")) == "apache-2.0"


@pytest.mark.parametrize(
    ("licence", "permissive"),
    [("mit", True), ("bsd-3-clause", True), ("cc-by-4.0", True), ("cc-by-nc-4.0", False), ("agpl-3.0", False), ("unknown", False)],
)
def test_what_counts_as_permissive(monkeypatch, licence, permissive):
    entry = Entry(architecture="arch", tag="a", source="hf://o/n", licence=licence)
    monkeypatch.setattr(catalogue, "CATALOGUE", {entry.name: entry})
    assert list_models(licence="permissive") == (["arch.a"] if permissive else [])


def test_a_name_knows_the_model_that_load_returns(published):
    (info,) = list_models("*.here")
    model = load(info)
    assert info.parameters == sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in published.parameters())
    assert info.input == "image 14x14 (red, green, blue)" and info.licence == "apache-2.0" and info.weights
    (stated,) = list_models("*.web")
    assert (stated.parameters, stated.input, stated.licence) == (5, "image 7x7", "cc-by-nc-4.0")
    untrained = next(name for name in list_models() if name == "elastic_vit_tiny")
    assert untrained.parameters == sum(p.numel() for p in create_model("elastic_vit_tiny").parameters())
    assert not untrained.weights and untrained.licence == "" and untrained.entry is None


def test_a_name_is_a_string():
    info = ModelInfo("elastic_vit_tiny")
    assert repr([info]) == "['elastic_vit_tiny']" and info == info.name == "elastic_vit_tiny"
    assert pickle.loads(pickle.dumps(ModelInfo("a.b", Entry(architecture="a", tag="b", source="x")))).entry.tag == "b"


def test_counting_takes_no_memory_and_no_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert ModelInfo("elastic_vit_large").parameters > 3e8
    assert torch.equal(torch.rand(2), expected)


def test_find(published):
    assert find("elastic_vit_tiny").tag == "here" and find("elastic_vit_base.web").parameters == 5
    assert find("elastic_vit_small") is None and find("elastic_vit_tiny.none") is None


def test_other_libraries_by_prefix():
    timm = pytest.importorskip("timm")
    names = list_models("timm/resnet5*")
    assert names and all(name.startswith("timm/resnet5") and timm.is_model(name.removeprefix("timm/")) for name in names)
    assert "torchvision/resnet18" in list_models("torchvision/*")
    assert "open_clip/ViT-B-32" in list_models("open_clip/ViT-B-*")
    assert not any("/" in name for name in list_models("*"))


def test_the_published_catalogue_is_sound():
    for name, entry in CATALOGUE.items():
        assert name == entry.name == f"{entry.architecture}.{entry.tag}" and entry.architecture in architectures()
        if not entry.source:
            assert entry.licence and "convert" in entry.note
        elif entry.folder is None:
            assert re.fullmatch("[0-9a-f]{64}", entry.sha256) and entry.licence and entry.bytes
        elif entry.available:
            assert verify_checkpoint(entry.folder) == [] and licence_of(entry) not in ("", "unknown")


def test_importing_the_zoo_does_not_import_torch():
    code = "import okavango.zoo.catalogue, okavango.zoo.hub, sys; print([m for m in ('torch', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": ROOT})
    assert done.stdout.strip() == "[]", done.stderr
