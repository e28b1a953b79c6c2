"""The table of what becomes of each operation."""

from typing import Any

import torch
from small import Wants
from torch import nn

from captum_mipin import check


def test_check_lists_every_operation_with_what_becomes_of_it(untouched: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2), nn.Softmax(1)
    ).eval()
    x = torch.randn(2, 1, 5, 5)
    with untouched(model, x):
        report = check(model, x)
    assert [(row.path, row.status) for row in report.rows] == [
        ("0", "supported"),
        ("1", "supported"),
        ("2", "passes"),
        ("3", "supported"),
        ("4", "supported"),
    ]
    assert report.ok
    lines = str(report).splitlines()
    assert len(lines) == 6
    assert all(row.operation in line for row, line in zip(report.rows, lines[1:], strict=True))


def test_check_may_begin_at_a_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Softmax(1), nn.Linear(3, 2)).eval()
    assert not check(model, torch.ones(1, 3)).ok
    assert check(model, torch.ones(1, 3), layer=model[1]).ok


def test_check_takes_several_inputs_and_further_arguments() -> None:
    report = check(
        Wants().eval(), (torch.ones(2, 4), torch.ones(2, 3)), (torch.ones(2, 5), None, 3.0)
    )
    assert report.ok
    assert {"first", "second", "relu", "last", ""} == {row.path for row in report.rows}
