"""Every architecture of the library, and some of other libraries, keep every promise that `okavango.testing` knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from okavango.models.backbone import Backbone, architectures, create_model
from okavango.models.features import Subnet
from okavango.recipes import named
from okavango.testing import check_backbone, check_objective, example_inputs

ELASTIC = {
    "image_size": 32,
    "patch_size": 8,
    "min_width": 16,
    "max_width": 32,
    "width_step": 16,
    "min_depth": 1,
    "max_depth": 2,
    "head_dim": 16,
}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "window": 4,
    "min_width": 8,
    "max_width": 16,
    "width_step": 8,
    "depths": (1, 1, 3, 1),
    "min_depth": 2,
    "head_dim": 8,
    "mask_stride": 8,
}
ELASTIC_RESNET = {
    "image_size": 32,
    "min_width": 4,
    "max_width": 8,
    "width_step": 4,
    "min_depths": (1, 1, 1, 1),
    "max_depths": (1, 2, 2, 1),
    "stem_channels": 8,
    "out_channels": 16,
    "groups": 2,
}
PLAIN_RESNET = {"image_size": 32, "width": 4, "depths": (1, 2, 1, 1), "stem_channels": 8, "out_channels": 16, "groups": 2}
PLAIN = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "head_dim": 16}
BM_MAE = {"modalities": ("t1", "flair"), "size": 16, "patch_size": 8, "width": 24, "depth": 2, "heads": 2, "mlp": 32}
SELAVPR = {"image_size": 28, "width": 32, "depth": 1, "head_dim": 16, "table_size": 42}
# Arguments that make an architecture small enough for a test; true sizes are looked at on the meta device below.
NATIVE: dict[str, dict] = {
    "elastic_vit": ELASTIC,
    "elastic_vit_tiny": {},
    "elastic_vit_small": ELASTIC,
    "elastic_vit_base": ELASTIC,
    "elastic_vit_large": {**ELASTIC, "channels": 1},
    "vit": PLAIN,
    "elastic_swin": SWIN,
    "elastic_swin_tiny": {"depths": (1, 1, 3, 1), "min_depth": 2},
    "elastic_swin_small": {**SWIN, "depths": (1, 1, 2, 1)},
    "elastic_swin_base": {**SWIN, "depths": (1, 1, 2, 1), "channels": 1},
    "swin": {
        "image_size": 24,
        "patch_size": 2,
        "window": 4,
        "width": 8,
        "embed_width": 16,
        "head_dim": 8,
        "blocks": ("n", "s", "nss", "n"),
    },
    "elastic_resnet": ELASTIC_RESNET,
    "elastic_resnet_tiny": {"image_size": 32},
    "elastic_resnet_50": {**ELASTIC_RESNET, "channels": 1},
    "elastic_resnet_152": ELASTIC_RESNET,
    "resnet": PLAIN_RESNET,
    "bm_mae": BM_MAE,
    "bm_mae_tiny": {**BM_MAE, "modalities": ("t2", "pet", "t1"), "depth": 1, "class_token": False},
    "adapted": {"backbone": "elastic_vit", "backbone_args": ELASTIC, "pool": "gem", "local": (8, 4)},
    "selavpr": {**SELAVPR, "registers": 4},
    "selavpr_vit_small": SELAVPR,
    "selavpr_vit_base": {**SELAVPR, "pool": "mean", "local": ()},
    "selavpr_vit_large": {**SELAVPR, "adapt": {"kind": "lora", "rank": 2}},
}
WRAPPED: dict[str, dict] = {
    "timm/test_vit": {"image_size": 32},
    "timm/test_resnet": {"image_size": 64},
    "timm/test_convnext": {"image_size": 64, "num_classes": 3},
    "torchvision/resnet18": {"image_size": 64},
    "open_clip/okavango-smallest": {},
}
RULES = ["declarations", "shapes", "deterministic", "batch_independent", "layers", "unknown_modality", "backward"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def smallest_clip(tmp_path_factory):
    """An image-text model with one block and 48 dimensions, known to open_clip by name."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    (folder / "okavango-smallest.json").write_text(json.dumps({"embed_dim": 48, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)


def builder(name: str, arguments: dict) -> Callable[[], Backbone]:
    return lambda: create_model(name, **arguments)


def test_no_architecture_is_left_out():
    assert set(NATIVE) == set(architectures()), "a new architecture: give it small arguments here"
    assert len({name.partition("/")[0] for name in WRAPPED}) == 3 and len(WRAPPED) >= 5


# elastic_swin and selavpr with other defaults: nothing new, and half a minute each
REPEATED = ("elastic_swin_small", "elastic_swin_base", "selavpr_vit_base", "selavpr_vit_large")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in REPEATED else []) for name in [*NATIVE, *WRAPPED]]
)
def test_architectures(name, tmp_path, smallest_clip):
    checked = check_backbone(builder(name, {**NATIVE, **WRAPPED}[name]), tmp=tmp_path)
    assert checked == [*RULES, *(["subnets"] if name.startswith(("elastic", "adapted")) else []), "checkpoint", "export"]


def test_an_extracted_model_is_a_backbone_like_any_other(tmp_path):
    for build in (
        lambda: create_model("elastic_vit", **ELASTIC).extract(Subnet(16, 2)),
        lambda: create_model("elastic_swin", **SWIN).extract(Subnet(8, (1, 1, 2, 1))),
        lambda: create_model("elastic_resnet", **ELASTIC_RESNET).extract(Subnet(4, (1, 2, 1, 1))),
        lambda: create_model("adapted", **NATIVE["adapted"]).extract(Subnet(16, 2)),
    ):
        assert check_backbone(build, tmp=tmp_path, export=False) == [*RULES, "checkpoint"]


def test_other_image_sizes():
    assert "subnets" in check_backbone(builder("elastic_vit", ELASTIC), sizes={"image": (24, 40)}, export=False)
    assert "layers" in check_backbone(builder("vit", PLAIN), sizes={"image": (24, 40)}, export=False)
    assert "subnets" in check_backbone(builder("elastic_swin", SWIN), sizes={"image": (22, 34)}, export=False)
    assert "subnets" in check_backbone(builder("elastic_resnet", ELASTIC_RESNET), sizes={"image": (27, 41)}, export=False)


# name -> widths, depths, number of subnets, parameters of the intact network. ViT-S/16, B/16 and L/16 without a classifier have
# 21,665,664, 85,798,656 and 303,301,632; ours have two layer scales a block and a mask token more.
TRUE_SIZES = {
    "elastic_vit_small": ((192, 384), (6, 12), 28, 21_665_664 + 12 * 2 * 384 + 384),
    "elastic_vit_base": ((384, 768), (8, 12), 35, 85_798_656 + 12 * 2 * 768 + 768),
    "elastic_vit_large": ((384, 1024), (12, 24), 143, 303_301_632 + 24 * 2 * 1024 + 1024),
}


@pytest.mark.parametrize("name", TRUE_SIZES)
def test_true_sizes_on_the_meta_device(name):
    (low, high), (shallow, deep), count, parameters = TRUE_SIZES[name]
    with torch.device("meta"):
        model = create_model(name).eval()
    subnets = model.list_subnets()
    assert len(subnets) == count and min(subnets) == Subnet(low, shallow) and max(subnets) == Subnet(high, deep)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    info = model.feature_info
    assert (info.channels, info.layers, info.strides) == (high, deep, (16,) * deep)
    images = example_inputs(model, 2)["image"].to("meta")
    assert images.shape == (2, 3, 224, 224)
    for subnet in (None, Subnet(low, shallow)):
        features = model(image=images, subnet=subnet, layers=(-1,))
        width = high if subnet is None else low
        assert features.pooled.shape == (2, width) and features.tokens["image"].shape == (2, 196, width)
        assert features.grid == {"image": (14, 14)}
        assert set(features.layers) == {(deep if subnet is None else shallow) - 1}


# name -> widths, depths of the third stage, number of subnets, parameters of the intact network: Swin-S and Swin-B without a
# classifier have 48,837,258 and 86,743,224; ours have heads of 16 channels instead of 32, so twice the position biases (169 x heads
# of all blocks), three norms of stages and a mask token more.
TRUE_SWINS = {
    "elastic_swin_small": ((64, 96), (6, 18), 39, 48_837_258 + 169 * 3 * (2 + 2 * 2 + 18 * 4 + 2 * 8) + 2 * 7 * 96 + 96),
    "elastic_swin_base": ((96, 128), (6, 18), 39, 86_743_224 + 169 * 4 * (2 + 2 * 2 + 18 * 4 + 2 * 8) + 2 * 7 * 128 + 128),
}


@pytest.mark.parametrize("name", TRUE_SWINS)
def test_true_sizes_of_swins_on_the_meta_device(name):
    (low, high), (shallow, deep), count, parameters = TRUE_SWINS[name]
    with torch.device("meta"):
        model = create_model(name).eval()
    subnets = model.list_subnets()
    smallest, largest = Subnet(low, (2, 2, shallow, 2)), Subnet(high, (2, 2, deep, 2))
    assert len(subnets) == count and min(subnets) == smallest and max(subnets) == largest
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (model.feature_info.channels, model.feature_info.layers) == (8 * high, deep + 6)
    images = example_inputs(model, 2)["image"].to("meta")
    for subnet, width in ((None, high), (smallest, low)):
        features = model(image=images, subnet=subnet, token_mask={"image": torch.zeros(2, 196, dtype=torch.bool, device="meta")})
        assert features.pooled.shape == (2, 8 * width) and features.grid == {"image": (7, 7)}
        assert [tuple(each.shape[1:]) for each in features.maps] == [(width * 2**s, 56 // 2**s, 56 // 2**s) for s in range(4)]


# name -> widths, least and greatest depths, number of subnets, parameters of the intact network. The wide ResNet-152 has twice the
# usual width inside its blocks; the other intact network is the usual ResNet-50 and a mask token.
TRUE_RESNETS = {
    "elastic_resnet_50": ((32, 64), ((3, 2, 2, 3), (3, 4, 6, 3)), 45, 23_508_032 + 64),
    "elastic_resnet_152": ((64, 128), ((3, 4, 6, 3), (3, 8, 36, 3)), 465, 172_609_408),
}


@pytest.mark.parametrize("name", TRUE_RESNETS)
def test_true_sizes_of_resnets_on_the_meta_device(name):
    (low, high), (shallow, deep), count, parameters = TRUE_RESNETS[name]
    with torch.device("meta"):
        model = create_model(name).eval()
    subnets = model.list_subnets()
    smallest, largest = Subnet(low, shallow), Subnet(high, deep)
    assert len(subnets) == count and min(subnets) == smallest and max(subnets) == largest
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (model.feature_info.channels, model.feature_info.layers) == (2048, sum(deep))
    images = example_inputs(model, 2)["image"].to("meta")
    for subnet in (None, smallest):
        features = model(image=images, subnet=subnet, token_mask={"image": torch.zeros(2, 196, dtype=torch.bool, device="meta")})
        assert features.pooled.shape == (2, 2048) and features.grid == {"image": (7, 7)}
        assert [tuple(each.shape[1:]) for each in features.maps] == [(256 * 2**s, 56 // 2**s, 56 // 2**s) for s in range(4)]


# -- objectives ---------------------------------------------------------------------------------------------------------------


def pictures(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randint(0, 256, (3, 28 + i, 30), generator=generator, dtype=torch.uint8), "id": str(i), "label": i % 2}
        for i in range(count)
    ]


OBJECTIVES = {
    "poa": ("poa_tiny", {}, 0),
    "poa before patches are masked": ("poa_tiny", {"ibot_start": 0.5}, 0),
    "poa after patches are masked": ("poa_tiny", {}, 10),
    "poa with softmax centring": ("poa_tiny", {"centering": "softmax"}, 10),
    "poa without patches, crops or a shared view": ("poa_tiny", {"ibot": False, "koleo": 0.0, "same_view": False}, 0),
    "poa as in the paper": ("poa_tiny", {"pair_weights": "crops", "koleo_rule": "sum"}, 10),
    "poa on a Swin": ("poa_swin_tiny", {}, 10),
    "poa on a Swin before patches are masked": ("poa_swin_tiny", {"ibot_start": 0.5}, 0),
    "poa on a ResNet": ("poa_resnet_tiny", {}, 10),
    "poa on a ResNet before patches are masked": ("poa_resnet_tiny", {"ibot_start": 0.5}, 0),
    "dinov2": ("poa_tiny", {"elastic": False}, 10),
    "dinov2 by its recipe": ("dinov2_tiny", {}, 0),
}
OBJECTIVE_RULES = ["exports", "transform", "collate", "param_groups", "clip_groups", "forward", "backward", "after_step"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_self_distillation(name):
    recipe, changes, step = OBJECTIVES[name]
    recipe = named(recipe, "pretrain")
    settings = replace(recipe.objective, **changes)
    settings.check()
    objective = settings.build(create_model(recipe.model, **recipe.model_args), (), recipe.run)
    assert (len(objective.pool) > 0) == settings.elastic
    assert check_objective(objective, pictures(4), step=step) == OBJECTIVE_RULES


@pytest.mark.parametrize("recipe", ["classify", "classify_frozen"])
@pytest.mark.parametrize("architecture", ["elastic_vit_tiny", "vit", "elastic_swin", "elastic_resnet", "timm/test_resnet"])
def test_classifier(recipe, architecture):
    recipe = named(recipe, "finetune")
    backbone = create_model(architecture, **{**NATIVE, **WRAPPED}[architecture])
    objective = recipe.objective.build(backbone, ("even", "odd"), recipe.run)
    assert check_objective(objective, pictures(4)) == OBJECTIVE_RULES
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert (trained == {"head.weight", "head.bias"}) == objective.frozen


@pytest.mark.parametrize("architecture", ["selavpr", "adapted", "vit", "elastic_resnet", "timm/test_resnet"])
@pytest.mark.parametrize("settings", [{}, {"local": False, "mining": "random", "pool": "mean", "last": 1}])
def test_place_recognition(architecture, settings):
    recipe = named("places", "finetune")
    settings = replace(recipe.objective, **settings)
    settings.check()
    run = replace(recipe.run, batch=2)
    objective = settings.build(create_model(architecture, **{**NATIVE, **WRAPPED}[architecture]), (), run)
    groups = [{"images": [sample["image"] for sample in pictures(4)], "id": str(i)} for i in range(2)]
    assert check_objective(objective, groups) == OBJECTIVE_RULES
    frozen = {name for name, parameter in objective.named_parameters() if not parameter.requires_grad}
    assert frozen and all(name.startswith("backbone.backbone.") for name in frozen)
