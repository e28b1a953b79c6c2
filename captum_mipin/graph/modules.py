"""Functions that read a model: its modules, its tensors, and the state its graph depends on."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: Attributes that every module has.
OWN = frozenset(vars(nn.Module()))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``DataParallel``, ``DistributedDataParallel``, ``torch.compile``.

    A module without such a wrapper is returned itself.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> unwrapped(nn.DataParallel(torch.compile(model))) is unwrapped(model) is model
        True
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


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


def snapshot(model: nn.Module) -> list[Any]:
    """Return the state of a model on which its graph depends, except parameters and buffers.

    It consists of the modules and their types, their hooks, and their attributes that are numbers,
    strings, functions, containers or tensors. If a later snapshot differs, the model must be
    captured again.
    """
    seen: list[Any] = []
    for path, module in tree(model):
        seen.append((path, type(module), id(module)))
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            seen.extend(map(id, hooks.values()))
        attributes = vars(module)
        for name in attributes.keys() - OWN:
            value = attributes[name]
            if isinstance(value, (int, str)):
                seen.append((name, value))
            elif isinstance(value, Tensor):
                seen.append((name, id(value), value._version))
            elif callable(value):
                seen.append((name, id(value)))
            elif isinstance(value, (float, tuple, list, dict, set)):
                seen.append((name, text := repr(value)))
                if "tensor(" in text:  # the repr of a large tensor shows only some of its values
                    tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
                    seen.extend((id(t), t._version) for t in tensors)
    return seen


def tensor_bytes(tensor: Tensor) -> Any:
    """Return the values of a tensor as bytes, in the order of its elements."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # a tensor of one element counts as contiguous, whatever its stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data
