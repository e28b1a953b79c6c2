"""Operations that mix the examples of a batch, and random ones, are refused by name."""

import random
from functools import partial

import numpy
import pytest
import torch
from captum.attr import Saliency
from small import Function, normal
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from captum_mipin import IBA, InverseNetwork, check
from captum_mipin.bottleneck import InputIBA
from captum_mipin.comparison import compare
from captum_mipin.errors import CaptureError, TrainingModeError, UnsupportedOperationError
from captum_mipin.graph import capture as capture_module
from captum_mipin.methods import (
    LRP,
    AttentionRollout,
    Deconvnet,
    DeepTaylor,
    ExcitationBackprop,
    GradCAM,
    GuidedBackprop,
    LayerPropagation,
    Patterns,
    SmoothGrad,
)
from captum_mipin.methods.gradients import Gradient
from captum_mipin.propagation.independent import require_independent

GRADIENTS = (Gradient, Deconvnet, GuidedBackprop)
RELEVANCE = (LRP, DeepTaylor, ExcitationBackprop)
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
    "new_zeros": lambda h: h + h.new_zeros(len(h), 6),
    "new_full": lambda h: h * h.new_full((len(h), 1), 2.0),
}
#: What mixes examples, but not in batches of a few examples or of small values.
SELDOM = {
    "the first nine": (
        lambda h: h * ((h > 0.5).to(h).cumsum(0) <= 9).to(h), "cumsum"),
    "the best nine": (
        lambda h: h * ((h[None, :, 0] > h[:, None, 0]).sum(1) < 9).to(h)[:, None], "gt"),
    "statistics of large values": (
        lambda h: torch.where(h.var(0).mean() > 99, h - h.mean(0), h), "var"),
}  # fmt: skip
RANDOM = {
    "a state": lambda h: h + torch.randn(h.shape[0], 6),
    "dropout": F.dropout,
    "bernoulli": lambda h: h * torch.bernoulli(torch.full((6,), 0.5)),
    "rand_like": lambda h: h + torch.rand_like(h),
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.5, True),
    "normal": lambda h: h * torch.normal(torch.ones(6), 0.1),
}
PLACES = {
    "arange": (lambda h: h + torch.arange(h.shape[0])[:, None], "arange.default"),
    "a factor": (lambda h: h * torch.arange(h.shape[0])[:, None].cos(), "arange.default"),
    "cumsum": (lambda h: h + torch.ones_like(h).cumsum(0), "cumsum.default"),
    "eye": (lambda h: h + torch.eye(h.shape[0], 6), r"eye\.m"),
    "tril": (lambda h: h * torch.ones_like(h).tril(), "tril.default"),
}
STAYS = {
    "zeros": lambda h: h + torch.zeros(len(h), 6).cos(),
    "an index": lambda h: h[torch.arange(len(h)), h.argmax(1)][:, None] * h,
    "positions": lambda h: h + torch.arange(6),
    "a mean of ones": lambda h: h * torch.ones(h.shape[0], 6).mean(0),
    "rows of ones": lambda h: h * torch.ones(h.shape[0], 6)[torch.arange(h.shape[0])],
    "rows chosen by offsets": lambda h: (
        h * (h.reshape(-1, 1)[h.argmax(1) + torch.arange(len(h)) * h.shape[1]])
    ),
    "copies of positions": lambda h: h + torch.arange(6).expand(len(h), -1).flip(1),
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


@pytest.mark.parametrize("name", SELDOM)
def test_what_mixes_the_batch_for_some_values_alone_is_refused(name):
    step, operation = SELDOM[name]
    model, x = _network(step), normal(20, 5)
    for call in (
        *(partial(method(model).attribute, x, 1) for method in RELEVANCE),
        lambda: InverseNetwork(model).fit(x, progress=False),
    ):
        with pytest.raises(UnsupportedOperationError, match=rf"aten\.{operation}"):
            call()
    assert not check(model, x).ok


@pytest.mark.parametrize("name", PLACES)
def test_a_result_that_depends_on_the_place_in_the_batch_is_refused_by_every_method(name):
    step, named = PLACES[name]
    model, x = _network(step), normal(12, 5)
    calls = (
        *(partial(method(model).attribute, x, 1) for method in (*GRADIENTS, *RELEVANCE)),
        lambda: InverseNetwork(model).fit(x, progress=False),
        lambda: Patterns(model).fit(x, progress=False),
        lambda: check(model, x, method=ExcitationBackprop),
    )
    for call in calls:
        with pytest.raises(CaptureError, match=rf"its place in the batch, by aten\.{named}"):
            call()
    with pytest.raises(UnsupportedOperationError, match="mixes the examples of a batch"):
        SmoothGrad(model).attribute(x, 1)


def test_batch_norm_of_a_module_without_statistics_is_refused():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    for method in GRADIENTS:
        with pytest.raises(
            UnsupportedOperationError, match=r"batch_norm.* in 1: it computes along the batch"
        ):
            method(model.eval()).attribute(normal(3, 1, 8, 8), 1)


@pytest.mark.parametrize("name", [*STAYS, *APART])
def test_what_treats_each_example_alike_or_apart_is_not_refused(name):
    x = normal(12, 5)
    method = Gradient(_network({**STAYS, **APART}[name]))
    torch.testing.assert_close(method.attribute(x, 1)[7:8], method.attribute(x[7:8], 1))


def test_bags_of_words_are_refused_only_with_words_of_other_examples():
    def run(m, x, shift=0):
        offsets = (torch.arange(x.shape[0]) * x.shape[1] - shift).clamp(min=0)
        return m["bag"](x.flatten(), offsets)

    words, parts = torch.arange(20).view(4, 5), {"bag": nn.EmbeddingBag(20, 3)}
    require_independent(Function(run, **parts).eval(), (words,))
    with pytest.raises(UnsupportedOperationError, match=r"EmbeddingBag in layers.bag"):
        require_independent(Function(partial(run, shift=1), **parts).eval(), (words,))


def test_a_constant_with_the_size_of_the_batch_as_its_value_is_refused():
    model = _network(lambda h: h * h.new_full((h.shape[0], 1), 1 / h.shape[0]))
    with pytest.raises(UnsupportedOperationError, match=r"aten\.mul.*the size of the batch"):
        Gradient(model).attribute(normal(4, 5), 1)


def test_values_computed_from_the_number_of_examples_are_refused():
    def factors(n):
        ones = torch.ones(n)
        yield from (torch.tensor(n), torch.full((1,), n), torch.arange(n).amax(), ones.sum())
        yield from (ones.norm(), ones.softmax(0)[:, None], ones.cumsum(0).amax() > 16)
        yield from (ones.view(1, -1).sum(1), (ones[:, None] * ones).sum(1, keepdim=True))

    model = _network(lambda h: sum(h * k for k in factors(h.shape[0])))
    refused = [row for row in check(model, normal(4, 5)).rows if row.status == "refused"]
    assert len(refused) == 9
    assert all("the size of the batch" in row.note for row in refused)


def test_a_length_that_matters_for_many_examples_alone_is_refused():
    model = _network(lambda h: h * (torch.ones(len(h)).cumsum(0).amax() > 16))
    with pytest.raises(UnsupportedOperationError, match=r"aten\.mul.*the size of the batch"):
        LRP(model).attribute(normal(4, 5), 1)


def test_a_sum_of_the_further_arguments_of_all_examples_is_refused():
    model = Function(
        lambda m, x, k: m["last"](m["first"](x) * (k.sum() > 16)),
        first=nn.Linear(5, 6),
        last=nn.Linear(6, 2),
    ).eval()
    with pytest.raises(UnsupportedOperationError, match=r"aten\.mul.*the whole batch"):
        LRP(model).attribute(normal(4, 5), 1, additional_forward_args=torch.ones(4, 1))


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


def _images(step):
    """Return a network for images with a step between its two convolutions."""
    torch.manual_seed(0)
    return Function(
        lambda m, x: m["last"](m["second"](step(m["first"](x).relu())).relu().mean((2, 3))),
        first=nn.Conv2d(1, 4, 3),
        second=nn.Conv2d(4, 4, 3),
        last=nn.Linear(4, 2),
    ).eval()


#: Methods that call the model, and methods at a layer behind the step.
AT_LAYERS = {
    "SmoothGrad": lambda m, x: SmoothGrad(m, samples=2).attribute(x, 1),
    "Grad-CAM": lambda m, x: GradCAM(m, "layers.second").attribute(x, 1),
    "LRP": lambda m, x: LayerPropagation(LRP(m), "layers.second").attribute(x, 1),
    "MIP-IN": lambda m, x: InverseNetwork(m, layer="layers.second").fit(x, progress=False),
    "IBA": lambda m, x: IBA(m, "layers.second").estimate(x, progress=False),
    "InputIBA": lambda m, x: InputIBA(m, "layers.second").estimate(x, progress=False),
}
STEPS = {
    "batch norm": (lambda h: F.batch_norm(h, None, None, training=True), "_native_batch_norm"),
    "largest value": (lambda h: h / h.abs().max(), "max"),
    "bounded value": (lambda h: h / h.abs().max().clamp(min=1e3), "max"),
    "number of examples": (lambda h: h / h.shape[0], "div"),
    "dropout": (F.dropout, "native_dropout"),
}


@pytest.mark.parametrize("method", AT_LAYERS)
@pytest.mark.parametrize("step", STEPS)
def test_no_method_gives_a_map_that_depends_on_the_batch_or_the_call(step, method):
    run, operation = STEPS[step]
    reason = "random" if step == "dropout" else "batch"
    with pytest.raises(
        UnsupportedOperationError, match=rf"aten\.{operation}.* in the model itself.*{reason}"
    ):
        AT_LAYERS[method](_images(run), normal(6, 1, 8, 8))


@pytest.mark.parametrize("step", ["largest value", "dropout"])
def test_attention_rollout_refuses_as_well(step):
    run, _ = STEPS[step]
    vit = VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3)
    model = Function(lambda m, x: m["vit"](run(x)), vit=vit).eval()
    with pytest.raises(UnsupportedOperationError, match=r"aten\..* in the model itself"):
        AttentionRollout(model).attribute(normal(2, 3, 8, 8))


@pytest.mark.parametrize("method", ["SmoothGrad", "Grad-CAM", "LRP"])
def test_examples_that_are_joined_and_separated_again_do_not_mix(method):
    x = normal(6, 1, 8, 8)
    model = _images(lambda h: sum(torch.cat([h, h.flip(-1)]).chunk(2)))
    among = AT_LAYERS[method](model, x)
    torch.testing.assert_close(among[:1], AT_LAYERS[method](model, x[:1]))


class Branching(nn.Module):
    """A network that torch.export cannot follow, with a module behind its first layer."""

    def __init__(self, step):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.step, self.last = nn.Conv2d(1, 4, 3), step, nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x)
        h = h if h.flatten()[0] > 1e9 else h.relu()
        return self.last(self.step(h).mean((2, 3)))


UNCAPTURABLE = {
    "batch norm": (nn.BatchNorm2d(4, track_running_stats=False), "BatchNorm2d in step: .*batch"),
    "largest value": (Function(lambda m, h: h / h.abs().max()), "Function in step: .*batch"),
    "dropout": (Function(lambda m, h: F.dropout(h)), "Function in step: it is random"),
    "random": (Function(lambda m, h: h * random.random()), "Function in step: it is random"),
    "numpy": (
        Function(lambda m, h: h * numpy.random.default_rng().random()),
        "Function in step: it is random",
    ),
}


@pytest.mark.parametrize("step", UNCAPTURABLE)
def test_models_that_cannot_be_captured_are_called(step, capfd):
    module, words = UNCAPTURABLE[step]
    model, x = Branching(module).eval(), normal(4, 1, 8, 8)
    with pytest.raises(UnsupportedOperationError, match=words):
        SmoothGrad(model, samples=2).attribute(x, 1)
    with pytest.raises(UnsupportedOperationError, match=words):
        GradCAM(model, "first").attribute(x, 1)
    with pytest.raises(UnsupportedOperationError, match="an operation in the model itself"):
        SmoothGrad(lambda x: model(x), samples=2).attribute(x, 1)
    assert capfd.readouterr() == ("", "")


def test_other_models_that_cannot_be_captured_work(capfd):
    x, one = normal(4, 1, 8, 8), normal(1, 1, 8, 8)
    model = Branching(nn.BatchNorm2d(4)).eval()
    expected = Saliency(model).attribute(x.clone().requires_grad_(), 1, abs=False)
    for function in (model, lambda x: model(x), torch.jit.script(Branching(nn.Identity()).eval())):
        found = SmoothGrad(function, samples=1, noise=0).attribute(x, 1)
        if function is model:
            assert torch.equal(found, expected)
        torch.testing.assert_close(
            SmoothGrad(function, samples=1, noise=0).attribute(x[:1], 1), found[:1]
        )
    assert GradCAM(model, "first").attribute(one, 1).shape == (1, 1, 8, 8)
    assert capfd.readouterr() == ("", "")


@pytest.mark.captured_anew
def test_a_model_is_captured_once_however_often_it_counts_its_calls(monkeypatch):
    captures, trace = [], capture_module.trace
    monkeypatch.setattr(
        capture_module, "trace", lambda *call, **named: captures.append(1) or trace(*call, **named)
    )
    model, x = _images(lambda h: h), normal(6, 1, 8, 8)
    model.calls = 0
    model.register_forward_hook(lambda module, *_: setattr(module, "calls", module.calls + 1))
    for _ in range(3):
        SmoothGrad(model, samples=2).attribute(x, 1)
        GradCAM(model, "layers.first").attribute(x[:2], 1)
    assert len(captures) == 1 and model.calls > 0
    model.run = lambda m, x: m["last"](m["second"](F.dropout(m["first"](x))).mean((2, 3)))
    with pytest.raises(UnsupportedOperationError, match="random"):
        SmoothGrad(model, samples=2).attribute(x, 1)


def test_checks_write_to_nothing(untouched):
    class Counting(Branching):
        def __init__(self, step):
            super().__init__(step)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    x = normal(3, 1, 8, 8)
    for model in (Counting(nn.Identity()).eval(), Counting(nn.BatchNorm2d(4)).eval()):
        with untouched(model, x):
            require_independent(model, (x,))
    before, doubling = x.clone(), lambda x: x.mul_(2).flatten(1)[:, :2]
    require_independent(doubling, (x,))
    assert torch.equal(x, before)


def test_a_model_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(), nn.Linear(6, 2))
    SmoothGrad(model.eval(), samples=2).attribute(normal(3, 5), 1)
    with pytest.raises(TrainingModeError):
        SmoothGrad(model.train(), samples=2).attribute(normal(3, 5), 1)


@pytest.mark.parametrize(
    "draw", [random.random, lambda: 2.0 ** numpy.random.default_rng().uniform(0, 60)]
)
def test_random_numbers_from_outside_torch_are_refused(draw):
    """Those of NumPy are drawn anew each time; two of them are hardly ever alike by chance."""
    model = _network(lambda h: h * draw())
    for method in (LRP, Gradient):
        with pytest.raises(CaptureError, match=r"two calls of the model .* NumPy"):
            method(model).attribute(normal(4, 5), 1)
    with pytest.raises(UnsupportedOperationError, match="random"):
        SmoothGrad(model).attribute(normal(4, 5), 1)


def test_compare_tells_why_methods_by_name_have_no_maps():
    x, model = normal(4, 1, 8, 8), _images(lambda h: h / h.abs().max())
    own = {"mine": lambda x, target: x}
    found = compare(
        {"Saliency": "Saliency", "LRP": "LRP", **own}, x, 1, model=model, metrics=[], progress=False
    )
    texts = {row.name: row.errors for row in found.rows if row.name in ("Saliency", "LRP", "mine")}
    expected = {"": "the model mixes the examples of a batch"}
    assert texts == {"Saliency": expected, "LRP": expected, "mine": {}}
