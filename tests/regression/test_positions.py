"""Convolutions fitted on some positions of their maps: the same sums, of fewer rows."""

import pytest
import torch
from designs import rows_of
from small import normal
from torch import nn

from captum_mipin import InverseNetwork
from captum_mipin.errors import InputError
from captum_mipin.inverse import tables
from captum_mipin.regression.dual import solve_table
from captum_mipin.regression.geometry import Geometry
from captum_mipin.regression.moments import Moments
from captum_mipin.rules.linear import Convolution

X = normal(24, 3, 12, 12)


def network():
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, stride=2)
    steps = (step for convolution in convolutions for step in (convolution, nn.ReLU()))
    return nn.Sequential(*steps, nn.Flatten(), nn.Linear(100, 3)).eval()


MODEL = network()


def assert_same(result, expected):
    expected = expected.whole()
    assert result.count == expected.count
    for name in ("mean_z", "mean_s", "zz", "zs", "ss"):
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups", "transposed"),
    [
        ((3, 2), (1, 1), (1, 0), (1, 1), 1, False),
        ((3, 3), (2, 1), (0, 2), (1, 2), 2, False),
        ((1, 1), (1, 1), (0, 0), (1, 1), 1, False),
        ((3, 2), (2, 1), (1, 0), (1, 1), 1, True),
        ((2, 3), (1, 2), (0, 1), (2, 1), 2, True),
        ((4,), (2,), (1,), (1,), 1, False),
    ],
)
@pytest.mark.parametrize("own", [0, 2])
def test_sums_over_some_positions(kernel, stride, padding, dilation, groups, transposed, own):
    dims, size = len(kernel), (7, 6)[: len(kernel)]
    conv = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")(
        4, 6, kernel, stride, padding, dilation=dilation, groups=groups
    )
    x = normal(5, 4, *size, dtype=torch.float64)
    s = torch.randn_like(conv.double()(x))
    geometry = Geometry(
        tuple(conv.weight.shape),
        stride,
        padding,
        dilation,
        groups,
        transposed,
        (0,) * dims if transposed else (),
    )
    others = tuple(torch.randn_like(x) for _ in range(own))
    inverter = Convolution((geometry,), x.shape, own)
    count = x[0, 0].numel()
    assert_same(
        inverter.moments(x, (s, *others), torch.arange(count)), inverter.moments(x, (s, *others))
    )
    places = torch.tensor([0, 2, 3, count - 1])
    rows = geometry.patches(s, x.shape).unflatten(1, (len(x), count))[:, :, places].flatten(1, 2)

    def picked(t):
        return rows_of(t.flatten(2)[:, :, places], groups)

    expected = Moments.zeros(*inverter.size)
    expected.update(picked(x), rows, [picked(t) for t in others])
    assert_same(inverter.moments(x, (s, *others), places), expected)


def test_branches_learned_together():
    x = normal(5, 4, 6, 6, dtype=torch.float64)
    geometries = (
        Geometry((3, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1),
        Geometry((2, 4, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    )
    signals = (
        normal(5, 3, 6, 6, seed=1, dtype=torch.float64),
        normal(5, 2, 3, 3, seed=2, dtype=torch.float64),
        torch.randn_like(x),
    )
    inverter = Convolution(geometries, x.shape, 1)
    assert_same(inverter.moments(x, signals, torch.arange(36)), inverter.moments(x, signals))


def test_a_fit_on_a_share_of_the_positions():
    exact = InverseNetwork(MODEL).fit(X, 1, progress=False, batch_size=8)
    s, errors = exact.source_signal(X, 1), []
    for share in (0.1, 0.5, 1.0, 1000):
        some = InverseNetwork(MODEL, positions=share).fit(X, 1, progress=False, batch_size=8)
        rows = [layer.rows for layer in some.report.layers]
        chosen = 1 if share == 1000 else share
        assert rows == [24, 24 * round(144 * chosen), 24 * round(144 * chosen)]
        errors.append(float((some.source_signal(X, 1) - s).norm() / s.norm()))
        again = InverseNetwork(MODEL, positions=share).fit(X, 1, progress=False, batch_size=8)
        assert torch.equal(again.source_signal(X, 1), some.source_signal(X, 1))
    assert errors[0] > errors[1] > errors[2] == errors[3] == 0


@pytest.mark.parametrize("stride", [1, 4])
def test_few_positions_of_a_long_kernel_are_solved_by_rows(stride, monkeypatch):
    """The first convolution of a network of sounds: few rows, many signals, the same inverse."""
    torch.manual_seed(0)
    layers = nn.Conv1d(1, 8, 64, stride, padding=32), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.LazyLinear(3)).eval()
    x, solved = normal(5, 1, 128, dtype=torch.float64), []
    model.double()(x)
    monkeypatch.setattr(
        tables, "solve_table", lambda *given: solved.append(len(given[1])) or solve_table(*given)
    )

    def fitted():
        return InverseNetwork(model, positions=6).fit(x, 1, progress=False, batch_size=2)

    by_rows = fitted()
    assert solved == [30]
    monkeypatch.setattr(Convolution, "by_rows", lambda self, rows: False)
    by_signals = fitted()
    assert solved == [30]
    torch.testing.assert_close(
        by_rows.source_signal(x, 1), by_signals.source_signal(x, 1), rtol=1e-8, atol=1e-9
    )
    assert by_rows.report.layers[-1].rows == by_signals.report.layers[-1].rows == 30


def test_positions_are_drawn_by_the_generator_and_in_the_same_way_for_all_classes(tmp_path):
    one, same, other = (
        InverseNetwork(MODEL, positions=10, generator=torch.Generator().manual_seed(seed)).fit(
            X, [0, 1], progress=False
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(one.source_signal(X, 1), same.source_signal(X, 1))
    assert not torch.equal(one.source_signal(X, 1), other.source_signal(X, 1))
    late = InverseNetwork(MODEL, positions=10, generator=torch.Generator().manual_seed(1)).fit(
        X, lazy=True, progress=False
    )
    assert torch.equal(late.source_signal(X, 1), one.source_signal(X, 1))
    one.save(tmp_path / "file")
    assert InverseNetwork.load(tmp_path / "file", MODEL).settings == one.settings


@pytest.mark.parametrize("positions", [0, -1, 0.0, 1.5, True, "0.1", float("nan")])
def test_other_numbers_of_positions_are_refused(positions):
    with pytest.raises(InputError, match="positions="):
        InverseNetwork(MODEL, positions=positions)


def test_descent_takes_all_positions():
    with pytest.raises(InputError, match='positions= needs solver="exact"'):
        InverseNetwork(MODEL, positions=0.5, solver="sgd")
