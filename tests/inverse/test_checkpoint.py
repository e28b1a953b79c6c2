"""Fits that are interrupted and continued from a checkpoint."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_batches import Batches, batch_at, interrupt
from torch import Tensor, nn

from captum_mipin import (
    InverseNetwork,
)
from captum_mipin.errors import (
    InverseFileError,
)
from captum_mipin.regression.ridge import Solution, solve


def _settings(x: Tensor) -> dict[str, Any]:
    """So little memory that the data is gone through once a layer."""
    return {"memory": x.nbytes, "progress": False}


def _interrupted(
    model: nn.Module, x: Tensor, path: Path, at: tuple[int, int] = (3, 2)
) -> InverseNetwork:
    """Stop a fit with a checkpoint at one batch of one pass, by default in the second layer."""
    inverse = InverseNetwork(model)
    with pytest.raises(KeyboardInterrupt):
        inverse.fit(Batches(x, batch_at(*at, interrupt)), [0, 2], checkpoint=path, **_settings(x))
    assert inverse.targets == []
    return inverse


@pytest.mark.parametrize("anew", [False, True])
def test_an_interrupted_fit_goes_on_from_its_checkpoint(
    cnn: Any, tmp_path: Path, anew: bool
) -> None:
    path = tmp_path / "checkpoint"
    complete, all_data = InverseNetwork(cnn.model), Batches(cnn.x)
    complete.fit(all_data, [0, 2], **_settings(cnn.x))
    inverse = _interrupted(cnn.model, cnn.x, path)
    assert path.exists()
    if anew:
        inverse = InverseNetwork(cnn.model)
    rest = Batches(cnn.x)
    assert inverse.fit(rest, [0, 2], checkpoint=path, **_settings(cnn.x)).targets == [0, 2]
    assert rest.passes == all_data.passes - 1, "what was done is not done again"
    assert not path.exists()
    assert inverse.report == complete.report
    for target in (0, 2):
        assert torch.equal(
            inverse.source_signal(cnn.x[:4], target), complete.source_signal(cnn.x[:4], target)
        )


def test_a_fit_that_keeps_its_data_goes_on_from_its_checkpoint(
    cnn: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    path, calls = tmp_path / "checkpoint", []

    def interrupted(*arguments: Any) -> Solution:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(*arguments)

    batches = list(cnn.x.split(16))
    complete = InverseNetwork(cnn.model).fit(batches, [0, 2], progress=False)
    monkeypatch.setattr("captum_mipin.inverse.fit.solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        InverseNetwork(cnn.model).fit(batches, [0, 2], progress=False, checkpoint=path)
    monkeypatch.undo()
    assert path.exists()
    resumed = InverseNetwork(cnn.model).fit(batches, [0, 2], progress=False, checkpoint=path)
    assert resumed.report == complete.report
    for target in (0, 2):
        assert torch.equal(
            resumed.source_signal(cnn.x[:4], target), complete.source_signal(cnn.x[:4], target)
        )


def test_a_fit_interrupted_before_anything_was_solved_begins_anew(mlp: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    inverse = _interrupted(mlp.model, mlp.x, path, (2, 3))
    assert not path.exists()
    inverse.fit(Batches(mlp.x), [0, 2], checkpoint=path, **_settings(mlp.x))
    expected = InverseNetwork(mlp.model).fit(Batches(mlp.x), [0, 2], **_settings(mlp.x))
    assert torch.equal(inverse.source_signal(mlp.x[:4], 2), expected.source_signal(mlp.x[:4], 2))
    assert not path.exists()


def test_the_checkpoint_of_a_fit_that_adds_classes(mlp: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    inverse = InverseNetwork(mlp.model).fit(Batches(mlp.x), 1, **_settings(mlp.x))
    before = inverse.source_signal(mlp.x[:4], 1)
    stopping = Batches(mlp.x, batch_at(3, 2, interrupt))
    with pytest.raises(KeyboardInterrupt):
        inverse.fit(stopping, [0, 2], checkpoint=path, **_settings(mlp.x))
    assert inverse.targets == [1]
    assert torch.equal(inverse.source_signal(mlp.x[:4], 1), before)
    assert inverse.fit(Batches(mlp.x), [0, 2], checkpoint=path, **_settings(mlp.x)).targets == [
        1,
        0,
        2,
    ]
    complete = InverseNetwork(mlp.model).fit(Batches(mlp.x), **_settings(mlp.x))
    for target in (0, 1, 2):
        assert torch.equal(
            inverse.source_signal(mlp.x[:4], target), complete.source_signal(mlp.x[:4], target)
        )


def test_the_checkpoint_of_another_fit_is_refused_and_kept(
    mlp: Any, make_mlp: Any, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    _interrupted(mlp.model, mlp.x, path)
    kept = path.read_bytes()
    changed = make_mlp()
    with torch.no_grad():
        changed[2].bias[0] += 1e-3
    for inverse, targets, message in (
        (InverseNetwork(mlp.model), [0, 1], "its classes, data differ"),
        (InverseNetwork(mlp.model, ridge=0.5), [0, 2], "its settings differ"),
        (InverseNetwork(mlp.model, layer=mlp.model[0]), [0, 2], "its layer differ"),
        (InverseNetwork(changed), [0, 2], "its fingerprint, data differ"),
    ):
        with pytest.raises(InverseFileError, match=rf"checkpoint .* is of another fit: {message}"):
            inverse.fit(Batches(mlp.x), targets, checkpoint=path, **_settings(mlp.x))
        assert inverse.targets == []
        assert path.read_bytes() == kept


def test_data_is_the_same_where_outputs_differ_by_the_rounding_of_another_machine(
    mlp: Any, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    _interrupted(mlp.model, mlp.x, path)
    with pytest.raises(InverseFileError, match="its data differ"):
        InverseNetwork(mlp.model).fit(mlp.x * 1.01, [0, 2], checkpoint=path, **_settings(mlp.x))
    rounded = mlp.x * (1 + 1e-6)
    inverse = InverseNetwork(mlp.model).fit(rounded, [0, 2], checkpoint=path, **_settings(mlp.x))
    assert inverse.targets == [0, 2]


def test_the_range_of_each_output_identifies_the_data(mlp: Any, tmp_path: Path) -> None:
    path, model, x = tmp_path / "checkpoint", copy.deepcopy(mlp.model), mlp.x
    with torch.no_grad():
        model[-1].weight[0] *= 5000
    _interrupted(model, x, path)
    last = model[:-1](x).detach()
    where = (last @ model[-1].weight[2]).argmax()  # which makes the range of output 2 larger
    other = x.clone()
    other[where] = x[where] * 1.05
    with pytest.raises(InverseFileError, match="its data differ"):
        InverseNetwork(model).fit(other, [0, 2], checkpoint=path, **_settings(x))


def test_a_checkpoint_is_no_inverse_and_an_inverse_no_checkpoint(mlp: Any, tmp_path: Path) -> None:
    path, saved = tmp_path / "checkpoint", tmp_path / "saved"
    mlp.inverse.save(saved)
    _interrupted(mlp.model, mlp.x, path)
    with pytest.raises(
        InverseFileError,
        match=r"checkpoint of an unfinished fit: continue it with fit\(checkpoint=",
    ):
        InverseNetwork.load(path, mlp.model)
    whole = saved.read_bytes()
    with pytest.raises(InverseFileError, match="is of another fit: its classes, data differ"):
        InverseNetwork(mlp.model).fit(mlp.x, checkpoint=saved, **_settings(mlp.x))
    assert saved.read_bytes() == whole


def test_a_damaged_checkpoint_is_refused_and_kept(mlp: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    _interrupted(mlp.model, mlp.x, path)
    half = path.read_bytes()[:200]
    path.write_bytes(half)
    with pytest.raises(InverseFileError, match="not a complete safetensors file"):
        InverseNetwork(mlp.model).fit(Batches(mlp.x), [0, 2], checkpoint=path, **_settings(mlp.x))
    assert path.read_bytes() == half
