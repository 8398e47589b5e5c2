"""Adapters on frozen backbones, the descriptors on top, what of them is saved, and SelaVPR's checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import okavango as ok
from okavango import cli
from okavango.models import wrapped
from okavango.models.adapters import Adapted, Adapter, LocalMap, adapt, gem, sites
from okavango.models.backbone import ArgumentError, create_model
from okavango.models.features import Subnet
from okavango.zoo.checkpoint import load_checkpoint, save_checkpoint
from okavango.zoo.loading import CheckpointError
from okavango.zoo.selavpr import PUBLISHED_RESIZE, read_official, to_official

VIT = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "head_dim": 16, "layer_scale": 1.0}
ELASTIC = {"image_size": 32, "patch_size": 8, "min_width": 16, "max_width": 32, "width_step": 16, "min_depth": 1, "max_depth": 3}
ELASTIC |= {"head_dim": 16, "layer_scale": 1.0}
SWIN = {"image_size": 32, "patch_size": 2, "window": 4, "min_width": 8, "max_width": 16, "width_step": 8, "depths": (1, 1, 3, 1)}
SWIN |= {"min_depth": 2, "head_dim": 8, "mask_stride": 8}
RESNET = {"image_size": 32, "min_width": 4, "max_width": 8, "width_step": 4, "min_depths": (1, 1, 1, 1), "max_depths": (1, 2, 2, 1)}
RESNET |= {"stem_channels": 8, "out_channels": 16, "groups": 2}
SELAVPR = {"image_size": 28, "width": 32, "depth": 2, "head_dim": 16, "table_size": 42}
# backbone -> arguments, adapters behind modules, adapters beside modules
BACKBONES = {
    "vit": (VIT, 2, 2),
    "elastic_vit": (ELASTIC, 3, 3),
    "elastic_swin": (SWIN, 6, 6),
    "elastic_resnet": (RESNET, 6, 0),
    "timm/test_vit": ({"image_size": 32}, 6, 6),
    "timm/test_convnext": ({"image_size": 64}, 0, 9),
    "timm/test_efficientnet": ({"image_size": 64}, 5, 0),
    "torchvision/resnet18": ({"image_size": 64}, 8, 0),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pictures(model, count: int = 2) -> torch.Tensor:
    spec = model.preprocess.array()
    return torch.randn(count, len(spec.channels), *spec.size)


def scramble(model: Adapted) -> Adapted:
    """Give what starts at zero some weight."""
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", BACKBONES)
def test_step_zero_is_the_frozen_network_bit_for_bit(name):
    arguments, behind, beside = BACKBONES[name]
    backbone = create_model(name, **arguments).eval()
    images = pictures(backbone)
    with torch.no_grad():
        plain = backbone(image=images)
        model = adapt(backbone)
        found = model(image=images)
        assert torch.equal(plain.pooled, found.pooled)
        for ours, theirs in zip(found.maps or (), plain.maps or (), strict=True):
            assert torch.equal(ours, theirs)
        parallel = [adapter.parallel for adapter in model.adapters.values()]
        assert (parallel.count(False), parallel.count(True)) == (behind, beside)
        assert not torch.equal(scramble(model)(image=images).pooled, plain.pooled)
    model.train()
    model(image=images).pooled.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == key.startswith("backbone."), key
    assert all(float(p.grad.abs().sum()) > 0 for p in model.adapters.parameters())


def test_an_adapter_is_what_its_formula_says():
    """y + up(relu(down(y))) behind attention and MLP(x) + s * up(relu(down(x))) beside it, on timm's own block."""
    model = scramble(adapt(create_model("timm/test_vit", image_size=32), adapt={"kind": "bottleneck", "scale": 0.7}))
    block, x = model.backbone.trunk.blocks[0], torch.randn(2, 5, 64)

    def bottleneck(key, y):
        adapter = model.adapters[f"trunk-blocks-0-{key}"]
        hidden = torch.clamp(y @ adapter.down.weight.T + adapter.down.bias, min=0)
        return hidden @ adapter.up.weight.T + adapter.up.bias

    with torch.no_grad():
        attended, hidden = block.attn.forward(x), block.mlp.forward(x)  # forward itself runs no hooks
        torch.testing.assert_close(block.attn(x), attended + bottleneck("attn", attended))
        torch.testing.assert_close(block.mlp(x), hidden + 0.7 * bottleneck("mlp", x))


def test_maps_are_adapted_channel_by_channel():
    adapter = Adapter(6, 3, axis=1)
    torch.nn.init.normal_(adapter.up.weight)
    x = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(adapter(x)[:, :, 1, 2], adapter.up(F.relu(adapter.down(x[:, :, 1, 2]))))


@pytest.mark.parametrize("name", ["elastic_vit", "elastic_swin", "elastic_resnet"])
def test_subnets_of_an_adapted_supernet(name):
    model = scramble(adapt(create_model(name, **BACKBONES[name][0]), pool="gem", local=(8, 4))).eval()
    images = pictures(model)
    with torch.no_grad():
        for subnet in (min(model.list_subnets()), max(model.list_subnets())):
            sliced, alone = model(image=images, subnet=subnet), model.extract(subnet)
            assert alone.architecture == "adapted" and not hasattr(alone, "list_subnets")
            torch.testing.assert_close(alone(image=images).pooled, sliced.pooled, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(alone(image=images).tokens["image"], sliced.tokens["image"], atol=1e-5, rtol=1e-5)


def test_last_blocks_only_and_layer_ids():
    model = adapt(create_model("vit", **{**VIT, "depth": 4}), adapt={"kind": "bottleneck", "last": 1, "parallel": False})
    assert list(model.adapters) == ["trunk-blocks-3-attn"]
    ids = model.layer_ids()
    assert ids["adapters.trunk-blocks-3-attn.up.weight"] == 4 and ids["backbone.trunk.blocks.3.attn.qkv.weight"] == 4


# -- memory -----------------------------------------------------------------------------------------------------------------


def held(model: Adapted) -> list[torch.Tensor]:
    """What autograd keeps of a forward pass in training mode, but for parameters."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = pictures(model)
    own.add(images.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model.train()(image=images)
    assert features.pooled.requires_grad
    return list(kept.values())


def size(tensors) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("name", ["vit", "elastic_vit"])
def test_training_adapters_holds_no_activation_that_no_gradient_needs(name):
    def build(depth: int, **settings) -> Adapted:
        arguments = {**VIT, "depth": depth} if name == "vit" else {**ELASTIC, "max_depth": depth}
        return adapt(create_model(name, **arguments), adapt={"kind": "bottleneck", **settings}, pool="gem", local=(8, 4))

    # nothing below the first adapter is kept: the depth of the network does not matter
    assert size(held(build(2, last=1))) == size(held(build(6, last=1)))
    # above it, a frozen layer keeps no input: of an MLP's hidden activations, only what GELU starts from
    model = build(2)
    tokens = held(model)
    assert sum(tensor.shape[-1] == 4 * VIT["width"] for tensor in tokens) == 2
    whole = build(2)
    for parameter in whole.backbone.parameters():
        parameter.requires_grad_(True)
    full = held(whole)
    assert sum(tensor.shape[-1] == 4 * VIT["width"] for tensor in full) == 4
    assert size(tokens) < 0.8 * size(full)


# -- descriptors ------------------------------------------------------------------------------------------------------------


def test_poolings():
    backbone = create_model("vit", **VIT).eval()
    images = pictures(backbone)
    with torch.no_grad():
        plain = backbone(image=images)
        cells = plain.tokens["image"]
        unit = F.normalize(cells, dim=-1).clamp(min=1e-6)
        expected = {"mean": cells.mean(1), "max": cells.amax(1), "cls": plain.prefix[:, 0], "gem": (unit**3).mean(1) ** (1 / 3)}
        for pool, vector in expected.items():
            model = adapt(create_model("vit", **VIT), pool=pool)
            model.backbone.load_state_dict(backbone.state_dict())
            torch.testing.assert_close(model.eval()(image=images).pooled, F.normalize(vector, dim=-1))
    assert torch.allclose(gem(torch.full((1, 2, 3, 3), 0.7), 5.0), torch.tensor(0.7))


def test_local_map_grows_as_said():
    for sides, widths in (((4, 4), (8, 4)), ((3, 5), (8, 4)), ((1, 2), (6,)), ((2, 2), (8, 4, 2))):
        out = LocalMap(16, widths)(torch.randn(1, 16, *sides))
        assert out.shape == (1, widths[-1], *((side - 1) * 2 ** len(widths) + 1 for side in sides))


@pytest.mark.parametrize("registers", [0, 4])
def test_selavpr_features(registers):
    model = create_model("selavpr_vit_small", **SELAVPR, registers=registers)
    with torch.no_grad():
        features = model(image=torch.randn(2, 3, 28, 56), layers=(-1,))
    assert features.pooled.shape == (2, 32) and features.prefix.shape == (2, 1 + registers, 32)
    assert features.grid == {"image": (5, 13)} and features.tokens["image"].shape == (2, 65, 4)
    assert features.layers[1].grid == {"image": (2, 4)}
    for part in (features.pooled, features.tokens["image"]):
        assert torch.allclose(part.norm(dim=-1), torch.ones(part.shape[:-1]), atol=1e-5)
    with pytest.raises(ValueError, match="multiples of the patch size 14"):
        model(image=torch.randn(1, 3, 30, 28))
    with pytest.raises(ValueError, match="multiples of patch_size 14"):
        create_model("selavpr", **{**SELAVPR, "image_size": 30})


@pytest.mark.parametrize("registers", [0, 4])
def test_selavpr_starts_from_the_weights_that_timm_keeps(monkeypatch, registers):
    """At the size of the table, patch tokens are those of timm's own forward, whose class token may hold its position already."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = dict(img_size=42, patch_size=14, embed_dim=32, depth=2, num_heads=2, init_values=1.0, num_classes=0)
    theirs = VisionTransformer(**sizes, reg_tokens=registers, no_embed_class=registers > 0).eval()
    asked = []

    def create(library, name, pretrained):
        asked.append((library, name, pretrained))
        return type("Found", (), {"trunk": theirs})

    monkeypatch.setattr(wrapped, "create", create)
    monkeypatch.setattr("okavango.models.selavpr._TIMM", {(32, 2): "vit_tiny_patch14"})
    model = create_model("selavpr", **SELAVPR, registers=registers, pretrained="weights.pth")
    assert asked == [("timm", f"vit_tiny_patch14{'_reg4' if registers else ''}_dinov2", "weights.pth")]
    assert "pretrained" not in model.arguments
    images = torch.randn(1, 3, 42, 42)
    with torch.no_grad():
        tokens = model.backbone(image=images).tokens["image"]
        torch.testing.assert_close(tokens, theirs.forward_features(images)[:, 1 + registers :], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no DINOv2 of width 48"):
        create_model("selavpr", **{**SELAVPR, "width": 48}, pretrained=True)


# -- LoRA through the same switch, mistakes -----------------------------------------------------------------------------------


def test_lora_by_the_same_switch():
    backbone = create_model("vit", **VIT).eval()
    images = pictures(backbone)
    with torch.no_grad():
        plain = backbone(image=images).pooled
    model = adapt(backbone, adapt={"kind": "lora", "rank": 2, "dropout": 0.5}).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(model.trained()) and all("lora_" in name for name in trained) and len(trained) == 16
    assert any(m.training for name, m in model.named_modules() if name.endswith("lora_dropout"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image=images).pooled, plain)
    rebuilt = create_model("adapted", **model.arguments)
    rebuilt.load_state_dict(model.state_dict())
    model.requires_grad_(True)
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapt": "bottleneek"}, "did you mean 'bottleneck'"),
        ({"adapt": {"kind": "bottleneck", "ratoi": 0.5}}, "did you mean 'ratio'"),
        ({"adapt": {"kind": "none", "ratio": 0.5}}, "takes no settings"),
        ({"pool": "gme"}, "did you mean 'gem'"),
        ({"adapt": {"kind": "bottleneck", "serial": False, "parallel": False}}, "has no attention, MLP"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        adapt(create_model("vit", **VIT), **arguments)


def test_what_cannot_be():
    with pytest.raises(ArgumentError, match="lora has no effect"):
        adapt(create_model("elastic_vit", **ELASTIC), adapt="lora")
    with pytest.raises(ArgumentError, match="no class token"):
        model = adapt(create_model("elastic_resnet", **RESNET), pool="cls")
        model(image=pictures(model))
    with pytest.raises(ValueError, match="subnet"):
        model = adapt(create_model("elastic_vit", **ELASTIC))
        model(image=pictures(model), subnet=Subnet(17, 1))
    assert len(sites(create_model("elastic_vit", **ELASTIC), Subnet(16, 1))) == 2


# -- checkpoints ------------------------------------------------------------------------------------------------------------


def test_adapters_alone_in_a_checkpoint(tmp_path):
    backbone = create_model("vit", **VIT).eval()
    save_checkpoint(backbone, tmp_path / "base")
    model = scramble(adapt(ok.load(tmp_path / "base"), pool="gem", local=(8, 4))).eval()
    save_checkpoint(model, tmp_path / "whole")
    save_checkpoint(model, tmp_path / "small", base=tmp_path / "base")
    from safetensors.torch import load_file

    names = set(load_file(tmp_path / "small" / "model.safetensors"))
    assert names == {name for name, p in model.named_parameters() if p.requires_grad} == set(model.trained())
    images = pictures(model)
    with torch.no_grad():
        expected = model(image=images).pooled
        for folder in ("whole", "small"):
            assert torch.equal(ok.load(tmp_path / folder)(image=images).pooled, expected)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="base"):
        load_checkpoint(tmp_path / "small")
    loaded, _ = load_checkpoint(tmp_path / "small", base=tmp_path / "moved")
    assert torch.equal(loaded(image=images).pooled, expected)
    save_checkpoint(create_model("vit", **VIT), tmp_path / "other")
    with pytest.raises(CheckpointError, match="sha256"):
        load_checkpoint(tmp_path / "small", base=tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not that of"):
        save_checkpoint(model, tmp_path / "wrong", base=tmp_path / "other")
    with pytest.raises(CheckpointError, match="not an adapted"):
        save_checkpoint(backbone, tmp_path / "wrong", base=tmp_path / "moved")


def test_official_checkpoints(tmp_path, capsys):
    """As the published code writes them: a pickle with an optimiser and numpy's numbers, keys that start with ``module.``."""
    model = scramble(create_model("selavpr_vit_small", **SELAVPR, registers=4)).eval()
    weights = to_official(model.state_dict(), prefix="module.")
    optimiser = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
    stored = {"epoch_num": 3, "model_state_dict": weights, "optimizer_state_dict": optimiser.state_dict()}
    stored |= {"recalls": np.array([90.8, 96.4]), "best_r5": np.float64(96.4), "not_improved_num": 0}
    torch.save(stored, tmp_path / "SelaVPR_test.pth")
    read, report = read_official(tmp_path / "SelaVPR_test.pth", image_size=28, head_dim=16)
    assert len(report.matched) == len(model.state_dict()) and len(report.renamed) == len(report.matched)
    assert report.skipped == {"module.backbone.mask_token": "not used by the method"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.state_dict().items())
    assert read.preprocess.array().resize == PUBLISHED_RESIZE

    arguments = ["--family", "selavpr", "--image-size", "28", "--head-dim", "16"]
    assert cli.main(["zoo", "convert", str(tmp_path / "SelaVPR_test.pth"), "--out", str(tmp_path / "zoo"), *arguments]) == 0
    assert "not used by the method: module.backbone.mask_token" in capsys.readouterr().out
    images = pictures(model)
    with torch.no_grad():
        assert torch.equal(ok.load(tmp_path / "zoo")(image=images).pooled, model(image=images).pooled)

    torch.save({"model_state_dict": {"module.conv.weight": torch.zeros(1)}}, tmp_path / "foreign.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "SelaVPR_test.pth").read_bytes()[:1000])
    for name, message in (
        ("foreign", "no checkpoint of the published SelaVPR"),
        ("torn", "not a file of weights"),
        ("no", "no such"),
    ):
        with pytest.raises(ValueError, match=message):
            read_official(tmp_path / f"{name}.pth")
    del stored["model_state_dict"]["module.aggregation.1.p"]
    torch.save(stored, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match="pool.p"):
        read_official(tmp_path / "short.pth", image_size=28, head_dim=16)
