import math

import numpy as np
import pytest
import torch
from designs import covered, rows_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_mipin import InverseNetwork
from captum_mipin.regression import convolution, lag_gram
from captum_mipin.regression.convolution import moments_of_patches
from captum_mipin.regression.geometry import Geometry
from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import solve
from captum_mipin.rules.geometry import per_dimension
from captum_mipin.rules.linear import Convolution

LAYERS = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


def case(dims, transposed, kernel, stride, padding, dilation, groups, seed=0):
    """A random layer, its input x, and a random signal s of the shape of its output."""
    torch.manual_seed(seed)
    largest = max(*per_dimension(stride, 1), *per_dimension(dilation, 1))
    more = {"output_padding": 1} if transposed and largest > 1 else {}
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    make = LAYERS[transposed][dims - 1]
    layer = make(4, 6, kernel, bias=False, dtype=torch.float64, **options, **more)
    x = torch.randn(3, 4, *(7, 8, 6)[:dims], dtype=torch.float64)
    with torch.no_grad():
        s = torch.randn_like(layer(x)) + 0.3
    sizes = [per_dimension(value, dims) for value in (stride, padding, dilation)]
    output_padding = per_dimension(more.get("output_padding", 0), dims) if transposed else ()
    geometry = Geometry(tuple(layer.weight.shape), *sizes, groups, transposed, output_padding)
    return layer, geometry, x, s


#: Dimensions, transposed, kernel, stride, padding, dilation, groups.
PARAMETERS = (1, 2), (False, True), (1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2), (1, 2)
FURTHER = [
    *((3, transposed, 3, stride, 1, 1, 2) for transposed in (False, True) for stride in (1, 2)),
    (2, False, (3, 2), (1, 1), (1, 0), (1, 2), 2),
    (2, False, (3, 1), (2, 1), (3, 2), (1, 2), 1),
]
EVERY = pytest.mark.parametrize("parameters", [*covered(*PARAMETERS), *FURTHER], ids=str)
SOME = pytest.mark.parametrize("parameters", [*covered(*PARAMETERS, step=7), *FURTHER], ids=str)


@EVERY
def test_patches_times_kernel_is_the_layers_input_gradient(parameters):
    """The definition: g with kernel W is the transpose of the layer; patches are its design."""
    layer, geometry, x, s = case(*parameters)
    x.requires_grad_()
    (transpose,) = torch.autograd.grad(layer(x), x, s)
    weight = layer.weight.detach()
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(geometry.apply(s, weight, x.shape), transpose, **close)
    torch.testing.assert_close(geometry.forward(x, weight), layer(x), **close)
    groups = parameters[-1]
    predicted = geometry.patches(s, x.shape) @ geometry.to_rows(weight).mT
    predicted = predicted.view(groups, 3, -1, 4 // groups).permute(1, 0, 3, 2).reshape(x.shape)
    torch.testing.assert_close(predicted, transpose, **close)
    assert torch.equal(geometry.to_weight(geometry.to_rows(weight)), weight)


@EVERY
def test_moments_are_those_of_the_patches(parameters, monkeypatch):
    _, geometry, x, s = case(*parameters)
    groups = parameters[-1]
    expected, moments = (Moments.zeros(groups, *geometry.features) for _ in range(2))
    expected.update(rows_of(x, groups), geometry.patches(s, x.shape))
    monkeypatch.setattr(lag_gram, "CHUNK", 1)  # one example at a time
    moments.add(moments_of_patches(geometry, x, s))
    same(moments, expected)


def same(moments, expected):
    for name in ("count", "mean_z", "mean_s", "zz", "zs", "ss"):
        a, b = (torch.as_tensor(getattr(m, name)) for m in (moments, expected))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@SOME
def test_moments_with_own_signals_are_those_of_rows(parameters):
    _, geometry, x, s = case(*parameters)
    groups, own = parameters[-1], [torch.randn_like(x) + 1, x + torch.randn_like(x)]
    expected = Moments.zeros(groups, *geometry.features, len(own))
    patches = geometry.patches(s, x.shape)
    expected.update(rows_of(x, groups), patches, [rows_of(o, groups) for o in own])
    same(moments_of_patches(geometry, x, s, own), expected)


@SOME
@pytest.mark.parametrize("first", [True, False])
def test_moments_with_further_convolutions_of_one_tap_are_those_of_rows(parameters, first):
    """As where a stage of a residual network begins: a wide kernel, and a strided shortcut."""
    dims, *_, groups = parameters
    _, geometry, x, s = case(*parameters)
    _, point, _, s_point = case(dims, False, 1, 2, 0, 1, groups, seed=1)
    _, same_place, _, s_same = case(dims, False, 1, 1, 0, 1, groups, seed=2)
    parts = [] if first else [(same_place, s_same)]
    parts += [(geometry, s), (point, s_point)]
    own = (torch.randn_like(x) + 1,)
    inverter = Convolution(tuple(g for g, _ in parts), x.shape, 1)
    expected = Moments.zeros(*inverter.size)
    patches = torch.cat([g.patches(t, x.shape) for g, t in parts], 2)
    expected.update(rows_of(x, groups), patches, [rows_of(o, groups) for o in own])
    same(inverter.moments(x, (*(t for _, t in parts), *own)), expected)


# torch's own, for even kernels: it copies the input
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_asymmetric_same_padding_is_a_convolution_that_drops_its_first_output():
    layer = nn.Conv2d(2, 3, (2, 3), padding="same", bias=False, dtype=torch.float64)
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    s = torch.randn_like(y)
    (transpose,) = torch.autograd.grad(y, x, s)
    geometry = Geometry(tuple(layer.weight.shape), (1, 1), (1, 1), (1, 1), 1, skip=(1, 0))
    weight = layer.weight.detach()
    torch.testing.assert_close(geometry.apply(s, weight, x.shape), transpose)
    torch.testing.assert_close(geometry.forward(x, weight), y)
    patches = geometry.patches(s, x.shape)
    ((_, gram),) = lag_gram.gram_of_patches(geometry, s, x.shape)
    torch.testing.assert_close(gram, patches.mT @ patches)


@pytest.mark.parametrize("scale", ["relative", "mean", "sum"])
@pytest.mark.parametrize("ridge", [0, 0.5])
@pytest.mark.parametrize(
    "kernel, size, groups",
    [((2, 4), (6, 8), 1), ((3, 1), (6, 4), 2), ((4,), (12,), 2), ((2, 1, 2), (4, 3, 4), 1)],
)
def test_windows_that_tile_are_regressed_tile_by_tile_as_patches_are(
    kernel, size, groups, ridge, scale
):
    torch.manual_seed(0)
    x = torch.randn(9, 4, *size, dtype=torch.float64)
    places = [z // k for z, k in zip(size, kernel, strict=True)]
    s = torch.randn(9, 6, *places, dtype=torch.float64) + 2
    x[..., -1] += 3  # places differ in their mean
    s[:, 1], s[:, 4] = 0, 5  # a signal that is never there, and a constant one
    s[:, 2] = s[:, 0] * 2 - 1  # collinear with another and a constant
    ones = (1,) * len(size)
    geometry = Geometry((6, 4 // groups, *kernel), kernel, (0,) * len(size), ones, groups)
    inverter = Convolution((geometry,), x.shape)
    patches = solve(moments_of_patches(geometry, x, s), ridge, scale)
    tiles = solve(inverter.moments(x, (s,)), ridge, scale, inverter.tied)
    assert inverter.tied == math.prod(kernel)
    expected = geometry.to_weight(patches.weight).flatten(), patches.bias.flatten()
    inverse = inverter.inverse(tiles, x)
    torch.testing.assert_close(inverse.weight, expected[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(inverse.bias, expected[1], rtol=1e-8, atol=1e-8)
    assert tiles.explained_variance == pytest.approx(patches.explained_variance, rel=1e-9)
    assert tiles.dead == patches.dead


@pytest.mark.parametrize(
    "change",
    [
        {"size": (7, 8)},
        {"padding": (1, 0)},
        {"dilation": (2, 1)},
        {"stride": (1, 2)},
        {"stride": (3, 2)},
    ],
    ids=str,
)
def test_other_windows_do_not_tile(change):
    shape = {"stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), **change}
    size = torch.Size([1, 1, *shape.pop("size", (6, 6))])
    assert not Geometry((1, 1, 2, 2), groups=1, **shape).tiles(size)
    assert Geometry((1, 1, 2, 2), (2, 2), (0, 0), (1, 1), 1).tiles(torch.Size([1, 1, 6, 6]))


def test_patches_of_images_are_inverted_as_a_dense_layer_of_their_pixels():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 96, 16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(96 * 16, 2)
    ).eval()
    inverse = InverseNetwork(model).fit(torch.randn(20, 3, 64, 64), 0, progress=False)
    (fit,) = [layer for layer in inverse.report.layers if layer.layer.startswith("0/")]
    assert (fit.features, fit.signals, fit.rows) == (3 * 256, 96, 20 * 16)


@SOME
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_signals_solved_by_position_give_the_solution_of_all_at_once(parameters, ridge):
    """With a strided convolution beside it, as in residual blocks, and an identity."""
    layer, geometry, x, s = case(*parameters)
    beside = type(layer)(4, 2, 1, geometry.stride, groups=geometry.groups, dtype=torch.float64)
    with torch.no_grad():
        signals = s + 5, torch.randn_like(beside(x)), torch.randn_like(x)
    sizes = geometry.stride, (0,) * geometry.dims, (1,) * geometry.dims
    single = Geometry(tuple(beside.weight.shape), *sizes, geometry.groups)
    convs = (geometry,) if geometry.transposed else (geometry, single)
    inverter = Convolution(convs, x.shape, 1)
    moments = inverter.moments(x, (*signals[: len(convs)], signals[2]))
    whole, parts = solve(moments, ridge), inverter.parts
    if not geometry.transposed and max(geometry.stride) > 1:
        indices = torch.cat([index for index, _ in parts])
        assert len(parts) > 1 or math.prod(geometry.kernel) == 1
        assert len(indices.unique()) == len(indices)
        unseen = torch.ones(moments.mean_s.shape[1], dtype=torch.bool)
        unseen[indices] = False
        assert not moments.ss[:, unseen].any()
    by_part = solve(moments, ridge, "relative", 1, parts)
    for name in ("weight", "own", "bias"):
        one, other = getattr(by_part, name), getattr(whole, name)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert by_part.explained_variance == pytest.approx(whole.explained_variance, abs=1e-12)


#: Channels of y, kernel, stride, padding, dilation, groups; and the size of x.
STRIDED = {
    "kernel 7, stride 2": ((6, 7, 2, 3, 1, 1), (9, 8)),
    "kernel 3, strides 2 and 3": ((6, 3, (2, 3), 1, 1, 2), (9, 10)),
    "dilation": ((6, 3, 2, 2, 1, 1), (8, 8)),
    "dilation and stride without a common divisor": ((4, 5, 4, 2, 3, 1), (40,)),
    "long kernel": ((2, 64, 8, 0, 1, 1), (128,)),
    "taps that no position sees": ((4, 5, 4, 2, 1, 1), (2, 3)),
}


def strided(case):
    """A strided convolution's inverter, and two batches of x and s, float64."""
    (channels, kernel, stride, padding, dilation, groups), size = STRIDED[case]
    torch.manual_seed(0)
    shape = channels, 4 // groups, *per_dimension(kernel, len(size))
    sizes = [per_dimension(value, len(size)) for value in (stride, padding, dilation)]
    geometry = Geometry(shape, *sizes, groups)
    x = torch.randn(9, 4, *size, dtype=torch.float64) + 2
    with torch.no_grad():
        s = torch.randn_like(geometry.forward(x, torch.zeros(shape).double())).relu() + 0.3
    batches = list(zip(x.split(5), s.split(5), strict=True))
    return Convolution((geometry,), x.shape), batches


@pytest.mark.parametrize("case", STRIDED)
def test_a_strided_convolution_has_one_gram_matrix_for_each_part(case):
    inverter, batches = strided(case)
    (geometry,), groups = inverter.geometries, inverter.size[0]
    moments, other = (inverter.moments(x, (s,)) for x, s in batches)
    empty = Moments.zeros(*inverter.size, parts=inverter.blocks)
    moments.add(other)
    empty.add(moments)
    expected = Moments.zeros(*inverter.size)
    for x, s in batches:
        expected.update(rows_of(x, groups), geometry.patches(s, x.shape))
    assert len(moments.parts) > 1
    assert all(map(torch.equal, moments.parts, inverter.blocks))
    for index, block in zip(moments.parts, empty.blocks, strict=True):
        torch.testing.assert_close(block, expected.ss[:, index][..., index])
    same(moments, expected)
    torch.testing.assert_close(moments.squares, expected.squares)
    same(moments.whole(), expected)
    assert moments.whole().parts == ()
    twice = moments.pooled(lambda part: 2 * part)  # as two processes with the same data
    assert len(twice.blocks) == len(twice.parts) > 1
    expected.add(expected)
    same(twice, expected)


@pytest.mark.parametrize("ridge", [0, 0.5])
@pytest.mark.parametrize("case", STRIDED)
def test_a_solution_from_blocks_is_the_ridge_regression_on_patches(case, ridge):
    inverter, batches = strided(case)
    (geometry,), groups = inverter.geometries, inverter.size[0]
    moments, other = (inverter.moments(x, (s,)) for x, s in batches)
    moments.add(other)
    solution = solve(moments, ridge, "mean", parts=inverter.parts)
    x, s = map(torch.cat, zip(*batches, strict=True))
    features, patches = rows_of(x, groups).numpy(), geometry.patches(s, x.shape).numpy()
    for group in range(groups):
        a, b = (t[group] - t[group].mean(0) for t in (patches, features))
        system = a.T @ a / len(a) + ridge * np.eye(a.shape[1])
        weight = np.linalg.pinv(system, 1e-12, hermitian=True) @ (a.T @ b / len(a))
        np.testing.assert_allclose(solution.weight[group].mT, weight, rtol=1e-9, atol=1e-10)
        bias = features[group].mean(0) - patches[group].mean(0) @ weight
        np.testing.assert_allclose(solution.bias[group], bias, rtol=1e-9)


class OnDevice(TorchDispatchMode):
    """Refuse what copies a value from the device to the host, if tensors were on a device."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ), f"{function} waits for the device"
        return function(*arguments, **(named or {}))


@SOME
def test_moments_copy_nothing_to_the_host(parameters, monkeypatch):
    """A GPU would have to finish all work before: the only question is asked on CPUs alone."""
    _, geometry, x, s = case(*parameters)
    monkeypatch.setattr(convolution, "_unseen", lambda sizes: (sizes == 0, True))
    inverter = Convolution((geometry,), x.shape, 1)
    with OnDevice():
        inverter.moments(x, (s, torch.randn_like(x)))


def test_what_copies_to_the_host_is_noticed():
    with OnDevice(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(3).any())
