"""Figures: what is drawn where, in whose colours, with which legend."""

import io
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam, Saliency
from captum.attr import visualization as viz
from torch import nn

from captum_mipin import (
    IBA,
    LRP,
    InverseNetwork,
    LayerMIPINAttribution,
    MIPINAttribution,
    compare,
)
from captum_mipin.comparison.methods import place_of
from captum_mipin.errors import InputError
from captum_mipin.methods import GradCAM, LayerPropagation
from captum_mipin.photographs import PhotographAttribution


def test_a_figure_is_images_by_methods(found, tmp_path):
    figure = found.figure()
    shown = [row.caption for row in found.rows if row.name != "broken" and not row.control]
    assert shown[0] == "MIP-IN\nA at the input"
    assert [axis.get_title() for axis in figure.axes[: len(shown) + 1]] == ["image", *shown]
    assert len(figure.axes) == 3 * (len(shown) + 1) + 1  # and the legend
    assert [figure.axes[i * (len(shown) + 1)].get_xlabel() for i in range(3)] == ["a", "<b>&", "c"]
    texts = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert texts == {"NaN", "all 0"}
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    every = found.figure(images=[0], controls=True)
    known = [row.caption for row in found.rows if row.name != "broken"]
    assert [axis.get_title() for axis in every.axes[:-1]] == ["image", *known]
    one = found.figure(["S"], [2], method="blended_heat_map", cmap="PiYG", sign="positive")
    assert len(one.axes) == 3
    assert len(one.axes[1].images) == 2  # the grey image and the map
    assert one.axes[1].images[1].get_cmap().name == "PiYG"


def test_notebooks_show_figures_and_tables(found):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = found.figure(["S"], [0])
    assert figure._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not pyplot.get_fignums()
    assert found._repr_markdown_() == found.table("markdown")


def test_a_figure_is_drawn_by_captum(found, cnn):
    """The same picture as the user would draw by hand."""
    figure = found.figure(["MIP-IN"], [0], method="heat_map")
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
        ({}, ["negative", "0", "positive"], "overlay"),
        ({"sign": "positive"}, ["0", "positive"], "overlay"),
        ({"sign": "negative"}, ["negative", "0"], "overlay"),
        ({"cmap": "PiYG"}, ["negative", "0", "positive"], "PiYG"),
        ({"method": "heat_map"}, ["negative", "0", "positive"], "RdBu"),
        ({"method": "blended_heat_map", "cmap": "PiYG"}, ["negative", "0", "positive"], "PiYG"),
        ({"sign": "positive", "cmap": "Greens"}, ["0", "positive"], "Greens"),
        ({"sign": "negative", "cmap": "Reds"}, ["0", "negative"], "Reds"),
        ({"sign": "absolute_value", "cmap": "Blues"}, ["0", "positive or negative"], "Blues"),
    ],
)
def test_a_legend_says_what_the_colours_mean(cnn, options, ends, cmap):
    """A map of -1 at the left and 2 at the right has both signs, scaled to -1/2 and 1."""
    steps = torch.linspace(-1, 2, 8).expand(1, 1, 8, 8)
    figure = compare(
        {"steps": steps}, cnn.x[:1], 0, metrics=[], controls=False, progress=False
    ).figure(**options)
    *_, picture, legend = figure.axes
    assert [label.get_text() for label in legend.get_xticklabels()] == ends
    drawn, key = picture.images[-1], legend._colorbar.mappable
    assert key is drawn
    assert drawn.get_cmap().name == cmap
    ticks = [-1, 0, 1] if len(ends) == 3 else [-1, 0] if ends[1] == "0" else [0, 1]
    assert list(legend.get_xticks()) == ticks
    assert legend.get_xlim() == (ticks[0], ticks[-1])
    assert cmap == "overlay" or drawn.get_clim() == legend.get_xlim()


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
        len(found.figure(["S"], method="heat_map", show_colorbar=True).axes) == 3
    )  # the image, the map, and Captum's


def test_captions_name_reading_and_layer(cnn, tmp_path):
    """Formerly two columns "Grad-CAM" and "MIP-IN" did not tell at which layer they are."""
    model, x = cnn.model, cnn.x[:2]
    inverse = InverseNetwork(model, layer="0").fit(cnn.x, targets=[0], progress=False)
    mipin = LayerMIPINAttribution(model, inverse)
    pixels = InverseNetwork(model).fit(cnn.x, targets=[0], progress=False)
    nested = nn.Sequential(OrderedDict(stem=nn.Sequential(OrderedDict(conv=model))))
    captions = {
        "MIP-IN": (mipin, "A at 0"),
        "MIP-IN × gradient": (partial(mipin.attribute, multiply_by_gradients=True), "at 0"),
        "mine": (partial(mipin.attribute, evidence=True), "evidence at 0"),
        "signal": (mipin.source_signal, "S at 0"),
        "other options": (partial(mipin.attribute, attribute_to_layer_input=True), "at 0"),
        "MIP-IN × gradient at 0": (partial(mipin.attribute, multiply_by_gradients=True), ""),
        "MIP-IN (A), at 0": (mipin, ""),
        "MIP-IN at 01": (mipin, "A at 0"),
        "unsigned × gradient at 0": (PhotographAttribution(model, inverse), ""),
        "MIP-IN A at the input": (MIPINAttribution(model, pixels), ""),
        "Grad-CAM": (GradCAM(model, "1"), "at 1"),
        "Grad-CAM at 1": (GradCAM(model, "1"), ""),
        "Grad-CAM (stem.conv)": (GradCAM(nested, "stem.conv"), ""),
        "Grad-CAM of stem": (GradCAM(nested, "stem.conv"), "at stem.conv"),
        "Grad-CAM, run 1": (GradCAM(model, "1"), "at 1"),
        "GradCAM of Captum": (LayerGradCam(torch.compile(model), model[1]), "at 1"),
        "LRP": (LayerPropagation(LRP(model), ["0", "1"]), "at 0, 1"),
        "IBA": (IBA(model, "0"), "at 0"),
        "Saliency": (Saliency(model), ""),
        "a function": (lambda x, target: x, ""),
    }
    for label, (method, caption) in captions.items():
        assert place_of(method, label) == caption
    some = {label: captions[label][0] for label in ("MIP-IN", "Grad-CAM", "Saliency")}
    by_name = ["MIP-IN × gradient", "Grad×Feature"]
    options = {"metrics": [], "controls": False, "progress": False, "model": model}
    found = compare(some, x, 0, **options)
    named = compare(by_name, x, 0, inverse=inverse, layer="0", **options)
    for one, expected in (
        (found, ["MIP-IN\nA at 0", "Grad-CAM\nat 1", "Saliency"]),
        (named, ["MIP-IN × gradient\nat 0", "Grad×Feature\nat 0"]),
    ):
        assert [row.name for row in one.rows] == [name.partition("\n")[0] for name in expected]
        drawn = one.figure().axes[1 : len(expected) + 1]
        titles = [axis.get_title().partition("\n6 ×")[0] for axis in drawn]
        assert [title.replace("\n", " ") for title in titles] == [
            title.replace("\n", " ") for title in expected
        ]
        one.save_html(tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert all(
            f'<th scope="col">{name}</th>'.replace("\n", "<br>") in page for name in expected
        )


def test_maps_without_negative_values_have_a_scale_without_them(cnn):
    maps = {"one": torch.rand(1, 1, 8, 8), "other": 5 * torch.rand(1, 1, 4, 4)}
    found = compare(maps, cnn.x[:1], 0, metrics=[], controls=False, progress=False)
    figure = found.figure()
    assert figure.axes[-1].get_xlim() == (0, 1)
    assert [axis.get_title() for axis in figure.axes[:3]] == [
        "image",
        "one",
        "other\n4 × 4 enlarged",
    ]


def test_an_overlay_shows_the_image_where_the_map_is_zero(cnn):
    """In grey, and in full colour of the map where the map is largest."""
    heat = torch.zeros(1, 1, 8, 8)
    heat[..., 0], heat[..., 7] = -1, 1
    found = compare({"m": heat}, cnn.x[:1], 0, metrics=[], controls=False, progress=False)
    grey, picture = found.figure().axes[1].images
    rgba = picture.to_rgba(picture.get_array())
    assert rgba[:, 1:7, 3].max() == 0
    assert np.allclose(rgba[:, [0, 7], 3], 0.9)
    red, blue = rgba[0, 0, :3], rgba[0, 7, :3]
    assert red[0] > 3 * red[2] and blue[2] > 3 * blue[0]
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    shown, own = grey.get_array(), (cnn.x[0] * weights).sum(0).numpy()
    assert np.corrcoef(shown.flatten(), own.flatten())[0, 1] > 0.999


def test_no_title_is_cut_off(cnn):
    """Nothing but white lies at the edges of the file, whatever the length of names."""
    image = pytest.importorskip("PIL.Image")
    name = "a method with quite a long name, times its gradient, at features.13"
    maps = {name: torch.rand(2, 1, 8, 8), f"{name} again": torch.rand(2, 1, 8, 8)}
    titles = [
        "a class with a name of many words, and more",
        "Averyverylongnamewithoutanyspacesinit",
    ]
    found = compare(maps, cnn.x[:2], 0, metrics=[], controls=False, progress=False, titles=titles)
    for across in (False, True):
        figure, file = found.figure(across=across), io.BytesIO()
        figure.savefig(file)
        pixels = np.asarray(image.open(file).convert("L"))
        edges = pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]
        assert all((edge == 255).all() for edge in edges)
        names = figure.axes[1:3] if not across else figure.axes[2:6:2]
        label = "get_ylabel" if across else "get_title"
        assert [getattr(a, label)().replace("\n", " ") for a in names] == list(maps)
        boxes = [axis.title.get_window_extent() for axis in figure.axes[:2]]
        assert boxes[0].x1 <= boxes[1].x0


def test_images_across_are_the_same_pictures(found):
    down, across = found.figure(["S", "MIP-IN"]), found.figure(["S", "MIP-IN"], across=True)
    cells = np.array(down.axes[:9]).reshape(3, 3)
    turned = np.array(across.axes[:9]).reshape(3, 3)
    for one, other in zip(cells.T.flat, turned.flat, strict=True):
        assert (one.images[-1].get_array() == other.images[-1].get_array()).all()
    assert [axis.get_title() for axis in turned[0]] == ["a", "<b>&", "c"]
    assert [axis.get_ylabel() for axis in turned[:, 0]] == ["image", "S", "MIP-IN\nA at the input"]


SIGNS = {"all": (-1, 1), "positive": (0, 1), "negative": (0, 1), "absolute_value": (0, 1)}
#: Maps of one value, and by sign what is drawn of them if it is not 0.
MAPS = {
    "against": (-3.0, {"all": -1, "negative": 1, "absolute_value": 1}),
    "for": (2.0, {"all": 1, "positive": 1, "absolute_value": 1}),
    "zero": (0.0, {}),
}


@pytest.fixture(scope="module")
def plain(cnn):
    """Maps of one value, and one whose evidence for the target is nearly nothing."""
    maps = {name: torch.full((2, 3, 8, 8), value) for name, (value, _) in MAPS.items()}
    maps["nearly"] = torch.full((2, 3, 8, 8), -1.0).double()
    maps["nearly"][:, :, 0, 0] = 1e-9
    options = {"metrics": [], "controls": False, "progress": False}
    return compare(maps, cnn.x[:2], 0, **options)


@pytest.mark.parametrize("sign", SIGNS)
def test_an_overlay_without_the_sign_asked_for_is_drawn_empty(plain, sign):
    figure = plain.figure(sign=sign)
    for axis, (value, expected) in zip(figure.axes[1:4], MAPS.values(), strict=True):
        values = axis.images[-1].get_array()
        assert (values == expected.get(sign, 0) * (-1 if sign == "negative" else 1)).all(), value


@pytest.mark.parametrize("method", ["heat_map", "blended_heat_map"])
@pytest.mark.parametrize("sign", SIGNS)
def test_a_map_without_the_sign_asked_for_is_drawn_empty(plain, sign, method, tmp_path):
    figure = plain.figure(sign=sign, method=method)
    figure.savefig(tmp_path / "figure.png")
    for start in (0, 5):  # the image and four maps, for each of two images
        drawn = [axis.images[-1] for axis in figure.axes[start + 1 : start + 5]]
        for picture, (_, expected) in zip(drawn, MAPS.values(), strict=False):
            assert (picture.get_array() == expected.get(sign, 0)).all()
            assert picture.get_clim() == SIGNS[sign]
        # what is for the target is scaled to its own largest value
        first = drawn[3].get_array()[0, 0]
        assert first == pytest.approx(float(sign == "positive"), abs=1e-6)
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert texts == ["all 0"] * 2
    legend = figure.axes[-1]
    assert legend.get_xlim() == SIGNS[sign]


@pytest.mark.parametrize("method", ["masked_image", "alpha_scaling", "original_image"])
@pytest.mark.parametrize("sign", [sign for sign in SIGNS if sign != "all"])
def test_an_image_behind_an_empty_map_is_not_seen(plain, sign, method):
    figure = plain.figure(sign=sign, method=method)
    for axis, (_, expected) in zip(figure.axes[1:], MAPS.values(), strict=False):
        seen = method == "original_image" or sign in expected
        assert axis.images[-1].get_array().any() == seen


def test_an_empty_map_is_drawn_where_all_are(plain):
    """With its legend, or Captum's own."""
    assert len(plain.figure(["against", "zero"], [0], sign="positive").axes) == 3 + 1
    options = {"method": "heat_map", "sign": "positive", "show_colorbar": True}
    shown = plain.figure(["against", "zero"], [0], **options)
    assert len(shown.axes) == 3 + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sign": "plus"}, "sign='plus' is not one of 'all', 'positive'"),
        ({"method": "bogus"}, "method='bogus' is not one of 'overlay', 'heat_map'"),
        ({"method": "masked_image"}, "sign='all', but .* one sign only: pass sign='positive'"),
        ({"method": "alpha_scaling"}, "'alpha_scaling' has .*'negative' or 'absolute_value'"),
    ],
)
def test_a_method_or_sign_that_is_none_or_does_not_fit_is_refused(plain, options, message):
    with pytest.raises(InputError, match=message):
        plain.figure(**options)


def test_small_maps_are_drawn_without_a_warning(cnn):
    found = compare(
        {"tiny": lambda x, t: 1e-9 * x}, cnn.x[:1], 0, metrics=[], model=cnn.model, progress=False
    )
    assert found.figure(["tiny"]).axes[1].images


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("count", [1, 6])
def test_there_is_no_blank_strip_above_the_colour_scale(cnn, count, across):
    maps = torch.rand(count, 1, 8, 8)
    x = cnn.x[:1].expand(count, -1, -1, -1)
    found = compare({"maps": maps}, x, 0, metrics=[], controls=False, progress=False,
                    model=cnn.model)  # fmt: skip
    figure = found.figure(across=across)
    figure.savefig(io.BytesIO(), format="png")
    *pictures, legend = (axis.get_tightbbox().transformed(figure.dpi_scale_trans.inverted())
                         for axis in figure.axes)  # fmt: skip
    assert 0 <= min(box.y0 for box in pictures) - legend.y1 < 0.3  # inches
