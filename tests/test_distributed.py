"""What is promised of several processes, with two real ones (gloo)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, environ, run
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "distributed_script.py"


def gradients(processes: int, parallel: str, folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of one step of the fixed batch, shared out over processes."""
    out = folder / f"{parallel}-{processes}.safetensors"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), parallel, str(out)], env=environ(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"num_processes {processes}" in done.stdout
    return load_file(out)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_gradients_of_one(tmp_path, parallel):
    one, two = gradients(1, "ddp", tmp_path), gradients(2, parallel, tmp_path)
    assert set(one) <= set(two)
    for name, gradient in two.items():
        expected = one.get(name, torch.zeros_like(gradient))
        assert torch.allclose(gradient, expected, atol=2e-6, rtol=1e-4), f"{name}: {float((gradient - expected).abs().max()):.2e}"


def test_fsdp_trains_and_exports_what_ddp_exports(tmp_path):
    for parallel in ("ddp", "fsdp"):
        run(*TINY, "--steps", "4", "--parallel", parallel, "--out", tmp_path / parallel, processes=2)
    for folder in ("export", "export-full"):
        ddp, fsdp = (load_file(tmp_path / parallel / folder / "model.safetensors") for parallel in ("ddp", "fsdp"))
        assert {name: tensor.shape for name, tensor in ddp.items()} == {name: tensor.shape for name, tensor in fsdp.items()}
        # Reductions add in another order, and AdamW's first steps magnify rounding of near-zero gradients.
        assert all(torch.allclose(ddp[name], fsdp[name], atol=2e-3) for name in ddp)


def test_ranks_draw_different_subnets_unless_shared(monkeypatch):
    from okavango.models.backbone import create_model
    from okavango.pretrain import collectives
    from okavango.recipes import named

    recipe = named("poa_tiny", "pretrain")
    objective = recipe.objective.build(create_model("elastic_vit_tiny"), (), recipe.run)
    draws = {}
    for rank in (0, 1):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        objective.shared_subnet = False
        draws[rank] = [objective.draw(step) for step in range(len(objective.pool))]
        assert sorted(draws[rank]) == sorted(objective.pool), "each entry of the pool once per cycle"
        objective.shared_subnet = True
        draws[rank, "shared"] = [objective.draw(step) for step in range(20)]
    assert draws[0] != draws[1] and draws[0, "shared"] == draws[1, "shared"]
