"""Studies per second: files read, turned, resampled, cropped, z-scored and augmented; ours and MONAI's dictionary transforms.

    python benchmarks/mri_data.py [--count 4] [--repeats 5] [--out FILE.jsonl]

The studies are semi-synthetic phantoms of four sequences, written once to a temporary folder: 240 x 240 x 155 voxels of 1 mm, as
BraTS has them, and 120 x 120 x 78 of 2 mm, which are resampled. Both sides do the same and give the same volumes, 128 x 128 x 128:
the greatest difference is in the records. First pass: from the .nii.gz files. Cached: the deterministic part from our cache, from
MONAI's PersistentDataset on disk, and from its CacheDataset in memory, then the random part. One thread, processor time, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import monai
import torch
from timing import interleave, load, publish, speed_record

from okavango.data.studies import Augment, Prepare, Prepared, Studies, monai_transforms
from okavango.models.preprocess import Preprocess, Resize, Volume
from okavango.samples.brain import SEQUENCES, build, phantom
from okavango.zoo.leaderboard.records import Record

CASES = {"240x240x155 of 1 mm": ((240, 240, 155), 1.0), "120x120x78 of 2 mm": ((120, 120, 78), 2.0)}


def preprocess(size: int = 128) -> Preprocess:
    """That of BM-MAE: voxels of 1 mm, a centred cube, z-score over what is not zero."""
    resize = Resize(rule="crop", interpolation="bilinear")
    return Preprocess(
        {name: Volume(channels=(name,), size=(size,) * 3, spacing=(1.0, 1.0, 1.0), resize=resize) for name in SEQUENCES}
    )


def candidates(folder: Path, work: Path, size: int) -> tuple[dict[str, dict[str, Callable[[], object]]], float]:
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


def measured(case: str, folder: Path, work: Path, size: int, repeats: int) -> list[Record]:
    """A record per pass and candidate."""
    passes, apart = candidates(folder, work, size)
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=4, help="studies")
    parser.add_argument("--size", type=int, default=128, help="voxels along each axis that the network sees")
    parser.add_argument("--shrink", type=int, default=1, help="divides the size of the files, for a quick try")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a file *.jsonl for the records; a page is drawn beside it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = []
    for case, (shape, spacing) in CASES.items():
        with tempfile.TemporaryDirectory(prefix="mri-data-") as work:
            folder = Path(work, "studies")
            build(
                folder,
                [phantom(0)],
                count=given.count,
                size=[side // given.shrink for side in shape],
                spacing=spacing * given.shrink,
            )
            records += measured(case, folder, Path(work), given.size, given.repeats)
    publish(records, given.out, "Studies of brain MRI per second, semi-synthetic")


if __name__ == "__main__":
    main()
