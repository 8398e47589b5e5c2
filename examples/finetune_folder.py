"""Fine-tune the shipped checkpoint on a folder of pictures, one sub-folder per class, and classify others with it.

python examples/finetune_folder.py [--data FOLDER] [--checkpoint NAME] [--steps 30] [--out FOLDER]

Without --data, a small folder is made of the sample that ships with the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import okavango as ok
from okavango.data.sources import open_source


def write_pictures(folder: Path, sample: str, per_class: int) -> None:
    """FOLDER/CLASS/NUMBER.png of the first pictures of each class."""
    source, written = open_source(sample), dict.fromkeys(range(10), 0)
    for index in range(len(source)):
        label = int(source.labels[index])
        if written[label] < per_class:
            path = folder / source.classes[label].replace("/", "-") / f"{written[label]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source[index]["image"][0].numpy()).save(path)
            written[label] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train/ and test/, a folder per class in each")
    parser.add_argument("--checkpoint", default="elastic_vit_tiny.poa_fashion")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("finetuned"))
    given = parser.parse_args()

    data = given.data
    if data is None:
        data = given.out / "pictures"
        write_pictures(data / "train", "samples/fashion:train", 20)
        write_pictures(data / "test", "samples/fashion:test", 4)

    # A run this short needs no average of weights and a larger step. Started again, it goes on where it was stopped.
    run = ok.finetune(
        "classify",
        data=str(data),
        out=given.out / "run",
        start=given.checkpoint,
        steps=given.steps,
        batch=32,
        workers=0,
        trackers=(),
        **{"optim.ema": 0.0, "optim.lr": 4e-3, "optim.lr_scaling": "none"},
    )
    results = ok.predict(str(run / "export"), str(data / "test"), say=lambda line: None)
    right = sum(name.split("/")[-2] == best[0][0] for name, best in results)
    print(f"{right} of {len(results)} pictures of {data / 'test'} are classified rightly after {given.steps} steps")


if __name__ == "__main__":
    main()
