import re
import shlex
import socket
from pathlib import Path

import pytest
import torch
from common import pages

from captum_mipin.cli.main import main
from captum_mipin.rules import unregister_rule

ROOT = Path(__file__).parents[1]
PAGES = pages()


def section(title):
    """Return the text under a title of a page; all titles differ."""
    (found,) = (
        part
        for page in PAGES
        for part in re.split(r"(?:\A|\n#)# ", page.read_text())
        if part.startswith(f"{title}\n")
    )
    return found


def run(title):
    """The names that the one piece of code of a section defines."""
    (code,) = re.findall(r"```python\n(.*?)```", section(title), re.DOTALL)
    names = {}
    exec(compile(code, title, "exec"), names)
    return names


def small_network(weights):
    """A network in place of torchvision's, whose weights would have to be downloaded."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 16, stride=16), torch.nn.ReLU(), torch.nn.Conv2d(4, 8, 3)
    pooled = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 1000)
    return torch.nn.Sequential(*layers, *pooled)


def test_the_ten_lines_run(capsys, tmp_path, monkeypatch):
    """On a folder of photographs, with a small network in place of MobileNetV2."""
    models, image = (
        pytest.importorskip(name, reason="the example needs it; the package does not")
        for name in ("torchvision.models", "PIL.Image")
    )
    (tmp_path / "photos").mkdir()
    pixels = torch.randint(256, (12, 60, 80, 3), generator=torch.Generator().manual_seed(0))
    for number, array in enumerate(pixels.byte().numpy()):
        suffix = ("jpg", "JPG", "jpeg", "png", "PNG")[number % 5]
        image.fromarray(array).save(tmp_path / "photos" / f"{number}.{suffix}")
    (tmp_path / "photos" / "notes.txt").write_text("not a photograph")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "mobilenet_v2", small_network)
    names = run("Ten lines")
    assert names["mipin"].picked == "MIP-IN unsigned × gradient at 1"
    captions = [row.caption for row in names["found"].rows if not row.control]
    assert captions == ["MIP-IN unsigned × gradient at 1", "Saliency"]
    assert len(names["x"]) == 12
    assert names["maps"].shape == (6, 1, 14, 14)
    assert not any(row.errors for row in names["found"].rows)
    assert "pattern only" in capsys.readouterr().out
    with image.open(tmp_path / "maps.png") as picture:
        assert min(picture.size) > 300
    for path in (tmp_path / "photos").glob("[0-9]*"):
        path.unlink()
    with pytest.raises(AssertionError, match=r"photos holds no \.jpg or \.png: put some there"):
        run("Ten lines")


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_question_of_which_map_has_one_answer():
    """README and the recipes hold the same table."""
    readme, recipes = (
        [line for line in section(title).splitlines() if line.startswith("|")]
        for title in ("Which map do I read?", "Which map to read")
    )
    assert len(readme) > 5
    assert readme == recipes


def test_an_operation_of_your_own_runs(capsys):
    try:
        names = run("An operation of your own")
    finally:
        unregister_rule("mylib::swish")
    assert names["signal"].shape == (5, 6)
    assert "mylib.swish.default  supported  recorded gate" in capsys.readouterr().out


def test_methods_side_by_side_run(capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with it; the package does not need it")
    monkeypatch.chdir(tmp_path)
    names = run("Several methods side by side")
    assert not any(row.errors for row in names["found"].rows)
    assert "insertion ↑" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"side-by-side.png", "side-by-side.html"}


def test_its_table_of_metrics_is_whole():
    from captum_mipin import metrics
    from captum_mipin.comparison import METRICS

    named = set(re.findall(r"`(\w+)`", section("Metrics"))) & set(metrics.__all__)
    assert named == METRICS.keys() | {"mosaics"}
    assert METRICS.keys() <= set(metrics.__all__)


def test_the_bottleneck_runs(capsys):
    pytest.importorskip("sklearn", reason="the digits come with it; the package does not need it")
    names = run("Information bottlenecks")
    assert names["bits"].shape == (5, 1, 8, 8)
    assert (names["bits"].sum((1, 2, 3)) / names["total"]).tolist() == pytest.approx([1] * 5)
    assert "512 features of 1797 values each" in capsys.readouterr().out


def test_an_exported_program_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run("Exported programs")
    assert names["program"].range_constraints
    assert main(["check", "exported.pt2", "--size", "8", "--layer", "1"]) == 0
    row = r"^3 +aten.linear.default +supported +learned dense inverse$"
    assert re.search(row, capsys.readouterr().out, re.MULTILINE)


def test_an_inverse_for_each_example_runs():
    names = run("One inverse for each example")
    assert names["attribution"].shape == (5, 64)
    assert names["inverse"].neighbours == 100


def test_the_recipes_run():
    text = run("A text")
    assert text["scores"].shape == (3, 6)
    signal = run("A signal in time")
    assert signal["found"].rows[0].maps.shape == (4, 2, 64)
    assert not any(row.error for row in signal["found"].rows)
    row = run("A table row")
    assert row["attribution"].shape == (1, 3)
    drawing = pytest.importorskip("captum_mipin.comparison.drawing")
    drawing.draw_tokens(["word"] * 6, text["scores"][0])
    map = signal["found"].rows[0].maps[0]
    drawing.draw_signal(signal["x"][0], map, names=["C3", "C4"], rate=128, unit="µV")
    drawing.draw_row(row["columns"], row["attribution"][0], row=row["x"][0])
    volume = run("A volume")
    right = (volume["model"](volume["x"]).argmax(1) == volume["large"]).float().mean()
    assert right > 0.9  # nothing to explain otherwise
    assert volume["attribution"].shape == (4, 1, 12, 12, 12)
    figure = drawing.draw_volume(volume["x"][0, 0], volume["attribution"][0])
    assert len(figure.axes) == 7  # six slices and the legend
    many = run("Many classes")
    assert len(many["together"].targets) == 50
    assert many["signal"].shape == (2, 20)


def test_the_other_methods_run(capsys):
    names = run("The other methods of the paper's tables")
    assert names["relevance"].shape == names["attribution"].shape == (4, 3, 8, 8)
    assert names["at_the_pool"].shape == (4, 8, 3, 3)
    assert "LRP-γ" not in capsys.readouterr().out  # the only convolution is that of the input


def test_the_relevance_of_tokens_runs():
    names = run("Relevance of tokens from attention weights")
    assert names["tokens"].shape == (2, 17)
    assert names["maps"].shape == (2, 1, 4, 4)


def test_a_process_that_fits_with_others_runs(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
        ("RANK", 0),
        ("WORLD_SIZE", 1),
    ):
        monkeypatch.setenv(name, str(value))
    names = run("Fitting at scale")
    assert names["bits"].shape == (1, 64)
    assert (tmp_path / "inverse.safetensors").exists()


def test_the_command_line_runs(capsys, tmp_path, monkeypatch):
    models, image = (
        pytest.importorskip(
            "torchvision.models", reason="networks to test on; the package does not need it"
        ),
        pytest.importorskip("PIL.Image", reason="images to read; the package does not need it"),
    )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(
        models.resnet18().state_dict(), "weights.pt"
    )  # the network's own are to be downloaded
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = torch.randint(256, (64, 64, 3), dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(tmp_path / "photos" / f"{number}.png")
    text = section("From the command line").split("```")[1]
    install, *commands = text.removeprefix("bash\n").replace("\\\n", "").splitlines()
    assert install.startswith("pip install")
    assert len(commands) == 5
    for command in commands:
        name, *arguments = shlex.split(
            command.replace("--weights torchvision", "--weights weights.pt")
        )
        assert name == "captum-mipin"
        assert main([*arguments, "--size", "64"]) == 0, capsys.readouterr().err
    written = {"inverse.safetensors", "maps.png", "maps.safetensors", "page.html", "table.md"}
    assert {path.name for path in tmp_path.iterdir()} == written | {"photos", "weights.pt"}
    assert "failed" not in (tmp_path / "table.md").read_text()


def test_all_of_their_code_is_run():
    pieces = sum(page.read_text().count("```python") for page in PAGES)
    assert pieces == Path(__file__).read_text().count('= run("') - 1  # this one itself


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_it_points_to_is_there(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_of_the_documentation_is_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        links = (
            (page.parent / target).resolve()
            for page in new
            for target in re.findall(r"\]\((?!http)([^)#]+\.md)[^)]*\)", page.read_text())
        )
        new = set(links) - reached
    assert reached >= set(PAGES)


def test_it_names_only_operations_that_check_knows():
    from captum_mipin.rules import MIPIN

    for name in (
        "relu",
        "clamp",
        "max_pool2d",
        "adaptive_avg_pool2d",
        "mean",
        "sum",
        "conv3d",
        "conv_transpose1d",
        "linear",
        "cat",
    ):
        assert any(key.split(".")[1] == name for key in MIPIN), name


def test_contributing_names_what_is_there():
    """Paths exist, from the repository's root or the package's; so do the tables in a file."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`([\w./]+(?:/|\.py|\.md|\.toml))`", text)
    folders = ROOT, ROOT / "captum_mipin"
    assert [p for p in paths if not any((folder / p).exists() for folder in folders)] == []
    for table, path in re.findall(r"`(_?[A-Z]\w+)`\s+of\s+`([\w./]+\.py)`", text):
        assert re.search(rf"^(class )?{table}\b", (ROOT / path).read_text(), re.MULTILINE), table
    for target in re.findall(r"^\| `make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
