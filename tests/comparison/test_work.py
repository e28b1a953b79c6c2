"""Groups of images: budgets, interruptions, classes without an inverse, and steps."""

import itertools
import re
from functools import partial

import pytest
import torch
from torch import nn

from captum_mipin import InverseNetwork, MIPINAttribution, compare
from captum_mipin.comparison import work
from captum_mipin.errors import InputError
from captum_mipin.metrics import bounding_box_accuracy, deletion, insertion
from captum_mipin.metrics.baselines import blur

BOXES = [(0, 0, 4, 4), (2, 2, 6, 6), (4, 4, 8, 8), (0, 0, 8, 8), (1, 1, 3, 3)]
METRICS = [
    "bounding_box_accuracy",
    "pointing_game",
    "deletion",
    "insertion",
    "effective_heat_ratio",
]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


@pytest.fixture
def x():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def groups_of_two(monkeypatch):
    monkeypatch.setattr(work, "_ELEMENTS", 128)
    monkeypatch.setattr(work, "_LEAST", 2)


@pytest.fixture
def clock(monkeypatch):
    """A clock of which every look takes one second."""
    seconds = itertools.count()
    monkeypatch.setattr(work, "perf_counter", lambda: float(next(seconds)))


def test_groups_change_no_score(net, x, monkeypatch):
    def scores():
        return compare(["Saliency"], x, [0, 1, 2, 0, 1], model=net, metrics=METRICS, boxes=BOXES,
                       controls=False, progress=False)  # fmt: skip

    whole = scores()
    monkeypatch.setattr(work, "_ELEMENTS", 128)
    monkeypatch.setattr(work, "_LEAST", 2)
    parts = scores()
    torch.testing.assert_close(whole.rows[0].maps, parts.rows[0].maps)
    for metric in METRICS:
        one, many = (result.rows[0].results[metric] for result in (whole, parts))
        torch.testing.assert_close(one.values, many.values, equal_nan=True)
        assert (one.unscored, dict(one.settings)) == (many.unscored, dict(many.settings))
        assert (one.curves is None) == (many.curves is None)
        if one.curves is not None:
            torch.testing.assert_close(one.curves, many.curves, equal_nan=True)
        for name, part in one.parts.items():
            torch.testing.assert_close(part.values, many.parts[name].values, equal_nan=True)


def test_arguments_of_single_images_stay_with_their_images(net, x, groups_of_two):
    """Maps, boxes that partial has bound, and rows of further arguments."""
    maps = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    scale = torch.arange(1.0, 6.0)[:, None]
    bound = partial(bounding_box_accuracy, boxes=BOXES, largest=1.0)
    found = compare(
        {"mine": maps, "pair": (maps,)},
        x, 0, model=lambda x, s: net(x) * s, additional_forward_args=scale,
        metrics={"bound": bound, "deletion": deletion}, controls=False, progress=False,
    )  # fmt: skip
    for row in found.rows:
        assert not row.errors
        assert torch.equal(row.maps, maps)
        expected = bound(maps, x)
        torch.testing.assert_close(row.results["bound"].values, expected.values)
        with torch.no_grad():
            start = (net(x) * scale).softmax(1)[:, 0].double()
        torch.testing.assert_close(row.results["deletion"].curves[:, 0], start)


def test_a_budget_stops_adding_images_and_says_so(net, x, clock, groups_of_two):
    ask = {"model": net, "controls": False, "progress": False}
    found = compare(["Saliency", "LRP"], x, 0, budget=14, **ask)
    used = len(found.images)
    assert 0 < used < 5
    assert used % 2 == 0
    assert found.note == f"{used} of 5 images were used: the budget of 14 s was used up"
    assert found.note in str(found)
    assert [len(row.maps) for row in found.rows] == [used, used]
    expected = compare(["Saliency", "LRP"], x[:used], 0, **ask)
    for row, same in zip(found.rows, expected.rows, strict=True):
        assert torch.equal(row.results["deletion"].values, same.results["deletion"].values)
    assert len(compare(["Saliency"], x, 0, budget=0, **ask).images) == 2  # the first group
    assert len(compare(["Saliency"], x, 0, budget=1e9, **ask).images) == 5
    assert compare(["Saliency"], x, 0, budget=1e9, **ask).note == ""
    with pytest.raises(InputError, match="budget=-1"):
        compare(["Saliency"], x, 0, budget=-1, **ask)


def test_what_is_done_survives_an_interrupt(net, x, groups_of_two):
    """Calls of the second method: one for each group of images."""

    def interrupted_at(call):
        calls = itertools.count()

        def method(inputs, target):
            if next(calls) == call:
                raise KeyboardInterrupt
            return inputs

        return compare(
            {"first": "Saliency", "second": method, "third": lambda x, t: x}, x, 0, model=net,
            controls=False, progress=False, callback=lambda result: seen.append(len(result.rows)),
        )  # fmt: skip

    seen = []
    found = interrupted_at(0)
    assert [row.name for row in found.rows] == ["first"]
    assert found.rows[0].results["deletion"].n == len(found.images) == len(found.titles) == 2
    assert found.note == "2 of 5 images were used: interrupted before second, third"
    assert seen == [1, 1, 1]  # after the maps, their insertion and their deletion
    seen = []
    found = interrupted_at(1)
    assert [row.name for row in found.rows] == ["first", "second", "third"]
    assert [len(row.results["deletion"]) for row in found.rows] == [2, 2, 2]
    assert found.note == "2 of 5 images were used: interrupted"
    assert seen == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert interrupted_at(9).note == ""

    def at_once(inputs, target):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare({"a": at_once}, x, 0, model=net, progress=False)


@pytest.mark.parametrize(("at", "scored"), [("deletion", []), ("insertion", ["deletion"])])
def test_maps_survive_an_interrupt_before_their_scores(
    at, scored, net, x, groups_of_two, monkeypatch
):
    """Formerly nothing was left of a method before all of its metrics were measured."""

    def interrupted(self, line, title, *arguments, score=work.Work._score):
        if title == at:
            raise KeyboardInterrupt
        score(self, line, title, *arguments)

    ask = {"model": net, "controls": False, "metrics": ["deletion", "insertion"], "progress": False}
    expected = compare(["Saliency"], x[:2], 0, **ask)["Saliency"]
    monkeypatch.setattr(work.Work, "_score", interrupted)
    found = compare(["Saliency", "LRP"], x, 0, **ask)
    (row,) = found.rows
    assert torch.equal(row.maps, expected.maps)
    assert list(row.results) == scored
    for name, result in row.results.items():
        assert torch.equal(result.values, expected.results[name].values)
    missing = [f"{name} of Saliency" for name in ask["metrics"] if name not in scored]
    told = ", ".join([*missing, "LRP"])
    assert found.note == f"2 of 5 images were used: interrupted before {told}"


def test_a_class_without_an_inverse_leaves_its_line(net, x, groups_of_two, tmp_path):
    inverse = InverseNetwork(net).fit(torch.rand(60, 1, 8, 8), targets=[0, 1], progress=False)
    targets = [0, 2, 1, 2, 2]
    metrics = ["insertion", "completeness"]
    found = compare(["MIP-IN", "Saliency"], x, targets, inverse=inverse, metrics=metrics,
                    names=["cat", "dog", "cow"], controls=False, progress=False)  # fmt: skip
    row = found["MIP-IN"]
    mipin = MIPINAttribution(net, inverse)
    torch.testing.assert_close(row.maps[[0, 2]], mipin.attribute(x[[0, 2]], [0, 1]))
    assert row.maps[[1, 3, 4]].isnan().all()
    assert row.results["insertion"].unscored == {"no map": (1, 3, 4)}
    assert row.results["completeness"].n == 2
    assert found["Saliency"].results["insertion"].n == 5
    assert "(2 of 5)" in str(found)
    (line,) = [line for line in str(found).splitlines() if line.startswith("no map")]
    assert line.startswith(
        "no map for image 2 (cow), image 4 (cow), image 5 (cow) (MIP-IN): no inverse was fitted"
    )
    assert row.to_dict()["missing"] == {next(iter(row.missing)): [1, 3, 4]}
    short = "no inverse was fitted for target 2"
    texts = [text.get_text() for axis in found.figure().axes for text in axis.texts]
    assert [" ".join(text.split()) for text in texts] == [short] * 3
    found.save_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8").count(f"<span>{short}</span>") == 3
    (row,) = compare(["MIP-IN"], x, 2, inverse=inverse, controls=False, progress=False).rows
    assert row.error.startswith("no inverse was fitted for target 2")


def test_a_method_that_cannot_work_is_not_tried_again(net, x, groups_of_two):
    calls = []

    def broken(inputs, target):
        calls.append(1)
        raise ValueError("no")

    (row,) = compare(broken, x, 0, model=net, controls=False, progress=False).rows
    assert (row.error, len(calls)) == ("ValueError: no", 1)


def test_steps_are_few_unless_the_protocol_is_asked_for():
    net = nn.Sequential(nn.Flatten(), nn.Linear(100 * 2, 3)).eval()
    x = torch.rand(1, 1, 100, 2)
    ask = {"model": net, "controls": False, "progress": False, "metrics": ["deletion"]}

    def step(**options):
        (row,) = compare(["Saliency"], x, 0, **ask, **options).rows
        return row.results["deletion"].settings["step"]

    assert [step(), step(steps=10), step(steps=33), step(steps=None)] == [8, 20, 8, 2]
    with pytest.raises(InputError, match="steps=0"):
        step(steps=0)


def test_one_pixel_a_step_for_signals():
    """Not the length of the signal, which would be the only step."""
    x = torch.rand(2, 3, 7)
    assert deletion(x, x, model=lambda x: x.sum((1, 2)), score="logit").curves.shape == (2, 8)


def test_the_bar_shows_method_metric_and_the_time_left(net, x, capsys, groups_of_two):
    compare(["Saliency"], x, 0, model=net, controls=False)
    err = capsys.readouterr().err
    assert "Saliency, insertion" in err
    assert re.search(r"[1-9]/10 \[00:0\d<00:0\d", err)  # done, time so far, time left


def test_ends_of_curves_are_computed_once_for_all_methods(x):
    rows = []

    def model(x):
        rows.extend(row.numpy().tobytes() for row in x)
        return torch.stack([x.flatten(1).sum(1).sin(), x.flatten(1).square().sum(1)], 1)

    targets, n = [0, 1, 0, 1, 1], len(x)
    methods = {f"maps {seed}": torch.randn(5, 1, 8, 8) for seed in range(3)}
    found = compare(
        methods, x, targets, model=model, metrics=["insertion", "deletion"], titles=[""] * n,
        controls=False, progress=False,
    )  # fmt: skip
    # 9 points a curve; of two curves of an image, 7 points each and 3 ends: itself, blurred, 0
    blank = torch.zeros(1, 8, 8).numpy().tobytes()
    ends = [row.numpy().tobytes() for row in (*x, *blur(x))]
    # and the first image once more, to check the targets
    assert len(rows) == 3 * n * 14 + 3 * n + 1
    assert [rows.count(row) for row in ends] == [2] + [1] * (2 * n - 1)
    assert rows.count(blank) == n  # of the two targets
    for name, row in zip(methods, found.rows, strict=True):
        for metric in (insertion, deletion):
            alone = metric(methods[name], x, targets, model=model)
            torch.testing.assert_close(row.results[metric.__name__].curves, alone.curves)


def test_ends_of_curves_belong_to_one_model_score_and_baseline(net, x):
    other, constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), torch.ones(1, 8, 8)
    metrics = {
        "net": deletion,
        "other": partial(deletion, model=other),
        "logit": partial(deletion, score="logit"),
        "ones": partial(deletion, baseline=1.0),
        "tensor": partial(deletion, baseline=constant),
    }
    maps = torch.randn(5, 1, 8, 8)
    found = compare(maps, x, 0, model=net, metrics=metrics, controls=False, progress=False)
    for name, metric in metrics.items():
        model = {} if name == "other" else {"model": net}
        alone = metric(maps, x, 0, **model)
        torch.testing.assert_close(found.rows[0].results[name].curves, alone.curves)
