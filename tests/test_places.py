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
from okavango.downstream.retrieval.search import Nearest, recalls, search
from okavango.downstream.retrieval.views import Views
from okavango.models.adapters import adapt
from okavango.models.backbone import create_model
from okavango.pretrain import loop
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


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    parts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    count=st.integers(1, 5),
    levels=st.sampled_from([2, 1000]),
)
def test_nearest_rows_of_many_parts_are_those_of_one_stable_sort(seed, parts, count, levels):
    """Of whole numbers, so that all distances are exact; with two levels most of them are equal."""
    rng = np.random.default_rng(seed)
    queries, database = (rng.integers(0, levels, (size, 3)).astype(np.float64) for size in (4, sum(parts)))
    count = min(count, len(database))
    distances = ((queries[:, None] - database) ** 2).sum(2)
    order = np.argsort(distances, axis=1, kind="stable")[:, :count]
    nearest = Nearest(torch.from_numpy(queries), count, cells=int(rng.integers(1, 200)))
    for part in np.split(database, np.cumsum(parts)[:-1]):
        nearest.look(torch.from_numpy(part))
    assert np.array_equal(nearest.rows, order)
    assert np.array_equal(nearest.distances, np.take_along_axis(distances, order, 1))


def test_of_equal_rows_the_first_are_found():
    database = torch.eye(4).repeat(50, 1)  # every row fifty times
    for cells in (1, 60, 2**20):
        found, rows = search(torch.eye(4)[:2], database, 5, cells=cells)
        assert rows.tolist() == [[0, 4, 8, 12, 16], [1, 5, 9, 13, 17]] and not found.any()


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


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), m=st.integers(1, 30), rows=st.integers(1, 31), kinds=st.integers(1, 6))
def test_blocks_of_rows_and_equal_cells_change_no_match(seed, n, m, rows, kinds):
    """Cells of few kinds, of whole numbers: most similarities are equal, and the first of equal ones is the nearest."""
    rng = np.random.default_rng(seed)
    table = rng.integers(-2, 3, (kinds, 3)).astype(np.float32)
    a, b = table[rng.integers(0, kinds, (2, n))], table[rng.integers(0, kinds, (2, m))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reranking, "ROWS", rows)
        partner, both = mutual(torch.from_numpy(a), torch.from_numpy(b))
    similarity = a @ b.transpose(0, 2, 1)
    assert np.array_equal(partner, similarity.argmax(2))
    assert np.array_equal(both, np.take_along_axis(similarity.argmax(1), partner.numpy(), 1) == np.arange(n))


def test_rerank_keeps_the_order_of_equal_counts_and_needs_no_room(monkeypatch):
    local = F.normalize(torch.randn(6, 4, 4, 8), dim=-1)
    candidates = torch.tensor([[5, 0, 3, 3, 1]])
    whole = rerank(local[:1], local, candidates)
    monkeypatch.setattr(reranking, "ROWS", 3)
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

    return verbs.finetune("places", data=str(folder), out=out, say=say, **_given(changes))


def _given(changes: dict) -> dict:
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
    return {**given, **changes}


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


# -- views, early ends, exports of adapters alone -----------------------------------------------------------------------------


def test_views_follow_from_the_seed():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 24, 32)).astype(np.uint8))
    views = Views(jitter=(1.0, 0.4, 0.4, 0.2, 0.05), crop=0.5, perspective=0.2)
    one, same, other = views(image, 1), views(image, 1), views(image, 2)
    assert one.shape == image.shape and one.dtype == torch.uint8
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert views(image[:1], 1).shape == (1, 24, 32)
    assert not Views() and torch.equal(Views()(image, 1), image) and views
    # a crop of half the area shows a ramp of at least half its range, whole pixels keep their order, and nothing is mirrored
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(3, 24, 32)
    for seed in range(20):
        seen = Views(crop=0.5)(ramp, seed)[0, 0].int()
        assert (seen.diff() >= 0).all() and 248 * 0.6 < int(seen[-1] - seen[0]) < 248
        lit = Views(jitter=(1.0, 0.5, 0.0, 0.0, 0.0))(ramp, seed).float().mean() / ramp.float().mean()
        assert 0.45 < lit < 1.5
    with pytest.raises(ValueError, match="jitter"):
        Views(jitter=(2.0, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="0 < crop"):
        Views(crop=0.0)


def test_each_picture_of_a_triplet_is_changed_by_its_own_seed(folder):
    source, objective = training_part(str(folder)), head(views=Views(jitter=(1.0, 0.9, 0.9, 0.9, 0.0)))
    objective.mine(source, 0)
    sample = objective.samples(source)[0]
    sample = {**sample, "images": [sample["images"][0]] * 4}
    transform = objective.transform(objective.backbone.preprocess)
    changed = transform(sample, seed=5)["image"]
    assert torch.equal(changed, transform(sample, seed=5)["image"]) and not torch.equal(changed, transform(sample, seed=6)["image"])
    assert all(not torch.equal(changed[0], changed[k]) for k in (1, 2, 3))
    plain = head().transform(objective.backbone.preprocess)(sample, seed=5)["image"]
    assert torch.equal(plain[0], plain[1]) and not torch.equal(plain[0], changed[0])


class Falling:
    """Stands for an evaluation: best at the second time, worse from then on."""

    def __init__(self):
        self.results = []

    def __call__(self, model):
        self.results.append(float(model.pool.p))
        return {"R@5": -abs(len(self.results) - 2.0), "R@1": 1.0}


def test_a_run_ends_when_patience_does_and_exports_the_best(folder, tmp_path, monkeypatch):
    said, evaluations = [], []

    def places(*_):
        evaluations.append(Falling())
        return {"val": evaluations[-1]}

    monkeypatch.setattr(verbs, "validation", places)
    options = {"steps": 30, "eval_every": 2, "patience": 2, "save_every": 3, "optim.lr": 3e-2}
    run = train(folder, tmp_path / "whole", **options)
    values = evaluations[0].results
    assert len(values) == 4  # the second is the best, two more do not beat it
    assert float(ok.load(run / "export").pool.p) == values[1] != values[3]
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 7 and (run / "state" / "step-00000008").is_dir()
    # a run that is over stays so; one that was killed in between ends with the same weights
    again = verbs.finetune("places", data=str(folder), out=run, say=said.append, **_given(options))
    assert len(evaluations[1].results) == 0 and any("step 4" in line for line in said)
    with pytest.raises(Killed):
        train(folder, tmp_path / "killed", stop=7, **options)
    monkeypatch.setattr(verbs, "validation", lambda *_: {"val": _resumed(evaluations[0], 3)})
    train(folder, tmp_path / "killed", **options)
    ours, theirs = (load_file(path / "export" / "model.safetensors") for path in (again, tmp_path / "killed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _resumed(whole: Falling, count: int) -> Falling:
    evaluation = Falling()
    evaluation.results = whole.results[:count]
    return evaluation


def test_patience_needs_something_to_wait_for(folder, tmp_path):
    recipe = named("places", "finetune")
    with pytest.raises(ValueError, match="give --eval-every as well"):
        dataclasses.replace(recipe, start="x", run=dataclasses.replace(recipe.run, patience=2)).check()
    with pytest.raises(ValueError, match="no places to measure"):
        train(folder, tmp_path / "none", eval_every=2)
    with pytest.raises(loop.RunError, match="expected one of places_val_R@5, places_val_R@1"):
        train(folder, tmp_path / "watch", eval_every=2, patience=1, watch="accuracy", val=str(folder / "images" / "train"))


def test_recall_on_other_places_during_a_run(folder, tmp_path):
    run = train(folder, tmp_path / "run", steps=4, eval_every=2, val=str(folder / "images" / "train"), val_top=4)
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (found,) = [entry for entry in entries if "places_val_R@5" in entry]
    assert found["step"] == 1 and 0 <= found["places_val_R@1"] <= found["places_val_R@5"] <= 1
    backbone = ok.load(run / "export")
    evaluate = verbs.OnlinePlaces(Places(folder / "images" / "train"), 4)
    ranked = evaluate(backbone)
    assert ranked.keys() == {"R@5", "R@1"} and ranked == evaluate(backbone)


@pytest.mark.parametrize("adapt", ["bottleneck", "lora"])
def test_a_run_that_exports_adapters_alone(folder, tmp_path, adapt):
    base = tmp_path / "base"
    ok.save(create_model("vit", **VIT), str(base))
    options = {"start": str(base), "model": "", "model_args": {}, "steps": 2, "objective.adapt": adapt}
    whole = train(folder, tmp_path / "whole", **options)
    small = train(folder, tmp_path / "small", **options, **{"objective.adapters_only": True})
    names = set(load_file(small / "export" / "model.safetensors"))
    assert names and not any(name.startswith("backbone.") and "lora_" not in name for name in names)
    assert not (small / "export-full").exists() and not (small / "base").exists()
    one, other = ok.load(whole / "export"), ok.load(small / "export")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    report = other.load_report
    assert not report.missing and not report.unexpected and len(report.matched) == len(other.state_dict())
    assert report.renamed["base/trunk.cls_token"] == "backbone.trunk.cls_token"
    # a second stage goes on from it, and refers to the same base
    second = train(folder, tmp_path / "second", **{**options, "start": str(small / "export"), "objective.adapters_only": True})
    assert json.loads((second / "export" / "config.json").read_text())["parent"]["name"] == "../../base"
    ok.load(second / "export")
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="holds only what was trained on its base.*name it by base="):
        ok.load(small / "export")
    assert all(
        torch.equal(tensor, one.state_dict()[name])
        for name, tensor in ok.load(small / "export", base=tmp_path / "moved").state_dict().items()
    )
    ok.save(create_model("vit", **VIT), str(tmp_path / "other"))
    with pytest.raises(ValueError, match="the one that was trained on"):
        ok.load(small / "export", base=tmp_path / "other")


def test_adapters_alone_without_a_checkpoint_to_start_from(folder, tmp_path):
    run = train(folder, tmp_path / "run", steps=2, **{"objective.adapters_only": True})
    assert json.loads((run / "export" / "config.json").read_text())["parent"]["name"] == "../base"
    loaded, base = ok.load(run / "export"), ok.load(run / "base")
    assert all(torch.equal(loaded.backbone.state_dict()[name], tensor) for name, tensor in base.state_dict().items())
    run.rename(tmp_path / "elsewhere")  # the two lie together, so they move together
    ok.load(tmp_path / "elsewhere" / "export")
    # adapters on a whole adapted checkpoint refer to that
    whole = train(folder, tmp_path / "whole", steps=2)
    more = train(
        folder,
        tmp_path / "more",
        steps=2,
        start=str(whole / "export"),
        model="",
        model_args={},
        **{"objective.adapters_only": True},
    )
    assert json.loads((more / "export" / "config.json").read_text())["parent"]["name"] == "../../whole/export"
    ok.load(more / "export")
