"""Retrieval from pictures to records and page: store, describers, re-rankers, commands, and what they say to mistakes."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import okavango as ok
from okavango import cli, retrieval_verbs
from okavango.data.sources import Arrays, ImageFolder
from okavango.downstream.retrieval import rerankers
from okavango.downstream.retrieval.describe import BackboneDescriber, Chance, Thumbnail, cell_centres, describe_source
from okavango.downstream.retrieval.evaluate import load_ranking
from okavango.downstream.retrieval.store import DescriptorStore, content_key
from okavango.models.adapters import adapt
from okavango.models.backbone import create_model
from okavango.zoo.leaderboard.records import read_records

VIT = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "head_dim": 16, "layer_scale": 1.0}
PLACES = 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six places of coloured blocks, two views each in the database and one as a query; a seventh query stands nowhere."""
    root, random = tmp_path_factory.mktemp("places"), np.random.default_rng(0)
    for part, views in (("database", 2), ("queries", 1)):
        (root / part).mkdir()
        for place in range(PLACES + (part == "queries")):
            blocks = np.random.default_rng(place).integers(0, 256, (4, 4, 3)).astype(np.uint8)
            for view in range(views):
                pixels = np.asarray(Image.fromarray(blocks).resize((32, 32), Image.Resampling.NEAREST), np.float64)
                noisy = np.clip(pixels + random.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(root / part / f"@{1000 * place + 3 * view:010.2f}@0000000.00@@@@@{place}@@0@@@@@@.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "vit"
    torch.manual_seed(0)
    ok.save(create_model("vit", **VIT), str(path))
    return str(path)


def pictures(count: int = 5) -> Arrays:
    return Arrays(np.random.default_rng(3).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8))


# -- store ------------------------------------------------------------------------------------------------------------------


def test_store_keeps_what_it_is_given_and_goes_on(tmp_path, monkeypatch):
    images = [sample["image"] for sample in map(pictures().__getitem__, range(5))]
    keys = [content_key(image) for image in images]
    assert len(set(keys)) == 5 and content_key(images[0].clone()) == keys[0] != content_key(images[0].permute(0, 2, 1))
    pooled, local = torch.randn(5, 6), torch.randn(5, 2, 3, 4)
    store = DescriptorStore(tmp_path / "store", "m")
    store.add(keys[:3], pooled[:3], local[:3])
    assert len(store) == 3 and keys[0] in store and keys[3] not in store
    store.flush()
    again = DescriptorStore(tmp_path / "store", "m")
    monkeypatch.setattr("okavango.downstream.retrieval.store.SEGMENT", 1)  # every addition becomes a segment
    again.add(keys, pooled, local)  # three are known
    assert len(again) == 5 and len(again.segments) == 2
    order = [4, 0, 2]
    assert torch.equal(torch.from_numpy(again.pooled([keys[i] for i in order])), pooled[order])
    assert torch.equal(again.local([keys[i] for i in order]), local[order].half().float())
    assert isinstance(again.segments[0][1], np.memmap) and again.bytes_each == {"global": 24, "local": 48}
    (tmp_path / "store" / "keys-00001.npy").unlink()  # as if it had been stopped while it wrote
    torn = DescriptorStore(tmp_path / "store", "m")
    assert len(torn) == 3
    torn.add(keys, pooled, local)
    assert torch.equal(torch.from_numpy(torn.pooled(keys)), pooled)
    with pytest.raises(ValueError, match="holds descriptors of another model"):
        DescriptorStore(tmp_path / "store", "n")
    with pytest.raises(ValueError, match="no store of descriptors"):
        DescriptorStore(tmp_path, "m")


def test_a_stopped_pass_describes_only_the_rest(tmp_path):
    seen = []

    class Counting(Thumbnail):
        def __call__(self, images):
            seen.append(len(images))
            if sum(seen) == 4:
                raise KeyboardInterrupt
            return super().__call__(images)

    store = DescriptorStore(tmp_path, "t")
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("okavango.downstream.retrieval.store.SEGMENT", 1)
        describe_source(Counting(), pictures(), store, batch=2)
    seen[:] = [10]
    found = describe_source(Counting(), pictures(), DescriptorStore(tmp_path, "t"), batch=2)
    assert seen[1:] == [2, 1] and found.computed == 3 and len(found) == 5
    whole = describe_source(Thumbnail(), pictures(), DescriptorStore(tmp_path / "other", "t"), batch=5)
    assert np.array_equal(found.pooled(), whole.pooled())


# -- describers ---------------------------------------------------------------------------------------------------------------


def test_descriptors_of_backbones_are_their_features_of_unit_length():
    images = [sample["image"] for sample in map(pictures().__getitem__, range(3))]
    backbone = create_model("vit", **VIT).train()
    pooled, local = BackboneDescriber(backbone, local=True)(images)
    assert backbone.training
    with torch.no_grad():
        features = backbone.eval()(**backbone.preprocess(image=images))
    assert torch.equal(pooled, F.normalize(features.pooled, dim=1))
    assert torch.equal(local.flatten(1, 2), F.normalize(features.tokens["image"], dim=2)) and local.shape == (3, 4, 4, 32)
    assert BackboneDescriber(backbone)(images)[1] is None
    adapted = adapt(create_model("vit", **VIT), local=(8, 4))
    describer = BackboneDescriber(adapted, local=True)
    assert describer.upsampled and describer(images)[1].shape == (3, 13, 13, 4)
    maps = BackboneDescriber(create_model("timm/resnet10t", image_size=32), local=True)(images)[1]
    assert maps.ndim == 4 and maps.norm(dim=-1) == pytest.approx(torch.ones(maps.shape[:3]), abs=1e-4)


def test_digests_tell_models_apart():
    backbone = create_model("vit", **VIT)
    before = BackboneDescriber(backbone).digest
    assert before == BackboneDescriber(backbone).digest != BackboneDescriber(backbone, local=True).digest
    with torch.no_grad():
        next(backbone.parameters()).flatten()[0] += 1
    assert BackboneDescriber(backbone).digest != before


def test_baselines():
    images = [sample["image"] for sample in map(pictures().__getitem__, range(3))]
    small, none = Thumbnail(4)(images)
    grey = [np.tensordot([0.2989, 0.587, 0.114], image.numpy(), 1).astype(np.float32) for image in images]
    shrunk = np.stack([np.asarray(Image.fromarray(g).resize((4, 4), Image.Resampling.BILINEAR)).ravel() for g in grey])
    shrunk -= shrunk.mean(1, keepdims=True)
    similarity = (small.numpy() * shrunk).sum(1) / np.linalg.norm(shrunk, axis=1)
    assert none is None and (similarity > 0.999).all()  # grey values are rounded first
    bright = [(image // 2 + 60).to(torch.uint8) for image in images]
    assert (Thumbnail(4)(bright)[0] * small).sum(1).min() > 0.99
    chance = Chance()(images)[0]
    assert torch.equal(chance, Chance()(images)[0]) and (chance @ chance.T).fill_diagonal_(0).abs().max() < 0.3
    assert not torch.equal(chance, Chance(seed=1)(images)[0])


def test_cells_of_local_maps_lie_where_their_patches_do():
    assert cell_centres(2, 4, upsampled=False)[:5].tolist() == [
        [0.125, 0.25],
        [0.375, 0.25],
        [0.625, 0.25],
        [0.875, 0.25],
        [0.125, 0.75],
    ]
    up = cell_centres(61, 61, upsampled=True) * 224  # SelaVPR: 7 + 3.5 o
    assert up[:3, 0].tolist() == pytest.approx([7, 10.5, 14]) and up[-1].tolist() == pytest.approx([217, 217])


# -- re-rankers ---------------------------------------------------------------------------------------------------------------


def test_sum_of_similarities_is_that_of_a_plain_loop():
    query, candidates = F.normalize(torch.randn(3, 2, 5), dim=-1), F.normalize(torch.randn(4, 2, 4, 5), dim=-1)
    expected = []
    for candidate in candidates:
        table = query.flatten(0, 1) @ candidate.flatten(0, 1).T
        pairs = [(i, int(table[i].argmax())) for i in range(6)]
        expected.append(sum(float(table[i, j]) for i, j in pairs if int(table[:, j].argmax()) == i))
    assert rerankers.similarity_sum(query, candidates).tolist() == pytest.approx(expected)
    assert rerankers.mutual_nn(query, query[None]).tolist() == [6]


def test_ransac_counts_matches_that_agree(monkeypatch):
    cells = F.normalize(torch.randn(9, 9, 32), dim=-1)
    moved = F.normalize(torch.randn(9, 9, 32), dim=-1)
    moved[:, 2:] = cells[:, :-2]  # a shift by two cells: 63 matches agree
    shuffled = cells.flatten(0, 1)[torch.randperm(81)].view(9, 9, 32)  # as many mutual matches, no agreement
    candidates = torch.stack([moved, shuffled])
    right, wrong = rerankers.ransac(cells, candidates).tolist()
    assert 63 <= right <= 70 and wrong < 30 < rerankers.mutual_nn(cells, candidates).min()
    assert rerankers.ransac(cells, candidates).tolist() == [right, wrong]
    assert rerankers.ransac(cells[:1, :3], candidates[:, :1, :3]).tolist() == [0, 0]  # too few matches
    with pytest.raises(ValueError, match="did you mean 'mutual-nn'"):
        rerankers.find_reranker("mutual-mm")


def test_reranking_has_a_budget_and_keeps_ties(tmp_path, monkeypatch):
    store = DescriptorStore(tmp_path, "m")

    class Local(Thumbnail):
        def __call__(self, images):
            return super().__call__(images)[0], torch.stack([image[:1, :2, :2].permute(1, 2, 0).float() for image in images])

    found = describe_source(Local(), pictures(6), store)
    rows = np.array([[5, 4, 3, 2, 1, 0], [0, 1, 2, -1, -1, -1]])
    values = {5: 1.0, 4: 2.0, 3: 1.0, 2: 2.0, 1: 9.0, 0: 0.0}
    by_value = {found.local([row]).flatten().tolist().__repr__(): value for row, value in values.items()}

    def score(query, candidates):
        return torch.tensor([by_value[candidate.flatten().tolist().__repr__()] for candidate in candidates])

    for room in (2**28, 1):
        monkeypatch.setattr(rerankers, "ROOM", room)
        order, scores, _ = rerankers.rerank_all(score, found, found, rows, budget=4)
        assert np.take_along_axis(rows, order, 1).tolist() == [[4, 2, 5, 3, 1, 0], [1, 2, 0, -1, -1, -1]]
        assert scores[0].tolist() == [2, 2, 1, 1] and scores[1].tolist() == [9, 2, 0, -np.inf]


# -- runs ----------------------------------------------------------------------------------------------------------------------


def two_stages(backbone, folder, top: int) -> list[list[int]]:
    """Rows in the order of distances, the first `top` by mutual matches: one query, one candidate, one cell at a time."""
    parts = []
    for part in ("database", "queries"):
        source = ImageFolder(folder / part)
        with torch.no_grad():
            features = backbone(**backbone.preprocess(image=[source[i]["image"] for i in range(len(source))]))
        local = F.normalize(features.tokens["image"], dim=2).half().float()
        parts.append((F.normalize(features.pooled, dim=1), local))
    (known, maps), (asked, cells) = parts
    found = []
    for query, own in zip(asked, cells, strict=True):
        order = ((known - query) ** 2).sum(1).argsort(stable=True).tolist()
        counts = []
        for row in order[:top]:
            table = own @ maps[row].T
            counts.append(sum(int(table[:, int(table[i].argmax())].argmax()) == i for i in range(len(own))))
        first = sorted(range(top), key=lambda rank: -counts[rank])  # stable
        found.append([order[rank] for rank in first] + order[top:])
    return found


def test_evaluate_writes_records_page_and_predictions(folder, checkpoint, tmp_path, capsys):
    report, out = tmp_path / "report", tmp_path / "records.jsonl"
    command = ["evaluate", checkpoint, "--protocol", "retrieval/utm25", "--database", str(folder / "database")]
    command += ["--queries", str(folder / "queries"), "--rerank", "mutual-nn", "--top", "4", "--out", str(out)]
    assert cli.main([*command, "--report", str(report)]) == 0, capsys.readouterr().err
    records = {record.metric: record for record in read_records(out)}
    assert list(records) == ["R@1", "R@5", "R@10", "mAP"]
    ranking, about = load_ranking(report / "ranking.npz")
    first = records["R@1"]
    assert first.protocol == about["protocol"] == "retrieval/utm25" and first.name == f"{checkpoint} + mutual-nn 4"
    assert first.value == ranking.right[:, 0].mean() and first.n == 7 and first.interval[0] <= first.value <= first.interval[1]
    assert ranking.predictions.tolist() == two_stages(ok.load(checkpoint), folder, 4)
    assert first.settings["results"] == json.loads(json.dumps(ranking.results()))
    assert first.settings["results"]["answerable"] == 6 and records["mAP"].n == 6
    assert first.settings["rule"] == {"kind": "radius", "metres": 25.0, "degrees": None}
    assert first.settings["costs"]["bytes_per_image"] == {"global": 128, "local": 4 * 4 * 32 * 2}
    assert {"extraction_ms_per_image", "search_ms_per_query", "rerank_ms_per_candidate", "peak_memory_mib"} <= set(
        first.settings["costs"]
    )
    assert first.weights_sha256 and first.test_manifest_sha256 and first.parameters
    assert ranking.scores.shape == (7, 4) and (np.diff(ranking.scores, axis=1) <= 0).all()

    page = (report / "index.html").read_text()
    assert page.count("<circle") == 12 + 7 and "mutual matches of 16 cells" in page and "Without a place" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "<script" not in page
    assert page.count("data:image/jpeg") >= 7 * 7

    out.unlink()
    assert cli.main([*command, "--report", str(report)]) == 0  # the same again: nothing is described anew
    again = read_records(out)[0]
    assert again.settings["costs"]["images_computed"] == 0 and again.value == first.value


def test_methods_are_compared_on_the_same_queries(folder, tmp_path, capsys):
    for name in ("thumbnail", "chance"):
        (record, *_) = retrieval_verbs.evaluate(name, data=str(folder), report=tmp_path / name, say=lambda line: None)
        assert record.model == record.baseline == name
        assert name == "chance" or record.value >= 5 / 7  # coloured blocks are easy, and one query of seven has no place
    assert cli.main(["leaderboard", "compare", str(tmp_path / "thumbnail"), str(tmp_path / "chance")]) == 0
    assert "thumbnail - chance, R@1: +0." in capsys.readouterr().out
    retrieval_verbs.evaluate("chance", data=str(folder), protocol="retrieval/utm25-heading40", report=tmp_path / "b", say=print)
    assert cli.main(["leaderboard", "compare", str(tmp_path / "thumbnail"), str(tmp_path / "b")]) == 1
    assert "nothing to compare" in capsys.readouterr().err
    (tmp_path / "b" / "ranking.npz").write_bytes(b"PK")
    assert cli.main(["leaderboard", "compare", str(tmp_path / "b"), str(tmp_path / "b")]) == 1
    assert "not the predictions of a retrieval run" in capsys.readouterr().err


def test_every_subnet_of_an_elastic_backbone(folder, tmp_path):
    net = create_model("elastic_vit_tiny")
    names = [str(subnet) for subnet in net.list_subnets()][:2]
    records = retrieval_verbs.evaluate(net, data=str(folder), subnets=names, report=tmp_path / "r", say=lambda line: None)
    assert [record.subnet for record in records if record.metric == "R@1"] == names
    assert all((tmp_path / "r" / name / "index.html").exists() for name in names)


def test_index_commands(folder, checkpoint, tmp_path, capsys):
    index, one = str(tmp_path / "index"), str(folder / "database")
    assert cli.main(["index", "build", checkpoint, one, "--out", index, "--storage", "float16", "--whiten", "8"]) == 0
    assert "12 descriptors of 32 numbers" in capsys.readouterr().out
    assert cli.main(["index", "add", index, str(folder / "queries")]) == 0
    assert "19 descriptors" in capsys.readouterr().out
    assert cli.main(["index", "search", index, one, "--top", "2", "--recall"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13 and "finds 1.0000" in lines[-1]
    for line in lines[:-1]:
        query, first, _ = line.split("\t")
        assert first.split(" ")[0] == query and float(first.split(" ")[1]) == pytest.approx(0, abs=0.05)

    other = create_model("vit", **{**VIT, "width": 16})
    ok.save(other, str(tmp_path / "other"))
    for arguments, message in (
        (["search", index, one, "--checkpoint", str(tmp_path / "other")], "was built with other weights"),
        (["search", str(tmp_path), one], "no index; `okavango index build` writes one"),
        (["build", checkpoint, one, "--out", index], "exists and is not empty"),
        (["build", checkpoint, str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")], "no such folder"),
        (["build", checkpoint, one, "--out", str(tmp_path / "x"), "--factory", "IVF9999,Flat"], "faiss cannot build it"),
    ):
        assert cli.main(["index", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_bad_pictures_are_left_out_and_named(folder, tmp_path, capsys):
    root = tmp_path / "places"
    shutil.copytree(folder, root)
    torn = sorted((root / "database").iterdir())[3]
    torn.write_bytes(torn.read_bytes()[:80])
    (record, *_) = retrieval_verbs.evaluate("thumbnail", data=str(root), report=tmp_path / "r", say=print)
    assert f"left out database: {torn.name}" in capsys.readouterr().out
    ranking, _ = load_ranking(tmp_path / "r" / "ranking.npz")
    assert torn.name not in ranking.database and len(ranking.database) == 11 and record.settings["left_out"] == 1
    assert [ranking.database[own[0]].split("@")[7] for own in ranking.positives[:6]] == [str(place) for place in range(6)]
    assert torn.name in (tmp_path / "r" / "index.html").read_text()


def test_bad_input_is_one_clear_line(folder, checkpoint, tmp_path, capsys):
    root = tmp_path / "places"
    shutil.copytree(folder, root)
    far = tmp_path / "far"
    far.mkdir()
    shutil.copy(sorted((folder / "queries").iterdir())[-1], far)
    (tmp_path / "empty").mkdir()
    database = str(root / "database")
    base = ["evaluate", "thumbnail", "--protocol", "retrieval/utm25"]
    for arguments, status, message in (
        ([*base, "--database", database], 1, "needs a database and queries"),
        ([*base, "--database", database, "--queries", str(tmp_path / "empty")], 1, "no pictures in"),
        ([*base, "--database", database, "--queries", str(far)], 1, "none of 1 queries has its place among 12"),
        ([*base, "--data", str(tmp_path / "empty")], 1, "expected folders database/ and queries/"),
        ([*base, "--data", str(root), "--card", "pitts30k-test"], 1, "the database has 12 pictures, the card says 10,000"),
        ([*base, "--data", str(root), "--rerank", "mutual-nn"], 1, "no local descriptors"),
        ([*base, "--data", str(root), "--rerank", "sift"], 1, "unknown re-ranker 'sift'"),
        ([*base, "--data", str(root), "--top", "0"], 1, "--top 0"),
        ([*base[:3], "retrieval/utm30", "--data", str(root)], 1, "unknown protocol"),
        ([*base, "knn", "--data", str(root)], 2, "measured alone"),
        (["evaluate", "thumbnail", "--data", str(root), "--rerank", "mutual-nn"], 2, "rerank does not go with protocol knn"),
        (["evaluate", "thumbnail"], 2, "--data is needed"),
    ):
        assert cli.main(arguments) == status, arguments
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, (arguments, error)
    (root / "queries" / "holiday.png").write_bytes(sorted((root / "queries").iterdir())[0].read_bytes())
    assert cli.main([*base, "--data", str(root)]) == 1
    assert "'queries/holiday.png' tells no position; expected a name like" in capsys.readouterr().err
    report = tmp_path / "report"
    retrieval_verbs.evaluate("thumbnail", data=str(folder), report=report, say=print)
    assert cli.main(["evaluate", checkpoint, "--protocol", "retrieval", "--data", str(folder), "--report", str(report)]) == 1
    assert "holds descriptors of another model" in capsys.readouterr().err


def test_sources_of_any_kind_serve_where_the_rule_does_not_need_positions(folder, tmp_path):
    known, asked = ImageFolder(folder / "database"), ImageFolder(folder / "queries")
    pairs = {asked.ids[i]: [known.ids[2 * i]] for i in range(6)}
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (record, *_) = retrieval_verbs.evaluate(
        "thumbnail", database=known, queries=asked, protocol="retrieval/pairs", pairs=tmp_path / "pairs.json", say=print
    )
    assert record.protocol == "retrieval/pairs" and record.settings["results"]["recall_answerable"]["R@5"] == 1.0
