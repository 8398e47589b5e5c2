"""What the README shows is true: its Python runs, its commands exist, its links lead somewhere, its names are the package's."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from helpers import ROOT, environ

from okavango import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run_script(code: str, folder) -> str:
    script = folder / "readme.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, script.name], cwd=folder, env=environ(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_lines_run(tmp_path):
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 10
    printed = run_script(code, tmp_path)
    subnet, pooled = re.match(r"(w\d+_d\d+) torch.Size\(\[4, (\d+)\]\)", printed).groups()
    assert subnet.startswith(f"w{pooled}_") and "knn/v1" in printed
    assert (tmp_path / "my_model" / "config.json").is_file()


def test_all_other_python_runs_after_the_imports(tmp_path):
    imports = "import okavango as ok\nfrom okavango.data.sources import open_source\n"
    run_script("\n".join([imports, *blocks("python")[1:]]), tmp_path)
    assert (tmp_path / "runs" / "rotation" / "export" / "config.json").is_file()
    assert (tmp_path / "runs" / "noise" / "export-full" / "config.json").is_file()


COMMANDS = sorted({line for block in blocks("sh") for line in block.splitlines() if line.startswith("okavango ")})


def help_of(words: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main([*words, "--help"]) == 0
    return printed.getvalue()


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_their_options_exist(line):
    words = shlex.split(line, comments=True)[1:]
    levels = 2 if words[0] in ("pretrain", "finetune", "index", "zoo", "leaderboard", "preprocess") else 1
    flags = [word for word in words if word.startswith("--")]
    if words[:2] == ["zoo", "list"]:
        return
    shown = help_of(words[:levels])
    for flag in flags:
        assert re.search(rf"{flag}\b", shown), f"{flag} is not an option of {' '.join(words[:levels])}"


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_models_recipes_and_extras_are_all_named():
    from okavango.models.backbone import architectures
    from okavango.recipes import VERBS, recipes

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in [*architectures(), *(name for verb in VERBS for name in recipes(verb)), *extras]:
        assert f"`{name}`" in README, name


@pytest.mark.parametrize("first", ["import okavango.pretrain.settings", "from okavango.pretrain import loop", "pass"])
def test_the_verb_pretrain_is_not_hidden_by_the_folder(tmp_path, first):
    run_script(f"{first}\nimport okavango as ok\nassert callable(ok.pretrain) and ok.pretrain.__name__ == 'pretrain'", tmp_path)


def test_the_contracts_name_every_field():
    import dataclasses

    from okavango.models.features import Features
    from okavango.models.preprocess import Image, Normalise, Raster, Resize, Text, Volume
    from okavango.zoo.checkpoint import _FIELDS
    from okavango.zoo.leaderboard.records import Record
    from okavango.zoo.loading import LoadReport

    page = (ROOT / "docs" / "contracts.md").read_text(encoding="utf-8")
    classes = (Features, Image, Raster, Volume, Text, Resize, Normalise, LoadReport, Record)
    for name in [*_FIELDS, *(field.name for cls in classes for field in dataclasses.fields(cls))]:
        assert f"`{name}`" in page, name


def test_the_settings_that_the_page_on_poa_names_exist():
    page = (ROOT / "docs" / "poa.md").read_text(encoding="utf-8")
    shown = help_of(["pretrain", "poa_tiny"])
    flags = set(re.findall(r"`(--[\w.-]+)", page))
    assert len(flags) > 6
    for flag in flags:
        assert flag in shown, flag


def test_measured_numbers_are_those_of_the_records():
    from okavango.zoo.hub import resolve
    from okavango.zoo.leaderboard.records import read_records

    spec = importlib.util.spec_from_file_location("poa_fashion", ROOT / "benchmarks" / "poa_fashion.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    records = read_records(ROOT / "leaderboard" / "poa_fashion.jsonl")
    assert script.block_in(README) == script.block(records)
    card = (resolve(script.NAME) / "README.md").read_text()
    for value in script.results(records).values():
        assert value in card
