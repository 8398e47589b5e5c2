"""The elastic ResNet against tensors recorded from the published POA code. Sizes and seeds are read from the fixtures."""

from __future__ import annotations

import json

import pytest
import torch

from okavango.models.backbone import create_model
from okavango.models.elastic import kept_blocks
from okavango.models.elastic_resnet import ElasticResNet, rows
from okavango.models.features import Subnet
from okavango.pretrain.objectives.poa import POA
from okavango.pretrain.settings import POASettings
from okavango.zoo.poa import from_official, to_official

BACKBONE = 1e-4


def build(config: dict) -> ElasticResNet:
    model, widths = config["model"], [stages[0] for stages in config["enumeration"]["widths"]]
    return create_model(
        "elastic_resnet",
        image_size=model["img_size"],
        min_width=widths[0],
        max_width=widths[-1],
        width_step=widths[1] - widths[0],
        min_depths=model["min_depths"],
        max_depths=model["max_depths"],
        stem_channels=model["stem_channels"],
        out_channels=4 * model["base_channels"],
        groups=model["num_gn_groups"],
        mask_stride=32 // model["ibot_scale_factor"],
    )


def subnet_of(entry: dict) -> Subnet:
    return Subnet(entry["mid_channels"][0], tuple(entry["depths"]))


def loaded(fixture) -> ElasticResNet:
    net = build(fixture.config()).eval()
    net.load_state_dict(from_official(fixture.weights()))
    return net


def test_poa_resnet(recorded):
    fixture = recorded("poa", "resnet/io")
    config, net = fixture.config(), loaded(fixture)
    assert to_official(net.state_dict()).keys() == fixture.weights().keys()
    enumeration, pool = config["enumeration"], net.sampling_pool()
    assert [[width << stage for stage in range(4)] for width in net.widths] == enumeration["widths"]
    assert len(pool) == enumeration["num_pool_entries"]
    assert [list(depth) for depth in dict.fromkeys(subnet.depth for subnet in pool)] == enumeration["depths"]
    active = json.loads((fixture.folder / "extracted_shapes.json").read_text())
    times = config["model"]["ibot_scale_factor"]
    masks = fixture.input("masks").bool()
    for entry in config["nets"]:
        tag, subnet = entry["tag"], subnet_of(entry)
        assert str(subnet) == tag
        for stage, depth in enumerate(subnet.depth):
            assert list(kept_blocks(depth, config["model"]["max_depths"][stage])) == entry["block_idx"][stage]
        plain = net.extract(subnet)
        trunk = to_official({name.replace("bn", "norm"): tensor for name, tensor in plain.trunk.state_dict().items()})
        shapes = {name: list(tensor.shape) for name, tensor in trunk.items()}
        assert shapes == {name: shape for name, shape in active[tag].items() if name != "mask_token"}
        for kind in ("global", "masked", "local"):
            images = fixture.input("images_global" if kind == "masked" else f"images_{kind}")
            with torch.no_grad():
                token_mask = {"image": masks} if kind == "masked" else None
                features = net(image=images, token_mask=token_mask, subnet=subnet)
                extracted = features if kind == "masked" else plain(image=images)
            fixture.compare(f"{tag}/{kind}/x_norm_clstoken", features.pooled, BACKBONE)
            repeated = features.maps[-1].repeat_interleave(times, 2).repeat_interleave(times, 3)
            fixture.compare(f"{tag}/{kind}/x_norm_patchtokens", rows(repeated), BACKBONE)
            fixture.compare(f"{tag}/{kind}/x_prenorm", features.tokens["image"], BACKBONE)
            assert torch.allclose(extracted.pooled, features.pooled, atol=1e-5)
            for ours, theirs in zip(extracted.maps, features.maps, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)
            if kind == "global":
                for stage, stage_map in enumerate(features.maps):
                    fixture.compare(f"{tag}/stage{stage}/tokens", rows(stage_map), BACKBONE)
                    fixture.compare(f"{tag}/stage{stage}/mean", stage_map.mean((2, 3)), BACKBONE)
                means = torch.cat([stage_map.mean((2, 3)) for stage_map in features.maps[1:]], 1)
                fixture.compare(f"{tag}/multistage", means, BACKBONE)


def test_poa_resnet_real_sizes(parity_root):
    """Tables of the real wide ResNet-152: pool, kept blocks, key shapes and learning-rate factors, on the meta device."""
    root = parity_root / "poa"
    enumeration = json.loads((root / "enumeration.json").read_text())["resnet"]
    official = json.loads((root / "official_keys.json").read_text())["resnet152_wide_intact"]
    table = json.loads((root / "param_groups.json").read_text())["resnet"]
    with torch.device("meta"):
        net = create_model("elastic_resnet_152")
        objective = POA(net, POASettings(layer_decay=table["layerwise_decay"]), steps=692)
    pool = net.sampling_pool()
    assert len(pool) == enumeration["pool_entries"] and len(net.list_subnets()) == enumeration["distinct"]
    assert [[width << stage for stage in range(4)] for width in net.widths] == enumeration["widths"]
    assert [list(depth) for depth in dict.fromkeys(subnet.depth for subnet in pool)] == enumeration["depths"]
    for depth, count in enumeration["multiplicity_by_depth_tuple"]:
        assert all(pool.count(Subnet(width, tuple(depth))) == count for width in net.widths)
    widths, depths = enumeration["intact"]
    assert pool[enumeration["intact_id"]] == net.intact == Subnet(widths[0], tuple(depths))
    for stage, by_depth in enumeration["block_idx"].items():
        for depth, blocks in by_depth.items():
            assert list(kept_blocks(int(depth), net.intact.depth[int(stage.removeprefix("stage")) - 1])) == blocks
    shapes = {name: list(tensor.shape) for name, tensor in to_official(objective.teacher.state_dict()).items()}
    assert shapes == official["keys"]
    assert sum(p.numel() for p in net.parameters()) == official["backbone_params"]
    ours = {}
    for group in objective.param_groups():
        for name in to_official({name: torch.tensor(0) for name, _ in group["params"]}):
            ours[name.removeprefix("student.")] = [group["lr_mult"], group["wd_mult"], group["start_step"] > 0]
    assert ours.keys() == table["params"].keys()
    for name, row in table["params"].items():
        assert ours[name] == pytest.approx(row, rel=1e-9), name
