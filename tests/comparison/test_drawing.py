"""Drawings of tokens, signals, table rows and volumes: what stands where, in which colour."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from captum_mipin.comparison import drawing, page
from captum_mipin.errors import InputError

BLUE, RED = (5, 48, 97), (103, 0, 31)


def near(colour, expected):
    return np.abs(255 * np.array(colour[:3]) - expected).max() < 3


def test_tokens_have_the_colours_of_their_attributions(tmp_path):
    """Positive is blue, negative is red, and 0 is transparent; $ and < are letters."""
    tokens, values = ["costs", "$5", "<i>", "a$"], torch.tensor([2.0, -2.0, 0.0, 0.0])
    figure = drawing.draw_tokens(tokens, values)
    texts = figure.axes[0].texts
    assert [text.get_text().replace("\\", "") for text in texts] == tokens
    boxes = [text.get_bbox_patch().get_facecolor() for text in texts]
    assert near(boxes[0], BLUE) and near(boxes[1], RED) and boxes[2][3] == boxes[3][3] == 0
    figure.savefig(tmp_path / "tokens.png")
    html = drawing.tokens_html(tokens, values, legend=False)
    assert "rgba(5,48,97,0.90)" in html and "rgba(103,0,31,0.90)" in html
    assert ">&lt;i&gt;</span>" in html and "<i>" not in html
    many = drawing.tokens_html(tokens, torch.stack([values, values], 1), legend=False)
    assert many == html.replace('"2"', '"4"').replace('"-2"', '"-4"')


def test_long_texts_have_several_lines_and_nothing_overlaps():
    tokens = [f"word{number}" for number in range(60)]
    figure = drawing.draw_tokens(tokens, torch.randn(60))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    extents = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    width, height = figure.canvas.get_width_height()
    for index, one in enumerate(extents):
        assert one.x0 >= 0 and one.x1 <= width and one.y0 >= 0 and one.y1 <= height
        assert not any(one.overlaps(other) for other in extents[index + 1 :])


def test_a_signal_is_drawn_over_its_attributions(tmp_path):
    x, a = torch.randn(2, 30), torch.zeros(2, 30)
    a[0, 3], a[1, 7] = 4.0, -2.0
    figure = drawing.draw_signal(x, a, names=["C3", "C4"])
    figure.savefig(tmp_path / "signal.png")
    for axis, name, signal, row in zip(figure.axes[:2], ("C3", "C4"), x, a / 4, strict=True):
        assert axis.get_ylabel() == name
        assert np.allclose(axis.lines[0].get_ydata(), signal)
        assert np.allclose(axis.images[0].get_array()[0], row)  # one scale for all channels
        assert axis.images[0].get_extent()[:2] == [-0.5, 29.5]
    assert len(drawing.draw_signal(x[0], a[0]).axes) == 2  # one channel, the legend
    assert drawing.draw_signal(torch.ones(1, 5), torch.zeros(1, 5)).axes[0].get_ylim()[0] == 0


def test_a_signal_has_an_axis_in_seconds_and_a_unit():
    x = torch.randn(2, 30) * torch.tensor([[1.0], [5.0]])
    figure = drawing.draw_signal(x, x, names=["C3", "C4"], rate=100, unit="µV")
    low, high = figure.axes[0].get_ylim()
    assert low < x.min() and high > x.max()  # what has one unit has one scale
    for axis, name in zip(figure.axes[:2], ("C3 (µV)", "C4 (µV)"), strict=True):
        assert axis.get_ylabel() == name and axis.get_ylim() == (low, high)
        assert np.allclose(axis.images[0].get_extent()[2:], (low, high))
        assert np.allclose(axis.lines[0].get_xdata(), np.arange(30) / 100)
        assert np.allclose(axis.images[0].get_extent()[:2], [-0.005, 0.295])
    assert figure.axes[-2].get_xlabel() == "time (s)"
    assert drawing.draw_signal(x, x).axes[-2].get_xlabel() == "time step"


def volume_with(a):
    """A volume of one slice per attribution, and its attributions."""
    shape = len(a), 6, 7
    return torch.rand(shape), a[:, None, None].expand(shape)


DRAWN = {
    "tokens": lambda a: drawing.draw_tokens(["word"] * len(a), a),
    "few letters": lambda a: drawing.draw_tokens(["word"] * len(a), a, letters=5),
    # with as many ticks as fit, their labels are wider once the legend has made the axis lower
    "signal": lambda a: drawing.draw_signal(torch.linspace(-3.2, 4.2, len(a)), a, names=["sound"]),
    "channels": lambda a: drawing.draw_signal(a.expand(3, -1), a.expand(3, -1), unit="µV"),
    "volume": lambda a: drawing.draw_volume(*volume_with(a)),
    "slice": lambda a: drawing.draw_volume(torch.rand(1, 2, 2), a.view(1, 2, 2)),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([3.0, -1.0, 0.0, 2.0], ["negative", "0", "positive"]),
        ([1.0, 0.0, 2.0, 0.0], ["0", "positive"]),
        ([-1.0, 0.0, -2.0, 0.0], ["negative", "0"]),
        ([0.0] * 4, ["0", "positive"]),
    ],
    ids=["both", "positive", "negative", "zero"],
)
def test_a_legend_says_what_the_colours_mean(draw, values, ends):
    """The colour scale of figures of compare, of which no word is cut off."""
    figure = draw(torch.tensor(values))
    legend = figure.axes[-1]
    assert legend.get_xlabel() == "value of the map, as a share of its own largest"
    assert legend._colorbar.cmap is page.OVERLAY
    words = [label.get_text() for label in legend.get_xticklabels()]
    assert words == ends
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    width, height = figure.canvas.get_width_height()
    boxes = [axis.get_tightbbox(renderer) for axis in figure.axes]
    for box in boxes:
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height
    assert not any(boxes[-1].overlaps(box) for box in boxes[:-1])


def test_the_html_of_tokens_has_the_legend_of_pages():
    bare = drawing.tokens_html(["a"], torch.ones(1), legend=False)
    assert drawing.tokens_html(["a"], torch.ones(1)) == f"{bare}<br><small>{page.LEGEND}</small>"
    assert page.LEGEND.startswith("Blue is positive, red is negative")


def test_a_table_row_is_drawn_as_bars_the_largest_first(tmp_path):
    names, values = ["a", "b$", "c", "d"], torch.tensor([0.5, -3.0, 0.1, 0.2])
    figure = drawing.draw_row(names, values, row=[1, 2, 3, 4], largest=2)
    figure.savefig(tmp_path / "row.png")
    (axis,) = figure.axes
    labels = [label.get_text().replace("\\", "") for label in axis.get_yticklabels()]
    assert labels == ["b$ = 2", "a = 1", "2 others"]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([-3.0, 0.5, 0.3])
    assert near(axis.patches[0].get_facecolor(), RED)
    assert near(axis.patches[1].get_facecolor(), BLUE)
    assert near(axis.patches[2].get_facecolor(), (192, 192, 192))  # a sum, which is no feature


@pytest.mark.parametrize(
    "row",
    [torch.tensor([1 / 3, 2.0]), np.array([1 / 3, 2.0]), [1 / 3, "2"], [np.float32(1 / 3), 2]],
    ids=["tensor", "array", "list", "scalars"],
)
def test_values_of_a_row_are_short(row):
    (axis,) = drawing.draw_row(["a", "b"], torch.tensor([2.0, 1.0]), row=row).figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a = 0.3333", "b = 2"]


def test_a_volume_is_drawn_as_slices_of_one_scale(tmp_path):
    volume, a = torch.rand(5, 6, 7), torch.zeros(2, 5, 6, 7)
    a[:, 0, 1, 1], a[:, 4, 2, 2] = 3.0, -1.5
    figure = drawing.draw_volume(volume, a, slices=3)
    figure.savefig(tmp_path / "volume.png")
    for axis, depth in zip(figure.axes[:3], (0, 2, 4), strict=True):
        grey, heat = axis.images
        assert np.allclose(grey.get_array(), volume[depth])
        assert np.allclose(heat.get_array(), a[0, depth] / 3)
        assert (grey.get_clim(), heat.get_clim()) == (
            (float(volume.min()), float(volume.max())), (-1, 1)
        )  # fmt: skip
    assert len(drawing.draw_volume(volume, a).axes) == 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drawing.draw_tokens(["a"], torch.ones(2)), "1 tokens, but attributions of shape"),
        (lambda: drawing.tokens_html(["a"], torch.ones(1, 1, 3)), "shape \\(1, 1, 3\\)"),
        (lambda: drawing.draw_row(["a", "b"], torch.ones(1)), "2 features"),
        (
            lambda: drawing.draw_row(["a", "b"], torch.ones(2), row=[1]),
            "2 names, but 1 values of the row",
        ),
        (
            lambda: drawing.draw_signal(torch.ones(3), torch.ones(3), rate=0),
            "rate is 0, expected samples per second",
        ),
        (lambda: drawing.draw_signal(torch.ones(2, 3), torch.ones(3)), "expected the same shape"),
        (
            lambda: drawing.draw_signal(torch.ones(2, 3), torch.ones(2, 3), names=["a"]),
            "1 names, but 2 channels",
        ),
        (lambda: drawing.draw_volume(torch.ones(4, 4), torch.ones(4, 4)), "depth, height, width"),
        (lambda: drawing.draw_volume(torch.ones(4, 4, 4), torch.ones(2, 2, 2)), "interpolate"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
