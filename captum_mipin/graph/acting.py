"""Whether the code of a hook may write to a tensor, for values that were not tried.

Calls of a hook show what it does for some values. Where its code has branches, it may do something
else for others, itself or in a function that it calls, whose code is read as well.
"""

import builtins
import dis
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from inspect import CO_VARARGS, CO_VARKEYWORDS, getattr_static
from itertools import dropwhile, islice, pairwise, takewhile
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from captum_mipin.graph.code import code_parts

#: Packages whose functions are known by their names: those that write end in "_" or take ``out``.
_KNOWN = frozenset({"builtins", "torch", "torchvision", "numpy", *sys.stdlib_module_names})
#: Folders of packages that are not the user's own.
_INSTALLED = ("site-packages", "dist-packages")
#: Names, besides those that end in "_", of what writes to a tensor that it is handed.
_WRITING = frozenset({"copyto", "putmask", "setitem", "iadd", "isub", "imul", "itruediv", "ipow"})
#: Names of methods that write to their own object.
_WRITING_METHODS = frozenset(
    {"fill", "put", "itemset", "__setitem__", "__iadd__", "__isub__", "__imul__"}
)
#: Arguments by name that are written to, or tell a function to write to another one.
_WRITTEN = frozenset({"out", "inplace"})
#: Names of methods of containers that return None.
_COLLECTING = frozenset({"append", "extend", "insert", "update", "add", "__setitem__"})
#: Beginnings of the names of instructions that load a variable.
_LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_CLOSURE")
#: Ways to the memory of a tensor by which torch does not count what is written.
_UNCOUNTED = frozenset({"data", "numpy", "asarray", "from_numpy", "from_dlpack", "data_ptr"})
#: Functions and methods whose results nobody can write to.
_NUMBERS = frozenset({"float", "int", "bool", "len", "str", "item", "tolist"})
#: Methods whose results have memory of their own.
_FRESH = frozenset({"clone", "copy", "deepcopy"})


class Function(NamedTuple):
    """A function, with the arguments that are bound to it.

    Attributes:
        call: The function itself.
        bound: The first arguments: those of partials, behind the object of a method.
        method: Whether the first one is the object of a method.
    """

    call: Any
    bound: tuple[Any, ...] = ()
    method: bool = False

    @classmethod
    def of(cls, value: Any) -> "Function | None":
        """Return the function of a callable; None if it has no code in Python."""
        bound: tuple[Any, ...] = ()
        while isinstance(value, partial):
            bound, value = (*value.args, *bound), value.func
        if not isinstance(value, (FunctionType, MethodType)):
            name = "forward" if _is_module(value) else "__call__"
            made = (value, "__init__") if isinstance(value, type) else (type(value), name)
            call = getattr_static(*made, None)
            value = MethodType(call, value) if isinstance(call, FunctionType) else None
        if isinstance(value, FunctionType):
            return cls(value, bound)
        call = getattr(value, "__func__", None)
        if isinstance(value, MethodType) and isinstance(call, FunctionType):
            return cls(call, (value.__self__, *bound), method=True)
        return None

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of its arguments."""
        code = self.call.__code__
        more = bool(code.co_flags & CO_VARARGS) + bool(code.co_flags & CO_VARKEYWORDS)
        names: tuple[str, ...] = code.co_varnames
        return names[: code.co_argcount + code.co_kwonlyargcount + more]

    def scope(self) -> dict[str, Any]:
        """Return name → value of all its variables that are known: global, enclosed and bound."""
        names, known = self.call.__code__.co_freevars, dict[str, Any]()
        for name, cell in zip(names, self.call.__closure__ or (), strict=True):
            with suppress(ValueError):  # of a cell that is empty
                known[name] = cell.cell_contents
        bound = zip(self.arguments, self.bound, strict=False)
        return {**vars(builtins), **self.call.__globals__, **known, **dict(bound)}

    @property
    def package(self) -> str:
        """The package that it is defined in."""
        return str(self.call.__module__).partition(".")[0]


class Reading(NamedTuple):
    """What the code of a hook may do, itself or in a function that it calls.

    Attributes:
        writes: Whether it may write to what it is handed.
        branches: Whether it may do something else for other values.
        uncounted: Whether it uses a way to the memory of a tensor by which torch counts no writes.
    """

    writes: bool
    branches: bool
    uncounted: bool


def read(hook: Function) -> Reading:
    """Read the code of a hook, and of the functions that it calls, but for installed packages."""
    waiting, seen, known = [hook], {hook.call.__code__}, Reading(False, False, False)
    while waiting:
        function = waiting.pop()
        for part in _parts(function, function is hook):
            writes, branches, uncounted = known
            for value in part.references(function):
                writes = writes or _is_in_place(value)
                other = Function.of(value)
                if other is None or other.call.__code__ in seen or _is_foreign(other, hook):
                    continue
                seen.add(other.call.__code__)
                waiting.append(other)
            uncounted = uncounted or not _UNCOUNTED.isdisjoint(part.names)
            known = Reading(writes or part.writes(), branches or part.branches(), uncounted)
    return known


def _parts(function: Function, is_hook: bool) -> Iterator["_Part"]:
    """Yield the code of a function and of those that it defines."""
    handed = set(function.arguments[function.method and not is_hook :])
    for code in code_parts(function.call.__code__):
        if code is not function.call.__code__:
            handed = handed | set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        part = _Part(code, handed)
        yield part
        handed = part.handed  # what one defines may be read in the ones behind it


def _is_module(value: Any) -> bool:
    """Return True for a module of torch."""
    return isinstance(vars(value).get("_modules"), dict) if hasattr(value, "__dict__") else False


def _is_in_place(value: Any) -> bool:
    """Return True for a module that works in place, as ``nn.ReLU(inplace=True)``."""
    modules = value.modules() if _is_module(value) else ()
    return any(getattr(module, "inplace", False) for module in modules)


def _is_foreign(function: Function, hook: Function) -> bool:
    """Return True for a function of an installed package that is not the hook's own."""
    installed = any(folder in function.call.__code__.co_filename for folder in _INSTALLED)
    return function.package in _KNOWN or (installed and function.package != hook.package)


class _Part:
    """The code of a function, or of one that is defined in it.

    Args:
        code: The code.
        handed: The names of what may be a tensor that a hook is handed.
    """

    def __init__(self, code: CodeType, handed: set[str]) -> None:
        texts = {text for text in code.co_consts if isinstance(text, str) and _ends_in_place(text)}
        self.names = texts.union(code.co_names)
        self.steps = list(dis.get_instructions(code))
        self._named = frozenset(_by_name(code, self.steps))
        self.lines, line = list[int](), 0
        for step in self.steps:
            starts = getattr(step, "line_number", None) or step.starts_line
            line = line if starts is None or isinstance(starts, bool) else starts
            self.lines.append(line)
        self.handed = handed
        while more := self._computed() - self.handed:
            self.handed = self.handed | more

    def _computed(self) -> set[str]:
        """Return the names of variables that are computed from what is handed."""
        found, start = set[str](), 0
        for at, step in enumerate(self.steps):
            if step.opname.startswith(("STORE_FAST", "STORE_DEREF")):
                statement = self.steps[start:at]
                reads = any(map(self._reads, [*statement, *self._line(self.lines[at])]))
                if reads and not _is_number(statement) and not self._is_fresh(statement):
                    found.update(_operands(step))
            if step.opname.startswith(("STORE", "POP_TOP", "POP_JUMP", "RETURN")):
                start = at + 1
        return found

    def _reads(self, step: dis.Instruction) -> bool:
        loads = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST_LOAD"))
        return loads and not self.handed.isdisjoint(_operands(step))

    def _is_fresh(self, steps: list[dis.Instruction]) -> bool:
        """Return True for a statement that copies the one thing that it reads, as ``y.clone()``."""
        if sum(map(self._reads, steps)) > 1 or any("JUMP" in step.opname for step in steps):
            return False
        return any(_is_attribute(step) and step.argval in _FRESH for step in steps)

    def _line(self, line: int) -> list[dis.Instruction]:
        return [step for step, at in zip(self.steps, self.lines, strict=True) if at == line]

    def writes(self) -> bool:
        """Return True if the code may write to what it is handed, or calls what does."""
        if not self.names.isdisjoint(_WRITING) or not self._named.isdisjoint(_WRITTEN):
            return True
        if any(map(_ends_in_place, self.names)):
            return True
        for owner, step in pairwise(self.steps):
            own = not owner.opname.startswith(_LOADS) or self._reads(owner)
            if own and _is_attribute(step) and step.argval in _WRITING_METHODS:
                return True
        for step, line in zip(self.steps, self.lines, strict=True):
            augmented = step.opname == "BINARY_OP" and step.argrepr.endswith("=")
            if augmented or step.opname.startswith(("INPLACE", "STORE_SUBSCR", "STORE_SLICE")):
                on_line = self._line(line)
                # x[0] = ... and x += ... begin where x does; Python 3.10 has no positions
                loads = [one for one in on_line if one.opname.startswith("LOAD")]
                root = [one for one in loads if _begin(one) == _begin(step) is not None]
                if any(map(self._reads, root or on_line)):
                    return True
            elif step.opname == "STORE_ATTR" and step.argval == "data":
                return True
        return False

    def branches(self) -> bool:
        """Return True if the code may do something else for other values."""
        return any(map(is_branch, self.steps))

    def references(self, function: Function) -> Iterator[Any]:
        """Yield what the code of a function refers to by known names."""
        scope, value = function.scope(), None
        owner = function.bound[0] if function.method else None
        yield from (*(function.call.__defaults__ or ()), *function.bound[function.method :])
        for step in self.steps:
            name = str((_operands(step) or [""])[-1])
            if _is_attribute(step) or step.opname.startswith("LOAD_SUPER"):
                value = _attribute(value, name)
                if function.method:  # also by super()
                    kinds = type(owner).__mro__
                    yield from (_attribute_of(kind, name, owner) for kind in kinds)
            elif step.opname.startswith("LOAD") and "CONST" not in step.opname:
                value = scope.get(name)
            else:
                continue
            yield from filter(callable, _entries(value))


def _entries(value: Any) -> Iterable[Any]:
    """Return the entries of a value, which may be a table of functions."""
    if type(value) is dict:
        return list(value.values())
    return list(value) if type(value) in (list, tuple) else [value]


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute of a value, without running code of its class; None if there is none."""
    found = getattr_static(value, name, None)
    if found is None and _is_module(value):
        return value._modules.get(name)
    if isinstance(found, (staticmethod, classmethod)):
        return found.__func__
    own = isinstance(value, (type, ModuleType)) or name in getattr(value, "__dict__", ())
    return found if own or not isinstance(found, FunctionType) else MethodType(found, value)


def _attribute_of(kind: type, name: str, owner: Any) -> Any:
    """Return the method of an object that one of its classes defines; None if it defines none."""
    found = vars(kind).get(name)
    return MethodType(found, owner) if isinstance(found, FunctionType) else None


def _ends_in_place(name: str) -> bool:
    """Return True for the name of a method that writes in place, as ``"mul_"``."""
    return name[-1:] == "_" != name[-2:-1] and name.isidentifier()


def _by_name(code: CodeType, steps: list[dis.Instruction]) -> Iterator[str]:
    """Yield the names of the arguments that calls pass by name."""
    for before, step in pairwise(steps):
        if step.opname == "KW_NAMES":  # of Python 3.11 and 3.12
            yield from code.co_consts[step.arg or 0]
        elif step.opname in ("CALL_FUNCTION_KW", "CALL_KW") and isinstance(before.argval, tuple):
            yield from before.argval
        elif step.opname == "CALL_FUNCTION_EX":  # they may be any texts
            yield from (text for text in code.co_consts if isinstance(text, str))


def _begin(step: dis.Instruction) -> tuple[Any, Any] | None:
    """Return the line and column where the code of an instruction begins; None if not known."""
    positions: dis.Positions | None = getattr(step, "positions", None)
    return None if positions is None else (positions.lineno, positions.col_offset)


def _operands(step: dis.Instruction) -> list[Any]:
    """Return the names that an instruction loads or stores; in Python 3.13 it may have two."""
    if not step.opname.startswith(("LOAD", "STORE")):
        return []
    return list(step.argval) if isinstance(step.argval, tuple) else [step.argval]


def collects(steps: list[dis.Instruction]) -> bool:
    """Return True for code that only calls such a method, as ``lambda m, x, y: kept.append(y)``."""
    if sum(step.opname.startswith("RETURN") for step in steps) > 1:
        return False
    loads = dropwhile(lambda step: not step.opname.startswith(_LOADS), steps)
    names = [step.argval for step in takewhile(_is_attribute, islice(loads, 1, None))]
    return bool(names) and names[-1] in _COLLECTING


def is_branch(step: dis.Instruction) -> bool:
    """Return True for an instruction behind which the code may go on in another place."""
    tests = "JUMP" in step.opname and "IF" in step.opname
    return tests or step.opname in ("FOR_ITER", "PUSH_EXC_INFO", "SETUP_FINALLY")


def _is_attribute(step: dis.Instruction) -> bool:
    """Return True for an instruction that loads an attribute or a method."""
    return step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))


def _is_number(steps: list[dis.Instruction]) -> bool:
    """Return True for the statement ``float(...)``, or one that ends in ``.item()``."""
    steps = [step for step in steps if step.opname not in ("PUSH_NULL", "PRECALL", "RESUME")]
    if len(steps) < 2 or any("JUMP" in step.opname for step in steps):
        return False
    first, before, last = steps[0], steps[-2], steps[-1]
    called = first.opname == "LOAD_GLOBAL" and first.argval in _NUMBERS
    method = before.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) and before.argval in _NUMBERS
    return last.opname.startswith("CALL") and (called or method)
