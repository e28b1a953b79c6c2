"""The names that the code of a function uses, also in the functions that it defines."""

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType

#: Number of functions whose names are remembered.
_FUNCTIONS = 4096


def code_parts(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function, and of the functions that it defines."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_parts(constant)


@lru_cache(_FUNCTIONS)
def global_names(code: CodeType) -> frozenset[str]:
    """Return the names of the global variables that a function uses.

    Examples:
        >>> sorted(global_names((lambda x: len(x.shape)).__code__))
        ['len']
    """
    return _operands(code, ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"))


@lru_cache(_FUNCTIONS)
def imported_names(code: CodeType) -> frozenset[str]:
    """Return the names of the Python modules that a function imports."""
    names = _operands(code, ("IMPORT_NAME",))
    return names | {name.partition(".")[0] for name in names}


@lru_cache(_FUNCTIONS)
def attribute_names(code: CodeType) -> frozenset[str]:
    """Return all names in the code of a function, and its strings that may be names.

    Examples:
        >>> sorted(attribute_names((lambda x: getattr(x.data, "ndim")).__code__))
        ['data', 'getattr', 'ndim']
    """
    names = {name for part in code_parts(code) for name in part.co_names}
    texts = [text for part in code_parts(code) for text in part.co_consts if isinstance(text, str)]
    return frozenset(names | {word for text in texts for word in text.split(".")})


def _operands(code: CodeType, operations: tuple[str, ...]) -> frozenset[str]:
    return frozenset(
        str(step.argval)
        for part in code_parts(code)
        for step in dis.get_instructions(part)
        if step.opname in operations
    )
