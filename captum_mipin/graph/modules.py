"""Functions that read a model: its modules and its tensors."""

from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from captum_mipin.errors import InputError
from captum_mipin.options import closest, type_of

#: Attributes that every module has.
OWN = frozenset(vars(nn.Module()))

#: Name of the function that is ``nn.Module.__call__``.
_CALL = nn.Module.__call__.__name__


def unwrapped(model: Any) -> Any:
    """Return the module inside ``DataParallel``, ``DistributedDataParallel``, ``torch.compile``.

    The module of a bound ``model.forward`` or ``model.__call__`` is returned too, and any other
    model itself.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> unwrapped(nn.DataParallel(torch.compile(model))) is unwrapped(model) is model
        True
        >>> unwrapped(model.forward) is unwrapped(model.__call__) is model
        True
    """
    while True:
        if isinstance(model, MethodType) and model.__name__ in ("forward", _CALL):
            model = model.__self__
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def module_of(layer: nn.Module | str, model: nn.Module) -> nn.Module:
    """Return a layer that the user passed as a module, or by its name in the model.

    Args:
        layer: The module, or its dotted name as in ``model.named_modules()``.
        model: The model.

    Raises:
        InputError: The model has no such module.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> module_of("0", model) is module_of(model[0], model) is model[0]
        True
    """
    model = unwrapped(model)
    modules = _named(model)
    module = modules.get(layer) if isinstance(layer, str) else unwrapped(layer)
    if module is not None and (module is model or module in modules.values()):
        return module
    if isinstance(layer, nn.Module) and model in layer.modules():
        hint = "pass the whole network first, and then a layer of it"
    else:
        hint = f"pass for example one of {closest(layer, modules)}" if modules else "pass None"
    shown = repr(layer) if isinstance(layer, str) else type_of(layer)
    raise InputError(
        f"layer is {shown}, expected a module of the {type(model).__name__} that is explained, or "
        f"its name as in model.named_modules(): {hint}"
    )


def modules_of(layer: Any, model: nn.Module) -> Any:
    """Return a layer as :func:`module_of` does, and a list of layers as a list of modules."""
    if isinstance(layer, (list, tuple)):
        return [module_of(one, model) for one in layer]
    return module_of(layer, model)


def layer_or_tensor(layer: nn.Module | str, model: nn.Module) -> nn.Module | str:
    """Return a module of the model for a module or its name; names of tensors unchanged.

    Tensors of a captured graph, such as "relu_2", have the names of operations or arguments.

    Raises:
        InputError: The model has no such module, and its graph can have no such tensor.
    """
    if isinstance(layer, str) and layer not in _named(model) and _may_be_tensor(layer, model):
        return layer
    return module_of(layer, model)


def _may_be_tensor(name: str, model: nn.Module) -> bool:
    """Return True if a graph of the model may have a tensor of this name."""
    words = name.split("_")
    starts = {"_".join(words[:count]) for count in range(1, len(words) + 1)} - {""}
    operations = {op.partition("::")[2] for op in torch._C._dispatch_get_all_op_names()}
    operations = {op.partition(".")[0] for op in operations} | {"getitem"}
    return not starts.isdisjoint(operations | {*signature(model.forward).parameters})


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules in a model by name.

    A part in ``torch.compile`` is its module, and has the names of the module before as well.
    """
    named = {name: unwrapped(module) for name, module in tree(model) if name}
    return {name.replace("._orig_mod", ""): module for name, module in named.items()} | named


def tree(model: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """Return the pairs of ``model.named_modules(remove_duplicate=False)``, in less time."""
    modules = [(path, model)]
    for name, part in model._modules.items():
        if part is not None:
            modules += tree(part, f"{path}.{name}" if path else name)
    return modules


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters, buffers, and tensors that are plain attributes of modules, by name."""
    attributes = [
        (f"{path}.{name}", value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    return [*model.named_parameters(), *model.named_buffers(), *attributes]


def is_quantised(tensor: Tensor) -> bool:
    """Return True for weights of a tensor subclass that can be dequantised, as torchao makes."""
    return (
        is_traceable_wrapper_subclass(tensor) and type(tensor).dequantize is not Tensor.dequantize
    )


def parts_of(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Return the plain tensors that a tensor consists of, by name."""
    if not is_traceable_wrapper_subclass(tensor):
        return [(name, tensor)]
    inner = [(f"{name}.{part}", getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0]]
    return [pair for one in inner for pair in parts_of(*one)]


def tensor_bytes(tensor: Tensor) -> Any:
    """Return the values of a tensor as bytes, in the order of its elements."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # a tensor of one element counts as contiguous, whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data
