"""Build the documentation site: python docs/make_site.py, into build/site/.

The sources are README.md, the pages of docs/, the notebooks, and the docstrings of public names. A
warning of Sphinx is an error. The site needs no network: open build/site/index.html.
"""

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE, SITE = ROOT / "build" / "site-source", ROOT / "build" / "site"
REPOSITORY = "https://github.com/captum-mipin/captum-mipin/blob/main/"

#: Title of a part of the site -> its pages, by their paths without suffix.
PARTS = {
    "Tutorial": [
        "notebooks/1_quick_start",
        "notebooks/2_side_by_side",
        "notebooks/3_layers_and_boxes",
    ],
    "How to": [
        *("how_to", "command_line", "compare", "support", "notebooks/5_your_own_operation"),
        *("notebooks/6_beyond_photographs", "scale", "neighbours"),
    ],
    "Reference": ["reference/index", "api", "operations", "format"],
    "Explanation": ["how_it_works", "methods", "bottlenecks", "metrics"],
    "How far to trust it": ["notebooks/4_how_far_to_trust_it", "results", "paper", "transformers"],
    "Project": ["CONTRIBUTING", "CHANGELOG"],
}
#: Subpackage -> what it holds.
REFERENCE = {
    "captum_mipin": "The names that most users need.",
    "captum_mipin.methods": "Other attribution methods on the same mechanism.",
    "captum_mipin.bottleneck": "Information bottlenecks.",
    "captum_mipin.metrics": "Metrics of attributions by any method.",
    "captum_mipin.comparison": "Several methods side by side.",
    "captum_mipin.comparison.drawing": "Pictures of tokens, signals, table rows and volumes.",
    "captum_mipin.rules": "Rules of operations.",
    "captum_mipin.errors": "Errors and warnings.",
}


def public(module: str) -> dict[str, object]:
    """Return name -> class or function, for the public ones of a module.

    Names are in the order in which the pages use them, first docs/api.md; all others come last.
    """
    found = importlib.import_module(module)
    names = getattr(found, "__all__", [name for name in vars(found) if name[0] != "_"])
    pages = (ROOT / "docs" / f"{page}.md" for page in ("api", "metrics", "methods"))
    text = "\n".join(page.read_text("utf-8") for page in pages)
    places = {name: re.search(rf"\b{name}\b", text) for name in names}
    names = sorted(names, key=lambda n: place.start() if (place := places[n]) else len(text))
    things = {name: getattr(found, name) for name in names}
    return {
        name: thing
        for name, thing in things.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__.startswith("captum_mipin")
    }


def main() -> int:
    """Build the site; return the exit code of Sphinx."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    for folder in ("notebooks", "reference"):
        (SOURCE / folder).mkdir(parents=True)
    for page in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("C*.md")]:
        (SOURCE / page.name).write_text(linked(page.read_text("utf-8")), "utf-8")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        text = notebook.read_text("utf-8").replace("../docs/", "../")
        (SOURCE / "notebooks" / notebook.name).write_text(text, "utf-8")
    shutil.copytree(ROOT / "benchmarks" / "results", SOURCE / "results")
    write_reference()
    write_index()
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    paths = ["-c", str(ROOT / "docs"), str(SOURCE), str(SITE)]
    return subprocess.run([*command, *paths], check=False).returncode


def linked(text: str) -> str:
    """Return the text of a page with links that hold in the site.

    Files of the repository that are no pages are linked in the repository; pictures are copied.

    Raises:
        FileNotFoundError: Such a file does not exist.
    """
    text = re.sub(
        r"\]\((?:\.\./)?benchmarks/results/([^)]+\.(?:png|jpg))\)", r"](results/\1)", text
    )
    text = re.sub(r"\]\((?:\.\./)?docs/", "](", text).replace("](../README.md", "](index.md")
    text = re.sub(r"\]\(\.\./((?:C\w+\.md|notebooks/)[^)]*)\)", r"](\1)", text)
    own = r"(?!https?:|#|results/|notebooks/\w+\.ipynb|C\w+\.md|[\w-]+\.md)"
    return re.sub(rf"(?<!!)\]\((?:\.\./)?{own}([^)]+)\)", _in_repository, text)


def _in_repository(link: re.Match[str]) -> str:
    if not (ROOT / link[1].partition("#")[0]).exists():
        raise FileNotFoundError(f"a page links to {link[1]}, expected a file of the repository")
    return f"]({REPOSITORY}{link[1]})"


def write_reference() -> None:
    """Write a page for each subpackage, with the docstrings of its public names."""
    tree = "\n".join(REFERENCE)
    index = f"# Reference\n\nAll public names, by subpackage.\n\n```{{toctree}}\n{tree}\n```\n"
    (SOURCE / "reference" / "index.md").write_text(index, "utf-8")
    first = public("captum_mipin")
    for module, about in REFERENCE.items():
        lines = [module, "=" * len(module), "", about, ""]
        names = public(module)
        also = [name for name in names if name in first and module != "captum_mipin"]
        lines += [f"{', '.join(also)}: see :doc:`captum_mipin`.", ""] if also else []
        for name, thing in names.items():
            if name in also:
                continue
            kind = "autofunction"
            if inspect.isclass(thing):
                kind = "autoexception" if issubclass(thing, Exception) else "autoclass"
            lines += [f".. {kind}:: {module}.{name}"]
            lines += ["   :members:", "   :show-inheritance:"] * (kind != "autofunction") + [""]
        (SOURCE / "reference" / f"{module}.rst").write_text("\n".join(lines), "utf-8")


def write_index() -> None:
    """Write the first page: README.md, and the parts of the site."""
    readme = linked((ROOT / "README.md").read_text("utf-8"))
    trees = (
        f"```{{toctree}}\n:caption: {title}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"
        for title, pages in PARTS.items()
    )
    (SOURCE / "index.md").write_text(readme + "\n" + "\n".join(trees), "utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
