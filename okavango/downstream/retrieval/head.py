"""Place recognition on a backbone: training by mined triplets, and descriptors for retrieval."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from okavango.data.loading import Order, derive
from okavango.data.places import Places, neighbourhoods
from okavango.data.sources import Part, Source
from okavango.downstream.classification.features import evaluating, extract_features, image_modality
from okavango.downstream.retrieval.losses import global_loss, local_loss
from okavango.downstream.retrieval.mining import best_positives, draw, hard_negatives, random_negatives
from okavango.downstream.retrieval.views import Views
from okavango.models.backbone import Backbone, Inputs
from okavango.models.features import Features, Subnet
from okavango.models.preprocess import Preprocess

MINING = ("partial", "full", "random")


def describe(backbone: Backbone, inputs: Inputs, *, subnet: Subnet | None = None) -> tuple[Tensor, Tensor | None]:
    """Global and local descriptors of pictures, in eval mode without gradients.

    Args:
        backbone: must return `Features.pooled`.
        inputs: what ``preprocess(image=...)`` returns, on the backbone's device.
    Returns:
        float32 (B, D), unit length; and (B, H, W, C), unit length, where the backbone was built with `local`, else None.
    """
    with evaluating(backbone), torch.no_grad():
        features = backbone(inputs, subnet=subnet)
    pooled, local = descriptors(backbone, features)
    return pooled.float(), None if local is None else local.float()


def descriptors(backbone: Backbone, features: Features) -> tuple[Tensor, Tensor | None]:
    """Both kinds of descriptors in a backbone's features; see `describe`."""
    if features.pooled is None:
        raise ValueError(f"{type(backbone).__name__} has no pooled features; place recognition needs a backbone that pools")
    pooled = nn.functional.normalize(features.pooled, dim=-1)
    if getattr(backbone, "local", None) is None:
        return pooled, None
    modality = image_modality(backbone.preprocess)
    return pooled, features.tokens[modality].unflatten(1, features.grid[modality])


class PlaceRecognition(nn.Module):
    """Triplets of places, mined with the descriptors as they are (SelaVPR, arXiv 2402.14505). Satisfies the objective contract.

    A step sees `batch` queries, each with the most similar of its positives and the most similar of what is not its place. They are
    chosen anew every `mine_every` steps; the choice is a buffer, so a run that is resumed in between goes on with the same.

    Args:
        backbone: must return `Features.pooled`; where it has local descriptors, they are trained as well.
        batch: queries per step; with `mine_every`, it gives the number of queries that are mined at once.
        mine_every: steps between choices.
        mining: "partial" takes negatives out of `pool` random database pictures, "full" out of all, "random" any far ones.
        pool: database pictures that "partial" draws.
        negatives: per query.
        positive_radius, negative_radius: metres; queries without a positive are left out, nothing within the second is a negative.
        margin, local_margin: of the triplet loss, and of the loss on local matches.
        local_weight: factor on the latter.
        single_by_place: see `okavango.downstream.retrieval.losses.similarity`.
        aligned: see `okavango.data.places.neighbourhoods`.
        views: how each picture of a triplet is changed, by a seed of its own; mining sees them as they are.
        seed: of the order of queries and of the draws.
        workers: processes that read pictures for mining.
    Raises:
        ValueError: a setting out of range.
    """

    backbone_prefix = "backbone."

    def __init__(
        self,
        backbone: Backbone,
        *,
        batch: int = 4,
        mine_every: int = 250,
        mining: str = "partial",
        pool: int = 1000,
        negatives: int = 2,
        positive_radius: float = 10.0,
        negative_radius: float = 25.0,
        margin: float = 0.1,
        local_margin: float = 0.0,
        local_weight: float = 1.0,
        single_by_place: bool = False,
        aligned: bool = True,
        views: Views | None = None,
        seed: int = 0,
        workers: int = 0,
    ):
        super().__init__()
        if mining not in MINING:
            raise ValueError(f"place recognition: mining={mining!r}; expected {', '.join(MINING)}")
        if min(batch, mine_every, negatives, pool) < 1 or not 0 < positive_radius <= negative_radius:
            raise ValueError(
                f"place recognition: batch {batch}, mine_every {mine_every}, negatives {negatives}, pool {pool}, radii "
                f"{positive_radius}, {negative_radius}; expected counts of at least 1 and 0 < positive_radius <= negative_radius"
            )
        self.batch, self.mine_every, self.mining, self.pool, self.negatives = batch, mine_every, mining, pool, negatives
        self.positive_radius, self.negative_radius = positive_radius, negative_radius
        self.margin, self.local_margin, self.local_weight = margin, local_margin, local_weight
        self.single_by_place, self.aligned, self.views, self.seed, self.workers = single_by_place, aligned, views, seed, workers
        self.modality = image_modality(backbone.preprocess)
        self.backbone = backbone
        self.register_buffer("triplets", torch.zeros(mine_every * batch, 2 + negatives, dtype=torch.int64))
        self.triplets: Tensor

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            batch: {modality: (B * (2 + negatives), C, H, W)}: query, positive and negatives, group by group.
            step: not used; the objective contract has it.
        Returns:
            "loss": scalar, with gradient; "global" and, with local descriptors, "local": its parts, means over pairs of a query and
            a negative; "violations": share of these pairs whose negative is nearer than the positive, by global descriptors.
        """
        pooled, local = descriptors(self.backbone, self.backbone({self.modality: batch[self.modality]}))
        anchor, positive, negatives = self._groups(pooled.float())
        terms = {"global": global_loss(anchor, positive, negatives, margin=self.margin)}
        if local is not None:
            parts = self._groups(local.float().flatten(1, 2))
            terms["local"] = local_loss(*parts, margin=self.local_margin, single_by_place=self.single_by_place)
        means = {name: values.mean() for name, values in terms.items()}
        loss = means["global"] + self.local_weight * means.get("local", 0.0)
        violations = (terms["global"].detach() > self.margin).float().mean()
        return {"loss": loss, **{name: mean.detach() for name, mean in means.items()}, "violations": violations}

    def _groups(self, descriptors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = descriptors.unflatten(0, (-1, 2 + self.negatives))
        return groups[:, 0], groups[:, 1], groups[:, 2:]

    # -- mining ---------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mine(self, source: Places, step: int) -> None:
        """Choose what the next `mine_every` steps see, with the descriptors as they are now.

        Args:
            source: pictures with positions.
            step: number of the first of these steps, a multiple of `mine_every`.
        Raises:
            ValueError: not a source of places, no query with a positive, or too few negatives.
        """
        if not isinstance(source, Places):
            raise ValueError(f"{source.name}: place recognition needs pictures with positions, in database/ and queries/")
        kept, positives, excluded = neighbourhoods(
            source.database, source.queries, positive=self.positive_radius, negative=self.negative_radius, aligned=self.aligned
        )
        if not len(kept):
            raise ValueError(
                f"{source.name}: none of {len(source.queries)} queries has a database picture within {self.positive_radius:g} m; "
                "raise --objective.positive-radius"
            )
        order, size = Order(derive(self.seed, "queries"), len(kept)), len(source.database)
        first = step * self.batch
        chosen = [order[position][1] for position in range(first, first + len(self.triplets))]
        far = [excluded[query] for query in chosen]
        pool = np.arange(size) if self.mining == "full" else draw(size, self.pool, self.seed, "pool", step)
        asked = size + kept[chosen]
        read = [asked, *(positives[query] for query in chosen), *([] if self.mining == "random" else [pool])]
        used = np.unique(np.concatenate(read))
        vectors = self._embed(source, used)
        queries = vectors[np.searchsorted(used, asked)]
        best = used[best_positives(queries, vectors, [np.searchsorted(used, positives[query]) for query in chosen])]
        if self.mining == "random":
            worst = random_negatives(far, size, self.negatives, self.seed, "negatives", step)
        else:
            worst = hard_negatives(queries, vectors[np.searchsorted(used, pool)], pool, far, self.negatives)
        self.triplets.copy_(torch.from_numpy(np.column_stack([asked, best, worst])))

    def _embed(self, source: Places, indices: np.ndarray) -> Tensor:
        """Global descriptors, float32 (n, D); a picture that cannot be read lies far from everything."""
        found = extract_features(self.backbone, Part(source, indices), workers=self.workers)
        vectors = torch.full((len(indices), found.features.shape[1]), 1e3)
        readable = np.setdiff1d(np.arange(len(indices)), [index for index, _ in found.bad])
        vectors[readable] = nn.functional.normalize(torch.from_numpy(found.features), dim=-1)
        return vectors

    def samples(self, source: Places) -> Triplets:
        """What was mined, as a source."""
        return Triplets(source, self.triplets.cpu().numpy().copy())

    # -- the rest of the objective contract -----------------------------------------------------------------------------------

    def transform(self, preprocess: Preprocess) -> TripletTransform:
        """Views, and the checkpoint's own preprocess, for each picture of a triplet; a picklable value for loader workers."""
        return TripletTransform(preprocess, self.modality, self.views or None)

    def collate(self, samples: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Tensor]:
        """Transformed samples -> {modality: float32 (B * (2 + negatives), C, H, W)}; `seed` is not used."""
        return {self.modality: torch.cat([sample[self.modality] for sample in samples])}

    def param_groups(self) -> list[dict[str, Any]]:
        """What is trained, which is all but the frozen network of an adapted backbone, in one group."""
        params = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        return [{"name": "all", "params": params, "lr_mult": 1.0, "wd_mult": 1.0}]

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """The gradient norm is taken over everything that is trained."""
        return [[parameter for parameter in self.parameters() if parameter.requires_grad]]

    def after_step(self, step: int) -> None:
        """Nothing to follow: there is no teacher."""

    def exports(self) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        """The backbone, whose features are the descriptors."""
        return {"places": (self.backbone, {"task": "place recognition"})}

    def describe(self, inputs: Inputs, *, subnet: Subnet | None = None) -> tuple[Tensor, Tensor | None]:
        """See the function of this name."""
        return describe(self.backbone, inputs, subnet=subnet)


class Triplets:
    """Groups of pictures: a query, its positive, its negatives.

    Args:
        source: the pictures; rows: their indices, int64 (N, 2 + negatives).
    """

    classes: tuple[str, ...] = ()
    labels = None

    def __init__(self, source: Source, rows: np.ndarray):
        self.source, self.rows, self.name = source, rows, f"{source.name}, mined"

    @property
    def digest(self) -> str:
        """Follows from the pictures' and the rows."""
        return hashlib.sha256(self.source.digest.encode() + self.rows.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"images": [uint8 (C, H, W), ...], "id": that of the query}."""
        samples = [self.source[int(i)] for i in self.rows[index]]
        return {"images": [sample["image"] for sample in samples], "id": samples[0]["id"]}


@dataclass(frozen=True)
class TripletTransform:
    """Each picture of a group, changed by `views`, as `preprocess` has it.

    Attributes:
        preprocess: of the backbone; modality: which of its inputs gets the pictures; views: None leaves them as they are.
    """

    preprocess: Preprocess
    modality: str
    views: Views | None = None

    def __call__(self, sample: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """{"images": [...], "id"} -> {modality: float32 (2 + negatives, C, H, W), "id"}."""
        images = sample["images"]
        if self.views is not None:
            images = [self.views(image, derive(seed, "view", number)) for number, image in enumerate(images)]
        return {**self.preprocess(**{self.modality: images}), "id": sample.get("id", "?")}
