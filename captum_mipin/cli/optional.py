"""Packages that only some commands need."""

import importlib
from typing import Any


def require_module(name: str, package: str) -> Any:
    """Return a module, or raise ImportError with the command that installs it.

    Args:
        name: Name of the module, such as "PIL.Image".
        package: Name that pip knows it by, such as "pillow".
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install {package}") from error
