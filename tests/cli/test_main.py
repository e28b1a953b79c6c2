"""The command line: what it writes is what the library gives, what it refuses it refuses in one line."""

import io
import json
import logging
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution, compare
from captum_mipin.cli import main as cli

NETWORKS = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 3))

def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build()

def softmax():
    return nn.Sequential(seeded(), nn.Softmax(1))

def single():
    return nn.Sequential(*seeded()[:-1], nn.Linear(144, 1), nn.Flatten(0))

def segmentation():
    return nn.Conv2d(3, 4, 3)

def grey():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

def broken():
    raise LookupError("no such\\nthing")

def script():
    raise SystemExit(5)

def loud():
    print("made")
    return Loud()

class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = seeded()

    def forward(self, x):
        print("called")
        return self.body(x)

class Zoo:
    small = staticmethod(seeded)
    ready = seeded()
    name = "zoo"
"""
FORM = ["--size", "8", "--mean", "0.4,0.5,0.6", "--std", "0.2,0.25,0.3"]
MODEL = ["tiny_networks:build", "--weights", "weights.pt", *FORM]
WRITTEN = ["inverse.safetensors", "layer.safetensors"]


def network():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 3)
    )
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Networks, weights, 40 images and what ``fit`` makes of them."""
    root = tmp_path_factory.mktemp("cli")
    (root / "tiny_networks.py").write_text(NETWORKS)
    torch.manual_seed(3)
    model = network()
    torch.save(model.state_dict(), root / "weights.pt")
    save_file(model.state_dict(), root / "weights.safetensors")
    (root / "photos" / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(40):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(
            root / "photos" / ("more" if number % 2 else "") / f"{number:02}.png"
        )
    (root / "photos" / "notes.txt").write_text("not an image")
    (root / "few").mkdir()
    for path in sorted((root / "photos").glob("*.png"))[:3]:
        (root / "few" / path.name).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for out, layer in zip(WRITTEN, ([], ["--layer", "1"]), strict=True):
            assert cli.main(["fit", *MODEL, "photos", *layer, "--out", out, "--quiet"]) == 0
    return root


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def pixels(path):
    paths = sorted(path.rglob("*.png"))
    x = (
        torch.stack(
            [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in paths]
        ).float()
        / 255
    )
    return (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(
        3, 1, 1
    )


@pytest.fixture
def model(folder):
    model = network()
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model


def refused(capsys, *arguments):
    """The one line that a refused command leaves."""
    before = logging.root.manager.disable
    assert cli.main([*arguments]) == 1
    _, err = capsys.readouterr()
    assert err.startswith("captum-mipin: ")
    assert err.count("\n") == 1
    assert logging.root.manager.disable == before
    return err


# --------------------------------------------------------------------------------------------------------- commands


def test_check_tells_of_every_operation(capsys):
    assert cli.main(["check", "tiny_networks:build", *FORM]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[1:3] for line in out.splitlines()[1:3]] == [
        ["aten.conv2d.default", "supported"],
        ["aten.relu.default", "supported"],
    ]
    assert cli.main(["check", "tiny_networks:build", *FORM, "--layer", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert [(row["path"], row["operation"]) for row in found["operations"]] == [
        ("4", "aten.linear.default")
    ]


def test_what_a_model_prints_is_no_result(capsys):
    assert (
        cli.main(
            [
                "compare",
                "tiny_networks:loud",
                *FORM,
                "few",
                "--methods",
                "Saliency",
                "--json",
                "--quiet",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert json.loads(out)["files"] == ["00.png", "02.png", "04.png"]
    assert {"made", "called"} <= set(err.splitlines())


def test_check_fails_where_an_operation_is_refused(capsys):
    assert cli.main(["check", "tiny_networks:softmax", *FORM, "--json"]) == 1
    out, err = capsys.readouterr()
    assert not json.loads(out)["ok"]
    assert err == "captum-mipin: 1 of 5 operations are refused: 1/aten.softmax.int\n"


def test_fit_writes_the_inverse_of_the_library(folder, model, capsys):
    x = pixels(folder / "photos")
    ours = InverseNetwork(model).fit(x, batch_size=32, progress=False)
    written = InverseNetwork.load("inverse.safetensors", model)
    assert written.targets == [0, 1, 2]
    torch.testing.assert_close(written.source_signal(x, target=1), ours.source_signal(x, target=1))
    options = ["--targets", "2", "--ridge", "0.5", "--sharing", "classes"]
    assert (
        cli.main(["fit", *MODEL, "photos", *options, "--out", "other.safetensors", "--json"]) == 0
    )
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["targets"], told["out"]) == ([2], "other.safetensors")
    assert [layer["layer"] for layer in told["layers"]] == ["4/linear", "0/conv2d"]
    assert "4/linear · class 2" in err  # the progress
    other = InverseNetwork.load("other.safetensors", model)
    assert (other.settings.ridge, other.settings.sharing) == (0.5, True)


def test_explain_writes_the_maps_of_the_library(folder, model, capsys):
    x, targets = pixels(folder / "few"), [2, 0, 1]
    outs = ["--out", "maps.safetensors", "--out", "maps.png"]
    command = [
        "explain",
        *MODEL,
        "few",
        "--inverse",
        "inverse.safetensors",
        "--targets",
        "2,0,1",
        "--batch-size",
        "2",
        *outs,
    ]
    assert cli.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        scores = model(x)[range(3), targets].tolist()
    assert [row["image"] for row in told["images"]] == ["00.png", "02.png", "04.png"]
    assert [row["target"] for row in told["images"]] == targets
    assert [row["score"] for row in told["images"]] == pytest.approx(scores)
    mipin = MIPINAttribution(model, InverseNetwork.load("inverse.safetensors", model))
    found = load_file("maps.safetensors")
    torch.testing.assert_close(found["attribution"], mipin.attribute(x, target=targets))
    torch.testing.assert_close(found["source_signal"], mipin.source_signal(x, target=targets))
    assert found["target"].tolist() == targets
    with safe_open("maps.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["images"]) == ["00.png", "02.png", "04.png"]
    with Image.open("maps.png") as picture:
        assert picture.size[1] > picture.size[0]  # three images below each other, one method


def test_targets_count_from_the_end_as_in_python(folder, model, capsys):
    outs = ["--inverse", "inverse.safetensors", "--out", "last.safetensors", "--json"]
    assert cli.main(["explain", *MODEL, "few", "--targets=-1,0,-2", *outs]) == 0
    assert [row["target"] for row in json.loads(capsys.readouterr().out)["images"]] == [2, 0, 1]
    mipin = MIPINAttribution(model, InverseNetwork.load("inverse.safetensors", model))
    found = load_file("last.safetensors")
    torch.testing.assert_close(
        found["attribution"], mipin.attribute(pixels(folder / "few"), target=[-1, 0, -2])
    )
    assert found["target"].tolist() == [2, 0, 1]
    chosen = ["--methods", "Saliency", "--metrics", "deletion", "--targets=-1", "--json", "--quiet"]
    assert cli.main(["compare", *MODEL, "few", *chosen]) == 0
    assert json.loads(capsys.readouterr().out)["titles"] == ["2"] * 3
    assert "target -4 is outside" in refused(
        capsys, "explain", *MODEL, "few", "--targets=-4", *outs
    )


def test_what_is_predicted_is_explained_by_default(folder, model, capsys):
    command = [
        "explain",
        *MODEL,
        "few",
        "--inverse",
        "layer.safetensors",
        "--out",
        "layer_maps.safetensors",
    ]
    assert cli.main(command) == 0
    x = pixels(folder / "few")
    with torch.no_grad():
        scores, predicted = model(x).max(1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        [f"0{2 * i}.png", str(int(c)), f"{float(s):.4g}"]
        for i, (s, c) in enumerate(zip(scores, predicted, strict=True))
    ]
    mipin = LayerMIPINAttribution(model, InverseNetwork.load("layer.safetensors", model))
    found = load_file("layer_maps.safetensors")
    assert found["attribution"].shape == (3, 4, 6, 6)
    torch.testing.assert_close(found["attribution"], mipin.attribute(x, target=predicted))


def test_a_layer_of_an_inverse_that_reaches_the_pixels(folder, model):
    command = [
        "explain",
        *MODEL,
        "few/00.png",
        "--inverse",
        "inverse.safetensors",
        "--layer",
        "1",
        "--targets",
        "1",
    ]
    assert cli.main([*command, "--out", "one.safetensors"]) == 0
    mipin = LayerMIPINAttribution(
        model, InverseNetwork.load("inverse.safetensors", model), model[1]
    )
    expected = mipin.attribute(pixels(folder / "few")[:1], target=1)
    torch.testing.assert_close(load_file("one.safetensors")["attribution"], expected)


def test_compare_writes_the_table_and_the_page_of_the_library(folder, model, capsys):
    command = [
        "compare",
        *MODEL,
        "few",
        "--inverse",
        "inverse.safetensors",
        "--targets",
        "1",
        "--layer",
        "1",
        "--quiet",
    ]
    named = [
        "--methods",
        "mip-in, Saliency,inputxgradient,Grad-CAM",
        "--metrics",
        "deletion,completeness",
    ]
    outs = [
        word
        for name in ("page.html", "table.md", "table.txt", "grid.svg")
        for word in ("--out", name)
    ]
    assert cli.main([*command, *named, *outs]) == 0
    out, err = capsys.readouterr()
    methods = ["MIP-IN", "Saliency", "Input×Gradient", "Grad-CAM"]
    expected = compare(
        methods, pixels(folder / "few"), [1] * 3, metrics=["deletion", "completeness"], model=model, layer=model[1],
        inverse=InverseNetwork.load("inverse.safetensors", model), batch_size=32, progress=False,
    )  # fmt: skip
    assert (out, err) == (f"{expected.table()}\n", "")
    assert Path("table.txt").read_text() == f"{expected.table()}\n"
    assert Path("table.md").read_text() == f"{expected.table('markdown')}\n"
    unnormalised = pixels(folder / "few") * torch.tensor([0.2, 0.25, 0.3]).view(
        3, 1, 1
    ) + torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    replace(expected, images=unnormalised.clamp(0, 1)).save_html("expected.html")
    assert Path("page.html").read_text() == Path("expected.html").read_text()
    assert "<svg" in Path("grid.svg").read_text()


def test_compare_without_an_inverse_takes_methods_that_need_none(capsys):
    assert cli.main(["compare", *MODEL, "few", "--metrics", "deletion", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["rows"]][:4] == [
        "Saliency",
        "SmoothGrad",
        "Integrated Gradients",
        "random",
    ]
    assert told["files"] == ["00.png", "02.png", "04.png"]
    assert not any(row["errors"] for row in told["rows"])


def test_weights_that_metrics_make_random_do_not_stop_mip_in(capsys):
    command = [
        "compare",
        *MODEL,
        "few",
        "--inverse",
        "inverse.safetensors",
        "--methods",
        "MIP-IN",
        "--metrics",
        "randomization",
    ]
    assert cli.main([*command, "--json", "--quiet"]) == 0
    (row,) = (row for row in json.loads(capsys.readouterr().out)["rows"] if row["name"] == "MIP-IN")
    assert row["errors"] == {}
    assert row["results"]["randomization"]["n"] == 3


def test_a_method_that_fails_is_told_in_its_row_and_all_that_fail_in_one_line(capsys):
    assert (
        cli.main(
            [
                "compare",
                *MODEL,
                "few",
                "--methods",
                "Saliency,Grad-CAM",
                "--metrics",
                "deletion",
                "--quiet",
            ]
        )
        == 0
    )
    assert re.search(r"Grad-CAM +failed", capsys.readouterr().out)
    assert "every method failed: InputError" in refused(
        capsys,
        "compare",
        *MODEL,
        "few",
        "--methods",
        "Grad-CAM",
        "--metrics",
        "deletion",
        "--quiet",
    )


def test_nothing_measured_is_a_failure(capsys):
    asked = ["compare", *MODEL, "few", "--methods", "Saliency,Gradient", "--quiet"]
    assert "nothing could be measured: completeness failed, first with" in refused(
        capsys, *asked, "--metrics", "completeness"
    )
    assert cli.main([*asked, "--metrics", "completeness,deletion"]) == 0
    assert "completeness (Saliency, Gradient" in capsys.readouterr().out


def test_a_model_with_one_output_has_no_target(capsys):
    model = ["tiny_networks:single", *FORM]
    torch.manual_seed(0)
    assert cli.main(["fit", *model, "photos", "--out", "single.safetensors", "--quiet"]) == 0
    torch.manual_seed(0)
    assert (
        cli.main(
            [
                "explain",
                *model,
                "few",
                "--inverse",
                "single.safetensors",
                "--out",
                "s.safetensors",
                "--json",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out.split("\n", 3)[3])
    assert [row["target"] for row in told["images"]] == [None] * 3
    assert load_file("s.safetensors").keys() == {"attribution", "source_signal"}


# --------------------------------------------------------------------------------------------------------- models, images


@pytest.mark.parametrize(
    "name", ["tiny_networks:Zoo.small", "tiny_networks:Zoo.ready", "tiny_networks:seeded"]
)
def test_factories_and_modules(name):
    asked = cli._parser().parse_args(["check", name])
    before = list(sys.path)
    model = cli._model(asked)
    assert sys.path == before
    assert not any(module.training for module in model.modules())
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = network()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True)
    )


@pytest.mark.parametrize("weights", ["weights.pt", "weights.safetensors"])
def test_weights(weights, model):
    found = cli._model(
        cli._parser().parse_args(["check", "tiny_networks:build", "--weights", weights])
    )
    assert all(
        torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True)
    )


def test_networks_of_torchvision(monkeypatch, capsys):
    models = pytest.importorskip(
        "torchvision.models", reason="networks to test on; the package does not need it"
    )
    assert (
        cli.main(
            ["check", "torchvision:squeezenet1_1", "--size", "64", "--layer", "features", "--json"]
        )
        == 0
    )
    assert "random weights" in refused(
        capsys, "fit", "torchvision:squeezenet1_1", "few", "--out", "a.safetensors"
    )
    assert "no network 'resnet'" in refused(capsys, "check", "torchvision:resnet")
    asked = []
    monkeypatch.setattr(
        models, "get_model", lambda name, weights: asked.append((name, weights)) or network()
    )
    cli._model(
        cli._parser().parse_args(["check", "torchvision:squeezenet1_1", "--weights", "torchvision"])
    )
    assert asked == [("squeezenet1_1", "DEFAULT")]


def images(path, *options):
    return cli._Images(cli._parser().parse_args(["compare", "a:b", str(path), *options])).all()


def test_images_are_scaled_to_cover_and_cropped(tmp_path):
    wide = np.full((4, 16, 3), 255, dtype=np.uint8)
    wide[:, 4:12] = (51, 102, 204)
    Image.fromarray(wide).save(tmp_path / "a.png")
    plain = ["--mean", "0,0,0", "--std", "1,1,1"]
    expected = torch.tensor([0.2, 0.4, 0.8]).view(1, 3, 1, 1)
    torch.testing.assert_close(
        images(tmp_path, "--size", "4x8", *plain), expected.expand(1, 3, 4, 8)
    )
    torch.testing.assert_close(images(tmp_path, "--size", "6", *plain), expected.expand(1, 3, 6, 6))
    imagenet = (expected - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    torch.testing.assert_close(images(tmp_path), imagenet.expand(1, 3, 224, 224))


def test_images_stand_upright_and_may_be_grey(tmp_path):
    pixels = np.arange(32, dtype=np.uint8).reshape(4, 8)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned right by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    found = images(tmp_path, "--size", "8x4", "--mean", "0.5", "--std", "2")
    assert torch.equal(
        found[0, 0], (torch.from_numpy(np.rot90(pixels, -1).copy()).float() / 255 - 0.5) / 2
    )


def test_grey_networks_take_grey_images():
    grey = ["tiny_networks:grey", "--size", "8", "--mean", "0.5", "--std", "0.5"]
    assert cli.main(["check", *grey]) == 0
    assert (
        cli.main(["compare", *grey, "few", "--methods", "Saliency", "--quiet", "--out", "grey.png"])
        == 0
    )


# --------------------------------------------------------------------------------------------------------- refusals


def test_what_is_refused_is_refused_in_one_line(folder, capsys):
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "a.png").write_bytes(b"not a picture")
    torch.save({"state_dict": {}, "epoch": 3}, folder / "checkpoint.pt")
    torch.save(network(), folder / "pickled.pt")
    (folder / "cut.safetensors").write_bytes((folder / "weights.safetensors").read_bytes()[:-9])
    (folder / "text.pt").write_bytes(b"text")
    with (folder / "other.pt").open("wb") as file:
        pickle.dump(np.ones(2), file, protocol=4)
    (folder / "deep").mkdir()
    Image.fromarray(np.full((8, 8), 20_000, dtype=np.uint16)).save(folder / "deep" / "a.png")
    (folder / "cut.pt").write_bytes((folder / "weights.pt").read_bytes()[:-9])
    save_file({"0.weight": torch.ones(2)}, folder / "others.safetensors")
    explain = ("--inverse", "inverse.safetensors", "--out", "no.safetensors")
    built = ("tiny_networks:build", *FORM)
    for message, *arguments in (
        ("No such file or directory: 'model.pt2'", "check", "model.pt2"),
        ("neither torchvision:NAME, package.module:FACTORY nor", "check", "resnet50"),
        ("neither torchvision:NAME, package.module:FACTORY nor", "check", "../tiny_networks:build"),
        ("ends the process", "check", "tiny_networks:script"),
        ("No module named 'no_such_networks'", "check", "no_such_networks:build"),
        ("'tiny_networks' has no 'bild'", "check", "tiny_networks:bild"),
        ("gives a str, expected a torch.nn.Module", "check", "tiny_networks:Zoo.name"),
        ("LookupError: no such thing", "check", "tiny_networks:broken"),
        ("goes with torchvision:NAME", "check", *built, "--weights", "torchvision"),
        ("No such file or directory: 'none.pt'", "check", *built, "--weights", "none.pt"),
        ("Sequential has 0, 1, 2, 3, 4 and", "check", *built, "--layer", "layer4"),
        ("of 'state_dict', 'epoch', expected a state dict alone", "check", *built, "--weights", "checkpoint.pt"),
        ("could run code", "check", *built, "--weights", "pickled.pt"),
        ("is damaged", "check", *built, "--weights", "cut.safetensors"),
        ("is damaged", "check", *built, "--weights", "cut.pt"),
        ("is damaged", "check", *built, "--weights", "text.pt"),
        ("could run code", "check", *built, "--weights", "other.pt"),
        ("do not fit the model", "check", *built, "--weights", "others.safetensors"),
        ("torch.export cannot capture", "check", "tiny_networks:build", "--size", "9"),
        ("no image folder 'nowhere'", "fit", *built, "nowhere", "--out", "no.safetensors"),
        ("there is no image in 'empty'", "fit", *built, "empty", "--out", "no.safetensors"),
        ("cannot be read as an image", "fit", *built, "bad", "--out", "no.safetensors", "--quiet"),
        ("mode I;16, expected 8 bits", "fit", *built, "deep", "--out", "no.safetensors", "--quiet"),
        ("target 3 is outside", "fit", *MODEL, "few", "--targets", "3", "--out", "no.safetensors", "--quiet"),
        ("ridge=-1.0", "fit", *MODEL, "few", "--ridge=-1", "--out", "no.safetensors", "--quiet"),
        ("fitted to another model", "explain", *built, "few", *explain),
        ("no file 'none'", "explain", *MODEL, "few", "--inverse", "none", "--out", "no.safetensors"),
        ("2 targets, but 3 images", "explain", *MODEL, "few", "--targets", "0,1", *explain),
        ("target 7 is outside the model's outputs of shape (3,)", "explain", *MODEL, "few", "--targets", "7", *explain),
        ("no inverse was fitted for target 1", "explain", *MODEL, "few", "--targets", "1", "--inverse", "other.safetensors",
         "--out", "no.safetensors"),
        ("expected (images, classes)", "compare", "tiny_networks:segmentation", *FORM, "few"),
    ):  # fmt: skip
        if "other.safetensors" in arguments:
            cli.main(
                ["fit", *MODEL, "few", "--targets", "0", "--out", "other.safetensors", "--quiet"]
            )
            capsys.readouterr()
        assert message in refused(capsys, *arguments), message
    assert not (folder / "no.safetensors").exists()


def test_wrong_usage_is_told_before_any_work(folder, capsys):
    (folder / "folder.safetensors").mkdir()
    fit, explain = ("fit", *MODEL, "photos"), ("explain", *MODEL, "few", "--inverse", "none")
    for message, *arguments in (
        ("required: COMMAND",),
        ("invalid choice: 'draw'", "draw"),
        ("required: --out", *fit),
        ("ends in none of .safetensors", *fit, "--out", "a.pt"),
        ("there is no folder 'nowhere'", *fit, "--out", "nowhere/a.safetensors"),
        (
            "'cat' is not a class, or several with commas",
            *fit,
            "--out",
            "a.safetensors",
            "--targets",
            "cat",
        ),
        ("'0' is not a whole number above 0", *fit, "--out", "a.safetensors", "--batch-size", "0"),
        (
            "'all' is not a whole number above 0",
            *fit,
            "--out",
            "a.safetensors",
            "--batch-size",
            "all",
        ),
        (
            "'8x8x8' is not a number of pixels, or HEIGHTxWIDTH",
            *fit,
            "--out",
            "a.safetensors",
            "--size",
            "8x8x8",
        ),
        ("'1,2' is not one number or three", *fit, "--out", "a.safetensors", "--mean", "1,2"),
        (
            "'0,1,1' is not one number above 0 or three",
            *fit,
            "--out",
            "a.safetensors",
            "--std",
            "0,1,1",
        ),
        ("'much' is not a number", *fit, "--out", "a.safetensors", "--ridge", "much"),
        ("'folder.safetensors' cannot be written", *fit, "--out", "folder.safetensors"),
        ("--mean has 1 values, --std 3", *fit, "--out", "a.safetensors", "--mean", "1"),
        ("--device", *fit, "--out", "a.safetensors", "--device", "gpu"),
        ("ends in none of .safetensors, .jpg", *explain, "--out", "page.html"),
        (
            "no method has the name 'salience'; known are MIP-IN",
            "compare",
            *MODEL,
            "few",
            "--methods",
            "Salience",
        ),
        (
            "no metric has the name 'pointing_game'",
            "compare",
            *MODEL,
            "few",
            "--metrics",
            "pointing_game",
        ),
        ("needs --inverse", "compare", *MODEL, "few", "--methods", "MIP-IN"),
        ("needs --inverse", "compare", *MODEL, "few", "--methods", "Saliency,MIP-IN × gradient"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*arguments])
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert not re.search(r"\b_\w+", err)  # no private name


def test_what_is_not_installed_is_asked_for(monkeypatch, capsys):
    for name, package, arguments in (
        ("torchvision.models", "torchvision", ["check", "torchvision:resnet18"]),
        ("PIL.Image", "pillow", ["compare", *MODEL, "few"]),
        (
            "matplotlib",
            "matplotlib",
            ["explain", *MODEL, "few", "--inverse", "inverse.safetensors", "--out", "a.png"],
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert f"needs {package}: pip install {package}" in refused(capsys, *arguments)


def test_an_interrupt_is_told_in_one_line(monkeypatch, capsys):
    def interrupted(self, *arguments, **options):
        assert options["checkpoint"] == "half.safetensors"
        raise KeyboardInterrupt

    monkeypatch.setattr(InverseNetwork, "fit", interrupted)
    command = [
        "fit",
        *MODEL,
        "photos",
        "--out",
        "no.safetensors",
        "--checkpoint",
        "half.safetensors",
    ]
    assert refused(capsys, *command) == "captum-mipin: interrupted\n"


def test_terminals_without_letters_get_question_marks(monkeypatch):
    octets = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(octets, "ascii"))
    assert (
        cli.main(
            ["compare", *MODEL, "few", "--methods", "Saliency", "--metrics", "deletion", "--quiet"]
        )
        == 0
    )
    assert octets.getvalue().startswith(b"method            deletion ?\nSaliency  ")


# --------------------------------------------------------------------------------------------------------- as a process


def test_help_has_examples(capsys):
    for command in ("check", "fit", "explain", "compare"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert f"examples:\n  captum-mipin {command} torchvision:resnet50" in text
        assert "FILE.pt2 " in text
        assert "Exit codes" in text
    for line in cli._EXAMPLES.replace("\\\n", "").splitlines()[1:]:
        asked = line.replace("mynets.small", "tiny_networks").split()[1:]
        assert cli._parser().parse_args(asked).command == asked[0]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "captum_mipin", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_it_runs_as_a_process():
    done = run(
        "explain",
        *MODEL,
        "few",
        "--inverse",
        "inverse.safetensors",
        "--out",
        "process.safetensors",
        "--json",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["images"]) == 3
    assert load_file("process.safetensors")["attribution"].shape == (3, 3, 8, 8)
    failed = run("check", "tiny_networks:build", "--size", "9")  # which torch logs as well
    assert (failed.returncode, failed.stdout) == (1, "")
    assert re.fullmatch(r"captum-mipin: torch.export cannot capture Sequential .*\n", failed.stderr)


def test_its_entry_point_is_main():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'\[project.scripts\]\ncaptum-mipin = "captum_mipin.cli.main:main"\n', text)
    assert callable(cli.main)
