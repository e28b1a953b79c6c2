"""What users pass, and models that are refused before they are captured."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from captum_mipin import InverseNetwork, MIPINAttribution, check
from captum_mipin.errors import CaptureError, InputError, TrainingModeError
from captum_mipin.graph.capture import capture
from captum_mipin.methods import LRP


def test_functions_and_training_models_are_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"function, expected a torch\.nn\.Module.*Wrap a function"
    ):
        capture(lambda x: x, (torch.ones(1, 1),))  # type: ignore[arg-type]  # no module, on purpose
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout())).eval()
    model[1][0].train()
    with pytest.raises(
        TrainingModeError, match=r"training mode, in which '1\.0' \(Dropout\) may .*model\.eval\(\)"
    ):
        capture(model, (torch.ones(1, 2),))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "no input tensor"),
        (([1.0],), "input 0 is a list, expected a torch.Tensor"),
        ((torch.ones(2, 2, dtype=torch.long),), "dtype torch.int64, expected a floating dtype"),
        ((torch.ones(2, 2, dtype=torch.bool),), "dtype torch.bool, expected a floating dtype"),
        ((torch.ones(2, 2).to_sparse(),), "torch.sparse_coo, expected a dense tensor.*to_dense"),
        ((torch.tensor(1.0),), r"input 0 is empty: its shape is \(\)"),
        ((torch.ones(0, 2),), r"input 0 is empty: its shape is \(0, 2\)"),
        ((torch.ones(2, 0),), r"input 0 is empty: its shape is \(2, 0\)"),
        ((torch.ones(2, 2), torch.ones(3, 2)), "input 1 has 3 examples, input 0 has 2"),
    ],
)
def test_inputs_that_carry_no_signal_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(nn.Linear(2, 2).eval(), inputs)


def _pruned_twice(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "weight", 0.2)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils:FutureWarning")
@pytest.mark.parametrize("layer", [lambda: nn.Linear(18, 3), lambda: nn.Conv2d(2, 3, 3)])
@pytest.mark.parametrize(
    ("make", "undo"),
    [
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        (_pruned_twice, lambda layer: prune.remove(layer, "weight")),
    ],
)
def test_weights_that_hooks_make_need_not_be_fixed_before(make: Any, undo: Any, layer: Any) -> None:
    torch.manual_seed(0)
    last = layer()
    dense = isinstance(last, nn.Linear)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), *[nn.Flatten()] * dense, last)
    model.append(nn.Identity() if dense else nn.Flatten())
    make(last)
    x = torch.randn(20, 1, 5, 5)
    model(x)
    model.eval()
    weight, maps = last.weight, []
    for again in range(2):
        inverse = InverseNetwork(model).fit(x, targets=1, progress=False)
        maps.append((LRP(model).attribute(x, 1), MIPINAttribution(model, inverse).attribute(x, 1)))
        if not again:
            assert last.weight is weight
            undo(last)
    assert torch.equal(maps[0][0], maps[1][0])
    assert torch.equal(maps[0][1], maps[1][1])


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)
def test_what_torchscript_compiled_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), torch.jit.script(nn.Linear(3, 2))).eval()
    with pytest.raises(CaptureError, match="module '1' is compiled by TorchScript"):
        check(model, torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(4), torch.randn(4)])
    with pytest.raises(InputError, match="input 0 is a nested tensor"):
        check(nn.Linear(4, 3).eval(), nested)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no processes that talk to each other here")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*NO_SHARD", "ignore::FutureWarning")
@pytest.mark.parametrize("version", ["FSDP", "FSDP 2", "tensor parallel"])
def test_a_sharded_model_is_refused_and_its_whole_weights_are_taken(
    version: str, group: None
) -> None:
    from torch.distributed import fsdp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    plain, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.ones(2, 4)
    sharded = copy.deepcopy(plain)
    if version == "FSDP":
        sharded[0] = fsdp.FullyShardedDataParallel(sharded[0], device_id=torch.device("cpu"))
    elif version == "FSDP 2":
        fsdp.fully_shard(sharded[0], mesh=init_device_mesh("cpu", (1,)))
    else:
        parallelize_module(sharded, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
    how = "by FSDP" if "FSDP" in version else "as DTensors"
    with pytest.raises(CaptureError, match=rf"module '0' is sharded {how}.*get_model_state_dict"):
        check(sharded, x)
    # the way out that the message names
    options = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(sharded, options=options)
    whole = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    whole.load_state_dict(weights)
    torch.testing.assert_close(LRP(whole).attribute(x, 1), LRP(plain).attribute(x, 1))


class Sparse(torch.nn.Module):
    """A network of a graph, whose matrix may be sparse."""

    def __init__(self, convert: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(5, 2)
        self.register_buffer("A", convert(torch.eye(5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer((self.A @ x.T).T)
        return y


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_matrix_is_refused_by_name(convert: Any) -> None:
    model = Sparse(convert).eval()
    with pytest.raises(CaptureError, match=r"'A' of the model has the layout torch\.sparse_\w+.*"):
        check(model, torch.randn(3, 5))
    model.A = model.A.to_dense()  # as the error says
    assert check(model, torch.randn(3, 5)).ok


def test_a_sparse_matrix_that_no_module_holds_is_refused_by_name() -> None:
    matrix, x = torch.eye(5).to_sparse(), torch.randn(3, 5)

    class Closure(Sparse):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer((matrix @ x.T).T)
            return y

    with pytest.raises(CaptureError, match=r"matmul with a tensor of the layout torch\.sparse_coo"):
        check(Closure(torch.Tensor.clone).eval(), x)
    matrix = matrix.to_dense()  # as the error says
    assert check(Closure(torch.Tensor.clone).eval(), x).ok


def test_writes_to_the_data_of_a_parameter_are_refused_with_the_way_out() -> None:
    class Clamped(Sparse):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.layer.bias.data.clamp_(min=0)
            y: torch.Tensor = self.layer(x)
            return y

    with pytest.raises(CaptureError, match=r"writes to its weights .layer.bias. in place"):
        check(Clamped(torch.Tensor.clone).eval(), torch.randn(3, 5))


@pytest.mark.filterwarnings("ignore")  # torch's, of its own quantised layers
def test_dynamically_quantised_layers_are_refused_with_the_reason() -> None:
    layer = torch.ao.nn.quantized.dynamic.Linear(4, 2)
    model = torch.nn.Sequential(torch.nn.ReLU(), layer).eval()
    with pytest.raises(CaptureError, match=r"module '1' \(Linear\) is quantised.*from before"):
        check(model, torch.randn(3, 4))
