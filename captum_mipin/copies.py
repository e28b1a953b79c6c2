"""Deep copies of models, exported programs included."""

from typing import Any

from torch import fx, nn


def copy_memo(model: nn.Module) -> dict[int, Any]:
    """Return the memo with which ``copy.deepcopy`` can copy a model that holds exported programs.

    It leaves out the traced values of their graphs, which torch cannot copy.
    """
    parts = (part for module in model.modules() for part in vars(module).values())
    graphs = (
        part.graph if isinstance(part, fx.GraphModule) else part
        for part in parts
        if isinstance(part, fx.Graph | fx.GraphModule)
    )
    values = [node.meta.get("val") for graph in graphs for node in graph.nodes]
    return {id(value): value for value in values if value is not None}
