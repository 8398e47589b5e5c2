"""Wrapped networks against the libraries they come from."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
from PIL import Image as Pillow

from okavango.models import wrapped
from okavango.models.backbone import ArgumentError, create_model
from okavango.models.channels import adapt_channels
from okavango.models.expectations import imagenet
from okavango.models.features import Subnet
from okavango.models.lora import merge_lora
from okavango.models.preprocess import Preprocess
from okavango.models.wrapped import WrappedError

TIMM = [
    ("test_vit", 32),
    ("test_vit3", 32),
    ("vit_tiny_patch16_224", 64),
    ("deit_tiny_distilled_patch16_224", 32),
    ("test_vit_relpos", 32),
    ("test_resnet", 64),
    ("test_convnext", 64),
    ("test_efficientnet", 64),
    ("test_mambaout", 64),
    ("swin_s3_tiny_224", 56),
    ("mobilenetv3_small_050", 64),
    ("levit_128s", None),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """Names of small open_clip models: a transformer, a ResNet and a timm tower."""
    folder = tmp_path_factory.mktemp("clip")
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    towers = {
        "tiny-vit": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
        "tiny-late-norm": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8,
                           "final_ln_after_pool": True},
        "tiny-pool": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "attentional_pool": True,
                      "attn_pooler_heads": 2, "attn_pooler_queries": 4},
        "tiny-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "patch_size": None},
        "tiny-timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
    }  # fmt: skip
    for name, vision in towers.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 48, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)
    return list(towers)


def grid_of(model, images):
    return tuple(-(-side // model.feature_info.strides[-1]) for side in images.shape[-2:])


@pytest.mark.parametrize("name, size", TIMM)
def test_timm_pooled_and_tokens_are_the_librarys(name, size):
    model = create_model(f"timm/{name}", image_size=size)
    images = torch.randn(2, 3, *model.preprocess["image"].size)
    with torch.no_grad():
        features, plain = model(image=images, layers=(0, -1)), model(image=images)
        final = model.trunk.forward_features(images)
        pooled = model.trunk.forward_head(final, pre_logits=True)
        stages = model.trunk.forward_intermediates(images, intermediates_only=True)
    assert torch.equal(features.pooled, pooled) and torch.equal(plain.pooled, pooled) and not plain.layers
    info = model.feature_info
    assert pooled.shape[1] == info.channels and len(stages) == info.layers
    for index in (0, info.layers - 1):
        layer = features.layers[index]
        assert torch.equal(layer.tokens["image"], stages[index].flatten(2).transpose(1, 2))
        assert layer.grid["image"] == tuple(stages[index].shape[-2:]) and stages[index].shape[1] == info.layer_channels[index]
    if len(set(info.strides)) == 1:
        assert features.maps is None and features.grid["image"] == grid_of(model, images)
        assert torch.equal(
            torch.cat([features.prefix, features.tokens["image"]], 1) if info.prefix else features.tokens["image"], final
        )
    else:
        assert all(torch.equal(a, b) for a, b in zip(features.maps, stages, strict=True)) and features.strides == info.strides
        assert bool(features.tokens) == (name in ("swin_s3_tiny_224", "levit_128s", "test_mambaout"))


def test_weights_carry_over_from_plain_timm():
    plain = timm.create_model("test_vit", num_classes=0).eval()
    model = create_model("timm/test_vit")
    model.trunk.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(model(image=images).pooled, plain(images))


def test_one_pass_only():
    for name in ("timm/test_vit", "timm/test_convnext", "torchvision/resnet18"):
        model = create_model(name, image_size=64)
        calls = []
        first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(image=torch.randn(1, 3, 64, 64), layers=(0, -1))
        assert len(calls) == 1


TORCHVISION = [("resnet18", 64), ("mobilenet_v3_small", 64), ("regnet_y_400mf", 64), ("vit_b_32", 64), ("swin_t", 64)]


@pytest.mark.parametrize("name, size", TORCHVISION)
def test_torchvision_pooled_is_the_input_of_the_last_linear(name, size):
    model = create_model(f"torchvision/{name}", image_size=size)
    options = {"image_size": size} if name.startswith("vit") else {}
    plain = torchvision.models.get_model(name, weights=None, **options).eval()
    plain.load_state_dict(model.trunk.state_dict(), strict=False)
    linear = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)][-1]
    caught = []
    linear.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        plain(images)
        features = model(image=images, layers=(1,))
    assert torch.equal(features.pooled, caught[0])
    info = model.feature_info
    assert features.layers[1].tokens["image"].shape[-1] == info.layer_channels[1]
    if name.startswith("vit"):
        assert features.maps is None and features.prefix.shape == (2, 1, 768) and features.grid == {"image": (2, 2)}
        assert torch.equal(features.prefix[:, 0], features.pooled)
    else:
        assert [m.shape[1] for m in features.maps] == list(info.layer_channels)
        assert [size // m.shape[2] for m in features.maps] == list(info.strides)
    if name == "swin_t":
        torch.testing.assert_close(features.tokens["image"].mean(1), features.pooled)
    if name == "resnet18":
        assert torch.equal(features.maps[-1].mean((2, 3)), features.pooled) and not features.tokens


@pytest.mark.parametrize("index", range(5))
def test_open_clip_pooled_is_the_image_embedding(tiny_clip, index):
    name = tiny_clip[index]
    model = create_model(f"open_clip/{name}")
    plain = open_clip.create_model(name).eval()
    plain.visual.load_state_dict(model.trunk.state_dict())
    images = torch.randn(2, 3, *model.preprocess["image"].size)
    with torch.no_grad():
        features = model(image=images, layers=(0,))
        assert torch.equal(features.pooled, plain.encode_image(images))
        if name == "tiny-vit":
            pooled, tokens = plain.visual._pool(plain.visual.transformer(plain.visual._embeds(images)))
            torch.testing.assert_close(features.tokens["image"], tokens)
            torch.testing.assert_close(features.prefix[:, 0], pooled)
    assert features.pooled.shape == (2, 48) and set(features.layers) == {0}
    assert bool(features.tokens) == (name not in ("tiny-pool", "tiny-resnet"))
    assert (features.maps is not None) == (name == "tiny-resnet")


def test_open_clip_takes_another_size(tiny_clip):
    for name in ("tiny-vit", "tiny-resnet", "tiny-timm"):
        model = create_model(f"open_clip/{name}", image_size=96)
        assert model.preprocess["image"].size == (96, 96)
        assert model(image=torch.randn(1, 3, 96, 96)).pooled.shape == (1, 48)


def test_open_clip_takes_other_bands(tiny_clip):
    spec = imagenet("so2sat_random", ("B02", "B03", "B04", "B08")).array()
    for name in tiny_clip:
        model = create_model(f"open_clip/{name}")
        size = model.preprocess["image"].size
        wide = adapt_channels(model, dataclasses.replace(spec, size=size), "average")
        images = torch.randn(2, 3, *size)
        grey, four = (images.mean(1, keepdim=True).expand(-1, count, -1, -1) for count in (3, 4))  # only the sum of filters counts
        with torch.no_grad():
            torch.testing.assert_close(wide(image=four).pooled, model(image=grey).pooled, rtol=1e-3, atol=1e-4)


# -- preprocess -------------------------------------------------------------------------------------------------------------


def photo(height, width):
    """Smooth random colours: a photograph's spectrum, so that resampling differs little between two correct programs."""
    small = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Pillow.fromarray(small).resize((width, height), Pillow.Resampling.BICUBIC)


def assert_same_pixels(ours, theirs, std):
    """PIL rounds between its two passes and torch does not, so 8-bit values may differ by 2 levels; most are equal."""
    assert ours.shape == theirs.shape
    levels = (ours - theirs).abs() * torch.tensor(std).view(-1, 1, 1) * 255
    assert levels.max() < 2.01 and levels.mean() < 0.3


@pytest.mark.parametrize(
    "name", ["test_vit", "resnet18.a1_in1k", "convnext_atto.d2_in1k", "vit_tiny_patch16_224.augreg_in21k", "test_nfnet"]
)
@pytest.mark.parametrize("size", [(300, 400), (500, 256)])
def test_timm_preprocess_against_timms_transform(name, size):
    model = create_model(f"timm/{name}")
    config = timm.data.resolve_data_config({}, model=model.trunk)
    picture = photo(*size)
    ours = model.preprocess(image=picture)["image"][0]
    assert_same_pixels(ours, timm.data.create_transform(**config)(picture), config["std"])
    assert (
        model.preprocess["image"].normalise.mean == tuple(config["mean"]) and "timm" in model.preprocess["image"].normalise.origin
    )


def test_open_clip_preprocess_against_its_own(tiny_clip):
    _, _, transform = open_clip.create_model_and_transforms("tiny-vit")
    spec = create_model("open_clip/tiny-vit").preprocess
    picture = photo(304, 400)
    assert_same_pixels(spec(image=picture)["image"][0], transform(picture), spec["image"].normalise.std)


def test_torchvision_preset_against_its_own():
    weights = torchvision.models.ConvNeXt_Tiny_Weights.DEFAULT
    spec = wrapped.torchvision_spec(weights, None, "torchvision/convnext_tiny")
    picture = photo(304, 400)
    assert_same_pixels(Preprocess(image=spec)(image=picture)["image"][0], weights.transforms()(picture), spec.normalise.std)
    assert spec.normalise.origin.endswith("IMAGENET1K_V1")


# -- arguments --------------------------------------------------------------------------------------------------------------


def test_rebuilt_from_its_arguments_it_takes_the_same_weights():
    model = create_model(
        "timm/test_vit", image_size=[32, 48], num_classes=3, lora={"rank": 2, "targets": ["fc1"]}, pretrained=False
    )
    assert model.architecture == "timm/test_vit" and "pretrained" not in model.arguments
    again = create_model(model.architecture, **json.loads(json.dumps(model.arguments)))
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(model(image=images).pooled, again(image=images).pooled)
    assert again.preprocess == model.preprocess and model.preprocess["image"].size == (32, 48)


def test_vit_takes_other_sizes_and_names_the_rule():
    model = create_model("timm/test_vit")
    assert model(image=torch.randn(1, 3, 48, 80)).grid == {"image": (3, 5)}
    with pytest.raises(WrappedError, match="multiples of 16"):
        model(image=torch.randn(1, 3, 50, 80))
    swin = create_model("timm/swin_tiny_patch4_window7_224", image_size=56)  # pads its windows
    assert swin(image=torch.randn(1, 3, 64, 96)).grid == {"image": (2, 3)}
    fixed = create_model("timm/levit_128s")
    with pytest.raises(WrappedError, match=r"image_size=\(64, 64\)"):
        fixed(image=torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("timm/test_vti", {}, "did you mean 'test_vit"),
        ("torchvision/resnet19", {}, "did you mean 'resnet1"),
        ("open_clip/ViT-B-23", {}, "did you mean 'ViT-B-32"),
        ("tim/test_vit", {}, "did you mean 'timm'"),
        ("timm/test_vit", {"imagesize": 32}, "did you mean 'image_size'"),
        ("timm/test_vit", {"image_size": (1, 2, 3)}, "height, width"),
        ("timm/test_vit", {"lora": {"rang": 4}}, "did you mean 'rank'"),
        ("timm/test_resnet", {"lora": 4}, "name others by targets"),
        ("timm/eva02_tiny_patch14_224", {"lora": 4}, "has no effect on 12 of 48 layers"),
        ("torchvision/squeezenet1_0", {}, "no known trunk"),
        ("torchvision/resnet18", {"pretrained": "IMAGENET1K_V7"}, "did you mean 'IMAGENET1K_V1'"),
        ("torchvision/vit_b_32", {"image_size": (64, 32)}, "square"),
        ("open_clip/ViT-B-32", {"pretrained": True}, "ambiguous; name one of"),
    ],
)
def test_mistakes_are_one_clear_line(name, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_model(name, **arguments)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    def offline(*_, **options):
        assert options.get("pretrained") or options.get("weights")
        raise OSError("cannot reach the server\nlong trace")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torchvision.models, "get_model", offline)
    for name in ("timm/test_vit", "torchvision/resnet18"):
        with pytest.raises(WrappedError, match=r"could not be loaded \(cannot reach the server\)") as caught:
            create_model(name, pretrained=True)
        assert "\n" not in str(caught.value)


def test_pretrained_file_is_loaded_by_timm(tmp_path):
    donor = timm.create_model("test_vit", num_classes=7)
    timm_file = tmp_path / "weights.safetensors"
    from safetensors.torch import save_file

    save_file(donor.state_dict(), timm_file)
    model = create_model("timm/test_vit", pretrained=str(timm_file))
    assert torch.equal(model.trunk.blocks[0].attn.qkv.weight, donor.blocks[0].attn.qkv.weight)
    small = create_model("timm/test_vit", pretrained=str(timm_file), image_size=32)
    assert small.trunk.pos_embed.shape[1] == 5


@pytest.mark.parametrize("option", ["present", "token_mask", "subnet"])
def test_controls_that_it_lacks_are_refused(option):
    model = create_model("timm/test_vit", image_size=32)
    with pytest.raises(WrappedError, match=f"takes no {option}"):
        model({"image": torch.randn(1, 3, 32, 32)}, **{option: Subnet(1, 1)})


# -- training ---------------------------------------------------------------------------------------------------------------


def test_frozen_trunk_stays_in_eval_mode_and_the_classifier_learns():
    model = create_model("timm/test_resnet", image_size=64, frozen=True, num_classes=4).train()
    assert model.training and not any(m.training for m in model.trunk.modules())
    before = {k: v.clone() for k, v in model.trunk.state_dict().items()}
    logits = model.logits(model(image=torch.randn(2, 3, 64, 64)))
    assert logits.shape == (2, 4)
    logits.sum().backward()
    assert model.classifier.weight.grad is not None and not any(p.requires_grad for p in model.trunk.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.trunk.state_dict().items())
    with pytest.raises(WrappedError, match="num_classes"):
        create_model("timm/test_resnet").logits(None)


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/swin_s3_tiny_224", "open_clip/tiny-vit"])
def test_lora_starts_as_the_base_learns_and_merges(name, tiny_clip):
    size = 56 if "swin" in name else 32
    plain = create_model(name, image_size=size)
    model = create_model(name, image_size=size, lora={"rank": 2, "alpha": 4, "dropout": 0.5})
    own = {k.replace(".base_layer", ""): k for k in model.state_dict() if "lora_" not in k}
    model.load_state_dict({own[k]: v for k, v in plain.state_dict().items()}, strict=False)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model(image=images).pooled, plain(image=images).pooled)
        for key, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in key)
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    model.train()
    assert not any(m.training for m in model.trunk.modules() if isinstance(m, torch.nn.LayerNorm))
    assert any(m.training for k, m in model.trunk.named_modules() if k.endswith("lora_dropout"))
    model.eval()
    adapted = model(image=images).pooled
    assert not torch.allclose(adapted, plain(image=images).pooled, atol=1e-3)
    adapted.sum().backward()
    assert all((p.grad is not None and p.grad.abs().sum() > 0) for k, p in model.named_parameters() if "lora_" in k)
    merge_lora(model)
    assert set(model.state_dict()) == set(plain.state_dict()) and "lora" not in model.arguments
    torch.testing.assert_close(model(image=images).pooled, adapted, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ArgumentError, match="no lora"):
        merge_lora(model)


@pytest.mark.parametrize(
    "name", ["timm/test_vit", "timm/test_resnet", "timm/swin_s3_tiny_224", "torchvision/resnet18", "open_clip/tiny-resnet"]
)
def test_layer_ids_grow_from_input_to_output(name, tiny_clip):
    model = create_model(name, image_size=56 if "swin" in name else 64)
    ids, info = model.layer_ids(), model.feature_info
    assert set(ids) <= {n for n, _ in model.named_parameters()}
    assert max(ids.values()) == info.layers
    known = {
        "timm/test_vit": {
            "trunk.pos_embed": 0,
            "trunk.cls_token": 0,
            "trunk.blocks.0.norm1.weight": 1,
            "trunk.blocks.5.mlp.fc2.bias": 6,
        },
        "timm/test_resnet": {"trunk.layer1.0.conv1.weight": 2, "trunk.layer4.0.conv1.weight": 5},
        "timm/swin_s3_tiny_224": {"trunk.patch_embed.proj.weight": 0, "trunk.layers.0.blocks.0.norm1.weight": 1},
        "torchvision/resnet18": {"trunk.conv1.weight": 0, "trunk.layer1.0.conv1.weight": 1, "trunk.layer4.1.bn2.bias": 4},
        "open_clip/tiny-resnet": {"trunk.conv1.weight": 0, "trunk.layer4.0.conv1.weight": 4},
    }[name]
    assert {key: ids[key] for key in known} == known
