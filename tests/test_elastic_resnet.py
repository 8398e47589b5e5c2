"""The elastic ResNet against a slow network written from the paper's formulas, and its stand-alone subnets against itself."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from okavango.models.backbone import create_model
from okavango.models.elastic_resnet import ElasticResNet, convolve, group_norm
from okavango.models.features import Subnet
from okavango.zoo.poa import from_official, read_official, to_official

torch.set_num_threads(1)

TINY = dict(
    image_size=32,
    min_width=4,
    max_width=8,
    width_step=2,
    min_depths=(1, 1, 2, 1),
    max_depths=(1, 2, 3, 1),
    stem_channels=6,
    out_channels=16,
    groups=2,
    mask_stride=8,
)


def build(seed: int = 0, **changes) -> ElasticResNet:
    """A tiny network in eval mode whose parameters are all random and large, so that no bias, scale or slice can be forgotten."""
    net = ElasticResNet(**{**TINY, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            spread = 0.3 if parameter.ndim == 1 or parameter is net.mask_token else parameter[0].numel() ** -0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight += 1
    return net.eval()


SHARED = build()  # for tests that only look


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- an independent reference ------------------------------------------------------------------------------------------------


def patches(x: Tensor, kernel: int, stride: int, border: float) -> tuple[Tensor, int, int]:
    """Windows of a map (C, H, W) as columns (C, kernel * kernel, cells), and how many there are along both sides."""
    pad = kernel // 2
    x = F.pad(x, (pad, pad, pad, pad), value=border)
    windows = x.unfold(1, kernel, stride).unfold(2, kernel, stride)
    return windows.flatten(3).permute(0, 3, 1, 2).flatten(2), windows.shape[1], windows.shape[2]


def convolved(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Eq. 2 and 3: the inputs are scaled by full width / active width; the rows of `weight` are chosen before."""
    active, full = x.shape[0], weight.shape[1]
    columns, height, width = patches(x * (full / active), weight.shape[-1], stride, 0.0)
    return (weight[:, :active].flatten(1) @ columns.flatten(0, 1)).view(-1, height, width)


def normed(x: Tensor, scale: Tensor, shift: Tensor, groups: int) -> Tensor:
    parts = []
    for part in x.chunk(groups):
        centred = part - part.mean()
        parts.append(centred / (centred.square().mean() + 1e-5).sqrt())
    return torch.cat(parts) * scale[: len(x), None, None] + shift[: len(x), None, None]


def reference(net: ElasticResNet, images: Tensor, subnet: Subnet, mask: Tensor | None = None) -> list[Tensor]:
    """The maps of the four stages, in float64, picture by picture."""
    p = {name: value.detach().double() for name, value in net.state_dict().items()}
    groups, full = net.arguments["groups"], net.arguments["max_depths"]

    def norm(x: Tensor, name: str) -> Tensor:
        return normed(x, p[f"{name}.weight"], p[f"{name}.bias"], groups)

    out: list[list[Tensor]] = [[] for _ in range(4)]
    for n, image in enumerate(images.double()):
        x = norm(convolved(image, p["conv1.weight"], 2), "norm1").clamp_min(0)
        windows, height, width = patches(x, 3, 2, -math.inf)
        x = windows.amax(1).view(-1, height, width)
        if mask is not None:
            across = image.shape[2] // net.mask_stride
            for row, column in product(range(height), range(width)):
                cell = row * 4 // net.mask_stride * across + column * 4 // net.mask_stride
                if mask[n, cell]:
                    x[:, row, column] = p["mask_token"][0, :, 0, 0]
        for stage, depth in enumerate(subnet.depth):
            inner = subnet.width * 2**stage
            for position in range(depth):
                index = math.floor(position * (full[stage] - 1) / max(1, depth - 1))
                block, stride = f"layer{stage + 1}.{index}", 2 if stage and position == 0 else 1
                y = norm(convolved(x, p[f"{block}.conv1.weight"][:inner], 1), f"{block}.norm1").clamp_min(0)
                y = norm(convolved(y, p[f"{block}.conv2.weight"][:inner], stride), f"{block}.norm2").clamp_min(0)
                y = norm(convolved(y, p[f"{block}.conv3.weight"], 1), f"{block}.norm3")
                if position == 0:
                    x = convolved(x, p[f"{block}.downsample.0.weight"], stride)
                    x = norm(x, f"{block}.downsample.1")
                x = (x + y).clamp_min(0)
            out[stage].append(x)
    return [torch.stack(stage) for stage in out]


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_every_subnet_equals_the_reference(size):
    net, images = build(), pixels(2, 3, *size)
    mask = torch.zeros(2, size[0] // 8 * (size[1] // 8), dtype=torch.bool)
    mask[0, [1, 5, 8]] = True
    for subnet in net.list_subnets():
        with torch.no_grad():
            features = net(image=images, subnet=subnet)
            hidden = net(image=images, subnet=subnet, token_mask={"image": mask})
        for found, token_mask in ((features, None), (hidden, mask)):
            maps = reference(net, images, subnet, token_mask)
            for ours, theirs in zip(found.maps, maps, strict=True):
                torch.testing.assert_close(ours.double(), theirs, atol=5e-5, rtol=0)
            torch.testing.assert_close(found.pooled.double(), maps[-1].mean((2, 3)), atol=5e-5, rtol=0)
            torch.testing.assert_close(found.tokens["image"].double(), maps[-1].flatten(2).mT, atol=5e-5, rtol=0)
            assert found.grid == {"image": tuple(maps[-1].shape[2:])} and found.strides == (4, 8, 16, 32) and found.prefix is None
        assert torch.equal(features.pooled[1], hidden.pooled[1]) and not torch.equal(features.pooled[0], hidden.pooled[0])


def test_the_intact_network_is_the_largest_subnet():
    net, images = SHARED, pixels(2, 3, 32, 32)
    assert net.intact == Subnet(8, (1, 2, 3, 1)) == net.list_subnets()[-1] == max(net.list_subnets())
    assert torch.equal(net(image=images).pooled, net(image=images, subnet=net.intact).pooled)


# -- tables ------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.tuples(*[st.tuples(st.integers(1, 3), st.integers(0, 2))] * 4), st.floats(1, 4))
@settings(max_examples=40, deadline=None)
def test_multiplicities_of_the_pool(widths, ranges, scale):
    low, high = [a for a, _ in ranges], [a + b for a, b in ranges]
    with torch.device("meta"):
        net = ElasticResNet(**{**TINY, "min_width": 2, "max_width": 2 * widths, "min_depths": low, "max_depths": high})
    pool = net.sampling_pool(scale)
    depths = sorted(product(*(range(a, b + 1) for a, b in zip(low, high, strict=True))), key=lambda depth: (sum(depth), depth))
    for i, depth in enumerate(depths):
        weight = scale + (1 - scale) * i / max(1, len(depths) - 1)
        counts = {pool.count(Subnet(width, depth)) for width in net.widths}
        assert len(counts) == 1 and (counts == {round(weight)} or abs(abs(weight - math.floor(weight)) - 0.5) < 1e-9)
    assert pool[-1] == net.intact and set(pool) == set(net.list_subnets())
    if len(depths) > 1:
        assert pool.count(net.intact) == 1


def test_the_published_pool_has_699_entries():
    with torch.device("meta"):
        net = create_model("elastic_resnet_152")
    pool = net.sampling_pool()
    assert (len(pool), len(set(pool)), len(net.list_subnets())) == (699, 465, 465)
    # timm's resnet50 and resnet152 without their classifiers; batch norm and group norm have equally many parameters
    assert net.count_parameters(Subnet(64, (3, 4, 6, 3))) == 23_508_032
    assert net.count_parameters(Subnet(64, (3, 8, 36, 3))) == 58_143_808


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"min_width": 0}, "widths 0..8"),
        ({"min_width": 10}, "widths 10..8"),
        ({"width_step": 0}, "by 0"),
        ({"width_step": 3}, "in whole steps"),
        ({"min_width": 3, "max_width": 9}, "groups 2: must divide"),
        ({"stem_channels": 7}, "groups 2: must divide"),
        ({"groups": 0}, "groups 0"),
        ({"out_channels": 18}, "out_channels 18: must be a multiple of 4"),
        ({"min_depths": (1, 1, 2)}, "at least one block in each of four stages"),
        ({"max_depths": (1, 2, 3, 1, 1)}, "for each of four stages"),
        ({"min_depths": (1, 1, 0, 1)}, "at least one block in each of four stages"),
        ({"min_depths": (1, 3, 2, 1)}, "min_depths <= max_depths"),
        ({"mask_stride": 6}, "mask_stride 6: must be a multiple of 4"),
        ({"mask_stride": 0}, "mask_stride 0"),
    ],
)
def test_sizes_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ElasticResNet(**{**TINY, **changes})


def test_sizes_that_a_plain_network_refuses():
    for changes in ({"width": 48}, {"stem_channels": 63}, {"groups": 0}, {"out_channels": 250}, {"depths": (3, 4, 6)}):
        with pytest.raises(ValueError, match="groups|out_channels|depths"):
            create_model("resnet", **changes)


def test_requests_that_are_refused():
    net, images = SHARED, pixels(1, 3, 32, 32)
    for subnet in (Subnet(5, (1, 1, 2, 1)), Subnet(4, (1, 1, 1, 1)), Subnet(4, 2), Subnet(4, (1, 1, 2))):
        with pytest.raises(ValueError, match=r"widths are 4, 6, 8 and depths 1-1-2-1..1-2-3-1"):
            net(image=images, subnet=subnet)
        with pytest.raises(ValueError, match="widths are"):
            net.extract(subnet)
    with pytest.raises(ValueError, match="layer 5: this network has blocks 0..4"):
        net(image=images, subnet=Subnet(4, (1, 1, 2, 1)), layers=(5,))
    with pytest.raises(ValueError, match="28x32 pixels: with a mask both sides must be multiples of the mask stride 8"):
        net(image=pixels(1, 3, 28, 32), token_mask={"image": torch.zeros(1, 12, dtype=torch.bool)})
    plain = net.extract(Subnet(4, (1, 1, 2, 1)))
    with pytest.raises(ValueError, match="no subnets and no mask token"):
        plain(image=images, subnet=Subnet(4, (1, 1, 2, 1)))


# -- slices ------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_slice_of_a_convolution(inputs, out, kernel, stride, seed):
    conv, x = nn.Conv2d(5, 6, kernel, stride, kernel // 2, bias=False), pixels(2, inputs, 7, 6, seed=seed)
    expected = torch.stack([convolved(image, conv.weight[:out].double(), stride) for image in x.double()])
    torch.testing.assert_close(convolve(x, conv, out).double(), expected, atol=1e-5, rtol=0)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_narrowed_norm_has_as_many_groups(groups, size, seed):
    norm, x = nn.GroupNorm(groups, 4 * groups), pixels(2, groups * size, 3, 2, seed=seed)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    expected = torch.stack([normed(image, norm.weight.double(), norm.bias.double(), groups) for image in x.double()])
    torch.testing.assert_close(group_norm(x, norm).double(), expected, atol=1e-5, rtol=1e-5)


def test_the_full_width_is_the_plain_layer_bit_for_bit():
    conv, norm, x = nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.GroupNorm(2, 4), pixels(2, 4, 9, 7)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    assert torch.equal(convolve(x, conv, 6), conv(x)) and torch.equal(group_norm(x, norm), norm(x))


def test_without_the_scale_a_slice_is_the_plain_convolution_of_its_weights():
    conv, x = nn.Conv2d(5, 6, 3, 2, 1, bias=False), pixels(2, 3, 7, 6)
    torch.testing.assert_close(convolve(x, conv, 4, rescale=False), F.conv2d(x, conv.weight[:4, :3], None, 2, 1))


def test_without_the_scale():
    # Norms undo the scale but for their epsilon, which is therefore made large here.
    def large_epsilon(net: ElasticResNet) -> ElasticResNet:
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = 1.0
        return net

    scaled, net, images = large_epsilon(build()), large_epsilon(build(rescale=False)), pixels(2, 3, 32, 32)
    assert "rescale" not in scaled.arguments and net.arguments == scaled.arguments | {"rescale": False}
    assert build(**net.arguments).rescale is False
    for subnet in net.list_subnets()[::3]:
        with torch.no_grad():
            ours, theirs = net(image=images, subnet=subnet), scaled(image=images, subnet=subnet)
            alone = large_epsilon(net.extract(subnet))(image=images)
        for a, b in zip(ours.maps, alone.maps, strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
        if subnet.width == net.widths[-1]:
            assert torch.equal(ours.pooled, theirs.pooled)
        else:
            assert (ours.pooled - theirs.pooled).abs().max() > 0.01
    # The scale multiplied into the second and third convolution of all blocks does the same: it is of these and no others.
    heavier, subnet = large_epsilon(build(rescale=False)), Subnet(6, (1, 2, 2, 1))
    with torch.no_grad():
        for name, parameter in heavier.named_parameters():
            if name.endswith(("conv2.weight", "conv3.weight")):
                parameter *= 8 / 6
        ours, theirs = heavier(image=images, subnet=subnet), scaled(image=images, subnet=subnet)
    for a, b in zip(ours.maps, theirs.maps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_active_slice_only():
    net = build()
    net(image=pixels(2, 3, 32, 32), subnet=Subnet(4, (1, 2, 2, 1))).pooled.square().sum().backward()
    assert net.layer3[1].conv1.weight.grad is None  # of three blocks, two keep the first and the last
    block = net.layer3[2]  # 16 of 32 channels inside
    assert block.conv2.weight.grad[:16, :16].any() and not block.conv2.weight.grad[16:].any()
    assert not block.conv2.weight.grad[:, 16:].any() and not block.conv3.weight.grad[:, 16:].any()
    assert block.conv3.weight.grad[:, :16].any() and not block.norm1.weight.grad[16:].any()
    assert net.mask_token.grad is None


def test_a_picture_that_is_hidden_altogether_cannot_be_told_from_another():
    net, mask = SHARED, torch.ones(2, 16, dtype=torch.bool)
    with torch.no_grad():
        pooled = net(image=pixels(2, 3, 32, 32), token_mask={"image": mask}).pooled
    torch.testing.assert_close(pooled[0], pooled[1], atol=1e-6, rtol=0)


# -- stand-alone subnets -----------------------------------------------------------------------------------------------------


@given(
    groups=st.sampled_from([1, 2, 3]),
    steps=st.integers(0, 2),
    depths=st.tuples(*[st.tuples(st.integers(1, 2), st.integers(0, 1))] * 4),
    stem=st.sampled_from([12, 24, 64]),
    channels=st.sampled_from([1, 3]),
)
@settings(max_examples=6, deadline=None)
def test_every_extracted_subnet_equals_its_slice(groups, steps, depths, stem, channels):
    net = build(
        min_width=2 * groups,
        max_width=2 * groups * (1 + steps),
        width_step=2 * groups,
        min_depths=[low for low, _ in depths],
        max_depths=[low + more for low, more in depths],
        stem_channels=stem if stem % groups == 0 else 12,
        out_channels=24,
        groups=groups,
        channels=channels,
    )
    square, wide = pixels(2, channels, 32, 32), pixels(1, channels, 33, 50)
    for subnet in net.list_subnets()[:: max(1, len(net.list_subnets()) // 6)]:
        plain = net.extract(subnet)
        assert not plain.training and plain.preprocess == net.preprocess
        assert sum(parameter.numel() for parameter in plain.parameters()) == net.count_parameters(subnet)
        for images in (square, wide):
            with torch.no_grad():
                ours, theirs = net(image=images, subnet=subnet, layers=(0, -1)), plain(image=images, layers=(0, -1))
            for a, b in zip((ours.pooled, *ours.maps), (theirs.pooled, *theirs.maps), strict=True):
                torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
            assert theirs.grid == ours.grid and theirs.layers.keys() == ours.layers.keys()
            for index in ours.layers:
                assert ours.layers[index].grid == theirs.layers[index].grid
                torch.testing.assert_close(
                    theirs.layers[index].tokens["image"], ours.layers[index].tokens["image"], atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize("stem", [6, 64])
def test_an_extracted_subnet_is_timms_own_network(stem):
    from timm.models.resnet import ResNet

    net, images = build(stem_channels=stem), pixels(2, 3, 32, 32)
    plain = net.extract(Subnet(6, (1, 2, 2, 1)))
    assert type(plain.trunk) is ResNet and [info["num_chs"] for info in plain.trunk.feature_info] == [stem, 16, 32, 64, 128]
    with torch.no_grad():
        features = plain(image=images)
        assert torch.equal(plain.trunk.forward_features(images), features.maps[-1])
        torch.testing.assert_close(plain.trunk(images), features.pooled, atol=1e-6, rtol=0)
    rebuilt = create_model("resnet", **json.loads(json.dumps(plain.arguments)))
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert rebuilt.arguments == plain.arguments


def test_the_plain_network_is_by_default_a_resnet_50():
    with torch.device("meta"):
        net = create_model("resnet")
    assert sum(parameter.numel() for parameter in net.parameters()) == 23_508_032
    assert net.feature_info.channels == 2048 and net.feature_info.layers == 16


def test_an_extracted_subnet_shares_no_memory():
    net = build()
    plain = net.extract(net.intact)
    before = plain(image=pixels(1, 3, 32, 32)).pooled.clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(plain(image=pixels(1, 3, 32, 32)).pooled, before)


def test_lower_precision_and_autocast_stay_close():
    net, images, subnet = SHARED, pixels(2, 3, 32, 32), Subnet(6, (1, 2, 3, 1))
    with torch.no_grad():
        exact = net(image=images, subnet=subnet).pooled
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(net(image=images, subnet=subnet).pooled.float(), exact, atol=0.15, rtol=0.1)
        double = net.extract(subnet).to(torch.float64)(image=images.double()).pooled
    torch.testing.assert_close(double.float(), exact, atol=2e-5, rtol=0)
    assert build().to(torch.bfloat16).extract(subnet).trunk.conv1.weight.dtype == torch.bfloat16


# -- other sizes, training, budgets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(32, 32), (28, 28), (64, 33), (1, 5)])
def test_other_sizes_and_aspects(height, width):
    features = SHARED(image=pixels(2, 3, height, width), layers=(0,))
    for stage_map, stride in zip(features.maps, features.strides, strict=True):
        assert stage_map.shape[2:] == (math.ceil(height / stride), math.ceil(width / stride))
    assert features.grid == {"image": tuple(features.maps[-1].shape[2:])} and torch.isfinite(features.pooled).all()
    assert features.layers[0].grid == {"image": tuple(features.maps[0].shape[2:])}


def test_activation_checkpointing_changes_nothing():
    images, subnet, gradients = pixels(4, 3, 32, 32), Subnet(6, (1, 1, 2, 1)), []
    for recompute in (False, True):
        net = build().train()
        net.activation_checkpointing = recompute
        # the intact and an elastic pass before one backward: recomputation must not mix them up
        loss = net(image=images).pooled.square().sum() + net(image=images, subnet=subnet).pooled.sin().sum()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_layers_and_their_ids_are_blocks_counted_over_all_stages():
    net, images = SHARED, pixels(1, 3, 32, 32)
    info, ids = net.feature_info, net.layer_ids()
    assert info.layers == 7 and info.strides == (4, 8, 8, 16, 16, 16, 32) and info.layer_channels == (16, 32, 32, 64, 64, 64, 128)
    assert ids.keys() == dict(net.named_parameters()).keys()
    assert ids["mask_token"] == ids["conv1.weight"] == ids["norm1.bias"] == 0
    assert ids["layer1.0.downsample.0.weight"] == 1 and ids["layer3.2.norm3.bias"] == 6 and ids["layer4.0.conv1.weight"] == 7
    features = net(image=images, layers=range(7))
    ends = [0, 2, 5, 6]
    for stage_map, end in zip(features.maps, ends, strict=True):
        assert torch.equal(features.layers[end].tokens["image"], stage_map.flatten(2).mT)
    plain = net.extract(Subnet(4, (1, 2, 2, 1))).layer_ids()
    assert plain["trunk.bn1.bias"] == 0 and plain["trunk.layer3.0.bn1.bias"] == 4 and plain["trunk.layer4.0.conv3.weight"] == 6


# -- published checkpoints ---------------------------------------------------------------------------------------------------


def test_names_go_to_the_published_layout_and_back():
    for prefix in ("", "backbone.", "student.backbone."):
        own = {f"{prefix}{name}": tensor for name, tensor in SHARED.state_dict().items()}
        there = to_official(own)
        assert f"{prefix}layer2.layers.1.conv2.conv.weight" in there and f"{prefix}layer2.layers.0.downsample.1.bias" in there
        assert from_official(there).keys() == own.keys() and len(there) == len(own)


def test_a_published_teacher_becomes_a_supernet(tmp_path):
    sizes = dict(image_size=64, min_width=32, max_width=64, width_step=32, min_depths=(1, 1, 1, 1), max_depths=(1, 2, 6, 1))
    net = ElasticResNet(**sizes, stem_channels=32, out_channels=128)
    teacher = to_official({f"backbone.{name}": tensor for name, tensor in net.state_dict().items()})
    save_file({**teacher, "dino_head.mlp0.2.bias": torch.zeros(1)}, tmp_path / "teacher.safetensors")
    found, left = read_official(tmp_path / "teacher.safetensors", image_size=64)
    assert found.arguments == net.arguments and left == ["dino_head.mlp0.2.bias"]
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in found.state_dict().items())
