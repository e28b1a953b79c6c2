"""Files of fitted inverses, and the watch over a model's weights."""

import copy
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from captum_mipin.errors import InverseFileError
from captum_mipin.storage import files as storage

TENSORS = {
    "0.weight": torch.arange(12.0).reshape(3, 4),
    "0.bias": torch.tensor([1.5], dtype=torch.float64),
    "live": torch.arange(3),
}
CONTENT = {"targets": [[0], [1]], "name": "ü", "none": None, "ridge": 1e-3}


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text("ab.0é", min_size=1, max_size=6),
        st.tuples(
            st.lists(st.integers(0, 3), max_size=3),
            st.sampled_from(
                [
                    torch.float16,
                    torch.bfloat16,
                    torch.float32,
                    torch.float64,
                    torch.int64,
                    torch.bool,
                ]
            ),
        ),
        max_size=4,
    ),
    st.dictionaries(
        st.text(max_size=5),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    ),
)
def test_what_is_saved_is_read_back_to_the_bit(
    shapes: dict[str, Any], content: dict[str, Any]
) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        storage.save(path, tensors, content)
        found, read = storage.load(path)
        assert os.listdir(folder) == [path.name]  # noqa: PTH208  # hidden files count too
    assert read == content
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def test_saving_takes_tensors_as_they_lie(tmp_path: Path) -> None:
    whole = torch.randn(4, 6, requires_grad=True)
    tensors = {"a": whole.T, "b": whole[:, ::2], "c": whole[:0]}
    storage.save(tmp_path / "f", tensors, {})
    found, _ = storage.load(tmp_path / "f")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_file_is_safetensors_with_a_digest_and_no_code(tmp_path: Path) -> None:
    storage.save(tmp_path / "f", TENSORS, CONTENT)
    with safe_open(tmp_path / "f", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "content", "digest"}
    assert metadata["format"] == storage.FORMAT
    assert json.loads(metadata["content"]) == CONTENT


def test_the_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        storage.save(tmp_path / "f", TENSORS, CONTENT)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    storage.save(str(tmp_path / "f"), TENSORS, CONTENT)
    assert storage.load(str(tmp_path / "f"))[1] == CONTENT


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    storage.save(path, TENSORS, CONTENT)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(
            whole[:position]
            + bytes([whole[position] ^ (1 << position % 8)])
            + whole[position + 1 :]
        )
        with pytest.raises(InverseFileError, match=r"format|damaged|whole safetensors"):
            storage.load(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    storage.save(path, TENSORS, CONTENT)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InverseFileError, match="whole safetensors file"):
            storage.load(path)


def test_changed_content_does_not_match_its_digest(tmp_path: Path) -> None:
    storage.save(tmp_path / "f", TENSORS, CONTENT)
    with safe_open(tmp_path / "f", framework="pt") as file:
        metadata = dict(file.metadata())
    metadata["content"] = metadata["content"].replace("0.001", "0.002")
    save_file(TENSORS, tmp_path / "f", metadata)
    with pytest.raises(InverseFileError, match="damaged or was changed"):
        storage.load(tmp_path / "f")


def test_foreign_files_are_told_apart(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "plain")
    with pytest.raises(InverseFileError, match=f"format None, expected '{storage.FORMAT}'"):
        storage.load(tmp_path / "plain")
    save_file(TENSORS, tmp_path / "newer", {"format": "captum-mipin-inverse-999"})
    with pytest.raises(InverseFileError, match="captum-mipin-inverse-999"):
        storage.load(tmp_path / "newer")
    torch.save(TENSORS, tmp_path / "pickle")
    with pytest.raises(InverseFileError, match=r"pickle.*not a whole safetensors file"):
        storage.load(tmp_path / "pickle")
    with pytest.raises(FileNotFoundError, match="nothing"):
        storage.load(tmp_path / "nothing")


def test_content_that_is_not_ours_is_a_file_error(tmp_path: Path) -> None:
    text = "not JSON"
    save_file(
        TENSORS,
        tmp_path / "f",
        {"format": storage.FORMAT, "content": text, "digest": storage._digest(TENSORS, text)},
    )
    with pytest.raises(InverseFileError):
        storage.load(tmp_path / "f")


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()


def test_the_fingerprint_tells_names_shapes_dtypes_and_values() -> None:
    model = _model()
    same = storage.fingerprint(model)
    assert (
        storage.fingerprint(copy.deepcopy(model)) == same == storage.fingerprint(_model().train())
    )
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
    prints = [storage.fingerprint(other) for other in others]
    assert len({same, *prints}) == len(others) + 1


def test_the_watch_notices_changes_and_their_undoing() -> None:
    model = _model()
    watch = storage.Watch(model)
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
    watch = storage.Watch(model)
    with torch.no_grad():
        model[0].weight[0, 1] += 1
    assert watch.changed(model)


def test_the_watch_takes_models_without_weights_and_with_nan_buffers() -> None:
    empty = nn.ReLU()
    assert not storage.Watch(empty).changed(empty)
    model = _model()
    model.register_buffer("unused", torch.tensor(float("nan")))
    assert not storage.Watch(model).changed(model)


WEIGHTS = {
    "with gaps": torch.randn(8, 8)[:, :4],
    "every other": torch.randn(8)[::2],
    "expanded": torch.randn(4, 1).expand(4, 6),
    "one of a row": torch.randn(1, 5)[:, 0],
    "conjugate": torch.randn(4, 4, dtype=torch.complex64).conj(),
    "transposed": torch.randn(3, 4).t(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "a number": torch.tensor(3.0),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_watched_however_they_lie_in_memory(name: str) -> None:
    model = nn.Module()
    model.w = nn.Parameter(WEIGHTS[name].detach())
    watch = storage.Watch(model)
    assert not watch.changed(model)
    model.w.data[(0,) * model.w.ndim] += 1  # which torch does not count
    assert watch.changed(model)


def test_what_lies_in_the_gaps_is_no_weight() -> None:
    memory, model = torch.randn(8, 8), nn.Module()
    model.w = nn.Parameter(memory[:, :4])
    watch = storage.Watch(model)
    memory[0, 5] += 1
    assert not watch.changed(model)
