"""Types that several subpackages share."""

#: A class, as the index of its output among the model's outputs without the batch dimension.
Target = tuple[int, ...]
