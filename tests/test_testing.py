"""The conformance checks pass on good backbones and fail, with the right sentence, on each kind of broken one."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from okavango import testing
from okavango.models import backbone as registry
from okavango.models.backbone import Backbone, FeatureInfo, resolve_layers
from okavango.models.elastic_vit import ElasticViT
from okavango.models.features import Features, Layer
from okavango.models.preprocess import Image, Preprocess
from okavango.testing import check_backbone, check_groups, check_objective


class Tiny(Backbone):
    """Patches, two residual blocks, a norm: the smallest backbone that keeps every promise."""

    optional_parameters: tuple[str, ...] = ("mask_token",)

    def __init__(self, width=8):
        super().__init__()
        self.architecture, self.arguments = "tiny_for_tests", {"width": width}
        self.preprocess = Preprocess(image=Image(size=(16, 16)))
        self.feature_info = FeatureInfo(width, 2, (width, width), (8, 8))
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()):
        wanted, kept = resolve_layers(layers, 2), {}
        x = self.patch(inputs["image"])
        grid = {"image": tuple(x.shape[-2:])}
        x = x.flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x = x + block(x).tanh()
            if i in wanted:
                kept[i] = Layer(None, {"image": x}, grid)
        x = self.norm(x)
        return Features(pooled=x.mean(1), tokens={"image": x}, grid=grid, layers=kept)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setitem(registry.ARCHITECTURES, "tiny_for_tests", Tiny)


def test_a_good_backbone_passes_with_export(tmp_path):
    assert check_backbone(Tiny, tmp=tmp_path)[-1] == "export"
    assert list(tmp_path.iterdir()) == []


def test_an_elastic_backbone_passes_by_name_and_its_subnets_are_checked():
    assert "subnets" in check_backbone("elastic_vit_tiny", export=False)


def test_wrapped_networks_pass():
    for name in ("timm/test_vit", "timm/test_resnet", "torchvision/mobilenet_v3_small"):
        check_backbone(lambda name=name: registry.create_model(name, image_size=64, num_classes=2), export=False)


def test_sizes_replace_those_of_the_preprocess():
    inputs = testing.example_inputs(Tiny(), 3, {"image": (24, 32)})
    assert inputs["image"].shape == (3, 3, 24, 32)
    check_backbone(Tiny, sizes={"image": (24, 32)}, export=False)
    with pytest.raises(AssertionError, match="sizes names 'depth'"):
        testing.example_inputs(Tiny(), 1, {"depth": (1, 1)})
    with pytest.raises(ValueError, match="at least 2"):
        check_backbone(Tiny, batch=1)


def mutant(change):
    """A Tiny whose features are changed after the forward."""

    class Mutant(Tiny):
        def forward(self, inputs, **options):
            return change(self, super().forward(inputs, **options), inputs, options)

    return Mutant


def replace(**values):
    return mutant(lambda self, f, inputs, options: dataclasses.replace(f, **{k: v(f) for k, v in values.items()}))


class Undeclared(Tiny):
    def __init__(self):
        super().__init__()
        del self.feature_info


class WrongCounts(Tiny):
    def __init__(self):
        super().__init__()
        self.feature_info = FeatureInfo(8, 2, (8,), (8, 8))


class WrongLayerIds(Tiny):
    def layer_ids(self):
        return {"patch.weight": 0, "blocks.7.weight": 1}


class Stale(Tiny):
    optional_parameters = ("mask_token", "gone")


class Unused(Tiny):
    optional_parameters = ()


class Drops(Tiny):
    """Forgets part of itself in the checkpoint."""

    def __init__(self, width=8):
        super().__init__(width)
        self.shift = torch.randn(width)

    def forward(self, inputs, **options):
        f = super().forward(inputs, **options)
        return dataclasses.replace(f, pooled=f.pooled + self.shift)


class Unregistered(Tiny):
    def __init__(self):
        super().__init__()
        self.architecture = "nobody_knows_this"


class AllModalities(Tiny):
    def __call__(self, inputs=None, **options):
        layers = options.pop("layers", ())
        if not inputs or "image" not in inputs:
            return None
        return self.forward(inputs, layers=layers)


class Centred(Tiny):
    """Its running mean moves in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, inputs, **options):
        f = super().forward(inputs, **options)
        self.seen += f.pooled.detach().mean(0)
        return f


class NotANumber(Tiny):
    def __init__(self):
        super().__init__()
        self.norm.bias.data[0] = float("nan")


BROKEN = {
    "no attribute 'feature_info'": Undeclared,
    "layer_channels has 1 entries": WrongCounts,
    "layer_ids names 'blocks.7.weight'": WrongLayerIds,
    "optional_parameters names 'gone'": Stale,
    "'mask_token' has no gradient": Unused,
    "must be a subclass": lambda: nn.Linear(1, 1),
    "expected Features": mutant(lambda self, f, inputs, options: f.pooled),
    "pooled has shape": replace(pooled=lambda f: f.pooled[:, :4]),
    "6 cells, but there are 4 tokens": replace(grid=lambda f: {"image": (2, 3)}),
    "prefix tokens; feature_info.prefix says 0": replace(prefix=lambda f: f.tokens["image"][:, :1]),
    "maps and strides must both": replace(maps=lambda f: (f.tokens["image"].transpose(1, 2).unflatten(2, (2, 2)),)),
    "map of stride 4 has 2 cells": replace(
        maps=lambda f: (f.tokens["image"].transpose(1, 2).unflatten(2, (2, 2)),), strides=lambda f: (4,)
    ),
    "not finite": NotANumber,
    "differs between two passes": replace(pooled=lambda f: f.pooled + torch.rand(1)),
    "'seen' changed during a pass": Centred,
    "of sample 0 alone differs": replace(pooled=lambda f: f.pooled - f.pooled.mean(0)),
    "none was asked for": replace(layers=lambda f: f.layers or {0: Layer(None, f.tokens, f.grid)}),
    r"returned \[0\]": mutant(
        lambda self, f, i, o: dataclasses.replace(f, layers={k: v for k, v in f.layers.items() if k == 0}) if f.layers else f
    ),
    "changes when layers are asked for": mutant(
        lambda self, f, i, o: dataclasses.replace(f, pooled=f.pooled + 1) if o.get("layers") else f
    ),
    "an unknown modality must raise ValueError": AllModalities,
    "cannot be written and loaded": Unregistered,
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_each_broken_promise_is_named(sentence, monkeypatch):
    build = BROKEN[sentence]
    if isinstance(build, type) and build is not Unregistered:
        monkeypatch.setitem(registry.ARCHITECTURES, "tiny_for_tests", lambda width=8: build())
    with pytest.raises(AssertionError, match=sentence) as caught:
        check_backbone(build, export=False)
    assert "\n" not in str(caught.value).split("; mend")[0]


def test_layers_out_of_range_must_be_refused():
    class Lenient(Tiny):
        def forward(self, inputs, *, layers=(), **options):
            return super().forward(inputs, layers=[i % 2 for i in layers], **options)

    with pytest.raises(AssertionError, match=r"layers=\(2,\) must raise"):
        check_backbone(Lenient, export=False)


def test_a_frozen_parameter_with_a_gradient_is_noticed():
    model = Tiny()
    model.patch.requires_grad_(False)
    testing.check_backward(model, testing.example_inputs(model, 2))
    gradient = torch.zeros_like(model.patch.weight)
    original = copy.deepcopy

    def leaky(value):
        twin = original(value)
        twin.patch.weight.grad = gradient
        return twin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing.copy, "deepcopy", leaky)
        with pytest.raises(AssertionError, match="'patch.weight' is frozen"):
            testing.check_backward(model, testing.example_inputs(model, 2))


def test_weights_that_the_checkpoint_misses_are_noticed(monkeypatch):
    monkeypatch.setitem(registry.ARCHITECTURES, "tiny_for_tests", Drops)
    with pytest.raises(AssertionError, match="saving and loading|cannot be written and loaded"):
        check_backbone(Drops, export=False)


def test_a_fixed_batch_size_is_noticed_on_export():
    class Fixed(Tiny):
        def forward(self, inputs, **options):
            return super().forward({"image": inputs["image"].view(len(inputs["image"]), 3, 16, 16)}, **options)

    with pytest.raises(AssertionError, match="cannot be exported"), testing.tempfile.TemporaryDirectory() as folder:
        testing.check_export(Fixed().eval(), testing.Path(folder))


SMALL = dict(image_size=16, patch_size=8, min_width=16, max_width=32, width_step=16, head_dim=16, min_depth=1, max_depth=2)


@pytest.mark.parametrize(
    "fault, sentence", [("scale", "differs from that of the extracted"), ("share", "shares weights"), ("twice", "one twice")]
)
def test_broken_subnets_are_named(fault, sentence):
    class Broken(ElasticViT):
        def extract(self, subnet):
            model = super().extract(subnet)
            if fault == "scale":
                model.trunk.norm.weight.data *= 1.01
            if fault == "share" and subnet == self.intact:
                model.trunk.norm.weight = self.norm.weight
            return model

        def list_subnets(self):
            return super().list_subnets() * (2 if fault == "twice" else 1)

    torch.manual_seed(0)
    model = Broken(**SMALL).eval()
    with pytest.raises(AssertionError, match=sentence):
        testing.check_subnets(model, testing.example_inputs(model, 2))


# -- objectives -------------------------------------------------------------------------------------------------------------


class Scale:
    def __call__(self, sample, seed):
        noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed))
        return {"image": sample["image"].float() / 255 + noise}


class Stack:
    def __call__(self, samples, seed):
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        return {"image": torch.stack([samples[i]["image"] for i in order.tolist()])}


class Centre(nn.Module):
    """Pulls features to zero; has a teacher."""

    collate = Stack()

    def __init__(self):
        super().__init__()
        self.student, self.head = Tiny(), nn.Linear(8, 2)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def transform(self, preprocess):
        assert "image" in preprocess
        return Scale()

    def forward(self, batch, step):
        loss = self.head(self.student(image=batch["image"]).pooled).square().mean()
        return {"loss": loss, "size": loss.detach()}

    def _named(self):
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def param_groups(self):
        return [{"params": self._named(), "lr_mult": 1.0, "wd_mult": 0.0}]

    def clip_groups(self):
        return [[p for _, p in self._named()]]

    def after_step(self, step):
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)

    def exports(self):
        return {"backbone": (self.teacher, {"objective": "centre"})}


SAMPLES = [{"image": torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)} for _ in range(3)]


def test_a_good_objective_passes():
    assert "after_step" in check_objective(Centre(), SAMPLES)


def broken_objective(**methods):
    return type("Broken", (Centre,), methods)()


class GlobalNoise(Scale):
    def __call__(self, sample, seed):
        return {"image": sample["image"].float() + torch.randn(3, 16, 16)}


class GlobalOrder(Stack):
    def __call__(self, samples, seed):
        return super().__call__(samples, int(torch.randint(10**6, (1,))))


class Unstacked:
    def __call__(self, samples, seed):
        return samples


def nan_after(self, step):
    self.head.weight.data.fill_(float("nan"))


BROKEN_OBJECTIVES = {
    r"exports\(\) is empty": dict(exports=lambda self: {}),
    r"must be \(module, card": dict(exports=lambda self: {"backbone": self.teacher}),
    "pass preprocess=": dict(exports=lambda self: {"head": (self.head, {})}),
    "must be picklable": dict(transform=lambda self, preprocess: lambda sample, seed: sample),
    "transform gives different samples": dict(transform=lambda self, preprocess: GlobalNoise()),
    "collate gives different batches": dict(collate=GlobalOrder()),
    "expected a dict": dict(collate=Unstacked()),
    "dict with 'loss'": dict(forward=lambda self, batch, step: {"los": 0}),
    "scalar tensor": dict(forward=lambda self, batch, step: {"loss": self.head.weight}),
    "the loss is nan": dict(forward=lambda self, batch, step: {"loss": self.head.weight.sum() * float("nan")}),
    "the loss has no gradient": dict(forward=lambda self, batch, step: {"loss": torch.zeros(())}),
    "must be detached": dict(forward=lambda self, batch, step: {"loss": self.head.weight.sum(), "also": self.head.weight.sum()}),
    "not finite after one step": dict(after_step=nan_after),
    "param_groups.. lists the trainable parameter 'head.weight' 0 times": dict(
        param_groups=lambda self: [{"params": [(n, p) for n, p in self._named() if n != "head.weight"]}]
    ),
    "param_groups.. lists the trainable parameter 'head.weight' 2 times": dict(
        param_groups=lambda self: [{"params": [*self._named(), ("head.weight", self.head.weight)]}]
    ),
    "param_groups.. lists a parameter that is frozen": dict(
        param_groups=lambda self: [{"params": [*self._named(), ("teacher.norm.bias", self.teacher.norm.bias)]}]
    ),
    "calls a parameter 'x.": dict(param_groups=lambda self: [{"params": [(f"x.{n}", p) for n, p in self._named()]}]),
    "lr_mult -1": dict(param_groups=lambda self: [{"params": self._named(), "lr_mult": -1}]),
    "clip_groups.. lists": dict(clip_groups=lambda self: [[self.head.weight]]),
}


@pytest.mark.parametrize("sentence", BROKEN_OBJECTIVES)
def test_each_broken_rule_of_an_objective_is_named(sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_objective(broken_objective(**BROKEN_OBJECTIVES[sentence]), SAMPLES)


def test_groups_alone():
    check_groups(Centre())
