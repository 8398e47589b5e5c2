from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from html.parser import HTMLParser

import pytest

from okavango.zoo.leaderboard.page import render, table
from okavango.zoo.leaderboard.records import Record

EVIL = "<script>window.hacked=1</script>\"'&</script>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium binary is installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    switches = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
    for switch in (*switches, "disable-component-update", "disable-sync", "window-size=1300,1000"):
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


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
