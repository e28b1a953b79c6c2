"""Load exported programs (``torch.export.save``) as modules, without running code in their files.

``torch.export.load`` unpickles parts of such a file, loads compiled libraries from it, and
evaluates strings of its graph as Python. Therefore the file is read and checked here first. Then
``torch`` loads a new archive, which contains plain tensors and a graph. Each string of that graph
is a name, an operation of ATen or a formula of sizes. A file with anything else is refused.
"""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from captum_mipin.errors import CaptureError, InputError, MIPINError, TrainingModeError
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import place

_WAY_OUT = (
    "take the network it was exported from, as package.module:FACTORY, with --weights for its state"
)

#: Files of an archive: its graph, its lists of tensors, and the pattern of files that are copied.
_GRAPH = "models/model.json"
_LISTS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_TENSOR = r"(weight|tensor)_\d+"
_COPIED = (
    rf"data/(weights|constants)/{_TENSOR}"
    r"|\.data/(version|serialization_id)|archive_(format|version)|byteorder"
)

_FUNCTIONS = (
    r"\b(Max|Min|Mod|PythonMod|ModularIndexing|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|PowByNatural"
    r"|ToFloat|(Trunc|Ceil|Floor)ToInt)\("
)
#: Key in the graph → pattern that the strings inside its value must match. For all other keys, the
#: strings must match _NAME.
_STRINGS = {
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), r"\w*"),
    "as_string": r"[\w ,.>-]*",
    "as_operator": r"(?!)",
    "nn_module_stack": r"[\w.,;@:<>\[\]() -]*",
    "expr_str": (
        r"(Symbol\('\w+'|\b(positive|integer|nonnegative)=True"
        r"|\b(Integer|Add|Mul|Pow|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not)\("
        rf"|{_FUNCTIONS}|\b[a-z]*\d+\b|[-+*/%<>=(), ])*"
    ),
    "guards_code": (
        rf"(L\['\w+'\]\.size\(\)\[\d+\]|{_FUNCTIONS}"
        r"|\b(max|min)\(|\b(and|or|not|\d+)\b|[-+*/%<>=!(), ])*"
    ),
}
_NAME = r"[\w.@:<>+ -]*"
_ON_SIZES = (
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|math\.(trunc|ceil|floor)|torch\.sym_(not|int|float|ite|max|min|sqrt)"
)

#: Structures of a program's arguments and of its results, as in its file: one tensor each.
_SPECS = {
    name: pytree.treespec_dumps(pytree.tree_structure(example))
    for name, example in (("in_spec", ((0,), {})), ("out_spec", 0))
}


def load(path: str, shape: Sequence[int], device: torch.device) -> nn.Module:
    """Return the module of an exported program, in evaluation mode.

    The submodules have the same names as before the export.

    Args:
        path: Path of a file that ``torch.export.save`` wrote.
        shape: (channels, height, width) of the images that the module is used for.
        device: Device that the module is moved to.

    Raises:
        OSError: The file cannot be read.
        InputError: The file is not an exported program, is damaged, or contains something that
            could run code.
        TrainingModeError: The program was exported in training mode.
        CaptureError: The program was decomposed, or exported for a single batch size or for images
            of another shape.
    """
    content = Path(path).read_bytes()
    try:
        with warnings.catch_warnings():
            # torch 2.9 maps the weights as read-only memory and warns about it
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            program = torch.export.load(_plain_archive(content, shape))
        _check_mode(program)
        _check_shape(program, shape)
    except MIPINError as error:
        raise type(error)(f"the program in {path!r} {error}") from error
    except Exception as error:  # of any type: the file may hold anything
        raise InputError(
            f"{path!r} cannot be read ({error!r}): it is no exported program, is damaged, or was "
            f"saved by another version of torch than {torch.__version__}. Save the program again "
            "with torch.export.save"
        ) from error
    model: nn.Module = torch.export.unflatten(move_to_device_pass(program, device))
    return model.eval()


# ---------------------------------------------------------------------------------------- files


def _plain_archive(content: bytes, shape: Sequence[int]) -> io.BytesIO:
    """Return a copy of a program's archive with only those parts that cannot run code.

    Raises:
        InputError: The program needs a part that could run code.
        CaptureError: The program is for some batch sizes only.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        # All files are in one folder, which has the name that the archive had when it was saved.
        infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
            raise ValueError("its parts are compressed, expected parts that are only stored")
        files = {name: archive.read(info) for name, info in infos.items()}
    if any(name.startswith("data/aotinductor/") for name in files):
        raise InputError(
            f"contains compiled code, which is not run; expected a graph and tensors: {_WAY_OUT}"
        )
    example = io.BytesIO()
    torch.save(((torch.zeros(2, *shape),), {}), example)
    plain = {name: content for name, content in files.items() if re.fullmatch(_COPIED, name)}
    for name in _LISTS:
        plain[name] = _plain_tensors(_read(files[name]))
    plain[_GRAPH] = _plain_graph(_read(files[_GRAPH]))
    plain["data/sample_inputs/model.pt"] = example.getvalue()
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in plain.items():
            archive.writestr(f"program/{name}", content)
    written.seek(0)
    return written


def _read(content: bytes) -> Any:
    """Return the content of a JSON file, with all devices replaced by the CPU."""
    cpu = {"type": "cpu", "index": None}
    return json.loads(content, object_hook=lambda item: cpu if item.keys() == cpu.keys() else item)


def _plain_tensors(listed: dict[str, Any]) -> bytes:
    """Return the checked list of the files of tensors.

    Raises:
        InputError: A tensor is pickled, or a string of the list is not a plain name.
    """
    for name, tensor in listed["config"].items():
        if tensor["use_pickle"] is not False or not re.fullmatch(_TENSOR, tensor["path_name"]):
            raise InputError(
                f"contains {name!r} in pickled form, and loading it could run code; expected the "
                f"plain bytes of a tensor: {_WAY_OUT}"
            )
    _check_strings(listed)
    return json.dumps(listed).encode()


def _plain_graph(program: dict[str, Any]) -> bytes:
    """Return the checked graph, without the metadata that is not needed.

    Raises:
        InputError: The graph calls something that is not an operation of ATen, contains a string
            that could be code, or takes or returns more than one tensor.
        CaptureError: The graph is for some batch sizes only.
    """
    module = program["graph_module"]
    for entry in module["module_call_graph"]:
        if not entry["fqn"]:
            signature = entry["signature"]
        else:
            entry["signature"] = None
    for name, verb in (("in_spec", "takes"), ("out_spec", "returns")):
        if json.loads(signature.pop(name)) != json.loads(_SPECS[name]):
            raise InputError(
                f"{verb} several tensors or other values, expected exactly one tensor: {_WAY_OUT}"
            )
    module["metadata"] = {}
    for node in module["graph"]["nodes"]:
        if not _is_known(node["target"]):
            raise InputError(
                f"contains {node['target']!r}, which is not run, expected operations of ATen "
                f"alone: {_WAY_OUT}"
            )
        node["metadata"] = {"nn_module_stack": node["metadata"].get("nn_module_stack", "")}
    _check_strings(program)
    for guard in program.get("guards_code", ()):
        if "size()[0]" in guard:
            raise CaptureError(
                f"is valid only for batch sizes with {guard}, expected any batch size: {_WAY_OUT}"
            )
    signature |= _SPECS
    return json.dumps(program).encode()


def _is_known(target: str) -> bool:
    """Return True for an operation of ATen that accesses no files, or an operation on sizes."""
    name = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    if name is None:
        return bool(re.fullmatch(_ON_SIZES, target))
    operation = getattr(getattr(torch.ops.aten, name[1], None), name[2], None)
    return isinstance(operation, torch._ops.OpOverload) and all(
        argument.name != "filename" for argument in operation._schema.arguments
    )


def _check_strings(value: Any, key: str = "") -> None:
    """Raise InputError if a string at any depth does not match the pattern of its key."""
    if isinstance(value, str):
        if not re.fullmatch(_STRINGS.get(key, _NAME), value):
            raise InputError(
                f"contains the string {value!r} at {key!r}, expected a plain name or a formula of "
                f"sizes: {_WAY_OUT}"
            )
    elif isinstance(value, list):
        for item in value:
            _check_strings(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_strings(name)
            _check_strings(item, name)


# ------------------------------------------------------------------------------------- programs


def _check_mode(program: ExportedProgram) -> None:
    """Check that a program was exported in evaluation mode and was not decomposed.

    Raises:
        TrainingModeError: The program uses dropout or the statistics of the batch.
        CaptureError: The program was decomposed.
    """
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.convolution.default:
            raise CaptureError(
                "contains aten.convolution, which run_decompositions() makes, expected "
                "convolutions such as aten.conv2d: save the program that torch.export.export "
                "returned, without decomposing it"
            )
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        names = (argument.name for argument in node.target._schema.arguments)
        values = dict(zip(names, node.args, strict=False)) | node.kwargs
        if any(values.get(name) for name in ("train", "training", "dropout_p")):
            raise TrainingModeError(
                f"was exported in training mode (see {node.target} in {place(node).path!r}), "
                "expected evaluation mode: call model.eval() before torch.export.export"
            )


def _check_shape(program: ExportedProgram, shape: Sequence[int]) -> None:
    """Raise CaptureError if a program is for a single batch size, or for images of another shape.

    Args:
        program: The program.
        shape: (channels, height, width) of the images that it is used for.
    """
    (name,) = program.graph_signature.user_inputs
    expected = next(value_of(node) for node in program.graph.nodes if node.name == name)
    count, *sizes = expected.shape
    if isinstance(count, int):
        raise CaptureError(
            f"was exported for batches of {count} images, expected any batch size: export it with "
            'dynamic_shapes=({0: torch.export.Dim("batch")},)'
        )
    known = [size if isinstance(size, int) else "any" for size in sizes]
    if len(known) != 3 or any(k not in ("any", n) for k, n in zip(known, shape, strict=True)):
        raise CaptureError(
            f"was exported for inputs (batch, {', '.join(map(str, known))}), but the images have "
            f"shape {tuple(shape)}: give --size HEIGHTxWIDTH to fit, "
            "and one --mean and --std for grey images"
        )
    try:
        with torch.no_grad():
            model: Any = program.module()
            model(torch.zeros(2, *shape, dtype=expected.dtype))
    except Exception as error:  # of any type, violated guards among them
        raise CaptureError(
            f"does not run on images of shape {tuple(shape)}: {error}. Export it with images of "
            "this shape, or give --size HEIGHTxWIDTH"
        ) from error
