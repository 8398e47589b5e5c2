"""Attention, principal components and grids against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import nn

from okavango import explain
from okavango.models.backbone import create_model
from okavango.models.elastic_vit import ElasticViT
from okavango.models.features import Features, Subnet

SMALL = dict(image_size=32, patch_size=8, min_width=32, max_width=64, width_step=32, head_dim=16, min_depth=2, max_depth=3)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def library_attention(block, caught):
    """What timm's own unfused attention computes: its dropout layer sees the probabilities."""
    block.attn.fused_attn = False
    return block.attn.attn_drop.register_forward_hook(lambda _, args, __: caught.append(args[0]))


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_vit3"])
@pytest.mark.parametrize("layer", [0, -1])
def test_timm_attention_is_what_the_unfused_block_computes(name, layer):
    model, images, caught = create_model(name, image_size=32), torch.randn(2, 3, 32, 32), []
    found = explain.attention(model, images, layer=layer)
    hook = library_attention(model.trunk.blocks[layer], caught)
    with torch.no_grad():
        model(image=images)
    hook.remove()
    torch.testing.assert_close(found, caught[0])
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))


def test_lora_is_part_of_the_attention():
    model = create_model("timm/test_vit", image_size=32, lora=2)
    images = torch.randn(1, 3, 32, 32)
    before = explain.attention(model, images, layer=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(before, explain.attention(model, images, layer=0))


def test_multihead_attention_against_torch():
    model, images = create_model("torchvision/vit_b_32", image_size=64), torch.randn(1, 3, 64, 64)
    attend = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)][0]
    caught = []
    hook = attend.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    found = explain.attention(model, images, layer=0)
    hook.remove()
    with torch.no_grad():
        wanted = attend(caught[0], caught[0], caught[0], need_weights=True, average_attn_weights=False)[1]
    torch.testing.assert_close(found, wanted)


def test_elastic_subnet_equals_the_extracted_model():
    net = ElasticViT(**SMALL).eval()
    subnet, images = Subnet(32, 2), torch.randn(2, 3, 32, 32)
    sliced = explain.attention(net, images, layer=1, subnet=subnet)
    assert sliced.shape == (2, 2, 17, 17)
    torch.testing.assert_close(sliced, explain.attention(net.extract(subnet), images, layer=1), atol=1e-5, rtol=1e-5)


def test_class_maps_are_the_first_row_and_raw_pictures_are_preprocessed():
    model = create_model("timm/test_vit", image_size=(32, 48))
    raw = [np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)]
    maps, full = explain.attention(model, raw, class_maps=True), explain.attention(model, model.preprocess(image=raw)["image"])
    assert maps.shape == (1, 2, 2, 3)
    torch.testing.assert_close(maps.flatten(2), full[:, :, 0, 1:])


def test_mode_is_kept_and_no_hook_stays():
    model = create_model("timm/test_vit", image_size=32).train()
    explain.attention(model, torch.randn(1, 3, 32, 32))
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_models_without_attention_or_class_token_are_refused():
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(explain.ExplainError, match="vision transformer"):
        explain.attention(create_model("timm/test_resnet"), images)
    with pytest.raises(explain.ExplainError, match="no plain self-attention"):
        explain.attention(create_model("timm/test_vit_relpos", image_size=64), images)
    with pytest.raises(ValueError, match="blocks 0..5"):
        explain.attention(create_model("timm/test_vit", image_size=64), images, layer=6)
    with pytest.raises(explain.ExplainError, match="no subnets"):
        explain.attention(create_model("timm/test_vit", image_size=64), images, subnet=Subnet(1, 1))


def planted(batch=3, side=6, channels=8):
    """Features whose first component is a left-right ramp, the second up-down, the third by sample; weaker in that order."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    basis = torch.linalg.qr(torch.randn(channels, channels))[0]
    tokens = 9 * x[None, ..., None] * basis[0] + 4 * y[None, ..., None] * basis[1]
    tokens = tokens + torch.arange(-1.0, batch - 1)[:, None, None, None] * basis[2]
    return Features(tokens={"image": tokens.flatten(1, 2)}, grid={"image": (side, side)}), basis


def test_pca_finds_planted_components_in_order():
    features, _ = planted()
    found = explain.pca(features, percentiles=(0, 100)).double()
    assert found.dtype == torch.float64 and found.shape == (3, 6, 6, 3)
    ramp = torch.linspace(0, 255, 6, dtype=torch.float64).round()
    for channel, wanted in ((0, ramp.expand(3, 6, 6)), (1, ramp[:, None].expand(3, 6, 6))):
        worst = min((found[..., channel] - sign).abs().max() for sign in (wanted, 255 - wanted))
        assert worst <= 1
    assert found[..., 2].flatten(1).std(1).max() < 1  # constant in a sample, up to rounding
    assert sorted(found[:, 0, 0, 2].tolist()) in ([0.0, 127.0, 255.0], [0.0, 128.0, 255.0])


def test_pca_sign_does_not_depend_on_the_solver():
    features, _ = planted()
    order = torch.randperm(8)
    shuffled = Features(tokens={"image": features.tokens["image"][..., order]}, grid=features.grid)
    assert torch.equal(explain.pca(features), explain.pca(shuffled))


def test_pca_foreground_blackens_the_low_side():
    features, _ = planted()
    plain, cut = explain.pca(features), explain.pca(features, foreground=0.5)
    black = (cut == 0).all(-1)
    low = plain[..., 0] < 127
    assert black[low].all() and black[~low].float().mean() < 0.1  # the darkest corner of the colours is black too
    with pytest.raises(explain.ExplainError, match="lower the threshold"):
        explain.pca(features, foreground=1.5)


@pytest.mark.parametrize("name, shape", [("timm/test_vit", (2, 4, 4, 3)), ("timm/test_resnet", (2, 2, 2, 3))])
def test_pca_of_models_and_layers(name, shape):
    model, images = create_model(name, image_size=64), torch.randn(2, 3, 64, 64)
    found = explain.pca(model, images)
    assert found.shape == shape and found.dtype == torch.uint8
    assert torch.equal(found, explain.pca(model, images))
    last = model.feature_info.layers - 1
    assert torch.equal(explain.pca(model, images, layer=-1), explain.pca(model(image=images, layers=(last,)), layer=last))
    with pytest.raises(explain.ExplainError, match="ask for it"):
        explain.pca(model(image=images), layer=0)


def test_pca_needs_patches():
    with pytest.raises(explain.ExplainError, match="neither tokens nor maps"):
        explain.pca(Features(pooled=torch.zeros(1, 8)))


def test_pictures_undo_the_preprocess():
    model = create_model("timm/test_vit", image_size=32)
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    spec = model.preprocess["image"]
    assert spec.resize.rule == "shortest"
    batch = model.preprocess.replace("image", resize=type(spec.resize)(rule="none"))(image=raw)["image"]
    assert torch.equal(explain.pictures(model, batch), raw.permute(0, 2, 3, 1))


def test_grid_holds_every_cell_where_it_belongs(tmp_path):
    red = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    red[..., 0] = 255
    ramp = torch.arange(16.0).view(1, 4, 4).expand(2, -1, -1)
    path = explain.save_grid(tmp_path / "new" / "grid.png", {"input": red, "a very long label indeed": ramp}, side=64)
    pixels = np.asarray(Pillow.open(path))
    assert pixels.shape == (18 + 2 * 70, 6 + 2 * 70, 3)
    assert (pixels[18 : 18 + 64, 6 : 6 + 64] == (255, 0, 0)).all()
    cell = pixels[18 : 18 + 64, 76 : 76 + 64]
    assert (cell[:16, :16] == (9, 7, 40)).all() and (cell[-16:, -16:] == (252, 253, 191)).all()
    assert pixels[:18].min() < 100  # labels are drawn


def test_grid_refuses_what_it_cannot_draw(tmp_path):
    good = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    for columns in ({}, {"a": good, "b": good[:1]}, {"a": good.float()}, {"a": good[..., :2]}):
        with pytest.raises(explain.ExplainError):
            explain.save_grid(tmp_path / "x.png", columns)
    with pytest.raises(explain.ExplainError, match="png"):
        explain.save_grid(tmp_path / "x.jpg", {"a": good})


# -- windows ----------------------------------------------------------------------------------------------------------------


def swin(seed=0):
    net = create_model("elastic_swin_tiny").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias_table"):  # which all begin at 0 or 1
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def caught_input(block, model, images):
    """What goes into a block."""
    found = []
    hook = block.register_forward_pre_hook(lambda _, args: found.append(args))
    with torch.no_grad():
        model(image=images)
    hook.remove()
    return found[0]


def mixed(weights, normed, attn, heads):
    """The output of an attention from its probabilities over the map; what is left of each row falls on padding."""
    width = normed.shape[-1]
    value = attn.qkv(normed).flatten(1, 2)[..., 2 * width :].unflatten(-1, (heads, -1))
    padding = attn.qkv.bias[2 * width :].view(heads, -1)
    rest = (1 - weights.sum(-1)).transpose(1, 2)[..., None]
    out = torch.einsum("bhnm,bmhd->bnhd", weights, value) + rest * padding
    return attn.proj(out.flatten(2)).view_as(normed)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("layer", [0, 1, 3, -1])  # plain and shifted windows, and maps that fill none
def test_swin_attention_mixes_the_values(size, layer):
    net, images = swin(), torch.randn(2, 3, *size)
    block = net.blocks[layer]
    x, visible = caught_input(block, net, images)
    weights = explain.attention(net, images, layer=layer)
    cells = x.shape[1] * x.shape[2]
    assert weights.shape == (2, block.attn.qkv.in_features // net.head_dim, cells, cells)
    assert (weights.sum(-1) <= 1 + 1e-6).all()
    with torch.no_grad():
        normed = block.norm1(x)
        torch.testing.assert_close(mixed(weights, normed, block.attn, weights.shape[1]), block._attend(normed, visible))
    if not any(side % block.window for side in x.shape[1:3]):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_swin_subnet_equals_the_extracted_model():
    net, images = swin(), torch.randn(1, 3, 32, 32)
    subnet = net.list_subnets()[0]
    sliced = explain.attention(net, images, layer=2, subnet=subnet)
    torch.testing.assert_close(sliced, explain.attention(net.extract(subnet), images, layer=2), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="this network has blocks"):
        explain.attention(net, images, layer=sum(subnet.depth), subnet=subnet)
    assert not any(block._forward_pre_hooks for block in net.blocks)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_timm_swin_attention_mixes_the_values(layer):
    model = create_model("timm/swin_tiny_patch4_window7_224", image_size=64)
    images = torch.randn(1, 3, 64, 64)
    blocks = [block for stage in model.trunk.layers for block in stage.blocks]
    (x,) = caught_input(blocks[layer], model, images)
    weights = explain.attention(model, images, layer=layer)
    with torch.no_grad():
        normed = blocks[layer].norm1(x)
        expected = blocks[layer]._attn(normed)
        torch.testing.assert_close(mixed(weights, normed, blocks[layer].attn, weights.shape[1]), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(explain.ExplainError, match="no subnets"):
        explain.attention(model, images, subnet=Subnet(1, 1))


def test_without_a_class_token_maps_are_the_mean_over_the_cells():
    net, images = swin(), torch.randn(2, 3, 24, 40)
    full, maps = explain.attention(net, images, layer=0), explain.attention(net, images, layer=0, class_maps=True)
    assert maps.shape == (2, full.shape[1], 12, 20)
    torch.testing.assert_close(maps.flatten(2), full.mean(2))
    assert explain.attention(net, images, class_maps=True).shape[2:] == (2, 3)
