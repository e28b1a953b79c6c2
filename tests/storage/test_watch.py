"""The fingerprint of a model, and the watch that notices each change of its weights."""

import copy

import pytest
import torch
from torch import nn

from captum_mipin.storage.watch import Watch, fingerprint


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()


def test_the_fingerprint_tells_names_shapes_dtypes_and_values() -> None:
    model = _model()
    same = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == same == fingerprint(_model().train())
    renamed = nn.Sequential()
    for name, module in zip("abc", _model(), strict=True):
        renamed.add_module(name, module)
    other_value = _model()
    with torch.no_grad():
        other_value[0].weight[0, 0] += 1e-6
    other_buffer = _model()
    other_buffer[1].running_mean[1] = 1
    turned = nn.Linear(4, 3)
    turned.weight = nn.Parameter(_model()[0].weight.detach().reshape(4, 3))
    others = [
        renamed,
        other_value,
        other_buffer,
        _model().double(),
        nn.Sequential(turned, *_model()[1:]),
    ]
    prints = [fingerprint(other) for other in others]
    assert len({same, *prints}) == len(others) + 1


def test_the_watch_notices_changes_and_their_undoing() -> None:
    model = _model()
    watch = Watch(model)
    assert not watch.changed(model)
    assert not watch.changed(copy.deepcopy(model)), "the same values in other tensors"
    with torch.no_grad():
        model[0].bias += 1
    assert watch.changed(model)
    assert watch.changed(model), "and goes on noticing"
    model.load_state_dict(_model().state_dict())
    assert not watch.changed(model)


def test_the_watch_notices_one_value_of_a_large_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    watch = Watch(model)
    with torch.no_grad():
        model[0].weight[0, 1] += 1
    assert watch.changed(model)


def test_the_watch_takes_models_without_weights_and_with_nan_buffers() -> None:
    empty = nn.ReLU()
    assert not Watch(empty).changed(empty)
    model = _model()
    model.register_buffer("unused", torch.tensor(float("nan")))
    assert not Watch(model).changed(model)


WEIGHTS = {
    "with gaps": torch.randn(8, 8)[:, :4],
    "every other": torch.randn(8)[::2],
    "expanded": torch.randn(4, 1).expand(4, 6),
    "one of a row": torch.randn(1, 5)[:, 0],
    "conjugate": torch.randn(4, 4, dtype=torch.complex64).conj(),
    "transposed": torch.randn(3, 4).t(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "a number": torch.tensor(3.0),
    "behind four bytes of others": torch.randn(9)[1:],
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_watched_however_they_lie_in_memory(name: str) -> None:
    model = nn.Module()
    model.w = nn.Parameter(WEIGHTS[name].detach())
    watch = Watch(model)
    assert not watch.changed(model)
    model.w.data[(0,) * model.w.ndim] += 1  # which torch does not count
    assert watch.changed(model)


def test_what_lies_in_the_gaps_is_no_weight() -> None:
    memory, model = torch.randn(8, 8), nn.Module()
    model.w = nn.Parameter(memory[:, :4])
    watch = Watch(model)
    memory[0, 5] += 1
    assert not watch.changed(model)
