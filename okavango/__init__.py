"""Okavango: pretrain once, take the model that fits.

Importing this module imports neither torch nor anything that opens a socket; attributes are loaded when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Backbone": "models.backbone",
    "create_model": "models.backbone",
    "register": "models.backbone",
    "Features": "models.features",
    "Subnet": "models.features",
    "TextBatch": "models.features",
    "Image": "models.preprocess",
    "Preprocess": "models.preprocess",
    "Raster": "models.preprocess",
    "Text": "models.preprocess",
    "Volume": "models.preprocess",
    "list_models": "zoo.catalogue",
    "load": "zoo.hub",
    "save": "zoo.checkpoint:save_checkpoint",
    "pretrain": "verbs",
    "finetune": "verbs",
    "evaluate": "dispatch",
    "embed": "dispatch",
    "predict": "dispatch",
    "preprocess_check": "doctor.check",
    "preprocess_statistics": "doctor.check",
}
_MODULES = ("explain", "testing")

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"okavango.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'okavango' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(importlib.import_module(f"okavango.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Importing the folder `okavango.pretrain` must not hide the verb of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "pretrain" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if TYPE_CHECKING:
    from okavango import explain as explain
    from okavango import testing as testing
    from okavango.dispatch import embed as embed
    from okavango.dispatch import evaluate as evaluate
    from okavango.dispatch import predict as predict
    from okavango.doctor.check import preprocess_check as preprocess_check
    from okavango.doctor.check import preprocess_statistics as preprocess_statistics
    from okavango.models.backbone import Backbone as Backbone
    from okavango.models.backbone import create_model as create_model
    from okavango.models.backbone import register as register
    from okavango.models.features import Features as Features
    from okavango.models.features import Subnet as Subnet
    from okavango.models.features import TextBatch as TextBatch
    from okavango.models.preprocess import Image as Image
    from okavango.models.preprocess import Preprocess as Preprocess
    from okavango.models.preprocess import Raster as Raster
    from okavango.models.preprocess import Text as Text
    from okavango.models.preprocess import Volume as Volume
    from okavango.verbs import finetune as finetune
    from okavango.verbs import pretrain as pretrain
    from okavango.zoo.catalogue import list_models as list_models
    from okavango.zoo.checkpoint import save_checkpoint as save
    from okavango.zoo.hub import load as load
