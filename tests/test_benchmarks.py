import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def completeness(monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with it; the package does not need it")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import completeness

    yield completeness
    for name in ("completeness", "common", "data", "networks"):
        sys.modules.pop(name, None)


def images(completeness, x, labels):
    return completeness.Images("made up", x, labels, x, labels, ("a", "b"))


def test_apc_by_hand(completeness):
    """Two classes, computed by hand; logits are the pixels themselves.

    Class a: errors 50 % lost, 100 % too much. Class b: 10 % lost on an image that is taken for a
    (90 % too much there), 30 % lost on one that is not.
    """
    x = torch.tensor([[2.0, 0.0], [1.0, 0.0], [10.0, 5.0], [0.0, 10.0]])
    found = {
        0: torch.tensor([[1.0, 0.0], [2.0, 0.0], [19.0, 0.0]]),
        1: torch.tensor([[0.0, 4.5], [0.0, 7.0]]),
    }
    data = images(completeness, x, torch.tensor([0, 0, 1, 1]))
    result = completeness.apc(nn.Identity(), data, lambda part, label: found[label])
    assert result == pytest.approx(
        {
            "APC %": (75 + 20) / 2,
            "positive APC %": (25 + 20) / 2,
            "APC % (correct)": (75 + 30) / 2,
            "positive APC % (correct)": (25 + 30) / 2,
            "APC % (predicted)": (80 + 30) / 2,
            "positive APC % (predicted)": (50 / 3 + 30) / 2,
            "median error %": (50 + 10) / 2,
        }
    )


def test_controls_do_what_they_say(completeness):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.randn(60, 4)
    labels = torch.arange(60) % 2
    inverse = completeness.InverseNetwork(model).fit(x, progress=False)
    signals = completeness.controls(model, images(completeness, x, labels), inverse)
    part = x[:8]
    torch.testing.assert_close(signals["S"](part, 1), inverse.source_signal(part, target=1))
    assert torch.equal(signals["mean image"](part, 0)[3], x.mean(0))
    assert torch.equal(signals["mean image of the class"](part, 1)[3], x[1::2].mean(0))
    with torch.no_grad():
        mean = model(x)[:, 1].mean()
    found = inverse.explain((part,), 1, biases=(False, True))
    (a,), (s,) = found.signals
    torch.testing.assert_close(
        signals["mask only"](part, 1),
        s + a * (mean / found.output - 1).unsqueeze(1),
        rtol=1e-4,
        atol=1e-4,
    )
    assert not torch.allclose(signals["shuffled output"](part, 1), s)


@pytest.fixture
def bottleneck(monkeypatch):
    pytest.importorskip("torchvision", reason="networks to test on; the package does not need it")
    pytest.importorskip("sklearn", reason="the digits come with it; the package does not need it")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bottleneck

    yield bottleneck
    for name in ("bottleneck", "common", "data", "networks", "pretrained", "localization_grid"):
        sys.modules.pop(name, None)


def test_box_accuracy_by_hand(bottleneck):
    """Three pixels lie inside; of the three highest-scored, two do.

    Ties fall to chance: half of the pixels are inside.
    """
    scores = torch.tensor([[[9.0, 8.0], [7.0, 1.0], [2.0, 3.0]]])
    boxes = torch.tensor([[[True, False], [True, False], [True, False]]])
    order = bottleneck.ranked(scores, torch.Generator().manual_seed(0))
    assert order.tolist() == [[0, 1, 2, 5, 4, 3]]
    assert bottleneck.box_accuracy(order, boxes).tolist() == pytest.approx([2 / 3])
    flat = bottleneck.ranked(torch.zeros(500, 3, 2), torch.Generator().manual_seed(0))
    assert float(bottleneck.box_accuracy(flat, boxes.expand(500, -1, -1)).mean()) == pytest.approx(
        0.5, abs=0.03
    )


def test_deletion_and_insertion_by_hand(bottleneck):
    """The probability is the share of a constant image that remains; a blur keeps such an image."""

    class Amount(nn.Module):
        def forward(self, x):
            share = x.flatten(1).mean(1)
            return torch.stack([share, 1 - share], 1).clamp(min=1e-9).log()

    found = bottleneck.curves(
        Amount().eval(),
        torch.ones(2, 1, 12, 12),
        torch.rand(2, 12, 12),
        torch.tensor([0, 1]),
        seed=0,
        baseline=bottleneck.blurred,
    )
    torch.testing.assert_close(found[0], torch.tensor([0.5, 0.5]).double())
    torch.testing.assert_close(found[1], torch.tensor([1.0, 0.0]).double(), rtol=1e-5, atol=1e-5)


def test_curves_are_those_of_eighths_replaced_in_the_order_of_the_ranks(bottleneck):
    """Of images, ties among their pixels, and of tokens: as the results files say."""
    torch.manual_seed(0)
    images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)).eval()
    words = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(64, 3)).eval()
    target = torch.tensor([0, 1, 2, 1])
    for model, x, maps, baseline in (
        (
            images,
            torch.rand(4, 1, 12, 12),
            torch.rand(4, 12, 12).mul(3).round(),
            bottleneck.blurred,
        ),
        (words, torch.randint(9, (4, 16)), torch.rand(4, 16).mul(5).round(), 0),
    ):
        rank = (
            bottleneck.ranked(maps.unsqueeze(1), torch.Generator().manual_seed(2))
            .argsort(1)
            .view_as(maps)
        )
        first = baseline(x) if callable(baseline) else torch.full_like(x, baseline)
        found = bottleneck.curves(model, x, maps, target, seed=2, baseline=baseline)
        for areas, start, finish in zip(found, (x, first), (torch.zeros_like(x), x), strict=True):
            points = []
            for step in range(9):
                gone = (rank < step * maps[0].numel() // 8).view_as(x)
                with torch.no_grad():
                    points.append(
                        model(torch.where(gone, finish, start)).softmax(1)[torch.arange(4), target]
                    )
            torch.testing.assert_close(
                areas,
                torch.trapezoid(torch.stack(points), dx=1 / 8, dim=0).double(),
                rtol=0,
                atol=1e-6,
            )


def test_rank_correlation_is_spearmans(bottleneck):
    stats = pytest.importorskip(
        "scipy.stats", reason="independent rank correlations to compare with"
    )
    a, b = torch.rand(3, 5, 4), torch.rand(3, 5, 4)
    expected = (
        sum(stats.spearmanr(p.flatten(), q.flatten()).statistic for p, q in zip(a, b, strict=True))
        / 3
    )
    assert bottleneck.rank(a, b) == pytest.approx(expected)


@pytest.fixture
def boxes(monkeypatch):
    pytest.importorskip("torchvision", reason="networks to test on; the package does not need it")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import boxes

    yield boxes
    for name in ("boxes", "common", "data", "heads", "networks", "pretrained", "localization_grid"):
        sys.modules.pop(name, None)


def test_halves_share_nothing_and_each_class_evenly(boxes):
    labels = torch.tensor([3] * 8 + [5] * 6 + [9] * 2)[torch.randperm(16)]
    one, other = boxes.halves(labels, torch.Generator().manual_seed(0))
    assert sorted([*one.tolist(), *other.tolist()]) == list(range(16))
    assert labels[one].bincount().tolist() == labels[other].bincount().tolist()


def photographs(boxes, count):
    """Return images of 2 x 2 pixels, boxed at the upper left; the first half is for choosing."""
    masks = torch.zeros(count, 2, 2, dtype=torch.bool)
    masks[:, 0, 0] = True
    index = torch.arange(count)
    x = torch.zeros(count, 3, 2, 2)
    return boxes.Photographs(
        x, x, torch.zeros(count, dtype=torch.long), masks, index[: count // 2], index[count // 2 :]
    )


def test_chosen_on_one_half_reported_on_the_other(boxes):
    """The first setting is right on the choosing half alone: it is chosen, and reported as 0."""
    about = photographs(boxes, 8)
    right, wrong = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0, 0], [0, 1.0]])
    first = torch.stack([right] * 4 + [wrong] * 4)
    tries = [
        boxes.Try.of(("m", "layer", reading), "sum", maps, about, torch.arange(8))
        for reading, maps in (("one", first), ("two", first.flip(0)))
    ]
    pixels = [
        boxes.Try.of(("m", "pixels", ""), "sum", maps[4:], about, about.report)
        for maps in (first, first.flip(0))
    ]
    layer, pixel = boxes.best([*tries, *pixels], about)
    assert layer is tries[0]
    assert pixel is pixels[1]
    assert "accuracy" not in layer.row(about, layer, chosen=True)
    told, other = (one.scored(about, about.report) for one in tries)
    row = told.row(about, other, chosen=True)
    assert (row["choosing half"], row["accuracy"], row["n"], row["MIP-IN less this"]) == (
        1,
        0,
        4,
        1,
    )


def test_patterns_are_fitted_on_images_of_all_classes(boxes):
    found = boxes.some(torch.arange(20).repeat_interleave(330))
    assert len(found) == boxes.PATTERNS
    assert len(found.unique()) == 20


def test_switches_send_signals_to_the_maximum(boxes):
    x = torch.tensor([[[[1.0, 4.0], [2.0, 3.0]]]])
    found = boxes.switched(
        nn.MaxPool2d(2), x, {"A": torch.full((1, 1, 1, 1), 5.0), "S": torch.full((1, 1, 1, 1), 7.0)}
    )
    assert found["A"].flatten().tolist() == [0, 5, 0, 0]
    assert found["S × feature"].flatten().tolist() == [0, 28, 0, 0]


def test_a_chain_cut_anywhere_is_the_network(boxes):
    steps = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    net, x = boxes.Chain(steps, lambda x: x, (1, 2)), torch.randn(3, 1, 4, 4)
    found = boxes.features(net, x)
    assert boxes.places(found) == {1: "2 x 2 x 2, lower", 2: "2 x 2 x 2"}
    for cut in net.cuts:
        torch.testing.assert_close(net.above(cut)(found[cut]), steps(x))


SCRIPTS = sorted(path.stem for path in Path(BENCHMARKS).glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_finds_all_that_it_imports(name, monkeypatch):
    """No other test runs most of them: they need data, or take long."""
    for needed in ("sklearn", "torchvision", "PIL", "matplotlib", "zennit"):
        pytest.importorskip(needed, reason="for the benchmarks; the package does not need it")
    monkeypatch.syspath_prepend(BENCHMARKS)
    known = set(sys.modules)
    importlib.import_module(name)
    for other in sys.modules.keys() - known:
        if other in SCRIPTS:
            sys.modules.pop(other)


def test_the_parts_of_a_fit_that_are_timed_are_there(monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with it; the package does not need it")
    monkeypatch.syspath_prepend(BENCHMARKS)
    speed = importlib.import_module("speed")
    row = {}
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    with speed.parts(row):
        speed.InverseNetwork(model).fit(torch.randn(40, 1, 6, 6), progress=False)
    assert row.keys() >= {f"{part} s" for part in ("capture", "forward", "moments", "solve")}


def test_the_script_for_gpus_runs_on_the_cpu(monkeypatch):
    """With small settings, on which the CPU differs from itself by nothing."""
    pytest.importorskip("torchvision", reason="the script measures its networks")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).eval()  # fmt: skip
    row = gpu.measure(model, torch.randn(8, 3, 9, 9), batch=4, rounds=1)
    assert row["images"] == 8 and row["fit s"] > 0
    assert set(row) >= {f"attribute / Saliency, {count} images" for count in (2, 8)}
    assert row["largest difference from the CPU"] == 0
    for name in ("gpu", "common"):
        sys.modules.pop(name, None)


def test_the_table_of_other_packages_counts_verdicts_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tables

    refusal = "refused: no signal can be sent back through\n  aten.stft.default in a: complex"
    rows = [
        {"check": "works", "MIP-IN": "works", "LRP": "works in float64; in float32, differ"},
        {"check": refusal, "MIP-IN": refusal, "LRP": "failed: not finite"},
        {"check": "failed: more than 9 s"},
        {"check": "not built: ImportError"},
    ]
    named = [{"package": "a", "family": str(i)} | row for i, row in enumerate(rows)]
    result = {"settings": {"families": {"a": 7}}, "rows": named}
    monkeypatch.setattr(tables, "read", lambda name: result)
    counts = tables.wild().splitlines()[2]
    assert counts == "| a | 3 of 7 | 1 / 1 / 1 | 1 / 0 / 2 | 0 / 0 / 1 | 0 / 0 / 1 | – |"
    told = tables.wild_refused().splitlines()[2:]
    assert told == [
        "| a | 1 | MIP-IN | refused: aten.stft.default in a: complex |",
        "| a | 1 | LRP | failed: not finite |",
        "| a | 2 | all | failed: more than 9 s |",
    ]
    for name in ("tables", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def script(monkeypatch):
    """A function that imports a script of benchmarks/, which is forgotten afterwards."""
    for needed in ("sklearn", "torchvision", "PIL", "matplotlib", "zennit"):
        pytest.importorskip(needed, reason="for the benchmarks; the package does not need it")
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def test_readme_shows_the_demo_with_typical_crops(script):
    """The seed has the median of insertion less deletion, and the demo takes it."""
    common, tables, demo = (script(name) for name in ("common", "tables", "demo_photographs"))
    result = common.read("typical")
    order = sorted(result["rows"], key=lambda row: row["insertion"] - row["deletion"])
    assert order[len(order) // 2]["seed"] == result["settings"]["seed"] == demo.SEED
    assert tables.typical() in (common.ROOT / "README.md").read_text()


def test_the_demo_leaves_out_what_is_no_photograph(script, tmp_path, capsys):
    image, demo = importlib.import_module("PIL.Image"), script("demo_photographs")
    (tmp_path / "notes.txt").write_text("no photograph")
    (tmp_path / "._b.jpg").write_text("no photograph")
    with pytest.raises(SystemExit, match="no photograph that can be read: pass PHOTOS="):
        demo.photographs(tmp_path)
    image.new("RGBA", (8, 6), (0, 0, 0, 0)).save(tmp_path / "a #1.PNG")
    image.new("L", (6, 8), 51).save(tmp_path / "grey.png")
    image.new("I;16", (8, 8), 20_000).save(tmp_path / "deep.png")
    capsys.readouterr()
    found = demo.photographs(tmp_path)
    assert [(one.size, one.getpixel((0, 0))) for one in found] == [
        ((8, 6), (255, 255, 255)), ((6, 8), (51, 51, 51)),
    ]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("left out") for line in lines] == [True, True]
    assert "8 bits" in lines[1]


def test_data_that_is_not_there_is_refused_with_the_way_out(script, tmp_path, monkeypatch):
    data = script("data")
    with pytest.raises(SystemExit, match=r"mnist\.npz is missing.*FOLDER="):
        data.load("mnist", tmp_path)

    def offline(*arguments, **options):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    with pytest.raises(SystemExit, match=r"cannot be downloaded \(no network\).*take digits"):
        data.load("fashion-mnist", cache=tmp_path)


def test_mosaics_of_one_photograph_count_as_one(script):
    """The standard error of n equal groups is that of the means of the groups."""
    photographs = script("photographs")
    values = torch.tensor([1.0, 1.0, 2.0, 2.0, 6.0, 6.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    means = values[::2]
    expected = float(means.std() / 3**0.5)
    assert photographs.error(values, group) == pytest.approx(expected)
    grid = photographs.Mosaics(
        2, torch.arange(32.0).view(2, 1, 4, 4).repeat(1, 3, 1, 1),
        cells=torch.tensor([1, 2]), targets=torch.tensor([0, 0]),
    )  # fmt: skip
    assert photographs.cells(grid)[0, 1, 0].tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert photographs.cells(grid)[1, 2, 0].tolist() == [[24.0, 25.0], [28.0, 29.0]]
    assert sorted(photographs.sought(grid).tolist()) == [0, 1]
