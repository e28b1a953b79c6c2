"""Weights of a tensor subclass that keeps them in 8 bits, as torchao's do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from captum_mipin import InverseNetwork, MIPINAttribution, check
from captum_mipin.errors import CaptureError, ModelChangedError
from captum_mipin.methods import LRP

aten = torch.ops.aten
X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))


class Bytes(Tensor):
    """Whole numbers of 8 bits and a scale; ``coarse`` rounds the results of layers as well."""

    whole: Tensor
    scale: Tensor
    coarse: bool

    @staticmethod
    def __new__(cls, whole: Tensor, scale: Tensor, coarse: bool) -> "Bytes":
        result: Any = torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)
        result.whole, result.scale, result.coarse = whole, scale, coarse
        return result  # type: ignore[no-any-return]

    def __init__(self, *arguments: Any) -> None:
        pass

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["whole", "scale"], self.coarse

    @staticmethod
    def __tensor_unflatten__(parts: Any, coarse: Any, *sizes: Any) -> "Bytes":
        return Bytes(parts["whole"], parts["scale"], coarse)

    def dequantize(self) -> Tensor:
        return self.whole.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if function is aten.detach.default:
            return cls(args[0].whole, args[0].scale, args[0].coarse)
        if function is aten.view.default:
            raise NotImplementedError("no view of these weights")
        leaves = pytree.tree_leaves(args)
        coarse = any(isinstance(leaf, cls) and leaf.coarse for leaf in leaves)
        args = pytree.tree_map_only(cls, cls.dequantize, args)
        result = function(*args, **(kwargs or {}))
        return result.mul(4).round().div(4) if coarse and result.is_floating_point() else result


def _quantised(model: nn.Module, coarse: bool) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            scale = weight.abs().max() / 127
            kept = Bytes((weight / scale).round().to(torch.int8), scale, coarse)
            layer.weight = nn.Parameter(kept, requires_grad=False)
    return model


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def test_quantised_weights_count_as_the_numbers_that_they_stand_for() -> None:
    model, floating = _quantised(_model(), False), _model()
    for layer, other in ((model[0], floating[0]), (model[2], floating[2])):  # type: ignore[index]
        other.weight = nn.Parameter(layer.weight.dequantize())
    before = [layer.weight for layer in (model[0], model[2])]  # type: ignore[index]
    maps = []
    for one in (model, floating):
        inverse = InverseNetwork(one).fit(X, targets=1, progress=False)
        maps.append((LRP(one).attribute(X, 1), MIPINAttribution(one, inverse).attribute(X, 1)))
        assert check(one, X).ok
    assert torch.equal(maps[0][0], maps[1][0])
    assert torch.equal(maps[0][1], maps[1][1])
    assert [layer.weight for layer in (model[0], model[2])] == before  # type: ignore[index]


def test_a_change_of_quantised_weights_is_noticed() -> None:
    model = _quantised(_model(), False)
    inverse = InverseNetwork(model).fit(X, targets=1, progress=False)
    model[0].weight.whole[0, 0] += 1  # type: ignore[index]
    with pytest.raises(ModelChangedError):
        MIPINAttribution(model, inverse).attribute(X, 1)


@pytest.mark.captured_anew
def test_a_model_that_computes_in_a_quantised_form_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"type Bytes, .*its activations are quantised as well"):
        check(_quantised(_model(), True), X)
