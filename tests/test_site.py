"""The documentation site: pages that lead somewhere, and an example for every public name."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_class_and_function_has_an_example(site):
    documented, without = 0, []
    for module in site.REFERENCE:
        for name, thing in site.public(module).items():
            documented += 1
            if ">>> " not in (thing.__doc__ or ""):
                without.append(f"{module}.{name}")
    assert without == []
    assert documented > 70


def test_the_reference_has_every_subpackage_with_public_names(site):
    rooms = {path.parent.name for path in (ROOT / "captum_mipin").glob("*/__init__.py")}
    inside = {"graph", "storage", "propagation", "inverse", "regression", "cli"}  # no user's names
    assert {f"captum_mipin.{room}" for room in rooms - inside} < set(site.REFERENCE)


def test_the_reference_is_in_the_order_of_use(site):
    first = ["for_photographs", "InverseNetwork", "MIPINAttribution", "LayerMIPINAttribution"]
    assert [*site.public("captum_mipin")][:4] == first
    assert next(iter(site.public("captum_mipin.methods"))) == "LRP"


def test_every_page_and_notebook_is_part_of_the_site(site):
    pages = {page for part in site.PARTS.values() for page in part}
    docs = {path.stem for path in (ROOT / "docs").glob("*.md")}
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert docs | notebooks <= pages
    written = {"reference/index", "CONTRIBUTING", "CHANGELOG"}
    assert pages - docs - notebooks == written


def test_links_lead_to_pages_of_the_site_or_into_the_repository(site):
    text = (
        "[a](docs/compare.md#x) [b](../notebooks/1_quick_start.ipynb) "
        "![c](benchmarks/results/d.png) [e](../CONTRIBUTING.md) [f](LICENSE) "
        "[g](https://h.org) [i](#j) [k](operations.md) [l](../README.md#m)"
    )
    targets = re.findall(r"\]\(([^)]*)\)", site.linked(text))
    assert targets == [
        "compare.md#x",
        "notebooks/1_quick_start.ipynb",
        "results/d.png",
        "CONTRIBUTING.md",
        f"{site.REPOSITORY}LICENSE",
        "https://h.org",
        "#j",
        "operations.md",
        "index.md#m",
    ]


def test_a_link_into_the_repository_leads_to_a_file(site):
    with pytest.raises(FileNotFoundError, match=r"a page links to \.\./benchmarks/gone\.py"):
        site.linked("[a](LICENSE) [b](../../benchmarks/gone.py)")


@pytest.mark.full
def test_the_site_builds_without_a_warning(site):
    pytest.importorskip("sphinx", reason="it comes with the extra `docs`")
    assert site.main() == 0
    assert (site.SITE / "index.html").exists()
