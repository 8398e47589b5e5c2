"""What fine-tuning BM-MAE for segmentation costs beside MONAI's UNETR and beside the same network from MONAI's blocks.

    python benchmarks/mri_segmentation.py [--sizes 96 128] [--repeats 3] [--threads 1] [--quick] [--out FILE.jsonl]

A step (forward, Dice and cross-entropy, backward, AdamW) on one study of four scans of random numbers, with the published encoder
(768 channels, 12 blocks, patches of 16) and 16 channels of the decoder at full size. MONAI's blocks need the package einops.

- okavango: ours, all four scans.
- okavango, two of four: the same network on a study that has two scans, whose other tokens are not computed.
- monai, same network: the same from MONAI's `PatchEmbeddingBlock`, `TransformerBlock` and `UNETR`, as the published code builds it.
- monai UNETR: MONAI's UNETR on the four scans as channels: a quarter of the tokens, another network.

Ratios are of medians of processor time, candidates in turns; memory is the greatest of a process of its own that makes two steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import monai
import torch
from monai.networks.blocks import PatchEmbeddingBlock, TransformerBlock
from monai.networks.nets import UNETR
from mri import NAMES, Case, quick
from timing import fresh, interleave, load, peak_memory, publish, speed_record
from torch import Tensor, nn

from okavango.downstream.segmentation.head import Segmenter
from okavango.downstream.segmentation.losses import dice_softmax_multihot
from okavango.models.backbone import create_model
from okavango.zoo.leaderboard.records import Record

FEATURES = 16


class Encoder(nn.Module):
    """The joint encoder from MONAI's blocks, in place of a UNETR's own transformer."""

    def __init__(self, case: Case):
        super().__init__()
        self.embed = nn.ModuleList(
            PatchEmbeddingBlock(1, case.size, case.patch, case.width, case.heads, "conv", "sincos", 0.0, 3) for _ in NAMES
        )
        self.blocks = nn.ModuleList(TransformerBlock(case.width, case.mlp, case.heads, 0.0, True) for _ in range(case.depth))
        self.norm = nn.LayerNorm(case.width)

    def forward(self, volumes: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = torch.cat([embed(volumes[:, i : i + 1]) for i, embed in enumerate(self.embed)], 1)
        hidden = []
        for block in self.blocks:
            x = block(x)
            hidden.append(torch.stack(x.chunk(len(NAMES), 1)).mean(0))
        return torch.stack(self.norm(x).chunk(len(NAMES), 1)).mean(0), hidden


def unetr(case: Case, joint: bool) -> nn.Module:
    """MONAI's UNETR, with its own transformer or with the joint encoder."""
    sizes: dict[str, Any] = {"hidden_size": case.width, "mlp_dim": case.mlp, "num_heads": case.heads}
    network = UNETR(len(NAMES), 3, (case.size,) * 3, FEATURES, **sizes, qkv_bias=True)
    if joint:
        network.vit = Encoder(case)
    return network


class Ours(nn.Module):
    """Our segmenter, as the training loop calls it."""

    def __init__(self, case: Case, names: Sequence[str]):
        super().__init__()
        sizes = dict(patch_size=case.patch, width=case.width, depth=case.depth, heads=case.heads, mlp=case.mlp)
        backbone = create_model("bm_mae", size=case.size, class_token=False, **sizes)
        self.head, self.names = Segmenter(backbone, feature_size=FEATURES, loss="official"), tuple(names)

    def forward(self, volumes: Tensor) -> Tensor:
        inputs = dict(zip(NAMES, volumes.split(1, 1), strict=True))
        present = torch.tensor([[name in self.names for name in NAMES]] * len(volumes))
        return self.head.logits({name: inputs[name] for name in self.names}, present)


CANDIDATES: dict[str, Callable[[Case], nn.Module]] = {
    "okavango": lambda case: Ours(case, NAMES),
    "okavango, two of four": lambda case: Ours(case, NAMES[:2]),
    "monai, same network": lambda case: unetr(case, joint=True),
    "monai UNETR": lambda case: unetr(case, joint=False),
}


class Step:
    """One step after another on one study."""

    def __init__(self, who: str, case: Case):
        torch.manual_seed(0)
        self.network = CANDIDATES[who](case).train()
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.05, fused=True)
        self.volumes = torch.randn(1, len(NAMES), *(case.size,) * 3)
        self.target = torch.rand(1, 3, *(case.size,) * 3) < 0.1

    def __call__(self) -> None:
        dice_softmax_multihot(self.network(self.volumes), self.target).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def peak_of(who: str, case: Case, threads: int) -> float:
    """Greatest memory of this process after two steps, MiB."""
    torch.set_num_threads(threads)
    step = Step(who, case)
    for _ in range(2):
        step()
    return peak_memory()


def measure(name: str, case: Case, *, repeats: int, threads: int) -> list[Record]:
    """All candidates, taking turns."""
    torch.set_num_threads(threads)
    before = load()
    peaks = {who: fresh(peak_of, who, case, threads) for who in CANDIDATES}
    steps = {who: Step(who, case) for who in CANDIDATES}
    times = interleave(steps, repeats, time.process_time if threads == 1 else time.perf_counter)
    seconds = {who: median(values) for who, values in times.items()}
    parameters = {who: sum(p.numel() for p in step.network.parameters() if p.requires_grad) for who, step in steps.items()}
    shown = {
        "case": repr(case),
        "threads": threads,
        "monai": monai.__version__,
        "peak_mib": {w: round(p, 1) for w, p in peaks.items()},
    }
    records = []
    for who in CANDIDATES:
        ratio, memory = seconds[who] / seconds["okavango"], peaks[who] / peaks["okavango"]
        notes = "" if who == "okavango" else f"our step is {ratio:.2f} times as fast, with {1 / memory:.2f} of the memory"
        common: dict[str, Any] = {
            "protocol": "mri_segmentation_step/v1",
            "n": repeats,
            "loads": (before, load()),
            "times": times,
            "settings": shown,
            "parameters": parameters[who],
            "baseline": who,
            "notes": notes,
        }
        records.append(speed_record(name, "studies per second", 1 / seconds[who], **common))
        records.append(speed_record(name, "peak memory, MiB", peaks[who], **common))
        print(f"{name}, {who}: {seconds[who]:.3f} s a study, {peaks[who]:.0f} MiB; {notes}", flush=True)
    return records


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """All sizes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128], help="voxels along each axis")
    parser.add_argument("--repeats", type=int, default=3, help="of every step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small network on volumes of half of the size")
    parser.add_argument("--out", type=Path, help="file of records, a page is written beside it")
    given = parser.parse_args(arguments)
    records: list[Record] = []
    for size in given.sizes:
        # MONAI's UNETR has patches of 16 and twelve blocks
        small = quick(size)
        case = Case(size // 2, width=small.width, heads=small.heads, mlp=small.mlp) if given.quick else Case(size)
        records += measure(f"bm_mae unetr {case.size}^3", case, repeats=given.repeats, threads=given.threads)
    publish(records, given.out, "Segmentation by BM-MAE against MONAI")
    return records


if __name__ == "__main__":
    main()
