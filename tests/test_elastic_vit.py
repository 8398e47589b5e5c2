"""The elastic ViT against a slow transformer written from the paper's formulas, and its stand-alone subnets against itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from okavango.models.backbone import create_model
from okavango.models.elastic import add_residual, kept_blocks, layer_norm, linear, sampling_pool
from okavango.models.elastic_vit import ElasticViT, LayerScale, interpolate_positions
from okavango.models.features import Subnet
from okavango.zoo.loading import CheckpointError, load_weights

torch.set_num_threads(1)

TINY = dict(image_size=12, patch_size=4, min_width=8, max_width=16, width_step=4, min_depth=1, max_depth=3, head_dim=4)


def build(seed: int = 0, **changes) -> ElasticViT:
    """A tiny network in eval mode whose parameters are all random and large, so that no bias, scale or slice can be forgotten."""
    net = ElasticViT(**{**TINY, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            spread = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            centre = 1.0 if "norm" in name and name.endswith("weight") or "gamma" in name else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return net.eval()


SHARED = build()  # for tests that only look


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- an independent reference ------------------------------------------------------------------------------------------------


def narrowed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Eq. 2 and 3: the inputs are scaled by full width / active width, then the kept rows and columns are used."""
    full, active = weight.shape[1], x.shape[-1]
    return (x * (full / active)) @ weight[rows][:, :active].T + bias[rows]


def reference(net: ElasticViT, images: torch.Tensor, subnet: Subnet, mask: torch.Tensor | None = None) -> torch.Tensor:
    """All tokens after the final norm, in float64, head by head and picture by picture."""
    p = {name: value.detach().double() for name, value in net.state_dict().items()}
    width, full, d = subnet.width, net.widths[-1], net.head_dim
    hidden = p["blocks.0.mlp.fc1.weight"].shape[0] * width // full
    out = []
    for n, image in enumerate(images.double()):
        patches = image.unfold(1, net.patch_size, net.patch_size).unfold(2, net.patch_size, net.patch_size)
        patches = patches.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)
        x = patches @ p["patch_embed.proj.weight"][:width].flatten(1).T + p["patch_embed.proj.bias"][:width]
        if mask is not None:
            x[mask[n]] = p["mask_token"][0, :width]
        x = torch.cat([p["cls_token"][0, :, :width], x]) + p["pos_embed"][0, :, :width]

        def norm(x, name):
            centred = x - x.mean(1, keepdim=True)
            unit = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
            return unit * p[f"{name}.weight"][:width] + p[f"{name}.bias"][:width]

        def layer(x, name, rows):
            return narrowed(x, p[f"{name}.weight"], p[f"{name}.bias"], rows)

        kept = [math.floor(i * (net.depths[-1] - 1) / max(1, subnet.depth - 1)) for i in range(subnet.depth)]
        for i in kept:
            y, block = norm(x, f"blocks.{i}.norm1"), f"blocks.{i}"
            heads = []
            for h in range(width // d):
                q, k, v = (
                    layer(y, f"{block}.attn.qkv", list(range(part * full + h * d, part * full + (h + 1) * d))) for part in range(3)
                )
                heads.append((q @ k.T / math.sqrt(d)).softmax(1) @ v)
            y = layer(torch.cat(heads, 1), f"{block}.attn.proj", list(range(width)))
            x = x + y * p[f"{block}.ls1.gamma"][:width]
            y = layer(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1", list(range(hidden)))
            y = layer(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), f"{block}.mlp.fc2", list(range(width)))
            x = x + y * p[f"{block}.ls2.gamma"][:width]
        out.append(norm(x, "norm"))
    return torch.stack(out)


def tokens(features) -> torch.Tensor:
    return torch.cat([features.prefix, features.tokens["image"]], 1)


def test_every_subnet_equals_the_reference():
    net, images = build(), pixels(2, 3, 12, 12)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, [1, 5, 8]] = True
    for subnet in net.list_subnets():
        with torch.no_grad():
            features = net(image=images, subnet=subnet)
            hidden = net(image=images, subnet=subnet, token_mask={"image": mask})
        torch.testing.assert_close(tokens(features).double(), reference(net, images, subnet), atol=2e-5, rtol=0)
        torch.testing.assert_close(tokens(hidden).double(), reference(net, images, subnet, mask), atol=2e-5, rtol=0)
        assert torch.equal(features.pooled, features.prefix[:, 0]) and features.grid == {"image": (3, 3)}


def test_the_intact_network_is_the_largest_subnet():
    net, images = build(), pixels(2, 3, 12, 12)
    assert net.intact == Subnet(16, 3) == net.list_subnets()[-1]
    assert torch.equal(net(image=images).pooled, net(image=images, subnet=net.intact).pooled)


# -- tables ------------------------------------------------------------------------------------------------------------------


def test_kept_blocks_against_a_loop():
    for total in range(1, 31):  # integer and float arithmetic agree up to here
        for depth in range(1, total + 1):
            kept = kept_blocks(depth, total)
            assert kept == tuple((total - 1) * i // max(1, depth - 1) for i in range(depth))
            assert kept[0] == 0 and len(set(kept)) == depth and (depth == 1 or kept[-1] == total - 1)
    assert kept_blocks(12, 24) == (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23)


@given(st.integers(1, 6), st.integers(1, 6), st.floats(1, 4))
@settings(max_examples=60, deadline=None)
def test_multiplicities_of_the_pool(widths, depths, scale):
    pool = sampling_pool(range(widths), range(depths), scale)
    for i in range(widths):
        for j in range(depths):
            weight = (scale + (1 - scale) * i / max(1, widths - 1)) * (scale + (1 - scale) * j / max(1, depths - 1))
            count = pool.count(Subnet(i, j))
            assert count == round(weight) or abs(abs(weight - math.floor(weight)) - 0.5) < 1e-9
    assert list(pool) == sorted(pool)
    if widths > 1 and depths > 1:
        assert pool[-1] == Subnet(widths - 1, depths - 1) and pool.count(pool[-1]) == 1


def test_the_published_pool_has_573_entries():
    assert len(sampling_pool(range(384, 1025, 64), range(12, 25))) == 573


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 13}, "image_size 13: must be a multiple of patch_size 4"),
        ({"min_width": 10}, "multiples of head_dim 4"),
        ({"width_step": 6}, "multiples of head_dim 4"),
        ({"max_width": 8, "min_width": 16}, "expected 4 <= min_width <= max_width"),
        ({"min_width": 0}, "min_width"),
        ({"width_step": 0}, "by 0"),
        ({"min_width": 4, "max_width": 16, "width_step": 8}, "multiples"),
        ({"min_depth": 0}, "depths 0..3"),
        ({"min_depth": 4}, "depths 4..3"),
        ({"drop_path": 1.0}, "drop_path 1.0"),
        ({"drop_path": -0.1}, "drop_path -0.1"),
    ],
)
def test_sizes_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ElasticViT(**{**TINY, **changes})


def test_requests_that_are_refused():
    net, images = build(), pixels(1, 3, 12, 12)
    for subnet in (Subnet(10, 2), Subnet(8, 4), Subnet(8, (1, 2))):
        with pytest.raises(ValueError, match=r"widths are 8, 12, 16 and depths 1..3"):
            net(image=images, subnet=subnet)
        with pytest.raises(ValueError, match="widths are"):
            net.extract(subnet)
    with pytest.raises(ValueError, match="layer 2: this network has blocks 0..1"):
        net(image=images, subnet=Subnet(8, 2), layers=(2,))
    with pytest.raises(ValueError, match="13x12 pixels: both sides must be multiples of the patch size 4"):
        net(image=pixels(1, 3, 13, 12))
    plain = net.extract(Subnet(8, 2))
    with pytest.raises(ValueError, match="no subnets and no mask token"):
        plain(image=images, subnet=Subnet(8, 2))


# -- slices ------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(1, 6), st.sampled_from([1, 3]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_slice_of_a_linear_layer(inputs, out, groups, seed):
    layer, x = nn.Linear(7, 6 * groups), pixels(2, 3, inputs, seed=seed)
    rows = [group * 6 + row for group in range(groups) for row in range(out)]
    expected = narrowed(x.double(), layer.weight.double(), layer.bias.double(), rows)
    torch.testing.assert_close(linear(x, layer, out, groups).double(), expected, atol=1e-5, rtol=0)


def test_the_full_width_is_the_plain_layer_bit_for_bit():
    x = pixels(2, 3, 8)
    for layer, groups in ((nn.Linear(8, 5), 1), (nn.Linear(8, 24), 3)):
        assert torch.equal(linear(x, layer, layer.out_features // groups, groups), layer(x))
    norm, scale = nn.LayerNorm(8), LayerScale(8, 0.3)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    assert torch.equal(layer_norm(x, norm), norm(x)) and torch.equal(scale(x), x * 0.3)
    narrow = layer_norm(x[..., :5], norm)
    torch.testing.assert_close(narrow, F.layer_norm(x[..., :5], (5,), norm.weight[:5], norm.bias[:5]))
    assert scale(x[..., :5]).shape[-1] == 5


def test_without_the_scale_a_slice_is_the_plain_layer_of_its_weights():
    layer, x = nn.Linear(7, 18), pixels(2, 3, 4)
    rows = [group * 6 + row for group in range(3) for row in range(2)]
    torch.testing.assert_close(linear(x, layer, 2, 3, rescale=False), F.linear(x, layer.weight[rows][:, :4], layer.bias[rows]))


def test_without_the_scale():
    scaled, net, images = build(), build(rescale=False), pixels(2, 3, 12, 12)
    assert "rescale" not in scaled.arguments and net.arguments == scaled.arguments | {"rescale": False}
    assert build(**net.arguments).rescale is False
    for subnet in net.list_subnets():
        with torch.no_grad():
            ours, theirs = tokens(net(image=images, subnet=subnet)), tokens(scaled(image=images, subnet=subnet))
            torch.testing.assert_close(tokens(net.extract(subnet)(image=images)), ours, atol=2e-5, rtol=1e-5)
        if subnet.width == net.widths[-1]:
            assert torch.equal(ours, theirs)
        else:
            assert (ours - theirs).abs().max() > 0.01
    # The scale multiplied into the weights of all linear layers of the blocks does the same: it is of these and no others.
    heavier, subnet = build(rescale=False), Subnet(8, 2)
    with torch.no_grad():
        for name, parameter in heavier.named_parameters():
            if name.startswith("blocks") and name.endswith("weight") and parameter.ndim == 2:
                parameter *= 16 / 8
        expected = tokens(scaled(image=images, subnet=subnet))
        torch.testing.assert_close(tokens(heavier(image=images, subnet=subnet)), expected, atol=2e-5, rtol=1e-5)


def test_gradients_reach_the_active_slice_only():
    net = build()
    net(image=pixels(2, 3, 12, 12), subnet=Subnet(8, 2)).pooled.square().sum().backward()
    assert net.blocks[1].mlp.fc1.weight.grad is None  # of three blocks, two keep the first and the last
    weight = net.blocks[0].mlp.fc1.weight.grad
    assert weight[:32, :8].abs().min() > 0 and not weight[32:].any() and not weight[:, 8:].any()
    qkv = net.blocks[2].attn.qkv.weight.grad.view(3, 16, 16)
    assert qkv[2, :8, :8].abs().min() > 0 and not qkv[:, 8:].any() and not qkv[:, :, 8:].any()
    assert not net.pos_embed.grad[..., 8:].any() and net.pos_embed.grad[..., :8].abs().min() > 0


# -- stand-alone subnets -----------------------------------------------------------------------------------------------------


@given(
    head_dim=st.sampled_from([4, 6]),
    heads=st.integers(1, 2),
    steps=st.integers(0, 2),
    depths=st.tuples(st.integers(1, 3), st.integers(0, 2)),
    ratio=st.sampled_from([1.0, 2.0, 8 / 3, 4.0]),
    patch_size=st.sampled_from([3, 4]),
    channels=st.sampled_from([1, 3]),
)
@settings(max_examples=8, deadline=None)
def test_every_extracted_subnet_equals_its_slice(head_dim, heads, steps, depths, ratio, patch_size, channels):
    net = build(
        image_size=3 * patch_size,
        patch_size=patch_size,
        head_dim=head_dim,
        min_width=head_dim * heads,
        max_width=head_dim * (heads + steps),
        width_step=head_dim,
        min_depth=depths[0],
        max_depth=sum(depths),
        mlp_ratio=ratio,
        channels=channels,
    )
    square, wide = pixels(2, channels, 3 * patch_size, 3 * patch_size), pixels(1, channels, 2 * patch_size, 5 * patch_size)
    for subnet in net.list_subnets():
        plain = net.extract(subnet)
        assert not plain.training and plain.preprocess == net.preprocess
        assert sum(parameter.numel() for parameter in plain.parameters()) == net.count_parameters(subnet)
        for images in (square, wide):
            with torch.no_grad():
                ours, theirs = net(image=images, subnet=subnet, layers=(0, -1)), plain(image=images, layers=(0, -1))
            torch.testing.assert_close(tokens(theirs), tokens(ours), atol=2e-5, rtol=1e-5)
            assert theirs.grid == ours.grid and theirs.layers.keys() == ours.layers.keys()
            for index in ours.layers:
                torch.testing.assert_close(
                    theirs.layers[index].tokens["image"], ours.layers[index].tokens["image"], atol=1e-4, rtol=1e-4
                )


def test_an_extracted_subnet_is_timms_own_network():
    from timm.models.vision_transformer import VisionTransformer

    net, images = build(), pixels(2, 3, 12, 12)
    plain = net.extract(Subnet(12, 2))
    assert type(plain.trunk) is VisionTransformer
    with torch.no_grad():
        torch.testing.assert_close(plain.trunk.forward_features(images), tokens(plain(image=images)), atol=1e-5, rtol=0)
    rebuilt = create_model("vit", **plain.arguments)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


def test_an_extracted_subnet_shares_no_memory():
    net = build()
    plain = net.extract(net.intact)
    before = plain(image=pixels(1, 3, 12, 12)).pooled.clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(plain(image=pixels(1, 3, 12, 12)).pooled, before)


def test_lower_precision_and_autocast_stay_close():
    net, images, subnet = build(), pixels(2, 3, 12, 12), Subnet(12, 3)
    with torch.no_grad():
        exact = net(image=images, subnet=subnet).pooled
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(net(image=images, subnet=subnet).pooled.float(), exact, atol=0.1, rtol=0.1)
        half = net.extract(subnet).to(torch.float64)(image=images.double()).pooled
    torch.testing.assert_close(half.float(), exact, atol=2e-5, rtol=0)
    assert net.to(torch.bfloat16).extract(subnet).trunk.pos_embed.dtype == torch.bfloat16


# -- other sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(12, 12), (8, 20), (24, 4), (16, 16)])
def test_other_sizes_and_aspects(height, width):
    net = build()
    features = net(image=pixels(2, 3, height, width))
    rows, columns = height // 4, width // 4
    assert features.grid == {"image": (rows, columns)} and features.tokens["image"].shape == (2, rows * columns, 16)
    assert torch.isfinite(features.pooled).all()


def test_positions_are_interpolated_at_dinos_sampling_points():
    embed = pixels(1, 1 + 9, 4)
    assert interpolate_positions(embed, (3, 3), (3, 3), 0.1) is embed
    out = interpolate_positions(embed, (2, 5), (3, 3), 0.1)
    table = embed[:, 1:].view(1, 3, 3, 4).permute(0, 3, 1, 2)
    # the position of output cell i is (i + 0.5) / scale - 0.5 with the scale that contains the offset
    rows = torch.tensor([(i + 0.5) * 3 / 2.1 - 0.5 for i in range(2)])
    columns = torch.tensor([(i + 0.5) * 3 / 5.1 - 0.5 for i in range(5)])

    def cubic(points):
        weights = torch.zeros(len(points), 3)
        for row, point in enumerate(points.tolist()):
            base = math.floor(point)
            for k in range(-1, 3):
                t = abs(point - base - k)
                a = -0.75
                w = (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
                weights[row, min(2, max(0, base + k))] += w
        return weights

    expected = torch.einsum("rh,cw,bdhw->bdrc", cubic(rows), cubic(columns), table).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out[:, 1:], expected, atol=1e-5, rtol=0)
    assert torch.equal(out[:, :1], embed[:, :1])
    plain = interpolate_positions(embed, (2, 5), (3, 3), 0.0)[:, 1:]
    resized = F.interpolate(table, (2, 5), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(plain, resized)
    assert not torch.allclose(plain, out[:, 1:], atol=1e-3)


def test_weights_of_another_image_size_are_fitted_and_reported():
    small, large = build(), build(seed=1, image_size=24)
    report = load_weights(large, small.state_dict())
    assert report.resized == {"pos_embed": ((1, 10, 16), (1, 37, 16))} and not report.missing
    images = pixels(2, 3, 24, 24)
    with torch.no_grad():  # the small network interpolates by the same rule when it meets the large picture
        torch.testing.assert_close(tokens(large(image=images)), tokens(small(image=images)), atol=1e-5, rtol=0)
    plain, larger = (net.extract(net.list_subnets()[0]) for net in (small, large))
    assert set(load_weights(larger, plain.state_dict()).resized) == {"trunk.pos_embed"}
    with torch.no_grad():
        torch.testing.assert_close(tokens(larger(image=images)), tokens(plain(image=images)), atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match="do not fit"):
        load_weights(build(max_width=20), small.state_dict())
    state = {**small.state_dict(), "pos_embed": torch.zeros(1, 9, 16)}  # eight patches are no square
    with pytest.raises(CheckpointError, match="pos_embed"):
        load_weights(large, state)


# -- training ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.9])
def test_stochastic_depth_keeps_the_expectation(rate):
    x, rounds = pixels(8, 3, 4), 1500
    torch.manual_seed(0)
    total = sum(add_residual(x, lambda y: 2 * y + 1, rate) for _ in range(rounds)) / rounds
    spread = math.sqrt((1 / (1 - rate) if rate <= 0.1 else 8 / max(1, int(8 * (1 - rate)))) / rounds)
    assert float((total - (3 * x + 1)).abs().max()) < 6 * spread * float((2 * x + 1).abs().max())


def test_stochastic_depth_above_a_tenth_runs_the_branch_on_fewer_samples():
    sizes = []
    add_residual(torch.zeros(10, 2), lambda y: sizes.append(len(y)) or y, 0.35)
    add_residual(torch.zeros(10, 2), lambda y: sizes.append(len(y)) or y, 0.1)
    add_residual(torch.zeros(1, 2), lambda y: sizes.append(len(y)) or y, 0.99)
    assert sizes == [6, 10, 1]


def test_stochastic_depth_is_off_in_eval_mode():
    images = pixels(4, 3, 12, 12)
    net, plain = build(drop_path=0.4), build()
    assert torch.equal(net(image=images).pooled, plain(image=images).pooled)
    torch.manual_seed(0)
    assert not torch.allclose(net.train()(image=images).pooled, plain(image=images).pooled, atol=1e-3)


@pytest.mark.parametrize("drop_path", [0.0, 0.08, 0.3])
def test_activation_checkpointing_changes_nothing(drop_path):
    images, subnet = pixels(6, 3, 12, 12), Subnet(12, 2)
    gradients = []
    for recompute in (False, True):
        net = build(drop_path=drop_path).train()
        net.activation_checkpointing = recompute
        torch.manual_seed(3)
        # the intact and an elastic pass before one backward: recomputation must not mix them up
        loss = net(image=images).pooled.square().sum() + net(image=images, subnet=subnet).pooled.sin().sum()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_layer_ids_follow_the_blocks():
    net = build()
    ids = net.layer_ids()
    assert ids["pos_embed"] == ids["patch_embed.proj.bias"] == 0 and ids["blocks.2.ls1.gamma"] == 3 and "norm.weight" not in ids
    plain = net.extract(Subnet(8, 2)).layer_ids()
    assert plain["trunk.pos_embed"] == 0 and plain["trunk.blocks.1.norm1.bias"] == 2 and "trunk.norm.weight" not in plain
