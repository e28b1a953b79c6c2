"""Types that several subpackages share."""

from typing import Any

from torch import Tensor

#: The explained inputs of a model: tensors, each (batch, ...).
Inputs = tuple[Tensor, ...]

#: Further arguments of a model's ``forward``: Captum's ``additional_forward_args``.
Extras = tuple[Any, ...]

#: The choice of one output of a model: an index, a key or a field's name, or a tuple of these for
#: nested outputs; None if the model has a single output.
Output = int | str | tuple[int | str, ...] | None

#: A class: the index of its output in the model's output without the batch dimension.
Target = tuple[int, ...]
