"""Settings of Sphinx; docs/make_site.py calls it on a copy of the pages."""

from captum_mipin import __version__

project, author, release = "captum-mipin", "the authors of captum-mipin", __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # `make notebooks` runs them and keeps what they show
html_theme, html_title = "furo", "captum-mipin"
html_theme_options = {"source_repository": "", "top_of_page_buttons": []}
html_static_path, html_css_files = ["static"], ["site.css"]
html_copy_source = False
html_show_search_summary = False  # summaries would be fetched, which browsers refuse for file://
autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Warns", "returns_style")]
exclude_patterns: list[str] = []
