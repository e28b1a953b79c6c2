"""What cannot work is refused with a full message, and leaves nothing half-done."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_batches import Batches, batch_at, interrupt
from small import Function, Scaled
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from captum_mipin import (
    LRP,
    InverseNetwork,
    LayerMIPINAttribution,
    MIPINAttribution,
    MIPINError,
    check,
)
from captum_mipin.errors import (
    CaptureError,
    FitError,
    InputError,
    ModelChangedError,
    NotFittedError,
    TargetError,
    TargetRangeError,
    TrainingModeError,
    UnsupportedOperationError,
)


class Steps(nn.Module):
    """A small network around one odd step."""

    def __init__(self, step: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(6, 5), nn.Linear(5, 3), step

    def forward(self, x: Tensor) -> Any:
        return self.last(self.step(self.first(x)))


def _raise(error: BaseException) -> Any:
    raise error


def _fit(model: nn.Module, data: Any, **options: Any) -> InverseNetwork:
    return InverseNetwork(model).fit(data, progress=False, **options)


def _both(
    fitted: Any, survives: Any, error: type[BaseException], message: str, data: Any, **options: Any
) -> None:
    """Check that a first fit and a later one fail alike, and that neither changes anything."""
    fresh = InverseNetwork(fitted.model)
    with pytest.raises(error, match=message):
        fresh.fit(data(), progress=False, **options)
    assert fresh.targets == []
    assert fresh.report.layers == ()
    with pytest.raises(NotFittedError, match="not fitted yet"):
        fresh.source_signal(fitted.x[:1], 0)
    with pytest.raises(error, match=message), survives(fitted):
        fitted.inverse.fit(data(), progress=False, **options)


# ---------------------------------------------------------------- the model


def test_a_model_that_cannot_be_exported(untouched: Any, mlp: Any) -> None:
    model = Steps(lambda h: h if h.sum() > 0 else -h).eval()
    message = (
        r"torch\.export cannot capture Steps for inputs .*depends on the values of a tensor.*"
        r"Write if as torch\.where"
    )
    for call in (lambda: _fit(model, mlp.x), lambda: check(model, mlp.x)):
        with pytest.raises(CaptureError, match=message) as caught, untouched(model, mlp.x):
            call()
        assert caught.value.__cause__ is not None


def test_a_part_that_cannot_be_exported_is_named_with_its_line(mlp: Any) -> None:
    class Branches(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            if h.max() > 0:
                return h
            return -h

    message = (
        r"(?s)cannot capture Steps for inputs .*, at 'if h\.max\(\) > 0:' in module 'step' "
        r"\(Branches\): an if, a loop or a shape"
    )
    with pytest.raises(CaptureError, match=message):
        _fit(Steps(Branches()).eval(), mlp.x)


def test_a_model_that_is_a_function(mlp: Any) -> None:
    for function in (
        lambda x: x,
        torch.nn.functional.relu,
        torch.compile(lambda x: x),
    ):
        with pytest.raises(
            CaptureError,
            match=r"expected a torch\.nn\.Module.*Wrap a function in an nn\.Module",
        ):
            _fit(function, mlp.x)  # type: ignore[arg-type]  # no module, on purpose


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (torch.exp, r"aten\.exp\.default in the model itself: no rule covers it"),
        (nn.Softmax(1), r"aten\.softmax\.int in step: no rule covers it"),
        (
            lambda h: h.cumprod(1),
            r"aten\.cumprod\.default in the model itself: no rule covers it",
        ),
        (
            lambda h: h.flip(0),
            r"aten\.flip\.default in the model itself: it computes along the batch",
        ),
        (
            lambda h: h - h.mean(0),
            r"aten\.mean\.dim in the model itself: its result has shape .* that contains the batch",
        ),
    ],
)
def test_an_operation_without_a_rule(untouched: Any, mlp: Any, step: Any, name: str) -> None:
    model = Steps(step).eval()
    way_out = (
        r"(?s)"
        + name
        + r".*InverseNetwork\(model, layer=\.\.\.\).*check\(model, inputs\) lists all"
    )
    with pytest.raises(UnsupportedOperationError, match=way_out) as caught, untouched(model, mlp.x):
        _fit(model, mlp.x)
    assert isinstance(caught.value, NotImplementedError)
    assert [row.path for row in check(model, mlp.x).refused] in ([""], ["step"])


class Steered(nn.Module):
    """A second input that only steers the first."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.dense, self.how = nn.Linear(4, 3), lambda x, g: how(x, g)

    def forward(self, x: Tensor, g: Tensor) -> Any:
        return self.dense(self.how(x, g))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            lambda x, g: x * g,
            "multiplies two values .*: pass a mere scale by additional_forward_args",
        ),
        (
            lambda x, g: x * torch.sigmoid(g),
            "uses g only for gates, conditions .*go into additional_forward_args",
        ),
        (
            lambda x, g: torch.where(g > 0, x, 0.0),
            "uses g only for gates, conditions .*go into additional_forward_args",
        ),
        (
            lambda x, g: x + torch.zeros_like(g),
            "output does not depend on g, .*go into additional_forward_args",
        ),
    ],
)
def test_an_input_that_only_steers(how: Any, message: str) -> None:
    torch.manual_seed(0)
    model, x, g = Steered(how).eval(), torch.randn(40, 4), torch.randn(40, 4)
    with pytest.raises(CaptureError, match=f"(?s){message}, which fit takes by unpack="):
        InverseNetwork(model).fit((x, g), progress=False)
    inverse = InverseNetwork(model).fit(
        [(x, g)], unpack=lambda batch: (batch[0], batch[1]), progress=False
    )  # the way out
    assert MIPINAttribution(model, inverse).attribute(x[:3], 0, g[:3]).any()


def test_a_condition_among_the_inputs() -> None:
    model = Steered(lambda x, g: torch.where(g, x, 0.0)).eval()
    with pytest.raises(
        InputError,
        match=r"input 1 has dtype torch\.bool.*such as a mask, goes into additional_forward_args",
    ):
        check(model, (torch.randn(2, 4), torch.ones(2, 4) > 0))


def test_what_an_inverse_does_not_lead_to() -> None:
    """A network with a fork below the layer where the inverse stops."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.first, self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Any:
            h = self.act(self.first(x))
            return self.last((h + self.inner(h)).relu())

    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(40, 4)
    inverse = InverseNetwork(model, layer=model.inner).fit(x, progress=False)
    message = (
        r"this inverse stops at layer 'inner', and did not learn act/relu/fork, which it needs to "
        r"reach layer 'act': explain a layer closer to the output, or fit another inverse that "
        r"stops at layer 'act'"
    )
    with pytest.raises(NotFittedError, match=message):
        LayerMIPINAttribution(model, inverse, model.act).attribute(x[:2], 0)


def test_the_way_out_of_an_operation_without_a_rule_works(mlp: Any) -> None:
    model = Steps(nn.Sequential(nn.Softmax(1), nn.Linear(5, 5))).eval()
    inverse = InverseNetwork(model, layer=model.step[1]).fit(mlp.x, progress=False)
    assert LayerMIPINAttribution(model, inverse).attribute(mlp.x[:2], 0).shape == (2, 5)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: (y, y), "returns a tuple, expected one tensor.*rap the model in"),
        (lambda y: (y,), "expected one tensor.*rap the model in"),
        (lambda y: {"logits": y}, "expected one tensor.*rap the model in"),
        (lambda y: y.argmax(1), "does not depend on its input"),
        (lambda y: y.detach() * 0 + 1, None),
        (lambda y: y.sum(), None),
        (lambda y: y.mean(0), "expected one dimension that contains the batch"),
    ],
)
def test_a_model_with_another_output_than_one_row_of_logits_an_example(
    mlp: Any, output: Any, message: str | None
) -> None:
    class Odd(Steps):
        def forward(self, x: Tensor) -> Any:
            return output(super().forward(x))

    with pytest.raises(MIPINError, match=message):
        _fit(Odd(nn.ReLU()).eval(), mlp.x)


def test_training_mode(own_cnn: Any, survives: Any, tmp_path: Path) -> None:
    model, x = own_cnn.model, own_cnn.x
    own_cnn.inverse.save(tmp_path / "file")
    mipin, layer = own_cnn.mipin, LayerMIPINAttribution(model, own_cnn.inverse, model[2])
    message = r"in which '1' \(BatchNorm2d\), '4' \(Dropout\) may .*model\.eval\(\)"
    with survives(own_cnn):
        model.train()
        for call in (
            lambda: own_cnn.inverse.fit(x, progress=False),
            lambda: _fit(model, x),
            lambda: mipin.attribute(x[:2], 0),
            lambda: mipin.source_signal(x[:2], 0),
            lambda: mipin.class_attribution(0),
            lambda: layer.attribute(x[:2], 0),
            lambda: InverseNetwork.load(tmp_path / "file", model),
            lambda: check(model, x),
        ):
            with pytest.raises(TrainingModeError, match=message):
                call()
        assert all(module.training for module in model.modules()), "the flags are left as they are"
        model.eval()


# ---------------------------------------------------------------- weights changed


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model[2].bias[0] += 1e-3


def _one_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _data(model: nn.Module) -> None:
    model[0].weight.data[3, 2] += 1


def _replaced_data(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data + 1


def _replaced(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)


def _loaded(model: nn.Module) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def _other_module(model: nn.Module) -> None:
    model[0] = nn.Linear(6, 8).eval()


@pytest.mark.parametrize(
    "change", [_in_place, _one_step, _data, _replaced_data, _replaced, _loaded, _other_module]
)
def test_weights_changed_since_the_fit(
    own_mlp: Any, survives: Any, change: Callable[[nn.Module], None]
) -> None:
    model, x, mipin = own_mlp.model, own_mlp.x, own_mlp.mipin
    modules, kept = list(model), [(p, p.detach().clone()) for p in model.parameters()]
    layer = LayerMIPINAttribution(model, own_mlp.inverse, model[1])
    with survives(own_mlp):
        change(model)
        for call in (
            lambda: mipin.attribute(x[:2], 0),
            lambda: mipin.source_signal(x[:2], 0),
            lambda: mipin.class_attribution(0),
            lambda: layer.attribute(x[:2], 0),
            lambda: own_mlp.inverse.fit(x, targets=0, progress=False),
        ):
            with pytest.raises(
                ModelChangedError,
                match=r"weights have changed since the inverse was fitted: fit a new",
            ):
                call()
        model[0] = modules[0]
        for (parameter, value), (path, name) in zip(
            kept, (("0", "weight"), ("0", "bias"), ("2", "weight"), ("2", "bias")), strict=True
        ):
            parameter.data = value.clone()
            setattr(model.get_submodule(path), name, parameter)


def test_batch_statistics_changed_since_the_fit(own_cnn: Any, survives: Any) -> None:
    mean = own_cnn.model[1].running_mean
    with survives(own_cnn):
        before = mean.clone()
        mean += 1
        with pytest.raises(ModelChangedError, match="weights have changed"):
            own_cnn.mipin.attribute(own_cnn.x[:2], 0)
        mean.copy_(before)


def test_a_weight_that_lies_otherwise_in_memory_changed_since_the_fit() -> None:
    model = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        .eval()
        .to(memory_format=torch.channels_last)
    )
    mipin = MIPINAttribution(model, _fit(model, torch.randn(20, 3, 4, 4)))
    model[0].weight.data[0, 1, 2, 0] += 100  # which torch does not count
    with pytest.raises(ModelChangedError, match="weights have changed"):
        mipin.attribute(torch.randn(2, 3, 4, 4), 0)


@pytest.mark.parametrize("through_data", [False, True])
def test_one_weight_of_many_changed_since_the_fit(through_data: bool) -> None:
    model, x = (
        nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2)).eval(),
        torch.randn(50, 40),
    )
    mipin = MIPINAttribution(model, _fit(model, x))
    with torch.no_grad():
        weight = model[0].weight.data if through_data else model[0].weight
        weight[0, 1] += 100
    with pytest.raises(ModelChangedError, match="weights have changed"):
        mipin.attribute(x[:2], 0)


def test_a_buffer_of_nan_is_no_change(mlp: Any) -> None:
    model = Steps(nn.ReLU())
    model.register_buffer("best", torch.tensor(float("nan")))
    mipin = MIPINAttribution(model.eval(), _fit(model.eval(), mlp.x))
    assert torch.isfinite(mipin.attribute(mlp.x[:2], 0)).all()


# ---------------------------------------------------------------- inputs to explain


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            lambda x: x[:, :5],
            CaptureError,
            r"(?s)on inputs \(3, 5\) torch\.float32 on cpu.*Pass inputs of a shape",
        ),
        (lambda x: x.double(), MIPINError, r"(?s)float64"),
        (lambda x: x.half(), MIPINError, r"(?s)float16"),
        (lambda x: x.to("meta"), MIPINError, r"(?s)meta"),
        (
            lambda x: x.long(),
            InputError,
            r"dtype torch\.int64, expected a floating dtype.*Convert it",
        ),
        (lambda x: x > 0, InputError, r"dtype torch\.bool, expected a floating dtype"),
        (
            lambda x: x + 0j,
            InputError,
            r"complex64, expected a floating dtype: pass torch\.view_as_real",
        ),
        (lambda x: x[:0], InputError, r"input 0 is empty: its shape is \(0, 6\)"),
        (lambda x: x[0, 0], InputError, r"input 0 is empty: its shape is \(\)"),
        (
            lambda x: x.to_sparse(),
            InputError,
            r"torch\.sparse_coo, expected a dense tensor: call to_dense\(\)",
        ),
        (lambda x: (), InputError, "no input tensor was given"),
        (lambda x: (x, x), MIPINError, None),
        (lambda x: (x, 1.0), InputError, "input 1 is a float"),
        (lambda x: [x], InputError, "inputs are a list, expected"),
        (lambda x: x.numpy(), InputError, "inputs are a numpy array, expected"),
        (lambda x: x / 0, InputError, "input 0 contains NaN or Inf"),
        (lambda x: x * float("nan"), InputError, "input 0 contains NaN or Inf"),
    ],
)
def test_inputs_that_cannot_be_explained(
    mlp: Any, survives: Any, wrong: Any, error: Any, message: str | None
) -> None:
    bad = wrong(mlp.x[:3])
    layer = LayerMIPINAttribution(mlp.model, mlp.inverse, mlp.model[1])
    for call in (
        mlp.mipin.attribute,
        mlp.mipin.source_signal,
        mlp.mipin.distractor,
        layer.attribute,
    ):
        with pytest.raises(error, match=message), survives(mlp):
            call(bad, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda x: x.to_sparse(),
            r"input 0 has layout torch\.sparse_coo, expected a dense tensor: call to_dense\(\)",
        ),
        (lambda x: x[:0], r"input 0 is empty: its shape is \(0, 4\)"),
        (lambda x: x + 0j, r"input 0 has dtype torch\.complex64, expected a floating dtype"),
        (lambda x: x.to("meta"), "input 0 is on the meta device"),
        (lambda x: x.tolist(), "inputs are a list, expected"),
    ],
)
def test_integer_inputs_that_cannot_be_explained(wrong: Any, message: str) -> None:
    model, x = (
        nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 2)).eval(),
        torch.randint(9, (30, 4)),
    )
    inverse = InverseNetwork(model, layer=model[0]).fit(x, progress=False)
    with pytest.raises(InputError, match=message):
        LayerMIPINAttribution(model, inverse).attribute(wrong(x[:3]), 0)
    if not isinstance(wrong(x), list):
        with pytest.raises(FitError, match=message):
            InverseNetwork(model, layer=model[0]).fit([x, wrong(x)], progress=False)


def test_wrong_further_arguments(mlp: Any, survives: Any) -> None:
    with (
        pytest.raises(
            CaptureError, match=r"(?s)cannot run .*positional.*leave them out, or fit another"
        ),
        survives(mlp),
    ):
        mlp.mipin.attribute(mlp.x[:2], 0, (1, 2))


def test_states_with_the_batch_in_the_second_dimension() -> None:
    def run(m: Any, x: Tensor, h: Tensor, turned: bool = False) -> Tensor:
        h = h.transpose(0, 1).contiguous() if turned else h
        return m["last"](m["layer"](x, h)[0][:, -1])

    layers = {"layer": nn.GRU(4, 3, batch_first=True), "last": nn.Linear(3, 2)}
    x, h = torch.randn(5, 2, 4), torch.randn(1, 5, 3)
    with pytest.raises(CaptureError, match=r"(?s)shape \(1, 5, 3\).*expected.*pass h\.transpose"):
        LRP(Function(run, **layers).eval()).attribute(x, 1, additional_forward_args=h)
    turned = Function(partial(run, turned=True), **layers).eval()
    found = LRP(turned).attribute(x, 1, additional_forward_args=h.transpose(0, 1))
    alone = LRP(turned).attribute(x[3:4], 1, additional_forward_args=h[:, 3:4].transpose(0, 1))
    torch.testing.assert_close(found[3:4], alone)


def _too_much(model: nn.Module) -> Tensor:
    """Return finite inputs to which the first unit answers with infinity."""
    return 3e38 * model[0].weight[:1].detach().sign().expand(2, 6)


def test_activations_that_overflow(mlp: Any, survives: Any) -> None:
    x = _too_much(mlp.model)
    assert torch.isfinite(x).all()
    assert not torch.isfinite(mlp.model(x)).any()
    for call in (mlp.mipin.attribute, mlp.mipin.source_signal):
        with pytest.raises(MIPINError, match=r"(?i)\bNaN\b|\bInf\b|finite"), survives(mlp):
            call(x, 0)


@pytest.mark.parametrize("scale", [1e-30, 1e10, 1e34, 1e35, 1e36, 1e37])
def test_a_result_is_finite_or_an_error(mlp: Any, scale: float) -> None:
    for call in (mlp.mipin.attribute, mlp.mipin.source_signal, mlp.mipin.distractor):
        try:
            found = call(scale * _too_much(mlp.model) / 3e38, 0)
        except MIPINError:
            continue
        assert torch.isfinite(found).all()


# ---------------------------------------------------------------- data to fit on


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda x: 5, "cannot fit on an int, expected a tensor"),
        (lambda x: None, "cannot fit on None, expected a tensor"),
        (lambda x: "images", "cannot fit on a str, expected a tensor"),
        (lambda x: {"x": x}, "cannot fit on a dict, expected a tensor"),
        (
            lambda x: [{"x": x}],
            r"a batch is a dict, expected a tensor or a tuple .*unpack=lambda batch",
        ),
        (
            lambda x: ["images"],
            r"a batch is a str, expected a tensor or a tuple .*unpack=lambda batch",
        ),
        (
            lambda x: [x.numpy()],
            r"a batch is a numpy array, expected a tensor or a tuple .*unpack=lambda batch",
        ),
        (lambda x: x[:0], "input 0 is empty: its shape is .0, 6."),
        (lambda x: [], "yields no batch, expected at least one: pass more data"),
        (lambda x: (), "yields no batch, expected at least one: pass more data"),
        (lambda x: [x[:0]], r"batch 0: input 0 is empty: its shape is \(0, 6\)"),
        (lambda x: x[0, 0], r"input 0 is empty: its shape is \(\)"),
        (lambda x: [x[0, 0]], r"batch 0: input 0 is empty: its shape is \(\)"),
        (lambda x: x.long(), r"input 0 has dtype torch\.int64, expected a floating dtype"),
        (
            lambda x: TensorDataset(x.long()),
            r"batch 0: input 0 has dtype torch\.int64, expected a floating dtype",
        ),
        (lambda x: [x.to_sparse()], r"batch 0: .*torch\.sparse_coo, expected a dense tensor"),
        (lambda x: x.to_sparse(), r"torch\.sparse_coo, expected a dense tensor"),
        (lambda x: (x, x[:5]), r"input 1 has 5 examples, input 0 has 96"),
        (lambda x: x[:1], "the data has 1 example, expected at least two"),
        (lambda x: [x[:1]], "the data has 1 example, expected at least two"),
        (
            lambda x: [x[:16], x[16:32, :5]],
            r"batch 1 has inputs of shape and dtype \[\(\(5,\).*expected \[\(\(6,\).*in the first "
            r"batch: convert",
        ),
        (
            lambda x: [x[:16], x[16:32].double()],
            r"batch 1 has .*float64.*expected .*float32.* in the first batch",
        ),
        (lambda x: [x[:16], (x[:16], x[:16])[0] / 0], "batch 1: input 0 contains NaN or Inf"),
        (
            lambda x: [x[:16], x[16:32], x[32:48] * float("nan")],
            "batch 2: input 0 contains NaN or Inf",
        ),
        (lambda x: [x[:16], "images"], "a batch is a str"),
        (lambda x: [x[:16], x[:0]], r"batch 1: input 0 is empty"),
    ],
)
def test_data_that_cannot_be_fitted_on(mlp: Any, survives: Any, data: Any, message: str) -> None:
    _both(mlp, survives, FitError, message, lambda: data(mlp.x))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda x: x[:, :5], r"on inputs \(96, 5\) torch\.float32"),
        (lambda x: x.double(), "float64"),
        (lambda x: x.half(), "float16"),
    ],
)
def test_data_that_the_model_does_not_take(mlp: Any, data: Any, message: str) -> None:
    inverse = InverseNetwork(mlp.model)
    with pytest.raises(MIPINError, match=message):
        inverse.fit(data(mlp.x), progress=False)
    assert inverse.targets == []


def test_data_of_another_shape_than_that_of_earlier_fits(own_cnn: Any, survives: Any) -> None:
    with (
        pytest.raises(
            InputError,
            match=r"the data has inputs .*\(3, 9, 9\) torch.float32, expected \(3, 8, 8\) "
            r"torch.float32 as in earlier fits",
        ),
        survives(own_cnn),
    ):
        own_cnn.inverse.fit(torch.rand(20, 3, 9, 9), targets=0, progress=False)


def test_a_used_up_generator(mlp: Any, survives: Any) -> None:
    def used() -> Iterator[Tensor]:
        generator = (batch for batch in mlp.x.split(16))
        list(generator)
        return generator

    _both(
        mlp,
        survives,
        FitError,
        r"yields no batch, expected at least one: pass more data\. An iterator that was used up "
        r"yields nothing: pass a new one",
        used,
    )


def test_every_kind_of_data_gives_the_same_inverse(mlp: Any) -> None:
    class Items(Dataset):  # type: ignore[type-arg]  # what it yields does not matter
        def __len__(self) -> int:
            return len(mlp.x)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return mlp.x[index], 0

    expected = _fit(mlp.model, mlp.x, batch_size=16).source_signal(mlp.x[:5], 1)
    inverse = _fit(mlp.model, -mlp.x)
    kinds = [
        (batch for batch in mlp.x.split(16)),  # goes through once
        list(mlp.x.split(16)),
        [(batch, torch.zeros(16)) for batch in mlp.x.split(16)],
        [[(batch,), None] for batch in mlp.x.split(16)],
        Batches(mlp.x),
        TensorDataset(mlp.x),
        Items(),
        DataLoader(Items(), batch_size=16),
        iter(DataLoader(Items(), batch_size=16)),
        (mlp.x,),
    ]
    for kind in kinds:
        inverse.fit(-mlp.x, progress=False)
        assert not torch.equal(inverse.source_signal(mlp.x[:5], 1), expected)
        inverse.fit(kind, batch_size=16, progress=False)
        assert torch.equal(inverse.source_signal(mlp.x[:5], 1), expected), type(kind)
    named = [{"image": batch} for batch in mlp.x.split(16)]
    inverse.fit(named, unpack=lambda batch: (batch["image"], None), progress=False)
    assert torch.equal(inverse.source_signal(mlp.x[:5], 1), expected)


@pytest.mark.parametrize(
    ("odd", "error", "message"),
    [
        (batch_at(1, 3, lambda x: x[:, :5]), FitError, "batch 3 has inputs of shape"),
        (batch_at(2, 1, lambda x: x[:, :5]), FitError, "batch 1 has inputs of shape"),
        (batch_at(3, 1, lambda x: x.double()), FitError, "batch 1 has inputs of .*float64"),
        (batch_at(0, 0, lambda x: _raise(OSError("no such image"))), OSError, "no such image"),
        (batch_at(1, 3, lambda x: _raise(OSError("no such image"))), OSError, "no such image"),
        (batch_at(3, 3, lambda x: _raise(OSError("no such image"))), OSError, "no such image"),
        (batch_at(1, 3, interrupt), KeyboardInterrupt, "^$"),
        (batch_at(3, 5, interrupt), KeyboardInterrupt, "^$"),
        (
            batch_at(1, 2, lambda x: x * float("nan")),
            FitError,
            "batch 2: input 0 contains NaN or Inf",
        ),
        (
            batch_at(3, 2, lambda x: x * float("inf")),
            FitError,
            "batch 2: input 0 contains NaN or Inf",
        ),
        (
            batch_at(2, 5, lambda x: x[:3]),
            FitError,
            "had 96 examples in the first pass and 83 in a later one",
        ),
        (batch_at(2, 5, lambda x: {"x": x}), FitError, "a batch is a dict"),
    ],
)
def test_data_that_fails_midway(
    mlp: Any, survives: Any, odd: Any, error: Any, message: str
) -> None:
    _both(mlp, survives, error, message, lambda: Batches(mlp.x, odd), memory=mlp.x.nbytes)


def test_a_loader_whose_number_of_examples_never_repeats_is_refused(
    mlp: Any, survives: Any
) -> None:
    class Once(Batches):
        def __iter__(self) -> Iterator[Any]:
            self.batches = self.batches[:-1]
            return super().__iter__()

    _both(
        mlp,
        survives,
        FitError,
        r"examples in the first pass and \d+ in a later one",
        lambda: Once(mlp.x),
        memory=mlp.x.nbytes,
    )


@pytest.mark.parametrize(
    "others",
    [
        lambda x: (x, 3.0),
        lambda x: (x, None),
        lambda x: (x, torch.ones(6)),
        lambda x: (x, (2.0, 2.0)),
    ],
)
def test_further_arguments_that_change_between_batches(mlp: Any, others: Any) -> None:
    model = Scaled(6).eval()
    batches = [(mlp.x[:40], 2.0), others(mlp.x[40:80])]
    with pytest.raises(FitError, match="batch 1"):
        InverseNetwork(model).fit(batches, unpack=lambda batch: batch, progress=False)


def test_nan_and_inf_in_the_output_name_their_batch(mlp: Any, survives: Any) -> None:
    data = [mlp.x[:20], mlp.x[20:40], _too_much(mlp.model)]
    _both(mlp, survives, FitError, "batch 2: the model's output contains NaN or Inf", lambda: data)


def test_nan_and_inf_in_the_features_name_their_batch_and_module(mlp: Any) -> None:
    class Forked(nn.Module):
        """Its features reach -Inf where its output stays finite."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.a(torch.relu(h)) + self.b(torch.relu(h - 1))

    model = Forked().eval()
    with torch.no_grad():
        model.first.weight.copy_(model.first.weight.abs())
    low = torch.full((4, 6), -3e38)
    assert torch.isfinite(model(low)).all()
    assert torch.isinf(model.first(low)).any()
    inverse = InverseNetwork(model)
    with pytest.raises(
        FitError, match=r"batch 1: NaN or Inf in the features or the signal of first/"
    ):
        inverse.fit([mlp.x[:40], low], progress=False)
    assert inverse.targets == []


def test_a_class_with_a_constant_logit(mlp: Any, survives: Any) -> None:
    x = mlp.x
    dead = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        dead[2].weight[1] = 0
    message = (
        r"output for target 1 is .* for each of the 96 examples, expected different values.*"
        r"pass other data, or leave this target out"
    )
    inverse = InverseNetwork(dead)
    with pytest.raises(FitError, match=message):
        inverse.fit(x, progress=False)
    assert inverse.targets == []
    assert inverse.fit(x, targets=[0, 2], progress=False).targets == [0, 2]
    with (
        pytest.raises(FitError, match=r"output for target 0 is .* for each of the 10 examples"),
        survives(mlp),
    ):
        mlp.inverse.fit(x[:1].expand(10, 6), targets=0, progress=False)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_features_that_never_vary(ridge: float) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    with torch.no_grad():
        model[0].bias[1] = -100  # never active
        model[3].bias[2:4] = -100
    x = torch.randn(80, 2, 6, 6)
    x[:, 1] = 0.3  # a constant channel
    inverse = InverseNetwork(model, ridge=ridge).fit(x, progress=False)
    mipin = MIPINAttribution(model, inverse)
    dead = {fit.layer: fit.dead for fit in inverse.report.layers}
    assert dead["3/linear"] >= 2
    assert dead["0/conv2d"] >= 1
    assert all(np.isfinite(fit.explained_variance) for fit in inverse.report.layers)
    for call, local in (
        (mipin.attribute, True),
        (mipin.attribute, False),
        (mipin.source_signal, True),
    ):
        assert torch.isfinite(call(x[:4], [0, 1, 2, 0], local=local)).all()
    assert (mipin.attribute(x[:4], 0)[:, 1] == 0).all(), "zero coefficients"
    assert torch.allclose(mipin.source_signal(x[:4], 0)[:, 1], torch.tensor(0.3), atol=1e-5), (
        "the constant is its bias"
    )
    hidden = LayerMIPINAttribution(model, inverse, model[3]).source_signal(x[:4], 0)
    assert torch.isfinite(hidden).all()


# ---------------------------------------------------------------- classes and options


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([0, 7], TargetRangeError, r"target 7 is outside the model's outputs of shape \(3,\)"),
        (-4, TargetRangeError, r"target -4 is outside"),
        (["cat", "dog"], TargetError, "target 'cat' is a str, expected integers"),
        ("cat", TargetError, "target 'cat' is a str"),
        ([], TargetError, "list of targets is empty"),
        ((0, 1), TargetError, r"has 2 indices, expected 1 for the model's outputs of shape \(3,\)"),
        ([0.5], TargetError, "is a float"),
        (torch.tensor([0.5]), TargetError, "is a float"),
        ([True], TargetError, "is a bool"),
    ],
)
def test_unknown_classes_to_fit(
    mlp: Any, survives: Any, targets: Any, error: Any, message: str
) -> None:
    _both(mlp, survives, error, message, lambda: mlp.x, targets=targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": -1.0}, r"ridge=-1\.0 must be a finite number of at least 0"),
        ({"ridge": float("nan")}, "ridge=nan must be a finite number of at least 0"),
        ({"ridge": float("inf")}, "ridge=inf must be a finite number"),
        ({"ridge_scale": "max"}, "ridge_scale='max' is not one of 'relative', 'mean', 'sum'"),
        ({"pooling": "max"}, "pooling='max' is not one of 'shares', 'even'"),
        ({"solver": "adam"}, "solver='adam' is not one of 'exact', 'sgd'"),
        ({"epochs": 0}, "epochs=0 must be a whole number of at least 1"),
    ],
)
def test_options_out_of_range(mlp: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        InverseNetwork(mlp.model, **options)


def test_a_diverging_descent(cnn: Any) -> None:
    inverse = InverseNetwork(cnn.model, solver="sgd", epochs=3, learning_rate=1e30)
    with pytest.raises(
        FitError, match=r"SGD diverged at 0/conv2d, target 0, to NaN or Inf: lower learning_rate="
    ):
        inverse.fit(cnn.x, targets=0, progress=False)
    assert inverse.targets == []


def test_fitting_more_classes_keeps_those_before_to_the_bit(mlp: Any) -> None:
    inverse = InverseNetwork(mlp.model).fit(mlp.x, targets=1, progress=False)
    before = inverse.source_signal(mlp.x[:4], 1)
    inverse.fit(mlp.x[:50], targets=[2, 0], progress=False)
    assert inverse.targets == [1, 2, 0]
    assert torch.equal(inverse.source_signal(mlp.x[:4], 1), before)
    assert len(inverse.report.layers) == 6


def test_a_network_that_overflows_is_no_fault_of_a_rule() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(FitError, match=r"batch 0: the model's output contains NaN or Inf"):
        InverseNetwork(model).fit(torch.randn(20, 6), progress=False)
