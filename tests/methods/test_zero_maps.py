"""A map of zeros is named by a warning, since no reader can tell it from a result."""

import warnings

import pytest
import torch
from small import normal
from torch import nn

from captum_mipin.errors import DataWarning
from captum_mipin.methods import LRP, DeepTaylor, LayerPropagation


@pytest.fixture
def network():
    """Logit 0 is the sum of two hidden neurons x⁺, logit 1 minus this sum."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[2].weight.copy_(torch.tensor([[1.0, 1], [-1, -1]]))
    return model.eval()


X = torch.tensor([[1.0, 2], [-1, -2], [3, -1]])


def test_maps_without_positive_contributions_are_named(network):
    """The second example has the output 0."""
    match = r"the maps of 3 of 3 examples \(0, 1, 2\) are 0: z⁺ sends nothing back from outputs wi"
    for method in (DeepTaylor(network), LayerPropagation(DeepTaylor(network), "1")):
        with pytest.warns(DataWarning, match=match):
            assert not method.attribute(X, target=1).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DeepTaylor(network).attribute(X[[0, 2]], target=0).any(1).all()
        assert LRP(network).attribute(X, target=1)[[0, 2]].any(1).all()


def test_a_negative_output_has_a_map_of_negative_values():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 2)).eval()
    x = normal(20, 4)
    output, maps = model(x)[:, 1], DeepTaylor(model).attribute(x, 1)
    assert (output < 0).any()
    assert (maps[output < 0] <= 0).all()
    torch.testing.assert_close(maps.sum(1), output.detach())


def test_the_preset_names_negative_outputs(network):
    method = DeepTaylor(network, preset="innvestigate")
    with pytest.warns(DataWarning, match="3 of 3 .*preset='innvestigate' from negative"):
        assert not method.attribute(X, target=1).any()
