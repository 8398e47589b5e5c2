"""The example scripts run as they stand."""

from __future__ import annotations

import subprocess
import sys

from helpers import ROOT, environ


def run_example(name: str, folder, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=environ(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_backbone(tmp_path):
    assert "checkpoint, export" in run_example("own_backbone.py", tmp_path)


def test_extract_and_export(tmp_path):
    import onnxruntime

    printed = run_example("extract_and_export.py", tmp_path)
    (path,) = (tmp_path / "extracted").glob("w*_d*.onnx")
    assert f"chosen: {path.stem} with " in printed and (path.parent / path.stem / "model.safetensors").is_file()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["image"]
    assert float(printed.partition("at most ")[2].split()[0]) < 1e-4


def test_finetune_folder(tmp_path):
    printed = run_example("finetune_folder.py", tmp_path, "--steps", "20")
    right, _, rest = printed.strip().splitlines()[-1].partition(" of ")
    assert rest.startswith("40 pictures") and 0 <= int(right) <= 40
    assert (tmp_path / "finetuned" / "run" / "export" / "config.json").is_file()
    again = run_example("finetune_folder.py", tmp_path, "--steps", "20")  # finished runs are left as they are
    assert again.strip().splitlines()[-1] == printed.strip().splitlines()[-1]
