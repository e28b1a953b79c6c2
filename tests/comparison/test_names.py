"""Names of classes, in each form in which users and networks have them."""

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from captum_mipin import compare
from captum_mipin.comparison.names import class_name, class_names
from captum_mipin.errors import InputError


def test_names_of_users_and_of_networks():
    assert class_names(["cat", "dog"]) == {0: "cat", 1: "dog"}
    assert class_names({"3": "bird"}) == {3: "bird"}
    assert class_names(None) == class_names(None, nn.Linear(2, 1000)) == {}
    model = nn.Linear(2, 3)
    model.config = types.SimpleNamespace(id2label={0: "yes", 1: "LABEL_1"})
    assert class_names(None, model) == class_names(None, nn.DataParallel(model)) == {0: "yes"}
    assert class_names(["a"], model) == {0: "a"}
    for bad in ("cifar", 3):
        with pytest.raises(InputError, match="'imagenet'"):
            class_names(bad)


def test_imagenet_is_known_by_torchvision_and_only_for_its_thousand_classes(monkeypatch):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        full, ten = models.squeezenet1_1(), models.squeezenet1_1(num_classes=10)
    names = class_names(None, full)
    assert names == class_names("imagenet", ten)
    assert (len(names), names[207], class_names(None, ten)) == (1000, "golden retriever", {})
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        class_names("imagenet")


def test_a_class_without_a_name_keeps_its_number():
    names = {0: "cat", 1: "dog"}
    told = [class_name(names, target) for target in (1, (1,), -1, 5, (1, 2), None)]
    assert told == ["dog", "dog", "dog", "5", "(1, 2)", ""]
    assert class_name({4: "bird"}, -1) == "-1"


def test_captions_give_softmax_and_logit_of_each_target(cnn):
    """Against numpy; a name of the user's stays alone, and so does one without a network."""
    with torch.no_grad():
        logits = cnn.model(cnn.x[:3]).double().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    options = {"metrics": [], "controls": False, "progress": False}
    found = compare(["Saliency"], cnn.x[:3], [0, 1, 2], model=cnn.model, **options)
    for n, text in enumerate(found.captions):
        name, softmax, logit = text.split("\n")
        assert name == str(n)
        assert float(softmax.removeprefix("softmax ")) == pytest.approx(shares[n, n], abs=0.006)
        assert float(logit.removeprefix("logit ")) == pytest.approx(logits[n, n], abs=0.06)
    assert found.titles == ("0", "1", "2")
    drawn = [axis.get_xlabel() for axis in found.figure().axes[:6:2]]
    assert drawn == list(found.captions)
    maps = {"m": cnn.x[:3]}
    named = compare(maps, cnn.x[:3], 0, model=cnn.model, titles=["a", "b", "c"], **options)
    alone = compare(maps, cnn.x[:3], 0, **options)
    assert [axis.get_xlabel() for axis in named.figure().axes[:6:2]] == ["a", "b", "c"]
    assert [axis.get_xlabel() for axis in alone.figure().axes[:6:2]] == ["0"] * 3


def test_names_that_do_not_fit_the_outputs_are_refused(cnn):
    """Formerly two names for three outputs, or those of ImageNet, were taken without a word."""
    ask = {"metrics": [], "controls": False, "progress": False}
    x, maps, count = cnn.x[:2], {"m": cnn.x[:2]}, cnn.model(cnn.x[:1]).shape[1]
    fewer, more = [f"class {i}" for i in range(count - 1)], [f"{i}" for i in range(count + 1)]
    for names in (fewer, more, "imagenet"):
        with pytest.raises(InputError, match=rf"names= has \d+ names, but .* has {count} outputs"):
            compare(maps, x, 0, model=cnn.model, names=names, **ask)
    with pytest.raises(InputError, match=rf"names= names class {count}, .* from 0 to {count - 1}"):
        compare(maps, x, 0, model=cnn.model, names={0: "cat", count: "dog"}, **ask)
    some = compare(maps, x, [0, 1], model=cnn.model, names={1: "dog"}, **ask)
    assert some.titles == ("0", "dog")
    assert compare(maps, x, 0, names=fewer, **ask).titles == ("class 0",) * 2  # without a network
    single = compare(maps, x, model=lambda x: cnn.model(x)[:, 1], names=["cat"], **ask)
    assert single.titles == ("", "")


def test_captions_do_not_call_shares_logits(cnn):
    """Outputs that are a softmax already are not put through another one."""
    shares = torch.nn.Sequential(cnn.model, torch.nn.Softmax(1)).eval()
    options = {"metrics": [], "controls": False, "progress": False}
    maps = {"m": cnn.x[:2]}
    found = compare(maps, cnn.x[:2], 0, model=shares, **options)
    for output, text in zip(shares(cnn.x[:2])[:, 0].tolist(), found.captions, strict=True):
        assert text == f"0\noutput {output:.3g}"
    single = compare(maps, cnn.x[:2], model=lambda x: cnn.model(x)[:, 1], **options)
    assert [float(text.split()[1]) for text in single.captions] == pytest.approx(
        cnn.model(cnn.x[:2])[:, 1].tolist(), rel=1e-2
    )


def test_two_images_tell_nothing_from_noise(cnn):
    """The lines below a table name no best method and no control for them; for three they do."""
    methods, options = ["Saliency", "random"], {"metrics": ["deletion"], "progress": False}
    few, three = (str(compare(methods, cnn.x[:n], 0, model=cnn.model, **options)) for n in (2, 3))
    assert few.splitlines()[-1].startswith("deletion: fewer than three images")
    assert "fewer" not in three
