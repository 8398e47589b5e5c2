"""What a step of POA costs: multiply-adds per picture and bytes of states, counted without data, weights or a GPU.

    python benchmarks/cost.py

Builds each recipe's objective on PyTorch's meta device, where tensors have shapes and no content, runs the branches of a step and
their backward passes there, and counts matrix products and convolutions with torch.utils.flop_counter (halved: a multiply-add is
one). Norms, softmax, Sinkhorn, losses and the optimiser are not counted. The elastic student is averaged over the pool it is drawn
from. Writes the tables of docs/pretraining.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from okavango.models.backbone import create_model
from okavango.models.features import Subnet
from okavango.pretrain.objectives.poa import POA, hidden_tokens
from okavango.pretrain.settings import PretrainRecipe
from okavango.recipes import named

ROOT = Path(__file__).parent.parent
RECIPES = ("poa_vit_small", "poa_vit_base", "poa_vit_large", "poa_swin_small", "poa_swin_base", "poa_resnet_50", "poa_resnet_152")
PICTURES = 10  # in the counted batch: stochastic depth above 0.1 runs a block on a whole number of crops
PUBLISHED = {"hours": 2752, "steps": 276_800, "batch": 1600}  # A100, POA ViT-L, arXiv 2408.01031
ASSUMED = 100e12  # floating-point operations per second and GPU that the table of GPU-hours takes for granted; put in your own


@dataclass(frozen=True)
class Cost:
    """Of one recipe.

    Attributes:
        teacher, intact, elastic: multiply-adds per picture of the three branches, heads and backward passes included; the elastic
            one is the mean over the pool.
        backbone, parameters, trained: parameters of the exported backbone, of the objective, and those that have gradients.
    """

    teacher: float
    intact: float
    elastic: float
    backbone: int
    parameters: int
    trained: int

    @property
    def total(self) -> float:
        """Multiply-adds per picture of a step."""
        return self.teacher + self.intact + self.elastic

    def gpu_hours(self, pictures: float, rate: float) -> float:
        """Time for so many pictures at a sustained rate, in floating-point operations per second and GPU."""
        return 2 * self.total * pictures / rate / 3600

    @property
    def state_bytes(self) -> int:
        """A state on disk, in float32: all parameters and two moments of the trained ones."""
        return 4 * (self.parameters + 2 * self.trained)

    @property
    def resident_bytes(self) -> int:
        """What a process holds before any activation: the same and the gradients."""
        return self.state_bytes + 4 * self.trained


def build(recipe: PretrainRecipe) -> POA:
    """The recipe's objective without content, in training mode."""
    with torch.device("meta"):
        return recipe.objective.build(create_model(recipe.model, **recipe.model_args), (), recipe.run).train()


def multiply_adds(call: Callable[[], object]) -> float:
    """Of whatever runs in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


def contents(objective: POA) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch without content and the indices of its hidden patches, as many as there are on average once patches are masked."""
    settings, backbone = objective.settings, objective._backbone
    crops, channels = settings.crops, len(backbone.preprocess.array().channels)
    patches = (crops.global_size // backbone.mask_stride) ** 2
    hidden = round(2 * PICTURES * settings.mask_probability * sum(settings.mask_ratio) / 2 * patches) if settings.ibot else 0
    with torch.device("meta"):
        batch = {
            "global": torch.empty(2 * PICTURES, channels, crops.global_size, crops.global_size),
            "local": torch.empty(crops.locals * PICTURES, channels, crops.local_size, crops.local_size),
            "masks": torch.empty(2 * PICTURES, patches, dtype=torch.bool),
        }
        return batch, torch.empty(hidden, dtype=torch.long)


def student(objective: POA, subnet: Subnet | None) -> float:
    """Multiply-adds per picture of a student, forward and backward."""
    batch, hidden = contents(objective)
    masks = batch["masks"] if objective.settings.ibot else None

    def step() -> None:
        _, logits = objective._branch(objective.student, batch, masks, hidden, subnet)
        torch.stack([part.sum() for head in logits for part in head]).sum().backward()

    return multiply_adds(step) / PICTURES


def teacher(objective: POA) -> float:
    """Multiply-adds per picture of the teacher, whose targets are balanced afterwards, which is not counted."""
    batch, hidden = contents(objective)

    @torch.no_grad()
    def look() -> None:
        features = objective.teacher["backbone"](image=batch["global"])
        objective.teacher["head"](torch.cat([features.pooled, hidden_tokens(features, hidden, objective._cells(batch))]))

    return multiply_adds(look) / PICTURES


def mean_over(pool: Sequence[Subnet], cost: Callable[[Subnet], float]) -> float:
    """Mean of a cost over subnets, counted at a few of them.

    At each width the cost grows by the same amount with every block of a stage; base and growth are polynomials of degree two of
    the width, since a layer has width x width weights. So three widths at the least depth, and at one block more, tell the rest.
    """
    blocks = np.array([subnet.depth if isinstance(subnet.depth, tuple) else (subnet.depth,) for subnet in pool])
    widths = np.array([subnet.width for subnet in pool])
    least = blocks.min(0)
    probes = [least, *(least + row for row in np.eye(len(least), dtype=int) if (blocks @ row).max() > least @ row)]
    known = sorted(set(widths.tolist()))
    known = known if len(known) < 4 else [known[0], known[len(known) // 2], known[-1]]
    counted = [[cost(Subnet(w, tuple(map(int, d)) if len(d) > 1 else int(d[0]))) for d in probes] for w in known]
    base, *grown = [np.polynomial.Polynomial.fit(known, column, len(known) - 1) for column in zip(*counted, strict=True)]
    total = base(widths)
    for probe, line in zip(probes[1:], grown, strict=True):
        total = total + ((blocks - least) @ (probe - least)) * (line(widths) - base(widths))
    return float(total.mean())


def count(recipe: PretrainRecipe) -> Cost:
    """The cost of a recipe's step once patches are masked."""
    objective = build(recipe)
    return Cost(
        teacher=teacher(objective),
        intact=student(objective, None),
        elastic=mean_over(objective.pool, lambda subnet: student(objective, subnet)) if objective.pool else 0.0,
        backbone=sum(p.numel() for p in objective.teacher["backbone"].parameters()),
        parameters=sum(p.numel() for p in objective.parameters()),
        trained=sum(p.numel() for p in objective.parameters() if p.requires_grad),
    )


def published_rate(cost: Cost) -> float:
    """Floating-point operations per second and GPU that the published hours come to, by our count."""
    return 2 * cost.total * PUBLISHED["steps"] * PUBLISHED["batch"] / PUBLISHED["hours"] / 3600


START, END = "<!-- benchmarks/cost.py writes from here -->", "<!-- to here -->"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, the first column to the left, the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def block(costs: dict[str, Cost]) -> str:
    """What the page says of the counts."""
    work, space = [], []
    for name, c in costs.items():
        branches = (c.teacher, c.intact, c.elastic, c.total)
        work.append([f"`{name}`", *(f"{value / 1e9:.1f}" for value in branches), f"{c.gpu_hours(1e8, ASSUMED):.0f}"])
        counts = [f"{value / 1e6:.1f}" for value in (c.backbone, c.trained, c.parameters)]
        sizes = [f"{value / 1e9:.2f}" for value in (c.resident_bytes, c.state_bytes, 4 * c.backbone, 4 * c.parameters)]
        space.append([f"`{name}`", *counts, *sizes])
    rate = published_rate(costs["poa_vit_large"])
    words = [
        f"GPU-hours at an assumed {ASSUMED / 1e12:.0f} x 10^12 operations per second and GPU, two for a multiply-add. The paper's",
        f"{PUBLISHED['hours']} A100-hours for {PUBLISHED['steps']:,} steps of {PUBLISHED['batch']} pictures with ViT-L come to "
        f"{rate / 1e12:.0f} x 10^12, derived from its hours and our count",
        "of `poa_vit_large`.",
    ]
    heads = ["10^9 multiply-adds per picture", "teacher", "intact", "elastic, mean", "sum", "GPU-hours, 10^8 pictures"]
    parts = ["10^6 parameters, then GB", "backbone", "trained", "all", "in memory", "a state", "`export`", "`export-full`"]
    return "\n\n".join([START, table(heads, work), table(parts, space), "\n".join(words), END])


def block_in(text: str) -> str:
    """That part of the page."""
    return text[text.index(START) : text.index(END) + len(END)]


def main() -> None:
    """Count all recipes and write the tables."""
    costs = {}
    for name in RECIPES:
        costs[name] = count(named(name, "pretrain"))
        print(f"{name}: {costs[name].total / 1e9:.1f} x 10^9 multiply-adds per picture", flush=True)
    page = ROOT / "docs" / "pretraining.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace(block_in(text), block(costs)), encoding="utf-8")


if __name__ == "__main__":
    main()
