from __future__ import annotations

import json
import math
import re
import struct
import zlib
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from okavango.models.features import Subnet
from okavango.zoo.leaderboard.page import DARK, RAMP, _size, render, table
from okavango.zoo.leaderboard.records import Record

EVIL = "<script>window.hacked=1</script>\"'&</script>"


def png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\x80")) + chunk(b"IEND", b"")


def results() -> list[Record]:
    """3 sizes x 2 datasets x 2 protocols, a baseline without size on each dataset, and one record with hostile names."""
    records = []
    for d, dataset in enumerate(("clothes", "digits")):
        for p, protocol in enumerate(("knn/v1", "linear/v1")):
            for size in (1, 2, 3):
                value = 0.7 + 0.1 * d + 0.02 * p + 0.01 * size
                records.append(
                    Record(
                        model="elastic", subnet=f"w{32 * size}_d{size}", dataset=dataset, protocol=protocol, metric="accuracy",
                        value=value, interval=(value - 0.02, value + 0.015), n=1000, parameters=10**5 * 10**size,
                        latency_ms=float(size * 9),
                        weights_sha256="ab" * 32, settings={"k": 20}, command="okavango evaluate", created="2026-01-01T00:00:00Z",
                    )
                )  # fmt: skip
        records.append(
            Record(
                model="pixels", dataset=dataset, protocol="knn/v1", metric="accuracy", value=0.6, n=1000, baseline="raw pixels",
                created="2026-01-01T00:00:00Z",
            )
        )  # fmt: skip
    hostile = dict.fromkeys(
        ("model", "dataset", "protocol", "metric", "baseline", "subnet", "notes", "command", "created", "label"), EVIL
    )
    return [*records, Record(**hostile, value=0.1, n=1, settings={EVIL: EVIL}, versions={EVIL: EVIL}, hardware={EVIL: EVIL})]


def cell(subnet: Subnet | str, value: float, **changes) -> Record:
    facts = dict(model="elastic", dataset="clothes", protocol="knn/v1", metric="accuracy", n=1000, created="2026-01-01T00:00:00Z")
    return Record(**{**facts, "subnet": str(subnet), "value": value, "interval": (value - 0.02, value + 0.02), **changes})


def grids() -> list[Record]:
    """Subnets of 3 widths x 2 depths, trained and untrained, x 2 datasets x 2 protocols; one more model, of stages, on one."""
    records = [
        cell(
            Subnet(width, depth), (0.7, 0.4)[b] + 0.1 * d + 0.05 * p + width / 10000 + depth / 1000,
            dataset=dataset, protocol=protocol, baseline=baseline, parameters=width * width * depth,
        )
        for d, dataset in enumerate(("clothes", "digits"))
        for p, protocol in enumerate(("knn/v1", "linear/v1"))
        for b, baseline in enumerate(("pretrained", "untrained"))
        for width in (32, 64, 128)
        for depth in (2, 10)
    ]  # fmt: skip
    stages = [Subnet(width, (3, a, b, 3)) for width in (64, 96) for a in range(4, 9) for b in range(6, 12)]
    return [*records, *(cell(subnet, 0.5, model=EVIL, dataset="digits", protocol="linear/v1") for subnet in stages)]


class Outline(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_one_file_without_network_and_nothing_unescaped(tmp_path):
    path = render(results(), tmp_path / "deep" / "page.html", title=EVIL, pictures={EVIL: png()})
    html = path.read_text()
    outline = Outline()
    outline.feed(html)
    assert sum(tag == "script" for tag, _ in outline.tags) == 2  # the data and the program
    assert EVIL not in html
    for tag, attributes in outline.tags:
        assert tag not in ("link", "iframe", "base", "object")
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:") and "href" not in attributes
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)
    assert sum(tag == "tr" and a.get("class") == "row" for tag, a in outline.tags) == len(results())
    data = re.search(r'<script type="application/json" id="points">(.*?)</script>', html, re.S)
    assert data and json.loads(data[1])[-1]["name"] == EVIL
    assert list(path.parent.iterdir()) == [path]  # nothing is left beside it


def test_the_same_records_give_the_same_bytes(tmp_path):
    first = render(results(), tmp_path / "a.html").read_bytes()
    assert first == render(reversed(results()), tmp_path / "b.html").read_bytes()


def test_no_records_make_a_page_that_says_so(tmp_path):
    assert "No results yet" in render([], tmp_path / "a.html").read_text()
    assert table([]) == "no records"


def test_pictures_must_be_png(tmp_path):
    with pytest.raises(ValueError, match="'cat'.*PNG"):
        render([], tmp_path / "a.html", pictures={"cat": b"<svg>"})


def test_the_table_is_aligned_sorted_and_plain():
    records = [*results()[:4], Record(model="a\x1b[31mb", dataset="clothes", protocol="knn/v1", metric="loss", value=2.5, n=3)]
    lines = table(records).splitlines()
    assert lines[0].split()[:3] == ["model", "subnet", "baseline"]
    knn = [line.split()[1] for line in lines if "knn/v1" in line and "accuracy" in line]
    assert knn == ["w96_d3", "w64_d2", "w32_d1"]
    assert "73.0 %" in table(records) and "71.0–74.5" in table(records) and "100 M" in table(records)
    assert "\x1b" not in table(records) and "a[31mb" in table(records) and " 2.5 " in table(records)
    column = lines[0].index("dataset")
    assert {line[column : column + 7] for line in lines[2:]} == {"clothes"}


# -- maps, as they stand in the file ------------------------------------------------------------------------------------------


def maps(html: str) -> dict[tuple[str, str], list[list[str]]]:
    """(group, map) -> rows of cells as "class text", without tags."""

    def plain(text: str) -> str:
        return " ".join(unescape(re.sub("<[^>]*>", " ", text)).split())

    found = {}
    for group in re.findall(r"<details class=.map-group.*?</details>", html, re.S):
        name = plain(re.search(r"<b>(.*?)</b>", group, re.S)[1])
        for figure in re.findall(r"<figure.*?</figure>", group, re.S):
            rows = re.findall(r"<tr>(.*?)</tr>", figure, re.S)
            cells = [re.findall(r"<t[hd][^>]*?(?:class=.(v\d+)[^>]*)?>(.*?)</t[hd]>", row, re.S) for row in rows]
            caption = plain(re.search(r"<figcaption>(.*?)</figcaption>", figure, re.S)[1])
            found[name, caption] = [[f"{level} {plain(text)}".strip() for level, text in row] for row in cells]
    return found


def test_each_grid_is_a_map_with_values_and_intervals(tmp_path):
    html = render(grids(), tmp_path / "a.html").read_text()
    found = maps(html)
    names = [f"{dataset} · {protocol}" for dataset in ("clothes", "digits") for protocol in ("knn/v1", "linear/v1")]
    assert [key for key in found if key[1] != f"{EVIL} pretrained"] == [
        (name, f"elastic {baseline}") for name in names for baseline in ("pretrained", "untrained")
    ]
    assert found[names[0], "elastic pretrained"] == [
        ["width", "depth 2", "10"],
        ["32", "v9 70.5 68.5–72.5", "v10 71.3 69.3–73.3"],
        ["64", "v10 70.8 68.8–72.8", "v10 71.6 69.6–73.6"],
        ["128", "v10 71.5 69.5–73.5", "v10 72.3 70.3–74.3"],
    ]
    assert found[names[0], "elastic untrained"][1][1] == "v0 40.5 38.5–42.5"  # one scale for all maps of a dataset and protocol
    assert html.count('<details class="map-group" open>') == 1 and html.count('<details class="map-group">') == 3
    depths = found[names[3], f"{EVIL} pretrained"][0][1:]
    assert len(depths) == 30 and depths[:4] == ["depth 3-4-6-3", "3-4-7-3", "3-5-6-3", "3-4-8-3"] and depths[-1] == "3-8-11-3"


def test_what_makes_no_grid_has_no_map(tmp_path):
    row = [cell(Subnet(32, depth), 0.5) for depth in (1, 2, 3)]
    diagonal = [cell(Subnet(32 * size, size), 0.5) for size in (1, 2, 3)]
    names = [cell(name, 0.5, baseline="named") for name in ("", "small", "w32", "w32_d1 ", "w64_d2-", EVIL)]
    scattered = [cell(Subnet(width, depth), 0.5, baseline=f"b{width}{depth}") for width in (32, 64) for depth in (1, 2)]
    for records in (results(), row, diagonal, names, scattered):
        html = render(records, tmp_path / "a.html").read_text()
        assert maps(html) == {} and 'id="maps"' not in html


def test_holes_repeats_and_other_metrics_in_a_map(tmp_path):
    corners = [cell(Subnet(width, depth), 0.5) for width in (32, 64) for depth in (1, 3)]
    newer = cell("w32_d1", 0.9, created="2026-02-01T00:00:00Z")
    older = cell("w64_d3", 0.95, created="2025-02-01T00:00:00Z")
    loss = [cell(Subnet(width, depth), width * depth, metric="loss", interval=None) for width in (32, 64) for depth in (1, 3)]
    found = maps(render([*corners, cell("w48_d2", 0.7), newer, older], tmp_path / "a.html").read_text())
    assert found["clothes · knn/v1", "elastic pretrained"][1:] == [
        ["32", "v10 90.0 88.0–92.0", "–", "v0 50.0 48.0–52.0"],
        ["48", "–", "v5 70.0 68.0–72.0", "–"],
        ["64", "v0 50.0 48.0–52.0", "–", "v0 50.0 48.0–52.0"],
    ]
    assert maps(render(loss, tmp_path / "b.html").read_text())["clothes · knn/v1", "elastic pretrained"][1:] == [
        ["32", "v0 32", "v4 96"],
        ["64", "v2 64", "v10 192"],
    ]


@given(st.integers(0, 4096), st.one_of(st.integers(0, 99), st.lists(st.integers(0, 99), min_size=2, max_size=5).map(tuple)))
def test_names_are_read_as_subnets_are(width, depth):
    assert _size(str(Subnet(width, depth))) == (width, depth if isinstance(depth, tuple) else (depth,))


def light(colour: str) -> tuple[float, tuple[float, float, float]]:
    """Relative luminance (WCAG) and CIELAB of #rrggbb."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    rows = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
    xyz = [sum(a * b for a, b in zip(row, linear, strict=True)) for row in rows]
    x, y, z = (
        v ** (1 / 3) if v > (6 / 29) ** 3 else v / (3 * (6 / 29) ** 2) + 4 / 29
        for v in (xyz[0] / 0.95047, xyz[1], xyz[2] / 1.08883)
    )
    return xyz[1], (116 * y - 16, 500 * (x - y), 200 * (y - z))


def test_colours_are_even_and_text_on_them_can_be_read():
    shades = [light(colour) for colour in RAMP]
    steps = [math.dist(a[1], b[1]) for a, b in pairwise(shades)]
    assert max(steps) / min(steps) < 1.1 and all(4 < b[1][0] - a[1][0] < 10 for a, b in pairwise(shades))
    for index, (luminance, _) in enumerate(shades):
        assert (1.05 / (luminance + 0.05) if index < DARK else (luminance + 0.05) / 0.05) >= 4.5


@pytest.fixture
def page(browser, tmp_path):
    browser.get(render(results(), tmp_path / "page.html", title=EVIL, pictures={EVIL: png()}).as_uri())
    yield browser
    assert not browser.execute_script("return window.hacked")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def column(page, number: int) -> list[str]:
    script = "return [...document.querySelectorAll('tbody:not([hidden]) tr.row')].map(r => r.cells[arguments[0]].innerText.trim())"
    return page.execute_script(script, number)


def points(page, axis: str) -> int:
    return page.execute_script("return document.querySelectorAll(`svg[data-x=${arguments[0]}] .point`).length", axis)


def test_many_metrics_begin_with_one_and_empty_plots_stay_away(browser, tmp_path):
    from selenium.webdriver.support.ui import Select

    records = [
        Record(model=name, dataset="none", protocol="step/v1", metric=metric, value=value * factor, n=1, baseline=name)
        for metric, factor in (("pictures per second", 1.0), ("seconds", 10.0), ("MiB", 100.0))
        for name, value in (("ours", 3.0), ("theirs", 2.0), ("a third", 1.0), ("a fourth", 1.5), ("a fifth", 1.2))
    ]
    browser.get(render(records[:12], tmp_path / "few.html").as_uri())
    assert len(column(browser, 1)) == 12
    browser.get(render(records, tmp_path / "speeds.html").as_uri())
    assert column(browser, 7) == ["step/v1 MiB"] * 5
    assert not browser.find_element("css selector", ".plots").size["height"]  # nothing has parameters or a latency
    Select(browser.find_element("id", "filter-metric")).select_by_visible_text("All")
    assert len(column(browser, 1)) == 15


def test_clicking_a_header_sorts(page):
    values = [float(text.split()[0]) for text in column(page, 8)]
    assert values == sorted(values, reverse=True) and len(values) == 15
    head = page.find_element("css selector", "th button[data-column='3']")  # parameters
    head.click()
    assert head.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    assert column(page, 4) == ["100 M"] * 4 + ["10.0 M"] * 4 + ["1.00 M"] * 4 + ["–"] * 3
    head.click()
    assert column(page, 4) == ["1.00 M"] * 4 + ["10.0 M"] * 4 + ["100 M"] * 4 + ["–"] * 3  # what is unknown stays last
    page.find_element("css selector", "th button[data-column='1']").click()  # w32 before w64 before w96, not by letters alone
    assert [name for name in dict.fromkeys(column(page, 2)) if name.startswith("w")] == ["w32_d1", "w64_d2", "w96_d3"]
    assert len(page.find_elements("css selector", "th[aria-sort]")) == 1


def test_typing_filters_table_and_plots(page):
    assert points(page, "parameters") == points(page, "latency") == 15
    search = page.find_element("id", "search")
    search.send_keys("W96 digits")
    assert column(page, 2) == ["w96_d3", "w96_d3"]
    assert points(page, "parameters") == points(page, "latency") == 2
    assert page.find_element("id", "count").text == "2 of 15 results"
    search.send_keys(" nothing like it")
    assert column(page, 2) == [] and points(page, "parameters") == 0
    assert page.find_element("id", "none").is_displayed()
    page.find_element("id", "reset").click()
    page.execute_async_script("setTimeout(arguments[0])")
    assert len(column(page, 2)) == 15 == points(page, "latency")


def test_dropdowns_filter_table_and_plots(page):
    from selenium.webdriver.support.ui import Select

    assert "3 datasets" in page.find_element("id", "note").text
    Select(page.find_element("id", "filter-dataset")).select_by_visible_text("clothes (7)")
    assert len(column(page, 1)) == 7 == points(page, "parameters")
    Select(page.find_element("id", "filter-protocol")).select_by_visible_text("knn/v1 (8)")
    assert set(column(page, 6)) == {"clothes"} and set(column(page, 7)) == {"knn/v1 accuracy"}
    assert points(page, "parameters") == 4 and not page.find_element("id", "note").is_displayed()
    assert page.execute_script("return document.querySelectorAll('svg[data-x=parameters] .whisker').length") == 3
    Select(page.find_element("id", "filter-baseline")).select_by_visible_text("raw pixels (2)")
    assert column(page, 1) == ["pixels"] and points(page, "latency") == 1


def test_hostile_names_can_be_chosen(page):
    script = (
        "const s = document.getElementById('filter-baseline'); s.value = '=' + arguments[0]; s.dispatchEvent(new Event('change'))"
    )
    page.execute_script(script, EVIL)
    assert column(page, 1) == [EVIL] and points(page, "parameters") == 1
    page.find_element("css selector", "tbody:not([hidden]) .open button").click()
    assert EVIL in page.find_element("css selector", "tbody:not([hidden]) .details").text


def test_a_row_opens_its_provenance(page):
    first = page.find_element("css selector", "tbody[data-row]")
    button, details = first.find_element("css selector", ".open button"), first.find_element("css selector", ".details")
    assert not details.is_displayed()
    button.click()
    assert button.get_attribute("aria-expanded") == "true" and "ab" * 32 in details.text and '{"k": 20}' in details.text
    button.click()
    assert not details.is_displayed()


def test_points_have_tooltips_a_log_axis_and_whiskers_in_scale(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("id", "filter-dataset")).select_by_value("=clothes")
    Select(page.find_element("id", "filter-protocol")).select_by_value("=linear/v1")
    marks = page.find_elements("css selector", "svg[data-x=parameters] .point .shape")
    places = sorted((float(m.get_attribute("cx")), float(m.get_attribute("cy"))) for m in marks)
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x2 - x1 == pytest.approx(x3 - x2, rel=1e-6)  # 1 M, 10 M, 100 M
    assert y1 - y2 == pytest.approx(y2 - y3, rel=1e-6) and y1 > y2  # 73, 74, 75 %
    down, up = re.findall(r"M[^M]*", page.find_element("css selector", "svg[data-x=parameters] .whisker").get_attribute("d"))[1:]
    height = float(down.split(",")[1].split("h")[0]) - float(up.split(",")[1].split("h")[0])
    assert height == pytest.approx(3.5 * (y1 - y2), rel=1e-6)  # from 2 below to 1.5 above
    tip = page.find_element("id", "tip")
    assert not tip.is_displayed()
    ActionChains(page).move_to_element(marks[-1]).perform()
    assert tip.is_displayed() and "elastic" in tip.text and "clothes · linear/v1 · pretrained" in tip.text
    box = tip.rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= page.execute_script("return innerWidth")


@pytest.mark.parametrize("width", [360, 1300])
def test_nothing_overlaps_or_is_cut(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        boxes = page.execute_script("""
            return [...document.querySelectorAll('.plots > .plot > svg')].map(plot => { const b = n => {
                const r = n.getBoundingClientRect();
                return [r.left, r.top, r.right, r.bottom]; }; return [b(plot), [...plot.querySelectorAll('text')].map(b)]; })""")
        for (left, top, right, bottom), texts in boxes:
            assert len(texts) > 6
            for i, (l1, t1, r1, b1) in enumerate(texts):
                assert l1 >= left - 1 and t1 >= top - 1 and r1 <= right + 1 and b1 <= bottom + 1
                for l2, t2, r2, b2 in texts[:i]:
                    assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# -- maps, in the browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mapped(browser, tmp_path):
    browser.get(render(grids(), tmp_path / "page.html", title="maps").as_uri())
    yield browser
    assert not browser.execute_script("return window.hacked")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def seen(page) -> dict[str, dict[str, list[str]]]:
    """What is drawn: group -> map -> "class text" of the cells that pass the filters."""
    return page.execute_script("""
        const all = {};
        for (const group of document.querySelectorAll(".map-group:not([hidden])"))
            for (const map of group.querySelectorAll(".map:not([hidden])"))
                (all[group.querySelector("b").textContent] ??= {})[map.querySelector("figcaption").textContent] =
                    [...map.querySelectorAll("td[data-row]:not(.out)")]
                        .map(cell => `${cell.className} ${cell.children[0].textContent}`);
        return all;""")


def choose(page, key: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("id", f"filter-{key}")).select_by_value(f"={value}")


def opened(page) -> list[str]:
    return page.execute_script("return [...document.querySelectorAll('details[open]:not([hidden]) b')].map(b => b.textContent)")


def test_without_a_filter_the_maps_are_those_of_the_file(mapped, tmp_path):
    still = maps(render(grids(), tmp_path / "again.html").read_text())
    drawn = {(group, name): cells for group, inside in seen(mapped).items() for name, cells in inside.items()}
    assert {key: [c.rsplit(" ", 1)[0] for row in rows[1:] for c in row[1:]] for key, rows in still.items()} == drawn
    assert opened(mapped) == ["clothes · knn/v1"]


def test_maps_follow_the_filters_and_their_colours_span_what_is_left(mapped):
    choose(mapped, "dataset", "digits")
    choose(mapped, "protocol", "linear/v1")
    assert list(seen(mapped)) == ["digits · linear/v1"] == opened(mapped)
    assert set(seen(mapped)["digits · linear/v1"]) == {f"{EVIL} pretrained", "elastic pretrained", "elastic untrained"}
    choose(mapped, "baseline", "untrained")
    # 55.52 to 57.28: of a tenth of the span each, from the lowest
    cells = ["v0 55.5", "v5 56.3", "v2 55.8", "v6 56.6", "v5 56.5", "v10 57.3"]
    assert seen(mapped)["digits · linear/v1"] == {"elastic untrained": cells}
    ramp = mapped.find_element("css selector", ".map-group[open]:not([hidden]) .ramp")
    assert "55.5" in ramp.text and "57.3" in ramp.text
    mapped.find_element("id", "search").send_keys("w64")
    assert len(seen(mapped)["digits · linear/v1"]["elastic untrained"]) == 2
    mapped.find_element("id", "search").send_keys("x")
    assert seen(mapped) == {} and not mapped.find_element("id", "maps").is_displayed()
    mapped.find_element("id", "reset").click()
    mapped.execute_async_script("setTimeout(arguments[0])")
    assert len(seen(mapped)) == 4 and mapped.find_element("id", "maps").is_displayed()


def test_maps_can_be_walked_by_the_keyboard(mapped):
    from selenium.webdriver.common.keys import Keys

    def focused():
        return mapped.switch_to.active_element

    assert all(
        n == 1
        for n in mapped.execute_script(
            "return [...document.querySelectorAll('.map')].map(m => m.querySelectorAll('td[tabindex=\"0\"]').length)"
        )
    )
    mapped.find_element("css selector", ".map-group .scroll").click()
    mapped.execute_script("document.querySelector('.map .scroll').focus()")
    focused().send_keys(Keys.TAB)
    steps = [
        ("", "70.5"),
        (Keys.ARROW_RIGHT, "71.3"),
        (Keys.ARROW_RIGHT, "71.3"),
        (Keys.ARROW_DOWN, "71.6"),
        (Keys.ARROW_LEFT, "70.8"),
    ]
    for key, value in [*steps, (Keys.ARROW_LEFT, "70.8"), (Keys.ARROW_UP, "70.5"), (Keys.ARROW_UP, "70.5")]:
        if key:
            focused().send_keys(key)
        assert focused().text.split()[0] == value
        tip = mapped.find_element("id", "tip")
        assert tip.is_displayed() and f"{value} %" in tip.text and "clothes · knn/v1 · pretrained" in tip.text
    assert mapped.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    mapped.find_element("id", "search").send_keys("w128")
    assert all(cell.get_attribute("tabindex") for cell in mapped.find_elements("css selector", ".map td[class^=v]"))
    assert not mapped.find_elements("css selector", ".map td.out[tabindex]")
    mapped.execute_script("document.querySelector('.map td[tabindex=\"0\"]').focus()")
    focused().send_keys(Keys.ENTER)
    row = mapped.find_element("css selector", "tbody.hit")
    assert "w128_d2" in row.text and row.find_element("css selector", ".details").is_displayed()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_cell_can_be_read(mapped, scheme):
    mapped.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        colours = mapped.execute_script("""
            return [...document.querySelectorAll('.map td[data-row] > *')].map(text =>
                [getComputedStyle(text).color, getComputedStyle(text.parentElement).backgroundColor])""")
        assert len({colour for _, colour in colours}) > 3
        for pair in set(map(tuple, colours)):
            ink, ground = (light("#" + "".join(f"{int(n):02x}" for n in re.findall(r"\d+", colour)[:3]))[0] for colour in pair)
            assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5, pair
    finally:
        mapped.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("width", [360, 1300])
def test_many_depths_scroll_within_their_box(mapped, width):
    mapped.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        choose(mapped, "protocol", "linear/v1")
        choose(mapped, "dataset", "digits")
        boxes = mapped.execute_script("""
            const boxes = [...document.querySelectorAll('.map-group[open] .scroll')];
            const wide = boxes.filter(box => box.scrollWidth > box.clientWidth);
            for (const box of wide) box.scrollLeft = 300;
            return wide.map(box => [box.getBoundingClientRect(), box.querySelector('tbody th').getBoundingClientRect()]
                .map(r => [r.left, r.right]))""")
        assert boxes and all(box[0] >= 0 and box[1] <= width and abs(head[0] - box[0]) < 4 for box, head in boxes)
        assert mapped.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        mapped.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_javascript_the_maps_can_be_opened(browser, tmp_path):
    path = render(grids(), tmp_path / "page.html")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(path.as_uri())
        groups = browser.find_elements("css selector", ".map-group")
        assert [group.find_element("css selector", ".map-row").is_displayed() for group in groups] == [True, False, False, False]
        assert "71.3\n69.3–73.3" in groups[0].text
        groups[1].find_element("css selector", "summary").click()
        assert "76.3\n74.3–78.3" in groups[1].text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
