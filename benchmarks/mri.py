"""What BM-MAE costs beside MONAI: a step of pretraining, a step of segmentation, reading and preparing studies.

    python benchmarks/mri.py step         [--sizes 96 128] [--batch 1] [--repeats 3] [--threads 1] [--quick] [--out FILE.jsonl]
    python benchmarks/mri.py segmentation [--sizes 96 128] [--repeats 3] [--threads 1] [--quick] [--out FILE.jsonl]
    python benchmarks/mri.py data         [--count 4] [--repeats 5] [--out FILE.jsonl]

Candidates take turns; ratios are of medians of processor time. The steps are forward, loss, backward and AdamW on scans of random
numbers, with the published encoder (768 channels, 12 blocks, patches of 16); memory is the greatest of a process of its own that
makes two steps. MONAI's blocks need the package einops.

`step`: pretraining on four scans, decoder 384 and 3, three quarters hidden; all with the same masks and dropout of the decoder.

- okavango: ours; only visible patches are embedded and encoded, only hidden ones are predicted.
- okavango, no dropout: the same without dropout in the decoder (0.1 as published).
- monai, all tokens: the network from MONAI's `PatchEmbeddingBlock` and `TransformerBlock`; hidden tokens become a mask token and
  go through the encoder like the others.
- monai, visible tokens: the same with the encoder on visible tokens, as the published code does it.
- monai MaskedAutoEncoderViT: MONAI's own masked autoencoder on the four scans as four samples of one channel: as many tokens,
  encoded and decoded, but none sees those of another scan, so its attention is cheaper.

`segmentation`: Dice and cross-entropy of one study of four scans, 16 channels of the decoder at full size.

- okavango: ours, all four scans.
- okavango, two of four: the same network on a study that has two scans, whose other tokens are not computed.
- monai, same network: the same from MONAI's `PatchEmbeddingBlock`, `TransformerBlock` and `UNETR`, as the published code builds it.
- monai UNETR: MONAI's UNETR on the four scans as channels: a quarter of the tokens, another network.

`data`: studies per second, read, turned, resampled, cropped, z-scored and augmented; ours and MONAI's dictionary transforms. The
studies are semi-synthetic phantoms of four sequences, written once to a temporary folder: 240 x 240 x 155 voxels of 1 mm, as
BraTS has them, and 120 x 120 x 78 of 2 mm, which are resampled. Both sides do the same and give the same volumes, 128 x 128 x 128:
the greatest difference is in the records. First pass: from the .nii.gz files. Cached: the deterministic part from our cache, from
MONAI's PersistentDataset on disk, and from its CacheDataset in memory, then the random part. One thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import monai
import torch
from monai.networks.blocks import PatchEmbeddingBlock, TransformerBlock
from monai.networks.nets import UNETR, MaskedAutoEncoderViT
from timing import fresh, interleave, load, peak_memory, publish, speed_record
from torch import Tensor, nn

from okavango.data.studies import Augment, Prepare, Prepared, Studies, monai_transforms
from okavango.downstream.segmentation.head import Segmenter
from okavango.downstream.segmentation.losses import dice_softmax_multihot
from okavango.models.backbone import create_model
from okavango.models.bm_mae import ALIASES, patch_view
from okavango.models.preprocess import Preprocess, Resize, Volume
from okavango.pretrain.objectives.bm_mae import Collate, MaskedModalities
from okavango.pretrain.settings import BMMAESettings
from okavango.samples.brain import SEQUENCES, build, phantom
from okavango.zoo.leaderboard.records import Record

NAMES = tuple(ALIASES)
FEATURES = 16  # of the segmentation decoder at full size
DATA = {"240x240x155 of 1 mm": ((240, 240, 155), 1.0), "120x120x78 of 2 mm": ((120, 120, 78), 2.0)}


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


# -- pretraining, and the same network from MONAI's blocks -----------------------------------------------------------------------


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


PRETRAINING: dict[str, Callable[[Case], nn.Module]] = {
    "okavango": Ours,
    "okavango, no dropout": lambda case: Ours(replace(case, decoder=replace(case.decoder, decoder_dropout=0.0))),
    "monai, all tokens": lambda case: Monai(case, drop=False),
    "monai, visible tokens": lambda case: Monai(case, drop=True),
    "monai MaskedAutoEncoderViT": MonaiMAE,
}


# -- segmentation, and the same network from MONAI's blocks ----------------------------------------------------------------------


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


class OurSegmenter(nn.Module):
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


SEGMENTATION: dict[str, Callable[[Case], nn.Module]] = {
    "okavango": lambda case: OurSegmenter(case, NAMES),
    "okavango, two of four": lambda case: OurSegmenter(case, NAMES[:2]),
    "monai, same network": lambda case: unetr(case, joint=True),
    "monai UNETR": lambda case: unetr(case, joint=False),
}


# -- measuring steps ---------------------------------------------------------------------------------------------------------------


class Step:
    """One step after another on one batch of random scans.

    Args:
        part: "step" or "segmentation"; who: one of its candidates; batch: studies.
    """

    def __init__(self, part: str, who: str, case: Case, batch: int):
        torch.manual_seed(0)
        candidates, self.lr, make = PARTS[part]
        self.network = candidates[who](case).train()
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.05, fused=True)
        self.loss = make(case, batch)

    def __call__(self) -> None:
        self.loss(self.network).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def pretraining_loss(case: Case, batch: int) -> Callable[[nn.Module], Tensor]:
    """Of a network that returns its loss."""
    studies = [{name: torch.randn(1, *(case.size,) * 3) for name in NAMES} for _ in range(batch)]
    collated = Collate(NAMES, case.patch, case.decoder)(studies, 0)
    return lambda network: network(collated)


def segmentation_loss(case: Case, batch: int) -> Callable[[nn.Module], Tensor]:
    """Of a network that returns logits."""
    volumes = torch.randn(batch, len(NAMES), *(case.size,) * 3)
    target = torch.rand(batch, 3, *(case.size,) * 3) < 0.1
    return lambda network: dice_softmax_multihot(network(volumes), target)


PARTS: dict[str, tuple[dict[str, Callable[[Case], nn.Module]], float, Callable[[Case, int], Callable[[nn.Module], Tensor]]]] = {
    "step": (PRETRAINING, 1e-4, pretraining_loss),
    "segmentation": (SEGMENTATION, 5e-4, segmentation_loss),
}


def peak_of(part: str, who: str, case: Case, batch: int, threads: int) -> float:
    """Greatest memory of this process after two steps, MiB."""
    torch.set_num_threads(threads)
    step = Step(part, who, case, batch)
    for _ in range(2):
        step()
    return peak_memory()


def measure(part: str, name: str, case: Case, *, batch: int, repeats: int, threads: int) -> list[Record]:
    """All candidates of a part, taking turns."""
    candidates = PARTS[part][0]
    torch.set_num_threads(threads)
    before = load()
    peaks = {who: fresh(peak_of, part, who, case, batch, threads) for who in candidates}
    steps = {who: Step(part, who, case, batch) for who in candidates}
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
    for who in candidates:
        ratio, memory = seconds[who] / seconds["okavango"], peaks[who] / peaks["okavango"]
        notes = "" if who == "okavango" else f"our step is {ratio:.2f} times as fast, with {1 / memory:.2f} of the memory"
        common: dict[str, Any] = dict(
            protocol="mri_step/v1" if part == "step" else "mri_segmentation_step/v1",
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


def steps(given: argparse.Namespace) -> list[Record]:
    """Steps of one part at several sizes."""
    records: list[Record] = []
    for size in given.sizes:
        case = quick(size) if given.quick else Case(size)
        name = f"bm_mae {case.size}x{case.size}x{case.size}"
        if given.part == "segmentation":
            name = f"bm_mae unetr {case.size}^3"
            if given.quick:  # MONAI's UNETR has patches of 16 and twelve blocks
                case = Case(size // 2, width=case.width, heads=case.heads, mlp=case.mlp)
                name = f"bm_mae unetr {case.size}^3"
        records += measure(given.part, name, case, batch=given.batch, repeats=given.repeats or 3, threads=given.threads)
    return records


# -- measuring data ----------------------------------------------------------------------------------------------------------------


def preprocess(size: int = 128) -> Preprocess:
    """That of BM-MAE: voxels of 1 mm, a centred cube, z-score over what is not zero."""
    resize = Resize(rule="crop", interpolation="bilinear")
    return Preprocess(
        {name: Volume(channels=(name,), size=(size,) * 3, spacing=(1.0, 1.0, 1.0), resize=resize) for name in SEQUENCES}
    )


def passes_of(folder: Path, work: Path, size: int) -> tuple[dict[str, dict[str, Callable[[], object]]], float]:
    """Pass -> candidate -> a function that goes through all studies; and how far the two sides' volumes lie apart."""
    source, augment, spec = Studies(folder), Augment(), preprocess(size)
    paths = [{name: str(path) for name, path in files.items() if name != "seg"} for files in source.files]
    ours, kept = Prepared(source, Prepare(spec)), Prepared(source, Prepare(spec), work / "ours")
    plain, fixed = monai_transforms(spec, SEQUENCES, augment), monai_transforms(spec, SEQUENCES)
    persistent = monai.data.PersistentDataset(paths, plain, work / "monai")
    memory = monai.data.CacheDataset(paths, plain, progress=False)

    def through(get: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [get(index) for index in range(len(paths))]

    apart = max(
        float((ours[index][name] - fixed(paths[index])[name].as_tensor()).abs().max()) for index in range(1) for name in SEQUENCES
    )
    return {
        "first pass": {
            "okavango": through(lambda index: augment(ours[index], index)),
            "monai": through(lambda index: plain(paths[index])),
        },
        "cached": {
            "okavango": through(lambda index: augment(kept[index], index)),
            "monai_persistent": through(lambda index: persistent[index]),
            "monai_memory": through(lambda index: memory[index]),
        },
    }, apart


def measure_data(case: str, folder: Path, work: Path, size: int, repeats: int) -> list[Record]:
    """A record per pass and candidate."""
    passes, apart = passes_of(folder, work, size)
    count, records = len(Studies(folder)), []
    for name, functions in passes.items():
        before = load()
        seconds = {who: [one / count for one in took] for who, took in interleave(functions, repeats).items()}
        rates = {who: 1 / median(values) for who, values in seconds.items()}
        for who, rate in rates.items():
            record = speed_record(
                "brain MRI",
                "studies per second of processor",
                round(rate, 3),
                protocol="mri_data/v1",
                dataset=f"semi-synthetic, {case}, {name}",
                n=count * repeats,
                loads=(before, load()),
                times=seconds,
                settings={
                    "size": size,
                    "greatest_difference": apart,
                    "monai": monai.__version__,
                },
                baseline=who,
                label=who,
                notes="" if who == "okavango" else f"ours is {rates['okavango'] / rate:.2f} times as fast",
            )
            records.append(record)
    return records


def data(given: argparse.Namespace) -> list[Record]:
    """Reading and preparing studies of both kinds."""
    torch.set_num_threads(given.threads)
    records: list[Record] = []
    for case, (shape, spacing) in DATA.items():
        with tempfile.TemporaryDirectory(prefix="mri-data-") as work:
            folder, sides = Path(work, "studies"), [side // given.shrink for side in shape]
            build(folder, [phantom(0)], count=given.count, size=sides, spacing=spacing * given.shrink)
            records += measure_data(case, folder, Path(work), given.size, given.repeats or 5)
    return records


TITLES = {
    "step": "BM-MAE against MONAI: step",
    "segmentation": "Segmentation by BM-MAE against MONAI",
    "data": "Studies of brain MRI per second, semi-synthetic",
}


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """One of the parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=TITLES)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128], help="of steps: voxels along each axis")
    parser.add_argument("--batch", type=int, default=1, help="studies of a step")
    parser.add_argument("--repeats", type=int, default=0, help="of everything; 0 for 3 of steps, 5 of data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="of steps: a small network on small volumes")
    parser.add_argument("--count", type=int, default=4, help="of data: studies")
    parser.add_argument("--size", type=int, default=128, help="of data: voxels along each axis that the network sees")
    parser.add_argument("--shrink", type=int, default=1, help="of data: divides the size of the files, for a quick try")
    parser.add_argument("--out", type=Path, help="a file *.jsonl for the records; a page is written beside it")
    given = parser.parse_args(arguments)
    records = data(given) if given.part == "data" else steps(given)
    publish(records, given.out, TITLES[given.part])
    return records


if __name__ == "__main__":
    main()
