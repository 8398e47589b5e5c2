"""Networks of MONAI bundles as backbones: from our own export and from ones made by hand; nothing of a bundle is run."""

from __future__ import annotations

import json

import pytest
import torch
from monai.networks.nets import SegResNet, UNet
from safetensors.torch import save_file
from torch import nn

from okavango.cli import main
from okavango.downstream.segmentation.bundle import export_bundle
from okavango.downstream.segmentation.head import Segmenter
from okavango.models.backbone import create_model
from okavango.zoo.checkpoint import load_checkpoint, save_checkpoint
from okavango.zoo.loading import CheckpointError
from okavango.zoo.monai_bundle import read_bundle

SEGRESNET = {
    "_target_": "SegResNet",
    "init_filters": 8,
    "in_channels": 2,
    "out_channels": 3,
    "blocks_down": [1, 1],
    "blocks_up": [1],
}
UNET = {
    "_target_": "monai.networks.nets.UNet",
    "spatial_dims": 3,
    "in_channels": 2,
    "out_channels": 3,
    "channels": [4, 8, 16],
    "strides": [2, 2],
    "num_res_units": 1,
}


def make(folder, definition, network=None, channels=("T1c", "FLAIR"), **config):
    """A bundle by hand; weights are those of the network, if there is one."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    inputs = {"image": {"channel_def": {str(i): name for i, name in enumerate(channels)}, "spatial_shape": ["8*n"] * 3}}
    (folder / "configs" / "metadata.json").write_text(json.dumps({"network_data_format": {"inputs": inputs}}))
    whole = {**({"network_def": definition} if definition else {}), "inferer": {"roi_size": [16, 16, 16]}, **config}
    (folder / "configs" / "train.json").write_text(json.dumps(whole))
    if network is not None:
        torch.save(network.state_dict(), folder / "models" / "model.pt")
    return folder


def built(kind, definition):
    torch.manual_seed(0)
    return kind(**{key: value for key, value in definition.items() if key != "_target_"}).eval()


def volumes(batch=1, side=16):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(batch, 1, side, side, side, generator=generator) for name in ("t1ce", "flair")}


def test_segresnet_gives_what_goes_into_its_last_convolution(tmp_path):
    network = built(SegResNet, SEGRESNET)
    steps = [{"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"}, {"_target_": "Spacingd", "pixdim": [1.0, 1.0, 2.0]}]
    steps.append({"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": False})
    definition = {**SEGRESNET, "init_filters": "@filters"}
    folder = make(tmp_path / "b", definition, network, filters=8, preprocessing={"_target_": "Compose", "transforms": steps})
    model, report = read_bundle(folder)
    assert model.modalities == ("t1ce", "flair") and model.feature_info.channels == 8 and not model.training
    assert [name for name in report.skipped] == ["conv_final.2.conv.weight", "conv_final.2.conv.bias"] and not report.missing
    spec = model.preprocess["t1ce"]
    assert (spec.size, spec.spacing, spec.orientation) == ((16, 16, 16), (1.0, 1.0, 2.0), "RAS")
    assert spec.normalise.rule == "zscore" and not spec.normalise.origin
    given = volumes()
    with torch.no_grad():
        features = model(given).maps[0]
        logits = network(torch.cat([given["t1ce"], given["flair"]], 1))
        torch.testing.assert_close(network.conv_final[2](features), logits)
        assert model({"flair": volumes(side=13)["flair"]}).maps[0].shape == (1, 8, 13, 13, 13)


def test_a_network_that_ends_in_no_convolution_gives_its_classes(tmp_path):
    network = built(UNet, UNET)
    folder = make(tmp_path / "b", UNET)
    save_file(network.state_dict(), folder / "models" / "model.safetensors")
    model, report = read_bundle(folder)
    given = volumes()
    with torch.no_grad():
        torch.testing.assert_close(model(given).maps[0], network(torch.cat([given["t1ce"], given["flair"]], 1)))
    assert model.feature_info.channels == 3 and model.multiple == 4 and not report.skipped
    assert model.preprocess["flair"].normalise.origin.startswith("assumed")


def test_of_our_own_export(tmp_path):
    sizes = {"modalities": ("t1", "flair"), "size": 16, "patch_size": 4, "width": 24, "depth": 3, "heads": 2, "mlp": 32}
    torch.manual_seed(0)
    segmenter = Segmenter(create_model("bm_mae_tiny", **sizes, spacing=(1.0, 1.0, 1.0), orientation="RAS"), feature_size=4).eval()
    model, report = read_bundle(export_bundle(segmenter, tmp_path / "bundle"))
    given = {"t1": volumes()["t1ce"], "flair": volumes()["flair"]}
    with torch.no_grad():
        torch.testing.assert_close(segmenter.decoder["out"](model(given).maps[0]), segmenter.logits(given))
    assert set(report.skipped) == {"decoder.out.conv.conv.weight", "decoder.out.conv.conv.bias"} and len(report.renamed) > 50
    assert model.preprocess["t1"].orientation == "RAS" and model.preprocess["t1"].normalise.rule == "zscore_nonzero"


def test_fine_tuning_goes_on_from_a_converted_bundle(tmp_path, capsys):
    folder = make(tmp_path / "b", SEGRESNET, built(SegResNet, SEGRESNET), channels=("t1", "flair"))
    assert main(["zoo", "convert", str(folder), "--family", "monai_bundle", "--out", str(tmp_path / "m")]) == 0
    assert "2 skipped, the last layer" in capsys.readouterr().out
    found, _ = load_checkpoint(tmp_path / "m")
    assert found.architecture == "monai/bundle" and torch.equal(
        found(volumes2()).maps[0], read_bundle(folder)[0](volumes2()).maps[0]
    )
    torch.manual_seed(0)
    head = Segmenter(found).train()
    batch = {**volumes2(), "present": torch.ones(1, 2, dtype=torch.bool), "seg": torch.rand(1, 3, 16, 16, 16) < 0.2}
    losses = []
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for step in range(4):
        loss = head(batch, step)["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    heads = {Segmenter.entry: lambda backbone, arguments: Segmenter(backbone, **arguments)}
    save_checkpoint(head, tmp_path / "s", kind="head", head=head.head_config(), backbone_prefix="backbone.")
    again, _ = load_checkpoint(tmp_path / "s", heads=heads)
    assert torch.equal(again.predict(volumes2()), head.predict(volumes2()))


def volumes2():
    return {"t1": volumes()["t1ce"], "flair": volumes()["flair"]}


@pytest.mark.parametrize(
    "definition, message",
    [
        (None, "has no network_def"),
        ({"spatial_dims": 3}, "names no class"),
        ({**SEGRESNET, "in_channels": "$__import__('os').getpid()"}, "an expression; code of a bundle is not run"),
        ({**SEGRESNET, "in_channels": "@nothing"}, "refers to '@nothing', which is not there"),
        ({"_target_": "scripts.networks.Mine"}, "'scripts.networks.Mine', which is no network of MONAI"),
        ({"_target_": "os.system", "command": "true"}, "'os.system', which is no network of MONAI"),
        ({"_target_": "NoSuchNet"}, "'unknown.NoSuchNet', which is no network of MONAI"),
        ({**SEGRESNET, "filter": 3}, "unexpected keyword argument 'filter'"),
        ({**UNET, "spatial_dims": 2}, "no map of full size of 2 volumes"),
        ({**SEGRESNET, "in_channels": 4}, "no map of full size of 2 volumes"),
    ],
)
def test_bundles_that_are_refused(definition, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_bundle(make(tmp_path / "b", definition, nn.Linear(1, 1)))


def test_weights_that_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no bundle of MONAI"):
        read_bundle(tmp_path)
    folder = make(tmp_path / "b", SEGRESNET)
    with pytest.raises(CheckpointError, match=r"no model.safetensors or model.pt; download"):
        read_bundle(folder)
    (folder / "models" / "model.ts").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model.ts is TorchScript, which is a program"):
        read_bundle(folder)
    path = folder / "models" / "model.pt"
    torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)).save(str(path))
    with pytest.raises(CheckpointError, match="is TorchScript, a program, and is not run"):
        read_bundle(folder)
    torch.save(nn.Linear(1, 1), path)
    with pytest.raises(CheckpointError, match="not a file of weights"):
        read_bundle(folder)
    torch.save({"model": built(SegResNet, SEGRESNET).state_dict(), "epoch": 3}, path)
    assert read_bundle(folder)[0].feature_info.channels == 8
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="missing"):
        read_bundle(folder)
    (folder / "configs" / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="does not tell the channels"):
        read_bundle(folder)
