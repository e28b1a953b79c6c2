"""Import of optional packages, which only some commands need."""

import importlib
from typing import Any


def require_module(name: str, package: str) -> Any:
    """Return an imported module.

    Args:
        name: Name of the module, such as "PIL.Image".
        package: Name of its package for pip, such as "pillow".

    Raises:
        ImportError: The package is not installed; the error contains the command to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install {package}") from error
