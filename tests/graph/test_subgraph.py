"""Parts of a graph, and the tensor that a layer gives."""

import pytest
import torch
from torch import Tensor, fx, nn

from captum_mipin.errors import CaptureError
from captum_mipin.graph.capture import capture
from captum_mipin.graph.layers import module_output
from captum_mipin.graph.nodes import place
from captum_mipin.graph.subgraph import Part, extract


def test_module_output_finds_a_layer_and_says_why_not() -> None:
    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(3, 3), nn.Linear(3, 2), nn.ReLU()
            self.drop, self.idle = nn.Dropout(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.relu(self.a(self.drop(self.relu(x)))))

    model = Reuse().eval()
    graph = capture(model, (torch.randn(2, 3),))
    names = {node.name: node for node in graph.graph.nodes}
    assert str(place(names[module_output(graph, model, model.a)])) == "a/linear"
    assert module_output(graph, model, model) == graph.output.name
    with pytest.raises(CaptureError, match="Linear is not a module of this Reuse"):
        module_output(graph, model, nn.Linear(3, 3))
    with pytest.raises(
        CaptureError,
        match=r"layer .relu. \(ReLU\) is called 2 times and has 2 outputs in the graph",
    ):
        module_output(graph, model, model.relu)
    for layer, name in ((model.drop, "drop"), (model.idle, "idle")):
        with pytest.raises(
            CaptureError,
            match=rf"layer '{name}'.*not called, or does nothing.*Name the module before it",
        ):
            module_output(graph, model, layer)


def test_a_part_runs_from_any_nodes_to_others_behind_them() -> None:
    graph = fx.symbolic_trace(lambda x, y: (x + y, (x + y) * y - x)).graph
    nodes = {node.name: node for node in graph.nodes}
    part = extract(graph, [nodes["add_1"], nodes["y"], nodes["x"]], [nodes["sub"], nodes["y"]])
    a, y, x = torch.tensor(7.0), torch.tensor(2.0), torch.tensor(5.0)
    assert part(a, y, x) == (7 * 2 - 5, 2)
    assert [node.name for node in part.graph.nodes][:3] == ["add_1", "y", "x"]
    assert "add" not in part.code.replace("add_1", "")


def test_a_part_takes_what_goes_round_its_tensor() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x)).reshape(x.shape[0], 3) * self.b(x) / x.shape[0]

    model, x = Around().eval(), torch.randn(5, 4)
    captured = capture(model, (x,))
    part = Part(captured, "relu")
    features, others = part.below(captured.values(model, (x,), ()))
    assert part.bypassed
    torch.testing.assert_close(part.above(features, others), model(x))
    expected = 2 * torch.relu(model.a(x)) * model.b(x) / 5
    torch.testing.assert_close(part.above(2 * features, others), expected)
    with pytest.raises(CaptureError, match="does not depend on"):
        Part(captured, captured.output.name, "relu")
