"""The elastic Swin against a slow one written from the paper's formulas, and its stand-alone subnets against itself and timm's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from okavango.models.backbone import create_model
from okavango.models.elastic import kept_blocks
from okavango.models.elastic_swin import ElasticSwin, Swin, join_windows, relative_position_index, same_part, split_windows
from okavango.models.features import Features, Subnet
from okavango.pretrain.objectives.poa import hidden_tokens
from okavango.zoo.loading import CheckpointError, load_weights

torch.set_num_threads(1)

TINY = dict(
    image_size=16,
    patch_size=2,
    window=3,
    min_width=4,
    max_width=12,
    width_step=4,
    depths=(1, 2, 4, 2),
    min_depth=2,
    head_dim=4,
    mask_stride=4,
)


def randomise(net, seed: int = 0):
    """All parameters random and large, so that no bias, scale or slice can be forgotten; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            spread = 0.5 if parameter.ndim == 1 or "table" in name else parameter[0].numel() ** -0.5
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def build(seed: int = 0, **changes) -> ElasticSwin:
    return randomise(ElasticSwin(**{**TINY, **changes}), seed)


SHARED = build()  # for tests that only look


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- an independent reference ------------------------------------------------------------------------------------------------


def reference(net: ElasticSwin, image: torch.Tensor, subnet: Subnet, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The normed maps (H, W, D) of all stages of one picture, in float64, group by group and head by head.

    Shifted windows are groups of cells here: a grid of windows that begins half a window inside the map, cut at its borders.
    """
    p = {name: value.detach().double() for name, value in net.state_dict().items()}
    full, d, window = net.widths[-1], net.head_dim, net.window
    scale = full / subnet.width

    def norm(x, name, size):
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * p[f"{name}.weight"][:size] + p[f"{name}.bias"][:size]

    def layer(x, name, rows):
        return (x * scale) @ p[f"{name}.weight"][rows][:, : x.shape[-1]].T + p[f"{name}.bias"][rows]

    def attend(x, name, shift, size, whole):
        height, width = x.shape[:2]
        tall, wide = (math.ceil(side / window) * window for side in (height, width))
        padded = torch.zeros(tall, wide, size, dtype=x.dtype)
        padded[:height, :width] = x
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i in range(tall):
            for j in range(wide):
                groups.setdefault(((i - shift) // window, (j - shift) // window), []).append((i, j))
        out = torch.zeros_like(padded)
        for cells in groups.values():
            y = torch.stack([padded[cell] for cell in cells])
            heads = []
            for h in range(size // d):
                q, k, v = (
                    layer(y, f"{name}.qkv", list(range(part * whole + h * d, part * whole + (h + 1) * d))) for part in range(3)
                )
                rows = [
                    [(a - c + window - 1) * (2 * window - 1) + b - e + window - 1 for c, e in cells] for a, b in cells
                ]  # query (a, b), key (c, e)
                bias = p[f"{name}.relative_position_bias_table"][torch.tensor(rows), h]
                heads.append((q @ k.T / math.sqrt(d) + bias).softmax(1) @ v)
            y = layer(torch.cat(heads, 1), f"{name}.proj", list(range(size)))
            for cell, value in zip(cells, y, strict=True):
                out[cell] = value
        return out[:height, :width]

    patches = image.double().unfold(1, net.patch_size, net.patch_size).unfold(2, net.patch_size, net.patch_size)
    x = patches.permute(1, 2, 0, 3, 4).flatten(2) @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    x = norm(x, "patch_embed.norm", full)[..., : subnet.width].clone()  # over the full width, then cut
    if mask is not None:
        times = net.mask_stride // net.patch_size
        columns = x.shape[1] // times
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                if mask[i // times * columns + j // times]:
                    x[i, j] = p["mask_token"][0, : subnet.width]
    maps = []
    for number, (depth, total) in enumerate(zip(subnet.depth, net.arguments["depths"], strict=True)):
        size, whole = subnet.width * 2**number, full * 2**number
        hidden = round(size * net.arguments["mlp_ratio"])
        for i in [math.floor(k * (total - 1) / max(1, depth - 1)) for k in range(depth)]:
            block = f"stages.{number}.blocks.{i}"
            x = x + attend(norm(x, f"{block}.norm1", size), f"{block}.attn", window // 2 if i % 2 else 0, size, whole)
            y = layer(norm(x, f"{block}.norm2", size), f"{block}.mlp.fc1", list(range(hidden)))
            x = x + layer(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), f"{block}.mlp.fc2", list(range(size)))
        maps.append(norm(x, f"norms.{number}", size))
        if number < 3:
            merging = f"stages.{number}.downsample"
            x = F.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
            x = torch.cat([x[0::2, 0::2], x[0::2, 1::2], x[1::2, 0::2], x[1::2, 1::2]], -1)
            kept = [quarter * whole + channel for quarter in range(4) for channel in range(size)]
            centred = x - x.mean(-1, keepdim=True)
            unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            x = unit * p[f"{merging}.norm.weight"][kept] + p[f"{merging}.norm.bias"][kept]
            x = (x * scale) @ p[f"{merging}.reduction.weight"][: 2 * size][:, kept].T
    return maps


def close_to_reference(net: ElasticSwin, images: torch.Tensor, subnet: Subnet, mask: torch.Tensor | None = None) -> None:
    """Both in float64, since a norm over few channels makes much of a rounding error."""
    net, images = net.double(), images.double()
    with torch.no_grad():
        features = net(image=images, subnet=subnet, token_mask=None if mask is None else {"image": mask})
    for n, image in enumerate(images):
        maps = reference(net, image, subnet, None if mask is None else mask[n])
        for ours, theirs in zip(features.maps, maps, strict=True):
            torch.testing.assert_close(ours[n], theirs.permute(2, 0, 1), atol=1e-9, rtol=0)
        torch.testing.assert_close(features.tokens["image"][n], maps[-1].flatten(0, 1), atol=1e-9, rtol=0)
        torch.testing.assert_close(features.pooled[n], maps[-1].mean((0, 1)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("window", [2, 3, 4])
def test_subnets_equal_the_reference(window):
    net, images = build(window=window), pixels(2, 3, 16, 16)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [1, 5, 8, 15]] = True
    for subnet in (Subnet(4, (1, 2, 2, 2)), Subnet(8, (1, 2, 3, 2)), net.intact):
        close_to_reference(net, images, subnet)
    close_to_reference(net, images, Subnet(8, (1, 2, 4, 2)), mask)


def test_maps_of_odd_sizes_equal_the_reference():
    close_to_reference(build(), pixels(1, 3, 14, 22), Subnet(8, (1, 2, 3, 2)))


def test_the_intact_network_is_the_largest_subnet():
    images = pixels(2, 3, 16, 16)
    assert SHARED.intact == Subnet(12, (1, 2, 4, 2)) == SHARED.list_subnets()[-1]
    assert torch.equal(SHARED(image=images).pooled, SHARED(image=images, subnet=SHARED.intact).pooled)


# -- windows -----------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_windows_are_split_and_joined(window, rows, columns, channels):
    x = pixels(2, rows * window, columns * window, channels)
    parts = split_windows(x, window)
    assert parts.shape == (2, rows * columns, window**2, channels)
    assert torch.equal(parts[:, columns - 1], x[:, :window, -window:].flatten(1, 2))
    assert torch.equal(join_windows(parts, window, rows * window, columns * window), x)


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_cells_that_rolling_brought_together_stay_apart(window, rows, columns):
    height, width, shift = rows * window, columns * window, window // 2
    where = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
    rolled = split_windows(where.roll((-shift, -shift), (0, 1))[None], window)[0]
    group = (rolled - shift).div(window, rounding_mode="floor")  # windows that begin half a window inside, cut at the borders
    together = (group[:, :, None] == group[:, None]).all(-1)
    assert torch.equal(same_part(height, width, window, torch.device("cpu")), together)


def test_the_index_of_position_biases():
    index = relative_position_index(2)  # cells (0, 0), (0, 1), (1, 0), (1, 1); offsets -1..1 by rows, then columns
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


# -- tables ------------------------------------------------------------------------------------------------------------------


def test_the_published_grid():
    with torch.device("meta"):
        net = create_model("elastic_swin_base")
    assert net.widths == (96, 112, 128) and [depth[2] for depth in net.depths] == list(range(6, 19))
    assert len(net.list_subnets()) == 39 and len(net.sampling_pool(2.0)) == 89
    assert kept_blocks(6, 18) == (0, 3, 6, 10, 13, 17)
    smallest = net.list_subnets()[0]
    assert str(smallest) == "w96_d2-2-6-2" and net.check_subnet(Subnet.parse("w96_d6")) == smallest


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 15}, "image_size 15: must be a multiple of patch_size 2"),
        ({"window": 1}, "window 1: expected at least 2"),
        ({"mlp_ratio": 2.6}, "mlp_ratio 2.6: times head_dim 4"),
        ({"mlp_ratio": 0.0}, "mlp_ratio 0.0"),
        ({"min_width": 6}, "multiples of head_dim 4"),
        ({"max_width": 4, "min_width": 8}, "expected 4 <= min_width <= max_width"),
        ({"width_step": 0}, "by 0"),
        ({"depths": (1, 2, 4)}, "at least one block in each of four stages"),
        ({"depths": (1, 0, 4, 1)}, "at least one block in each of four stages"),
        ({"min_depth": 0}, "min_depth 0: expected 1..4"),
        ({"min_depth": 5}, "min_depth 5: expected 1..4"),
        ({"drop_path": 1.0}, "drop_path 1.0"),
        ({"mask_stride": 3}, "mask_stride 3: must be a multiple of patch_size 2"),
        ({"mask_stride": 0}, "mask_stride 0"),
    ],
)
def test_sizes_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ElasticSwin(**{**TINY, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 6}, "width 6: expected a multiple of head_dim 4"),
        ({"embed_width": 4}, "at most embed_width 4"),
        ({"blocks": ("n", "n", "n")}, "for each of four stages a letter per block"),
        ({"blocks": ("n", "n", "", "n")}, "for each of four stages a letter per block"),
        ({"blocks": ("n", "n", "nx", "n")}, "for each of four stages a letter per block"),
        ({"window": 0}, "window 0"),
    ],
)
def test_plain_sizes_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Swin(**{"image_size": 16, "patch_size": 2, "width": 8, "head_dim": 4, **changes})


def test_requests_that_are_refused():
    images = pixels(1, 3, 16, 16)
    for subnet in (Subnet(6, 2), Subnet(8, 5), Subnet(8, (1, 2)), Subnet(8, (2, 2, 2, 2))):
        with pytest.raises(ValueError, match=r"widths are 4, 8, 12 and depths 1-2-2-2..1-2-4-2"):
            SHARED(image=images, subnet=subnet)
        with pytest.raises(ValueError, match="widths are"):
            SHARED.extract(subnet)
    with pytest.raises(ValueError, match="layer 7: this network has blocks 0..6"):
        SHARED(image=images, subnet=Subnet(8, 2), layers=(7,))
    with pytest.raises(ValueError, match="15x16 pixels: both sides must be multiples of the patch size 2"):
        SHARED(image=pixels(1, 3, 15, 16))
    with pytest.raises(ValueError, match="14x16 pixels: both sides must be multiples of the mask stride 4"):
        SHARED(image=pixels(1, 3, 14, 16), token_mask={"image": torch.zeros(1, 12, dtype=torch.bool)})
    with pytest.raises(ValueError, match="no subnets and no mask token"):
        SHARED.extract(Subnet(8, 2))(image=images, subnet=Subnet(8, 2))


# -- features ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(16, 16), (8, 20), (30, 2), (2, 2)])
def test_other_sizes_and_aspects(height, width):
    features = SHARED(image=pixels(2, 3, height, width), layers=range(9))
    assert features.strides == (2, 4, 8, 16) and features.prefix is None
    for number, (stride, a_map) in enumerate(zip(features.strides, features.maps, strict=True)):
        assert a_map.shape == (2, 12 * 2**number, math.ceil(height / stride), math.ceil(width / stride))
        assert torch.isfinite(a_map).all()
    assert features.grid == {"image": tuple(features.maps[-1].shape[2:])}
    info = SHARED.feature_info
    for index, layer in features.layers.items():
        cells = tuple(math.ceil(side / info.strides[index]) for side in (height, width))
        assert layer.grid == {"image": cells} and layer.tokens["image"].shape == (2, math.prod(cells), info.layer_channels[index])


def test_layers_are_the_blocks_before_the_norm():
    net = SHARED
    features = net(image=pixels(2, 3, 16, 16), subnet=Subnet(8, 3), layers=(0, 2, 5, -1))
    for layer, number in ((0, 0), (2, 1), (5, 2), (7, 3)):  # the last blocks of the four stages
        tokens = features.layers[layer].tokens["image"]
        size = tokens.shape[-1]
        norm = net.norms[number]
        normed = F.layer_norm(tokens, (size,), norm.weight[:size], norm.bias[:size], 1e-5)
        torch.testing.assert_close(normed, features.maps[number].flatten(2).transpose(1, 2))


def test_without_the_scale():
    scaled, net, images = build().double(), build(rescale=False).double(), pixels(2, 3, 16, 16).double()
    assert "rescale" not in scaled.arguments and net.arguments == scaled.arguments | {"rescale": False}
    assert build(**net.arguments).rescale is False
    for subnet in net.list_subnets():
        with torch.no_grad():
            ours, theirs = net(image=images, subnet=subnet), scaled(image=images, subnet=subnet)
            alone = net.extract(subnet)(image=images)
        for a, b in zip(ours.maps, alone.maps, strict=True):
            torch.testing.assert_close(b, a, atol=1e-9, rtol=0)
        if subnet.width == net.widths[-1]:
            assert torch.equal(ours.pooled, theirs.pooled)
        else:
            assert (ours.pooled - theirs.pooled).abs().max() > 0.01
    # The scale multiplied into the weights of all linear layers, mergings included, does the same: it is of these and no others.
    heavier, subnet = build(rescale=False).double(), Subnet(8, 3)
    with torch.no_grad():
        for module in heavier.modules():
            if isinstance(module, nn.Linear):
                module.weight *= 12 / 8
        ours, theirs = heavier(image=images, subnet=subnet), scaled(image=images, subnet=subnet)
    for a, b in zip(ours.maps, theirs.maps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_gradients_reach_the_active_slice_only():
    net = build()
    net(image=pixels(2, 3, 16, 16), subnet=Subnet(8, 2)).pooled.square().sum().backward()
    third = net.stages[2]
    assert third.blocks[1].mlp.fc1.weight.grad is None and third.blocks[3].mlp.fc1.weight.grad is not None
    table = third.blocks[3].attn.relative_position_bias_table.grad
    assert table[:, :8].any() and not table[:, 8:].any()
    reduction = net.stages[0].downsample.reduction.weight.grad.view(24, 4, 12)
    assert reduction[:16, :, :8].abs().min() > 0 and not reduction[16:].any() and not reduction[:, :, 8:].any()
    assert net.patch_embed.proj.weight.grad.flatten(1).any(1).all()  # through the statistics of the norm, all of it
    assert net.norms[0].weight.grad is None and net.mask_token.grad is None


# -- stand-alone subnets -----------------------------------------------------------------------------------------------------


@given(
    head_dim=st.sampled_from([3, 4]),
    heads=st.integers(1, 2),
    steps=st.integers(0, 2),
    depths=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 4), st.integers(1, 2)),
    ratio=st.sampled_from([1.0, 2.0, 4.0]),
    window=st.integers(2, 4),
    channels=st.sampled_from([1, 3]),
)
@settings(max_examples=6, deadline=None)
def test_every_extracted_subnet_equals_its_slice(head_dim, heads, steps, depths, ratio, window, channels):
    net = build(
        head_dim=head_dim,
        min_width=head_dim * heads,
        max_width=head_dim * (heads + steps),
        width_step=head_dim,
        depths=depths,
        min_depth=1,
        mlp_ratio=ratio,
        window=window,
        channels=channels,
    ).double()
    square, wide = pixels(2, channels, 16, 16).double(), pixels(1, channels, 10, 14).double()
    for subnet in net.list_subnets():
        plain = net.extract(subnet)
        assert not plain.training and plain.preprocess == net.preprocess
        assert sum(parameter.numel() for parameter in plain.parameters()) == net.count_parameters(subnet)
        for images in (square, wide):
            with torch.no_grad():
                ours, theirs = net(image=images, subnet=subnet, layers=(0, -1)), plain(image=images, layers=(0, -1))
            assert theirs.grid == ours.grid and theirs.layers.keys() == ours.layers.keys()
            for a, b in zip((ours.pooled, *ours.maps), (theirs.pooled, *theirs.maps), strict=True):
                torch.testing.assert_close(b, a, atol=1e-9, rtol=0)
            for index in ours.layers:
                a, b = ours.layers[index].tokens["image"], theirs.layers[index].tokens["image"]
                torch.testing.assert_close(b, a, atol=1e-9, rtol=1e-9)


def test_single_precision_is_equal_to_five_digits():
    images = pixels(2, 3, 16, 16)
    for subnet in (Subnet(8, 2), Subnet(12, 3)):
        with torch.no_grad():
            ours, theirs = SHARED(image=images, subnet=subnet), SHARED.extract(subnet)(image=images)
        torch.testing.assert_close(theirs.pooled, ours.pooled, atol=1e-5, rtol=1e-5)


def test_an_extracted_subnet_keeps_the_shifts_of_its_blocks():
    net = build(depths=(2, 2, 18, 2), min_depth=6)
    plain = net.extract(Subnet(8, 6))
    assert plain.arguments["blocks"] == ("ns", "ns", "nsnnss", "ns")
    rebuilt = create_model("swin", **plain.arguments)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert [block.shift for block in rebuilt.stages[2].blocks] == [0, 1, 0, 0, 1, 1]


def test_an_extracted_subnet_shares_no_memory():
    net = build()
    plain = net.extract(net.intact)
    before = plain(image=pixels(1, 3, 16, 16)).pooled.clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(plain(image=pixels(1, 3, 16, 16)).pooled, before)


def test_a_plain_swin_in_whole_windows_is_timms():
    from timm.models.swin_transformer import SwinTransformer

    plain = randomise(Swin(image_size=32, patch_size=2, window=2, width=8, head_dim=4, blocks=("ns", "n", "nsns", "ns")))
    other = SwinTransformer(
        img_size=32,
        patch_size=2,
        embed_dim=8,
        depths=(2, 1, 4, 2),
        num_heads=(2, 4, 8, 16),
        window_size=2,
        num_classes=0,
        always_partition=True,
        strict_img_size=False,
    ).eval()
    tensors = {}
    for name, tensor in plain.state_dict().items():
        if "relative_position_index" in name or name[:8] in ("norms.0.", "norms.1.", "norms.2."):
            continue
        if "downsample" in name:  # timm's order of cells is column by column, and its merging belongs to the stage after it
            number = int(name.split(".")[1])
            tensor = tensor.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].flatten(-2)
            name = name.replace(f"stages.{number}", f"stages.{number + 1}")
        tensors[name.replace("stages.", "layers.").replace("norms.3.", "norm.")] = tensor
    missing, unexpected = other.load_state_dict(tensors, strict=False)
    assert not unexpected and all("attn_mask" in name or "relative_position_index" in name for name in missing)
    images = pixels(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(image=images).maps[-1].permute(0, 2, 3, 1), other.forward_features(images))


def test_lower_precision_and_autocast_stay_close():
    net, images, subnet = build(), pixels(2, 3, 16, 16), Subnet(8, 3)
    with torch.no_grad():
        exact = net(image=images, subnet=subnet).pooled
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(net(image=images, subnet=subnet).pooled.float(), exact, atol=0.1, rtol=0.1)
        double = net.extract(subnet).to(torch.float64)(image=images.double()).pooled
    torch.testing.assert_close(double.float(), exact, atol=2e-5, rtol=0)
    assert net.to(torch.bfloat16).extract(subnet).norms[0].weight.dtype == torch.bfloat16


# -- other windows -----------------------------------------------------------------------------------------------------------


def test_weights_of_another_window_are_fitted_and_reported():
    small, large = build(), build(seed=1, window=4)
    with torch.no_grad():
        for block in small.stages[1].blocks:
            block.attn.relative_position_bias_table.fill_(0.25)
    report = load_weights(large, small.state_dict())
    tables = {name for name in report.resized if name.endswith("table")}
    assert len(report.resized) == 2 * len(tables) == 18 and not report.missing
    first = "stages.0.blocks.0.attn.relative_position_bias_table"
    assert report.resized[first] == ((25, 3), (49, 3))
    for block in large.stages[1].blocks:
        torch.testing.assert_close(block.attn.relative_position_bias_table, torch.full((49, 6), 0.25))
        assert torch.equal(block.attn.relative_position_index, relative_position_index(4))
    middle = small.state_dict()[first][12], large.state_dict()[first][24]
    torch.testing.assert_close(*middle)  # the offset 0 stays where it is
    with pytest.raises(CheckpointError, match="do not fit"):
        load_weights(build(max_width=16), small.state_dict())


# -- training ----------------------------------------------------------------------------------------------------------------


def test_stochastic_depth_rises_linearly_and_is_off_in_eval_mode():
    images = pixels(8, 3, 16, 16)
    net, plain = build(drop_path=0.4), build()
    rates = [block.drop_path for block in net.blocks]
    assert rates == pytest.approx([0.4 * index / 8 for index in range(9)])
    assert torch.equal(net(image=images).pooled, plain(image=images).pooled)
    torch.manual_seed(0)
    assert not torch.allclose(net.train()(image=images).pooled, plain(image=images).pooled, atol=1e-3)


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(drop_path):
    images, subnet = pixels(4, 3, 16, 16), Subnet(8, 2)
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
    ids = SHARED.layer_ids()
    assert ids["mask_token"] == ids["patch_embed.norm.bias"] == 0 and ids["stages.0.blocks.0.mlp.fc1.weight"] == 1
    assert ids["stages.0.downsample.norm.weight"] == ids["stages.1.blocks.0.attn.qkv.bias"] == 2
    assert ids["stages.2.downsample.reduction.weight"] == ids["stages.3.blocks.0.norm1.weight"] == 8
    assert ids["stages.3.blocks.1.norm1.weight"] == 9 == SHARED.feature_info.layers and "norms.3.weight" not in ids
    plain = SHARED.extract(Subnet(8, 2)).layer_ids()
    assert plain["stages.3.blocks.1.norm1.weight"] == 7


def test_hidden_tokens_are_those_of_the_enlarged_map():
    tokens = pixels(3, 2 * 3, 5)
    features = Features(tokens={"image": tokens}, grid={"image": (2, 3)})
    mask = pixels(3, 4 * 6) > 0
    enlarged = F.interpolate(tokens.transpose(1, 2).unflatten(2, (2, 3)), scale_factor=2, mode="nearest").flatten(2).transpose(1, 2)
    assert torch.equal(hidden_tokens(features, mask.flatten().nonzero().flatten(), (4, 6)), enlarged[mask])
    same = pixels(3, 6) > 0
    assert torch.equal(hidden_tokens(features, same.flatten().nonzero().flatten(), (2, 3)), tokens[same])
