"""The tensors of a captured graph that are the input or the output of a module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from captum_mipin.errors import CaptureError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.kept import Kept
from captum_mipin.graph.layout import batch_dimension, shape_text
from captum_mipin.graph.marks import module_stack, value_of
from captum_mipin.graph.nodes import place
from captum_mipin.graph.signature import pick
from captum_mipin.graph.subgraph import extract
from captum_mipin.graph.twin import twin_of
from captum_mipin.options import closest
from captum_mipin.types import Extras, Inputs


@dataclass(frozen=True)
class LayerInput:
    """The input of a module as a place in a model; a plain module is the place of its output."""

    module: nn.Module


#: Number of tensors that an error lists.
_SHOWN = 8

#: A place in a model: the output or the input of a module, or None for the model's inputs.
Site = nn.Module | LayerInput | None


def at_places(
    function: Callable[[Site], Any], layer: nn.Module | list[nn.Module], at_input: bool = False
) -> Any:
    """Return the result of a function at a layer, or the list of its results at several layers.

    Args:
        function: Function of a place.
        layer: One layer or a list.
        at_input: True for the input of each layer, False for its output.
    """
    if isinstance(layer, list):
        return [at_places(function, module, at_input) for module in layer]
    return function(LayerInput(layer) if at_input else layer)


def module_output(captured: CapturedGraph, model: nn.Module, layer: nn.Module) -> str:
    """Return the name of the node that is the output of ``layer``.

    Raises:
        CaptureError: ``layer`` is not a module of the model, or does not have exactly one output in
            the graph.
    """
    nodes = _nodes(captured, model, layer)
    if len(nodes) == 1:
        return str(nodes[0].name)
    path = _paths(model, layer)[0]
    raise CaptureError(
        f"layer {path!r} ({type(layer).__name__}) has {len(nodes)} outputs in the graph, expected "
        "one output: name another module"
    )


def tensor_name(captured: CapturedGraph, model: nn.Module, layer: nn.Module | str) -> str:
    """Return the name of a floating tensor of the graph with the batch as one of its dimensions.

    Args:
        captured: The model's graph.
        model: The model.
        layer: A module, whose output is meant; or the name of a tensor of the graph.

    Raises:
        CaptureError: The graph has no such tensor, its dtype is not floating, or none of its
            dimensions is the batch.
    """
    nodes = {node.name: node for node in captured.graph.nodes}
    name = layer if isinstance(layer, str) else module_output(captured, model, layer)
    shown = f"the output of {type(layer).__name__}" if layer is not name else f"tensor {name!r}"
    values = {n: value_of(node) for n, node in nodes.items() if n not in captured.constants}
    tensors = {n: value for n, value in values.items() if isinstance(value, Tensor)}
    if name not in tensors:
        modules = [path for path, _ in model.named_modules() if path]
        raise CaptureError(
            f"{shown} is missing in the graph of this {type(model).__name__}, expected a module "
            f"or a tensor: pass for example one of {closest(name, modules)}, or one of its "
            f"tensors: {', '.join(islice(tensors, _SHOWN))}"
        )
    value = tensors[name]
    if not value.is_floating_point():
        raise CaptureError(
            f"{shown} has dtype {value.dtype}, expected a floating dtype, because noise is added "
            "to it: name another layer"
        )
    if batch_dimension(value, captured.batch) is None:
        raise CaptureError(
            f"{shown} has shape {shape_text(value, captured.batch)}, expected the batch as one of "
            "its dimensions: name another layer"
        )
    return name


def tensors_at(
    captured: CapturedGraph, model: nn.Module, layer: Site, call: tuple[Inputs, Extras]
) -> tuple[str, ...]:
    """Return the names of the nodes at a place, in the order of the module's arguments or outputs.

    Args:
        captured: The model's graph.
        model: The model.
        layer: The place.
        call: Inputs and further arguments of a call, with which the order is found.

    Raises:
        CaptureError: The module is not one of the model, is called several times or never, or has
            no floating tensor there.
    """
    if layer is None:
        return captured.inputs
    path = _paths(model, layer.module if isinstance(layer, LayerInput) else layer)[0]
    key = path, isinstance(layer, LayerInput)
    if key not in captured.places:
        nodes = _nodes(captured, model, layer)
        if len(nodes) > 1:
            nodes = _in_order(nodes, captured, model, key, call)
        captured.places[key] = tuple(node.name for node in nodes)
    return captured.places[key]


def _paths(model: nn.Module, module: nn.Module) -> list[str]:
    """Return the names of a module in the model, sorted; raise CaptureError if there are none."""
    named = model.named_modules(remove_duplicate=False)
    paths = sorted(path for path, part in named if part is module)
    if not paths:
        raise CaptureError(
            f"layer {type(module).__name__} is not a module of this {type(model).__name__}, "
            "expected one of its modules: pass layer=model.get_submodule(path)"
        )
    return paths


def _nodes(
    captured: CapturedGraph, model: nn.Module, layer: nn.Module | LayerInput
) -> list[fx.Node]:
    """Return the nodes at a place in the order of the graph."""
    at_input = isinstance(layer, LayerInput)
    module = layer.module if isinstance(layer, LayerInput) else layer
    paths, kind = _paths(model, module), type(module).__name__
    nodes = list(captured.graph.nodes)
    if module is model:
        names = captured.inputs if at_input else (captured.output.name,)
        return [node for node in nodes if node.name in names]
    inside = {node for node in nodes if not set(paths).isdisjoint(place(node).stack)}
    stacks = [module_stack(node).items() for node in inside]
    calls = {call for stack in stacks for call, (path, _) in stack if path in paths}
    reason = (
        "has no operation in the graph: it is not called, or does nothing at inference. "
        f"Name {_instead(captured, model, module)}"
    )
    leaving = [n for n in nodes if n in inside and _is_tensor(n) and not inside.issuperset(n.users)]
    if len(calls) == 1 and at_input:
        varying = _varying(captured)
        entering = [n for n in nodes if n in varying - inside and inside & set(n.users)]
        floating = [n for n in entering if _is_tensor(n) and value_of(n).is_floating_point()]
        if floating:
            return floating
        dtypes = ", ".join(str(value_of(node).dtype) for node in entering if _is_tensor(node))
        reason = f"has an input of dtype {dtypes}, expected a floating dtype: explain its output"
    elif len(calls) == 1 and leaving:
        return leaving
    elif inside:
        count = len(leaving)
        reason = (
            f"is called {len(calls)} times and has {count} outputs in the graph, expected one call "
            "and one output: name another module"
        )
    raise CaptureError(f"layer {paths[0]!r} ({kind}) {reason}")


def _instead(captured: CapturedGraph, model: nn.Module, module: nn.Module) -> str:
    """Return the called modules that share weights with one that is not called."""
    own = {id(weight) for weight in module.parameters(recurse=False)}
    called = {path for node in captured.graph.nodes for path in place(node).stack}
    shared = [
        repr(path)
        for path, other in model.named_modules()
        if path in called and own & {id(weight) for weight in other.parameters(recurse=False)}
    ]
    return f"{' or '.join(shared)}, with the same weights" if shared else "the module before it"


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(value_of(node), Tensor)


def _varying(captured: CapturedGraph) -> set[fx.Node]:
    """Return the inputs of the model, and the nodes that are computed from them."""
    varying: set[fx.Node] = set()
    for node in captured.graph.nodes:
        if node.name in captured.inputs or not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    return varying


def _in_order(
    nodes: Sequence[fx.Node], captured: CapturedGraph, model: nn.Module,
    key: tuple[str, bool], call: tuple[Inputs, Extras],
) -> list[fx.Node]:  # fmt: skip
    """Return nodes in the order in which a module takes or returns their values.

    A copy of the model is run on a few examples, and its values are compared with the nodes'.
    """
    (path, at_input), (inputs, extras) = key, call
    few = torch.arange(min(2, len(inputs[0])), device=inputs[0].device)
    inputs, extras = pick(inputs, extras, few, captured.shared)
    placeholders = captured.graph.find_nodes(op="placeholder")
    values, seen = captured.values(model, inputs, extras), list[Tensor]()

    def note(module: nn.Module, arguments: Any, named: Any, output: Any = None) -> None:
        leaves = pytree.tree_leaves((arguments, named) if at_input else output)
        floating = (x for x in leaves if isinstance(x, Tensor) and x.is_floating_point())
        seen.extend(x.detach().clone() for x in floating)

    twin = twin_of(model)
    kept, module = Kept(twin), twin.get_submodule(path)
    saved = kept.saved(twin)
    if at_input:
        module.register_forward_pre_hook(note, with_kwargs=True)
    else:
        module.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        try:
            with saved.watched(), kept.standing_in():
                twin(*inputs, *extras)
        finally:
            kept.restore()
            saved.put_back()
        run = extract(captured.graph, placeholders, nodes)
        results = run(*(values[node.name] for node in placeholders))
    left, ordered = dict(zip(nodes, results, strict=True)), list[fx.Node]()
    for tensor in seen:
        for node, value in left.items():
            if value.shape == tensor.shape and torch.allclose(value, tensor, rtol=1e-3, atol=1e-5):
                ordered.append(node)
                del left[node]
                break
    return [*ordered, *left]
