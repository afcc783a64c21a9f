"""The site: Markdown pages, the API from the docstrings, nothing from afar."""

import doctest
import sys
from pathlib import Path

SITE = Path(__file__).parent
sys.path[:0] = [str(SITE / "_ext"), str(SITE.parent)]

import msam_optax  # noqa: E402  (after the paths above)

project = "msam_optax"
author = "The msam_optax authors"
copyright = "2026, the msam_optax authors. Apache-2.0"
version = release = msam_optax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "myst_nb",
    "api_pages",
    "brought",
    "mathml",
    "messages",
]
exclude_patterns = ["_build", "_ext", "_parts", "inventories"]
templates_path = ["_templates"]

# --- API ------------------------------------------------------------------------------
autodoc_typehints = "none"  # the docstrings tell more, and shapes with it
autodoc_member_order = "bysource"
autosummary_generate = True
autosummary_imported_members = False
autosummary_context = {
    "methods": [f"msam_optax.{name}" for name in msam_optax.methods.__all__]
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

# Types of signatures that are spelled out where they are defined, as their libraries
# and Python do not document them under these names.
nitpick_ignore_regex = [
    ("py:class", r"flax\..*"),
    ("py:class", r"collections\.abc\..*"),
    ("py:class", r"jax\.jaxlib\..*"),
    ("py:class", r"(jax\.)?_?typing\..*"),
    ("py:class", r"numpy\..*|np\..*"),
    ("py:class", r"ArrayTree|chex\..*|optax\._src\..*"),
]

# Docstrings are written for pytest, which runs them in the suite with these flags.
doctest_default_flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

# Kept in the repository: a build asks nobody.
intersphinx_mapping = {
    "jax": ("https://docs.jax.dev/en/latest", "inventories/jax.inv"),
    "optax": ("https://optax.readthedocs.io/en/latest", "inventories/optax.inv"),
}

# --- Markdown and notebooks -----------------------------------------------------------
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks carry their outputs; the suite runs them
nb_ipywidgets_js: dict[str, dict[str, str]] = {}

# --- Looks ----------------------------------------------------------------------------
html_theme = "sphinx_book_theme"
html_title = "msam_optax"
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "repository_url": "https://github.com/msam-optax/msam_optax",
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has the search
    "show_navbar_depth": 1,
    "show_toc_level": 2,
}
