"""Forward passes of a fit under autocast: what is rounded, and how much the inverse differs."""

import pytest
import torch
from small import SmallResNet, normal, varied
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models.resnet import BasicBlock

from captum_mipin import InverseNetwork, LayerMIPINAttribution
from captum_mipin.errors import InputError
from captum_mipin.inverse.data import Batches

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

X = normal(64, 6)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
    ).eval()


MODEL = network()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [None, 1])
def test_features_and_outputs_are_those_of_autocast_and_sums_are_not(dtype, layer):
    stop = None if layer is None else MODEL[layer]
    inverse = InverseNetwork(MODEL, layer=stop, ridge=0.0, autocast=dtype).fit(
        X, 1, batch_size=16, progress=False
    )
    with torch.no_grad(), torch.autocast("cpu", dtype):
        hidden = MODEL[:4](X)
        y = MODEL[4](hidden)[:, 1].double()
    hidden, y = hidden.double(), y - y.mean()
    pattern = (hidden.T @ y / y.square().sum()).float().unsqueeze(1)
    found = inverse._state.fitted.inverses[1,]["4/linear"].weight
    torch.testing.assert_close(found, pattern, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        plain = MODEL[:4](X).double()
    z = MODEL[4](plain.float())[:, 1].double()
    exact = (plain.T @ (z - z.mean()) / (z - z.mean()).square().sum()).float().unsqueeze(1)
    assert not torch.allclose(found, exact, rtol=1e-5, atol=1e-6), "autocast did nothing"
    assert found.dtype == torch.float32


def test_it_is_close_to_the_fit_without():
    torch.manual_seed(1)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
    )
    model, x = nn.Sequential(*layers, nn.Linear(96, 3)).eval(), normal(40, 3, 14, 14)
    plain, rounded = (
        InverseNetwork(model, autocast=dtype).fit(x, 1, progress=False)
        for dtype in (None, torch.bfloat16)
    )
    s, other = plain.source_signal(x, 1), rounded.source_signal(x, 1)
    error = float((s - other).norm() / s.norm())
    assert 1e-4 < error < 0.1


def test_classes_fitted_late_are_the_same():
    at_once, late = (
        InverseNetwork(MODEL, layer=MODEL[1], autocast=torch.bfloat16).fit(
            X, batch_size=16, progress=False, lazy=lazy
        )
        for lazy in (False, True)
    )
    one, other = (
        LayerMIPINAttribution(MODEL, inverse).attribute(X, 2) for inverse in (at_once, late)
    )
    assert torch.equal(one, other)


def test_it_is_kept_in_files_and_surrounding_autocast_does_not_matter(tmp_path):
    inverse = InverseNetwork(MODEL, autocast=torch.bfloat16).fit(X, 1, progress=False)
    inverse.save(tmp_path / "file")
    loaded = InverseNetwork.load(tmp_path / "file", MODEL)
    assert loaded.settings.autocast == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        again = (
            InverseNetwork(MODEL, autocast=torch.bfloat16)
            .fit(X, 1, progress=False)
            .source_signal(X, 1)
        )
    assert torch.equal(loaded.source_signal(X, 1), inverse.source_signal(X, 1))
    assert torch.equal(again, inverse.source_signal(X, 1))


@pytest.mark.parametrize("autocast", [torch.float32, "bfloat16", True])
def test_other_dtypes_are_refused(autocast):
    with pytest.raises(InputError, match="autocast="):
        InverseNetwork(MODEL, autocast=autocast)


@needs_cuda
def test_data_goes_to_the_device_from_pinned_memory_and_comes_as_it_was():
    device = torch.device("cuda")
    for data in (X, TensorDataset(X), list(X.split(10))):
        batches = [inputs[0] for inputs, _ in Batches(data, 10, None, device)]
        assert all(batch.device.type == "cuda" for batch in batches)
        assert torch.equal(torch.cat(batches).cpu(), X)


@needs_cuda
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_cuda_fits_what_the_cpu_fits(autocast, lazy):
    model, x = varied(SmallResNet(BasicBlock), 3, 16, 16).float(), normal(24, 3, 16, 16)
    expected = InverseNetwork(model).fit(x, 1, progress=False).source_signal(x, 1)
    found = (
        InverseNetwork(model.cuda(), autocast=autocast)
        .fit(x, 1, progress=False, lazy=lazy)
        .source_signal(x.cuda(), 1)
        .cpu()
    )
    assert float((found - expected).norm() / expected.norm()) < (0.1 if autocast else 1e-2)
