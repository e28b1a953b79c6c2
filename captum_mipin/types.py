"""Types that several subpackages share."""

from typing import Any

from torch import Tensor

#: The tensors that a model is explained on, each (batch, ...).
Inputs = tuple[Tensor, ...]

#: Further arguments of a model's ``forward``, Captum's ``additional_forward_args``.
Extras = tuple[Any, ...]

#: Which output of a model: an index, a key or a field's name, or a tuple of these, one inside the
#: other; None for the only output.
Output = int | str | tuple[int | str, ...] | None

#: A class, as the index of its output among the model's outputs without the batch dimension.
Target = tuple[int, ...]
