"""What BM-MAE costs beside the same network made of MONAI's blocks.

    python benchmarks/mri.py step [--sizes 96 128] [--batch 1] [--repeats 3] [--threads 1] [--quick] [--out FILE.jsonl]

`step`: a pretraining step (forward, backward, AdamW) on four scans of random numbers, of the published network: 768 channels, 12
blocks, decoder 384 and 3, patches of 16, three quarters hidden. MONAI's blocks need the package einops. Candidates, all with the
same optimiser, masks and dropout of the decoder:

- okavango: ours; only visible patches are embedded and encoded, only hidden ones are predicted.
- okavango, no dropout: the same without dropout in the decoder (0.1 as published), which on processors keeps torch from its fast
  attention.
- monai, all tokens: the network from MONAI's `PatchEmbeddingBlock` and `TransformerBlock`; hidden tokens become a mask token and
  go through the encoder like the others.
- monai, visible tokens: the same with the encoder on visible tokens, as the published code does it.
- monai MaskedAutoEncoderViT: MONAI's own masked autoencoder on the four scans as four samples of one channel: as many tokens,
  encoded and decoded, but none sees those of another scan, so its attention is cheaper.

Ratios are of medians of processor time, candidates in turns; memory is the greatest of a process of its own that makes two steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import monai
import torch
from monai.networks.blocks import PatchEmbeddingBlock, TransformerBlock
from monai.networks.nets import MaskedAutoEncoderViT
from timing import fresh, interleave, load, peak_memory, publish, speed_record
from torch import Tensor, nn

from okavango.models.backbone import create_model
from okavango.models.bm_mae import ALIASES, patch_view
from okavango.pretrain.objectives.bm_mae import Collate, MaskedModalities
from okavango.pretrain.settings import BMMAESettings
from okavango.zoo.leaderboard.records import Record

NAMES = tuple(ALIASES)


@dataclass(frozen=True)
class Case:
    """Sizes of encoder and decoder."""

    size: int
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 1536
    decoder: BMMAESettings = BMMAESettings()

    @property
    def tokens(self) -> int:
        return (self.size // self.patch) ** 3


def quick(size: int) -> Case:
    """Seconds instead of minutes, for trying the script."""
    small = BMMAESettings(decoder_width=48, decoder_depth=1, decoder_heads=4, decoder_mlp=96)
    return Case(size // 4, patch=4, width=96, depth=2, heads=4, mlp=192, decoder=small)


# -- the same network from MONAI's blocks ------------------------------------------------------------------------------------------


class Monai(nn.Module):
    """BM-MAE from MONAI's blocks, with the encoder on all tokens or on the visible ones."""

    def __init__(self, case: Case, drop: bool):
        super().__init__()
        self.case, self.drop, decoder = case, drop, case.decoder
        self.embed = nn.ModuleDict(
            {
                name: PatchEmbeddingBlock(1, case.size, case.patch, case.width, case.heads, "conv", "sincos", 0.0, 3)
                for name in NAMES
            }
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, case.width))
        self.encoder_mask = nn.Parameter(torch.zeros(1, 1, case.width), requires_grad=not drop)
        self.blocks = nn.ModuleList(TransformerBlock(case.width, case.mlp, case.heads, 0.0, True) for _ in range(case.depth))
        self.norm = nn.LayerNorm(case.width)
        width = decoder.decoder_width
        self.decoder_embed = nn.Linear(case.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width), requires_grad=drop)
        self.places = nn.Parameter(torch.zeros(1, len(NAMES) * case.tokens, width))
        self.decoder_blocks = nn.ModuleList(
            TransformerBlock(width, decoder.decoder_mlp, decoder.decoder_heads, decoder.decoder_dropout, True)
            for _ in range(decoder.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width)
        self.pred = nn.Linear(width, case.patch**3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = batch["masks"].flatten(1)
        x = torch.cat([self.embed[name](batch[name]) for name in NAMES], 1)
        order = hidden.int().argsort(dim=1, stable=True)
        count = int((~hidden[0]).sum())
        if self.drop:
            x = x.gather(1, order[:, :count, None].expand(-1, -1, x.shape[2]))
        else:
            x = torch.where(hidden[..., None], self.encoder_mask, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        cls, x = x[:, :1], x[:, 1:]
        if self.drop:
            x = torch.cat([x, self.mask_token.expand(len(x), hidden.shape[1] - count, -1)], 1)
            x = x.gather(1, order.argsort(1)[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([cls, x + self.places], 1)
        for block in self.decoder_blocks:
            x = block(x)
        predicted = self.pred(self.decoder_norm(x))[:, 1:]
        target = torch.cat([patch_view(batch[name], self.case.patch).flatten(4).flatten(1, 3) for name in NAMES], 1)
        errors = (predicted - target).square().mean(2) * hidden
        parts = [part.sum() for part in errors.chunk(len(NAMES), 1)]
        counts = [part.sum().clamp_min(1) for part in hidden.chunk(len(NAMES), 1)]
        return torch.stack([part / count for part, count in zip(parts, counts, strict=True)]).sum()


class MonaiMAE(nn.Module):
    """MONAI's own masked autoencoder, the four scans being four samples."""

    def __init__(self, case: Case):
        super().__init__()
        self.patch, decoder = case.patch, case.decoder
        self.net = MaskedAutoEncoderViT(
            1,
            case.size,
            case.patch,
            case.width,
            case.mlp,
            case.depth,
            case.heads,
            decoder.mask_ratio,
            decoder.decoder_width,
            decoder.decoder_mlp,
            decoder.decoder_depth,
            decoder.decoder_heads,
            qkv_bias=True,
        )
        for block in self.net.decoder_blocks:  # it has one rate for both halves
            for module in block.modules():
                if isinstance(module, nn.Dropout):
                    module.p = decoder.decoder_dropout

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        volumes = torch.cat([batch[name] for name in NAMES])
        predicted, mask = self.net(volumes)
        target = patch_view(volumes, self.patch).flatten(4).flatten(1, 3)
        return ((predicted - target).square().mean(2) * mask).sum() / mask.sum()


class Ours(nn.Module):
    """Our objective, as the training loop calls it."""

    def __init__(self, case: Case):
        super().__init__()
        sizes = dict(patch_size=case.patch, width=case.width, depth=case.depth, heads=case.heads, mlp=case.mlp)
        fields = {name: getattr(case.decoder, name) for name in case.decoder.__dataclass_fields__}
        self.objective = MaskedModalities(create_model("bm_mae", size=case.size, **sizes), **fields)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.objective(batch, 0)["loss"]


CANDIDATES: dict[str, Callable[[Case], nn.Module]] = {
    "okavango": Ours,
    "okavango, no dropout": lambda case: Ours(replace(case, decoder=replace(case.decoder, decoder_dropout=0.0))),
    "monai, all tokens": lambda case: Monai(case, drop=False),
    "monai, visible tokens": lambda case: Monai(case, drop=True),
    "monai MaskedAutoEncoderViT": MonaiMAE,
}


# -- measuring ---------------------------------------------------------------------------------------------------------------------


class Step:
    """One step after another on one batch of random scans."""

    def __init__(self, who: str, case: Case, batch: int):
        torch.manual_seed(0)
        self.network = CANDIDATES[who](case).train()
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, fused=True)
        studies = [{name: torch.randn(1, *(case.size,) * 3) for name in NAMES} for _ in range(batch)]
        self.batch = Collate(NAMES, case.patch, case.decoder)(studies, 0)

    def __call__(self) -> None:
        self.network(self.batch).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def peak_of(who: str, case: Case, batch: int, threads: int) -> float:
    """Greatest memory of this process after two steps, MiB."""
    torch.set_num_threads(threads)
    step = Step(who, case, batch)
    for _ in range(2):
        step()
    return peak_memory()


def measure_step(name: str, case: Case, *, batch: int, repeats: int, threads: int) -> list[Record]:
    """All candidates, taking turns."""
    torch.set_num_threads(threads)
    before = load()
    peaks = {who: fresh(peak_of, who, case, batch, threads) for who in CANDIDATES}
    steps = {who: Step(who, case, batch) for who in CANDIDATES}
    times = interleave(steps, repeats, time.process_time if threads == 1 else time.perf_counter)
    seconds = {who: median(values) for who, values in times.items()}
    parameters = {who: sum(p.numel() for p in step.network.parameters() if p.requires_grad) for who, step in steps.items()}
    del steps
    shown: dict[str, Any] = {
        "case": repr(case),
        "batch": batch,
        "threads": threads,
        "monai": monai.__version__,
        "peak_mib": {who: round(peak, 1) for who, peak in peaks.items()},
    }
    records = []
    for who in CANDIDATES:
        ratio, memory = seconds[who] / seconds["okavango"], peaks[who] / peaks["okavango"]
        notes = "" if who == "okavango" else f"our step is {ratio:.2f} times as fast, with {1 / memory:.2f} of the memory"
        common: dict[str, Any] = dict(
            protocol="mri_step/v1",
            n=repeats * batch,
            loads=(before, load()),
            times=times,
            settings=shown,
            parameters=parameters[who],
            baseline=who,
            notes=notes,
        )
        records.append(speed_record(name, "studies per second", batch / seconds[who], **common))
        records.append(speed_record(name, "peak memory, MiB", peaks[who], **common))
        print(f"{name}, {who}: {seconds[who] / batch:.3f} s a study, {peaks[who]:.0f} MiB; {notes}", flush=True)
    return records


def step(arguments: argparse.Namespace) -> list[Record]:
    """Pretraining steps of several sizes."""
    records: list[Record] = []
    for size in arguments.sizes:
        case = quick(size) if arguments.quick else Case(size)
        name = f"bm_mae {case.size}x{case.size}x{case.size}"
        records += measure_step(name, case, batch=arguments.batch, repeats=arguments.repeats, threads=arguments.threads)
    return records


COMMANDS: dict[str, Callable[[argparse.Namespace], list[Record]]] = {"step": step}


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """One of the commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128], help="voxels along each axis")
    parser.add_argument("--batch", type=int, default=1, help="studies of a step")
    parser.add_argument("--repeats", type=int, default=3, help="of every step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small network on volumes of a quarter of the size")
    parser.add_argument("--out", type=Path, help="file of records, a page is written beside it")
    given = parser.parse_args(arguments)
    records = COMMANDS[given.command](given)
    publish(records, given.out, f"BM-MAE against MONAI: {given.command}")
    return records


if __name__ == "__main__":
    main()
