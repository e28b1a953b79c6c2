"""Normalisation: the recorded deviation comes back."""

import pytest
import torch
from rule_checks import back
from torch import nn

from captum_mipin import InverseNetwork


@pytest.mark.parametrize(
    "shape, module, dims",
    [
        ((6, 5), nn.LayerNorm(5), (1,)),
        ((6, 4, 5), nn.LayerNorm([4, 5], elementwise_affine=False), (1, 2)),
        ((6, 4, 3, 3), nn.GroupNorm(1, 4), (1, 2, 3)),
    ],
)
def test_norms_restore_the_deviation_they_divided_by(shape, module, dims):
    x = 3 * torch.randn(*shape, dtype=torch.float64) + 1
    x[0] /= 1e3  # so small that ε counts
    if isinstance(module, nn.GroupNorm):
        sent = back("group_norm", x, 1, None, None, 1e-5)
    else:
        sent = back("layer_norm", x, list(module.normalized_shape), None, None, 1e-5)
    torch.testing.assert_close(sent * module.double()(x), x - x.mean(dims, keepdim=True))


def test_rms_norm_restores_the_root_mean_square_it_divided_by():
    x = 3 * torch.randn(6, 4, 5, dtype=torch.float64) + 1
    sent = back("rms_norm", x, [4, 5], torch.rand(4, 5, dtype=torch.float64), None)
    torch.testing.assert_close(sent, (x**2).mean((1, 2), keepdim=True).sqrt().expand(6, 4, 5))
    torch.testing.assert_close(
        back("rms_norm", x, [5], None, 2.0) * torch.rms_norm(x, [5], eps=2.0), x
    )


def test_instance_norm_is_group_norm_by_channel_or_batch_norm():
    torch.manual_seed(0)
    x, first, last = (
        torch.randn(40, 2, 7, dtype=torch.float64),
        nn.Conv1d(2, 4, 2),
        nn.Linear(24, 2),
    )
    kept = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    kept.running_mean.normal_()
    kept.running_var.uniform_(0.5, 2)
    batch = nn.BatchNorm1d(4)
    batch.load_state_dict(kept.state_dict())
    for norm, other in ((nn.InstanceNorm1d(4), nn.GroupNorm(4, 4, affine=False)), (kept, batch)):
        one, two = (
            InverseNetwork(
                nn.Sequential(first, n, nn.ReLU(), nn.Flatten(), last).double().eval()
            ).fit(x, 1, progress=False)
            for n in (norm, other)
        )
        torch.testing.assert_close(one.source_signal(x[:5], 1), two.source_signal(x[:5], 1))


def test_group_norm_group_by_group():
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    sent = back("group_norm", x, 2, None, None, 0.0)
    torch.testing.assert_close(
        sent[:, 2:], x[:, 2:].std((1, 2), correction=0, keepdim=True).expand(2, 2, 3)
    )
    restored = back("group_norm", x, 2, None, None, 3.0) * torch.group_norm(x, 2, eps=3.0)
    torch.testing.assert_close(restored[:, :2], x[:, :2] - x[:, :2].mean((1, 2), keepdim=True))
