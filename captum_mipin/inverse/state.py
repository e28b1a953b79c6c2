"""All that a fit leaves behind, and how it lies in files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_mipin.graph.signature import Signature
from captum_mipin.graph.validate import device_of
from captum_mipin.inverse.lazy import Lazy
from captum_mipin.inverse.request import Fitted
from captum_mipin.report import LayerFit
from captum_mipin.rules import Inverse
from captum_mipin.storage.watch import Watch
from captum_mipin.targets import target_label
from captum_mipin.types import Extras, Inputs, Target

#: What an inverse is made of, in files.
PARTS = ("weight", "bias", "live", "own", "rows")


@dataclass
class State:
    """All that a fit leaves behind."""

    fitted: Fitted
    dims: tuple[int, ...]
    signature: Signature
    structure: str
    example: Inputs
    extras: Extras | None
    watch: Watch
    #: Where classes come from that are fitted when they are explained.
    lazy: dict[Target, Lazy] = field(default_factory=dict, kw_only=True)


def head_of(
    content: dict[str, Any], model: nn.Module
) -> tuple[tuple[int, ...], Signature, str, Inputs, Extras | None, Watch]:
    """What a state is made of besides what was fitted, from a file's content.

    Raises:
        ValueError: The parts do not go together.
    """
    signature, dims = Signature.from_json(content["signature"]), tuple(content["dims"])
    inputs = [(str(tuple(shape)), f"torch.{dtype}") for shape, dtype in content["inputs"]]
    if not inputs or [leaf[1:3] for leaf in signature.leaves[: len(inputs)]] != inputs:
        raise ValueError(f"inputs {inputs} are not those of the signature")
    if not all(type(n) is int and n > 0 for n in dims):
        raise ValueError(f"outputs cannot have shape {dims}")
    example = tuple(
        torch.zeros(1, *shape, dtype=getattr(torch, dtype), device=device_of(model))
        for shape, dtype in content["inputs"]
    )
    extras = None if content["extras"] else ()
    return (
        dims,
        signature,
        content["structure"],
        example,
        extras,
        Watch(model, content["fingerprint"]),
    )


def packed(fitted: Fitted) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a fit has learned, as a file's tensors and content: what classes share is written once."""
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    same: dict[str, str] = {}
    for number, (target, inverses) in enumerate(fitted.inverses.items()):
        entries.append({"target": target, "keys": list(inverses)})
        for index, inverse in enumerate(inverses.values()):
            for part in PARTS:
                name, tensor = f"{number}.{index}.{part}", getattr(inverse, part)
                if id(tensor) in names:
                    same[name] = names[id(tensor)]
                elif tensor is not None:
                    tensors[name], names[id(tensor)] = tensor, name
        for index, bits in enumerate(fitted.information.get(target, ())):
            tensors[f"{number}.information.{index}"] = bits
    return tensors, {
        "targets": entries,
        "same": same,
        "layers": [asdict(layer) for layer in fitted.layers],
    }


def unpacked(tensors: dict[str, Tensor], content: dict[str, Any]) -> Fitted:
    """What a fit has learned, from a file's tensors and content; see :func:`packed`."""
    found = {**tensors, **{name: tensors[first] for name, first in content["same"].items()}}
    fitted = Fitted()
    for number, entry in enumerate(content["targets"]):
        fitted.inverses[tuple(entry["target"])] = {
            key: _inverse(*(found.get(f"{number}.{index}.{part}") for part in PARTS))
            for index, key in enumerate(entry["keys"])
        }
        maps = sorted(
            (int(name.split(".")[2]), t)
            for name, t in found.items()
            if name.startswith(f"{number}.information.")
        )
        fitted.information[tuple(entry["target"])] = tuple(bits for _, bits in maps)
    for layer in content["layers"]:
        target = tuple(layer["target"]) if isinstance(layer["target"], list) else layer["target"]
        fitted.layers.append(LayerFit(**{**layer, "target": target}))
    return fitted


def _inverse(
    weight: Tensor | None,
    bias: Tensor | None,
    live: Tensor | None,
    own: Tensor | None,
    rows: Tensor | None,
) -> Inverse:
    """An inverse of the tensors that a file holds.

    Raises:
        ValueError: They cannot be parts of one.
    """
    if weight is None or bias is None:
        raise ValueError("an inverse lacks its weight or its bias")
    floating = {part.dtype for part in (weight, bias, own, rows) if part is not None}
    if (
        len(floating) > 1
        or not weight.is_floating_point()
        or (live is not None and (live.dtype, live.ndim) != (torch.int64, 1))
    ):
        raise ValueError(
            f"an inverse has parts of dtypes {floating}, and indices of {None if live is None else live.dtype}"
        )
    return Inverse(weight, bias, live, own, rows)


def joined(before: Fitted, done: Fitted, chosen: Sequence[Target]) -> Fitted:
    """What was fitted before, but for the classes ``chosen``, and what was done for these."""
    names = {target_label(target) for target in chosen}
    inverses = {
        target: old
        for target, old in before.inverses.items()
        if target not in chosen or target in done.inverses
    }
    information = {
        target: bits for target, bits in before.information.items() if target in inverses
    }
    layers = [layer for layer in before.layers if layer.target not in names]
    return Fitted(
        {**inverses, **done.inverses}, layers + done.layers, {**information, **done.information}
    )


def share_rows(fitted: Fitted) -> None:
    """Let classes share equal rows, see :class:`~captum_mipin.rules.base.Inverse`, if they were fitted on the same data."""
    first: dict[str, Tensor] = {}
    for inverses in fitted.inverses.values():
        for key, inverse in inverses.items():
            if inverse.rows is not None:
                rows = first.setdefault(key, inverse.rows)
                if rows is not inverse.rows and torch.equal(rows, inverse.rows):
                    inverses[key] = replace(inverse, rows=rows)
