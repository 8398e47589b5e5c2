"""A backbone of your own in one file: the class, its registration, and the check of everything the library asks of it.

python examples/own_backbone.py
"""

from __future__ import annotations

from torch import nn

import okavango as ok
from okavango.models.backbone import FeatureInfo, resolve_layers
from okavango.models.features import Layer


class Mixer(ok.Backbone):
    """A small MLP-Mixer (arXiv 2105.01601): tokens are mixed by one MLP, channels by another. Pictures have one size."""

    def __init__(self, *, image_size: int = 32, patch_size: int = 8, width: int = 32, depth: int = 2):
        super().__init__()
        count = (image_size // patch_size) ** 2
        self.preprocess = ok.Preprocess(image=ok.Image(size=(image_size, image_size)))
        self.feature_info = FeatureInfo(width, depth, (width,) * depth, (patch_size,) * depth)
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.tokens = nn.ModuleList(nn.Sequential(nn.Linear(count, count), nn.GELU()) for _ in range(depth))
        self.channels = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs, *, present=None, token_mask=None, subnet=None, layers=()) -> ok.Features:
        x = self.patches(inputs["image"])
        grid = {"image": tuple(x.shape[-2:])}
        x = x.flatten(2).transpose(1, 2)
        wanted, kept = resolve_layers(layers, len(self.tokens)), {}
        for i, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * i + 1](x))
            if i in wanted:
                kept[i] = Layer(None, {"image": x}, grid)
        x = self.norm(x)
        return ok.Features(pooled=x.mean(1), tokens={"image": x}, grid=grid, layers=kept)


@ok.register
def mixer(**arguments) -> Mixer:
    """`ok.create_model("mixer")` builds it and checkpoints can hold it.

    In a package of your own, name this function under the entry point ``okavango.models``; then nothing has to be imported first.
    """
    return Mixer(**arguments)


def main() -> None:
    print("checked:", ", ".join(ok.testing.check_backbone("mixer")))
    model = ok.create_model("mixer", depth=3).eval()
    print(
        f"{model.architecture}: {sum(p.numel() for p in model.parameters()):,} parameters, input {model.preprocess['image'].size}"
    )


if __name__ == "__main__":
    main()
