"""Networks by name, with the weights that were asked for."""

import pickle
import sys

import numpy as np
import pytest
import torch
from command import FORM, call, parsed, refused
from safetensors.torch import save_file

from captum_mipin.cli.models import load_model
from captum_mipin.photographs import photograph_layer

BUILT = f"check tiny_networks:build {FORM}"


def assert_same_weights(model, expected):
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["Zoo.small", "Zoo.ready", "seeded"])
def test_factories_and_modules(name, network):
    before = list(sys.path)
    model, layer = load_model(parsed(f"check tiny_networks:{name}"))
    assert sys.path == before
    assert layer is None
    assert not any(module.training for module in model.modules())
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = network()
    assert_same_weights(model, expected)


@pytest.mark.parametrize("weights", ["weights.pt", "weights.safetensors"])
def test_weights(weights, model):
    built, _ = load_model(parsed(f"{BUILT} --weights {weights}"))
    assert_same_weights(built, model)


def test_networks_of_torchvision(monkeypatch, capsys, network):
    models = pytest.importorskip(
        "torchvision.models", reason="networks to test on; the package does not need it"
    )
    assert call("check torchvision:squeezenet1_1 --size 64 --layer features --json") == 0
    untrained = "fit torchvision:squeezenet1_1 few --out a.safetensors"
    assert "random weights" in refused(capsys, untrained)
    line = "check torchvision:squeezenet1_1 --layer photographs --size 96x128"
    squeezenet, layer = load_model(parsed(line))
    picked, _ = photograph_layer(squeezenet, (torch.rand(1, 3, 96, 128),))
    assert layer is squeezenet.get_submodule(picked)
    assert "no network 'resnet'" in refused(capsys, "check torchvision:resnet")
    calls = []
    monkeypatch.setattr(
        models, "get_model", lambda name, weights: calls.append((name, weights)) or network()
    )
    load_model(parsed("check torchvision:squeezenet1_1 --weights torchvision"))
    assert calls == [("squeezenet1_1", "DEFAULT")]


def test_models_and_layers_that_do_not_exist_are_refused(capsys):
    for message, line in (
        (
            "MODEL 'model.pt2' does not exist, expected a file with an exported program: pass",
            "check model.pt2",
        ),
        ("expected torchvision:NAME, module:FACTORY or", "check resnet50"),
        ("expected torchvision:NAME, module:FACTORY or", "check ../tiny_networks:build"),
        ("ends the process", "check tiny_networks:script"),
        ("there is no Python module 'no_such_networks'", "check no_such_networks:build"),
        ("'tiny_networks' has no attribute 'bild'", "check tiny_networks:bild"),
        ("gives a str, expected a torch.nn.Module", "check tiny_networks:Zoo.name"),
        (
            "tiny_networks:broken fails with LookupError: no such thing. Pass a function",
            "check tiny_networks:broken",
        ),
        ("needs a model torchvision:NAME", f"{BUILT} --weights torchvision"),
        ("one of '4', '3', '2', '1', '0'; or photographs", f"{BUILT} --layer layer4"),
    ):
        assert message in refused(capsys, line), message


def test_weights_that_do_not_fit_or_could_run_code_are_refused(folder, network, capsys):
    torch.save({"state_dict": {}, "epoch": 3}, folder / "checkpoint.pt")
    torch.save([torch.ones(2)], folder / "list.pt")
    torch.save(network(), folder / "pickled.pt")
    (folder / "cut.safetensors").write_bytes((folder / "weights.safetensors").read_bytes()[:-9])
    (folder / "cut.pt").write_bytes((folder / "weights.pt").read_bytes()[:-9])
    (folder / "text.pt").write_bytes(b"text")
    with (folder / "other.pt").open("wb") as file:
        pickle.dump(np.ones(2), file, protocol=4)
    save_file({"0.weight": torch.ones(2)}, folder / "others.safetensors")
    for message, weights in (
        ("--weights 'none.pt' does not exist, expected a file with a state dict: pass", "none.pt"),
        ("do not fit the model: Error(s) in loading state_dict", "checkpoint.pt"),
        ('Unexpected key(s) in state_dict: "state_dict", "epoch"', "checkpoint.pt"),
        ("Expected state_dict to be dict-like, got <class 'list'>", "list.pt"),
        ("could run code", "pickled.pt"),
        ("is damaged", "cut.safetensors"),
        ("is damaged", "cut.pt"),
        ("is damaged", "text.pt"),
        ("could run code", "other.pt"),
        ("do not fit the model", "others.safetensors"),
    ):
        assert message in refused(capsys, f"{BUILT} --weights {weights}"), message


def test_file_mistakes_say_what_to_type_next(folder, capsys):
    """Formerly some of them were Python's own words, such as "[Errno 2] No such file"."""
    (folder / "latin.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "unfinished.py").write_text("def build(: pass\n")
    (folder / "needy.py").write_text("import no_such_package\n")
    for message, line in (
        ("does not exist, expected a file with a state dict: pass for example 'weights.pt'",
         f"{BUILT} --weights weihgts.pt"),
        ("--weights 'few' is a folder, expected a file with a state dict: pass the path of a",
         f"{BUILT} --weights few"),
        ("--names 'no.txt' does not exist, expected a file with one class name per line: pass",
         "predict tiny_networks:build few --size 8 --names no.txt"),
        ("--names 'latin.txt' is no text", "predict tiny_networks:build few --names latin.txt"),
        ("unfinished cannot be imported, SyntaxError: ", "check unfinished:build"),
        ("needy imports 'no_such_package', which is not installed", "check needy:build"),
        ("Pass --size, --mean and --std with which the model runs.",
         "check tiny_networks:build --size 9"),
        ("there is no file 'no', expected a file that this package wrote: pass its path",
         "explain tiny_networks:build few --inverse no --out maps.png"),
        ("'weights.pt' is not a complete safetensors file",
         "explain tiny_networks:build few --inverse weights.pt --out maps.png"),
    ):  # fmt: skip
        found = refused(capsys, line)
        assert message in found and "Errno" not in found, found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is that of machines without CUDA")
def test_a_device_that_the_machine_has_not(capsys):
    with pytest.raises(SystemExit, match="2"):
        call(f"{BUILT} --device cuda")
    assert "this machine has no such device, pass --device cpu" in capsys.readouterr().err
