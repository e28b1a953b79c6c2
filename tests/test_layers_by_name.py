"""A layer may be passed as a module or by its dotted name, and a model as its bound forward."""

from typing import Any

import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn

from captum_mipin import (
    IBA,
    InverseNetwork,
    LayerMIPINAttribution,
    MIPINAttribution,
    check,
    compare,
)
from captum_mipin.bottleneck import InputIBA
from captum_mipin.errors import CaptureError, InputError
from captum_mipin.inverse import NeighbourInverse
from captum_mipin.methods import LRP, GradCAM, LayerPropagation, Patterns


@pytest.mark.parametrize(
    "make",
    [
        lambda model, layer: InverseNetwork(model, layer=layer).layer,
        lambda model, layer: NeighbourInverse(model, layer=layer).layer,
        lambda model, layer: NeighbourInverse(model, feature=layer).feature,
        lambda model, layer: LayerMIPINAttribution(model, InverseNetwork(model), layer).layer,
        lambda model, layer: LayerPropagation(LRP(model), layer).layer,
        lambda model, layer: GradCAM(model, layer).layer,
        lambda model, layer: Patterns(model, layer=layer).layer,
        lambda model, layer: IBA(model, layer).layer,
        lambda model, layer: InputIBA(model, "1", input_layer=layer).input_layer,
    ],
)
def test_a_layer_by_name(make: Any) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3)).eval()
    for wrapped in (model, nn.DataParallel(model)):
        assert make(wrapped, "0.1") is make(wrapped, model[0][1]) is model[0][1]
    if "iba" not in str(make.__code__.co_names).lower():  # there another name is that of a tensor
        with pytest.raises(InputError, match=r"layer is '0\.2', expected .*one of '0\.1', '0\.0'"):
            make(model, "0.2")
    with pytest.raises(InputError, match=r"a Linear, expected a module of the Sequential that is"):
        make(model, nn.Linear(4, 4))


def test_maps_of_a_layer_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.randn(20, 1, 4, 4)
    expected = LayerGradCam(model, model[1]).attribute(x, 0, relu_attributions=True)
    assert torch.equal(GradCAM(model, "1").attribute(x, 0).amax((2, 3)), expected.amax((2, 3)))
    assert str(check(model, x, layer="1")) == str(check(model, x, layer=model[1]))


def test_a_compiled_part_is_a_layer_and_so_are_its_modules() -> None:
    def net(compiled: bool) -> Any:
        torch.manual_seed(0)
        block: Any = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        block = torch.compile(block, backend="eager") if compiled else block
        return nn.Sequential(block, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()

    def mipin(model: Any, layer: Any) -> Any:
        inverse = InverseNetwork(model, layer=layer).fit(x, progress=False)
        return LayerMIPINAttribution(model, inverse).attribute(x[:2], 1)

    methods = {
        "LRP": lambda model, layer: LayerPropagation(LRP(model), layer).attribute(x, 1),
        "Grad-CAM": lambda model, layer: GradCAM(model, layer).attribute(x, 1),
        "IBA": lambda m, layer: IBA(m, layer).estimate(x, progress=False).attribute(x[:2], 1),
        "MIP-IN": mipin,
    }
    model, same, x = net(True), net(False), torch.randn(20, 1, 6, 6)
    model(x)  # compiled before any method runs: Captum's hooks inside would be skipped
    whole, part = model[0]._orig_mod, model[0]._orig_mod[0]
    for name, method in methods.items():
        expected = method(same, "0"), method(same, "0.0")
        for layer in ("0", "0._orig_mod", model[0], whole) if name == "LRP" else ("0", model[0]):
            torch.testing.assert_close(method(model, layer), expected[0])
        for layer in ("0.0", "0._orig_mod.0", part) if name == "LRP" else ("0.0", part):
            torch.testing.assert_close(method(model, layer), expected[1])
    assert [row.path for row in check(model, x, layer="0").rows] == ["1", "2", "3"]


def test_a_bound_forward_stands_for_its_model(mlp: Any) -> None:
    model, x = mlp.model, mlp.x
    inverse = InverseNetwork(model.forward).fit(x, progress=False)
    expected = mlp.mipin.attribute(x[:2], 0)
    assert torch.equal(MIPINAttribution(model.forward, inverse).attribute(x[:2], 0), expected)
    assert torch.equal(LRP(model.forward).attribute(x, 0), LRP(model).attribute(x, 0))
    assert not check(model.forward, x).refused
    assert torch.equal(LRP(model.__call__).attribute(x, 0), LRP(model).attribute(x, 0))
    for bound in (model.forward, model.__call__):
        found = compare(["LRP"], x[:2], 0, model=bound, metrics=["deletion"], progress=False)
        assert found["LRP"].maps is not None
    with pytest.raises(CaptureError, match="the model is a method, expected"):
        LRP(model.state_dict).attribute(x, 0)


@pytest.mark.parametrize("layer", ["0", 0])
def test_grad_cam_of_a_function_is_refused(layer: Any) -> None:
    """Formerly the hooks were looked for in the function: an AttributeError."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    with pytest.raises(CaptureError, match=r"the model is a function, .* nn\.Module that has the"):
        GradCAM(lambda x: model(x), layer or model[0])
