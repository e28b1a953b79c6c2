"""Several methods side by side: rows, errors, controls, tables, figures, and the page in a real browser."""

import json
import math
import struct
import sys
import types
import zlib
from base64 import b64decode
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser

import browser
import pytest
import torch
from captum.attr import Saliency
from captum.attr import visualization as viz
from small import normal

from captum_mipin import InverseNetwork, LayerMIPINAttribution, compare
from captum_mipin.comparison import Comparison, page
from captum_mipin.comparison.table import METHODS, METRICS
from captum_mipin.errors import InputError
from captum_mipin.metrics import bounding_box_accuracy, deletion

pytestmark = pytest.mark.usefixtures("captured_once")

CONTROLS = ["random", "centre prior", "mask only", "pattern only"]
BOXES = [(0, 0, 4, 4), (2, 2, 6, 6), (4, 4, 8, 8)]


def side_by_side(cnn, methods=("MIP-IN", "Saliency", "LRP"), **options):
    options = {
        "inverse": cnn.inverse,
        "boxes": BOXES,
        "progress": False,
        "titles": ["a", "<b>&", "c"],
        **options,
    }
    return compare(methods, cnn.x[:3], [0, 1, 2], **options)


def failing(inputs, target):
    raise ValueError("this network <i>is not</i> supported\nsecond line")


@pytest.fixture(scope="module")
def found(cnn) -> Comparison:
    methods = {
        "MIP-IN": cnn.mipin,
        "S": "Saliency",
        "broken": failing,
        "nan": lambda x, t: x * math.nan,
        "0": lambda x, t: 0 * x,
    }
    return side_by_side(cnn, methods, metrics=["bounding_box_accuracy", "deletion", "completeness"])


# --------------------------------------------------------------------------------------------------------- rows


def test_rows_are_methods_then_controls(found):
    assert [row.name for row in found.rows] == ["MIP-IN", "S", "broken", "nan", "0", *CONTROLS]
    assert [row.control for row in found.rows] == [False] * 5 + [True] * 4
    assert found.metrics == ("bounding_box_accuracy", "deletion", "completeness")


def test_a_method_that_fails_leaves_its_error_and_others_finish(found):
    broken = found["broken"]
    assert (broken.maps, broken.results) == (None, {})
    assert broken.error == "ValueError: this network <i>is not</i> supported"
    assert found["S"].errors == {
        "completeness": "InputError: completeness needs a method that has source_signal"
    }
    assert found["S"].results["deletion"].n == 3
    assert found["MIP-IN"].results["completeness"].n == 3
    assert found["nan"].results["bounding_box_accuracy"].unscored == {"NaN": (0, 1, 2)}
    with pytest.raises(KeyError, match="'Grad-CAM' is not one of 'MIP-IN'"):
        found["Grad-CAM"]


def test_scores_are_those_of_the_metrics(found, cnn):
    expected = bounding_box_accuracy(cnn.mipin, cnn.x[:3], [0, 1, 2], boxes=BOXES)
    result = found["MIP-IN"].results["bounding_box_accuracy"]
    assert torch.equal(result.values, expected.values)
    assert result.settings == {**expected.settings, "method": "MIP-IN"}
    area = 16 / 64
    assert found["0"].results["bounding_box_accuracy"].mean == area
    assert torch.equal(
        found["S"].maps,
        Saliency(cnn.model).attribute(cnn.x[:3].clone().requires_grad_(), target=[0, 1, 2]),
    )


def test_each_method_is_measured_on_the_network_that_it_explains(cnn):
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)).eval()
    found = compare(
        {"S": Saliency(cnn.model), "other": Saliency(other)},
        cnn.x[:2],
        0,
        metrics=["deletion"],
        progress=False,
    )
    with torch.no_grad():
        for name, model in (("S", cnn.model), ("other", other)):
            torch.testing.assert_close(
                found[name].results["deletion"].curves[:, 0],
                model(cnn.x[:2]).softmax(1)[:, 0].double(),
            )


def test_in_inference_mode_and_with_a_tuple_of_one(cnn):
    ask = {"model": cnn.model, "metrics": ["deletion", "randomization"], "progress": False}
    expected = compare(["Saliency", "SmoothGrad"], cnn.x[:2], 0, **ask)
    with torch.inference_mode():
        found = compare(["Saliency", "SmoothGrad"], (cnn.x[:2].clone(),), 0, **ask)
    assert str(found) == str(expected)
    assert not any(row.error for row in found.rows)


def test_every_method_meets_the_same_draws(cnn):
    """Two rows of the same method are equal in all that is random, whatever comes before them."""
    methods = {"first": cnn.mipin, "other": "Saliency", "second": cnn.mipin}
    metrics = ["sensitivity_max", "infidelity", "sensitivity_n", "class_sensitivity", "deletion"]
    found = side_by_side(
        cnn, methods, metrics=metrics, boxes=None, generator=torch.Generator().manual_seed(5)
    )
    for metric in metrics:
        assert torch.equal(
            found["first"].results[metric].values, found["second"].results[metric].values
        )
    again = side_by_side(
        cnn, methods, metrics=metrics, boxes=None, generator=torch.Generator().manual_seed(5)
    )
    other = side_by_side(
        cnn, methods, metrics=metrics, boxes=None, generator=torch.Generator().manual_seed(6)
    )
    assert torch.equal(found["random"].maps, again["random"].maps)
    assert torch.equal(
        found["first"].results["infidelity"].values, again["first"].results["infidelity"].values
    )
    assert not torch.equal(
        found["first"].results["infidelity"].values, other["first"].results["infidelity"].values
    )


def test_every_method_and_metric_has_a_name_that_works(own_cnn, untouched):
    own_cnn.inverse.changed = "ignore"
    metrics = [name for name in METRICS if name != "grid_pointing_game"]
    with pytest.warns(UserWarning):  # Captum's, of its hooks
        found = side_by_side(own_cnn, list(METHODS), metrics=metrics, layer=own_cnn.model[3])
    assert not [row.error for row in found.rows if row.error]
    for row in found.rows:
        assert {
            "bounding_box_accuracy",
            "deletion",
            "insertion",
            "class_sensitivity",
            "sensitivity_max",
        } <= set(row.results)
    assert {row.name for row in found.rows if "completeness" in row.results} == {"MIP-IN"}
    assert {row.name for row in found.rows if "randomization" in row.results} >= {
        "MIP-IN",
        "Saliency",
        "Grad-CAM",
        "pattern only",
    }


def test_nothing_of_the_users_model_is_touched(cnn, untouched):
    methods = [name for name in METHODS if name != "DeepLift"]  # which warns
    with untouched(cnn.model, cnn.x):
        side_by_side(cnn, methods, layer=cnn.model[3])


def test_mosaics_and_bound_metrics(cnn):
    metrics = {
        "steps of 16": partial(deletion, step=16),
        "area": partial(bounding_box_accuracy, boxes=[(0, 0, 8, 8)] * 3, largest=1.0),
        "mine": lambda method, inputs, target: deletion(
            method, inputs, target, model=cnn.model, score="logit"
        ),
    }
    found = side_by_side(cnn, metrics=metrics)
    assert found["Saliency"].results["steps of 16"].curves.shape == (3, 5)
    assert found["Saliency"].results["area"].mean == 1
    assert found["MIP-IN"].results["mine"].settings["score"] == "logit"


# --------------------------------------------------------------------------------------------------------- controls


def test_controls_know_what_they_say(found, cnn):
    x = cnn.x[:3]
    assert found["random"].maps.shape == found["centre prior"].maps.shape == (3, 1, 8, 8)
    centre = found["centre prior"].maps
    torch.testing.assert_close(centre, centre.flip(2))
    torch.testing.assert_close(centre, centre.flip(3))
    assert (centre.flatten(1).argmax(1) == 3 * 8 + 3).all()
    assert torch.equal(found["mask only"].maps, (x != 0).float())
    assert torch.equal(
        found["pattern only"].maps, cnn.mipin.attribute(x, target=[0, 1, 2], local=False)
    )


def test_controls_of_a_layer_lie_there(cnn):
    model, layer = cnn.model, cnn.model[3]
    inverse = InverseNetwork(model, layer=layer).fit(cnn.x, progress=False)
    found = compare(
        {"ours": LayerMIPINAttribution(model, inverse)}, cnn.x[:3], 0, metrics=[], progress=False
    )
    with torch.no_grad():
        features = model[:4](cnn.x[:3])
    assert torch.equal(found["mask only"].maps, (features != 0).float())
    assert found["random"].maps.shape == (3, 1, 4, 4)
    assert found["pattern only"].maps.shape == found["ours"].maps.shape == (3, 4, 4, 4)
    named = compare(["MIP-IN"], cnn.x[:3], 0, inverse=inverse, metrics=[], progress=False)
    assert torch.equal(named["MIP-IN"].maps, found["ours"].maps)
    assert found.figure().axes


def test_without_mip_in_there_is_no_pattern(cnn):
    found = compare(["Saliency"], cnn.x[:2], 0, model=cnn.model, metrics=[], progress=False)
    assert [row.name for row in found.rows] == ["Saliency", *CONTROLS[:3]]
    alone = compare(
        ["Saliency"], cnn.x[:2], 0, model=cnn.model, metrics=[], controls=False, progress=False
    )
    assert [row.name for row in alone.rows] == ["Saliency"]
    mine = compare({"random": Saliency(cnn.model)}, cnn.x[:2], 0, metrics=[], progress=False)
    assert [row.control for row in mine.rows] == [False, True, True]


# --------------------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_compared_is_refused(cnn):
    x, model = cnn.x[:3], cnn.model
    for bad, message in (
        (lambda: compare({}, x, 0), "no methods"),
        (
            lambda: compare(["Saliencey"], x, 0, model=model),
            "no method has the name 'Saliencey'; known are MIP-IN, MIP-IN × gradient, Saliency",
        ),
        (lambda: compare(["Saliency"], x, 0), "pass model="),
        (
            lambda: compare(["Saliency"], x, 0, model=model, metrics=["accuracy"]),
            "not all among bounding_box_accuracy",
        ),
        (lambda: compare(["Saliency"], x, 0, model=model, metrics="deletion"), "not all among"),
        (
            lambda: compare(["Saliency"], x, 0, model=model, metrics={"a": "deletion"}),
            "expected a function",
        ),
        (
            lambda: compare(["Saliency"], x, 0, model=model, boxes=BOXES[:2]),
            "boxes for 2 images, but 3",
        ),
        (lambda: compare(["Saliency"], x, 0, model=model, titles=["a"]), "1 titles, but 3 images"),
        (
            lambda: compare(["Saliency"], x.flatten(1), 0, model=model, boxes=BOXES),
            "boxes need images",
        ),
        (lambda: compare(["Saliency"], (x, x), 0, model=model), "one input tensor"),
        (lambda: compare(["Saliency"], x, [0], model=model), "1 targets were given for 3"),
    ):
        with pytest.raises((InputError, AssertionError), match=message):
            bad()
    failed = compare(["MIP-IN", "Grad-CAM"], x, 0, model=model, metrics=[], progress=False)
    assert "pass inverse=" in failed["MIP-IN"].error
    assert "pass layer=" in failed["Grad-CAM"].error


def test_an_interrupt_is_not_an_error_of_a_method(cnn):
    def interrupted(inputs, target):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare({"a": interrupted}, cnn.x[:2], 0, progress=False)


def test_other_inputs_have_a_table_but_no_picture(mlp):
    found = compare(
        ["MIP-IN", "Saliency"], mlp.x[:4], [0, 1, 2, 0], inverse=mlp.inverse, progress=False
    )
    assert list(found.metrics) == ["deletion"]
    assert not any(row.errors for row in found.rows)
    with pytest.raises(InputError, match="pictures need images"):
        found.figure()


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


def test_progress_goes_to_the_error_stream_and_can_be_left_out(cnn, capsys):
    side_by_side(cnn, metrics=[])
    assert capsys.readouterr() == ("", "")
    side_by_side(cnn, metrics=[], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "compare" in err


# --------------------------------------------------------------------------------------------------------- tables


def test_tables_say_what_was_measured(found):
    text, markdown = found.table(), found.table("markdown")
    assert str(found) == text
    lines = text.splitlines()
    assert lines[0].split() == [
        "method",
        "bounding",
        "box",
        "accuracy",
        "↑",
        "deletion",
        "↓",
        "completeness",
        "↓",
    ]
    assert lines[3].split() == ["broken", "failed", "failed", "failed"]
    assert "nan (0 of 3)" in lines[4]
    result = found["MIP-IN"].results["deletion"]
    assert f"{result.mean:.3g} ± {result.standard_error:.2g}" in lines[1]
    assert "failed (broken): ValueError: this network <i>is not</i> supported" in lines
    assert markdown.splitlines()[1] == "| --- | --- | --- | --- |"
    assert len({line.count("|") for line in markdown.splitlines()[:11]}) == 1
    rows = [replace(row, name=f"{row.name}\n|") for row in found.rows]
    broken = replace(found, rows=tuple(rows)).table("markdown").splitlines()
    assert broken[2].startswith("| MIP-IN \\| |")
    with pytest.raises(InputError, match="form='latex'"):
        found.table("latex")


def test_parts_have_columns_if_asked_for(found):
    header = found.table("markdown", parts=True).splitlines()[0]
    assert header.strip("| ").split(" | ") == [
        "method", "bounding box accuracy ↑", "bounding box accuracy, tied", "deletion ↓", "completeness ↓",
        "completeness, positive APC ↓", "completeness, shuffled output ↓", "completeness, shuffled output, positive ↓",
    ]  # fmt: skip
    line = found.table("markdown", parts=True).splitlines()[2].split(" | ")
    assert line[5].startswith(
        f"{found['MIP-IN'].results['completeness'].parts['positive APC'].mean:.3g}"
    )


def test_a_table_for_pandas(found, monkeypatch):
    frame = lambda lines, index: (lines, index)  # noqa: E731
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=frame))
    lines, index = found.table("pandas")
    assert index == [row.name for row in found.rows]
    assert lines[0]["deletion"] == found["MIP-IN"].results["deletion"].mean
    assert lines[0]["deletion, n"] == 3
    nothing = {"": None, ", standard error": None, ", n": 0}
    empty = {
        f"{metric}{part}": value for metric in found.metrics for part, value in nothing.items()
    }
    assert lines[2] == {"control": False, **empty, "error": found["broken"].error}
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        found.table("pandas")


def test_a_table_in_pandas(found):
    pandas = pytest.importorskip("pandas", reason="tables as data frames are for those who have it")
    frame = found.table("pandas")
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc["MIP-IN", "deletion"] == found["MIP-IN"].results["deletion"].mean


def test_all_of_it_as_json(found):
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["name"] for row in data["rows"]] == [row.name for row in found.rows]
    assert data["rows"][2]["errors"] == {"": found["broken"].error}
    assert data["rows"][0]["results"]["deletion"]["n"] == 3


# --------------------------------------------------------------------------------------------------------- figures


def test_a_figure_is_images_by_methods(found, tmp_path):
    figure = found.figure()
    shown = [row.name for row in found.rows if row.name != "broken"]
    assert [axis.get_title() for axis in figure.axes[: len(shown) + 1]] == ["image", *shown]
    assert len(figure.axes) == 3 * (len(shown) + 1) + 1  # and the legend
    assert [figure.axes[i * (len(shown) + 1)].get_ylabel() for i in range(3)] == ["a", "<b>&", "c"]
    texts = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert texts == {"NaN", "all 0"}
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    one = found.figure(["S"], [2], method="blended_heat_map", cmap="PiYG", sign="positive")
    assert len(one.axes) == 3
    assert len(one.axes[1].images) == 2  # the grey image and the map
    assert one.axes[1].images[1].get_cmap().name == "PiYG"


def test_notebooks_show_figures_and_tables(found):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = found.figure(["S"], [0])
    shown = figure._repr_png_()
    assert shown[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", shown[16:24]) == tuple(
        int(inches * figure.dpi) for inches in figure.get_size_inches()
    )
    assert not pyplot.get_fignums()
    assert found._repr_markdown_() == found.table("markdown")


def test_a_figure_is_drawn_by_captum(found, cnn):
    """The same picture as the user would draw by hand."""
    figure = found.figure(["MIP-IN"], [0])
    maps = cnn.mipin.attribute(cnn.x[:1], target=0)[0].permute(1, 2, 0).numpy()
    _, axis = viz.visualize_image_attr(
        maps, method="heat_map", sign="all", cmap="RdBu", use_pyplot=False
    )
    drawn, expected = (a.images[0] for a in (figure.axes[1], axis))
    torch.testing.assert_close(
        *(torch.tensor(image.get_array()).double() for image in (drawn, expected)),
        rtol=1e-5,
        atol=1e-6,
    )
    assert drawn.get_clim() == expected.get_clim() == (-1, 1)
    assert drawn.get_cmap().name == "RdBu"


@pytest.mark.parametrize(
    ("options", "ends", "cmap"),
    [
        ({}, ["against", "0", "for"], "RdBu"),
        ({"method": "blended_heat_map", "cmap": "PiYG"}, ["against", "0", "for"], "PiYG"),
        ({"sign": "positive", "cmap": "Greens"}, ["0", "for"], "Greens"),
        ({"sign": "negative", "cmap": "Reds"}, ["0", "against"], "Reds"),
        ({"sign": "absolute_value", "cmap": "Blues"}, ["0", "for or against"], "Blues"),
    ],
)
def test_a_legend_says_what_the_colours_mean(cnn, options, ends, cmap):
    """A map of -1 at the left and 2 at the right is against and for, scaled to -1/2 and 1."""
    steps = torch.linspace(-1, 2, 8).expand(1, 1, 8, 8)
    figure = compare(
        {"steps": steps}, cnn.x[:1], 0, metrics=[], controls=False, progress=False
    ).figure(**options)
    *_, picture, legend = figure.axes
    assert [label.get_text() for label in legend.get_xticklabels()] == ends
    drawn, key = picture.images[-1], legend._colorbar.mappable
    assert key is drawn
    assert drawn.get_cmap().name == cmap
    assert list(legend.get_xticks()) == ([-1, 0, 1] if len(ends) == 3 else [0, 1])
    assert legend.get_xlim() == drawn.get_clim()


def test_a_legend_is_left_out_where_there_is_no_scale_or_captum_draws_one(cnn):
    found = compare(
        {"S": cnn.x[:1], "failed": lambda x, t: 1 / 0},
        cnn.x[:1],
        0,
        metrics=[],
        controls=False,
        progress=False,
    )
    assert len(found.figure(method="masked_image", sign="positive").axes) == 2
    assert len(found.figure(["failed"]).axes) == 2
    assert (
        len(found.figure(["S"], show_colorbar=True).axes) == 3
    )  # the image, the map, and Captum's


def test_small_maps_are_drawn_without_a_warning(cnn):
    found = compare(
        {"tiny": lambda x, t: 1e-9 * x}, cnn.x[:1], 0, metrics=[], model=cnn.model, progress=False
    )
    assert found.figure(["tiny"]).axes[1].images


# --------------------------------------------------------------------------------------------------------- pages


def decoded(address):
    """The pixels of a PNG."""
    data, at, packed = b64decode(address.partition(",")[2]), 8, b""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        content = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            kind + content
        )
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", content[:10])
            assert (depth, colour) == (8, 2)
        packed += content if kind == b"IDAT" else b""
        at += 12 + length
    lines = torch.frombuffer(bytearray(zlib.decompress(packed)), dtype=torch.uint8).view(
        height, 1 + 3 * width
    )
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


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
    colours = torch.from_numpy(colormaps["RdBu"]((ramp.numpy() + 1) / 2))[..., :3] * 255
    assert (page.painted(ramp).double() - colours).abs().max() < 12  # few levels
    assert page.painted(torch.tensor([[1.0, 0.0, -1.0]])).tolist() == [
        [[5, 48, 97], [247, 247, 247], [103, 0, 31]]
    ]


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

    VOID = ("meta", "img", "input")

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
    assert len(read.all("img")) == 3 * 6  # of eight rows with maps, NaN and zeros have none
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
NAMES = "return [...document.querySelectorAll('#scores tbody tr')].map(row => row.cells[0].firstChild.textContent)"


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
    assert opened.run("return [...document.querySelectorAll('#scores thead th')].map(h => h.ariaSort)") == [
        "none", "none", "ascending", "none",
    ]  # fmt: skip
    opened.click("#scores th:first-child button")
    names = opened.run(NAMES)
    assert names == opened.run("return arguments[0].sort((a, b) => a.localeCompare(b))", names)


@needs_browser
def test_the_slider_changes_the_opacity_by_key(opened):
    opacity = "return getComputedStyle(document.querySelector('.frame img')).opacity"
    assert float(opened.run(opacity)) == pytest.approx(0.7)
    opened.run("document.getElementById('opacity').focus()")
    opened.press(*[browser.ARROW_RIGHT] * 5)
    assert float(opened.run(opacity)) == pytest.approx(0.75)
    assert opened.run("return document.getElementById('shown').value") == "75 %"
    opened.press(*[browser.ARROW_LEFT] * 75)
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
        "return [...document.querySelectorAll('button, input')].map(e => e.getBoundingClientRect().height)"
    )
    assert min(heights) >= 24
    shot = opened.picture()
    assert shot[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(shot) > 5000
