"""Place recognition: positions, search, re-ranking, losses, mining, and a run of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import okavango as ok
from okavango import verbs
from okavango.data.places import Places, find_places, neighbourhoods, position, within
from okavango.data.sources import Arrays, BadSample
from okavango.downstream.retrieval import rerank as reranking
from okavango.downstream.retrieval.head import PlaceRecognition, describe
from okavango.downstream.retrieval.losses import global_loss, local_loss, similarity
from okavango.downstream.retrieval.mining import draw, hard_negatives, random_negatives
from okavango.downstream.retrieval.rerank import match_counts, mutual, rerank
from okavango.downstream.retrieval.search import recalls, search
from okavango.models.adapters import adapt
from okavango.models.backbone import create_model
from okavango.recipes import named
from okavango.verbs import training_part

VIT = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "head_dim": 16, "layer_scale": 1.0}
PLACES, VIEWS = 8, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight places of coloured blocks, 100 m apart, each twice in the database and once as a query; one query stands nowhere."""
    root, rng = tmp_path_factory.mktemp("places"), np.random.default_rng(0)
    for part, views in (("database", VIEWS), ("queries", 1)):
        (root / "images" / "train" / part).mkdir(parents=True)
        for place in range(PLACES + (part == "queries")):
            blocks = np.random.default_rng(place).integers(0, 256, (4, 4, 3)).astype(np.uint8)
            for view in range(views):
                pixels = np.asarray(Image.fromarray(blocks).resize((32, 32), Image.Resampling.NEAREST), np.float64)
                noisy = np.clip(pixels + rng.normal(0, 20, pixels.shape), 0, 255).astype(np.uint8)
                east = 584_000 + 100 * place + 3 * view + (50 if place == PLACES else 0)
                name = f"@{east:010.2f}@4477000.00@17@T@@@{part[0]}{place}{view}@@@@@@@@.png"
                Image.fromarray(noisy).save(root / "images" / "train" / part / name)
    return root


# -- positions --------------------------------------------------------------------------------------------------------------


def test_source(folder):
    source = training_part(str(folder))
    assert isinstance(source, Places) and source.name == "train" and source.labels is None and source.classes == ()
    assert len(source) == PLACES * VIEWS + PLACES + 1 == len(source.database) + len(source.queries)
    assert source[0]["id"].startswith("database/@0584000.00@") and source[PLACES * VIEWS]["id"].startswith("queries/@0584000.00@")
    assert source[-1]["image"].shape == (3, 32, 32) and source.database[1].tolist() == [584_003.0, 4_477_000.0]
    assert source.digest == Places(folder / "images" / "train").digest
    assert find_places(folder) is None and find_places(folder, "train") == folder / "images" / "train"
    with pytest.raises(ValueError, match="expected folders database"):
        Places(folder)


@pytest.mark.parametrize("name", ["a.jpg", "@584000.00@.jpg", "@east@north@.jpg", "@1.0@2.0@/picture.jpg"])
def test_names_without_a_position(name):
    with pytest.raises(ValueError, match="tells no position"):
        position(name)


def test_an_at_sign_in_a_folder_does_not_count():
    assert position("set@home/x@y/@0000001.50@0000002.25@rest@.jpg") == (1.5, 2.25)


def test_radius_is_inclusive_to_the_centimetre():
    database = np.array([[584_000.07, 4_477_000.0], [584_025.07, 4_477_000.0], [584_025.08, 4_477_000.0]])
    (near,) = within(database[:1], database, 25.0)
    assert near.tolist() == [0, 1]


def test_queries_without_a_place_do_not_shift_the_others():
    database = np.array([[0.0, 0], [5, 0], [1000, 0], [1020, 0]])
    queries = np.array([[500.0, 0], [1, 0], [1000, 0]])
    kept, positives, excluded = neighbourhoods(database, queries)
    assert kept.tolist() == [1, 2] and [p.tolist() for p in positives] == [[0, 1], [2]]
    assert [e.tolist() for e in excluded] == [[0, 1], [2, 3]]
    assert [e.tolist() for e in neighbourhoods(database, queries, aligned=False)[2]] == [[], [0, 1]]


# -- search and re-ranking --------------------------------------------------------------------------------------------------


def test_search_is_that_of_numpy_in_pieces_of_any_size():
    queries, database = torch.randn(7, 5), torch.randn(30, 5)
    distances = ((queries[:, None] - database) ** 2).sum(2)
    order = np.argsort(distances.numpy(), axis=1, kind="stable")[:, :9]
    for cells in (1, 45, 2**20):
        found, indices = search(queries, database, 9, cells=cells)
        assert indices.tolist() == order.tolist()
        torch.testing.assert_close(found, distances.gather(1, torch.from_numpy(order)))
    same = torch.ones(6, 2)
    assert search(torch.zeros(1, 2), same, 6)[1].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert search(queries, database, 100)[1].shape == (7, 30) and search(queries[:0], database, 3)[1].shape == (0, 3)
    with pytest.raises(ValueError, match="expected"):
        search(queries, torch.randn(30, 4), 3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), m=st.integers(1, 6))
def test_matches_are_those_of_a_plain_loop(seed, n, m):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(size, 3)).astype(np.float32) for size in (n, m))
    nearest = [int(np.argmax([a[i] @ b[j] for j in range(m)])) for i in range(n)]
    pairs = [(i, j) for i, j in enumerate(nearest) if int(np.argmax([a[k] @ b[j] for k in range(n)])) == i]
    partner, both = mutual(torch.from_numpy(a)[None], torch.from_numpy(b)[None])
    assert [(int(i), int(partner[0, i])) for i in both[0].nonzero().flatten()] == pairs
    counts = match_counts(torch.from_numpy(a), torch.from_numpy(b)[None])
    assert counts.tolist() == [len(pairs)] and len(pairs) >= 1


def test_rerank_keeps_the_order_of_equal_counts_and_needs_no_room(monkeypatch):
    local = F.normalize(torch.randn(6, 4, 4, 8), dim=-1)
    candidates = torch.tensor([[5, 0, 3, 3, 1]])
    whole = rerank(local[:1], local, candidates)
    monkeypatch.setattr(reranking, "CELLS", 1)
    for one, other in zip(whole, rerank(local[:1], local, candidates), strict=True):
        assert torch.equal(one, other)
    order, counts = whole
    assert counts[0, 1] == 16 and order[0, 0] == 0  # a picture matches itself everywhere
    assert sorted(order[0].tolist()) == sorted(candidates[0].tolist())
    expected = sorted(range(5), key=lambda place: -int(counts[0, place]))
    assert order[0].tolist() == candidates[0, expected].tolist()


def test_recalls():
    predictions = np.array([[3, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]])
    positives = [np.array([3]), np.array([2, 9]), np.array([7]), np.array([], int)]
    assert recalls(predictions, positives, [1, 2, 3]).tolist() == [0.25, 0.25, 0.5]
    with pytest.raises(ValueError, match="4 rows"):
        recalls(predictions, positives[:2], [1])


# -- losses and mining ------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    anchor, positive, negative = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    loss = global_loss(anchor, positive, negative, margin=0.1)
    torch.testing.assert_close(loss, torch.tensor([[2**0.5 + 0.1, 0.0]]), atol=1e-5, rtol=0)
    a = torch.eye(3)[None]
    b = torch.tensor([[[1.0, 0, 0], [0, 0.8, 0.6], [0, 0, 1]]])
    assert similarity(a, a).item() == 1.0
    torch.testing.assert_close(similarity(a, b), torch.tensor([2.8 / 3]))
    torch.testing.assert_close(local_loss(a, b, a[:, None]), torch.tensor([[1 - 2.8 / 3]]))


def test_gradients_of_matches_flow_to_both_sides():
    a, b = (F.normalize(torch.randn(2, 5, 4, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(similarity, (a, b), eps=1e-8, atol=1e-5)


def test_draws_and_negatives():
    assert draw(100, 10, 0, "pool", 1).tolist() == draw(100, 10, 0, "pool", 1).tolist() != draw(100, 10, 0, "pool", 2).tolist()
    assert sorted(draw(5, 9, 1)) == [0, 1, 2, 3, 4]
    pool = torch.tensor([[0.0], [1], [2], [3]])
    found = hard_negatives(torch.tensor([[0.9]]), pool, np.array([10, 11, 12, 13]), [np.array([11, 5])], 2)
    assert found.tolist() == [[10, 12]]
    with pytest.raises(ValueError, match="3 of 4 pictures"):
        hard_negatives(torch.tensor([[0.9]]), pool, np.array([10, 11, 12, 13]), [np.array([11])], 4)
    rows = random_negatives([np.array([0, 1]), np.array([2])], 5, 3, 0)
    assert sorted(rows[0]) == [2, 3, 4] and 2 not in rows[1] and len(set(rows[1])) == 3
    with pytest.raises(ValueError, match="far enough"):
        random_negatives([np.array([0, 1])], 4, 3, 0)


def head(mining: str = "partial", **arguments) -> PlaceRecognition:
    backbone = adapt(create_model("vit", **VIT), pool="gem", local=(8, 4))
    return PlaceRecognition(backbone, batch=2, mine_every=5, mining=mining, pool=10, **arguments)


@pytest.mark.parametrize("mining", ["partial", "full", "random"])
def test_what_is_mined(folder, mining):
    source, objective = training_part(str(folder)), head(mining)
    modes = {name: module.training for name, module in objective.named_modules()}
    objective.mine(source, 5)
    rows = objective.triplets.clone()
    assert {name: module.training for name, module in objective.named_modules()} == modes
    queries, positives, negatives = rows[:, 0] - len(source.database), rows[:, 1], rows[:, 2:]
    assert len(rows) == 10 and set(queries.tolist()) <= set(range(PLACES))  # the query that stands nowhere is left out
    assert torch.equal(positives // VIEWS, queries) and not (negatives // VIEWS == queries[:, None]).any()
    assert (negatives < len(source.database)).all() and all(len(set(row.tolist())) == 2 for row in negatives)
    objective.mine(source, 5)
    assert torch.equal(objective.triplets, rows)
    objective.mine(source, 10)
    assert not torch.equal(objective.triplets, rows)
    if mining == "full":  # what numpy finds in the descriptors themselves
        pooled, _ = objective.describe(objective.backbone.preprocess(image=[source[i]["image"] for i in range(len(source))]))
        for query, positive, *others in objective.triplets.tolist():
            distances = (pooled[: len(source.database)] - pooled[query]).norm(dim=1)
            own = (query - len(source.database)) * VIEWS
            assert positive == own + int(distances[own : own + VIEWS].argmin())
            distances[own : own + VIEWS] = 9
            assert others == distances.argsort()[:2].tolist()
    samples = objective.samples(source)
    assert len(samples) == 10 and torch.equal(samples[3]["images"][1], source[int(objective.triplets[3, 1])]["image"])


def test_pictures_that_cannot_be_read_are_not_mined(folder):
    source, objective = training_part(str(folder)), head("full")
    whole = type(source)._image
    torn = {int(i) for i in range(0, len(source.database), VIEWS)}

    class Torn(Places):
        def _image(self, index):
            if index in torn:
                raise BadSample(self.ids[index], "torn")
            return whole(self, index)

    objective.mine(Torn(folder / "images" / "train"), 0)
    assert not set(objective.triplets.flatten().tolist()) & torn


def test_mistakes(folder):
    with pytest.raises(ValueError, match="positions"):
        head().mine(Arrays(np.zeros((2, 8, 8), np.uint8)), 0)
    with pytest.raises(ValueError, match="none of 9 queries"):
        head(positive_radius=1e-9).mine(_moved(training_part(str(folder))), 0)
    for arguments in ({"mining": "hardest"}, {"negatives": 0}, {"positive_radius": 30.0}):
        with pytest.raises(ValueError, match="place recognition"):
            PlaceRecognition(create_model("vit", **VIT), **arguments)
    recipe = named("places", "finetune")
    with pytest.raises(ValueError, match="--objective.negative-radius"):
        dataclasses.replace(recipe, start="x", objective=dataclasses.replace(recipe.objective, negative_radius=5.0)).check()
    with pytest.raises(ValueError, match="starts from a checkpoint"):
        named("selavpr_pitts30k", "finetune").check()
    named("selavpr_msls", "finetune").check()


def _moved(source: Places) -> Places:
    source.queries = source.queries + 1.0
    return source


# -- a run ------------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process."""


def train(folder, out, *, stop: int = 0, **changes):
    def say(line: str) -> None:
        if stop and line.startswith(f"step {stop}/"):
            raise Killed  # after the step was made, before its state is saved

    given = {
        "model": "vit",
        "model_args": VIT,
        "steps": 8,
        "workers": 0,
        "threads": 1,
        "trackers": (),
        "log_every": 1,
        "save_every": 1,
        "objective.mine_every": 3,
        "objective.pool_size": 12,
        "optim.lr": 3e-3,
    }
    return verbs.finetune("places", data=str(folder), out=out, say=say, **{**given, **changes})


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that was left alone."""
    return train(folder, tmp_path_factory.mktemp("run") / "whole")


@pytest.mark.parametrize("stop", [4, 6])
def test_a_killed_run_ends_with_the_same_weights(folder, whole, tmp_path, stop):
    """Killed before the state at a new choice of triplets (3) and in the middle of one (5); the choice is part of the state."""
    with pytest.raises(Killed):
        train(folder, tmp_path / "killed", stop=stop)
    assert not (tmp_path / "killed" / "export").exists()
    train(folder, tmp_path / "killed")
    for part in ("export", "export-full"):
        ours, theirs = (load_file(run / part / "model.safetensors") for run in (whole, tmp_path / "killed"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(8))


def test_a_run_learns_and_a_second_stage_goes_on(folder, tmp_path):
    source = training_part(str(folder))

    def recall(backbone) -> tuple[float, int]:
        pooled, local = describe(backbone, backbone.preprocess(image=[source[i]["image"] for i in range(len(source))]))
        database, queries = pooled[: len(source.database)], pooled[len(source.database) : -1]
        place = torch.arange(PLACES)[:, None]
        distances = torch.cdist(queries, database)
        own = torch.arange(len(database))[None] // VIEWS == place
        gap = (distances.masked_fill(own, 9).amin(1) - distances.masked_fill(~own, 9).amin(1)).mean()
        return float(gap), local.shape[1]

    torch.manual_seed(verbs.derive(0, "initial weights"))
    before = named("places", "finetune").objective.build(create_model("vit", **VIT), (), named("places", "finetune").run).backbone
    frozen = {name: p.clone() for name, p in before.backbone.state_dict().items()}
    run = train(folder, tmp_path / "first", steps=40, save_every=40, **{"objective.mine_every": 10})
    after = ok.load(run / "export")
    assert all(torch.equal(after.backbone.state_dict()[name], tensor) for name, tensor in frozen.items())
    assert recall(after)[0] > recall(before)[0] + 0.02 and recall(after)[1] == 13
    second = train(folder, tmp_path / "second", steps=2, start=str(run / "export"), model="", model_args={})
    again = ok.load(second / "export")
    assert {name for name, p in again.named_parameters() if p.requires_grad} == set(again.trained())
    assert all(torch.equal(again.backbone.state_dict()[name], tensor) for name, tensor in frozen.items())
