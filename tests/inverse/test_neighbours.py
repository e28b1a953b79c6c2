"""Neighbourhood fits, against algorithm 1 on the neighbours and against the fit on all data."""

import copy
import pickle
import threading
from functools import cache
from importlib.metadata import version
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracle import Oracle, from_torch
from small import Function, normal
from torch import nn

from captum_mipin import (
    InverseNetwork,
    LayerMIPINAttribution,
    MIPINAttribution,
    NeighbourInverse,
    errors,
)
from captum_mipin.inverse import neighbours
from captum_mipin.inverse.examples import Examples
from captum_mipin.storage import files

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TARGETS = [2, 0, 1, 2, 2]


# Networks are built once, and not changed, so that their graphs are captured once.


@cache
def head(*widths):
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double().eval()


@cache
def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(20, 3)
    ).double().eval()  # fmt: skip


@cache
def pooled():
    """A batch norm, and a dense layer behind an average over all places."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(), nn.Linear(5, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        model(normal(40, 2, 6, 6, seed=1, dtype=torch.float64))
    return model.eval()


@cache
def tiles():
    """A patch embedding, whose inverse is that of a dense layer."""
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Conv2d(2, 5, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
        .double()
        .eval()
    )


@cache
def residual():
    """Forks, batch norms and average pooling."""
    torch.manual_seed(0)

    def run(m, x):
        x = torch.relu(m["norm"](m["first"](x)))
        x = torch.relu(x + m["second"](torch.relu(m["third"](x))))
        return m["last"](x.mean((2, 3)))

    layers = {
        "first": nn.Conv2d(2, 4, 3, padding=1), "norm": nn.BatchNorm2d(4),
        "second": nn.Conv2d(4, 4, 3, padding=1),
        "third": nn.Conv2d(4, 4, 3, padding=1), "last": nn.Linear(4, 3),
    }  # fmt: skip
    return Function(run, **layers).double().eval()


#: The head with fewer rows than signals, and with more.
NETWORKS = {
    "wide": (lambda: head(12, 40, 30, 3), (12,)), "narrow": (lambda: head(12, 7, 5, 3), (12,)),
    "convolutions": (convolutions, (2, 6, 6)), "tiles": (tiles, (2, 6, 6)),
    "residual": (residual, (2, 6, 6)),
}  # fmt: skip


def data(*shape, rows=50, dtype=torch.float64):
    """Return examples to fit on and others to explain."""
    return normal(rows, *shape, dtype=dtype), normal(5, *shape, seed=1, dtype=dtype)


def close(found, expected, tolerance=1e-9):
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def nearest(features, of, count, metric):
    """Return the nearest examples by the definition, one pair at a time."""
    distances = np.empty((len(of), len(features)))
    for i, q in enumerate(np.asarray(of).reshape(len(of), -1)):
        for j, x in enumerate(np.asarray(features).reshape(len(features), -1)):
            cosine = (q * x).sum() / np.sqrt((q * q).sum() * (x * x).sum())
            distances[i, j] = 1 - cosine if metric == "cosine" else np.sqrt(((q - x) ** 2).sum())
    return np.argsort(distances, axis=1)[:, :count]


def fitted(network, **options):
    build, shape = NETWORKS[network]
    model, (x, q) = build(), data(*shape)
    return model, NeighbourInverse(model, **options).fit(x, progress=False), x, q


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("network", ["wide", "narrow", "convolutions", "tiles"])
def test_each_example_has_algorithm_1_on_its_neighbours(network, metric):
    model, inverse, x, q = fitted(network, neighbours=12, metric=metric)
    signal = inverse.source_signal(q, TARGETS)
    attribution, delta = MIPINAttribution(model, inverse).attribute(
        q, TARGETS, return_convergence_delta=True
    )
    unmasked = inverse.source_signal(q, TARGETS, local=False)
    for i, (rows, target) in enumerate(zip(nearest(x, q, 12, metric), TARGETS, strict=True)):
        oracle = Oracle(from_torch(model)).fit(x[rows].numpy(), target)
        own = q[i : i + 1].numpy()
        close(signal[i : i + 1], oracle.signals(own, target)[0])
        close(attribution[i : i + 1], oracle.signals(own, target, biases=False)[0])
        close(unmasked[i : i + 1], oracle.signals(own, target, local=False)[0])
    index = torch.arange(5), torch.tensor(TARGETS)
    with torch.no_grad():
        close(delta, model(signal)[index] - model(q)[index])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "options", [{}, {"ridge": 0.0}, {"ridge": 0.3, "ridge_scale": "mean"}, {"precision": "double"}]
)
def test_with_all_examples_as_neighbours_it_is_the_global_fit(network, options):
    model, inverse, x, q = fitted(network, neighbours=50, **options)
    everywhere = InverseNetwork(model, **options).fit(x, progress=False)
    tolerance = 1e-6 if options.get("ridge") == 0 else 1e-9
    for bias in (True, False):
        (found,), (expected,) = (
            i.explain((q,), TARGETS, biases=(bias,)).signals[0] for i in (inverse, everywhere)
        )
        close(found, expected, tolerance)


def test_at_a_layer_and_above_it():
    """In either case, neighbours are compared where the inverse stops."""
    model, (x, q) = convolutions(), data(2, 6, 6)
    inverse = NeighbourInverse(model, layer=model[1], neighbours=12).fit(x, progress=False)
    with torch.no_grad():
        features, own = model[:2](x), model[:2](q)
    for layer in (model[1], model[4]):
        found = LayerMIPINAttribution(model, inverse, layer).attribute(q, TARGETS)
        for i, (rows, target) in enumerate(
            zip(nearest(features, own, 12, "cosine"), TARGETS, strict=True)
        ):
            known = InverseNetwork(model, layer=layer).fit(x[rows], target, progress=False)
            close(
                found[i : i + 1],
                LayerMIPINAttribution(model, known).attribute(q[i : i + 1], target),
            )
    with pytest.raises(
        errors.NotFittedError, match=r"stops at layer '1', it does not reach the input"
    ):
        inverse.source_signal(q, 0)
    inverse = NeighbourInverse(model, layer=model[4], neighbours=12).fit(x, progress=False)
    with pytest.raises(
        errors.NotFittedError, match=r"stops at layer '\d', and did not learn 3/conv2d"
    ):
        LayerMIPINAttribution(model, inverse, model[1]).attribute(q, 0)


@pytest.mark.parametrize("layer", [0, 1, 3, 8])
def test_with_all_examples_as_neighbours_it_is_the_global_fit_at_any_layer(layer):
    """At a scale that is learned, below a pooled head, and at the output itself."""
    model = pooled()
    x = normal(40, 2, 6, 6, dtype=torch.float64)
    own = NeighbourInverse(model, layer=model[layer], neighbours=40).fit(x, progress=False)
    known = InverseNetwork(model, layer=model[layer]).fit(x, progress=False)
    for s in ("attribute", "source_signal"):
        found, expected = (
            getattr(LayerMIPINAttribution(model, i), s)(x[:5], TARGETS) for i in (own, known)
        )
        close(found, expected)
        assert found.any()


def test_neighbours_by_the_output():
    model, x = pooled(), normal(40, 2, 6, 6, dtype=torch.float64)
    inverse = NeighbourInverse(model, layer=model[4], neighbours=12, feature=model[8]).fit(
        x, progress=False
    )
    found = LayerMIPINAttribution(model, inverse).attribute(x[:1], 1)
    with torch.no_grad():
        rows = nearest(model(x), model(x[:1]), 12, "cosine")[0]
    known = InverseNetwork(model, layer=model[4]).fit(x[rows], 1, progress=False)
    close(found, LayerMIPINAttribution(model, known).attribute(x[:1], 1))


def test_neighbours_by_another_feature():
    model, (x, q) = head(12, 40, 30, 3), data(12)
    with torch.no_grad():
        kinds = [
            ("input", x, q, None),
            (model[1], model[:2](x), model[:2](q), None),
            ("input", x, q, model[1]),
        ]
    for feature, features, own, layer in kinds:
        inverse = NeighbourInverse(model, layer=layer, feature=feature, neighbours=9).fit(
            x, progress=False
        )
        found = inverse.explain((q,), TARGETS, layer=layer).signals[0][0]
        for i, (rows, target) in enumerate(
            zip(nearest(features, own, 9, "cosine"), TARGETS, strict=True)
        ):
            known = InverseNetwork(model, layer=layer).fit(x[rows], target, progress=False)
            close(
                found[i : i + 1], known.explain((q[i : i + 1],), target, layer=layer).signals[0][0]
            )


def test_far_from_zero_and_beside_zeros_neighbours_are_found():
    """Features far from 0 lose no digits, and a feature of zeros, without direction, is no NaN."""
    x, q = data(12, rows=40, dtype=torch.float32)
    kept = Examples([x + 1000], {}, [])
    found = kept.nearest([q + 1000], 5, "euclidean")
    assert [set(rows) for rows in found.tolist()] == [
        set(rows) for rows in nearest(x, q, 5, "euclidean").tolist()
    ]
    x[3] = 0
    found = Examples([x], {}, []).nearest([q], 30, "cosine")
    cosine = torch.nn.functional.cosine_similarity(q.unsqueeze(1), x.unsqueeze(0), 2)
    assert torch.equal(found.sort(1).values, cosine.topk(30, 1).indices.sort(1).values)


def test_several_inputs_are_searched_together():
    model = Function(lambda m, a, b: m["last"](torch.relu(m["a"](a) + m["b"](b))),
                     a=nn.Linear(3, 8), b=nn.Linear(4, 8),
                     last=nn.Linear(8, 3)).double().eval()  # fmt: skip
    x, q = (tuple(t[:, s] for s in (slice(3), slice(3, None))) for t in data(7))
    inverse = NeighbourInverse(model, neighbours=11).fit(x, progress=False)
    found = inverse.source_signal(q, TARGETS)
    for i, (rows, target) in enumerate(
        zip(nearest(*(torch.cat(t, 1) for t in (x, q)), 11, "cosine"), TARGETS, strict=True)
    ):
        known = InverseNetwork(model).fit(tuple(t[rows] for t in x), target, progress=False)
        for a, b in zip(
            found, known.source_signal(tuple(t[i : i + 1] for t in q), target), strict=True
        ):
            close(a[i : i + 1], b)


def test_examples_do_not_depend_on_their_company(monkeypatch):
    _, inverse, _, q = fitted("convolutions", neighbours=12)
    whole = inverse.explain((q,), TARGETS, biases=(True, False))
    close(
        torch.cat([inverse.source_signal(q[i : i + 1], t) for i, t in enumerate(TARGETS)]),
        whole.signals[0][0],
        1e-12,
    )
    monkeypatch.setattr(neighbours, "_TOGETHER", 1)
    apart = inverse.explain((q,), TARGETS, biases=(True, False))
    for a, b in zip(
        (*apart.signals, apart.features, apart.output),
        (*whole.signals, whole.features, whole.output),
        strict=True,
    ):
        close(a[0] if isinstance(a, tuple) else a, b[0] if isinstance(b, tuple) else b, 1e-12)


def test_single_precision():
    model, found, x, q = fitted("wide", neighbours=12)
    found, model = found.source_signal(q, TARGETS), copy.deepcopy(model).float()
    single = (
        NeighbourInverse(model, neighbours=12)
        .fit(x.float(), progress=False)
        .source_signal(q.float(), TARGETS)
    )
    assert single.dtype == torch.float32
    close(single, found, 1e-4)
    half = NeighbourInverse(model.bfloat16(), neighbours=12).fit(x.bfloat16(), progress=False)
    halved = half.source_signal(q.bfloat16(), TARGETS)
    assert halved.dtype == torch.bfloat16
    close(halved, found, 0.1)


def test_copies_pickles_and_files_explain_alike(tmp_path):
    build, shape = NETWORKS["convolutions"]
    model, (x, q) = build(), data(*shape)
    layer = model[2]
    inverse = NeighbourInverse(
        model, layer=layer, feature=model[4], neighbours=9, metric="euclidean", ridge=0.1
    )
    inverse.fit(x, [0, 2], progress=False)

    def signal(of):
        return of.explain((q,), [0, 2, 0, 2, 2], layer=of.layer).signals[0][0]

    expected = signal(inverse)
    inverse.save(tmp_path / "f")
    for other in (
        copy.deepcopy(inverse),
        pickle.loads(pickle.dumps(inverse)),
        NeighbourInverse.load(tmp_path / "f", model),
    ):
        assert torch.equal(signal(other), expected)
        assert (other.targets, other.neighbours, other.metric) == ([0, 2], 9, "euclidean")
        with pytest.raises(errors.NotFittedError, match=r"target 1; fitted are \[0, 2\]"):
            other.explain((q,), 1, layer=other.layer)
    tensors, content = files.load(tmp_path / "f")
    files.save(tmp_path / "g", dict(list(tensors.items())[1:]), content)
    with pytest.raises(errors.InverseFileError, match="tensors, expected"):
        NeighbourInverse.load(tmp_path / "g", model)
    with pytest.raises(errors.ModelChangedError, match="another model"):
        NeighbourInverse.load(tmp_path / "f", copy.deepcopy(model).float())
    with pytest.raises(errors.InverseFileError):
        InverseNetwork.load(tmp_path / "f", model)
    InverseNetwork(model).fit(x, 0, progress=False).save(tmp_path / "g")
    with pytest.raises(errors.InverseFileError):
        NeighbourInverse.load(tmp_path / "g", model)


def test_nothing_is_touched_and_threads_agree(untouched):
    model, (x, q) = residual(), data(2, 6, 6)
    with untouched(model, x, q):
        inverse = NeighbourInverse(model, neighbours=9).fit(x, progress=False)
        expected = inverse.source_signal(q, TARGETS)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(inverse.source_signal(q, TARGETS)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)
    with untouched(model, q), pytest.raises(errors.TargetError):
        inverse.source_signal(q, [0, 1])


def test_what_is_kept_is_a_copy():
    _, inverse, x, q = fitted("wide", neighbours=9)
    expected = inverse.source_signal(q, 0)
    x.zero_()
    assert torch.equal(inverse.source_signal(q, 0), expected)


def test_options_out_of_range_are_refused():
    model, (x, q) = head(12, 7, 5, 3), data(12)
    for count in (1, 0, -3, 2.5, True, "all"):
        with pytest.raises(errors.InputError, match="must be a whole number of at least 2"):
            NeighbourInverse(model, neighbours=count)
    with pytest.raises(errors.InputError, match="'cosine', 'euclidean'"):
        NeighbourInverse(model, metric="manhattan")
    with pytest.raises(errors.InputError, match="layer is 'logits', expected a module"):
        NeighbourInverse(model, feature="logits")
    with pytest.raises(errors.InputError, match="ridge=-1"):
        NeighbourInverse(model, ridge=-1)
    with pytest.raises(errors.NotFittedError, match="call fit"):
        NeighbourInverse(model).source_signal(q, 0)
    inverse = NeighbourInverse(model, neighbours=51)
    with pytest.raises(errors.FitError, match="50 examples, fewer than neighbours=51"):
        inverse.fit(x, progress=False)
    assert inverse.targets == []
    inverse.neighbours = np.int64(50)
    inverse.fit(x, progress=False).source_signal(q, 0)
    inverse.neighbours = 51
    with pytest.raises(errors.InputError, match="more than the 50 examples"):
        inverse.source_signal(q, 0)
    for options in (
        {"checkpoint": "here"},
        {"distributed": True},
        {"lazy": True},
        {"keep": "here"},
    ):
        with pytest.raises(
            errors.InputError, match=rf"has no option {next(iter(options))}: it makes one pass"
        ):
            inverse.fit(x, progress=False, **options)


def test_calls_that_cannot_be_answered_are_refused():
    model, inverse, x, q = fitted("narrow", neighbours=9)
    model, inverse = copy.deepcopy((model, inverse))
    for ask in (inverse.class_attribution, inverse.information):
        with pytest.raises(
            errors.NotFittedError, match="none for a whole class: fit an InverseNetwork"
        ):
            ask(0)
    with pytest.raises(errors.TargetRangeError):
        inverse.source_signal(q, 3)
    with pytest.raises(errors.InputError, match="NaN"):
        inverse.source_signal(q * torch.nan, 0)
    with pytest.raises(errors.CaptureError, match="fitted on"):
        inverse.source_signal(q[:, :11], 0)
    model.append(nn.Dropout())
    with pytest.raises(errors.TrainingModeError):
        inverse.fit(x, progress=False)
    model.eval()
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    for changed in ("refuse", "ignore"):
        inverse.changed = changed
        with pytest.raises(errors.ModelChangedError, match="fit a new NeighbourInverse"):
            inverse.source_signal(q, 0)


def test_data_that_cannot_be_kept_is_refused():
    model, inverse, x, q = fitted("narrow", neighbours=9)
    expected = inverse.source_signal(q, 0)
    with pytest.raises(
        errors.FitError, match="more than memory=100: choose a layer= closer to the output"
    ):
        inverse.fit(x, memory=100, progress=False)
    with pytest.raises(errors.FitError, match="batch 1: input 0 contains NaN"):
        inverse.fit([x, x * torch.nan], progress=False)
    with pytest.raises(errors.FitError, match="no batch"):
        inverse.fit([], progress=False)
    with pytest.raises(errors.TargetRangeError):
        inverse.fit(x, 5, progress=False)
    assert torch.equal(inverse.source_signal(q, 0), expected)
    same = NeighbourInverse(model, neighbours=9).fit(x[:1].repeat(20, 1), progress=False)
    with pytest.raises(errors.FitError, match="for each of the 9 neighbours"):
        same.source_signal(q, 0)


def test_features_that_cannot_be_compared_are_refused():
    model = Function(lambda m, x: m["last"](torch.relu(m["embedding"](x)).mean(1)),
                     embedding=nn.Embedding(20, 6), last=nn.Linear(6, 3)).eval()  # fmt: skip
    words = torch.randint(20, (30, 4))
    options = {"layer": model.layers["embedding"], "neighbours": 9}
    with pytest.raises(
        errors.CaptureError,
        match=r"input inputs_0/input, of dtype torch.int64 .* pass another feature=",
    ):
        NeighbourInverse(model, feature="input", **options).fit(words, progress=False)
    with pytest.raises(errors.InputError, match="a Linear, expected a module of the Function"):
        NeighbourInverse(model, feature=nn.Linear(1, 1), **options)
    inverse = NeighbourInverse(model, **options).fit(words, progress=False)
    assert LayerMIPINAttribution(model, inverse).attribute(words[:2], 0).shape == (2, 4, 6)


def test_a_way_around_the_layer_is_refused():
    around = Function(lambda m,
    x: m["last"](torch.relu(m["first"](x)) * torch.sigmoid(m["gate"](x))),
                      first=nn.Linear(6, 8), gate=nn.Linear(6, 8),
                      last=nn.Linear(8, 3)).eval()  # fmt: skip
    x = normal(20, 6)
    with pytest.raises(
        errors.CaptureError,
        match=r"layers.gate/linear takes input inputs_0 on a path that bypasses the layer",
    ):
        NeighbourInverse(around, layer=around.layers["first"], neighbours=5).fit(x, progress=False)
    scaled = Function(lambda m, x, scale: m["last"](torch.relu(m["first"](x)) * scale),
                      first=nn.Linear(6, 8), last=nn.Linear(8, 3)).eval()  # fmt: skip
    with pytest.raises(errors.CaptureError, match="on a path that bypasses the layer"):
        NeighbourInverse(scaled, neighbours=5).fit(
            [(x, torch.rand(20, 8))], unpack=lambda batch: (batch[0], batch[1]), progress=False
        )


def test_further_arguments_below_the_layer():
    """Further arguments belong to the explained examples, and need not be kept."""
    model = Function(lambda m, x, scale: m["last"](torch.relu(m["first"](x * scale))),
                     first=nn.Linear(6, 8), last=nn.Linear(8, 3)).double().eval()  # fmt: skip
    (x, q), (scale, own) = data(6), (1 + t.abs() for t in data(6))
    layer = model.layers["first"]
    inverse = NeighbourInverse(model, layer=layer, neighbours=7)
    inverse.fit([(x, scale)], unpack=lambda batch: (batch[0], batch[1]), progress=False)
    with torch.no_grad():
        rows = nearest(layer(x * scale), layer(q * own), 7, "cosine")
    found = LayerMIPINAttribution(model, inverse).attribute(q, TARGETS, own)
    for i, target in enumerate(TARGETS):
        known = InverseNetwork(model, layer=layer)
        known.fit(
            [(x[rows[i]], scale[rows[i]])],
            target,
            unpack=lambda batch: (batch[0], batch[1]),
            progress=False,
        )
        close(
            found[i : i + 1],
            LayerMIPINAttribution(model, known).attribute(q[i : i + 1], target, own[i : i + 1]),
        )


@needs_cuda
def test_on_a_gpu_as_on_the_cpu():
    model, inverse, x, q = fitted("convolutions", neighbours=12)
    expected = inverse.source_signal(q, TARGETS)
    there = NeighbourInverse(copy.deepcopy(model).cuda(), neighbours=12).fit(x, progress=False)
    close(there.source_signal(q.cuda(), TARGETS).cpu(), expected)
    assert all(t.is_cuda for t in there._fitted().kept.tensors)
    close(there.to("cpu").source_signal(q.cuda(), TARGETS).cpu(), expected)


def test_changed_weights_are_refused_without_a_choice():
    model = copy.deepcopy(head(12, 7, 5, 3))
    x, q = data(12)
    with pytest.raises(TypeError, match="changed"):
        NeighbourInverse(model, neighbours=10, changed="ignore")
    inverse = NeighbourInverse(model, neighbours=10).fit(x, progress=False)
    with torch.no_grad():
        model[0].weight *= 2
    for call in (lambda: inverse.source_signal(q, 1), lambda: inverse.fit(x, progress=False)):
        with pytest.raises(errors.ModelChangedError, match="fit a new NeighbourInverse"):
            call()


@pytest.mark.parametrize(
    "change",
    [
        lambda t, c: t.update({"0": t["1"], "1": t["0"]}), lambda t, c: t.update({"1": t["2"],
        "2": t["1"]}),
        lambda t, c: t.update({"0": t["0"].sum()}), lambda t, c: t.update({"1": t["1"].flatten()}),
        lambda t, c: t.update({"2": t["2"][:1]}), lambda t,
        c: t.update({"1": t["1"].to(torch.complex64)}),
        lambda t, c: t.update({"2": t["2"] * float("nan")}), lambda t,
        c: t.update({"1": t["1"] > 0}),
        lambda t, c: t.update({name: tensor[:0] for name, tensor in t.items()}), lambda t,
        c: t.pop("1"),
        lambda t, c: c["settings"].update(ridge=".."), lambda t,
        c: c["settings"].update(ridge_scale=[0]),
        lambda t, c: c["settings"].update(ridge=-1), lambda t,
        c: c["neighbours"].update(metric=None),
        lambda t, c: c["neighbours"].update(count={}), lambda t,
        c: c["neighbours"].update(outputs=[["0/linear", 2]]),
    ],
)  # fmt: skip
def test_files_that_say_what_no_data_says_are_refused(tmp_path, change):
    model, (x, q) = head(12, 7, 5, 3), data(12)
    NeighbourInverse(model, neighbours=10).fit(x, progress=False).save(tmp_path / "file")
    tensors, content = files.load(tmp_path / "file")
    change(tensors, content)
    old = version("safetensors").startswith("0.5.")
    if old and any(tensor.is_complex() for tensor in tensors.values()):
        pytest.skip("safetensors 0.5 writes no complex tensors")
    files.save(tmp_path / "file", tensors, content)
    with pytest.raises((errors.InverseFileError, errors.InputError, errors.NotFittedError)):
        NeighbourInverse.load(tmp_path / "file", model).source_signal(q, 1)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_features_too_large_to_be_compared_are_refused(metric):
    kept = Examples([1e20 * torch.randn(9, 4)], {}, [])
    with pytest.raises(
        errors.InputError, match=r"too large for torch.float32: their squares overflow"
    ):
        kept.nearest([torch.ones(1, 4)], 3, metric)


def test_a_file_says_what_made_it_as_others_do(tmp_path):
    model = nn.Linear(3, 2).eval()
    x = torch.randn(9, 3)
    for name, inverse in (
        ("a", InverseNetwork(model)),
        ("b", NeighbourInverse(model, neighbours=5)),
    ):
        inverse.fit(x, progress=False).save(tmp_path / name)
    one, other = (files.load(tmp_path / name)[1] for name in "ab")
    alike = [name for name in one if one[name] == other.get(name)]
    assert {
        "version",
        "model",
        "rules",
        "fingerprint",
        "layer",
        "output",
        "signature",
        "inputs",
        "dims",
    } <= set(alike)
