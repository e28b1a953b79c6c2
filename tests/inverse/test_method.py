"""The method of the paper, checked against the oracle and by identities that do not need it."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    Oracle,
    adaptive_windows,
    apply_jointly,
    apply_kernel,
    fit_kernel,
    from_torch,
    max_unpool,
    partners,
    patches,
    regress,
    regress_jointly,
    sliding_windows,
    window_table,
)
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution
from captum_mipin.inverse import tables
from captum_mipin.regression.moments import Moments
from captum_mipin.rules.linear import Convolution


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def seeded(model, seed=0):
    """Draw all parameters, biases and running statistics from a fixed seed, in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
            if value.is_floating_point():
                value.normal_(std=1 / math.sqrt(max(1, value[0].numel())), generator=generator)
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    return model.double().eval()


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(model, x, targets=None, **options):
    return MIPINAttribution(model, InverseNetwork(model, **options).fit(x, targets, progress=False))


def at(layer, mipin, x, target, biases=True, local=True):
    """Return S, or A, at the output of a layer."""
    of_layer = LayerMIPINAttribution(mipin.forward_func, mipin.inverse, layer)
    method = of_layer.source_signal if biases else of_layer.attribute
    return method(x, target=target, local=local).numpy()


def both(mipin, x, target, **options):
    """Return S and A."""
    return mipin.source_signal(x, target=target, **options), mipin.attribute(
        x, target=target, **options
    )


def assert_close(actual, expected, tolerance=1e-9):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    size = np.abs(expected).max()
    assert size > 0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size)


def assert_like_oracle(model, x, target=1, tolerance=1e-9, **options):
    mipin = fitted(model, x, target, **options)
    renamed = {"ridge": options.get("ridge", 1e-3), "scale": options.get("ridge_scale", "relative")}
    oracle = Oracle(from_torch(model), **renamed).fit(x.numpy(), target)
    new = normal(3, *x.shape[1:], seed=2)
    for some, local in itertools.product((x[:5], new), (True, False)):
        source, attribution = both(mipin, some, target, local=local)
        assert_close(source, oracle.signals(some, target, local=local)[0], tolerance)
        assert_close(
            attribution, oracle.signals(some, target, biases=False, local=local)[0], tolerance
        )


def mlp(*sizes):
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return seeded(nn.Sequential(*layers[:-1]))


def cnn(*layers, size=(8, 8), seed=0):
    """Return the layers, flattened, and a linear head; 2 channels in."""
    body = nn.Sequential(*layers, nn.Flatten())
    width = body(torch.zeros(1, 2, *size)).shape[1]
    return seeded(nn.Sequential(*body, nn.Linear(width, 3)), seed)


def relu_pool_cnn():
    return cnn(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.ReLU())


NETWORKS = {
    "mlp": lambda: (mlp(6, 12, 9, 3), normal(40, 6)),
    "cnn": lambda: (relu_pool_cnn(), normal(40, 2, 8, 8)),
}


@functools.cache
def network(kind):
    """Return a model, its data and the fit of all classes, none of which may be changed."""
    model, x = NETWORKS[kind]()
    return model, x, fitted(model, x)


# The oracle.


@pytest.mark.parametrize("scale", ["relative", "mean", "sum"])
def test_mlp_equals_oracle(scale):
    assert_like_oracle(mlp(6, 12, 9, 3), normal(60, 6), ridge=1e-2, ridge_scale=scale)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_fewer_samples_than_features_equals_oracle(ridge):
    assert_like_oracle(mlp(7, 25, 20, 3), normal(12, 7), ridge=ridge)


CNNS = {
    "two layers": lambda: cnn(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU()),
    "dense above": lambda: cnn(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 8), nn.ReLU()
    ),
    "stride": lambda: cnn(
        nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 3, 2, stride=(1, 2)), nn.ReLU()
    ),
    "stride beyond kernel": lambda: cnn(nn.Conv2d(2, 4, 2, stride=3), nn.ReLU()),
    "padding": lambda: cnn(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=(0, 2)), nn.ReLU()
    ),
    "same padding": lambda: cnn(
        nn.Conv2d(2, 3, (2, 3), padding="same"),
        nn.ReLU(),
        nn.Conv2d(3, 2, 4, padding="same"),
        nn.ReLU(),
    ),
    "dilation": lambda: cnn(
        nn.Conv2d(2, 3, 3, dilation=2), nn.ReLU(), nn.Conv2d(3, 3, 2, dilation=(1, 2)), nn.ReLU()
    ),
    "all three": lambda: cnn(
        nn.Conv2d(2, 4, 3, (2, 1), (1, 2), (1, 2)),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, 2, 2, 2),
        nn.ReLU(),
    ),
    "groups": lambda: cnn(
        nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU()
    ),
    "depthwise": lambda: cnn(
        nn.Conv2d(2, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
        nn.ReLU(),
    ),
    "no bias": lambda: cnn(nn.Conv2d(2, 3, 3, bias=False), nn.ReLU()),
    "disjoint pool": relu_pool_cnn,
    "overlapping pool": lambda: cnn(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 3, 2), nn.ReLU()
    ),
    "pool before ReLU": lambda: cnn(nn.Conv2d(2, 3, 3), nn.MaxPool2d(3, 1), nn.ReLU()),
    "pool at the input": lambda: cnn(nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.ReLU()),
}


@pytest.mark.filterwarnings(
    "ignore:Using padding='same'"
)  # torch's own, for even kernels: it copies the input
@pytest.mark.parametrize("name", CNNS)
def test_cnn_equals_oracle(name):
    assert_like_oracle(CNNS[name](), normal(40, 2, 8, 8))


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
    scale=st.sampled_from(["relative", "mean", "sum"]),
)
def test_any_geometry_equals_oracle(kernel, stride, padding, dilation, groups, scale):
    model = cnn(nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups), nn.ReLU(), size=(6, 7))
    assert_like_oracle(model, normal(25, 2, 6, 7), ridge_scale=scale)


@pytest.mark.parametrize("groups, scale", [(1, "relative"), (2, "mean"), (1, "sum")])
def test_windows_that_tile_equal_the_oracle(groups, scale):
    model = cnn(nn.Conv2d(2, 4, (3, 2), (3, 2), groups=groups), nn.ReLU(), size=(6, 6))
    assert_like_oracle(model, normal(25, 2, 6, 6) + 1, ridge_scale=scale)


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_a_convolution_with_fewer_rows_than_signals_equals_the_oracle(ridge, monkeypatch):
    """6 x 9 rows and 16 x 9 signals: solved by rows, on all examples at once."""
    used = []
    table = tables.solve_table
    monkeypatch.setattr(tables, "solve_table", lambda *a: used.append(a[0].shape) or table(*a))
    wide = nn.Conv2d(8, 16, 3, padding=1)
    model = cnn(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), wide, nn.ReLU(), size=(3, 3))
    assert_like_oracle(model, normal(6, 2, 3, 3), tolerance=1e-8, ridge=ridge)
    assert used == [(1, 54, 8)]


def test_a_residual_block_solved_by_rows_equals_one_solved_by_signals(monkeypatch):
    class Block(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.first = nn.Conv2d(6, 40, 3, stride, padding=1)
            self.second = nn.Conv2d(6, 40, 1, stride) if stride > 1 else nn.Identity()
            self.last = nn.Conv2d(40, 40 if stride > 1 else 6, 3, padding=1)

        def forward(self, x):
            return F.relu(self.last(F.relu(self.first(x))) + self.second(x))

    for stride in (1, 2):
        model = cnn(nn.Conv2d(2, 6, 1), nn.ReLU(), Block(stride), size=(4, 4))
        x = normal(7, 2, 4, 4)
        by_rows = InverseNetwork(model).fit(x, 1, batch_size=3, progress=False)
        with monkeypatch.context() as patch:
            patch.setattr(Convolution, "by_rows", lambda self, rows: False)
            by_signals = InverseNetwork(model).fit(x, 1, batch_size=3, progress=False)
        assert_close(by_rows.source_signal(x, 1), by_signals.source_signal(x, 1), 1e-8)
        for one, other in zip(by_rows.report.layers, by_signals.report.layers, strict=True):
            assert one.rows == other.rows and one.dead == other.dead
            assert one.explained_variance == pytest.approx(other.explained_variance, abs=1e-9)


def test_taps_that_never_see_a_signal_do_not_count_for_the_ridge():
    model = cnn(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(1, 4), size=(4, 4), seed=4)
    assert_like_oracle(model, normal(40, 2, 4, 4, seed=4))


# S and A.


@pytest.mark.parametrize("kind", NETWORKS)
def test_source_signal_is_attribution_plus_path_of_the_biases(kind):
    model, x, mipin = network(kind)
    source, attribution = both(mipin, x[:6], 2)
    biases = Oracle(from_torch(model)).fit(x.numpy(), 2).signals(x[:6], 2, seed=0)[0]
    assert np.abs(biases).max() > 0.1
    assert_close(source - attribution, biases)


@pytest.mark.parametrize("kind", NETWORKS)
def test_within_a_linear_region_source_signal_is_affine_and_attribution_linear_in_the_logit(kind):
    model, x, mipin = network(kind)
    near = x[:4] + 1e-5 * normal(*x[:4].shape, seed=3)
    (source, attribution), (source_near, attribution_near) = (
        both(mipin, x[:4], 0),
        both(mipin, near, 0),
    )
    logit, logit_near = (
        model(v)[:, 0].detach().reshape(-1, *[1] * (x.ndim - 1)) for v in (x[:4], near)
    )
    assert (logit - logit_near).abs().min() > 1e-8
    assert_close(attribution * logit_near, attribution_near * logit, 1e-12)
    assert (attribution - attribution_near).abs().max() > 1e-8
    assert_close(source - attribution, source_near - attribution_near, 1e-12)


def test_attribution_follows_a_shift_of_the_logit_and_source_signal_does_not():
    model, x, mipin = network("cnn")
    shifted = relu_pool_cnn()
    with torch.no_grad():
        shifted[-1].bias[1] += 2.5
    source, attribution = both(mipin, x[:5], 1)
    source_shifted, attribution_shifted = both(fitted(shifted, x, 1), x[:5], 1)
    logit = model(x[:5])[:, 1].detach().reshape(-1, 1, 1, 1)
    assert_close(source_shifted, source)
    assert_close(attribution_shifted * logit, attribution * (logit + 2.5))


def test_global_maps_are_one_map_a_class():
    model, x, mipin = network("cnn")
    for target in range(3):
        source, attribution = both(mipin, x[:6], target, local=False)
        class_map = mipin.class_attribution(target)
        assert class_map.shape == (1, 2, 8, 8)
        assert_close(attribution, model(x[:6])[:, target].detach().reshape(-1, 1, 1, 1) * class_map)
        biases = source - attribution
        assert biases.abs().max() > 0.01
        assert_close(biases, biases[:1].expand_as(biases))


def test_input_is_masked_on_request_only():
    x, model = normal(40, 6).relu(), mlp(6, 12, 3)
    mipin = fitted(model, x, 0)
    for free, masked in zip(both(mipin, x, 0), both(mipin, x, 0, mask_input=True), strict=True):
        assert free[x == 0].abs().min() > 0
        assert torch.equal(masked, free * (x != 0))


def test_one_linear_layer_is_the_linear_pattern():
    model, x = mlp(6, 3), normal(200, 6) @ normal(6, 6, seed=4) + 1
    mipin = fitted(model, x, ridge=0)
    for target in range(3):
        y = model(x)[:, target].detach().numpy()
        pattern = np.array([np.cov(feature, y)[0, 1] for feature in x.numpy().T]) / np.var(
            y, ddof=1
        )
        assert_close(mipin.class_attribution(target)[0], pattern, 1e-12)
        source, attribution = both(mipin, x, target)
        assert_close(attribution, np.outer(y, pattern), 1e-12)
        assert_close(source, x.numpy().mean(0) + np.outer(y - y.mean(), pattern), 1e-12)


# The fit.


@pytest.mark.parametrize("kind", NETWORKS)
def test_fit_depends_on_neither_chunks_nor_order(kind):
    model, x, mipin = network(kind)
    expected = both(mipin, x[:5], 1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    for data, batch_size in ((x, 1), (x, 7), (x[order], 11)):
        inverse = InverseNetwork(model).fit(data, 1, batch_size=batch_size, progress=False)
        for actual, wanted in zip(
            both(MIPINAttribution(model, inverse), x[:5], 1), expected, strict=True
        ):
            assert_close(actual, wanted, 1e-10)


def gram_rank(signals):
    s = torch.as_tensor(signals)[None]
    moments = Moments.zeros(1, 1, s.shape[2])
    moments.update(s[:, :, :1], s)
    eigenvalues = torch.linalg.eigvalsh(moments.ss[0])
    return int((eigenvalues > 1e-12 * eigenvalues.max()).sum())


def test_without_masks_signals_have_rank_one():
    model = seeded(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)))
    x = normal(60, 6)
    mipin = fitted(model, x, 1, ridge=0)
    assert [gram_rank(at(layer, mipin, x, 1)) for layer in model[:2]] == [1, 1]
    source, attribution = both(mipin, x, 1)
    assert np.linalg.matrix_rank(source - source.mean(0), tol=1e-9) == 1
    assert np.linalg.matrix_rank(attribution, tol=1e-9) == 1


def test_masks_give_signals_full_rank():
    model = mlp(6, 8, 7, 3)
    x = normal(200, 6)
    mipin = fitted(model, x, 1)
    for layer in (model[1], model[3]):
        features = model[: list(model).index(layer) + 1](x)
        switching = ((features == 0).any(0) & (features != 0).any(0)).sum()
        assert switching >= 3
        assert gram_rank(at(layer, mipin, x, 1)) >= switching
        assert gram_rank(at(layer, mipin, x, 1, local=False)) == 1
    assert np.linalg.matrix_rank(mipin.attribute(x, target=1), tol=1e-9) == 6


def test_fit_that_stops_at_a_layer_equals_the_full_fit_there():
    model, x, full = network("cnn")
    for layer in (model[1], model[2], model[4]):
        partial = InverseNetwork(model, layer=layer).fit(x, [0, 2], progress=False)
        at_own, at_given = (
            LayerMIPINAttribution(model, partial),
            LayerMIPINAttribution(model, full.inverse, layer),
        )
        for target, local in itertools.product((0, 2), (True, False)):
            options = {"target": target, "local": local}
            assert_close(
                at_own.source_signal(x[:5], **options),
                at_given.source_signal(x[:5], **options),
                1e-12,
            )
            assert_close(
                at_own.attribute(x[:5], **options), at_given.attribute(x[:5], **options), 1e-12
            )


def test_signal_at_a_layer_is_masked_and_equals_the_oracle():
    model, x, mipin = network("cnn")
    oracle = Oracle(from_torch(model)).fit(x.numpy(), 1)
    features = oracle.features(x)
    for biases in (True, False):
        signals = oracle.signals(x, 1, biases=biases)
        for depth in (1, 2, 4):
            expected = signals[depth + 1] * (features[depth + 1] != 0)
            assert_close(at(model[depth], mipin, x, 1, biases=biases), expected)


def test_classes_fitted_later_equal_those_fitted_at_once():
    model, x, at_once = network("cnn")
    inverse = InverseNetwork(model).fit(x, 2, progress=False)
    before = inverse.source_signal(x[:5], target=2)
    inverse.fit(x, [0], progress=False)
    assert sorted(inverse.targets) == [0, 2]
    assert torch.equal(inverse.source_signal(x[:5], target=2), before)
    for target in (0, 2):
        for actual, expected in zip(
            both(MIPINAttribution(model, inverse), x[:5], target),
            both(at_once, x[:5], target),
            strict=True,
        ):
            assert_close(actual, expected, 1e-11)


@pytest.mark.parametrize("kind", NETWORKS)
def test_mixed_targets_equal_one_by_one(kind):
    _, x, mipin = network(kind)
    targets = [2, 0, 1, 1, 0, 2, 2]
    for mixed, single in zip(
        both(mipin, x[:7], targets),
        map(
            torch.cat,
            zip(*(both(mipin, x[i : i + 1], t) for i, t in enumerate(targets)), strict=True),
        ),
        strict=True,
    ):
        assert_close(mixed, single, 1e-12)


@pytest.mark.parametrize("kind", NETWORKS)
def test_float32_is_close_to_float64(kind):
    model, x, mipin = network(kind)
    expected = both(mipin, x[:10], 1)
    actual = both(fitted(copy.deepcopy(model).float(), x.float(), 1), x[:10].float(), 1)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, e, 1e-5)


def test_sgd_approaches_the_exact_solution():
    layers = nn.Conv2d(2, 3, 2, stride=2), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU()
    model, x = cnn(*layers, size=(6, 6)), normal(40, 2, 6, 6)
    exact = both(fitted(model, x, 1, ridge=0), x[:5], 1)
    distances = []
    for epochs in (1, 30, 300):
        sgd = both(fitted(model, x, 1, ridge=0, solver="sgd", epochs=epochs), x[:5], 1)
        distances.append(
            [float((a - e).norm() / e.norm()) for a, e in zip(sgd, exact, strict=True)]
        )
    assert max(distances[2]) < 1e-6
    assert 1e-3 < max(distances[1]) < min(distances[0])


# One network, several spellings.


class Spelled(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.conv, self.dense, self.head = nn.Conv2d(2, 3, 3), nn.Linear(48, 7), nn.Linear(7, 3)
        self.first, self.second = first, second

    def forward(self, x):
        return self.head(self.second(self.dense(self.first(self.conv(x)).flatten(1))))


def test_spelling_of_relu_does_not_matter():
    x, shared = normal(40, 2, 6, 6), nn.ReLU()
    spellings = [
        (nn.ReLU(), nn.ReLU()),
        (nn.ReLU(inplace=True), nn.ReLU(inplace=True)),
        (shared, shared),
        (Function(F.relu), Function(torch.relu_)),
        (Function(lambda h: h.clamp(min=0)), Function(lambda h: h.clamp_min(0))),
    ]
    results = [both(fitted(seeded(Spelled(*spelling)), x, 1), x[:5], 1) for spelling in spellings]
    for source, attribution in results[1:]:
        assert torch.equal(source, results[0][0])
        assert torch.equal(attribution, results[0][1])
    layers = seeded(Spelled(nn.ReLU(), nn.ReLU()))
    plain = nn.Sequential(
        layers.conv, nn.ReLU(), nn.Flatten(), layers.dense, nn.ReLU(), layers.head
    )
    assert_close(results[0][0], Oracle(from_torch(plain)).fit(x.numpy(), 1).signals(x[:5], 1)[0])


def test_dropout_and_rearrangements_change_nothing():
    class Rearranged(nn.Module):
        def __init__(self, conv, head):
            super().__init__()
            self.conv, self.drop, self.head = conv, nn.Dropout(0.5), head

        def forward(self, x):
            h = self.drop(self.conv(x.transpose(2, 3).transpose(2, 3)).relu())
            h = h.permute(0, 2, 3, 1).contiguous().view(x.shape[0], -1, 3)
            return self.head(
                F.dropout(torch.flatten(h.unsqueeze(1).squeeze(1), 1), 0.5, self.training)
            )

    x, plain = normal(40, 2, 6, 6), cnn(nn.Conv2d(2, 3, 3), nn.ReLU(), size=(6, 6))
    model = Rearranged(nn.Conv2d(2, 3, 3), nn.Linear(48, 3)).double().eval()
    model.conv.load_state_dict(plain[0].state_dict())
    with torch.no_grad():
        model.head.weight.copy_(
            plain[-1].weight.view(3, 3, 4, 4).permute(0, 2, 3, 1).reshape(3, 48)
        )
        model.head.bias.copy_(plain[-1].bias)
    for actual, expected in zip(
        both(fitted(model, x, 1), x[:5], 1), both(fitted(plain, x, 1), x[:5], 1), strict=True
    ):
        assert_close(actual, expected, 1e-11)


def test_concatenation_of_two_inputs():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 2, stride=2)
            self.join, self.head = nn.ReLU(), nn.Linear(45, 3)

        def forward(self, a, b):
            return self.head(self.join(torch.cat([self.a(a), self.b(b)], 1)).flatten(1))

    model, a, b = seeded(Joined()), normal(40, 1, 5, 5), normal(40, 2, 6, 6, seed=2)
    inverse = InverseNetwork(model).fit((a, b), 1, progress=False)
    joined = model.join(torch.cat([model.a(a), model.b(b)], 1)).detach().numpy()
    above = Oracle(from_torch(nn.Sequential(nn.Flatten(), model.head))).fit(joined, 1)
    s = above.signals(joined, 1)[0] * (joined != 0)
    tables = (
        partners((5, 5), (3, 3), (3, 3), (1, 1), (0, 0), (1, 1)),
        partners((6, 6), (3, 3), (2, 2), (2, 2), (0, 0), (1, 1)),
    )
    actual = inverse.source_signal((a, b), target=1)
    assert isinstance(actual, tuple)
    for got, x, part, table in zip(
        actual, (a.numpy(), b.numpy()), (s[:, :2], s[:, 2:]), tables, strict=True
    ):
        assert_close(got, apply_kernel(part, table, fit_kernel(x, part, table, 1, 1e-3), x.shape))


@pytest.mark.parametrize("dense", [False, True])
def test_batch_norm_equals_the_layer_it_is_folded_into(dense):
    if dense:
        learned, norm, x = nn.Linear(6, 9), nn.BatchNorm1d(9), normal(60, 6)
        model = seeded(nn.Sequential(learned, norm, nn.ReLU(), nn.Linear(9, 3)))
    else:
        learned, norm, x = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), normal(40, 2, 8, 8)
        model = cnn(learned, norm, nn.ReLU(), nn.MaxPool2d(2))
        model[1].load_state_dict(seeded(nn.BatchNorm2d(4)).state_dict())
    fuse = nn.utils.fuse_linear_bn_eval if dense else nn.utils.fuse_conv_bn_eval
    folded = nn.Sequential(fuse(learned, norm), *model[2:]).eval()
    assert_close(folded(x).detach(), model(x).detach(), 1e-12)
    for actual, expected in zip(
        both(fitted(model, x, 1), x[:5], 1), both(fitted(folded, x, 1), x[:5], 1), strict=True
    ):
        assert_close(actual, expected, 1e-10)


# Forks and affine maps at the input.


def test_batch_norm_at_the_input_is_calibrated_by_channel():
    model = cnn(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.ReLU())
    x = normal(40, 2, 8, 8) * torch.tensor([3.0, 0.5]).view(2, 1, 1) + 1
    mipin, normalised = fitted(model, x, 1), model[0](x).detach().numpy()
    signal = Oracle(from_torch(model[1:])).fit(normalised, 1).signals(normalised, 1)[0]
    assert_close(mipin.source_signal(x, target=1), calibrated(x.numpy(), [signal]))


def calibrated(x, signals, biases=True, of=None):
    """Return least squares of x on the signals, channel by channel, fitted on ``of``."""
    result = np.empty_like(x)
    for channel in range(x.shape[1]):
        rows = np.stack([s[:, channel].ravel() for s in of or signals], axis=1)
        weight, bias = regress(x[:, channel].reshape(-1, 1), rows, 1e-3)
        sent = np.stack([s[:, channel] for s in signals], axis=-1)
        result[:, channel] = sent @ weight[0] + (bias if biases else 0)
    return result


class Residual(nn.Module):
    """h = relu(stem(x)), then relu(branch(h) + h), or relu(branch(h) + other(h) + h)."""

    def __init__(self, stem, branch, head, other=None):
        super().__init__()
        self.stem, self.branch, self.head, self.other, self.act = (
            stem,
            branch,
            head,
            other,
            nn.ReLU(),
        )

    def forward(self, x):
        h = self.stem(x).relu()
        total = self.branch(h) + h
        return self.head(
            self.act(total if self.other is None else total + self.other(h)).flatten(1)
        )


def forked(model, x, shared):
    """Return S and A of a residual network, whose fork is inverted by one regression.

    Args:
        shared: Makes the rows of the regression from the signals above.
    """
    h = model.stem(x).relu().detach()
    parts = [model.branch(h), h] + ([] if model.other is None else [model.other(h)])
    above = model.act(sum(parts)).detach().numpy()
    h, y = h.numpy(), model(x)[:, 1:2].detach().numpy()
    flat = above.reshape(len(x), -1)
    weight, bias = regress(flat, y, 1e-3)
    s, a = ((v.reshape(above.shape) * (above != 0)) for v in (y @ weight.T + bias, y @ weight.T))

    def rows(v):
        return np.moveaxis(v, 1, -1).reshape(-1, v.shape[1])

    weights, bias = regress_jointly(rows(h), shared(s), [rows(s)], 1e-3)
    found = [apply_jointly(weights, shared(v), [rows(v)]) + b for v, b in ((s, bias), (a, 0))]
    return [np.moveaxis(v.reshape(len(x), *h.shape[2:], -1), -1, 1) * (h != 0) for v in found]


def test_residual_branches_are_learned_together():
    model, x = seeded(Residual(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))), normal(60, 6)
    mipin = fitted(model, x, 1)
    s, a = forked(model, x, lambda v: v)
    weight, bias = regress(x.numpy(), s, 1e-3)
    assert_close(mipin.source_signal(x, target=1), s @ weight.T + bias)
    assert_close(mipin.attribute(x, target=1), a @ weight.T)


@pytest.mark.parametrize("two", [False, True])
def test_residual_convolutions_are_learned_together(two):
    """Two convolutions of different kernels and the identity: one regression for each channel."""
    other = nn.Conv2d(4, 4, 1) if two else None
    model = Residual(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(100, 3), other)
    model, x = seeded(model), normal(40, 2, 5, 5)
    tables = [
        partners((5, 5), (5, 5), (k, k), (1, 1), (k // 2, k // 2), (1, 1))
        for k in ((3, 1) if two else (3,))
    ]
    s, a = forked(model, x, lambda v: np.hstack([patches(v, table) for table in tables]))
    mipin, point = fitted(model, x, 1), partners((5, 5), (5, 5), (1, 1), (1, 1), (0, 0), (1, 1))
    kernels = fit_kernel(x.numpy(), s, point, 1, 1e-3)
    assert_close(mipin.source_signal(x, target=1), apply_kernel(s, point, kernels, x.shape))
    assert_close(
        mipin.attribute(x, target=1), apply_kernel(a, point, kernels, x.shape, biases=False)
    )


def test_residual_depthwise_convolutions_have_their_own_identity():
    """Groups of one channel: nine taps and the identity are all the signals a channel has."""
    model = Residual(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Linear(100, 3))
    model, x = seeded(model), normal(40, 2, 5, 5)
    table = partners((5, 5), (5, 5), (3, 3), (1, 1), (1, 1), (1, 1))
    h = model.stem(x).relu().detach().numpy()
    above = model.act(model.branch(model.stem(x).relu()) + model.stem(x).relu()).detach().numpy()
    s = regressed(above.reshape(40, -1), model(x)[:, 1:2].detach().numpy()).reshape(above.shape) * (
        above != 0
    )
    signal = np.empty_like(h)
    for c in range(4):
        column, taps = h[:, c].reshape(-1, 1), patches(s[:, c : c + 1], table)
        weights, bias = regress_jointly(column, taps, [s[:, c].reshape(-1, 1)], 1e-3)
        signal[:, c] = (apply_jointly(weights, taps, [s[:, c].reshape(-1, 1)]) + bias).reshape(
            40, 5, 5
        )
    mipin, point = fitted(model, x, 1), partners((5, 5), (5, 5), (1, 1), (1, 1), (0, 0), (1, 1))
    signal *= h != 0
    kernels = fit_kernel(x.numpy(), signal, point, 1, 1e-3)
    assert_close(mipin.source_signal(x, target=1), apply_kernel(signal, point, kernels, x.shape))


class Terms(nn.Module):
    """Return the head of a sum over branches of h = relu(stem(x)), in a given order."""

    def __init__(self, order, **branches):
        super().__init__()
        self.stem, self.head, self.order = nn.Conv2d(2, 4, 1), nn.Linear(100, 3), order
        self.branches = nn.ModuleDict(branches)

    def forward(self, x):
        h = self.stem(x).relu()
        return self.head(
            sum(self.branches[name](h) if name else h for name in self.order).relu().flatten(1)
        )


def test_order_of_the_branches_does_not_matter():
    def branches():
        return {
            "full": nn.Conv2d(4, 4, 1),
            "deep": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU()),
        }

    orders, x = (
        (("", "full", "deep"), ("deep", "full", ""), ("full", "deep", "")),
        normal(40, 2, 5, 5),
    )
    found = [both(fitted(seeded(Terms(order, **branches())), x, 1), x[:5], 1) for order in orders]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_close(a, b, 1e-9)


class Skip(nn.Module):
    """A dense layer beside the input itself."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(x + self.layer(x)))


@pytest.mark.parametrize(
    ("plain", "layer", "x"),
    [
        (Terms(("conv", ""), conv=nn.Conv2d(4, 4, 3, padding=1)), "branches.conv", (40, 2, 5, 5)),
        (Skip(), "layer", (50, 6)),
    ],
    ids=["in a branch", "on a fork at the input"],
)
def test_weights_computed_in_the_network_are_weights_too(plain, layer, x):
    x, plain = normal(*x), seeded(plain)
    normed = copy.deepcopy(plain)
    nn.utils.parametrizations.weight_norm(normed.get_submodule(layer))
    normed.eval()
    assert_close(normed(x).detach(), plain(x).detach())
    for a, b in zip(
        both(fitted(plain, x, 1), x[:5], 1), both(fitted(normed, x, 1), x[:5], 1), strict=True
    ):
        assert_close(a, b, 1e-9)


class Sequence(nn.Module):
    """A dense layer on the average over time of two branches.

    Channels may be first or last, and so may the average.
    """

    def __init__(self, last, mean_first=True):
        super().__init__()
        self.linear, self.last, self.mean_first = nn.Linear(4, 3), last, mean_first

    def forward(self, x):
        h = x.relu() + x.tanh()
        if self.mean_first:
            return self.linear(h.mean(1 if self.last else 2))
        return self.linear(h if self.last else h.transpose(1, 2)).mean(1)


@pytest.mark.parametrize("time", [4, 7])
def test_factors_of_a_fork_are_those_of_channels_wherever_they_are(time):
    """Also where there are as many channels as places, so that a transpose keeps the shape."""
    x = normal(200, 4, time) * torch.tensor([1.0, 3.0, 0.3, 2.0]).view(4, 1)
    found = []
    for last, mean_first in itertools.product((False, True), (False, True)):
        given = x.transpose(1, 2).contiguous() if last else x
        signal = fitted(seeded(Sequence(last, mean_first)), given, 1).source_signal(
            given[:5], target=1
        )
        found.append(signal.transpose(1, 2) if last else signal)
    for signal in found[1:]:
        assert_close(signal, found[0], 1e-9)


def test_forks_can_be_summed_instead():
    model, x = seeded(Residual(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))), normal(60, 6)
    mipin, h = fitted(model, x, 1, forks="sum"), model.stem(x).relu().detach()
    above = model.act(model.branch(h) + h).detach().numpy()
    h, y = h.numpy(), model(x)[:, 1:2].detach().numpy()
    s = regressed(above, y) * (above != 0)
    assert_close(
        mipin.source_signal(x, target=1), regressed(x.numpy(), (regressed(h, s) + s) * (h != 0))
    )


def regressed(x, s, biases=True):
    weight, bias = regress(x, s, 1e-3)
    return s @ weight.T + (bias if biases else 0)


def test_branches_that_fork_at_the_input_are_learned_together():
    class Inception(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 3, padding=1)
            self.head = nn.Linear(175, 3)

        def forward(self, x):
            return self.head(torch.cat([self.narrow(x), self.wide(x)], 1).relu().flatten(1))

    model, x = seeded(Inception()), normal(40, 2, 5, 5)
    joined = torch.cat([model.narrow(x), model.wide(x)], 1).relu().detach().numpy()
    s = regressed(joined.reshape(40, -1), model(x)[:, 1:2].detach().numpy()).reshape(
        joined.shape
    ) * (joined != 0)
    design = []
    for part, kernel, padding in ((s[:, :3], (1, 1), (0, 0)), (s[:, 3:], (3, 3), (1, 1))):
        design.append(patches(part, partners((5, 5), (5, 5), kernel, (1, 1), padding, (1, 1))))
    expected = regressed(np.moveaxis(x.numpy(), 1, -1).reshape(-1, 2), np.hstack(design))
    expected = np.moveaxis(expected.reshape(40, 5, 5, 2), -1, 1)
    assert_close(fitted(model, x, 1).source_signal(x, target=1), expected)


# Pooling.


def pooled(pool, shape, seed=1, positive=False, **options):
    """Return a model that pools its input and reads all of it, its fit, and data."""
    x = normal(30, *shape, seed=seed)
    x = x.abs() if positive else x
    width = pool(x).flatten(1).shape[1]
    model = nn.Sequential(pool, nn.LeakyReLU(1.0), nn.Flatten(), nn.Linear(width, 2))
    model[3].load_state_dict(seeded(nn.Linear(width, 2)).state_dict())
    model.double().eval()
    return fitted(model, x, 1, **options), x


def axes_of(pool, x):
    sizes = x.shape[2:]
    if "Adaptive" in type(pool).__name__:
        counts = (
            pool.output_size
            if isinstance(pool.output_size, tuple)
            else [pool.output_size] * len(sizes)
        )
        return [adaptive_windows(size, count) for size, count in zip(sizes, counts, strict=True)]
    geometry = [pool.kernel_size, pool.stride, pool.padding, getattr(pool, "dilation", 1)]
    each = [
        g
        if isinstance(g, tuple) and len(g) == len(sizes)
        else (g if isinstance(g, int) else g[0],) * len(sizes)
        for g in geometry
    ]
    return [
        sliding_windows(size, *axis, ceil_mode=pool.ceil_mode)
        for size, *axis in zip(sizes, *each, strict=True)
    ]


PLAIN_MAX_POOLS = {
    nn.MaxPool1d(2): (3, 8),
    nn.MaxPool2d((2, 3)): (2, 7, 6),
    nn.MaxPool2d(2, 3): (2, 5, 8),
    nn.MaxPool3d(2): (2, 4, 4, 4),
}
MAX_POOLS = {
    **PLAIN_MAX_POOLS,
    nn.MaxPool1d(3, 2, padding=1): (3, 8),
    nn.MaxPool2d(2, ceil_mode=True): (2, 5, 5),
    nn.MaxPool2d(2, padding=1): (2, 6, 6),
    nn.MaxPool2d(3, 1): (2, 5, 6),
    nn.MaxPool2d(3, 2, padding=1, ceil_mode=True): (2, 6, 7),
    nn.MaxPool2d(2, 1, dilation=2): (2, 5, 5),
    nn.MaxPool3d((2, 3, 2), (1, 2, 2), padding=(0, 1, 0)): (1, 4, 5, 4),
    nn.AdaptiveMaxPool1d(3): (2, 7),
    nn.AdaptiveMaxPool2d((2, 3)): (2, 4, 6),
    nn.AdaptiveMaxPool2d((3, 2)): (2, 5, 5),
    nn.AdaptiveMaxPool3d((2, 1, 3)): (1, 3, 4, 4),
}


@pytest.mark.parametrize("pool", MAX_POOLS, ids=str)
def test_max_pooling_sends_the_signal_to_its_switches(pool):
    mipin, x = pooled(pool, MAX_POOLS[pool])
    axes = axes_of(pool, x)
    disjoint = all(len(set(itertools.chain(*axis))) == sum(map(len, axis)) for axis in axes)
    for local, biases in itertools.product((True, False), (True, False)):
        s = at(pool, mipin, x, 1, biases=biases, local=local)
        actual = both(mipin, x, 1, local=local)[0 if biases else 1]
        assert_close(actual, max_unpool(s, x.numpy(), axes, local), 1e-12)
        if local and disjoint and pool in PLAIN_MAX_POOLS:
            unpool = getattr(F, f"max_unpool{x.ndim - 2}d")
            geometry = {
                "kernel_size": pool.kernel_size,
                "stride": pool.stride,
                "output_size": x.shape,
            }
            assert torch.equal(
                actual, unpool(torch.as_tensor(s), with_indices(pool)(x)[1], **geometry)
            )


def with_indices(pool):
    return type(pool)(pool.kernel_size, pool.stride, return_indices=True)


def average_back(s, x, axes, divisor=None, even=False):
    """Share the S of each window among its elements that have the sign of its average.

    Elements of several windows take the mean of these, weighted by 1 / divisor.
    """
    total, weights = np.zeros(x.shape), np.zeros(x.shape)
    for output, inputs in window_table(axes):
        weight = 1 / (divisor or len(inputs))
        sign = np.sign(sum(x[(..., *i)] for i in inputs))
        origin = {
            i: np.ones(x.shape[:2]) if even else np.maximum(sign * x[(..., *i)], 0) for i in inputs
        }
        mean = weight * sum(origin.values())
        for i in inputs:
            share = np.divide(origin[i], mean, out=np.zeros(mean.shape), where=mean > 0)
            total[(..., *i)] += weight * s[(..., *output)] * share
            weights[(..., *i)] += weight
    return np.divide(total, weights, out=np.zeros(x.shape), where=weights > 0)


AVERAGE_POOLS = [
    (nn.AvgPool1d(3, 1), (3, 6), None, "shares"),
    (nn.AvgPool2d(2), (2, 5, 6), None, "shares"),
    (nn.AvgPool2d((3, 2), (2, 1)), (2, 7, 5), None, "shares"),
    (nn.AvgPool2d((3, 2), (2, 1)), (2, 7, 5), None, "even"),
    (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), (2, 6, 6), None, "shares"),
    (nn.AvgPool2d(3, 2, padding=1), (2, 7, 7), 9, "shares"),
    (nn.AvgPool2d(2, ceil_mode=True), (2, 5, 5), None, "shares"),
    (nn.AvgPool3d(2), (2, 4, 4, 5), None, "shares"),
    (nn.AdaptiveAvgPool1d(3), (2, 6), None, "shares"),
    (nn.AdaptiveAvgPool2d((3, 2)), (2, 5, 5), None, "shares"),
    (nn.AdaptiveAvgPool2d((3, 2)), (2, 5, 5), None, "even"),
    (nn.AdaptiveAvgPool2d(1), (5, 3, 4), None, "shares"),
    (nn.AdaptiveAvgPool3d((2, 1, 2)), (2, 3, 4, 4), None, "shares"),
]


@pytest.mark.parametrize(
    ("pool", "shape", "divisor", "pooling"),
    AVERAGE_POOLS,
    ids=[f"{pool} {pooling}" for pool, *_, pooling in AVERAGE_POOLS],
)
def test_average_pooling_sends_the_signal_by_shares_or_evenly(pool, shape, divisor, pooling):
    mipin, x = pooled(pool, shape, pooling=pooling)
    for local, biases in ((True, True), (True, False), (False, True)):
        s = at(pool, mipin, x, 1, biases=biases, local=local)
        expected = average_back(
            s, x.numpy(), axes_of(pool, x), divisor, even=pooling == "even" or not local
        )
        assert_close(both(mipin, x, 1, local=local)[0 if biases else 1], expected, 1e-12)


GLOBAL_POOLS = {
    "module": nn.AdaptiveAvgPool2d(1),
    "window": nn.AvgPool2d((3, 4)),
    "functional": Function(lambda x: F.adaptive_avg_pool2d(x, 1)),
    "mean": Function(lambda x: x.mean([2, 3])),
    "mean of flat": Function(lambda x: x.flatten(2).mean(-1)),
    "means": Function(lambda x: x.mean(3, keepdim=True).mean(2, keepdim=True)),
}


@pytest.mark.parametrize("name", GLOBAL_POOLS)
def test_shares_of_the_true_average_return_what_was_averaged(name):
    mipin, x = pooled(GLOBAL_POOLS[name], (1, 3, 4), positive=True, ridge=0)
    assert_close(mipin.source_signal(x, target=1), x, 1e-11)


@pytest.mark.parametrize("pooling", ["shares", "even"])
def test_global_average_by_channel(pooling):
    pool = Function(lambda x: x.mean([2, 3]))
    mipin, x = pooled(pool, (4, 3, 4), positive=True, pooling=pooling)
    s = torch.as_tensor(at(pool, mipin, x, 1)).reshape(30, 4, 1, 1)
    shares = x / x.mean((2, 3), keepdim=True) if pooling == "shares" else torch.ones_like(x)
    assert_close(mipin.source_signal(x, target=1), s * shares, 1e-11)


SPELLED_HEADS = {
    "module": lambda h, linear: linear(nn.AdaptiveAvgPool2d(1)(h).flatten(1)),
    "dropout": lambda h, linear: linear(F.dropout(h.mean([2, 3]), training=False)),
    "kept": lambda h, linear: linear(h.mean((-2, -1), keepdim=True).squeeze(-1).squeeze(-1)),
    "of flat": lambda h, linear: linear(h.flatten(2).mean(-1)),
    "window": lambda h, linear: linear(F.avg_pool2d(h, h.shape[2:]).flatten(1)),
    "steps": lambda h, linear: linear(
        F.avg_pool2d(h.mean(2, keepdim=True), (1, h.shape[3])).flatten(1)
    ),
    "one by one": lambda h, linear: linear(h.mean(2).mean(2)),
    "one by one, last": lambda h, linear: linear(h.permute(0, 2, 3, 1).mean(1).mean(1)),
    "last": lambda h, linear: linear(h.permute(0, 2, 3, 1).mean((1, 2))),
    "convolution": lambda h, linear: F.conv2d(h, linear.weight[:, :, None, None], linear.bias).mean(
        (2, 3)
    ),
    "map": lambda h, linear: F.adaptive_avg_pool2d(
        linear(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 1
    ).flatten(1),
}


class Pooled(nn.Module):
    """A convolution, ReLU, and a dense layer on averages over all places, spelled in one way."""

    def __init__(self, spelling, relu=True):
        super().__init__()
        self.conv, self.act, self.linear = (
            nn.Conv2d(2, 5, 3),
            nn.ReLU() if relu else nn.LeakyReLU(1.0),
            nn.Linear(5, 3),
        )
        self.spelling = spelling

    def forward(self, x):
        return SPELLED_HEADS[self.spelling](self.act(self.conv(x)), self.linear)


@pytest.mark.parametrize("spelling", SPELLED_HEADS)
@pytest.mark.parametrize("pooling", ["shares", "even"])
def test_a_dense_layer_before_the_average_is_the_same_as_behind_it(spelling, pooling):
    """W mean(x) = mean(W x): the average may come first or last, the map is the same."""
    x, expected, found = (
        normal(40, 2, 7, 6),
        seeded(Pooled("convolution")),
        seeded(Pooled(spelling)),
    )
    assert_close(found(x).detach(), expected(x).detach())
    one, other = (fitted(model, x, targets=[0, 2], pooling=pooling) for model in (expected, found))
    targets = [0, 2, 2, 0, 2]
    for local in (True, False):
        for a, b in zip(
            both(one, x[:5], targets, local=local),
            both(other, x[:5], targets, local=local),
            strict=True,
        ):
            assert_close(a, b, 1e-10)
    assert_close(one.class_attribution(2), other.class_attribution(2), 1e-10)
    assert_close(at(expected.act, one, x, 2), at(found.act, other, x, 2), 1e-10)


@pytest.mark.parametrize("relu", [True, False])
def test_a_pooled_logit_goes_where_it_came_from_by_hand(relu):
    model, x = seeded(Pooled("module", relu)), normal(40, 2, 7, 6)
    with torch.no_grad():
        model.linear.bias -= model(x).mean(0)  # logits of both signs
    mipin, h = fitted(model, x, 1), model.act(model.conv(x)).detach().numpy()
    w, b = model.linear.weight[1].detach().numpy(), model.linear.bias[1].item()
    evidence = np.einsum("nchw,c->nhw", h, w) + b
    logit = evidence.mean(axis=(1, 2), keepdims=True)
    assert_close(logit.ravel(), model(x)[:, 1].detach())
    assert (logit > 0).any()
    assert (logit < 0).any()
    agreeing = np.maximum(evidence * np.sign(logit), 0)
    s = logit * agreeing / agreeing.mean(axis=(1, 2), keepdims=True)
    weight, bias = regress(np.moveaxis(h, 1, -1).reshape(-1, 5), s.reshape(-1, 1), 1e-3)
    expected = np.moveaxis(s[..., None] * weight[:, 0] + bias, -1, 1) * (h != 0)
    assert_close(at(model.act, mipin, x, 1), expected)


def test_an_inverse_from_places_is_that_of_their_average():
    """At the averages themselves the same coefficients hold: averaging is linear."""
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.LeakyReLU(1.0), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5,
        3)
    )  # fmt: skip
    x = normal(40, 2, 7, 6)
    mipin = fitted(seeded(model), x, 1)
    assert_close(
        at(model[2], mipin, x, 1), at(model[1], mipin, x, 1).mean(axis=(2, 3), keepdims=True)
    )


def test_windows_of_zeros_receive_nothing():
    model = cnn(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(2))
    x = normal(40, 2, 8, 8)
    mipin, features = fitted(model, x, 1), model[:2](x).detach().numpy()
    averages = model[:3](x)
    assert (averages == 0).any()
    s = at(model[2], mipin, x, 1)
    expected = average_back(s, features, axes_of(model[2], torch.as_tensor(features)))
    assert_close(at(model[1], mipin, x, 1), expected, 1e-12)
    assert mipin.source_signal(x, target=1).isfinite().all()


# Convolutions of every kind.

CONVOLUTIONS = [
    (nn.Conv1d(2, 3, 3, 2, 1), (9,)),
    (nn.Conv1d(2, 4, 2, dilation=2, groups=2), (8,)),
    (nn.Conv3d(1, 2, (2, 3, 1), (1, 2, 1), (0, 1, 0)), (3, 5, 2)),
    (nn.ConvTranspose1d(3, 2, 3, 2, 1, output_padding=1), (5,)),
    (nn.ConvTranspose1d(2, 2, 2, groups=2, dilation=2), (5,)),
    (nn.ConvTranspose2d(2, 4, (2, 3), (2, 1), (0, 1), groups=2), (3, 4)),
    (nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, dilation=2), (3, 4)),
    (nn.ConvTranspose3d(2, 2, 2, 2), (2, 2, 3)),
]


@pytest.mark.parametrize(
    ("conv", "size"), CONVOLUTIONS, ids=[f"{conv}" for conv, _ in CONVOLUTIONS]
)
def test_convolution_equals_its_normal_equations(conv, size):
    x = normal(40, conv.in_channels, *size)
    seeded(conv)
    width = conv(x).flatten(1).shape[1]
    model = seeded(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(width, 2)))
    mipin = fitted(model, x, 1)
    s, a = (at(model[1], mipin, x, 1, biases=biases) for biases in (True, False))
    table = partners(
        size,
        s.shape[2:],
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        transposed=conv.transposed,
    )
    kernels = fit_kernel(x.numpy(), s, table, conv.groups, 1e-3)
    source, attribution = both(mipin, x, 1)
    assert_close(source, apply_kernel(s, table, kernels, x.shape))
    assert_close(attribution, apply_kernel(a, table, kernels, x.shape, biases=False))


def test_moments_in_double_bring_a_float32_fit_to_that_in_float64():
    """Kernel, bias and joint fork in float32, with products in either dtype, against float64."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head(torch.relu(x + self.one(x)).mean((2, 3)))

    torch.manual_seed(0)
    model = Residual().eval()
    x = torch.randn(60, 2, 8, 8) + 4
    wide = copy.deepcopy(model).double()
    expected = (
        InverseNetwork(wide, ridge=1e-8)
        .fit(x.double(), 0, progress=False)
        .source_signal(x.double(), 0)
    )
    errors = []
    for precision in ("model", "double"):
        found = (
            InverseNetwork(model, ridge=1e-8, precision=precision)
            .fit(x, 0, progress=False)
            .source_signal(x, 0)
        )
        assert found.dtype == torch.float32
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[1] < 1e-5
    assert errors[1] <= errors[0] < 1e-3
