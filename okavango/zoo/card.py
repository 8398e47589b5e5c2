"""The card of a checkpoint: its README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def render_card(card: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """README.md of a checkpoint: YAML front matter that model hubs read, then what the card says.

    Args:
        card: `title`, `licence` (an SPDX identifier in lower case) and `tags` are known; of the others (recipe, seed, hours,
            command, results, intended_use, ...) short values become rows of a table, long texts, lists and dicts become sections.
        config: content of `config.json`.
    """
    card = dict(card)
    title, licence, tags = card.pop("title"), card.pop("licence", None), list(card.pop("tags", []))
    modalities = list(config["preprocess"]["specs"])
    front = {"license": licence or "unknown", "library_name": "okavango", "tags": ["okavango", config["kind"], *modalities, *tags]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {title}", ""]
    rows = {
        "architecture": f"`{config['architecture']}`",
        "input": ", ".join(f"{name} {'x'.join(map(str, e['shape'][1:]))}" for name, e in config["probe"]["inputs"].items()),
        "licence": licence or "unknown",
        "weights": f"{config['weights']['bytes']} bytes, {config['weights']['dtype']}, sha256 `{config['weights']['sha256']}`",
    }
    if config["parent"]:
        rows["parent"] = f"`{config['parent'].get('name')}`" + (f", subnet `{config['subnet']}`" if config["subnet"] else "")
    sections: dict[str, Any] = {}
    for key, value in card.items():
        long = isinstance(value, (dict, list, tuple)) or len(str(value)) > 100 or "\n" in str(value)
        (sections if long else rows)[key.replace("_", " ")] = value
    lines += _table(rows)
    for heading, value in sections.items():
        lines += ["", f"## {heading.capitalize()}", ""]
        if isinstance(value, dict):
            lines += _table(value)
        elif isinstance(value, (list, tuple)):
            lines += [f"- {item}" for item in value]
        else:
            lines.append(str(value))
    return "\n".join(lines) + "\n"


def _table(rows: Mapping[str, Any]) -> list[str]:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    return ["| | |", "|---|---|", *(f"| {cell(key)} | {cell(value)} |" for key, value in rows.items())]
