"""Weights, other tensors and arrays that forward or a hook writes to hold their bits afterwards."""

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_mipin import check
from captum_mipin.errors import CaptureError
from captum_mipin.graph.kept import Kept
from captum_mipin.methods import GuidedBackprop

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def _data(model: Any) -> None:
    model.body.weight.data.mul_(0.5)


def _without_gradients(model: Any) -> None:
    with torch.no_grad():
        model.body.weight[0] = 0


def _list_of_weights(model: Any) -> None:
    torch._foreach_mul_([weight.data for weight in model.body.parameters()], 0.5)


def _array(model: Any) -> None:
    model.body.weight.data.numpy()[0] *= 0.5


def _numpy(model: Any) -> None:
    np.asarray(model.body.weight.detach())[0] *= 0.5


def _buffer(model: Any) -> None:
    model.scale.data.add_(1)


def _other(model: Any) -> None:
    model.extra.data.add_(1)


WRITES: dict[str, Callable[[Any], None]] = {
    "data": _data,
    "without gradients": _without_gradients,
    "a list of weights": _list_of_weights,
    "an array": _array,
    "asarray": _numpy,
    "a buffer": _buffer,
    "no buffer": _other,
}


class Net(nn.Module):
    """A network whose forward may write to its tensors."""

    def __init__(self, write: Callable[[Any], None] | None = None, fails: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(5))
        self.extra = torch.ones(5)
        self.write, self.fails = write, fails

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu() * self.scale * self.extra
        if self.write is not None:
            self.write(self)
        if self.fails:
            raise ValueError("fails")
        return self.head(h)


def _by_forward(write: Callable[[Any], None]) -> nn.Module:
    return Net(write)


def _failing(write: Callable[[Any], None]) -> nn.Module:
    return Net(write, fails=True)


def _by_a_hook(write: Callable[[Any], None]) -> nn.Module:
    model = Net()

    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        write(model)

    model.body.register_forward_hook(hook)
    return model


def _by_tensors_of_a_hook(write: Callable[[Any], None]) -> nn.Module:
    model = Net()
    kept = nn.Module()  # holds the tensors themselves
    kept.body, kept.scale, kept.extra = nn.Linear(4, 5), model.scale, model.extra
    kept.body.weight, kept.body.bias = model.body.weight, model.body.bias
    state = {"kept": kept}

    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        write(state["kept"])

    model.body.register_forward_hook(hook)
    return model


@pytest.mark.captured_anew
@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("by", [_by_forward, _failing, _by_a_hook, _by_tensors_of_a_hook])
def test_what_is_written_in_place_holds_its_bits(by: Any, kind: str, untouched: Any) -> None:
    model = by(WRITES[kind]).eval()
    with untouched(model, model.extra), pytest.raises(CaptureError):
        check(model, X)


@pytest.mark.captured_anew
def test_a_write_by_data_names_the_weight() -> None:
    with pytest.raises(CaptureError, match=r"writes to its weights 'body.weight' in place"):
        check(Net(_data).eval(), X)
    model = _by_a_hook(_array).eval()
    with pytest.raises(CaptureError, match=r"hook 'hook' of 'body'.*writes to 'body.weight'"):
        check(model, X)


@pytest.mark.captured_anew
@pytest.mark.parametrize("kind", [np.zeros, bytearray, lambda n: array("d", [0.0] * n)])
def test_arrays_that_a_hook_adds_to_hold_their_values(kind: Any) -> None:
    total, model = kind(5), Net().eval()

    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        for at, value in enumerate(y.detach().numpy().mean(0)):
            total[at] += 1 if isinstance(total, bytearray) else value

    model.body.register_forward_hook(hook)
    model(X)
    before = bytes(total)
    found = GuidedBackprop(model).attribute(X, 1)
    assert bytes(total) == before
    assert torch.equal(found, GuidedBackprop(Net().eval()).attribute(X, 1))
    model(X)
    assert bytes(total) != before


def test_a_file_of_an_array_is_not_kept(tmp_path: Any) -> None:
    file = np.memmap(tmp_path / "values", "float64", "w+", shape=(3,))
    model = Net()
    model.values = file  # type: ignore[assignment]
    kept = Kept(model)
    file[0] = 1
    kept.restore()
    assert file[0] == 1


def _assigned(model: Any) -> None:
    model.body.weight.data = model.body.weight.data * 0.9


def _by_vector(model: Any) -> None:
    weights = list(model.head.parameters())
    vector = torch.nn.utils.parameters_to_vector(weights)
    torch.nn.utils.vector_to_parameters(vector * 0.9, weights)


def _assigned_buffer(model: Any) -> None:
    model.scale.data = model.scale * 0.9


def _assigned_other(model: Any) -> None:
    model.extra.data = model.extra * 0.9


ASSIGNMENTS: dict[str, Callable[[Any], None]] = {
    "body.weight": _assigned,
    "head.weight": _by_vector,
    "scale": _assigned_buffer,
    "extra": _assigned_other,
}


@pytest.mark.captured_anew
@pytest.mark.parametrize("name", ASSIGNMENTS)
@pytest.mark.parametrize("by", [_by_forward, _failing, _by_a_hook])
def test_data_that_is_assigned_is_put_back(by: Any, name: str, untouched: Any) -> None:
    model = by(ASSIGNMENTS[name]).eval()
    tensors = [*model.parameters(), model.scale, model.extra]
    places = [tensor.data_ptr() for tensor in tensors]
    expected = "model itself: fails" if by is _failing else f"assigns to the data of .*'{name}'"
    with untouched(model, model.extra), pytest.raises(CaptureError, match=expected):
        check(model, X)
    assert [tensor.data_ptr() for tensor in tensors] == places


@pytest.mark.captured_anew
def test_a_limit_of_norms_is_refused_by_name(untouched: Any) -> None:
    def limit(model: Any) -> None:
        weight = model.body.weight
        weight.data = torch.renorm(weight.data, 2, 0, 0.5)

    model = Net(limit).eval()
    for _ in range(2):  # at the second time all norms are below the limit
        with untouched(model), pytest.raises(CaptureError, match=r"data of 'body.weight'"):
            check(model, X)
        model(X)


@pytest.mark.captured_anew
def test_a_hook_may_assign_to_data_that_the_model_does_not_read() -> None:
    model, last = Net().eval(), torch.zeros(5)

    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        last.data = y.mean(0)

    model.body.register_forward_hook(hook)
    assert check(model, X).ok
    assert torch.equal(last, torch.zeros(5))


@pytest.mark.captured_anew
@pytest.mark.parametrize("before", [False, True])
def test_gradients_of_weights_are_left_as_they_were(before: bool) -> None:
    def adapt(model: Any) -> None:
        with torch.enable_grad():
            model.head(model.body(X).relu()).square().mean().backward()

    model = Net(adapt).eval()
    if before:
        model(X)
    grads = [weight.grad for weight in model.parameters()]
    values = [None if grad is None else grad.clone() for grad in grads]
    with pytest.raises(CaptureError, match=r"computes the gradients of its weights 'body.bias'"):
        check(model, X)
    for weight, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert weight.grad is grad
        assert value is None or torch.equal(value, grad)


@pytest.mark.captured_anew
@pytest.mark.parametrize("fails", [False, True])
def test_weights_require_gradients_as_before(fails: bool) -> None:
    model = Net(lambda model: model.body.requires_grad_(False), fails).eval()
    model.head.bias.requires_grad_(False)
    if fails:
        with pytest.raises(CaptureError):
            check(model, X)
    else:
        assert check(model, X).ok
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert flags == dict.fromkeys(flags, True) | {"head.bias": False}
