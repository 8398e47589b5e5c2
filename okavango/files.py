"""What every part writes with: files that are whole or not there, and templates of pages."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def page_template(file: Path) -> Any:
    """A jinja2 template of HTML: values are escaped, an unknown name is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(file.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(file.name)


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, indent: int | None = 1, default: Callable[[Any], Any] | None = None) -> None:
    """Write JSON whole or not at all, and flush it to the disk; everything but ASCII is escaped.

    Args:
        indent, default: see `json.dumps`.
    """
    text = json.dumps(content, indent=indent, default=default) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
