"""The result of a fit, and its conversion to and from the content of a file."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.signature import Signature, first_example
from captum_mipin.graph.validate import device_of
from captum_mipin.inverse.lazy import Lazy
from captum_mipin.inverse.request import Fitted
from captum_mipin.propagation.fingerprint import structure
from captum_mipin.report import LayerFit
from captum_mipin.rules import Inverse, table
from captum_mipin.storage.watch import Watch
from captum_mipin.targets import target_label
from captum_mipin.types import Extras, Inputs, Target

#: The names of an inverse's tensors, as attributes and in files.
PARTS = ("weight", "bias", "live", "own", "rows")


@dataclass(frozen=True)
class Origin:
    """The model and the kind of inputs that an inverse was fitted on.

    Attributes:
        dims: Shape of the model's output without the batch dimension.
        signature: Shapes and dtypes of the inputs, and the kinds of the further arguments.
        structure: SHA-256 of the model's operations.
        example: Tensors (1, ...) of zeros, with the shapes and dtypes of one example's inputs.
        extras: Further arguments of the first example; None if the inverse was loaded from a file,
            which does not contain them.
        watch: Detector of changes of the model's weights.
        scale: Mean and standard deviation of each input of the fit, see
            :class:`~captum_mipin.inverse.scale.Scale`; None if they are not known.
    """

    dims: tuple[int, ...]
    signature: Signature
    structure: str
    example: Inputs
    extras: Extras | None
    watch: Watch
    scale: Sequence[tuple[float, float] | None] | None = None

    @classmethod
    def of(cls, graph: CapturedGraph, inputs: Inputs, extras: Extras, watch: Watch) -> "Origin":
        """Return the origin of a fit on data with these inputs and further arguments."""
        dims = tuple(int(n) for n in value_of(graph.output).shape[1:])
        signature = Signature.of(inputs, extras, graph.shared)
        example = first_example(inputs, extras, graph.shared)
        return cls(dims, signature, structure(graph, table()), *example, watch)

    def content(self) -> dict[str, Any]:
        """Return this object's metadata for a file."""
        return {
            "fingerprint": self.watch.fingerprint,
            "signature": self.signature.to_json(),
            "structure": self.structure,
            "inputs": [
                (tuple(x.shape[1:]), str(x.dtype).removeprefix("torch.")) for x in self.example
            ],
            "extras": self.extras != (),
            "dims": self.dims,
        }

    @classmethod
    def from_content(cls, content: dict[str, Any], model: nn.Module) -> "Origin":
        """Return the origin that a file's content describes.

        Raises:
            ValueError: Entries of the content contradict each other.
        """
        signature, dims = Signature.from_json(content["signature"]), tuple(content["dims"])
        inputs = [(str(tuple(shape)), f"torch.{dtype}") for shape, dtype in content["inputs"]]
        if not inputs or [leaf[1:3] for leaf in signature.leaves[: len(inputs)]] != inputs:
            raise ValueError(
                f"the file has inputs {inputs}, expected those of its signature: save it again"
            )
        if not all(type(n) is int and n > 0 for n in dims):
            raise ValueError(
                f"the file has outputs of shape {dims}, expected positive sizes: save it again"
            )
        example = tuple(
            torch.zeros(1, *shape, dtype=getattr(torch, dtype), device=device_of(model))
            for shape, dtype in content["inputs"]
        )
        extras = None if content["extras"] else ()
        watch = Watch(model, content["fingerprint"])
        scale = content.get("scale")
        if scale is not None and not (
            [len(moments or (0.0, 0.0)) for moments in scale] == [2] * len(inputs)
            and all(type(n) is float and isfinite(n) for moments in scale for n in moments or ())
        ):
            raise ValueError(
                f"the file has scale {scale}, expected a finite mean and standard deviation of "
                "each input: save it again"
            )
        return cls(dims, signature, content["structure"], example, extras, watch, scale)


@dataclass
class State:
    """The results of the fits of an InverseNetwork.

    Attributes:
        origin: The model and the kind of inputs of the fits.
        fitted: The fitted inverses.
        lazy: For each class of ``fit(..., lazy=True)``, the object that fits the class when it is
            explained.
    """

    origin: Origin
    fitted: Fitted
    lazy: dict[Target, Lazy] = field(default_factory=dict)

    @property
    def targets(self) -> list[Target]:
        """The classes that can be explained."""
        return [*self.fitted.inverses, *self.lazy]

    def join(self, before: "State", chosen: Collection[Target]) -> None:
        """Add the classes of an earlier state, except the ``chosen`` ones, which are new."""
        labels = {target_label(target) for target in chosen}
        old, new = before.fitted, self.fitted
        old_inverses = {
            target: inverses
            for target, inverses in old.inverses.items()
            if target not in chosen or target in new.inverses
        }
        old_information = {t: bits for t, bits in old.information.items() if t in old_inverses}
        self.fitted = Fitted(
            {**old_inverses, **new.inverses},
            [layer for layer in old.layers if layer.target not in labels] + new.layers,
            {**old_information, **new.information},
        )
        kept = {target: lazy for target, lazy in before.lazy.items() if target not in chosen}
        self.lazy = {**kept, **self.lazy}

    def share_rows(self) -> None:
        """Replace equal tensors ``Inverse.rows`` of several classes by one, which saves memory."""
        first: dict[str, Tensor] = {}
        for inverses in self.fitted.inverses.values():
            for key, inverse in inverses.items():
                if inverse.rows is not None:
                    rows = first.setdefault(key, inverse.rows)
                    if rows is not inverse.rows and torch.equal(rows, inverse.rows):
                        inverses[key] = replace(inverse, rows=rows)


def packed(fitted: Fitted) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return fitted inverses as a file's tensors and content; a shared tensor is stored once."""
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    names: dict[int, str] = {}
    for number, (target, inverses) in enumerate(fitted.inverses.items()):
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
        "targets": [
            {"target": target, "keys": list(inverses)}
            for target, inverses in fitted.inverses.items()
        ],
        "same": same,
        "layers": [asdict(layer) for layer in fitted.layers],
    }


def unpacked(tensors: dict[str, Tensor], content: dict[str, Any]) -> Fitted:
    """Return the fitted inverses from a file's tensors and content, as :func:`packed` made them."""
    tensors = {**tensors, **{name: tensors[first] for name, first in content["same"].items()}}
    fitted = Fitted()
    for number, entry in enumerate(content["targets"]):
        target = tuple(entry["target"])
        fitted.inverses[target] = {
            key: _inverse(*(tensors.get(f"{number}.{index}.{part}") for part in PARTS))
            for index, key in enumerate(entry["keys"])
        }
        prefix = f"{number}.information."
        names = [name for name in tensors if name.startswith(prefix)]
        maps = {int(name.removeprefix(prefix)): tensors[name] for name in names}
        fitted.information[target] = tuple(maps[index] for index in sorted(maps))
    for layer in content["layers"]:
        label = tuple(layer["target"]) if isinstance(layer["target"], list) else layer["target"]
        fitted.layers.append(LayerFit(**{**layer, "target": label}))
    return fitted


def _inverse(
    weight: Tensor | None,
    bias: Tensor | None,
    live: Tensor | None,
    own: Tensor | None,
    rows: Tensor | None,
) -> Inverse:
    """Return the inverse that is made of tensors from a file.

    Raises:
        ValueError: A tensor is missing or has a wrong dtype.
    """
    if weight is None or bias is None:
        raise ValueError(
            "an inverse in the file has no weight or no bias, expected both: save it again"
        )
    dtypes = {part.dtype for part in (weight, bias, own, rows) if part is not None}
    if len(dtypes) > 1 or not weight.is_floating_point():
        raise ValueError(
            f"an inverse in the file has tensors of dtypes {dtypes}, expected one floating dtype: "
            "save it again"
        )
    if live is not None and (live.dtype, live.ndim) != (torch.int64, 1):
        raise ValueError(
            f"an inverse in the file has indices of shape {tuple(live.shape)} and dtype "
            f"{live.dtype}, expected one dimension and torch.int64: save it again"
        )
    return Inverse(weight, bias, live, own, rows)
