"""Files of tensors and content: whole or not at all, and every change is noticed."""

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

from captum_mipin.errors import InverseFileError
from captum_mipin.storage import files

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
        files.save(path, tensors, content)
        found, read = files.load(path)
        assert os.listdir(folder) == [path.name]  # noqa: PTH208  # hidden files count too
    assert read == content
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def test_saving_takes_tensors_as_they_lie(tmp_path: Path) -> None:
    whole = torch.randn(4, 6, requires_grad=True)
    tensors = {"a": whole.T, "b": whole[:, ::2], "c": whole[:0]}
    files.save(tmp_path / "f", tensors, {})
    found, _ = files.load(tmp_path / "f")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_file_is_safetensors_with_a_digest_and_no_code(tmp_path: Path) -> None:
    files.save(tmp_path / "f", TENSORS, CONTENT)
    with safe_open(tmp_path / "f", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "content", "digest"}
    assert metadata["format"] == files.FORMAT
    assert json.loads(metadata["content"]) == CONTENT


def test_the_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.save(tmp_path / "f", TENSORS, CONTENT)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    files.save(str(tmp_path / "f"), TENSORS, CONTENT)
    assert files.load(str(tmp_path / "f"))[1] == CONTENT


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    files.save(path, TENSORS, CONTENT)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(
            whole[:position]
            + bytes([whole[position] ^ (1 << position % 8)])
            + whole[position + 1 :]
        )
        with pytest.raises(InverseFileError, match=r"format|damaged|complete safetensors"):
            files.load(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    files.save(path, TENSORS, CONTENT)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InverseFileError, match="complete safetensors file"):
            files.load(path)


def test_changed_content_does_not_match_its_digest(tmp_path: Path) -> None:
    files.save(tmp_path / "f", TENSORS, CONTENT)
    with safe_open(tmp_path / "f", framework="pt") as file:
        metadata = dict(file.metadata())
    metadata["content"] = metadata["content"].replace("0.001", "0.002")
    save_file(TENSORS, tmp_path / "f", metadata)
    with pytest.raises(InverseFileError, match="damaged or was changed"):
        files.load(tmp_path / "f")


def test_foreign_files_are_told_apart(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "plain")
    with pytest.raises(InverseFileError, match=f"format None, expected '{files.FORMAT}'"):
        files.load(tmp_path / "plain")
    save_file(TENSORS, tmp_path / "newer", {"format": "captum-mipin-inverse-999"})
    with pytest.raises(InverseFileError, match="captum-mipin-inverse-999"):
        files.load(tmp_path / "newer")
    torch.save(TENSORS, tmp_path / "pickle")
    with pytest.raises(InverseFileError, match=r"pickle.*not a complete safetensors file"):
        files.load(tmp_path / "pickle")
    with pytest.raises(FileNotFoundError, match="nothing"):
        files.load(tmp_path / "nothing")


def test_content_that_is_not_ours_is_a_file_error(tmp_path: Path) -> None:
    text = "not JSON"
    save_file(
        TENSORS,
        tmp_path / "f",
        {"format": files.FORMAT, "content": text, "digest": files._digest(TENSORS, text)},
    )
    with pytest.raises(InverseFileError):
        files.load(tmp_path / "f")
