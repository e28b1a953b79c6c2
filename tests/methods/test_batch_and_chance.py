"""Operations that mix the examples of a batch, and random ones, are refused by name."""

import pytest
import torch
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, check
from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.methods import LRP, Deconvnet, GuidedBackprop, LayerPropagation, Patterns
from captum_mipin.methods.gradients import Gradient

GRADIENTS = (Gradient, Deconvnet, GuidedBackprop)
MIXED = {
    "batch norm without statistics": (
        lambda h: F.batch_norm(h, None, None, training=True), "_native_batch_norm_legit"),
    "batch norm in training": (
        lambda h: F.batch_norm(h, torch.zeros(6), torch.ones(6), training=True),
        "_native_batch_norm_legit"),
    "cumsum": (lambda h: h.cumsum(0), "cumsum"),
    "log_softmax": (lambda h: h.log_softmax(0), "log_softmax"),
    "sort": (lambda h: h.sort(0)[0], "sort"),
    "logcumsumexp": (lambda h: h.logcumsumexp(0), "logcumsumexp"),
    "mean": (lambda h: h - h.mean(0), "mean"),
    "norm": (lambda h: F.normalize(h, dim=0), "linalg_vector_norm"),
}  # fmt: skip
APART = {
    "cumsum": lambda h: h.cumsum(1),
    "log_softmax": lambda h: h.log_softmax(1),
    "instance norm": lambda h: F.instance_norm(h.unsqueeze(1)).squeeze(1),
    "transposed": lambda h: h.unsqueeze(0).cumsum(2).sort(-1)[0][0],
    "logcumsumexp": lambda h: h.logcumsumexp(1),
}
RANDOM = {
    "a state": lambda h: h + torch.randn(h.shape[0], 6),
    "dropout": F.dropout,
    "bernoulli": lambda h: h * torch.bernoulli(torch.full((6,), 0.5)),
    "rand_like": lambda h: h + torch.rand_like(h),
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.5, True),
    "normal": lambda h: h * torch.normal(torch.ones(6), 0.1),
}
STILL = {
    "dropout": lambda h: F.dropout(h, training=False),
    "attention": lambda h: F.scaled_dot_product_attention(*[h.view(-1, 1, 2, 3)] * 3).flatten(1),
    "rrelu": F.rrelu,
}


def _network(step):
    torch.manual_seed(0)
    return Function(
        lambda m, x: m["last"](step(m["first"](x).relu())),
        first=nn.Linear(5, 6),
        last=nn.Linear(6, 2),
    ).eval()


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_the_batch_is_refused(name):
    step, operation = MIXED[name]
    for method in GRADIENTS:
        with pytest.raises(
            UnsupportedOperationError,
            match=rf"aten\.{operation}.* in the model itself: (it computes|its result) ",
        ):
            method(_network(step)).attribute(normal(4, 5), 1)
        report = check(_network(step), normal(4, 5), method=method)
        assert any(operation in row.operation for row in report.rows if row.status == "refused")


def test_batch_norm_of_a_module_without_statistics_is_refused():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    for method in GRADIENTS:
        with pytest.raises(
            UnsupportedOperationError, match=r"batch_norm.* in 1: it computes along the batch"
        ):
            method(model.eval()).attribute(normal(3, 1, 8, 8), 1)
    whole = LayerPropagation(GuidedBackprop(model), model[2])  # above it nothing mixes
    assert whole.attribute(normal(3, 1, 8, 8), 1).shape == (3, 4, 6, 6)


@pytest.mark.parametrize("name", APART)
def test_what_keeps_the_examples_apart_is_not_refused(name):
    x = normal(4, 5)
    method = Gradient(_network(APART[name]))
    torch.testing.assert_close(method.attribute(x, 1)[2:3], method.attribute(x[2:3], 1))


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_random_is_refused_by_every_method(name):
    model, x = _network(RANDOM[name]), normal(8, 5)
    calls = (
        *(lambda method=method: method(model).attribute(x, 1) for method in (*GRADIENTS, LRP)),
        lambda: InverseNetwork(model).fit(x, progress=False),
        lambda: Patterns(model).fit(x, progress=False),
        lambda: LayerPropagation(LRP(model), model.layers["last"]).attribute(x, 1),
    )
    for call in calls:
        with pytest.raises(
            UnsupportedOperationError, match=r"it is random.*training=self.training"
        ):
            call()
    for method in (None, LRP, *GRADIENTS):
        assert any("it is random" in row.note for row in check(model, x, method=method).rows)


@pytest.mark.parametrize("name", STILL)
def test_what_is_switched_off_is_not_random(name):
    assert check(_network(STILL[name]), normal(8, 5), method=Gradient).ok
