"""Figures: what is drawn where, in whose colours, with which legend."""

import struct

import pytest
import torch
from captum.attr import visualization as viz

from captum_mipin import compare
from captum_mipin.errors import InputError


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
    shown = plain.figure(["against", "zero"], [0], sign="positive", show_colorbar=True)
    assert len(shown.axes) == 3 + 2


def test_a_sign_that_is_none_is_refused(plain):
    with pytest.raises(InputError, match="sign='plus' is not known: pass one of 'all', 'positive'"):
        plain.figure(sign="plus")


def test_small_maps_are_drawn_without_a_warning(cnn):
    found = compare(
        {"tiny": lambda x, t: 1e-9 * x}, cnn.x[:1], 0, metrics=[], model=cnn.model, progress=False
    )
    assert found.figure(["tiny"]).axes[1].images
