"""Low-rank updates (LoRA, arXiv 2106.09685; by peft) of the linear layers in a backbone's attention and MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from okavango.models.backbone import ArgumentError, Backbone, unknown_name

if TYPE_CHECKING:
    from okavango.models.wrapped import Wrapped


def inject_lora(model: Backbone, lora: int | Mapping[str, Any]) -> None:
    """Put low-rank updates into a backbone (its `trunk`, where another library's network is inside), in place; everything else in
    it is frozen.

    Args:
        lora: rank, or {"rank", "alpha", "dropout", "targets"}; see `okavango.models.wrapped.create`.
    Raises:
        ArgumentError: peft is missing, an unknown setting, or layers on which an update would have no effect.
    """
    try:
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ArgumentError("lora: needs peft; pip install peft") from error
    settings: dict[str, Any] = {"rank": lora} if isinstance(lora, int) else dict(lora)
    for key in settings:
        if key not in ("rank", "alpha", "dropout", "targets"):
            raise ArgumentError(unknown_name("setting of lora", key, ("rank", "alpha", "dropout", "targets")))
    rank, trunk = settings.get("rank", 8), getattr(model, "trunk", model)
    names = settings.get("targets") or _lora_targets(trunk)
    if not names:
        raise ArgumentError(f"{model.architecture}: has no linear layers in attention or MLP for lora; name others by targets")
    config = peft.LoraConfig(
        r=rank, lora_alpha=settings.get("alpha", rank), lora_dropout=settings.get("dropout", 0.0), target_modules=list(names)
    )
    if freeze := getattr(model, "freeze", None):
        freeze()
    peft.inject_adapter_in_model(config, trunk)
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_("lora_" in name)

    # Some families use a layer's weight without calling the layer; an update there would do nothing, silently.
    idle: dict[str, Any] = {
        name: m for name, m in trunk.named_modules() if isinstance(m, BaseTunerLayer) and not name.endswith(".out_proj")
    }
    count = len(idle)
    hooks = [m.register_forward_hook(lambda *_, name=name: idle.pop(name, None) and None) for name, m in list(idle.items())]
    spec = model.preprocess.array()
    with torch.no_grad():
        model.eval()({next(iter(model.preprocess)): torch.zeros(1, len(spec.channels), *spec.size)})
    for hook in hooks:
        hook.remove()
    if idle:
        raise ArgumentError(
            f"{model.architecture}: lora has no effect on {len(idle)} of {count} layers, e.g. {next(iter(idle))}, whose weights "
            "are read without calling them; name others by lora={'rank': ..., 'targets': (...)}"
        )


def _lora_targets(trunk: nn.Module) -> list[str]:
    found: list[str] = []
    for name, module in trunk.named_modules():
        inside = any("attn" in part or "attention" in part or part == "mlp" for part in name.split("."))
        nested = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.MultiheadAttention) or (isinstance(module, nn.Linear) and inside and not nested):
            found.append(name)
    return found


def merge_lora(model: Wrapped) -> Wrapped:
    """Fold LoRA's updates into the base weights, in place: names of parameters are again those of the plain network.

    Raises:
        ArgumentError: a model built without `lora`.
    """
    if not model.arguments.pop("lora", None):
        raise ArgumentError(f"{model.architecture}: has no lora to merge")
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.trunk.named_modules()):
        if isinstance(module, BaseTunerLayer) and not name.endswith(".out_proj"):
            if hasattr(module, "unload_and_optionally_merge_module"):
                base = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                module.merge()
                base = module.get_base_layer()
            model.trunk.set_submodule(name, base)
    del model.trunk.peft_config
    model.frozen = bool(model.arguments.get("frozen"))
    model.trunk.requires_grad_(not model.frozen)
    return model
