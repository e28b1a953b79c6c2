"""The inverse network over time: models that change, fits that fail, data that is hard."""

import pytest
import torch
from small import normal
from torch import nn

from captum_mipin import InverseNetwork, LayerMIPINAttribution, check
from captum_mipin.errors import (
    FitError,
    InverseFileError,
    ModelChangedError,
    ModelChangedWarning,
    TargetError,
)


def mlp(middle=None, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, dtype=dtype), middle or nn.ReLU(), nn.Linear(8, 3, dtype=dtype)
    ).eval()  # fmt: skip


def swap_rows(model):
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[[1, 0, *range(2, 8)]])


def negate(model):
    with torch.no_grad():
        model[0].weight.neg_()


def shuffle(model):
    with torch.no_grad():
        model[2].weight.copy_(model[2].weight.flatten().flip(0).view(3, 8))


def replace(model):
    model[1] = nn.Identity().eval()


def hook(model):
    model[1].register_forward_hook(lambda module, inputs, output: output * 0.1)


@pytest.mark.parametrize("change", [swap_rows, negate, shuffle, replace, hook])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_changed_model_is_refused(change, dtype, tmp_path):
    model, x = mlp(dtype=dtype), normal(60, 6, dtype=dtype)
    inverse = InverseNetwork(model).fit(x, 0, progress=False)
    inverse.source_signal(x[:3], 0)
    change(model)
    for call in (
        lambda: inverse.source_signal(x[:3], 0),
        lambda: inverse.fit(x, 1, progress=False),
    ):
        with pytest.raises(ModelChangedError, match="fit a new InverseNetwork"):
            call()


def test_large_weights_are_watched_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 700), nn.ReLU(), nn.Linear(700, 2)).eval()
    x = normal(20, 600)
    inverse = InverseNetwork(model).fit(x, 0, progress=False)
    for place in (0, 123_456, 419_999):
        before = model[0].weight.data.view(-1)[place].clone()
        model[0].weight.data.view(-1)[place] += 1e-6
        with pytest.raises(ModelChangedError):
            inverse.source_signal(x[:1], 0)
        model[0].weight.data.view(-1)[place] = before
    inverse.source_signal(x[:1], 0)
    model[0].weight.data = model[0].weight.data.flip(0)
    with pytest.raises(ModelChangedError):
        inverse.source_signal(x[:1], 0)


class Factor(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (self.factor[0] if isinstance(self.factor, list) else self.factor)


@pytest.mark.parametrize(
    ("before", "after"), [(2.0, 3.0), ([2.0], [3.0]), (torch.tensor(2.0), torch.tensor(3.0))]
)
def test_a_changed_attribute_that_matters_is_refused_and_one_that_counts_calls_is_not(
    before, after
):
    model, x = mlp(Factor(before)), normal(60, 6)
    inverse = InverseNetwork(model).fit(x, 0, progress=False)
    first = inverse.source_signal(x[:3], 0)
    model(x)
    assert torch.equal(inverse.source_signal(x[:3], 0), first)
    model[1].factor = after
    with pytest.raises(ModelChangedError):
        inverse.source_signal(x[:3], 0)


def test_a_failed_first_fit_leaves_nothing_of_the_model_behind():
    model, x = mlp(nn.Identity()), normal(60, 6)
    inverse = InverseNetwork(model)
    with pytest.raises(TargetError):
        inverse.fit(x, 99, progress=False)
    model[1] = nn.ReLU().eval()
    inverse.fit(x, 0, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(inverse.explain((x,), 0).output, model(x)[:, 0])


class Wired(nn.Module):
    def __init__(self, shift, flipped):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 3)
        self.shift, self.flipped = shift, flipped

    def forward(self, x):
        parts = [torch.relu(self.a(x) - self.shift), self.b(x)]
        return self.c(torch.cat(parts[::-1] if self.flipped else parts, 1))


@pytest.mark.parametrize("other", [Wired(5.0, False), Wired(0.5, True)], ids=["constant", "wiring"])
def test_a_file_of_another_model_with_the_same_weights_is_refused(other, tmp_path):
    model, x = Wired(0.5, False).eval(), normal(60, 6)
    InverseNetwork(model).fit(x, 0, progress=False).save(tmp_path / "file")
    same = InverseNetwork.load(tmp_path / "file", Wired(0.5, False).eval())
    assert torch.isfinite(same.source_signal(x[:2], 0)).all()
    loaded = InverseNetwork.load(tmp_path / "file", other.eval())
    with pytest.raises(ModelChangedError, match="operations differ from those of the model that"):
        loaded.source_signal(x[:2], 0)


def test_a_checkpoint_knows_its_data(tmp_path):
    model, x, path = mlp(), normal(60, 6), tmp_path / "checkpoint"
    batches, passes = list(x.split(20)), []

    class Stops:
        def __iter__(self):
            passes.append(0)
            if (
                len(passes) == 4
            ):  # the first batch, the look at the data, one layer, then this, if nothing is kept
                raise KeyboardInterrupt
            return iter(batches)

    with pytest.raises(KeyboardInterrupt):
        InverseNetwork(model).fit(Stops(), 0, progress=False, checkpoint=path, memory=0)
    assert path.exists()
    with pytest.raises(InverseFileError, match="of another fit: its data differ"):
        InverseNetwork(model).fit([5 * b + 3 for b in batches], 0, progress=False, checkpoint=path)
    resumed = InverseNetwork(model).fit(batches, 0, progress=False, checkpoint=path, memory=0)
    whole = InverseNetwork(model).fit(batches, 0, progress=False, memory=0)
    assert torch.equal(resumed.source_signal(x, 0), whole.source_signal(x, 0))


@pytest.mark.parametrize(
    ("level", "padding"), [(0.0, 0), (10.0, 0), (100.0, 0), (1000.0, 0), (0.0, 1)]
)
def test_float32_holds_for_images_far_from_zero(level, padding):
    """Moments are centred before products: a mean far from zero costs the covariance no digits."""
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=padding), nn.Conv2d(4, 5, 3, padding=padding),
            nn.Flatten(), nn.LazyLinear(3)
        )  # fmt: skip
        x = level + normal(300, 1, 7, 7)
        model(x)
        inverse = InverseNetwork(model.to(dtype).eval(), ridge=1e-6).fit(
            x.to(dtype), 0, progress=False
        )
        found.append(inverse.class_attribution(0).double())
    error = float((found[0] - found[1]).abs().max() / found[1].abs().max())
    assert error < 2e-4 * max(1.0, level / 10)


def test_half_precision_sums_do_not_overflow():
    model = mlp().half()
    inverse = InverseNetwork(model).fit(
        normal(20_000, 6, dtype=torch.float16), 0, progress=False, batch_size=20_000
    )
    single = mlp().half().float()
    expected = InverseNetwork(single).fit(
        normal(20_000, 6, dtype=torch.float16).float(), 0, progress=False
    )
    x = normal(4, 6, dtype=torch.float16)
    torch.testing.assert_close(
        inverse.source_signal(x, 0).float(),
        expected.source_signal(x.float(), 0),
        atol=2e-2,
        rtol=2e-2,
    )


def test_autocast_changes_nothing():
    model, x = mlp(), normal(60, 6)
    outside = InverseNetwork(model).fit(x, 0, progress=False)
    with torch.autocast("cpu"):
        inside = InverseNetwork(model).fit(x, 0, progress=False)
        assert torch.equal(inside.source_signal(x, 0), outside.source_signal(x, 0))
    assert torch.equal(inside.source_signal(x, 0), outside.source_signal(x, 0))


def test_a_module_of_two_names_is_found_by_either():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.first = nn.Linear(6, 4), nn.Linear(4, 2), nn.ReLU()
            self.second = self.first

        def forward(self, x):
            return self.b(self.second(self.a(x)))

    torch.manual_seed(0)
    model, x = Twice().eval(), normal(60, 6)
    inverse = InverseNetwork(model).fit(x, 0, progress=False)
    assert LayerMIPINAttribution(model, inverse, model.first).attribute(x[:2], 0).shape == (2, 4)


def test_further_arguments_need_not_be_contiguous():
    class Reshapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, x, w):
            return self.a(x) + w.reshape(w.shape[0], 4)

    torch.manual_seed(0)
    model, x, w = Reshapes().eval(), normal(60, 6), normal(60, 2, 2)
    inverse = InverseNetwork(model).fit([(x, w)], 0, unpack=lambda b: (b[0], b[1]), progress=False)
    expected = inverse.source_signal(x, 0, w)
    assert torch.equal(inverse.source_signal(x, 0, w.mT.contiguous().mT), expected)


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.0}, {"learning_rate": -1.0}, {"ridge": -1.0}, {"ridge": float("nan")}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        InverseNetwork(mlp(), **options)


def test_descent_that_diverges_says_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(15, 2)).eval()
    with pytest.raises(FitError, match=r"SGD diverged at 0/conv1d.*learning_rate"):
        InverseNetwork(model, solver="sgd", learning_rate=1e6).fit(
            normal(50, 1, 6), 0, progress=False
        )


def test_check_is_a_table():
    assert str(check(mlp(), normal(1, 6))).count("\n") == 3


def test_a_changed_model_is_warned_of_once_a_change():
    model, x = mlp(), normal(60, 6)
    inverse = InverseNetwork(model, changed="warn").fit(x, 0, progress=False)
    fitted = inverse.source_signal(x[:3], 0)  # no warning, or it would be an error
    for change in (negate, swap_rows):
        change(model)
        with pytest.warns(
            ModelChangedWarning, match="the model's weights have changed since"
        ) as caught:
            inverse.source_signal(x[:3], 0)
        assert [warning.filename for warning in caught] == [__file__]
        inverse.source_signal(x[:3], 0)
        with pytest.raises(ModelChangedError):
            inverse.fit(x, 1, progress=False)
    swap_rows(model)
    negate(model)
    assert torch.equal(inverse.source_signal(x[:3], 0), fitted), "undone"
    inverse.changed = "refuse"
    inverse.source_signal(x[:3], 0)


def test_an_attribute_that_says_nothing_known_refuses(own_mlp):
    own_mlp.inverse.changed = "warning"
    with torch.no_grad():
        own_mlp.model[0].weight *= 2
    with pytest.raises(ModelChangedError, match="weights have changed"):
        own_mlp.inverse.source_signal(own_mlp.x, 1)
