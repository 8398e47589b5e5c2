"""Graphs for other runtimes compute what the backbone computes."""

from __future__ import annotations

import json
import sys

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from okavango.models.backbone import Backbone, FeatureInfo
from okavango.models.features import Features, Subnet, TextBatch
from okavango.models.preprocess import Image, Preprocess, Text
from okavango.zoo import export
from okavango.zoo.export import ExportError, export_onnx, export_program


class Pair(Backbone):
    """A convolution and an embedding; the subnet's width slices the linear layer."""

    def __init__(self):
        super().__init__()
        self.architecture, self.arguments = "pair_for_tests", {}
        self.preprocess = Preprocess(image=Image(size=(8, 8)), text=Text(tokenizer="hf/none", vocabulary=13, length=5))
        self.feature_info = FeatureInfo(6, 0, (), ())
        self.conv, self.table, self.fc = nn.Conv2d(3, 6, 4, 4), nn.Embedding(13, 6), nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()):
        width = subnet.width if subnet else 6
        a_map = self.conv(inputs["image"])
        words = (self.table(inputs["text"].ids) * inputs["text"].mask[..., None]).mean(1)
        pooled = self.dropout(nn.functional.linear(a_map.flatten(2).mean(-1) + words, self.fc.weight[:width]))
        return Features(pooled=pooled, tokens={"image": a_map.flatten(2).transpose(1, 2)}, maps=(a_map,), strides=(4,))


class FixedBatch(Pair):
    def forward(self, inputs, **controls):
        out = super().forward(inputs, **controls)
        return Features(pooled=out.pooled + torch.zeros(1, 1).expand(len(out.pooled), 1))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return Pair()


def inputs(batch):
    generator = torch.Generator().manual_seed(batch)
    image = torch.randn(batch, 3, 8, 8, generator=generator)
    ids = torch.randint(0, 13, (batch, 5), generator=generator)
    mask = torch.rand(batch, 5, generator=generator) > 0.3
    return image, ids, mask


def reference(model, batch, subnet=None):
    image, ids, mask = inputs(batch)
    with torch.inference_mode():
        return model.eval()(image=image, text=TextBatch(ids, mask), subnet=subnet)


def test_a_program_takes_any_batch_and_names_its_outputs(tmp_path, pair):
    path = export_program(pair.train(), tmp_path / "pair.pt2")
    assert pair.training
    extra = {"preprocess.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    for batch in (1, 2, 5):
        image, ids, mask = inputs(batch)
        found = program(image=image, text_ids=ids, text_mask=mask)
        wanted = reference(pair, batch)
        assert set(found) == {"pooled", "tokens_image", "map_4"}
        torch.testing.assert_close(found["pooled"], wanted.pooled)
        torch.testing.assert_close(found["map_4"], wanted.maps[0])
    with pytest.raises(AssertionError, match="text_ids"):
        program(image=image, text_ids=ids[:2], text_mask=mask)
    assert Preprocess.from_json(json.loads(extra["preprocess.json"])) == pair.preprocess


def test_onnx_computes_the_same(tmp_path, pair):
    path = export_onnx(pair, tmp_path / "deep" / "pair.onnx")
    assert [p.name for p in path.parent.iterdir()] == ["pair.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image", "text_ids", "text_mask"]
    assert [o.name for o in session.get_outputs()] == ["pooled", "tokens_image", "map_4"]
    for batch in (1, 4):
        image, ids, mask = inputs(batch)
        pooled, tokens, a_map = session.run(None, {"image": image.numpy(), "text_ids": ids.numpy(), "text_mask": mask.numpy()})
        wanted = reference(pair, batch)
        assert abs(pooled - wanted.pooled.numpy()).max() < 1e-5 and abs(a_map - wanted.maps[0].numpy()).max() < 1e-5
        assert tokens.shape == (batch, 4, 6)
    stored = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert Preprocess.from_json(json.loads(stored["okavango.preprocess"])) == pair.preprocess


def test_a_subnet_and_a_fixed_batch(tmp_path, pair):
    path = export_onnx(pair, tmp_path / "small.onnx", subnet=Subnet(2, 1), batch=2)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape == [2, 2]
    image, ids, mask = inputs(2)
    pooled = session.run(["pooled"], {"image": image.numpy(), "text_ids": ids.numpy(), "text_mask": mask.numpy()})[0]
    assert abs(pooled - reference(pair, 2, Subnet(2, 1)).pooled.numpy()).max() < 1e-5
    program = torch.export.load(export_program(pair, tmp_path / "small.pt2", subnet="w3_d1", batch=1)).module()
    image, ids, mask = inputs(1)
    assert program(image=image, text_ids=ids, text_mask=mask)["pooled"].shape == (1, 3)


def test_half_precision_and_other_devices_are_exported_in_float32(tmp_path, pair):
    export_onnx(pair.half(), tmp_path / "half.onnx")
    assert pair.fc.weight.dtype == torch.float16


def test_a_wrong_graph_is_refused_and_an_older_file_stays(tmp_path, pair, monkeypatch):
    path = tmp_path / "pair.onnx"
    path.write_bytes(b"older")
    real = onnxruntime.InferenceSession.run

    def slightly_off(self, *args, **kwargs):
        return [output + 2e-4 for output in real(self, *args, **kwargs)]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", slightly_off)
    with pytest.raises(ExportError, match="'pooled' differs from torch by 0.0002"):
        export_onnx(pair, path)
    assert path.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


def test_not_a_number_is_a_difference(pair):
    class Broken:
        def run(self, names, feed):
            return [torch.full((1, 6), float("nan")).numpy()]

    with pytest.raises(ExportError, match="differs from torch by nan"):
        export._compare(Broken(), export._Plain(pair.eval(), None), export._example(pair, 1), ["pooled"])


def test_what_cannot_be_exported(tmp_path, pair, monkeypatch):
    with pytest.raises(ExportError, match="must end in .onnx"):
        export_onnx(pair, tmp_path / "pair.pt2")
    with pytest.raises(ExportError, match="batch 0"):
        export_program(pair, tmp_path / "pair.pt2", batch=0)
    with pytest.raises(ValueError, match="expected the form"):
        export_program(pair, tmp_path / "pair.pt2", subnet="small")
    with pytest.raises(ExportError, match="FixedBatch cannot be traced: its forward fixes the batch size"):
        export_program(FixedBatch(), tmp_path / "pair.pt2")
    assert list(tmp_path.iterdir()) == []
    for missing in ("onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(ExportError, match=rf"needs {missing}: pip install okavango\[export\]"):
                export_onnx(pair, tmp_path / "pair.onnx")


def test_large_weights_go_to_a_second_file(tmp_path, pair, monkeypatch):
    monkeypatch.setattr(export, "ONE_FILE", 10)
    path = export_onnx(pair, tmp_path / "pair.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pair.onnx", "pair.onnx.data"]
    onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
