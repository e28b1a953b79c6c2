"""Figures: what is drawn where, in whose colours, with which legend."""

import struct

import pytest
import torch
from captum.attr import visualization as viz

from captum_mipin import compare


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
