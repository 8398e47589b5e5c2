"""Run by torchrun from test_distributed.py: gradients of one objective step, as DDP or FSDP2 computes them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from okavango.models.backbone import create_model
from okavango.pretrain import loop
from okavango.recipes import named

BATCH = 8


def batch_part(rank: int, world: int) -> dict[str, torch.Tensor]:
    """This process's share of one fixed batch; crops are ordered crop by crop, so each crop's pictures are shared out."""
    draw = torch.Generator().manual_seed(0)
    whole = {
        "global": torch.randn(2, BATCH, 3, 28, 28, generator=draw),
        "local": torch.randn(2, BATCH, 3, 14, 14, generator=draw),
        "masks": torch.rand(2, BATCH, 16, generator=draw) < 0.3,
    }
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return {name: tensor[:, mine].flatten(0, 1) for name, tensor in whole.items()}


def main(parallel: str, out: str) -> None:
    recipe = named("poa_tiny", "pretrain")
    settings = replace(recipe.objective, koleo=0.0, shared_subnet=True, ibot_start=0.0)
    recipe = replace(recipe, objective=settings, run=replace(recipe.run, parallel=parallel))
    accelerator = loop.make_accelerator(recipe, Path(out).parent)
    torch.manual_seed(0)
    objective = settings.build(create_model(recipe.model, **recipe.model_args), (), recipe.run)
    model = loop._distribute(objective, recipe, accelerator)
    sharded = [isinstance(parameter, DTensor) for parameter in objective.parameters()]
    assert all(sharded) if parallel == "fsdp" and accelerator.num_processes > 1 else not any(sharded), sharded
    model.train()
    model(batch_part(accelerator.process_index, accelerator.num_processes), 3)["loss"].backward()
    gradients = {name: loop._full(p.grad) for name, p in objective.named_parameters() if p.grad is not None}
    if accelerator.is_main_process:
        print(f"num_processes {accelerator.num_processes}")
        save_file({name: gradient.contiguous() for name, gradient in gradients.items()}, out)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
