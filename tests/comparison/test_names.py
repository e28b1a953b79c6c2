"""Names of classes, in each form in which users and networks have them."""

import sys
import types

import pytest
import torch
from torch import nn

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
