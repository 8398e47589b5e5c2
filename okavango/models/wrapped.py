"""Image towers of timm, torchvision and open_clip as backbones: ``timm/NAME``, ``torchvision/NAME``, ``open_clip/NAME``.

Each library builds its own network and keeps its own numbers: `Features.pooled` is bit for bit what the library calls the
features of that network. One pass computes everything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from okavango.models.backbone import Backbone, FeatureInfo, resolve_layers, unknown_name
from okavango.models.features import Features, Layer
from okavango.models.lora import inject_lora
from okavango.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Image, Normalise, Preprocess, Resize

Size = tuple[int, int]

# timm's crop modes and open_clip's resize modes; all others scale the shortest side
_RULES: dict[str, Literal["exact", "pad"]] = {"squash": "exact", "border": "pad", "longest": "pad"}


class WrappedError(ValueError):
    """A foreign network cannot be built or used as asked; the message says what to do."""


def create(library: str, name: str, **arguments: Any) -> Wrapped:
    """Build an image tower of another library.

    Args:
        library: "timm", "torchvision" or "open_clip".
        name: the library's own name, e.g. "vit_small_patch16_224".
        image_size: int or (height, width) in pixels; None takes the library's. Position embeddings are made, or resampled, for it.
        pretrained: False; True for the library's default weights; a tag (timm, open_clip), weights name (torchvision) or path
            (timm, open_clip). The library's own loader fetches them.
        num_classes: size of a new linear `classifier` on the pooled features, see `Wrapped.logits`; 0 for none.
        frozen: the tower's parameters take no gradient and it stays in eval mode.
        lora: rank, or {"rank", "alpha", "dropout", "targets"}: trainable low-rank updates of the linear layers in attention and MLP
            (needs peft); the base is frozen. `alpha` defaults to the rank, `targets` are ends of module names.
    Raises:
        WrappedError: unknown library, name or argument; weights that cannot be fetched; a family that has no known structure.

    Example:
        >>> create("timm", "test_vit", image_size=32).feature_info.channels
        64
    """
    if library not in _LIBRARIES:
        raise WrappedError(unknown_name("library", library, _LIBRARIES))
    defaults = {"image_size": None, "pretrained": False, "num_classes": 0, "frozen": False, "lora": None}
    for key in arguments:
        if key not in defaults:
            raise WrappedError(unknown_name(f"argument of {library}/{name}", key, defaults))
    given = {**defaults, **arguments}
    size = given["image_size"]
    if size is not None:
        size = (size, size) if isinstance(size, int) else tuple(size)
        if len(size) != 2 or min(size) < 1:
            raise WrappedError(f"image_size {given['image_size']!r}: expected pixels or (height, width)")
    model = _LIBRARIES[library](name, size, given["pretrained"])
    model.architecture = f"{library}/{name}"
    # Weights come from the checkpoint when a model is rebuilt, so `pretrained` is not kept.
    model.arguments = {k: v for k, v in given.items() if k != "pretrained" and v != defaults[k]}
    if given["frozen"]:
        model.freeze()
    if given["lora"]:
        inject_lora(model, given["lora"])
    if given["num_classes"]:
        model.classifier = nn.Linear(model.feature_info.channels, given["num_classes"])
        nn.init.trunc_normal_(model.classifier.weight, std=0.02)
        nn.init.zeros_(model.classifier.bias)
    return model.eval()


class Wrapped(Backbone):
    """A foreign image tower (`trunk`) as a backbone.

    Attributes:
        trunk: the library's module.
        classifier: linear layer on `pooled`, or None.
        fixed_size: the only (height, width) that the trunk takes, or None.
        multiple_of: both sides must divide by it.
    """

    def __init__(self, trunk: nn.Module, spec: Image, info: FeatureInfo, fixed_size: Size | None = None, multiple_of: int = 1):
        super().__init__()
        self.multiple_of = multiple_of
        self.trunk, self.preprocess, self.feature_info, self.fixed_size = trunk, Preprocess(image=spec), info, fixed_size
        self.classifier: nn.Linear | None = None
        self.frozen = False

    @property
    def optional_parameters(self) -> tuple[str, ...]:
        """Parameters that have no gradient in a plain forward."""
        return () if self.classifier is None else ("classifier.weight", "classifier.bias")

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> Features:
        """Image (B, 3, H, W) -> features; `layers` are blocks, or stages of a hierarchical network."""
        for option, value in (("present", present), ("token_mask", token_mask), ("subnet", subnet)):
            if value is not None:
                raise WrappedError(f"{self.architecture}: takes no {option}; elastic and masked backbones are in okavango.models")
        images = inputs["image"]
        size = tuple(images.shape[-2:])
        if self.fixed_size and size != self.fixed_size:
            raise WrappedError(
                f"{self.architecture}: made for {self.fixed_size} pixels, got {size}; build it with image_size={size}"
            )
        if size[0] % self.multiple_of or size[1] % self.multiple_of:
            raise WrappedError(f"{self.architecture}: image of {size} pixels; both sides must be multiples of {self.multiple_of}")
        return self._features(images, sorted(set(resolve_layers(layers, self.feature_info.layers))))

    def _features(self, images: Tensor, wanted: Sequence[int]) -> Features:
        raise NotImplementedError

    def logits(self, features: Features) -> Tensor:
        """Class scores (B, num_classes) before the softmax.

        Raises:
            WrappedError: built without `num_classes`.
        """
        if self.classifier is None:
            raise WrappedError(f"{self.architecture}: has no classifier; build it with num_classes=")
        return self.classifier(features.pooled)

    def freeze(self) -> None:
        """Stop gradients of the trunk and keep it in eval mode, whatever `train` says."""
        self.frozen = True
        self.trunk.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Wrapped:
        """As usual, but a frozen trunk stays in eval mode; only LoRA's dropout follows."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
            for name, module in self.trunk.named_modules():
                if name.endswith("lora_dropout"):
                    module.train(mode)
        return self


def _unpack(stage: Tensor | tuple[Tensor, Tensor]) -> Layer:
    """A map (B, C, h, w), or it and its prefix tokens, as a layer."""
    stage, prefix = stage if isinstance(stage, tuple) else (stage, None)
    return Layer(prefix, {"image": stage.flatten(2).transpose(1, 2)}, {"image": tuple(stage.shape[-2:])})


def _fetch(what: str, load: Callable[[], Any]) -> Any:
    """Run a library's loader of pretrained weights; whatever it raises becomes one line."""
    try:
        return load()
    except Exception as error:  # each library, and each of its download clients, raises its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WrappedError(
            f"{what}: the pretrained weights could not be loaded ({reason}); leave pretrained out, or pass a file"
        ) from error


# -- timm -------------------------------------------------------------------------------------------------------------------


class Timm(Wrapped):
    """A timm network.

    One whose blocks all have one stride gives tokens (and prefix tokens); any other gives maps, and tokens too if it works
    on tokens (Swin).
    """

    trunk: Any  # timm's networks have no class of their own in common

    def _features(self, images, wanted) -> Features:
        return _timm_features(self.trunk, images, wanted, self.feature_info, lambda x: self.trunk.forward_head(x, pre_logits=True))

    def final_norm(self, tokens: Tensor) -> Tensor:
        """timm's ``norm``, as its `forward_intermediates` applies it."""
        return self.trunk.norm(tokens) if hasattr(self.trunk, "norm") else super().final_norm(tokens)

    def layer_ids(self) -> dict[str, int]:
        """From timm's group matcher: blocks, or stages of a hierarchical network; a final norm counts to the last of them."""
        return {f"trunk.{name}": i for name, i in _timm_layer_ids(self.trunk, self.feature_info).items()}


def _timm(name: str, size: Size | None, pretrained: bool | str) -> Timm:
    import timm

    arch = name.partition(".")[0]
    if not timm.is_model(arch):
        raise WrappedError(unknown_name("timm model", arch, timm.list_models()))
    options: dict[str, Any] = {"num_classes": 0}
    known = timm.get_pretrained_cfg(name)
    fixed = known is not None and known.fixed_input_size
    if fixed and size:
        options["img_size"] = size
    if pretrained:
        options["pretrained"] = True
    if isinstance(pretrained, str):
        if f"{arch}.{pretrained}" in timm.models.get_arch_pretrained_cfgs(arch):
            name = f"{arch}.{pretrained}"
        else:
            options["pretrained_cfg_overlay"] = {"file": pretrained}

    def build() -> nn.Module:
        try:  # the class is not known beforehand; plain vision transformers and Swin know the option
            return timm.create_model(name, **options, dynamic_img_size=True)
        except TypeError:
            return timm.create_model(name, **options)

    trunk = _fetch(f"timm/{name}", build) if pretrained else build()
    info = _timm_info(trunk, f"timm/{name}")
    config = timm.data.resolve_data_config({}, model=trunk)
    size = size or tuple(config["input_size"][1:])
    dynamic = getattr(trunk, "dynamic_img_size", False)
    return Timm(
        trunk,
        _timm_spec(config, size, name),
        info,
        fixed_size=size if fixed and not dynamic else None,
        multiple_of=info.strides[0] if dynamic else 1,
    )


def _timm_info(trunk: Any, what: str, channels: int | None = None) -> FeatureInfo:
    if not hasattr(trunk, "forward_intermediates"):
        raise WrappedError(f"{what}: timm offers no intermediate features of this family; choose another network")
    stages = list(trunk.feature_info)
    return FeatureInfo(
        channels=channels or getattr(trunk, "head_hidden_size", None) or trunk.num_features,
        layers=len(stages),
        layer_channels=tuple(stage["num_chs"] for stage in stages),
        strides=tuple(stage["reduction"] for stage in stages),
        prefix=getattr(trunk, "num_prefix_tokens", 0),
    )


def _timm_spec(config: Mapping[str, Any], size: Size, name: str) -> Image:
    # timm scales to floor(size / crop_pct), so the ratio is that of the two whole numbers.
    ratio = size[0] / int(size[0] / config["crop_pct"])
    return Image(
        size=size,
        resize=Resize(rule=_RULES.get(config["crop_mode"], "shortest"), interpolation=config["interpolation"], crop_ratio=ratio),
        normalise=Normalise(rule="standard", mean=tuple(config["mean"]), std=tuple(config["std"]), origin=f"timm, {name}"),
    )


def _timm_features(trunk: Any, images: Tensor, wanted: Sequence[int], info: FeatureInfo, pool: Callable) -> Features:
    flat = len(set(info.strides)) == 1
    indices = list(wanted if flat else range(info.layers))  # maps are by-products, blocks are copied: those only when asked for
    stages: Sequence = ()
    if indices:
        parameters = inspect.signature(trunk.forward_intermediates).parameters
        options = {"return_prefix_tokens": True} if "return_prefix_tokens" in parameters and info.prefix else {}
        x, stages = trunk.forward_intermediates(images, indices=indices, **options)
    else:
        x = trunk.forward_features(images)
    layers = {i: _unpack(stage) for i, stage in zip(indices, stages, strict=True) if i in wanted}
    grid = tuple(side // info.strides[-1] for side in images.shape[-2:]) if flat else tuple(stages[-1].shape[-2:])
    prefix, tokens, maps = None, {}, None if flat else tuple(stages)
    if flat and x.ndim == 4:  # a convolutional network of one resolution
        maps = (x,)
    elif x.ndim == 4 and getattr(trunk, "output_fmt", "NCHW") == "NHWC":
        tokens = {"image": x.flatten(1, 2)}
    elif x.ndim == 3 and x.shape[1] == info.prefix + grid[0] * grid[1]:
        prefix = x[:, : info.prefix] if info.prefix else None
        tokens = {"image": x[:, info.prefix :]}
    return Features(
        pooled=pool(x),
        prefix=prefix,
        tokens=tokens,
        grid={"image": grid} if tokens else {},
        layers=layers,
        maps=maps,
        strides=None if maps is None else info.strides[-len(maps) :],
    )


def _timm_layer_ids(trunk: Any, info: FeatureInfo) -> dict[str, int]:
    from timm.models import group_parameters

    if not hasattr(trunk, "group_matcher"):
        return {}
    ids = group_parameters(trunk, trunk.group_matcher(coarse=len(set(info.strides)) > 1), reverse=True)
    shift = max(0, info.layers - max(ids.values()))  # where the stem is itself the first stage
    return {name: min(i + shift, info.layers) for name, i in ids.items()}


# -- torchvision ------------------------------------------------------------------------------------------------------------


class TorchVision(Wrapped):
    """A torchvision classification network, cut by torchvision's feature extractor.

    `pooled` is the input of the last linear layer. The extractor's nodes are "pooled", "tokens" (after the final norm, of
    transformers) and "0", "1", ... for the stages or blocks.
    """

    def __init__(self, trunk: nn.Module, spec: Image, info: FeatureInfo, fixed_size: Size | None, stages: Sequence[str], kind: str):
        super().__init__(trunk, spec, info, fixed_size)
        self.stages, self.kind = tuple(stages), kind

    def _features(self, images, wanted) -> Features:
        out = self.trunk(images)
        stages = [out[str(i)] for i in range(len(self.stages))]
        if self.kind == "vit":
            grid = {"image": tuple(side // self.feature_info.strides[0] for side in images.shape[-2:])}
            layers = {i: Layer(stages[i][:, :1], {"image": stages[i][:, 1:]}, grid) for i in wanted}
            tokens = out["tokens"]
            return Features(out["pooled"], prefix=tokens[:, :1], tokens={"image": tokens[:, 1:]}, grid=grid, layers=layers)
        if self.kind == "swin":
            stages = [stage.permute(0, 3, 1, 2) for stage in stages]
        return Features(
            pooled=out["pooled"],
            tokens={"image": out["tokens"].flatten(1, 2)} if self.kind == "swin" else {},
            grid={"image": tuple(stages[-1].shape[-2:])} if self.kind == "swin" else {},
            layers={i: _unpack(stages[i]) for i in wanted},
            maps=tuple(stages),
            strides=self.feature_info.strides,
        )

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See `Backbone.final_norm`; vision transformers have one."""
        return self.trunk.get_submodule("encoder.ln")(tokens) if self.kind == "vit" else super().final_norm(tokens)

    def layer_ids(self) -> dict[str, int]:
        """A parameter between two stages counts to the earlier one, one before the first to the embedding."""
        ids, reached = {}, 0
        for name, module in self.trunk.named_modules():
            inside = [i for i, stage in enumerate(self.stages) if name == stage or name.startswith(f"{stage}.")]
            if inside:
                reached = inside[0] + 1
            elif reached == len(self.stages):
                break
            for leaf, _ in module.named_parameters(name, recurse=False):
                ids[f"trunk.{leaf}"] = reached
        return ids


def _torchvision(name: str, size: Size | None, pretrained: bool | str) -> TorchVision:
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor

    what = f"torchvision/{name}"
    known = models.list_models(module=models)
    if name not in known:
        raise WrappedError(unknown_name("torchvision model", name, known))
    weights = _torchvision_weights(name, pretrained) if pretrained else None
    kind = "vit" if name.startswith("vit_") else "swin" if name.startswith("swin") else "cnn"
    options = {}
    if kind == "vit" and size:
        if size[0] != size[1] or (weights is not None and size != tuple(weights.meta["min_size"])):
            raise WrappedError(
                f"{what}: image_size {size}: square only, and with weights only theirs; timm's transformers take any"
            )
        options["image_size"] = size[0]

    def build() -> nn.Module:
        return models.get_model(name, weights=weights, **options)

    network = _fetch(what, build) if pretrained else build()
    linear = {
        n: m
        for n, m in network.named_modules()
        if isinstance(m, nn.Linear) and n.split(".")[0] in ("fc", "classifier", "head", "heads")
    }
    stages = _stage_names(network)
    if not linear or not stages:
        raise WrappedError(f"{what}: this family has no known trunk; timm offers most networks")
    last = list(linear)[-1]
    network.set_submodule(last, nn.Identity())
    if kind == "vit":
        assert isinstance(network, models.VisionTransformer)
        widths, strides = [network.hidden_dim] * len(stages), [network.patch_size] * len(stages)
    else:
        stages, widths, strides = _probe(network, stages, channels_last=kind == "swin")
    nodes = {stage: str(i) for i, stage in enumerate(stages)} | {last: "pooled"}
    if kind != "cnn":
        nodes["encoder.ln" if kind == "vit" else "norm"] = "tokens"
    trunk = create_feature_extractor(network, nodes, suppress_diff_warning=True)
    info = FeatureInfo(linear[last].in_features, len(stages), tuple(widths), tuple(strides), prefix=int(kind == "vit"))
    spec = torchvision_spec(weights, size, what)
    return TorchVision(trunk, spec, info, spec.size if kind == "vit" else None, stages, kind)


def _torchvision_weights(name: str, wanted: bool | str):
    from torchvision import models

    known = models.get_model_weights(name)
    if wanted is True:
        return known["DEFAULT"]
    if wanted not in known.__members__:
        raise WrappedError(unknown_name(f"weights of torchvision/{name}", str(wanted), known.__members__))
    return known[wanted]


def _stage_names(network: nn.Module) -> list[str]:
    """Modules, in order, whose outputs may serve as stages; empty for a family that is not known."""
    encoder = getattr(getattr(network, "encoder", None), "layers", None)
    if encoder is not None:
        return [f"encoder.layers.{name}" for name, _ in encoder.named_children()]
    if hasattr(network, "layer4"):
        return ["layer1", "layer2", "layer3", "layer4"]
    for trunk in ("trunk_output", "features"):
        if hasattr(network, trunk):
            return [f"{trunk}.{name}" for name, _ in getattr(network, trunk).named_children()]
    return []


@torch.no_grad()
def _probe(network: nn.Module, stages: list[str], channels_last: bool) -> tuple[list[str], list[int], list[int]]:
    """The last module of each resolution, with its channels and stride."""
    side, seen = 128, {}
    hooks = [
        network.get_submodule(stage).register_forward_hook(lambda _, __, out, stage=stage: seen.update({stage: out.shape[1:]}))
        for stage in stages
    ]
    network.eval()(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    found = {}
    for stage, shape in seen.items():
        channels, height = (shape[2], shape[0]) if channels_last else (shape[0], shape[1])
        found[round(side / height)] = (stage, channels)
    return [stage for stage, _ in found.values()], [channels for _, channels in found.values()], list(found)


def torchvision_spec(weights, size: Size | None, what: str) -> Image:
    if weights is None:
        statistics = Normalise(rule="standard", mean=IMAGENET_MEAN, std=IMAGENET_STD, origin="imagenet-1k train")
        return Image(size=size or (224, 224), resize=Resize(interpolation="bilinear", crop_ratio=224 / 256), normalise=statistics)
    preset = weights.transforms()
    (crop,), (resize,) = preset.crop_size, preset.resize_size
    return Image(
        size=size or (crop, crop),
        resize=Resize(interpolation=preset.interpolation.value, antialias=bool(preset.antialias), crop_ratio=crop / resize),
        normalise=Normalise(rule="standard", mean=tuple(preset.mean), std=tuple(preset.std), origin=f"{what}, {weights.name}"),
    )


# -- open_clip --------------------------------------------------------------------------------------------------------------


class OpenClip(Wrapped):
    """The image tower of an open_clip model; `pooled` is the projected image embedding, not normalised."""

    trunk: Any  # one of three classes of open_clip

    def _features(self, images, wanted) -> Features:
        tower, info = self.trunk, self.feature_info
        if hasattr(tower, "trunk"):
            return _timm_features(tower.trunk, images, wanted, info, lambda x: tower.head(tower.trunk.forward_head(x)))
        if not info.prefix:  # the stem, which open_clip counts as stage 0, has the stride of the first stage
            out = tower.forward_intermediates(images, indices=[1, 2, 3, 4])
            maps = out["image_intermediates"]
            layers = {i: _unpack(maps[i]) for i in wanted}
            return Features(out["image_features"], layers=layers, maps=tuple(maps), strides=info.strides)
        indices = sorted({*wanted, info.layers - 1})
        out = tower.forward_intermediates(images, indices=indices, output_fmt="NLC", output_extra_tokens=True)
        grid = {"image": tuple(side // info.strides[0] for side in images.shape[-2:])}
        blocks = dict(zip(indices, zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True), strict=True))
        prefix: Tensor | None = None
        tokens: dict[str, Tensor] = {}
        if tower.attn_pool is None:  # an attention pool has its own norm, over other channels
            normed = tower.ln_post(torch.cat(blocks[info.layers - 1], 1))
            prefix, tokens = normed[:, :1], {"image": normed[:, 1:]}
        return Features(
            pooled=out["image_features"],
            prefix=prefix,
            tokens=tokens,
            grid=grid if tokens else {},
            layers={i: Layer(blocks[i][0], {"image": blocks[i][1]}, grid) for i in wanted},
        )

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See `Backbone.final_norm`; the norm of an attention pool is not meant for tokens of blocks."""
        tower = self.trunk
        norm = getattr(tower.trunk, "norm", None) if hasattr(tower, "trunk") else getattr(tower, "ln_post", None)
        return super().final_norm(tokens) if norm is None or getattr(tower, "attn_pool", None) is not None else norm(tokens)

    def layer_ids(self) -> dict[str, int]:
        """Blocks or stages by their names; the final norm and the projection are not named."""
        if hasattr(self.trunk, "trunk"):
            return {f"trunk.trunk.{name}": i for name, i in _timm_layer_ids(self.trunk.trunk, self.feature_info).items()}
        ids = {}
        for name, _ in self.trunk.named_parameters():
            parts = name.split(".")
            if parts[0].startswith("layer"):
                ids[f"trunk.{name}"] = int(parts[0][5:])
            elif name.startswith("transformer.resblocks."):
                ids[f"trunk.{name}"] = int(parts[2]) + 1
            elif parts[0] not in ("ln_post", "proj", "attnpool", "attn_pool", "attn_pool_contrastive"):
                ids[f"trunk.{name}"] = 0
        return ids


def _open_clip(name: str, size: Size | None, pretrained: bool | str) -> OpenClip:
    import open_clip

    what = f"open_clip/{name}"
    config = open_clip.get_model_config(name)
    if config is None:
        raise WrappedError(unknown_name("open_clip model", name, open_clip.list_models()))
    cfg = open_clip.transform.PreprocessCfg()
    if pretrained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is True and len(tags) != 1:
            raise WrappedError(f"{what}: pretrained=True is ambiguous; name one of {', '.join(tags) or 'no weights known'}")
        tag = tags[0] if pretrained is True else pretrained
        model = _fetch(what, lambda: open_clip.create_model(name, pretrained=tag, force_image_size=size))
        tower, cfg = model.visual, open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    else:  # the text tower is not wanted, and some would be fetched
        vision = {**config["vision_cfg"], "timm_model_pretrained": False}
        if size:
            vision["image_size"] = size[0] if size[0] == size[1] else size
        tower = open_clip.model._build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
        if size and hasattr(tower, "set_input_size"):
            tower.set_input_size(size)
    size = size or ((tower.image_size,) * 2 if isinstance(tower.image_size, int) else tuple(tower.image_size))
    spec = Image(
        size=size,
        resize=Resize(rule=_RULES.get(cfg.resize_mode, "shortest"), interpolation=cfg.interpolation),
        normalise=Normalise(rule="standard", mean=tuple(cfg.mean), std=tuple(cfg.std), origin=f"open_clip, {name}"),
    )
    width = config["embed_dim"]
    if hasattr(tower, "trunk"):
        info = _timm_info(tower.trunk, what, channels=width)
        fixed = size if tower.trunk.pretrained_cfg.get("fixed_input_size") else None
    elif hasattr(tower, "attnpool"):
        base = tower.layer1[-1].bn3.num_features
        info, fixed = FeatureInfo(width, 4, (base, 2 * base, 4 * base, 8 * base), (4, 8, 16, 32)), size
    else:
        blocks, patch = len(tower.transformer.resblocks), tower.patch_size[0]
        info, fixed = FeatureInfo(width, blocks, (tower.conv1.out_channels,) * blocks, (patch,) * blocks, prefix=1), size
    return OpenClip(tower, spec, info, fixed)


_LIBRARIES: dict[str, Callable[[str, Size | None, bool | str], Wrapped]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
}
