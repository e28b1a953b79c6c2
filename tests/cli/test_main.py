"""The command line writes what the library gives, and fails in one line."""

import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import FORM, MEAN, STD, call, photos, refused
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import captum_mipin.methods
from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution, compare
from captum_mipin.cli.main import _write, main
from captum_mipin.comparison import Comparison, Row
from captum_mipin.errors import DenseHeadWarning

MODEL = f"tiny_networks:build --weights weights.pt {FORM}"
EXPLAIN = f"explain {MODEL} few --inverse inverse.safetensors"
COMPARE = f"compare {MODEL} few --quiet"


@pytest.fixture
def mipin(model):
    return MIPINAttribution(model, InverseNetwork.load("inverse.safetensors", model))


@pytest.fixture
def few(folder):
    return photos(folder / "few")


# ------------------------------------------------------------------------------------ commands


def test_check_tells_of_every_operation(capsys):
    assert call(f"check tiny_networks:build {FORM}") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[1:3] for line in out.splitlines()[1:3]] == [
        ["aten.conv2d.default", "supported"],
        ["aten.relu.default", "supported"],
    ]
    assert call(f"check tiny_networks:build {FORM} --layer 2 --json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert [(row["path"], row["operation"]) for row in report["operations"]] == [
        ("4", "aten.linear.default")
    ]


def test_what_a_model_prints_is_no_result(capsys):
    arguments = "--methods Saliency --json --quiet"
    assert call(f"compare tiny_networks:loud {FORM} few {arguments}") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["files"] == ["00.png", "02.png", "04.png"]
    assert {"made", "called"} <= set(err.splitlines())


def test_check_fails_where_an_operation_is_refused(capsys):
    assert call(f"check tiny_networks:refused {FORM} --json") == 1
    out, err = capsys.readouterr()
    assert not json.loads(out)["ok"]
    assert err == "captum-mipin: 1 of 5 operations are refused: 1/aten.cumprod.default\n"


def test_check_names_the_operation_that_loses_the_batch_and_not_all_behind_it(folder, capsys):
    """Formerly each of the 60 operations behind it was named."""
    (folder / "firsts.py").write_text(
        "from torch import nn\n"
        "class First(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.steps = nn.Sequential(*[nn.Sequential(nn.ReLU(), nn.Tanh())] * 30)\n"
        "    def forward(self, x):\n"
        "        return self.steps(x[0])\n"
    )
    assert call("check firsts:First --size 8") == 1
    found = capsys.readouterr()
    assert found.err == "captum-mipin: 61 of 61 operations are refused: (model)/aten.select.int\n"
    assert "steps.0.0" in found.out


def test_fit_writes_the_inverse_of_the_library(folder, model, capsys):
    x = photos(folder / "photos")
    expected = InverseNetwork(model).fit(x, batch_size=32, progress=False)
    written = InverseNetwork.load("inverse.safetensors", model)
    assert written.targets == [0, 1, 2]
    torch.testing.assert_close(
        written.source_signal(x, target=1), expected.source_signal(x, target=1)
    )
    options = "--targets 2 --ridge 0.5 --sharing classes"
    assert call(f"fit {MODEL} photos {options} --out other.safetensors --json") == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert (printed["targets"], printed["out"]) == ([2], "other.safetensors")
    assert [layer["layer"] for layer in printed["layers"]] == ["4/linear", "0/conv2d"]
    assert "4/linear · class 2" in err  # the progress
    other = InverseNetwork.load("other.safetensors", model)
    assert (other.settings.ridge, other.settings.sharing) == (0.5, True)


def test_explain_writes_the_maps_of_the_library(model, mipin, few, capsys):
    targets = [2, 0, 1]
    outs = "--out maps.safetensors --out maps.png"
    assert call(f"{EXPLAIN} --targets 2,0,1 --batch-size 2 {outs} --json") == 0
    rows = json.loads(capsys.readouterr().out)["images"]
    with torch.no_grad():
        scores = model(few)[range(3), targets].tolist()
    assert [row["image"] for row in rows] == ["00.png", "02.png", "04.png"]
    assert [row["target"] for row in rows] == targets
    assert [row["score"] for row in rows] == pytest.approx(scores)
    written = load_file("maps.safetensors")
    torch.testing.assert_close(written["attribution"], mipin.attribute(few, target=targets))
    torch.testing.assert_close(written["source_signal"], mipin.source_signal(few, target=targets))
    assert written["target"].tolist() == targets
    with safe_open("maps.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["images"]) == ["00.png", "02.png", "04.png"]
    with Image.open("maps.png") as picture:
        assert picture.size[1] > picture.size[0]  # three images below each other, one method


def test_the_picture_of_explain_names_reading_and_layer(mipin, few, monkeypatch):
    drawn = []
    monkeypatch.setattr("captum_mipin.cli.main._write", lambda shown, path: drawn.append(shown))
    for options, caption in (
        ("", "MIP-IN\nA at the input"),
        ("--reading 'times input'", "MIP-IN × input\nat the input"),
        ("--reading 'times feature'", "MIP-IN × feature\nat the input"),
        ("--layer 0", "MIP-IN\nA at 0"),
        ("--layer 0 --reading 'times gradient'", "MIP-IN × gradient\nat 0"),
    ):
        assert call(f"{EXPLAIN} --targets 2 {options} --out maps.png") == 0
        assert [row.caption for row in drawn.pop().rows] == [caption]


def test_targets_count_from_the_end_as_in_python(mipin, few, capsys):
    assert call(f"{EXPLAIN} --targets=-1,0,-2 --out last.safetensors --json") == 0
    assert [row["target"] for row in json.loads(capsys.readouterr().out)["images"]] == [2, 0, 1]
    written = load_file("last.safetensors")
    expected = mipin.attribute(few, target=[-1, 0, -2])
    torch.testing.assert_close(written["attribution"], expected)
    assert written["target"].tolist() == [2, 0, 1]
    assert call(f"{COMPARE} --methods Saliency --metrics deletion --targets=-1 --json") == 0
    assert json.loads(capsys.readouterr().out)["titles"] == ["2"] * 3
    error = refused(capsys, f"{EXPLAIN} --targets=-4 --out no.safetensors")
    assert "target -4 is outside" in error


def test_what_is_predicted_is_explained_by_default(model, few, capsys):
    inverse = "--inverse layer.safetensors --out layer_maps.safetensors"
    assert call(f"explain {MODEL} few {inverse}") == 0
    with torch.no_grad():
        scores, predicted = model(few).max(1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        [f"0{2 * i}.png", str(int(c)), f"{float(s):.4g}"]
        for i, (s, c) in enumerate(zip(scores, predicted, strict=True))
    ]
    mipin = LayerMIPINAttribution(model, InverseNetwork.load("layer.safetensors", model))
    written = load_file("layer_maps.safetensors")
    assert written["attribution"].shape == (3, 4, 6, 6)
    torch.testing.assert_close(written["attribution"], mipin.attribute(few, target=predicted))


def test_a_layer_of_an_inverse_that_reaches_the_pixels(model, few):
    arguments = "--inverse inverse.safetensors --layer 1 --targets 1 --out one.safetensors"
    assert call(f"explain {MODEL} few/00.png {arguments}") == 0
    inverse = InverseNetwork.load("inverse.safetensors", model)
    expected = LayerMIPINAttribution(model, inverse, model[1]).attribute(few[:1], target=1)
    torch.testing.assert_close(load_file("one.safetensors")["attribution"], expected)


def test_compare_writes_the_table_and_the_page_of_the_library(model, few, capsys):
    methods = "--methods 'mip-in, Saliency,inputxgradient,Grad-CAM' --metrics deletion,completeness"
    outs = "--out page.html --out table.md --out table.txt --out grid.svg"
    arguments = "--inverse inverse.safetensors --targets 1 --layer 1"
    assert call(COMPARE, arguments, methods, outs) == 0
    out, err = capsys.readouterr()
    expected = compare(
        ["MIP-IN", "Saliency", "Input×Gradient", "Grad-CAM"],
        few,
        [1] * 3,
        metrics=["deletion", "completeness"],
        model=model,
        layer=model[1],
        inverse=InverseNetwork.load("inverse.safetensors", model),
        batch_size=32,
        progress=False,
    )
    assert (out, err) == (f"{expected.table()}\n", "")
    assert Path("table.txt").read_text() == f"{expected.table()}\n"
    assert Path("table.md").read_text() == f"{expected.table('markdown')}\n"
    replace(expected, images=(few * STD + MEAN).clamp(0, 1)).save_html("expected.html")
    pages = [Path(name).read_text() for name in ("page.html", "expected.html")]
    # numbers to sort by have all digits; on some processors the last ones depend on where weights
    # lie in memory, and those of a file lie elsewhere
    number = r'(?<=value=")-?\d[\d.e+-]*(?=")'
    assert re.sub(number, "", pages[0]) == re.sub(number, "", pages[1])
    sorted_by = [list(map(float, re.findall(number, page))) for page in pages]
    assert sorted_by[0] == pytest.approx(sorted_by[1], rel=1e-6)
    assert "<svg" in Path("grid.svg").read_text()


def test_compare_without_an_inverse_takes_methods_that_need_none(capsys):
    assert call(f"{COMPARE} --metrics deletion --json") == 0
    printed = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in printed["rows"]]
    assert names[:4] == ["Saliency", "SmoothGrad", "Integrated Gradients", "random"]
    assert printed["files"] == ["00.png", "02.png", "04.png"]
    assert not any(row["errors"] for row in printed["rows"])


def test_weights_that_metrics_make_random_do_not_stop_mip_in(capsys):
    inverse = "--inverse inverse.safetensors --methods MIP-IN --metrics randomization"
    assert call(f"{COMPARE} {inverse} --json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["MIP-IN"]["errors"] == {}
    assert rows["MIP-IN"]["results"]["randomization"]["n"] == 3


def test_a_method_that_fails_is_told_in_its_row_and_all_that_fail_in_one_line(capsys):
    assert call(f"{COMPARE} --methods Saliency,Grad-CAM --metrics deletion") == 0
    out = capsys.readouterr().out
    assert re.search(r"Grad-CAM +failed", out)
    assert "pass --layer, a module of the network or its name" in out
    error = refused(capsys, f"{COMPARE} --methods Grad-CAM --metrics deletion")
    assert "nothing was measured, because every method failed: no layer was given" in error


def test_nothing_measured_is_a_failure(capsys):
    methods = f"{COMPARE} --methods Saliency,Gradient"
    error = refused(capsys, f"{methods} --metrics completeness")
    assert (
        "nothing was measured, because completeness failed: the method has no source_signal"
        in error
    )
    assert call(f"{methods} --metrics completeness,deletion") == 0
    assert "completeness (Saliency, Gradient" in capsys.readouterr().out


def test_a_model_with_one_output_has_no_target(capsys):
    model = f"tiny_networks:single {FORM}"
    torch.manual_seed(0)
    assert call(f"fit {model} photos --out single.safetensors --quiet") == 0
    torch.manual_seed(0)
    inverse = "--inverse single.safetensors --out s.safetensors"
    assert call(f"explain {model} few {inverse} --json") == 0
    rows = json.loads(capsys.readouterr().out.split("\n", 3)[3])["images"]
    assert [row["target"] for row in rows] == [None] * 3
    assert load_file("s.safetensors").keys() == {"attribution", "source_signal"}


def test_predictions_are_listed_with_names(model, few, capsys):
    Path("names.txt").write_text("cat\ndog\ncow\n")
    predict = f"predict {MODEL} few --names names.txt"
    assert call(f"{predict} --top 2 --batch-size 2 --json") == 0
    rows = json.loads(capsys.readouterr().out)["images"]
    with torch.no_grad():
        shares, classes = model(few).softmax(1).topk(2)
    assert [row["class"] for row in rows] == classes.flatten().tolist()
    assert [row["probability"] for row in rows] == pytest.approx(shares.flatten().tolist())
    names = ["cat", "dog", "cow"]
    assert [row["name"] for row in rows] == [names[i] for i in classes.flatten().tolist()]
    assert call(predict) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "name", "class", "score", "probability"]
    assert len(lines) == 10
    assert call(f"predict tiny_networks:single {FORM} few") == 0
    assert capsys.readouterr().out.split()[:2] == ["image", "score"]
    assert "none.txt" in refused(capsys, f"predict {MODEL} few --names none.txt")


def test_names_that_are_not_as_many_as_the_outputs_are_refused(few, capsys):
    """Formerly a file of two names for a thousand classes was taken without a word."""
    pytest.importorskip("torchvision", reason="the names of ImageNet come with it")
    Path("two.txt").write_text("cat\ndog\n")
    Path("four.txt").write_text("cat\ndog\ncow\nhen\n")
    Path("blank.txt").write_text("cat\ndog\ncow\n\n")
    predict = f"predict {MODEL} few"
    explain = f"{EXPLAIN} --targets 0 --out no.png"
    for command in (predict, explain, f"{COMPARE} --methods Saliency --no-metrics"):
        for names, count in (("two.txt", 2), ("four.txt", 4), ("imagenet", 1000)):
            error = refused(capsys, f"{command} --names {names}")
            assert f"--names {names!r} has {count} names, but the model has 3 outputs" in error
            assert "expected one name per output: pass a file with one line per output" in error
    assert call(f"{predict} --names blank.txt") == 0


def test_the_classes_that_photographs_need_are_fitted(model, few, capsys):
    with torch.no_grad():
        needed = sorted(set(model(few).argmax(1).tolist()))
    assert len(needed) < 3
    fit = f"fit {MODEL} photos --quiet --targets predicted --out needed.safetensors"
    assert call(f"{fit} --for few --batch-size 2 --json") == 0
    assert json.loads(capsys.readouterr().out)["targets"] == needed
    with torch.no_grad():
        every = sorted(set(model(photos(Path("photos"))).argmax(1).tolist()))
    assert call(f"{fit} --json") == 0
    assert json.loads(capsys.readouterr().out)["targets"] == every
    arguments = "--targets predicted --inverse needed.safetensors --out n.safetensors"
    assert call(f"explain {MODEL} few {arguments}") == 0


def test_explain_goes_on_where_a_class_was_not_fitted(model, few, capsys):
    assert call(f"fit {MODEL} photos --targets 0,1 --out two.safetensors --quiet") == 0
    capsys.readouterr()
    outs = "--out two_maps.safetensors --out two_maps.png"
    explain = f"explain {MODEL} few --inverse two.safetensors --targets 1,2,0 {outs}"
    assert call(explain) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("(not fitted)")
    way_out = "fit all with captum-mipin fit --targets 0,1,2"
    assert lines[-1] == f"no inverse was fitted for target 2: {way_out}"
    written = load_file("two_maps.safetensors")
    assert written["target"].tolist() == [1, 0]
    mipin = MIPINAttribution(model, InverseNetwork.load("two.safetensors", model))
    torch.testing.assert_close(written["attribution"], mipin.attribute(few[[0, 2]], target=[1, 0]))
    with safe_open("two_maps.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["images"]) == ["00.png", "04.png"]
    assert call(explain, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["images"]
    assert [row["explained"] for row in rows] == [True, False, True]


def test_classes_that_are_missing_are_fitted_with_those_of_the_file(few, capsys):
    """Formerly the advice named one class, and a fit of it alone lost the others."""
    fit, out = f"fit {MODEL} photos --quiet", "--out two.safetensors"
    options = f"{MODEL} few --inverse two.safetensors --targets 1,2,1"
    for command in (
        f"explain {options} --out two_maps.safetensors",
        f"compare {options} --methods MIP-IN --no-metrics --quiet",
    ):
        assert call(f"{fit} {out} --targets 0,1") == 0
        capsys.readouterr()
        assert call(command) == 0
        (advice,) = re.findall(r"captum-mipin fit (--targets [\d,]+)", capsys.readouterr().out)
        assert advice == "--targets 0,1,2"
        assert call(f"{fit} {out} {advice}") == 0
        capsys.readouterr()
        assert call(command) == 0
        assert "no inverse was fitted" not in capsys.readouterr().out
    assert call(f"{fit} {out} --targets 0") == 0
    compare = f"compare {MODEL} few --inverse two.safetensors --methods MIP-IN --no-metrics --quiet"
    capsys.readouterr()
    assert call(f"{compare} --targets 0,2,1") == 0
    advice = re.findall(r"captum-mipin fit --targets ([\d,]+)", capsys.readouterr().out)
    assert advice == ["0,1,2"] * 2


@pytest.mark.parametrize(
    ("written", "reading"),
    [
        ("'times feature'", "× feature"),
        ("'times input'", "× input"),
        ("s", "S"),
        ("'A x gradient'", "× gradient"),
    ],
)
def test_readings(written, reading, mipin, few, capsys):
    options = f"--targets 1 --reading {written}"
    assert call(f"{EXPLAIN} {options} --out reading.safetensors") == 0
    capsys.readouterr()
    maps = load_file("reading.safetensors")["attribution"]
    methods = {
        "S": lambda: mipin.source_signal(few, target=1),
        "× feature": lambda: mipin.attribute(few, target=1, multiply_by_inputs=True),
        "× input": lambda: mipin.attribute(few, target=1) * few,
        "× gradient": lambda: mipin.attribute(few, target=1, multiply_by_gradients=True),
    }
    torch.testing.assert_close(maps, methods[reading]())
    arguments = f"--inverse inverse.safetensors {options} --no-metrics --json"
    assert call(COMPARE, arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["name"] == f"MIP-IN {reading}"
    assert found["metrics"] == []
    assert [row["name"] for row in found["rows"]].count("MIP-IN") == 0


def test_an_inverse_for_photographs_is_read_as_for_photographs_reads_it(capsys):
    """Formerly the default was A, and the map of for_photographs had to be known by name."""
    network = "tiny_networks:staged --size 64"
    fit = f"fit {network} photos --targets 1 --quiet"
    assert call(fit, "--layer photographs --out picked.safetensors") == 0
    assert call(fit, "--layer 1 --out named.safetensors") == 0

    def explained(options):
        assert call(f"explain {network} few --targets 1 --out read.safetensors", options) == 0
        with safe_open("read.safetensors", framework="pt") as file:
            return file.get_tensor("attribution"), file.metadata()["reading"]

    a, _ = explained("--inverse named.safetensors --reading A")
    signed, _ = explained("--inverse named.safetensors --reading 'times gradient'")
    unsigned = signed.abs().sum(1, keepdim=True)
    for options, expected, name in (
        ("--inverse picked.safetensors", unsigned, "unsigned × gradient"),
        ("--inverse picked.safetensors --reading A", a, "A"),
        ("--inverse named.safetensors", a, "A"),
    ):
        maps, written = explained(options)
        torch.testing.assert_close(maps, expected)
        assert written == name
    capsys.readouterr()
    whole = "MIP-IN unsigned × gradient"
    for options, names in (
        ("", [whole, "Saliency", "SmoothGrad", "Integrated Gradients"]),
        ("--methods MIP-IN,Saliency", [whole, "Saliency"]),
        ("--methods Saliency", ["Saliency"]),
        ("--reading A --methods MIP-IN", ["MIP-IN"]),
        (f"--reading A --methods '{whole}'", ["MIP-IN", whole]),
    ):
        line = f"compare {network} few --targets 1 --quiet --no-metrics --json"
        assert call(line, "--inverse picked.safetensors", options) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert [row["name"] for row in rows if not row["control"]] == names


def test_an_inverse_of_a_dense_head_is_read_times_the_feature():
    network = "tiny_networks:dense --size 64"
    fit = f"fit {network} photos --targets 1 --quiet --layer photographs --out dense.safetensors"
    with pytest.warns(DenseHeadWarning):
        assert call(fit) == 0
    maps = []
    for options in ("", "--reading 'times feature'"):
        explain = f"explain {network} few --targets 1 --inverse dense.safetensors"
        assert call(f"{explain} --out read.safetensors", options) == 0
        with safe_open("read.safetensors", framework="pt") as file:
            maps.append((file.get_tensor("attribution"), file.metadata()["reading"]))
    assert [name for _, name in maps] == ["unsigned × feature", "A × feature"]
    torch.testing.assert_close(maps[0][0], maps[1][0].abs().sum(1, keepdim=True))


def test_a_layer_is_not_read_times_the_input(few, capsys):
    for reading, other in (
        ("A × input", "A × feature"),
        ("evidence × input", "evidence × feature"),
    ):
        for options in ("--inverse layer.safetensors", "--inverse inverse.safetensors --layer 1"):
            line = f"explain {MODEL} few --targets 1 {options} --reading '{reading}' --out no.png"
            error = refused(capsys, line)
            assert (
                f"the reading {reading!r} is a map of the input, but layer '1' is explai" in error
            )
            assert f"pass {other!r}, or explain the input with an inverse that was fitted" in error


def test_controls_are_methods_by_name(few, capsys):
    """Formerly the command line refused names that compare in Python takes."""
    inverse = "--inverse inverse.safetensors"
    for methods, options in (
        ("Random", "--metrics deletion"),
        ("random,centre-prior,mask only", "--no-metrics"),
        ("pattern only,MIP-IN,mask only", f"--no-metrics {inverse}"),
    ):
        line = f"{COMPARE} --targets 1 --methods '{methods}' {options} --json"
        assert call(line) == 0
        found = json.loads(capsys.readouterr().out)
        rows = {row["name"]: row for row in found["rows"]}
        for name in methods.split(","):
            row = rows[name.lower().replace("-", " ") if name != "MIP-IN" else name]
            assert row["control"] == (name != "MIP-IN")
            assert row["errors"] == {}
            assert bool(row["results"]) == ("deletion" in options)


def test_steps_and_budget_reach_compare(capsys):
    arguments = f"{COMPARE} --methods Saliency --metrics deletion --json"
    steps = []
    for option in ("", "--steps 4", "--steps exact"):
        assert call(arguments, option) == 0
        row = json.loads(capsys.readouterr().out)["rows"][0]
        steps.append(row["results"]["deletion"]["settings"]["step"])
    assert steps == [8, 16, 8]
    assert call(arguments, "--budget 0 --batch-size 1") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 1
    assert found["note"] == "1 of 3 images were used: the budget of 0 s was used up"


def test_compare_chooses_the_size_of_its_batches_unless_it_is_told(monkeypatch, capsys):
    """32 images of 224 pixels at once take several times as long on a CPU."""
    sizes, compared = [], captum_mipin.cli.main.compare_methods

    def watched(*arguments, batch_size, **options):
        sizes.append(batch_size)
        return compared(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr("captum_mipin.cli.main.compare_methods", watched)
    for option in ("", "--batch-size 2"):
        assert call(f"{COMPARE} --methods Saliency --metrics deletion {option}") == 0
    assert sizes == [None, 2]
    assert "maps of layers" not in capsys.readouterr().out


def test_the_table_tells_the_layers_of_its_maps(capsys):
    methods = "--methods Grad-CAM,Saliency --no-metrics"
    assert call(f"{COMPARE} --layer 1 {methods}") == 0
    assert "maps of layers: Grad-CAM: at 1\n" in capsys.readouterr().out


def test_what_is_done_is_written_also_after_an_interrupt(monkeypatch, capsys):
    """Files are written after the first method, and hold what was done when Ctrl-C came."""
    monkeypatch.setattr("captum_mipin.cli.main._EVERY", 0.0)

    def interrupted(self, *arguments, **options):
        assert "Saliency" in Path("soon.md").read_text()
        raise KeyboardInterrupt

    monkeypatch.setattr(captum_mipin.methods.SmoothGrad, "attribute", interrupted)
    line = f"{COMPARE} --methods Saliency,SmoothGrad --out soon.md --out soon.html"
    assert call(line) == 1
    out, err = capsys.readouterr()
    assert "Saliency" in out
    assert err.startswith("captum-mipin: interrupted before SmoothGrad, random")
    assert "interrupted before SmoothGrad" in Path("soon.md").read_text()
    assert "interrupted before SmoothGrad" in Path("soon.html").read_text()


def test_maps_are_written_also_after_an_interrupt_before_their_scores(monkeypatch, capsys):
    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("captum_mipin.comparison.work.Work._score", interrupted)
    assert call(f"{COMPARE} --methods Saliency,SmoothGrad --out maps.md --out maps.html") == 1
    note = "interrupted before insertion of Saliency, deletion of Saliency, SmoothGrad, random"
    assert capsys.readouterr().err.startswith(f"captum-mipin: {note}")
    assert note in Path("maps.md").read_text()
    assert '"Saliency"' in Path("maps.html").read_text()


# ------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, math.nan])
@pytest.mark.parametrize("suffix", ["png", "html", "md"])
def test_maps_of_one_value_are_written(value, suffix, tmp_path):
    row = Row("plain", control=False, maps=torch.full((2, 1, 8, 8), value))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"maps.{suffix}"
    _write(Comparison((row,), (), images, ("0", "1")), path)
    if suffix == "png":
        with Image.open(path) as picture:
            colours = set(picture.convert("RGB").getdata())
        red, blue = ([c for c in colours if c[i] > 1.5 * c[2 - i]] for i in (0, 2))
        # most of the colours are those of the map over the image
        assert value != -1 or len(red) > 20
        assert value != 1 or len(blue) > 20
    assert path.stat().st_size > 0


def test_what_the_library_refuses_is_refused_in_one_line(folder, capsys):
    out, built = "--out no.safetensors --quiet", f"tiny_networks:build {FORM}"
    explain = f"explain {MODEL} few --out no.safetensors --inverse"
    assert call(f"fit {MODEL} few --targets 0 --out zero.safetensors --quiet") == 0
    capsys.readouterr()
    for message, line in (
        ("cannot run on inputs (2, 3, 9, 9)", "check tiny_networks:build --size 9"),
        ("target 3 is outside", f"fit {MODEL} few --targets 3 {out}"),
        (
            "Sequential cannot run on inputs (3, 1, 8, 8)",
            "predict tiny_networks:build few --size 8 --mean 0.5 --std 0.5",
        ),
        ("Pass --size, --mean and --std with", "predict tiny_networks:build few --size 9"),
        ("--ridge -1.0", f"fit {MODEL} few --ridge=-1 {out}"),
        (
            "fitted to another model",
            f"explain {built} few --inverse inverse.safetensors --out no.safetensors",
        ),
        ("no file 'none'", f"{explain} none"),
        ("2 targets were given for 3 examples", f"{explain} inverse.safetensors --targets 0,1"),
        (
            "target 7 is outside the model's outputs of shape (3,)",
            f"{explain} inverse.safetensors --targets 7",
        ),
        ("no inverse was fitted for target 1", f"{explain} zero.safetensors --targets 1"),
        ("expected (images, classes)", f"compare tiny_networks:segmentation {FORM} few"),
    ):
        assert message in refused(capsys, line), message
    assert not (folder / "no.safetensors").exists()


def test_what_is_not_installed_is_asked_for(monkeypatch, capsys):
    for name, package, line in (
        ("torchvision.models", "torchvision", "check torchvision:resnet18"),
        ("PIL.Image", "pillow", COMPARE),
        ("matplotlib", "matplotlib", f"{EXPLAIN} --out a.png"),
    ):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "captum_mipin.comparison.figure", raising=False)
            patch.setitem(sys.modules, name, None)
            assert f": pip install {package}\n" in refused(capsys, line)


def test_an_interrupt_is_told_in_one_line(monkeypatch, capsys):
    def interrupted(self, *arguments, **options):
        assert options["checkpoint"] == "half.safetensors"
        raise KeyboardInterrupt

    monkeypatch.setattr(InverseNetwork, "fit", interrupted)
    line = f"fit {MODEL} photos --out no.safetensors --checkpoint half.safetensors"
    assert refused(capsys, line) == "captum-mipin: interrupted\n"


def test_terminals_without_letters_get_question_marks(monkeypatch):
    octets = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(octets, "ascii"))
    assert call(f"{COMPARE} --methods Saliency --metrics deletion") == 0
    assert octets.getvalue().startswith(b"method            deletion ?\nSaliency  ")


# ------------------------------------------------------------------------------------ as a process


def run(line):
    command = [sys.executable, "-m", "captum_mipin", *line.split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_it_runs_as_a_process():
    failed = run("check tiny_networks:build --size 9")  # which torch logs as well
    assert (failed.returncode, failed.stdout) == (1, "")
    assert re.fullmatch(r"captum-mipin: Sequential cannot run on inputs .*\n", failed.stderr)


def test_its_entry_point_is_main():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'\[project.scripts\]\ncaptum-mipin = "captum_mipin.cli.main:main"\n', text)
    assert callable(main)
