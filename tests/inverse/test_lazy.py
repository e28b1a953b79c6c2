"""Classes fitted when first explained: the same inverses, one fit each, within the memory."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small import Function, normal
from torch import nn

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution
from captum_mipin.errors import (
    FitError,
    InputError,
    InverseFileError,
    ModelChangedError,
    NotFittedError,
)
from captum_mipin.inverse.fit import Fit
from captum_mipin.rules.activations import pack, unpack

X = normal(30, 3, 8, 8)


def network():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 40),
        nn.ReLU(),
    )
    return nn.Sequential(
        *layers, nn.Linear(40, 5)
    ).eval()  # the lower dense layer is solved row by row


MODEL = network()


def fitted(**options):
    return InverseNetwork(MODEL).fit(X, batch_size=8, progress=False, **options)


@pytest.fixture(scope="module")
def eager():
    return fitted()


@pytest.fixture
def counted(monkeypatch):
    """Return the classes fitted late, in order."""
    later, calls = Fit.later, []

    def count(self, target):
        calls.append(target[0])
        return later(self, target)

    monkeypatch.setattr(Fit, "later", count)
    return calls


@pytest.mark.parametrize("memory", [4 << 30, 30000])
@pytest.mark.parametrize("disk", [False, True])
def test_the_inverse_is_that_of_a_fit_at_once(memory, disk, tmp_path):
    at_once = fitted(memory=memory)
    lazy = fitted(memory=memory, lazy=True, keep=tmp_path / "kept" if disk else None)
    assert lazy.targets == at_once.targets == [0, 1, 2, 3, 4]
    assert lazy.report.layers == ()
    for target in (3, 0, 4):
        assert torch.equal(lazy.source_signal(X, target), at_once.source_signal(X, target))
        torch.testing.assert_close(
            lazy.information(target), at_once.information(target), rtol=1e-6, atol=1e-6
        )
    assert lazy.report.layers == tuple(
        row for t in (3, 0, 4) for row in at_once.report.layers if row.target == t
    )
    mixed = torch.arange(30) % 5
    assert torch.equal(lazy.source_signal(X, mixed), at_once.source_signal(X, mixed))
    assert torch.equal(lazy.class_attribution(2), at_once.class_attribution(2))
    bytes_kept = sum(path.stat().st_size for path in (tmp_path / "kept").iterdir()) if disk else 0
    assert bytes_kept == pytest.approx(X.nbytes, rel=0.15) if disk else bytes_kept == 0


class Round(nn.Module):
    """A gate, a branch and computed weights go around the layer where the inverse stops."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x, scale):
        y = torch.relu(self.first(x))
        gated = y * torch.sigmoid(self.gate(x)) * torch.sigmoid(y)
        return self.last(torch.relu(self.norm(gated)) + y) * scale


def test_what_goes_round_the_layer_is_kept_as_well():
    torch.manual_seed(1)
    model, x, scale = Round().eval(), normal(40, 6), 2 + normal(40, 1, seed=3).abs()
    data = [((x[i : i + 10]), scale[i : i + 10]) for i in range(0, 40, 10)]
    options = {
        "unpack": lambda batch: batch,
        "progress": False,
        "memory": 6000,
    }  # too little for what follows from it
    at_once = InverseNetwork(model, layer=model.first).fit(data, **options)
    lazy = InverseNetwork(model, layer=model.first).fit(data, lazy=True, **options)
    one, other = (
        LayerMIPINAttribution(model, inverse).attribute(x, 1, scale) for inverse in (at_once, lazy)
    )
    assert torch.equal(one, other)


def test_only_the_inverted_part_is_run_again():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    lazy = InverseNetwork(model, layer=model[1]).fit(
        normal(20, 6), lazy=True, memory=1000, progress=False
    )
    surrogate = lazy._surrogate((normal(2, 6),), (), model[1])
    lower, upper, names = surrogate._halves
    targets = [str(node.target) for node in upper.graph.nodes if node.op == "call_function"]
    assert not any("relu" in name for name in targets)
    assert len(names) == 1, "the layer's output, and nothing else"
    assert [node.op for node in lower.graph.nodes].count("call_function") == 2


def test_the_least_recently_explained_give_way_and_come_back_to_the_bit(counted):
    weights = sum(p.nbytes for p in MODEL.parameters())
    lazy = fitted(lazy=True, cache=2 * (30 * 64 + 64 + 40 + 30 * 40) * 4 + 2 * 40 * 8)
    first = lazy.source_signal(X, 0)
    for target in (1, 0, 2):  # with 2, class 1 has to go
        lazy.source_signal(X, target)
    assert counted == [0, 1, 2]
    assert lazy.targets == [0, 1, 2, 3, 4]
    assert torch.equal(lazy.source_signal(X, 0), first)
    assert counted == [0, 1, 2]
    lazy.source_signal(X, 1)
    assert counted == [0, 1, 2, 1]
    none = fitted(lazy=True, cache=0)
    mixed = torch.arange(30) % 5
    assert torch.equal(none.source_signal(X, mixed)[::5], first[::5])
    assert torch.equal(none.source_signal(X, 0), first)
    assert counted[4:] == [0, 1, 2, 3, 4] or weights == 0


def test_two_threads_fit_a_class_once(counted, eager):
    lazy = fitted(lazy=True)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda target: lazy.source_signal(X, target), [1, 2, 1, 2, 1, 1]))
    assert sorted(counted) == [1, 2]
    for target, signal in zip([1, 2, 1, 2, 1, 1], found, strict=True):
        assert torch.equal(signal, eager.source_signal(X, target))


def test_data_may_be_changed_or_dropped_afterwards(eager):
    x = X.clone()
    lazy = InverseNetwork(MODEL).fit(x, batch_size=8, progress=False, lazy=True)
    x.zero_()
    assert torch.equal(lazy.source_signal(X, 1), eager.source_signal(X, 1))


def test_changed_weights_are_refused_and_restored_ones_taken(eager):
    model = network()
    lazy = InverseNetwork(model, changed="ignore").fit(X, batch_size=8, progress=False, lazy=True)
    state = copy.deepcopy(model.state_dict())
    lazy.source_signal(X, 0)
    with torch.no_grad():
        model[4].weight += 0.1
    lazy.source_signal(X, 0)
    with pytest.raises(ModelChangedError, match="so no class can be fitted from them"):
        lazy.source_signal(X, 1)
    model.load_state_dict(state)
    assert torch.equal(lazy.source_signal(X, 1), eager.source_signal(X, 1))


def test_an_interrupted_class_is_fitted_the_next_time(eager, monkeypatch):
    lazy = fitted(lazy=True)
    solve, left = Fit._solve, [1]

    def fails(self, *arguments):
        if left and arguments[0] == "4/linear":
            left.pop()
            raise MemoryError("none left")
        return solve(self, *arguments)

    monkeypatch.setattr(Fit, "_solve", fails)
    with pytest.raises(MemoryError):
        lazy.source_signal(X, 1)
    assert torch.equal(lazy.source_signal(X, 1), eager.source_signal(X, 1))


def test_both_kinds_of_fit_side_by_side(eager):
    both = InverseNetwork(MODEL).fit(X, [0, 1], batch_size=8, progress=False)
    both.fit(X, [1, 2], batch_size=8, progress=False, lazy=True)
    assert both.targets == [0, 1, 2]
    assert torch.equal(
        both.source_signal(X, torch.arange(30) % 3), eager.source_signal(X, torch.arange(30) % 3)
    )
    torch.testing.assert_close(both.information(0), eager.information(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(NotFittedError, match=r"target 3; fitted are \[0, 1, 2\]"):
        both.source_signal(X, 3)
    both.fit(X, [1, 2], batch_size=8, progress=False)
    assert both.targets == [0, 1, 2]
    both.fit(X, 3, batch_size=8, progress=False, lazy=True)
    assert torch.equal(
        MIPINAttribution(MODEL, both).attribute(X, 3),
        MIPINAttribution(MODEL, eager).attribute(X, 3),
    )


def test_descent_may_be_lazy_as_well():
    at_once, lazy = (InverseNetwork(MODEL, solver="sgd", epochs=2) for _ in range(2))
    at_once.fit(X, [1, 3], batch_size=8, progress=False)
    lazy.fit(X, batch_size=8, progress=False, lazy=True)
    torch.testing.assert_close(
        lazy.source_signal(X, 3), at_once.source_signal(X, 3), rtol=1e-6, atol=1e-6
    )


def test_it_is_neither_saved_nor_copied(tmp_path):
    lazy = fitted(lazy=True)
    with pytest.raises(NotFittedError, match=r"5 classes .* only when they are explained"):
        lazy.save(tmp_path / "inverse")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFittedError, match="cannot be copied"):
        copy.deepcopy(lazy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "folder"}, "lazy=True"),
        ({"lazy": True, "checkpoint": "file"}, "checkpoint="),
        ({"lazy": True, "distributed": True}, "distributed=True"),
        ({"lazy": True, "cache": -1}, "cache=-1"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(InputError, match=message):
        fitted(**options)
    with pytest.raises(InputError, match='sharing="classes"'):
        InverseNetwork(MODEL, sharing="classes").fit(X, progress=False, lazy=True)


def test_activations_need_room_or_a_folder_of_their_own(tmp_path):
    with pytest.raises(FitError, match=r"more than memory=10,000 bytes.*keep=folder"):
        fitted(lazy=True, memory=10000)
    broken = [X[:8], X[8:16] / 0]
    with pytest.raises(FitError, match="batch 1"):
        InverseNetwork(MODEL).fit(broken, lazy=True, keep=tmp_path / "new", progress=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="is not empty"):
        fitted(lazy=True, keep=tmp_path)


def test_kept_files_that_were_changed_are_noticed(tmp_path):
    lazy = fitted(lazy=True, memory=30000, keep=tmp_path)
    one, two, *_ = sorted(tmp_path.iterdir())
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    with pytest.raises(InverseFileError, match="another file"):
        lazy.source_signal(X, 1)
    other = tmp_path / "other"
    InverseNetwork(MODEL).fit(2 * X, batch_size=8, progress=False, lazy=True, keep=other)
    one.write_bytes((other / one.name).read_bytes())
    with pytest.raises(InverseFileError, match="another file"):
        lazy.source_signal(X, 1)
    one.write_bytes(first[:-40] + bytes(40))
    with pytest.raises(InverseFileError, match="damaged"):
        lazy.source_signal(X, 1)
    one.unlink()
    with pytest.raises(FileNotFoundError, match=one.name):
        lazy.source_signal(X, 1)
    one.write_bytes(first)
    assert torch.equal(lazy.source_signal(X, 1), fitted(memory=30000).source_signal(X, 1))


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (2, 3, 4, 5)])
def test_masks_are_kept_as_bits(shape):
    mask = normal(*shape) > 0
    bits = pack(mask)
    assert bits.nbytes == -(-mask.numel() // 8)
    assert torch.equal(unpack(bits, mask.shape), mask)


def test_the_model_is_left_alone(untouched):
    with untouched(MODEL, X):
        lazy = fitted(lazy=True)
        lazy.source_signal(X, 1)
        with torch.no_grad():
            lazy.source_signal(X, 2)
        with torch.inference_mode():
            lazy.source_signal(X.clone(), 3)


def test_several_inputs(eager):
    model = Function(
        lambda m, a, b: m["out"](torch.relu(torch.cat([m["a"](a), m["b"](b)], 1))),
        a=nn.Linear(4, 6), b=nn.Linear(3, 5), out=nn.Linear(11, 2),
    ).eval()  # fmt: skip
    data = normal(30, 4), normal(30, 3, seed=1)
    one, other = (
        InverseNetwork(model).fit(data, progress=False, lazy=lazy) for lazy in (False, True)
    )
    for a, b in zip(one.source_signal(data, 1), other.source_signal(data, 1), strict=True):
        assert torch.equal(a, b)


def test_weights_changed_and_restored_before_the_first_class():
    model = Function(
        lambda m, x: m["last"](torch.relu(m["first"](x)) * m["scale"].weight),
        first=nn.Linear(6, 8), scale=nn.LayerNorm(8), last=nn.Linear(8, 3),
    ).eval()  # fmt: skip
    x = normal(40, 6)
    lazy, at_once = (
        InverseNetwork(model).fit(x, progress=False, lazy=lazy) for lazy in (True, False)
    )
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.layers["scale"].weight *= 2
    model.load_state_dict(state)
    assert torch.equal(lazy.source_signal(x, 1), at_once.source_signal(x, 1))


@pytest.mark.parametrize("memory", [4 << 30, 100000, 30000])
def test_information_is_the_same_in_any_mode_and_leaves_classes_as_they_are(memory):
    lazy = fitted(lazy=True, cache=0, memory=memory)
    first, bits = lazy.source_signal(X, 0), fitted(memory=memory).information(1)
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.no_grad()):
        with mode:
            found = lazy.information(1)
        torch.testing.assert_close(found.clone(), bits, rtol=1e-6, atol=1e-6)
        assert torch.equal(lazy.source_signal(X, 0), first)


def test_a_folder_is_where_it_was_from_anywhere(tmp_path, monkeypatch, eager):
    monkeypatch.chdir(tmp_path)
    lazy = fitted(lazy=True, memory=30000, keep="kept")
    monkeypatch.chdir("/")
    torch.testing.assert_close(lazy.source_signal(X, 1), eager.source_signal(X, 1))


def test_folders_and_generators_of_another_kind(tmp_path):
    model, x = nn.Linear(3, 2).eval(), torch.randn(9, 3)
    (tmp_path / "file").write_text("")
    for keep in (7, tmp_path / "file"):
        with pytest.raises(InputError, match="is not a folder: pass the path of an empty folder"):
            InverseNetwork(model).fit(x, lazy=True, keep=keep, progress=False)
    with pytest.raises(InputError, match=r"generator is an int, expected a torch.Generator"):
        InverseNetwork(model, positions=0.5, generator=7)
