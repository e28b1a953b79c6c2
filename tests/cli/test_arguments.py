"""Wrong usage is told before any work; help has examples that run."""

import re
import shlex

import pytest
from command import FORM, call, parsed

from captum_mipin.cli.main import COMMANDS

MODEL = f"tiny_networks:build --weights weights.pt {FORM}"
FIT, EXPLAIN = f"fit {MODEL} photos", f"explain {MODEL} few --inverse none"
OUT = f"{FIT} --out a.safetensors"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("required: COMMAND", ""),
        ("invalid choice: 'draw'", "draw"),
        ("required: --out", FIT),
        ("has the suffix '.pt', expected one of .safetensors", f"{FIT} --out a.pt"),
        ("cannot be written", f"{FIT} --out nowhere/a.safetensors"),
        ("cannot be written", f"{FIT} --out weights.pt/a.safetensors"),
        ("'folder.safetensors' cannot be written", f"{FIT} --out folder.safetensors"),
        ("'cat' is not a class, several with commas", f"{OUT} --targets cat"),
        ("--batch-size is 0, expected a whole number above 0", f"{OUT} --batch-size 0"),
        ("--batch-size: invalid int value: 'all'", f"{OUT} --batch-size all"),
        ("'8x8x8' is not pixels N, or HEIGHTxWIDTH", f"{OUT} --size 8x8x8"),
        ("'0' is not pixels N, or HEIGHTxWIDTH", f"{OUT} --size 0"),
        ("'1,2' is not one number or three", f"{OUT} --mean 1,2"),
        ("'nan' is not one number or three", f"{OUT} --mean nan"),
        ("'0,1,1' is not one number above 0 or three", f"{OUT} --std 0,1,1"),
        ("--ridge: invalid float value: 'much'", f"{OUT} --ridge much"),
        ("--mean has 1 values, --std 3", f"{OUT} --mean 1"),
        ("--device gpu: ", f"{OUT} --device gpu"),
        ("expected one of .safetensors, .jpg", f"{EXPLAIN} --out page.html"),
        (
            "'Salience' is not the name of a method: pass names among MIP-IN",
            f"compare {MODEL} few --methods Salience",
        ),
        (
            "'pointing_game' is not the name of a metric",
            f"compare {MODEL} few --metrics pointing_game",
        ),
        ("pass --inverse FILE", f"compare {MODEL} few --methods MIP-IN"),
        ("pass --inverse FILE", f"compare {MODEL} few --reading S"),
        ("'B' is not the name of a reading", f"{EXPLAIN} --reading B --out a.png"),
        ("exclude each other", f"compare {MODEL} few --no-metrics --metrics deletion"),
        ("add it, and pass --inverse", f"compare {MODEL} few --methods 'pattern only'"),
        ("'0' is not a whole number above 0", f"compare {MODEL} few --steps 0"),
        ("pass both, or none", f"{OUT} --for few"),
        ("pass --inverse FILE", f"compare {MODEL} few --methods 'Saliency,MIP-IN × gradient'"),
    ],
)
def test_wrong_usage_is_told_before_any_work(message, line, folder, capsys):
    (folder / "folder.safetensors").mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as stopped:
        call(line)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert not re.search(r"\b_\w+", err)  # no private name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(command, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "FILE.pt2 " in text
    assert "Exit codes" in text
    examples = text.partition("\n\nExamples:\n")[2].replace("\\\n", "")
    assert examples.startswith(f"  captum-mipin {command} torchvision:resnet50")
    for line in examples.splitlines():
        assert parsed(*shlex.split(line)[1:]).command == command
