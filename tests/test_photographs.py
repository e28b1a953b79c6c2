"""The layer and the reading that are proposed for photographs."""

import copy

import pytest
import torch
from captum.attr import LayerGradientXActivation, NoiseTunnel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_mipin import InverseNetwork, LayerMIPINAttribution, compare, for_photographs
from captum_mipin.comparison.arguments import named_methods
from captum_mipin.errors import DenseHeadWarning, InputError
from captum_mipin.methods import patch_map
from captum_mipin.photographs import photograph_layer


def network():
    """A network with three stages, of 8, 16 and 32 pixels per place."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(5, 6, 3, stride=2, padding=1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).eval()


@pytest.fixture(scope="module")
def fitted():
    model, x = network(), torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return model, x, for_photographs(model, x, targets=[0, 2], progress=False)


def test_the_map_is_a_times_gradient_of_absolute_values(fitted):
    """From Captum's gradient and the plain attribution at the same layer."""
    model, x, mipin = fitted
    assert mipin.picked == "MIP-IN unsigned × gradient at 1"
    inverse = InverseNetwork(model, layer=model[1]).fit(x, targets=[0, 2], progress=False)
    a = LayerMIPINAttribution(model, inverse).attribute(x[:4], target=[0, 2, 0, 0])
    slope = LayerGradientXActivation(model, model[1], multiply_by_inputs=False)
    expected = (a * slope.attribute(x[:4], target=[0, 2, 0, 0])).abs().sum(1, keepdim=True)
    maps = mipin.attribute(x[:4], target=[0, 2, 0, 0])
    assert maps.shape == (4, 1, 4, 4)
    torch.testing.assert_close(maps, expected.detach())
    plain = mipin.attribute(x[:4], target=[0, 2, 0, 0], multiply_by_gradients=False)
    torch.testing.assert_close(plain, a.abs().sum(1, keepdim=True))


def test_classes_are_fitted_when_they_are_explained(fitted):
    """From a loader with labels and from a generator of batches, with the same maps."""
    model, x, mipin = fitted
    loader = DataLoader(TensorDataset(x, torch.zeros(24)), batch_size=8)
    for data in (loader, (part for part in x.split(8))):
        lazy = for_photographs(model, data, progress=False)
        expected = mipin.attribute(x[:2], target=2)
        torch.testing.assert_close(lazy.attribute(x[:2], target=2), expected)


def test_a_file_keeps_that_it_is_for_photographs(fitted, tmp_path):
    model, x, mipin = fitted
    mipin.inverse.save(tmp_path / "picked.safetensors")
    loaded = InverseNetwork.load(tmp_path / "picked.safetensors", model)
    assert loaded.photographs == "unsigned × gradient"
    InverseNetwork(model, layer="1").fit(x, 0, progress=False).save(tmp_path / "other.safetensors")
    assert not InverseNetwork.load(tmp_path / "other.safetensors", model).photographs


def test_it_is_a_method_as_any_other(fitted):
    model, x, mipin = fitted
    before = copy.deepcopy(model.state_dict())
    found = compare({mipin.picked: mipin}, x[:3], 0, metrics=[], progress=False)
    assert [row.name for row in found.rows][-1] == "pattern only"
    assert found.rows[0].caption == mipin.picked
    assert not any(row.errors for row in found.rows)
    assert NoiseTunnel(mipin).attribute(x[:1], nt_samples=2, target=0).shape == (1, 1, 4, 4)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "layer3"),
        ("squeezenet1_1", "features.11"),
        ("mobilenet_v2", "features.13"),
        ("mobilenet_v3_small", "features.8"),
        ("shufflenet_v2_x0_5", "stage3"),
        ("densenet121", "features.denseblock3"),
        ("regnet_y_400mf", "trunk_output.block3"),
    ],
)
def test_it_is_the_last_layer_of_about_14_places_before_another_window(name, expected):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    picked = photograph_layer(model, (torch.rand(1, 3, 224, 224),))
    assert picked == (expected, "unsigned × gradient")


@pytest.mark.parametrize("name", ["vgg11", "alexnet"])
def test_a_dense_head_is_told_and_read_where_it_begins(name):
    models = pytest.importorskip("torchvision.models")
    with pytest.warns(DenseHeadWarning, match=r"all places of 'avgpool' at once.*LayerPropagation"):
        picked = photograph_layer(models.get_model(name).eval(), (torch.rand(1, 3, 224, 224),))
    assert picked == ("avgpool", "unsigned × feature")


def test_the_map_at_a_dense_head_is_a_times_feature(tmp_path):
    """From Captum's activation and the plain attribution at the same layer; files keep it."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4 * 4 * 4, 6), nn.ReLU())
    model = nn.Sequential(body, head, nn.Linear(6, 3)).eval()
    x = torch.rand(24, 3, 64, 64)
    with pytest.warns(DenseHeadWarning) as caught:
        mipin = for_photographs(model, x, targets=[1], progress=False)
    assert {warning.filename for warning in caught} == {__file__}
    assert mipin.picked == "MIP-IN unsigned × feature at 0"
    inverse = InverseNetwork(model, layer="0").fit(x, targets=[1], progress=False)
    a = LayerMIPINAttribution(model, inverse).attribute(x[:4], target=1)
    expected = (a * body(x[:4])).abs().sum(1, keepdim=True)
    torch.testing.assert_close(mipin.attribute(x[:4], target=1), expected.detach())
    slope = LayerGradientXActivation(model, model[0], multiply_by_inputs=False)
    steep = (a * slope.attribute(x[:4], target=1)).abs().sum(1, keepdim=True)
    options = {"multiply_by_features": False, "multiply_by_gradients": True}
    torch.testing.assert_close(mipin.attribute(x[:4], target=1, **options), steep.detach())
    mipin.inverse.save(tmp_path / "dense.safetensors")
    loaded = InverseNetwork.load(tmp_path / "dense.safetensors", model)
    assert loaded.photographs == "unsigned × feature"
    assert list(named_methods([mipin])) == ["MIP-IN unsigned × feature"]
    found = compare(["MIP-IN unsigned x feature"], x[:4], 1, inverse=loaded, metrics=[],
                    controls=False, progress=False)  # fmt: skip
    torch.testing.assert_close(found.rows[0].maps, expected.detach())


def test_a_layer_may_be_named(fitted):
    model, x, _ = fitted
    mipin = for_photographs(model, x, 0, layer="2.1", progress=False)
    assert mipin.picked == "MIP-IN unsigned × gradient at 2.1"
    assert mipin.attribute(x[:1], target=0).shape == (1, 1, 2, 2)
    with pytest.raises(
        InputError, match=r"layer is '5\.weight', expected a module .*named_modules"
    ):
        for_photographs(model, x, 0, layer="5.weight", progress=False)


def test_what_has_no_such_layer_is_refused_with_the_way_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match=r"12 to 20 pixels.*0 \(62\), 1 \(62\).*layer="):
        for_photographs(model.eval(), torch.rand(4, 3, 64, 64), 0, progress=False)
    with pytest.raises(InputError, match=r"shape \(4, 9\), expected images"):
        for_photographs(nn.Linear(9, 2).eval(), torch.rand(4, 9), 0, progress=False)


@pytest.fixture
def transformer():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.VisionTransformer(64, 16, 2, 2, 8, 16, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight)  # torchvision begins with zeros
    return model


def test_a_layer_of_tokens_is_refused_and_the_way_out_works(transformer):
    x, name = torch.rand(6, 3, 64, 64), "encoder.layers.encoder_layer_0"
    refused = (
        rf"'{name}' gives \(17, 8\).*expected \(channels, .*LayerMIPIN.*patch_map\(maps.sum\(2\)\)"
    )
    with pytest.raises(InputError, match=refused):
        for_photographs(transformer, x, 0, layer=name, progress=False)
    inverse = InverseNetwork(transformer, layer=name).fit(x, 0, progress=False)
    maps = LayerMIPINAttribution(transformer, inverse).attribute(x[:2], 0)
    assert patch_map(maps.sum(2)).shape == (2, 1, 4, 4)
    mipin = for_photographs(transformer, x, 0, layer="conv_proj", progress=False)
    assert mipin.attribute(x[:2], 0).shape == (2, 1, 4, 4)


def test_a_transformer_without_a_layer_is_told_why(transformer):
    why = r"convolution or pooling must come after it, but none comes after 'conv_proj',.*layer="
    with pytest.raises(InputError, match=why):
        for_photographs(transformer, torch.rand(2, 3, 64, 64), 0, progress=False)


def test_channels_last_are_refused_with_and_without_a_layer():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    options = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": [4, 4]}
    model = models.SwinTransformer([4, 4], **options, num_classes=3).eval()
    x = torch.rand(4, 3, 64, 64)
    with pytest.raises(InputError, match=r"channels last, such as 'features' .*\(8, 8, 16\)"):
        for_photographs(model, x, 0, progress=False)
    with pytest.raises(InputError, match=r"'features.1' gives \(16, 16, 8\).*sum\(3\)"):
        for_photographs(model, x, 0, layer="features.1", progress=False)
