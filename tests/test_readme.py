import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_ten_lines_run(capsys):
    pytest.importorskip("sklearn")  # the digits come with it; not needed by the package
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["attribution"].shape == names["signal"].shape == (5, 64)
    assert "0/linear" in capsys.readouterr().out


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
