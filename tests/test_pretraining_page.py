"""What docs/pretraining.md shows: its Python runs on a folder of pictures, its commands and their options exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, environ
from PIL import Image
from test_readme import help_of
from torch.distributed.run import get_args_parser

from okavango.data.sources import open_source

PAGE = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


def commands() -> list[list[str]]:
    """Words of every okavango command of the page, without the launcher."""
    lines = [line for line in COMMANDS if re.search(r"\bokavango ", line)]
    return [shlex.split(line.partition("okavango ")[2].removesuffix("'"), comments=True) for line in lines]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_and_their_options_exist(words):
    levels = 2 if words[0] in ("pretrain", "zoo") else 1
    shown = help_of(words[:levels])
    for flag in (word for word in words if word.startswith("--")):
        assert re.search(rf"{flag}\b", shown), f"{flag} is not an option of {' '.join(words[:levels])}"


def test_options_in_the_text_exist():
    launcher = get_args_parser().format_help() + "--cpu --num_processes --logdir"  # of accelerate, of tensorboard
    slurm = re.findall(r"^#SBATCH (--[\w-]+)", PAGE, re.MULTILINE)
    shown = help_of(["pretrain", "poa_vit_small"]) + help_of(["zoo", "extract"]) + help_of(["embed"]) + help_of(["evaluate"])
    flags = set(re.findall(r"(?<![\w-])(--[a-z][\w.-]*)", re.sub(r"<!--|-->", "", PAGE))) - {"--kill-on-bad-exit", *slurm}
    assert len(flags) > 25 and len(slurm) > 4
    assert not {flag for flag in flags if not re.search(rf"{flag}\b", shown + launcher)}


def test_the_batch_script_is_a_script():
    (script,) = re.findall(r"^```sh\n(#!/bin/bash\n.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_its_python_runs_on_a_folder_with_a_torn_picture(tmp_path):
    source = open_source("samples/fashion")
    for index in range(20):
        path = tmp_path / "photos" / ("bags" if index % 2 else "2024/march") / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source[index]["image"][0].numpy()).convert("RGB").resize((96, 96)).save(path)
    whole = path.read_bytes()
    (tmp_path / "photos" / "torn.jpg").write_bytes(whole[: len(whole) // 3])
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "bad sample torn.jpg" in done.stdout and "step 4/4" in done.stdout
    assert (tmp_path / "runs" / "own" / "export" / "config.json").is_file()
