"""Settings of the documentation; `docs/build.py` lays out its pages."""

import re
from configparser import ConfigParser
from pathlib import Path

from pygments.formatters import HtmlFormatter
from sphinx.highlighting import PygmentsBridge

settings = ConfigParser()
settings.read(Path(__file__).parent.parent / "settings.ini")
project, author, release = (settings["DEFAULT"][key] for key in ("title", "author", "version"))
project_copyright = settings["DEFAULT"]["copyright"]

exclude_patterns = ["figures/[!R]*.md"]  # tables that other pages hold
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
add_module_names = False
toc_object_entries_show_parents = "hide"
nb_code_prompt_show = "code"
nb_code_prompt_hide = "hide the code"

html_theme = "furo"
html_title = f"{project} {release}"
html_favicon = html_logo = "icon.svg"
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_copy_source = False
html_search_scorer = str(Path(__file__).parent / "scorer.js")
mathjax_path = "mathjax/tex-mml-chtml.js"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5a8a", "color-brand-content": "#0b5a8a"},
    "dark_css_variables": {"color-brand-primary": "#6cb6e8", "color-brand-content": "#6cb6e8"},
}


class Lines(HtmlFormatter):
    """Code whose lines are elements that know their indent, so that a long one can go on below it."""

    def wrap(self, source):
        return super().wrap((kind, element(text)) for kind, text in source)


def element(line):
    plain = re.sub("<[^>]+>", "", line)
    indent = len(plain) - len(plain.lstrip(" "))
    return f'<span class="line" style="--indent: {indent}ch">{line}</span>'


PygmentsBridge.html_formatter = Lines
