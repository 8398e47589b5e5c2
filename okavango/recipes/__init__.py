"""Named recipes: plain functions that return frozen dataclasses. No torch here.

Other packages add theirs by entry points: ``okavango.objectives`` names a function that returns a recipe for `pretrain`;
``okavango.heads`` names a head class with a static method `recipe()` for `finetune`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import entry_points

from okavango.pretrain.settings import Recipe
from okavango.recipes.finetuning import FINETUNE
from okavango.recipes.pretraining import PRETRAIN

VERBS = ("pretrain", "finetune")


def recipes(verb: str) -> dict[str, Callable[[], Recipe]]:
    """All recipes for a verb by name: our own first."""
    if verb == "pretrain":
        return {**{point.name: point.load() for point in entry_points(group="okavango.objectives")}, **PRETRAIN}
    return {**{point.name: point.load().recipe for point in entry_points(group="okavango.heads")}, **FINETUNE}


def named(name: str, verb: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: unknown; the message offers the nearest.
    """
    known = recipes(verb)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown recipe {name!r} for {verb}; {hint}known: {', '.join(known)}")
    return known[name]()
