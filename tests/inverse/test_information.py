"""Bits that features share with a class's logit, against closed forms and another estimate."""

import numpy as np
import pytest
import torch
from small import normal
from torch import nn

from captum_mipin import InverseNetwork
from captum_mipin.errors import NotFittedError


def whitened(rows, features):
    """Rows whose sample covariance is exactly the unit matrix."""
    x = normal(rows, features, dtype=torch.float64)
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * (rows - 1) ** 0.5


def test_of_a_linear_gaussian_model_it_is_the_analytic_one():
    """With y = w·x and independent features, ρᵢ² = wᵢ² / |w|²."""
    model = nn.Linear(4, 2, dtype=torch.float64).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, -2.0, 0.0], [3.0, 0.0, 0.0, 4.0]]))
    inverse = InverseNetwork(model).fit(whitened(300, 4) + 5, progress=False)
    for target, squares in ((0, [1 / 9, 4 / 9, 4 / 9, 0]), (1, [9 / 25, 0, 0, 16 / 25])):
        expected = -0.5 * (1 - torch.tensor(squares)).log2()
        torch.testing.assert_close(
            inverse.information(target), expected.float().unsqueeze(0), rtol=1e-5, atol=1e-6
        )


def test_it_is_what_the_global_source_signal_shares_with_the_input(tmp_path):
    """Without masks S is a function of the logit: both correlate alike with the input."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(),
        nn.Linear(5, 3)
    ).double().eval()  # fmt: skip
    x = normal(90, 2, 6, 6, dtype=torch.float64)
    x[:, 0, 0, 0] = 3.0  # never varies
    inverse = InverseNetwork(model).fit(list(x.split(40)), [0, 2], progress=False)
    for target in (0, 2):
        signal = inverse.source_signal(x, target, local=False).flatten(1)
        bits = inverse.information(target).flatten()
        for i in range(72):
            a, b = x.flatten(1)[:, i].numpy(), signal[:, i].numpy()
            varies = a.std() > 0 and b.std() > 1e-12
            expected = -0.5 * np.log2(1 - np.corrcoef(a, b)[0, 1] ** 2) if varies else 0.0
            assert bits[i].item() == pytest.approx(expected, abs=1e-5)
    assert inverse.information(0)[0, 0, 0, 0] == 0
    inverse.save(tmp_path / "inverse")
    loaded = InverseNetwork.load(tmp_path / "inverse", model)
    assert torch.equal(loaded.information(2), inverse.information(2))
    more = inverse.fit(x, 1, progress=False)
    assert torch.equal(more.information(2), loaded.information(2))
    with pytest.raises(
        NotFittedError, match=r"no inverse was fitted for target 1; fitted are \[0, 2\]"
    ):
        loaded.information(1)


def test_at_a_layer_and_for_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    torch.manual_seed(0)
    x, y = normal(50, 3), normal(50, 4, seed=1)
    first, second = InverseNetwork(Two().eval()).fit((x, y), 1, progress=False).information(1)
    assert (first.shape, second.shape) == ((1, 3), (1, 4))
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    inverse = InverseNetwork(model, layer=model[1]).fit(x, 0, progress=False)
    with torch.no_grad():
        hidden, y = model[1](model[0](x)).numpy(), model(x)[:, 0].numpy()
    for i, bits in enumerate(inverse.information(0)[0]):
        live = hidden[:, i].std() > 0
        expected = -0.5 * np.log2(1 - np.corrcoef(hidden[:, i], y)[0, 1] ** 2) if live else 0.0
        assert bits.item() == pytest.approx(expected, abs=1e-4)


def test_what_is_the_logit_itself_has_as_many_bits_as_can_be_told():
    model = nn.Linear(1, 1, dtype=torch.float64).eval()
    bits = (
        InverseNetwork(model).fit(normal(50, 1, dtype=torch.float64), progress=False).information()
    )
    assert 20 < bits.item() <= 26


def test_it_ranks_pixels_of_digits_as_a_neighbour_estimate_does():
    """Real images are not Gaussian: ranks agree, which is what a map shows."""
    datasets, selection = (
        pytest.importorskip(
            "sklearn.datasets", reason="the digits come with it; the package does not need it"
        ),
        pytest.importorskip("sklearn.feature_selection", reason="an estimate to compare with"),
    )
    from scipy.stats import spearmanr

    images = torch.from_numpy(datasets.load_digits().data).float() / 16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    labels = torch.from_numpy(datasets.load_digits().target)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()
    inverse = InverseNetwork(model).fit(images, [0, 3], progress=False)
    for target in (0, 3):
        with torch.no_grad():
            logit = model(images)[:, target].numpy()
        nats = selection.mutual_info_regression(images.numpy(), logit, random_state=0)
        bits = inverse.information(target)[0].numpy()
        assert spearmanr(bits, nats).statistic > 0.8  # 0.87 and 0.90
        assert (
            np.abs(bits - nats / np.log(2)).mean() < 0.15
        )  # 0.08 and 0.07, where the largest have 0.5 to 0.7
