"""Averages: shares channel by channel, and what is no average over places."""

import pytest
import torch
from small import Function
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork
from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.rules import MIPIN, Options


def test_an_average_with_a_negative_divisor_is_refused():
    model = Function(
        lambda m, x: m["l"](F.avg_pool2d(x, 2, divisor_override=-4).flatten(1)), l=nn.Linear(8, 3)
    ).eval()
    with pytest.raises(UnsupportedOperationError, match="divides by -4"):
        InverseNetwork(model).fit(torch.randn(30, 2, 4, 4), 0, progress=False)


def test_averages_are_shared_out_in_each_channel_with_and_without_a_batch():
    x, signal = (
        torch.randn(2, 3, 6, 7, dtype=torch.float64),
        torch.randn(2, 3, 6, 7, dtype=torch.float64),
    )
    operation, window = (
        torch.ops.aten.avg_pool2d.default,
        ([3, 3], [1, 1], [1, 1]),
    )  # overlapping; maps keep their size
    for shares in (True, False):
        run, options = MIPIN["aten.avg_pool2d.default"].run, Options(shares=shares)
        whole = run(options, operation, x, *window)[1](signal)
        for index in range(2):
            alone = run(options, operation, x[index], *window)[1](signal[index])
            torch.testing.assert_close(alone, whole[index])
            for channel in range(3):
                one = run(options, operation, x[index, channel][None], *window)[1](
                    signal[index, channel][None]
                )
                torch.testing.assert_close(one[0], whole[index, channel])


@pytest.mark.parametrize(
    "pool",
    [
        lambda h: F.adaptive_avg_pool2d(h, (1, 1)),
        lambda h: F.avg_pool2d(h, (3, 8), 1),
        lambda h: F.adaptive_avg_pool2d(h, (3, 1)),
    ],
)
def test_pooling_that_takes_the_channels_for_rows_is_no_average_over_places(pool):
    torch.manual_seed(0)
    width = pool(torch.zeros(2, 3, 8)).flatten(1).shape[1]
    model = Function(
        lambda m, x: m["l"](pool(m["c"](x)).flatten(1)),
        c=nn.Conv1d(2, 3, 3, padding=1),
        l=nn.Linear(width, 3),
    )
    x = torch.randn(40, 2, 8)
    signal = (
        InverseNetwork(model.double().eval())
        .fit(x.double(), 0, progress=False)
        .source_signal(x[:3].double(), 0)
    )
    assert signal.isfinite().all()
