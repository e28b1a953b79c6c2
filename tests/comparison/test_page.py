"""The page: pictures, HTML, and all of it in a real browser."""

import io
import math
from base64 import b64decode
from html.parser import HTMLParser

import browser
import numpy as np
import pytest
import torch
from PIL import Image
from small import normal

from captum_mipin import compare
from captum_mipin.comparison import page


def decoded(address):
    """The pixels of a PNG, as Pillow reads them."""
    kind, _, data = address.partition(",")
    assert kind == "data:image/png;base64"
    return torch.from_numpy(np.array(Image.open(io.BytesIO(b64decode(data))).convert("RGB")))


def test_pictures_are_packed_without_loss():
    pixels = torch.randint(
        256, (5, 7, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    assert torch.equal(decoded(page.png(pixels)), pixels)


def test_maps_are_scaled_and_coloured_as_captums():
    from captum.attr._utils import visualization
    from matplotlib import colormaps

    heat = normal(9, 12, dtype=torch.float64)
    expected = visualization._normalize_attr(heat.numpy(), "all", 2)
    torch.testing.assert_close(page.strength(heat), torch.from_numpy(expected))
    ramp = torch.linspace(-1, 1, 61, dtype=torch.float64)[None]
    painted = page.painted(ramp).double()
    # the halves of RdBu from their middle outwards, the more opaque the larger the value
    strong = (ramp.sign() * (0.5 + 0.5 * ramp.abs()) + 1) / 2
    colours = torch.from_numpy(colormaps["RdBu"](strong.numpy()))[..., :3] * 255
    far = ramp.abs() > 0.02  # the sign of 0 has no colour
    assert (painted[..., :3] - colours)[far].abs().max() < 12  # few levels
    assert (painted[..., 3] - 0.9 * 255 * ramp.abs()).abs().max() < 10
    assert page.painted(torch.tensor([[1.0, 0.0, -1.0]])).tolist() == [
        [[5, 48, 97, 230], [246, 247, 247, 0], [103, 0, 31, 230]]
    ]


def test_maps_of_one_value_have_the_colour_of_their_end(cnn, tmp_path):
    """Also of numbers near the ends of what floats can be; a map of zeros is named."""
    blue, white, red = [5, 48, 97, 230], [246, 247, 247, 0], [103, 0, 31, 230]
    for value, colour in ((1.0, blue), (0.0, white), (-1.0, red), (5e-324, blue), (-1e308, red)):
        heat = torch.full((2, 3), value, dtype=torch.float64)
        assert page.painted(heat).tolist() == [[colour] * 3] * 2
    values = {"against": -2.0, "for": 1e-30, "zero": 0.0}
    maps = {name: torch.full((1, 1, 8, 8), value) for name, value in values.items()}
    found = compare(maps, cnn.x[:1], 0, metrics=[], controls=False, progress=False)
    found.save_html(tmp_path / "page.html")
    read = Reader((tmp_path / "page.html").read_text())
    against, positive = (decoded(image["src"]) for image in read.all("img"))
    assert against.tolist() == [[red[:3]] * 8] * 8
    assert positive.tolist() == [[blue[:3]] * 8] * 8
    assert read.text.count("all 0") == 1


def test_images_of_any_kind_become_pictures():
    grey, colour = torch.tensor([0.0, 0.5, 1.0, 0.25]).view(1, 1, 2, 2), normal(2, 3, 4, 4)
    assert page.pictures(grey)[0, :, :, 1].tolist() == [[0, 128], [255, 64]]
    found = page.pictures(colour)
    assert found.flatten(1).amin(1).tolist() == [0, 0]
    assert found.flatten(1).amax(1).tolist() == [255, 255]
    assert page.pictures(normal(1, 5, 3, 3)).shape == (1, 3, 3, 3)
    assert not page.pictures(torch.full((1, 1, 2, 2), 7.0)).any()
    assert page.pictures(torch.full((1, 1, 2, 2), math.nan)).shape == (1, 2, 2, 3)


class Reader(HTMLParser):
    """Notes each tag with its attributes, and checks that all are closed."""

    VOID = ("meta", "img", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "side by side.html"
    found.save_html(path, title="Digits & <others>")
    return path


def test_a_page_is_whole_and_needs_nothing_else(html, found):
    text = html.read_text()
    read = Reader(text)
    assert "default-src 'none'" in text
    assert all(
        image["src"].startswith("data:image/png;base64,") and image["alt"]
        for image in read.all("img")
    )
    for tag, attributes in read.tags:
        assert not {"href", "onclick", "style"} & set(attributes) or attributes["style"].startswith(
            "aspect-ratio:"
        ), tag
        assert tag not in ("link", "iframe", "object", "a")
    assert "http:" not in text.replace("http-equiv", "")
    assert "https:" not in text
    assert len(read.all("img")) == 3 * 2  # of four methods with maps, NaN and zeros have none
    assert "Digits & <others>" in "".join(read.text)
    assert "this network <i>is not</i> supported" in "".join(read.text)
    assert not read.all("i") and not read.all("b")
    scores = [c.get("data-value") for c in read.all("td") if "data-value" in c]
    assert len(scores) == 9 * 3
    assert float(scores[0]) == found["MIP-IN"].results["bounding_box_accuracy"].mean
    assert scores[6:9] == ["", "", ""]
    assert [b["data-first"] for b in read.all("button")] == [
        "ascending",
        "descending",
        "ascending",
        "ascending",
    ]
    (slider,) = [i for i in read.all("input") if i["type"] == "range"]
    assert {"for": slider["id"]} in read.all("label")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in read.all(
        "meta"
    )


def test_a_page_shows_controls_where_asked_for(found, tmp_path):
    found.save_html(tmp_path / "page.html", controls=True)
    assert len(Reader((tmp_path / "page.html").read_text()).all("img")) == 3 * 6


def test_a_page_marks_the_best_method_of_each_metric(html, found):
    cells = [c for c in Reader(html.read_text()).all("td") if "data-value" in c]
    for column, (metric, best) in enumerate(
        (("bounding_box_accuracy", max), ("deletion", min), ("completeness", min))
    ):
        scores = [
            row.results[metric].mean
            for row in found.rows
            if not row.control and metric in row.results
        ]
        best = best(score for score in scores if not math.isnan(score))
        marked = {float(c["data-value"]) for c in cells[column::3] if c.get("class") == "best"}
        assert marked == {best}


needs_browser = pytest.mark.skipif(
    not browser.available(), reason="needs chromedriver and Chromium"
)
NAMES = (
    "return [...document.querySelectorAll('#scores tbody tr')]"
    ".map(row => row.cells[0].firstChild.textContent)"
)
DIRECTIONS = "return [...document.querySelectorAll('#scores thead th')].map(head => head.ariaSort)"


@pytest.fixture(scope="module")
def opened(html):
    if not browser.available():
        pytest.skip("needs chromedriver and Chromium")
    with browser.opened(html.as_uri()) as page:
        yield page


@needs_browser
def test_the_table_sorts_by_click_and_by_key(opened, found):
    def scores(metric):
        known = {row.name: row.results[metric].mean for row in found.rows if metric in row.results}
        return {name: score for name, score in known.items() if not math.isnan(score)}

    def ordered(metric, reverse):
        names = opened.run(NAMES)
        known = scores(metric)
        assert [known[name] for name in names[: len(known)]] == sorted(
            known.values(), reverse=reverse
        )
        assert set(names[len(known) :]) == {row.name for row in found.rows} - set(
            known
        )  # what has no score is last

    before = opened.run(NAMES)
    assert before == [row.name for row in found.rows]
    opened.click("#scores th:nth-child(2) button")
    ordered("bounding_box_accuracy", True)  # the best first
    assert (
        opened.run("return document.querySelector('#scores th:nth-child(2)').ariaSort")
        == "descending"
    )
    opened.click("#scores th:nth-child(2) button")
    ordered("bounding_box_accuracy", False)
    opened.run("document.querySelector('#scores th:nth-child(2) button').focus()")
    opened.press(browser.TAB)
    opened.press(browser.ENTER)
    ordered("deletion", False)
    assert opened.run(DIRECTIONS) == ["none", "none", "ascending", "none"]
    opened.click("#scores th:first-child button")
    names = opened.run(NAMES)
    assert names == opened.run("return arguments[0].sort((a, b) => a.localeCompare(b))", names)


@needs_browser
def test_the_slider_changes_the_opacity_by_key(opened):
    opacity = "return getComputedStyle(document.querySelector('.frame img')).opacity"
    assert float(opened.run(opacity)) == pytest.approx(0.9)
    opened.run("document.getElementById('opacity').focus()")
    opened.press(*[browser.ARROW_RIGHT] * 5)
    assert float(opened.run(opacity)) == pytest.approx(0.95)
    assert opened.run("return document.getElementById('shown').value") == "95 %"
    opened.press(*[browser.ARROW_LEFT] * 95)
    assert float(opened.run(opacity)) == 0


@needs_browser
def test_nothing_is_fetched_and_nothing_fails(opened):
    loaded = opened.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert opened.run(
        "return [...document.images].every(image => image.complete && image.naturalWidth === 8)"
    )
    assert [entry for entry in opened.logs() if entry["level"] in ("SEVERE", "WARNING")] == []


@needs_browser
def test_a_phone_can_read_it(opened, tmp_path):
    opened.resize(360, 740)
    assert (
        opened.run("return document.documentElement.scrollWidth") <= 360
    )  # wide tables scroll by themselves
    assert (
        float(
            opened.run(
                "return parseFloat(getComputedStyle(document.querySelector('#scores td')).fontSize)"
            )
        )
        >= 14
    )
    heights = opened.run(
        "return [...document.querySelectorAll('button, input')]"
        ".map(element => element.getBoundingClientRect().height)"
    )
    assert min(heights) >= 24
    shot = opened.picture()
    assert shot[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(shot) > 5000


def test_maps_that_are_no_images_are_said_to_be_none(cnn, tmp_path):
    found = compare({"flat": lambda x, t: x.flatten(1)}, cnn.x[:2], 0, metrics=[], progress=False)
    assert {text.get_text() for axis in found.figure().axes for text in axis.texts} == {"no image"}
    found.save_html(tmp_path / "page.html")
    assert "<span>no image</span>" in (tmp_path / "page.html").read_text()


def test_a_page_of_many_images_shows_some(cnn, tmp_path):
    found = compare(
        {"a": lambda x, t: x}, cnn.x[:40], 0, metrics=[], controls=False, progress=False
    )
    for chosen, count in ((None, 24), ([3, 39], 2)):
        found.save_html(tmp_path / "page.html", images=chosen)
        text = (tmp_path / "page.html").read_text()
        assert text.count("<img") == count
        assert "40 images" in text
