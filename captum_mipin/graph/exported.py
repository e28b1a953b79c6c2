"""Exported programs (``torch.export.save``) as modules; no code in their files is run.

``torch.export.load`` unpickles what lies in such a file, loads compiled libraries from it, and evaluates strings of its graph
as Python. So the file is taken apart first. What is given to torch is an archive made anew, of plain tensors and a graph whose
every string is known to be a name, an operation of ATen, or a formula of sizes. All else is refused.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from captum_mipin.errors import CaptureError, InputError, MIPINError, TrainingModeError
from captum_mipin.graph.marks import module_stack, value_of

#: What to do about programs that cannot be used.
_WAY_OUT = "take the network it was exported from, as package.module:FACTORY, with --weights for its state dict"

#: The graph, lists of tensors, and what is taken as it is.
_GRAPH = "models/model.json"
_LISTS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_PLAIN = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|\.data/(version|serialization_id)|archive_(format|version)|byteorder"
)

_FUNCTIONS = (
    r"\b(Max|Min|Mod|PythonMod|ModularIndexing|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|PowByNatural|ToFloat"
    r"|(Trunc|Ceil|Floor)ToInt)\("
)
#: What strings of a graph may be, by the key they are under; all others are names.
_STRINGS = {
    "name": re.compile(r"\w*"),
    "as_name": re.compile(r"\w*"),
    "forward_arg_names": re.compile(r"\w*"),
    "as_string": re.compile(r"[\w ,.>-]*"),
    "as_operator": re.compile(r"(?!)"),
    "nn_module_stack": re.compile(r"[\w.,;@:<>\[\]() -]*"),
    "expr_str": re.compile(
        rf"(Symbol\('\w+'|\b(positive|integer|nonnegative)=True|\b(Integer|Add|Mul|Pow|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not)\(|{_FUNCTIONS}"
        r"|\b[a-z]*\d+\b|[-+*/%<>=(), ])*"
    ),
    "guards_code": re.compile(
        rf"(L\['\w+'\]\.size\(\)\[\d+\]|{_FUNCTIONS}|\b(and|or|not)\b|\b\d+\b|[-+*/%<>=!(), ])*"
    ),
}
_NAME = re.compile(r"[\w.@:<>+ -]*")
_ON_SIZES = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_)|math\.(trunc|ceil|floor)"
    r"|torch\.sym_(not|int|float|ite|max|min|sqrt)"
)

#: One tensor goes in, one comes out.
_ONE: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
_SPECS = {
    "in_spec": {
        "type": "builtins.tuple",
        "context": "null",
        "children_spec": [
            {"type": "builtins.tuple", "context": "null", "children_spec": [_ONE]},
            {"type": "builtins.dict", "context": "[]", "children_spec": []},
        ],
    },
    "out_spec": _ONE,
}


def load(path: str, shape: Sequence[int], device: torch.device) -> nn.Module:
    """The module of an exported program, in evaluation mode; what is inside has the names that it had.

    Args:
        path: Of a file that ``torch.export.save`` wrote.
        shape: (channels, height, width) of the images that it is for.
        device: Where it is to run.

    Raises:
        OSError: The file cannot be read.
        InputError: It is no exported program, damaged, or holds what could run code.
        CaptureError: The program is in training mode, taken apart, for one batch size, or for other images.
    """
    archive = _checked(path, torch.zeros(2, *shape))
    try:
        program = torch.export.load(archive)
    except Exception as error:  # of any kind: the file may hold anything
        raise InputError(
            f"{path!r} is damaged, or no exported program of this torch: {type(error).__name__}: {error}"
        ) from error
    _check_mode(path, program)
    _check_shape(path, program, shape)
    program = move_to_device_pass(program, device)
    model: nn.Module = torch.export.unflatten(program)
    return model.eval()


# --------------------------------------------------------------------------------------------------------- files


def _checked(path: str, example: Tensor) -> io.BytesIO:
    """An archive of what is plain in that of a program, with another example."""
    examples = io.BytesIO()
    torch.save(((example,), {}), examples)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {
                "/".join(PurePosixPath(info.filename).parts[1:]): info
                for info in archive.infolist()
            }
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
                raise ValueError("its parts are compressed")
            files = {name: archive.read(info) for name, info in infos.items()}
        if any(name.startswith("data/aotinductor/") for name in files):
            raise InputError(f"{path!r} holds compiled code, which is not run: {_WAY_OUT}")
        kept = {name: content for name, content in files.items() if _PLAIN.fullmatch(name)}
        kept |= {name: _tensors(path, _read(files[name])) for name in _LISTS}
        kept |= {
            _GRAPH: _graph(path, _read(files[_GRAPH])),
            "data/sample_inputs/model.pt": examples.getvalue(),
        }
    except (MIPINError, OSError):
        raise
    except Exception as error:  # of any kind: the file may hold anything
        raise InputError(
            f"{path!r} is no exported program, or damaged, or of another torch: {error!r}"
        ) from error
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as archive:
        for name, content in kept.items():
            archive.writestr(f"program/{name}", content)
    found.seek(0)
    return found


def _read(content: bytes) -> Any:
    """What JSON holds, with everything on the CPU, wherever it was exported."""
    return json.loads(
        content,
        object_hook=lambda one: (
            {"type": "cpu", "index": None} if one.keys() == {"type", "index"} else one
        ),
    )


def _tensors(path: str, listed: dict[str, Any]) -> bytes:
    """The list that says where each tensor lies, if all are plain."""
    for name, tensor in listed["config"].items():
        if tensor["use_pickle"] is not False or not re.fullmatch(
            r"(weight|tensor)_\d+", tensor["path_name"]
        ):
            raise InputError(
                f"{name!r} in {path!r} is pickled, and its loading could run code: {_WAY_OUT}"
            )
    _check_strings(path, listed)
    return json.dumps(listed).encode()


def _graph(path: str, program: dict[str, Any]) -> bytes:
    """The graph, without what is not needed, if nothing in it could be more than a graph."""
    module = program["graph_module"]
    for entry in module["module_call_graph"]:
        if entry["fqn"]:
            entry["signature"] = None
    whole = next(entry["signature"] for entry in module["module_call_graph"] if not entry["fqn"])
    for name, verb in (("in_spec", "takes"), ("out_spec", "returns")):
        if json.loads(whole.pop(name))[1] != _SPECS[name]:
            raise InputError(f"the program in {path!r} {verb} other than one tensor: {_WAY_OUT}")
    module["metadata"] = {}
    for node in module["graph"]["nodes"]:
        if not _known(node["target"]):
            raise InputError(
                f"the program in {path!r} holds {node['target']!r}, no operation of ATen, which is not run: {_WAY_OUT}"
            )
        node["metadata"] = {
            key: value for key, value in node["metadata"].items() if key == "nn_module_stack"
        }
    _check_strings(path, program)
    guards = [guard for guard in program.get("guards_code", ()) if "size()[0]" in guard]
    if guards:
        raise CaptureError(
            f"the program in {path!r} computes otherwise for other batch sizes than those with {guards[0]}: {_WAY_OUT}"
        )
    whole |= {name: json.dumps([1, spec]) for name, spec in _SPECS.items()}
    return json.dumps(program).encode()


def _known(target: str) -> bool:
    """Whether a string names an operation of ATen that reads and writes no files, or one on sizes."""
    named = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    if named is None:
        return bool(_ON_SIZES.fullmatch(target))
    found = getattr(getattr(torch.ops.aten, named[1], None), named[2], None)
    return isinstance(found, torch._ops.OpOverload) and all(
        one.name != "filename" for one in found._schema.arguments
    )


def _check_strings(path: str, value: Any) -> None:
    for key, string in _strings("", value):
        if not _STRINGS.get(key, _NAME).fullmatch(string):
            raise InputError(
                f"{path!r} holds {string!r} for {key!r}, which is no plain name or size: {_WAY_OUT}"
            )


def _strings(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """All strings with the keys they are under, keys among them."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for one in value:
            yield from _strings(key, one)
    elif isinstance(value, dict):
        for name, one in value.items():
            yield "", name
            yield from _strings(name, one)


# --------------------------------------------------------------------------------------------------------- programs


def _check_mode(path: str, program: ExportedProgram) -> None:
    """Refuse dropout and batch statistics at work, and convolutions that were made operations without a rule."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.convolution.default:
            raise CaptureError(
                f"the program in {path!r} holds aten.convolution, which run_decompositions() makes of convolutions: save the "
                "program as torch.export.export gave it"
            )
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if any(
            given.get(name) not in (None, False, 0.0) for name in ("train", "training", "dropout_p")
        ):
            stack = [inside for inside, _ in module_stack(node).values()]
            raise TrainingModeError(
                f"the program in {path!r} was exported in training mode, as {node.target} in {stack[-1] if stack else ''!r} "
                "shows: call model.eval() before torch.export.export"
            )


def _check_shape(path: str, program: ExportedProgram, shape: Sequence[int]) -> None:
    """Refuse images of another shape than the program takes, and programs for one batch size."""
    (name,) = program.graph_signature.user_inputs
    expected = next(value_of(node) for node in program.graph.nodes if node.name == name)
    count, *sizes = expected.shape
    if isinstance(count, int):
        raise CaptureError(
            f"the program in {path!r} was exported for {count} images at once, and no other number: export it with "
            'torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))'
        )
    if len(sizes) != 3 or any(
        isinstance(n, int) and n != given for n, given in zip(sizes, shape, strict=True)
    ):
        known = ", ".join(str(n) if isinstance(n, int) else "any" for n in sizes)
        raise CaptureError(
            f"the program in {path!r} was exported for inputs (batch, {known}), but the images have shape {tuple(shape)}: "
            "give --size HEIGHTxWIDTH to fit, and one --mean and --std for grey images"
        )
    try:
        with torch.no_grad():
            whole: Any = program.module()
            whole(torch.zeros(2, *shape, dtype=expected.dtype))
    except Exception as error:  # of any kind, guards among them
        raise CaptureError(
            f"the program in {path!r} does not run on images of shape {tuple(shape)}: {error}"
        ) from error
