"""Settings of Sphinx; docs/make_site.py calls it on a copy of the pages."""

from captum_mipin import __version__

project, author, release = "captum-mipin", "the authors of captum-mipin", __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # `make notebooks` runs them and keeps what they show
html_theme, html_title = "furo", "captum-mipin"
html_theme_options = {"source_repository": "", "top_of_page_buttons": []}
html_static_path, html_css_files = ["static"], ["site.css"]
html_copy_source = html_show_copyright = False
html_show_search_summary = False  # summaries would be fetched, which browsers refuse for file://
autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Warns", "returns_style")]
exclude_patterns: list[str] = []


def public_bases(app, name, obj, options, bases):  # type: ignore[no-untyped-def]
    """Replace private base classes of a class by their own bases."""
    while any(base.__name__[0] == "_" for base in bases):
        bases[:] = [b for base in bases
                    for b in (base.__bases__ if base.__name__[0] == "_" else (base,))]  # fmt: skip


def setup(app):  # type: ignore[no-untyped-def]
    """Connect what runs while the site is built."""
    app.connect("autodoc-process-bases", public_bases)
