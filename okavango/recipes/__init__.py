"""Named recipes: plain functions that return frozen dataclasses. No torch here."""

from __future__ import annotations

from okavango.pretrain.settings import Recipe
from okavango.recipes.finetuning import FINETUNE
from okavango.recipes.pretraining import RECIPES

BY_VERB = {"pretrain": RECIPES, "finetune": FINETUNE}


def named(name: str, verb: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: unknown; the message offers the nearest.
    """
    import difflib

    known = BY_VERB[verb]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown recipe {name!r} for {verb}; {hint}known: {', '.join(known)}")
    return known[name]()
