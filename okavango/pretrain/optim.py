"""Schedules and the optimiser: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from okavango.pretrain.settings import Optim


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then a cosine from `base` to `final`; a pure function of the step.

    Args:
        base, final: values after the warm-up and at the end.
        steps: length of the run, warm-up included.
        warmup: steps in which the value rises linearly from `start` to `base`, both ends included.
        stretch: the cosine is laid out over int(steps / stretch) steps, so a value below 1 stops before `final` is reached (POA).
    """

    base: float
    final: float
    steps: int
    warmup: int = 0
    start: float = 0.0
    stretch: float = 1.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.start + (self.base - self.start) * step / max(1, self.warmup - 1)
        total = int(self.steps / self.stretch)
        if step >= min(total, self.steps):
            return self.final
        share = (step - self.warmup) / (total - self.warmup)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * share))


def peak_lr(optim: Optim, batch: int) -> float:
    """Learning rate at the end of the warm-up for a global batch size."""
    factor = batch / optim.lr_batch
    return optim.lr * {"sqrt": math.sqrt(factor), "linear": factor, "none": 1.0}[optim.lr_scaling]


def learning_rate(optim: Optim, steps: int, batch: int) -> Callable[[int], float]:
    """Learning rate of a step 0 .. steps - 1, before the factors of parameter groups."""
    peak, warmup = peak_lr(optim, batch), round(optim.warmup * steps)
    if optim.warmup_rule == "before":
        return Cosine(peak, optim.lr_end, steps, warmup=warmup, stretch=optim.stretch)
    cosine = Cosine(peak, optim.lr_end, steps, stretch=optim.stretch)
    return lambda step: min(peak * (step + 1) / max(1, warmup), cosine(step))


class Optimiser:
    """AdamW over an objective's parameter groups, with the schedules of `Optim`.

    Args:
        groups: an objective's `param_groups()`: dicts with "params" [(name, parameter)], "lr_mult", "wd_mult" and, optionally,
            "start_step", before which the learning rate is 0.
        settings: see `Optim`.
        steps: length of the run.
        batch: global batch size.
    """

    def __init__(self, groups: Sequence[dict], settings: Optim, steps: int, batch: int):
        self.names = {id(parameter): name for group in groups for name, parameter in group["params"]}
        self.settings = settings
        self.lr = learning_rate(settings, steps, batch)
        self.weight_decay = Cosine(*settings.weight_decay, steps, stretch=settings.stretch)
        self.adamw = torch.optim.AdamW(
            [
                {
                    "params": [parameter for _, parameter in group["params"]],
                    "lr_mult": group["lr_mult"],
                    "wd_mult": group["wd_mult"],
                    "start_step": group.get("start_step", 0),
                }
                for group in groups
                if group["params"]
            ],
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,  # one pass over parameters and state instead of eight
        )

    def schedule(self, step: int) -> dict[str, float]:
        """Set learning rate and weight decay of every group for a step; returns both before the groups' factors."""
        lr, weight_decay = self.lr(step), self.weight_decay(step)
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["lr_mult"] if step >= group["start_step"] else 0.0
            group["weight_decay"] = weight_decay * group["wd_mult"]
        return {"lr": lr, "weight_decay": weight_decay}

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as flat tensors, ``parameter name/state name``."""
        return {
            f"{self.names[id(parameter)]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for parameter, state in self.adamw.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave; the parameters must be the same."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, leaf = key.rpartition("/")
            by_name.setdefault(name, {})[leaf] = value
        for group in self.adamw.param_groups:
            for parameter in group["params"]:
                if state := by_name.get(self.names[id(parameter)]):
                    self.adamw.state[parameter] = {
                        leaf: value.to(parameter.device, copy=True) if leaf == "step" else _like(parameter, value)
                        for leaf, value in state.items()
                    }


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A full tensor on the parameter's device, sharded as the parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.clone()


def clip_gradients(groups: Iterable[Sequence[nn.Parameter]], limit: float) -> list[Tensor]:
    """Scale each group's gradient down to an L2 norm of at most `limit` (0: leave it); returns the norms before."""
    norms = []
    for group in groups:
        parameters = [parameter for parameter in group if parameter.grad is not None]
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, limit if limit else math.inf, foreach=True))
    return norms


@torch.no_grad()
def lerp_parameters(average: Iterable[Tensor], current: Iterable[Tensor], momentum: float) -> None:
    """average <- momentum * average + (1 - momentum) * current, in place, in one pass over the tensors."""
    torch._foreach_lerp_([_local(a) for a in average], [_local(c) for c in current], 1 - momentum)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
