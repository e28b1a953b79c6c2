"""Tables as text, Markdown, data frames and JSON."""

import json
import sys
import types
from dataclasses import replace

import pytest

from captum_mipin.errors import InputError


def test_tables_say_what_was_measured(found):
    text, markdown = found.table(), found.table("markdown")
    assert str(found) == text
    lines = text.splitlines()
    assert lines[0].split() == [
        "method",
        "bounding",
        "box",
        "accuracy",
        "↑",
        "deletion",
        "↓",
        "completeness",
        "↓",
    ]
    assert lines[3].split() == ["broken", "failed", "failed", "failed"]
    assert "nan (0 of 3)" in lines[4]
    result = found["MIP-IN"].results["deletion"]
    assert f"{result.mean:.3g} ± {result.standard_error:.2g}" in lines[1]
    assert "failed (broken): ValueError: this network <i>is not</i> supported" in lines
    assert markdown.splitlines()[1] == "| --- | --- | --- | --- |"
    assert len({line.count("|") for line in markdown.splitlines()[:11]}) == 1
    rows = [replace(row, name=f"{row.name}\n|") for row in found.rows]
    broken = replace(found, rows=tuple(rows)).table("markdown").splitlines()
    assert broken[2].startswith("| MIP-IN \\| |")
    with pytest.raises(InputError, match="form='latex'"):
        found.table("latex")


def test_parts_have_columns_if_asked_for(found):
    header = found.table("markdown", parts=True).splitlines()[0]
    assert header.strip("| ").split(" | ") == [
        "method",
        "bounding box accuracy ↑",
        "bounding box accuracy, tied",
        "deletion ↓",
        "completeness ↓",
        "completeness, positive APC ↓",
        "completeness, shuffled output ↓",
        "completeness, shuffled output, positive ↓",
    ]
    line = found.table("markdown", parts=True).splitlines()[2].split(" | ")
    assert line[5].startswith(
        f"{found['MIP-IN'].results['completeness'].parts['positive APC'].mean:.3g}"
    )


def test_a_table_for_pandas(found, monkeypatch):
    frame = lambda lines, index: (lines, index)  # noqa: E731
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=frame))
    lines, index = found.table("pandas")
    assert index == [row.name for row in found.rows]
    assert lines[0]["deletion"] == found["MIP-IN"].results["deletion"].mean
    assert lines[0]["deletion, n"] == 3
    nothing = {"": None, ", standard error": None, ", n": 0}
    empty = {
        f"{metric}{part}": value for metric in found.metrics for part, value in nothing.items()
    }
    assert lines[2] == {"control": False, **empty, "error": found["broken"].error}
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        found.table("pandas")


def test_a_table_in_pandas(found):
    pandas = pytest.importorskip("pandas", reason="tables as data frames are for those who have it")
    frame = found.table("pandas")
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc["MIP-IN", "deletion"] == found["MIP-IN"].results["deletion"].mean


def test_all_of_it_as_json(found):
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["name"] for row in data["rows"]] == [row.name for row in found.rows]
    assert data["rows"][2]["errors"] == {"": found["broken"].error}
    assert data["rows"][0]["results"]["deletion"]["n"] == 3
