"""What the elastic branch costs: a step of POA against a step of DINOv2, and against what their multiply-adds let expect.

    python benchmarks/pretrain_step.py [--cases vit_small ...] [--repeats 3] [--draws 5] [--threads 1] [--out FILE.jsonl]

Both steps are ours and share everything but the elastic branch: the recipe's objective, backbone and heads, crops, masks,
optimiser, clipping, teacher. A step is forward, backward, clipping, AdamW and the teacher's average, on random tensors. Expected is

    (teacher forward + 3 x intact student + 3 x elastic student) / (teacher forward + 3 x intact student)

in multiply-adds, heads included, which torch counts. Elastic students differ in cost: `--draws` of them stand for the pool that the
recipe draws from, the middle ones of as many equal parts of the pool in the order of their multiply-adds; 0 takes the whole pool,
one permutation of it. Expected and measured ratio are of the same students; that of the whole pool is in the records too.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import torch
from timing import fresh, interleave, load, peak_memory, publish, speed_record
from torch.utils.flop_counter import FlopCounterMode

from okavango.data.masking import batch_masks
from okavango.models.backbone import create_model
from okavango.models.features import Subnet
from okavango.pretrain.objectives.poa import POA
from okavango.pretrain.optim import Optimiser, clip_gradients
from okavango.pretrain.settings import PretrainRecipe
from okavango.recipes.pretraining import poa_resnet_50, poa_swin_small, poa_vit_small
from okavango.zoo.leaderboard.records import Record


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe at a size for two cores.

    Attributes:
        model_args: added to the recipe's; batch: pictures per step; global_size, local_size: of crops, pixels.
        locals: crops per picture; hidden, prototypes: of the four heads.
    """

    recipe: Callable[[], PretrainRecipe]
    model_args: dict[str, Any] = field(default_factory=dict)
    batch: int
    global_size: int
    local_size: int
    locals: int = 4
    hidden: int = 512
    prototypes: tuple[int, ...] = (256, 512, 1024, 2048)

    def whole(self, elastic: bool = True) -> PretrainRecipe:
        """The recipe, patches masked from the first step."""
        recipe = self.recipe()
        crops = replace(recipe.objective.crops, global_size=self.global_size, local_size=self.local_size, locals=self.locals)
        objective = replace(
            recipe.objective,
            elastic=elastic,
            head_hidden=self.hidden,
            prototypes=self.prototypes,
            ibot_start=0.0,
            last_layer_freeze=0.0,
            crops=crops,
        )
        arguments = {**recipe.model_args, "image_size": self.global_size, **self.model_args}
        return replace(recipe, model_args=arguments, objective=objective, run=replace(recipe.run, batch=self.batch))


CASES = {
    "vit_64px": Case(
        recipe=poa_vit_small,
        model_args=dict(patch_size=8, min_width=128, max_width=256, width_step=32, head_dim=32, min_depth=4, max_depth=8),
        batch=4,
        global_size=64,
        local_size=32,
    ),
    "vit_small_96px": Case(recipe=poa_vit_small, batch=4, global_size=96, local_size=48),
    "swin_64px": Case(
        recipe=poa_swin_small,
        model_args=dict(window=4, min_width=48, max_width=96, depths=(2, 2, 6, 2), min_depth=2),
        batch=2,
        global_size=64,
        local_size=32,
    ),
    "swin_112px": Case(
        recipe=poa_swin_small, model_args=dict(depths=(2, 2, 6, 2), min_depth=2), batch=2, global_size=112, local_size=56
    ),
    "resnet_64px": Case(
        recipe=poa_resnet_50,
        model_args=dict(min_depths=(2, 1, 1, 2), max_depths=(2, 2, 3, 2), stem_channels=32, out_channels=128),
        batch=8,
        global_size=64,
        local_size=32,
    ),
    "resnet_50_64px": Case(recipe=poa_resnet_50, batch=8, global_size=64, local_size=32),
}


class Step:
    """One step after another, as the training loop makes them, on one batch of random tensors."""

    def __init__(self, recipe: PretrainRecipe):
        settings, run = recipe.objective, recipe.run
        torch.manual_seed(run.seed)
        backbone = create_model(recipe.model, **recipe.model_args)
        self.objective = POA(backbone, settings, steps=run.steps, seed=run.seed).train()
        self.model: torch.nn.Module = self.objective  # or what wraps it
        self.optimiser = Optimiser(self.objective.param_groups(), recipe.optim, run.steps, run.batch)
        channels, crops = len(backbone.preprocess.array().channels), settings.crops
        grid = (crops.global_size // backbone.mask_stride,) * 2
        masks = batch_masks(2 * run.batch, grid, Random(run.seed), probability=settings.mask_probability, ratio=settings.mask_ratio)
        self.batch = {
            "global": torch.randn(2 * run.batch, channels, crops.global_size, crops.global_size),
            "local": torch.randn(crops.locals * run.batch, channels, crops.local_size, crops.local_size),
            "masks": torch.from_numpy(masks),
        }

    def __call__(self, number: int) -> None:
        self.model(self.batch, number)["loss"].backward()
        self.optimiser.schedule(number)
        clip_gradients(self.objective.clip_groups(), self.optimiser.settings.clip)
        self.optimiser.adamw.step()
        self.optimiser.adamw.zero_grad(set_to_none=True)
        self.objective.after_step(number)


class MultiplyAdds:
    """Of forward passes through backbone and heads of a step, counted on the meta device."""

    def __init__(self, step: Step):
        self.network = copy.deepcopy(step.objective.student).to("meta")
        self.batch = {name: tensor.to("meta") for name, tensor in step.batch.items()}
        self.hidden = int(step.batch["masks"].sum())
        self.students: dict[Subnet | None, int] = {}

    def teacher(self) -> int:
        """Global crops; heads of their class features and of the hidden patches."""
        return self._count(None, ("global",))

    def student(self, subnet: Subnet | None) -> int:
        """Global and local crops; heads of their class features and of the hidden patches."""
        if subnet not in self.students:
            self.students[subnet] = self._count(subnet, ("global", "local"))
        return self.students[subnet]

    def ratio(self, subnets: Sequence[Subnet | None]) -> float:
        """Of a step with the elastic branch, on the average of these subnets, to one without."""
        without = self.teacher() + 3 * self.student(None)  # a backward pass multiplies twice as much as its forward pass
        return 1 + 3 * fmean(map(self.student, subnets)) / without

    def _count(self, subnet: Subnet | None, crops: Sequence[str]) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            rows = [self.network["backbone"](image=self.batch[name], subnet=subnet).pooled for name in crops]
            rows.append(rows[0].new_zeros(self.hidden, rows[0].shape[1]))
            self.network["head"](torch.cat(rows))
        return counter.get_total_flops() // 2


def stand_ins(costs: Sequence[float], draws: int) -> list[int]:
    """Indices into the costs: the middle ones of `draws` equal parts of them in their order; all for 0."""
    order = sorted(range(len(costs)), key=lambda index: costs[index])
    parts = min(draws, len(costs)) or len(costs)
    return [order[int((part + 0.5) * len(costs) / parts)] for part in range(parts)]


def peak_of(recipe: PretrainRecipe, number: int, threads: int) -> float:
    """Greatest memory of this process after two steps, MiB."""
    torch.set_num_threads(threads)
    step = Step(recipe)
    for _ in range(2):
        step(number)
    return peak_memory()


def measure(name: str, case: Case, *, repeats: int, draws: int, threads: int) -> list[Record]:
    """Both steps, taking turns."""
    torch.set_num_threads(threads)
    before = load()
    poa, dinov2 = Step(case.whole()), Step(case.whole(elastic=False))
    counted = MultiplyAdds(poa)
    drawn = [poa.objective.draw(number) for number in range(len(poa.objective.pool))]  # one pass through the pool
    numbers = stand_ins([counted.student(subnet) for subnet in drawn], draws)
    subnets = [drawn[number] for number in numbers]
    candidates = {}
    for number, subnet in zip(numbers, subnets, strict=True):
        candidates[f"dinov2, step {number}"] = functools.partial(dinov2, number)
        candidates[f"poa, step {number}, {subnet}"] = functools.partial(poa, number)
    times = interleave(candidates, repeats, time.process_time if threads == 1 else time.perf_counter)
    seconds = {
        step: fmean(median(values) for candidate, values in times.items() if candidate.startswith(step))
        for step in ("dinov2", "poa")
    }
    measured, expected = seconds["poa"] / seconds["dinov2"], counted.ratio(subnets)
    settings = {
        "recipe": asdict(case.whole()),
        "drawn": f"{len(drawn)} of the pool" if len(numbers) == len(drawn) else f"{len(numbers)} that stand for {len(drawn)}",
        "multiply_adds": {
            "teacher": counted.teacher(),
            "intact": counted.student(None),
            **{str(subnet): counted.student(subnet) for subnet in subnets},
        },
        "expected_of_the_whole_pool": counted.ratio(drawn),
        "threads": threads,
    }
    dearest = max(range(len(drawn)), key=lambda number: counted.student(drawn[number]))
    peaks = {step: fresh(peak_of, case.whole(elastic=step == "poa"), dearest, threads) for step in seconds}

    def record(metric: str, value: float, baseline: str, **facts: Any) -> Record:
        return speed_record(
            name,
            metric,
            value,
            protocol="pretrain_step/v1",
            n=repeats * len(numbers) * case.batch,
            baseline=baseline,
            loads=(before, load()),
            times=times,
            settings=settings | {f"peak_mib_{step}": round(mib, 1) for step, mib in peaks.items()},
            parameters=sum(parameter.numel() for parameter in poa.objective.student.parameters()),
            **facts,
        )

    records = [
        record("time of a POA step over a DINOv2 step", measured, "measured"),
        record("time of a POA step over a DINOv2 step", expected, "multiply-adds"),
        record("measured over expected", measured / expected, "measured"),
    ]
    for step, each in seconds.items():
        milliseconds = 1000 * each / case.batch
        records.append(record("pictures per second", case.batch / each, f"{step} step", latency_ms=milliseconds))
        records.append(record("peak memory, MiB", peaks[step], f"{step} step"))
    return records


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """All cases, one after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which of the sizes")
    parser.add_argument("--repeats", type=int, default=3, help="of every step")
    parser.add_argument("--draws", type=int, default=5, help="elastic students that stand for the pool; 0 for all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file of records, a page is written beside it")
    given = parser.parse_args(arguments)
    records: list[Record] = []
    for name in given.cases:
        found = measure(name, CASES[name], repeats=given.repeats, draws=given.draws, threads=given.threads)
        measured, expected, share = (record.value for record in found[:3])
        records += found
        print(
            f"{name}: POA over DINOv2 {measured:.3f}, by multiply-adds {expected:.3f}, measured over expected {share:.3f}; "
            f"load {records[-1].settings['load_before']} to {records[-1].settings['load_after']}",
            flush=True,
        )
    publish(records, given.out, "POA's step against DINOv2's")
    return records


if __name__ == "__main__":
    main()
