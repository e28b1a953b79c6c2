"""Each kind of file: written by version 0.1 before the classes shared code, and still loaded.

``saved/`` holds one file a kind, of a model and data that lie in ``expected.safetensors`` together
with the maps that were computed when the files were written.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from captum_mipin import IBA, InputIBA, InverseNetwork, NeighbourInverse
from captum_mipin.errors import InverseFileError, ModelChangedError
from captum_mipin.graph.capture import capture
from captum_mipin.methods import PatternAttribution, Patterns
from captum_mipin.propagation.fingerprint import structure
from captum_mipin.rules import table
from captum_mipin.storage import files

SAVED = Path(__file__).parent / "saved"
EXPECTED = load_file(SAVED / "expected.safetensors")
X = EXPECTED["x"]
KINDS: dict[str, Any] = {
    "inverse": InverseNetwork,
    "neighbours": NeighbourInverse,
    "patterns": Patterns,
    "iba": IBA,
    "input_iba": InputIBA,
}


@pytest.fixture(name="model")
def model_() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    prefix = "model."
    model.load_state_dict(
        {key.removeprefix(prefix): t for key, t in EXPECTED.items() if key.startswith(prefix)}
    )
    return model


def path_of(kind: str) -> Path:
    return SAVED / f"{kind}.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_saved_to_the_same_file(
    model: nn.Module, tmp_path: Path, kind: str
) -> None:
    KINDS[kind].load(path_of(kind), model).save(tmp_path / "again")
    (tensors, content), (again, same) = (files.load(p) for p in (path_of(kind), tmp_path / "again"))
    assert same == {**content, **({"version": same["version"]} if "version" in same else {})}
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_what_is_loaded_gives_the_same_maps(model: nn.Module) -> None:
    inverse = InverseNetwork.load(path_of("inverse"), model)
    neighbours = NeighbourInverse.load(path_of("neighbours"), model)
    layer = model.get_submodule("1")
    patterns = PatternAttribution(model, Patterns.load(path_of("patterns"), model))
    maps = {
        "inverse": inverse.source_signal(X[:2], 2),
        "information": inverse.information(2),
        "neighbours": neighbours.explain((X[:2],), 1, biases=(True,), layer=layer).signals[0][0],
        "patterns": patterns.attribute(X[:2], target=2),
    }
    for name, found in maps.items():
        torch.testing.assert_close(found, EXPECTED[name], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_is_no_inverse_and_is_taken_up(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copy(path_of("checkpoint"), path)
    with pytest.raises(InverseFileError, match="checkpoint of an unfinished fit"):
        InverseNetwork.load(path, model)
    inverse = InverseNetwork(model)
    inverse.fit(X, targets=[0, 2], progress=False, checkpoint=path)
    assert not path.exists()
    found = inverse.source_signal(X[:2], 2)
    torch.testing.assert_close(found, EXPECTED["inverse"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_another_kind_or_model_is_refused(model: nn.Module, kind: str) -> None:
    for other in KINDS.keys() - {kind}:
        with pytest.raises(InverseFileError, match=r"does not contain .*: load it with the class"):
            KINDS[kind].load(path_of(other), model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ModelChangedError, match="fitted to another model or to other weights"):
        KINDS[kind].load(path_of(kind), model)


class Halves(nn.Module):
    """A network that works on the halves of its features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        one, other = self.first(x).chunk(2, 1)
        return self.last(torch.relu(one) + other)


def test_a_chunk_has_the_structure_that_earlier_files_name() -> None:
    captured = capture(Halves().eval(), (torch.zeros(2, 8),))
    expected = "1e93a7a30a2d9f48bbf9f3adda5c41b1e7c789d95e07a4dd4d15382c60224074"
    assert structure(captured, table()) == expected


def test_a_fit_with_other_names_of_steps_is_told_to_be_of_an_older_version(
    model: nn.Module, tmp_path: Path
) -> None:
    tensors, content = files.load(path_of("inverse"))
    for entry in content["targets"]:
        entry["keys"] = [key.replace("3/linear", "3/addmm") for key in entry["keys"]]
    files.save(tmp_path / "old", tensors, content)
    inverse = InverseNetwork.load(tmp_path / "old", model)
    with pytest.raises(ModelChangedError, match=r"has no 3/linear, .*older captum-mipin wrote"):
        inverse.source_signal(X, 0)
