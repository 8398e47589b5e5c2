"""Take the largest subnet that fits a budget out of a supernet, save it, and write it as ONNX.

python examples/extract_and_export.py [--checkpoint NAME] [--params 400000] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import okavango as ok
from okavango.data.sources import open_source
from okavango.zoo.export import export_onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="elastic_vit_tiny.poa_fashion")
    parser.add_argument("--params", type=int, default=400_000, help="most parameters of the stand-alone model")
    parser.add_argument("--out", type=Path, default=Path("extracted"))
    given = parser.parse_args()

    net = ok.load(given.checkpoint)
    for subnet in net.list_subnets():
        print(f"{str(subnet):10} {net.count_parameters(subnet):9,} parameters")

    # fit_budget(latency_ms=2.0) measures on this machine instead; both budgets may be given together.
    fit = net.fit_budget(params=given.params)
    small = net.extract(fit.subnet)
    print(f"chosen: {fit.subnet} with {fit.parameters:,} parameters")

    # The same pictures through the slice and through the stand-alone model: equal up to rounding.
    pictures = open_source("samples/fashion:test")
    images = small.preprocess(image=[pictures[i]["image"] for i in range(8)])
    with torch.no_grad():
        difference = (net(images, subnet=fit.subnet).pooled - small(images).pooled).abs().max()
    print(f"slice and stand-alone model differ by at most {float(difference):.1e}")

    ok.save(small, given.out / str(fit.subnet), card={"extracted from": given.checkpoint, "subnet": str(fit.subnet)})
    path = export_onnx(small, given.out / f"{fit.subnet}.onnx")  # compared with torch before it is written
    print(f"checkpoint and {path.name} are in {given.out}")


if __name__ == "__main__":
    main()
