"""Exported programs explain as their networks do; files whose code could be run are refused."""

import contextlib
import copy
import io
import json
import pickle
import zipfile

import pytest
import torch
from command import FORM, call, photos, refused, take_photos
from safetensors.torch import load_file
from torch import nn
from torch.export import Dim, export, load, save, unflatten
from torch.nn.functional import relu

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution, check, compare
from captum_mipin.copies import copy_memo
from captum_mipin.errors import CaptureError, InputError
from captum_mipin.graph import exported

SHAPE = (3, 8, 8)
CPU = torch.device("cpu")


class Residual(nn.Module):
    """In-place operations, batch norm, dropout, and one convolution called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(36, 3))

    def forward(self, x):
        x = self.stem(x)
        x = self.relu(self.conv(x))
        y = self.conv(x)
        y += x
        return self.head(self.relu(y))


class Functional(nn.Module):
    """Nothing but functions, a buffer that is not saved and a tensor that is a plain attribute."""

    def __init__(self):
        super().__init__()
        self.conv, self.dense = nn.Conv2d(3, 4, 3), nn.Linear(144, 3)
        self.register_buffer("scale", torch.full((4, 1, 1), 1.5), persistent=False)
        self.shift = torch.tensor([0.1, 0.2, 0.3])

    def forward(self, x):
        return self.dense(relu(self.conv(x) * self.scale).flatten(1)) + self.shift


class Larger(nn.Module):
    """Computes otherwise for larger images."""

    def __init__(self):
        super().__init__()
        self.conv, self.dense = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x)
        return self.dense((x * 2 if x.shape[2] * x.shape[3] > 40 else x).mean((2, 3)))


def made(kind):
    torch.manual_seed(5)
    model = kind()
    with torch.no_grad():
        model(torch.randn(32, *SHAPE))  # batch statistics other than 0 and 1
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Programs, other weights for one of them, and 40 images."""
    root = tmp_path_factory.mktemp("programs")
    x, free = torch.randn(2, *SHAPE), {0: Dim("batch")}
    for kind in (Residual, Functional):
        save(export(made(kind), (x,), dynamic_shapes=(free,)), root / f"{kind.__name__}.pt2")
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    save(export(made(Larger), (x,), dynamic_shapes=(sizes,)), root / "Larger.pt2")
    save(export(made(Functional), (x,)), root / "fixed.pt2")
    save(
        export(nn.Sequential(nn.Flatten(), nn.Dropout()), (x,), dynamic_shapes=(free,)),
        root / "dropout.pt2",
    )
    save(export(nn.Bilinear(3, 3, 2).eval(), (x[..., 0, 0], x[..., 0, 0])), root / "two.pt2")
    program = export(made(Larger), (x,), dynamic_shapes=(free,)).run_decompositions()
    save(program, root / "decomposed.pt2")
    other = made(Residual)
    torch.nn.init.normal_(other.head[3].weight)
    torch.save(other.state_dict(), root / "other.pt")
    (root / "photos").mkdir()
    take_photos([root / "photos"])
    return root


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture
def x(folder):
    return photos(folder / "photos")


# ---------------------------------------------------------------------------------- what works


@pytest.mark.parametrize("kind", [Residual, Functional])
def test_a_program_explains_as_its_network(kind, x, capsys):
    model, program = made(kind), f"{kind.__name__}.pt2 {FORM}"
    assert call(f"check {program} --json") == 0
    assert json.loads(capsys.readouterr().out)["operations"] == [
        vars(row) for row in check(model, x[:2]).rows
    ]
    assert call(f"fit {program} photos --out inverse.safetensors --quiet") == 0
    arguments = "--inverse inverse.safetensors --targets 1 --out maps.safetensors"
    assert call(f"explain {program} photos {arguments}") == 0
    mipin = MIPINAttribution(model, InverseNetwork(model).fit(x, batch_size=32, progress=False))
    written = load_file("maps.safetensors")
    torch.testing.assert_close(written["attribution"], mipin.attribute(x, target=1))
    torch.testing.assert_close(written["source_signal"], mipin.source_signal(x, target=1))


def test_layers_weights_and_one_image(x, capsys):
    program = f"Residual.pt2 --weights other.pt {FORM}"
    assert call(f"fit {program} photos --layer stem.2 --out layer.safetensors --quiet") == 0
    capsys.readouterr()
    arguments = "--inverse layer.safetensors --targets 2 --out layer_maps.safetensors --json"
    assert call(f"explain {program} photos/00.png {arguments}") == 0
    model = made(Residual)
    model.load_state_dict(torch.load("other.pt", weights_only=True))
    inverse = InverseNetwork(model, layer=model.stem).fit(x, batch_size=32, progress=False)
    expected = LayerMIPINAttribution(model, inverse).attribute(x[:1], target=2)
    torch.testing.assert_close(load_file("layer_maps.safetensors")["attribution"], expected)
    with torch.no_grad():
        score = float(model(x[:1])[0, 2])
    assert json.loads(capsys.readouterr().out)["images"] == [
        {
            "image": "00.png",
            "target": 2,
            "name": "2",
            "score": pytest.approx(score),
            "explained": True,
        }
    ]


def test_compare_takes_programs(x, capsys):
    methods = "--methods Saliency,Grad-CAM,LRP,DeepLift --metrics deletion,randomization"
    arguments = f"{methods} --layer stem.2 --targets 1 --json --quiet"
    assert call(f"compare Residual.pt2 {FORM} photos {arguments}") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    model = made(Residual)
    expected = compare(
        ["Saliency", "Grad-CAM", "LRP"],
        x,
        [1] * 40,
        metrics=["deletion"],
        model=model,
        layer=model.stem,
        batch_size=32,
        progress=False,
    )
    for row in expected.rows:
        assert rows[row.name]["results"]["deletion"]["mean"] == pytest.approx(
            row.results["deletion"].mean, rel=1e-4
        )
    assert rows["Saliency"]["results"]["randomization"]["n"] == 40
    assert "DeepLift needs a network with modules" in rows["DeepLift"]["errors"][""]


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.9's own
def test_the_module_itself_in_python(x, untouched):
    model, original = unflatten(load("Residual.pt2")).eval(), made(Residual)
    with untouched(model, x):
        signal = InverseNetwork(model).fit(x, progress=False).source_signal(x[:5], target=0)
    expected = InverseNetwork(original).fit(x, progress=False).source_signal(x[:5], target=0)
    torch.testing.assert_close(signal, expected)
    for program in (load("Residual.pt2"), load("Residual.pt2").module()):
        with pytest.raises(CaptureError, match=r"take torch.export.unflatten\(program\).eval\(\)"):
            check(program, x)


def test_weights_that_only_the_traced_graph_holds_are_not_overlooked():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.hidden = nn.Linear(4, 2), [nn.Linear(4, 4)]

        def forward(self, x):
            return self.dense(self.hidden[0](x))

    with pytest.raises(CaptureError, match="not registered"):
        check(Hidden().eval(), torch.randn(2, 4))


# ------------------------------------------------------------------------------ what is refused


def test_what_cannot_be_explained_is_refused_with_the_way_out(folder, capsys):
    (folder / "text.pt2").write_text("a program")
    (folder / "cut.pt2").write_bytes((folder / "Residual.pt2").read_bytes()[:-400])
    with zipfile.ZipFile(folder / "empty.pt2", "w"):
        pass
    torch.save({"weight": torch.ones(2)}, folder / "state.pt2")
    for message, line in (
        ("for batches of 2 images, expected any batch size: export it with", "fixed.pt2"),
        ('dynamic_shapes=({0: torch.export.Dim("batch")},)', "fixed.pt2"),
        (
            "in training mode (see aten.dropout.default in '1'), expected evaluation mode: call",
            "dropout.pt2",
        ),
        (
            "exported for inputs (batch, 3, 8, 8), but the images have shape (3, 9, 8)",
            "Residual.pt2 --size 9x8",
        ),
        ("but the images have shape (1, 8, 8)", "Residual.pt2 --mean 0 --std 1"),
        (
            "aten.convolution, which run_decompositions() makes, expected convolutions such as",
            "decomposed.pt2",
        ),
        ("takes several tensors or other values, expected exactly one tensor", "two.pt2"),
        ("does not run on images of shape (3, 9, 9): Guard failed:", "Larger.pt2 --size 9"),
        ("MODEL 'none.pt2' does not exist", "none.pt2"),
        ("is no exported program, is damaged", "text.pt2"),
        ("is no exported program, is damaged", "cut.pt2"),
        ("is no exported program, is damaged", "empty.pt2"),
        ("is no exported program, is damaged", "state.pt2"),
        ("do not fit the model", "Functional.pt2 --weights other.pt"),
        (
            "has no layer 'stem.7', expected the name of a module of this UnflattenedModule: pass "
            "for example one of 'stem.",
            "Residual.pt2 --layer stem.7",
        ),
    ):
        assert message in refused(capsys, f"check {FORM} {line}"), message
    assert call(f"check Larger.pt2 {FORM}") == 0


RAN = []


class Runs:
    """Unpickling it runs code."""

    def __reduce__(self):
        return exec, (f"__import__('sys').modules[{__name__!r}].RAN.append('unpickled')",)


def changed(source, target, change):
    """A copy of an archive, its files by name changed first."""
    with zipfile.ZipFile(source) as archive:
        files = {"/".join(name.split("/")[1:]): archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"program/{name}", content)
    return str(target)


def in_json(path, name, change):
    """Changes one JSON file of an archive."""

    def found(files):
        content = json.loads(files[name])
        change(content)
        files[name] = json.dumps(content).encode()

    return changed("Functional.pt2", path, found)


def pickled():
    buffer = io.BytesIO()
    torch.save(Runs(), buffer)
    return buffer.getvalue()


def test_pickled_examples_are_left_out(tmp_path):
    path = changed(
        "Functional.pt2",
        tmp_path / "a.pt2",
        lambda files: files.update({"data/sample_inputs/model.pt": pickled()}),
    )
    torch.testing.assert_close(
        exported.load(path, SHAPE, CPU)(torch.ones(2, *SHAPE)),
        made(Functional)(torch.ones(2, *SHAPE)),
    )
    assert RAN == []
    with contextlib.suppress(TypeError, AssertionError):  # torch's own, of what it unpickled
        torch.export.load(path)  # which would run it
    assert RAN == ["unpickled"]
    RAN.clear()


CODE = f"__import__('sys').modules[{__name__!r}].RAN.append(1)"
ENUM = json.dumps(
    [
        1,
        {
            "type": "builtins.tuple",
            "context": '{"__enum__": true, "fqn": "this:a"}',
            "children_spec": [],
        },
    ]
)
GRAPH, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


def weight(content):
    return content["config"]["conv.weight"]


def shift(content):
    return content["config"]["shift"]


def node(program):
    return program["graph_module"]["graph"]["nodes"][0]


def size(program):
    return program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]


def parameter(program):
    return program["graph_module"]["signature"]["input_specs"][0]["parameter"]


def calls(program):
    return program["graph_module"]["module_call_graph"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (WEIGHTS, lambda c: weight(c).update(use_pickle=True)),
        (WEIGHTS, lambda c: weight(c).update(path_name="../weight_0")),
        (CONSTANTS, lambda c: shift(c).update(path_name="custom_obj_0")),
        (CONSTANTS, lambda c: shift(c).update(path_name="opaque_obj_0")),
        (GRAPH, lambda c: size(c).update(expr_str=CODE)),
        (GRAPH, lambda c: c["guards_code"].append(CODE)),
        (GRAPH, lambda c: c["guards_code"].append("L['x'].__class__")),
        (GRAPH, lambda c: node(c).update(target="torch.hub.load")),
        (GRAPH, lambda c: node(c).update(target="torch.ops.load_library")),
        (GRAPH, lambda c: node(c).update(target="torch.ops.aten.from_file.default")),
        (GRAPH, lambda c: node(c).update(target="torch.ops.aten.save.default")),
        (GRAPH, lambda c: node(c).update(target="torch.ops.aten.__class__.mro")),
        (GRAPH, lambda c: node(c).update(target="_operator.methodcaller")),
        (GRAPH, lambda c: node(c).update(target=CODE)),
        (GRAPH, lambda c: node(c)["inputs"][0].update(name=CODE)),
        (GRAPH, lambda c: node(c)["inputs"][0].update(arg={"as_operator": "torch.hub.load"})),
        (GRAPH, lambda c: node(c)["outputs"][0]["as_tensor"].update(name=CODE)),
        (GRAPH, lambda c: node(c)["metadata"].update(nn_module_stack=CODE)),
        (GRAPH, lambda c: parameter(c).update(parameter_name=CODE)),
        (GRAPH, lambda c: calls(c)[0]["signature"].update(in_spec=ENUM)),
        (GRAPH, lambda c: calls(c).append({"fqn": CODE, "signature": None})),
        (GRAPH, lambda c: c.update({CODE: 1})),
    ],
)
def test_nothing_in_a_program_is_run(name, change, tmp_path):
    path = in_json(tmp_path / "a.pt2", name, change)
    with pytest.raises(
        InputError, match=r"take the network it was exported from|is no exported program"
    ):
        exported.load(path, SHAPE, CPU)
    assert RAN == []


def test_compiled_code_and_older_files_are_refused(tmp_path):
    path = changed(
        "Functional.pt2",
        tmp_path / "a.pt2",
        lambda files: files.update({"data/aotinductor/model/a.so": b""}),
    )
    with pytest.raises(InputError, match="compiled code, which is not run"):
        exported.load(path, SHAPE, CPU)
    older = {
        "version": b"8.0",
        "serialized_exported_program.json": b"{}",
        "serialized_state_dict.pt": pickle.dumps(Runs()),
    }
    path = changed(
        "Functional.pt2", tmp_path / "b.pt2", lambda files: (files.clear(), files.update(older))
    )
    with pytest.raises(InputError, match="no exported program"):
        exported.load(path, SHAPE, CPU)
    with zipfile.ZipFile(tmp_path / "c.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("program/models/model.json", "{}")
    with pytest.raises(InputError, match="its parts are compressed"):
        exported.load(str(tmp_path / "c.pt2"), SHAPE, CPU)
    assert RAN == []


def test_a_program_of_a_gpu_runs_on_the_cpu(tmp_path):
    def on_a_gpu(value):
        if isinstance(value, dict):
            value.update({"type": "cuda", "index": 0} if value.keys() == {"type", "index"} else {})
            list(map(on_a_gpu, value.values()))
        elif isinstance(value, list):
            list(map(on_a_gpu, value))

    def change(files):
        for name in (GRAPH, WEIGHTS, CONSTANTS):
            content = json.loads(files[name])
            on_a_gpu(content)
            assert "cuda" in json.dumps(content)
            files[name] = json.dumps(content).encode()

    path = changed("Functional.pt2", tmp_path / "a.pt2", change)
    x = torch.randn(4, *SHAPE)
    torch.testing.assert_close(exported.load(path, SHAPE, CPU)(x), made(Functional)(x))


def test_a_module_of_a_program_can_be_copied():
    model = exported.load("Residual.pt2", SHAPE, CPU)
    x = torch.randn(3, *SHAPE)
    torch.testing.assert_close(copy.deepcopy(model, copy_memo(model))(x), model(x))
