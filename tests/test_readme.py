import re
from pathlib import Path

import pytest

from captum_mipin import unregister_rule

README = Path(__file__).parents[1] / "README.md"


def run(section):
    """The names that the one piece of code of a section defines."""
    text = README.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    return names


def test_the_ten_lines_run(capsys):
    pytest.importorskip("sklearn")  # the digits come with it; not needed by the package
    names = run("Ten lines")
    assert names["attribution"].shape == names["signal"].shape == (5, 64)
    assert "0/linear" in capsys.readouterr().out


def test_an_operation_of_your_own_runs(capsys):
    try:
        names = run("An operation of your own")
    finally:
        unregister_rule("mylib::swish")
    assert names["signal"].shape == (5, 6)
    assert "mylib.swish.default  supported  recorded gate" in capsys.readouterr().out


def test_methods_side_by_side_run(capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = run("Side by side, and measured")
    assert not any(row.errors for row in names["found"].rows)
    assert "insertion ↑" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"side-by-side.png", "side-by-side.html"}


def test_its_table_of_metrics_is_whole():
    from captum_mipin import metrics
    from captum_mipin.compare import METRICS

    section = README.read_text().split("\n## Side by side, and measured\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section)) & set(metrics.__all__)
    assert named == METRICS.keys() | {"mosaics"}
    assert METRICS.keys() <= set(metrics.__all__)


def test_the_bottleneck_runs(capsys):
    pytest.importorskip("sklearn")
    names = run("Information bottlenecks")
    assert names["bits"].shape == (5, 1, 8, 8)
    assert (names["bits"].sum((1, 2, 3)) / names["total"]).tolist() == pytest.approx([1] * 5)
    assert "512 features of 1797 examples" in capsys.readouterr().out


def test_the_other_methods_run(capsys):
    names = run("The other methods of the paper's tables")
    assert names["relevance"].shape == names["attribution"].shape == (4, 3, 8, 8)
    assert names["at_the_pool"].shape == (4, 8, 3, 3)
    assert "LRP-γ" not in capsys.readouterr().out  # the only convolution is that of the input


def test_all_of_its_code_is_run():
    assert README.read_text().count("```python") == 5


def test_what_it_points_to_is_there():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


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
