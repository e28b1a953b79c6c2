"""The images that the tests of both bottlenecks explain."""

import pytest
from small import normal
from torch import Tensor


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Return images (40, 3, 8, 8)."""
    return normal(40, 3, 8, 8, seed=6)
